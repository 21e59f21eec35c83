"""``results.json``: what a run measured, in full precision, and at the same time the mark that it is complete.

Standard library only. As a program it prints base, new and their harmonic mean H of two runs:

    python trainers/prompting/results.py <folder of the base run> <folder of the new run>
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

NAME = "results.json"


def write_results(folder: str, results: dict[str, Any]) -> str:
    """Write ``results.json``, atomically. Returns its path."""
    path = os.path.join(folder, NAME)
    write_text(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return path


def write_text(path: str, text: str) -> None:
    """Write a file atomically: it is either there and whole, or as it was before."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_results(folder: str) -> dict[str, Any]:
    """Read what a finished run measured. Raises FileNotFoundError where it has not finished."""
    with open(os.path.join(folder, NAME), encoding="utf-8") as file:
        return json.load(file)


def harmonic_mean(base: float, new: float) -> float:
    """H = 2 * base * new / (base + new), of two accuracies in percent; 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        base, new = (read_results(folder) for folder in argv)
        accuracies = [run["metrics"]["accuracy"] for run in (base, new)]
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, KeyError) as error:
        print(f"error: a {NAME} of {' or '.join(argv)} holds no accuracy ({error!r})", file=sys.stderr)
        return 2
    run = base["run"]
    print(f"{run['trainer']} on {run['dataset']}, {run['shots']} shots, seed {run['seed']} ({run['backbone']})")
    for label, value in zip(("base", "new", "H"), (*accuracies, harmonic_mean(*accuracies))):
        print(f"{label:>4} {value:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
