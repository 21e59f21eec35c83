"""Summary of ``make mutants``: killed and surviving mutants of each file; exit status 1 below 90 % killed in any.

A mutant that ran into the time limit does not count as killed: most of them loop for ever, but on a busy machine a
survivor may look the same. MUTANTS.md explains the survivors.
"""

import subprocess
import sys
from collections import Counter

MIN_KILLED = 90.0  # percent, of each file


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
    print("\n".join(line for line in results.splitlines() if not line.endswith(": killed")))
    files = count(results)
    print(f"\n{'file':36}{'mutants':>8}{'killed':>8}{'stopped':>8}{'survived':>9}{'other':>7}{'killed in %':>13}")
    enough = bool(files)
    for file, found in sorted(files.items()):
        total = sum(found.values())
        counts = [found["killed"], found["timeout"], found["survived"]]
        share = 100 * found["killed"] / total
        enough = enough and share >= MIN_KILLED
        print(f"{file:36}{total:8}{counts[0]:8}{counts[1]:8}{counts[2]:9}{total - sum(counts):7}{share:13.1f}")
    if not enough:
        print(f"fewer than {MIN_KILLED:g} % killed: add tests that detect the mutants above", file=sys.stderr)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
