"""What the scripts print about their runs. A program of the standard library, so that it starts at once:

python trainers/prompting/script_output.py table FOLDER …
    accuracies of runs: a line per setting, a column per seed, then mean and standard deviation
python trainers/prompting/script_output.py difference FOLDER ASKED OUTPUT
    how the run in a folder differs from what is asked for, and an OUTPUT for the latter
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Optional

if __package__:
    from .results import harmonic_mean, read_results
else:  # a program: importing the package would import torch
    from results import harmonic_mean, read_results

ASKED = re.compile(r"BACKBONE=(.*?) (configs/datasets/\S+) \((\d+)\) (configs/trainers/\S+) \((\d+)\) ?(.*)")
KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")
Row = dict[int, float]  # accuracy by seed


def table(folders: Sequence[str]) -> str:
    """The finished ones among the folders ``…/seed<N>``. Base and new classes of a setting are followed by their H."""
    settings: dict[str, tuple[str, str, Row]] = {}  # by folder without the seed: what was tested, its classes
    for folder in folders:
        try:
            found = read_results(folder)
            run, accuracy = found["run"], found["metrics"]["accuracy"]
        except (OSError, ValueError, KeyError):
            continue  # not tested, or unfinished
        shots = f", {run['shots']} shot{'s' * (run['shots'] > 1)}" if run["shots"] > 0 else ""
        of = f"{run['trainer']} on {run['dataset']}{shots}"
        row = settings.setdefault(os.path.dirname(folder), (of, run["subsample_classes"], {}))
        row[2][run["seed"]] = accuracy
    rows = {}
    for folder, (of, subset, row) in settings.items():
        alike = [other.split("/") for other, value in settings.items() if value[:2] == (of, subset)]
        own = [part for i, part in enumerate(folder.split("/")) if any(part not in other[i : i + 1] for other in alike)]
        rows["/".join(own), of, subset] = row
    for own, of, subset in list(rows):
        if subset == "new" and (base := rows.get((own, of, "base"))) is not None:
            new = rows[own, of, subset]
            rows[own, of, "H"] = {seed: harmonic_mean(base[seed], new[seed]) for seed in base if seed in new}
    seeds = sorted({seed for row in rows.values() for seed in row})
    words = {"base": ", base classes", "new": ", new classes", "H": ", H"}
    labels = [f"{own + ': ' if own else ''}{of}{words.get(subset, '')}" for own, of, subset in rows]
    width = max(map(len, labels), default=0)
    lines = [" " * width + "".join(f"  {f'seed {seed}':>7}" for seed in seeds) + "     mean" * (len(seeds) > 1)]
    for label, row in zip(labels, rows.values()):
        cells = "".join(f"  {row[seed]:7.2f}" if seed in row else " " * 9 for seed in seeds)
        spread = f" ± {stdev(row.values()):.2f}" if len(row) > 1 else ""
        lines.append(f"{label:<{width}}{cells}" + (f"  {mean(row.values()):7.2f}{spread}" if len(seeds) > 1 else ""))
    return "\n".join(lines) if rows else ""


def difference(folder: str, asked: str, output: str) -> str:
    """The line that refuses to run ``asked`` (a line of ``asked.txt``) in a folder where something else has run."""
    try:
        with open(os.path.join(folder, "asked.txt"), encoding="utf-8") as file:
            before = settings_of(file.read().strip())
    except OSError:
        before = None
    now = settings_of(asked.strip())
    if before is None or now is None:
        return f"{folder} was not made by this script: set another OUTPUT, or delete the folder"
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    told = [
        f"{key} has changed since"
        if key.startswith("configs/") and key in before and key in now
        else f"{key} is {before.get(key) or 'not set'} there, {now.get(key) or 'not set'} now"
        for key in changed
    ]
    named = next((key for key in changed if not key.startswith("configs/")), "")
    ending = re.sub(
        r"[^A-Za-z0-9.-]+", "_", f"{named.split('.')[-1].lower()}_{now.get(named, 'default')}" if named else "2"
    )
    return (
        f"{folder} belongs to another run: {'; '.join(told)}. Results are not replaced: set another OUTPUT, for "
        f"example OUTPUT={output}_{ending.strip('_')}, or delete the folder"
    )


def settings_of(asked: str) -> Optional[dict[str, str]]:
    """Backbone, checksums of config files, and values of config keys; None for something else."""
    if (match := ASKED.fullmatch(asked)) is None:
        return None
    backbone, data, data_sum, config, config_sum, words = match.groups()
    found, key = {"BACKBONE": backbone, data: data_sum, config: config_sum}, ""
    for word in words.split():
        if KEY.fullmatch(word):
            found[key := word] = ""
        elif key:
            found[key] = f"{found[key]} {word}".strip()
    return found


def main(argv: Sequence[str]) -> int:
    commands = {"table": table, "difference": difference}
    if len(argv) < 2 or argv[0] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    if argv[0] == "table":
        print(table(argv[1:]))
    else:
        print(f"error: {difference(*argv[1:])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
