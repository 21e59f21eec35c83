"""``results.json``: what a run measured, in full precision. Written last, it also marks the run as complete.

Standard library only, so that scripts can call it without importing torch. As a program it prints base, new and their
harmonic mean H of two runs, or reports by its exit status whether a run is finished:

    python trainers/prompting/results.py <folder of the base run> <folder of the new run>
    python trainers/prompting/results.py --finished <folder>
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import IO, Any, Optional

NAME = "results.json"
TEMPORARY = re.compile(r"\..+-[0-9a-f]{12}\.tmp")


def write_results(folder: str, results: dict[str, Any]) -> str:
    """Write ``results.json``, atomically. Returns its path."""
    write_text(path := os.path.join(folder, NAME), json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return path


def write_text(path: str, text: str) -> None:
    """Write a file atomically: afterwards it is complete, or as it was before."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Open a file that replaces ``path`` once it is written and on the disk. Raises OSError that names ``path``.

    An error, a kill or a power cut before leaves an older file as it was; see :func:`remove_leftovers`.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(OSError):  # Windows and some network file systems cannot flush the new name to the disk
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            raise type(error)(error.errno, os.strerror(error.errno), path) from error
        raise


def remove_leftovers(folder: str) -> None:
    """Remove the temporary files of a killed run; only for the process that holds the folder's lock."""
    with suppress(FileNotFoundError):
        for name in filter(TEMPORARY.fullmatch, os.listdir(folder)):
            with suppress(OSError):
                os.unlink(os.path.join(folder, name))


def read_results(folder: str) -> dict[str, Any]:
    """Read what a finished run measured. Raises FileNotFoundError if it has not finished."""
    with open(os.path.join(folder, NAME), encoding="utf-8") as file:
        return json.load(file)


def is_finished(folder: str) -> bool:
    """Whether a folder has results. A damaged file counts as none, with a warning on stderr."""
    try:
        finished = isinstance(read_results(folder)["metrics"], dict)
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):  # empty, cut, something else
        finished = False
    if not finished:
        print(f"WARNING: {os.path.join(folder, NAME)} is damaged: the run counts as unfinished", file=sys.stderr)
    return finished


def harmonic_mean(base: float, new: float) -> float:
    """H = 2 * base * new / (base + new), of two accuracies in percent; 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


@cache
def code_version() -> Optional[str]:
    """The commit of the code base when first called, with "-dirty" if its files differ from it; None without git."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe"]
    git += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(git, capture_output=True, check=True, text=True, timeout=9).stdout.strip()
    return None


def described(run: dict[str, Any]) -> str:
    """Shots and seed of a run in words."""
    shots, seed = run["shots"], run["seed"]
    images = "all training images" if shots < 1 else f"{shots} shot{'s' * (shots > 1)}"
    return f"{images}, {'no seed' if seed < 0 else f'seed {seed}'}"


def selection_prospect(true: float, wrong: float, unclear: float = 0.1) -> str:
    """What two mean rises of log-odds by a class's own block say about selection (section 3.2.2), in words.

    Of the true class and of the most probable wrong one; a difference below ``unclear`` counts as none.
    """
    if max(true, wrong) <= 0:
        verdict = "Neither gains: selection, which takes the better of two probabilities, hardly changes predictions"
    elif abs(true - wrong) < unclear:
        verdict = "Both rise alike: selection mostly keeps the order of the candidates and loses what the blocks hide"
    elif true > wrong:
        verdict = "The true class gains more: selection can correct predictions"
    else:
        verdict = "The wrong class gains more: selection favours it over the true one"
    rises = f"its log-odds by {true:+.2f}, that of the most probable wrong class its own by {wrong:+.2f}"
    return f"The block of the true class changes {rises}. {verdict}."


def main(argv: list[str]) -> int:
    if len(argv) == 2 and argv[0] == "--finished":
        return int(not is_finished(argv[1]))
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        runs = [read_results(folder) for folder in argv]
        accuracies = [run["metrics"]["accuracy"] for run in runs]
    except (OSError, ValueError, KeyError) as error:
        damaged = f"a {NAME} of {' or '.join(argv)} holds no accuracy ({error!r})"
        print(f"error: {error if isinstance(error, OSError) else damaged}", file=sys.stderr)
        return 2
    run = runs[0]["run"]
    print(f"{run['trainer']} on {run['dataset']}, {described(run)} ({run['backbone']})")
    for label, value in zip(("base", "new", "H"), (*accuracies, harmonic_mean(*accuracies))):
        print(f"{label:>4} {value:6.2f}")
    for label, results in zip(("base", "new"), runs):
        for warning in results.get("warnings", ()):
            print(f"WARNING ({label}): {warning}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
