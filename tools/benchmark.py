"""What things cost: one run, one table, absolute figures with ratios beside them.

    python tools/benchmark.py                         # everything
    python tools/benchmark.py --only lists --json f   # see --help for the names

Each measurement is a process of its own, so that peak memory is its own too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from runner import arguments  # isort: skip (makes `import dassl` work)
from dassl.data.datasets import build_dataset
from tqdm import tqdm

import train
from trainers.prompting.results import write_text

IMAGENET = (1000, 1281, 50)  # classes, training images of each (1,281,167 in all), validation images of each


class Row(NamedTuple):
    """One measurement; ``ratio`` says how many times the cost of the table's first row."""

    label: str
    seconds: float
    megabytes: float  # peak above what the process had when it began
    note: str = ""
    ratio: Optional[float] = None


# ------------------------------------------------------------------------------------------------- measuring


def _measure(function: Callable[..., Any], args: tuple, results: Any) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    before = _peak()
    start = time.perf_counter()
    try:
        note = function(*args)
        results.put((time.perf_counter() - start, _peak() - before, note))
    except BaseException as error:
        results.put(error)
        raise


def _peak() -> float:
    """Megabytes."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(label: str, function: Callable[..., str], *args: Any) -> Row:
    """Time and peak memory of a call in a process of its own; what it returns is the note."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measure, args=(function, args, results))
    process.start()
    found = results.get()
    process.join()
    if isinstance(found, BaseException):
        raise found
    return Row(label, *found)


# ------------------------------------------------------------------------------------------------- ImageNet's lists


def make_imagenet(root: Path, classes: int, train_images: int, val_images: int) -> None:
    """Folders and names as ImageNet has them; the images are empty files."""
    for part, count in (("train", train_images), ("val", val_images)):
        for label in tqdm(range(classes), desc=f"making {part}", disable=not sys.stderr.isatty()):
            folder = root / "imagenet" / "images" / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                os.close(os.open(folder / f"n{label:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
    lines = [f"n{label:08d} class number {label}\n" for label in range(classes)]
    (root / "imagenet" / "classnames.txt").write_text("".join(lines))


def read_imagenet(root: Path, shots: int, seed: int) -> str:
    argv = arguments("CoOp", "imagenet", "vit_b16_ep50_ctxv1", root, root / "out", seed, "all")
    cfg = train.setup_cfg(train.parse_args([*argv, "DATASET.NUM_SHOTS", str(shots)]))
    data = build_dataset(cfg)
    return f"{len(data.train_x):,} training and {len(data.test):,} test images"


def lists(quick: bool) -> list[Row]:
    classes, train_images, val_images = (100, 200, 10) if quick else IMAGENET
    with tempfile.TemporaryDirectory() as folder:
        make_imagenet(Path(folder), classes, train_images, val_images)
        return [
            measure("16 shots, seed 1: folders are listed", read_imagenet, Path(folder), 16, 1),
            measure("16 shots, seed 2: the listing is kept", read_imagenet, Path(folder), 16, 2),
            measure("16 shots, seed 2: the sample is kept", read_imagenet, Path(folder), 16, 2),
            measure("all images", read_imagenet, Path(folder), 0, 1),
        ]


# ------------------------------------------------------------------------------------------------- command

BENCHMARKS: dict[str, tuple[str, Callable[[bool], list[Row]]]] = {
    "lists": ("Reading the lists of a data set of ImageNet's size (1,281,000 training images)", lists),
}


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| | seconds | ratio | peak memory, MB | |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = row.seconds / rows[0].seconds if row.ratio is None else row.ratio
        lines.append(f"| {row.label} | {row.seconds:.2f} | {ratio:.2f} | {row.megabytes:,.0f} | {row.note} |")
    return "\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smaller, for a first look")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}\n")
    found = {}
    for name in args.only:
        title, run = BENCHMARKS[name]
        rows = run(args.quick)
        found[name] = [row._asdict() for row in rows]
        print(f"## {title}{', quick: smaller' if args.quick else ''}\n\n{table(rows)}\n")
    if args.json:
        write_text(str(args.json), json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
