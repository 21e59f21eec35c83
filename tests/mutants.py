"""What ``make mutants`` found: mutants killed and survived per file; exit status 1 where fewer than 90 % were killed.

A mutant that never ends counts as killed: the tests would not pass with it. Survivors are explained in MUTANTS.md.
"""

import subprocess
import sys
from collections import Counter

LEAST = 90.0  # per cent, of each file
KILLED = ("killed", "timeout")


def count(results: str) -> dict[str, Counter]:
    """``mutmut results`` ("    module.mutant: status" lines) -> how many mutants of each file have which status."""
    files: dict[str, Counter] = {}
    for line in results.splitlines():
        mutant, _, status = line.strip().partition(": ")
        if status:
            module = mutant.rpartition(".")[0]
            files.setdefault(f"{module.replace('.', '/')}.py", Counter())[status] += 1
    return files


def main() -> int:
    results = subprocess.run(
        [sys.executable, "-m", "mutmut", "results", "--all", "true"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    print("\n".join(line for line in results.splitlines() if not line.endswith(KILLED)))
    files = count(results)
    print(f"\n{'file':36}{'mutants':>8}{'killed':>8}{'endless':>8}{'other':>8}{'killed in %':>13}")
    enough = bool(files)
    for file, found in sorted(files.items()):
        total, killed = sum(found.values()), sum(found[status] for status in KILLED)
        share = 100 * killed / total
        enough = enough and share >= LEAST
        print(f"{file:36}{total:8}{found['killed']:8}{found['timeout']:8}{total - killed:8}{share:13.1f}")
    if not enough:
        print(f"fewer than {LEAST:g} % killed: add tests that notice the mutants above", file=sys.stderr)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
