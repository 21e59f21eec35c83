"""Say what of the data sets is there, get what is missing, or check what is there.

    python tools/prepare.py all --root DATA --dry-run          what is there, what is missing, where it would come from
    python tools/prepare.py oxford_pets dtd --root DATA        get what is missing
    python tools/prepare.py oxford_pets --root DATA --check    decode every image, offline

A data set is called like its file in configs/datasets; "all" are those of CoOp. What is there is never touched. Exit
status: 0; 1 where something is missing or damaged; 2 for a mistake of the user's. DATASETS.md says more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fallback  # isort: skip  # noqa: F401 (makes `import dassl` work)
from dataset_check import check, dataset_class
from dataset_fetch import fetch, is_there, missing_parts
from dataset_sources import SOURCES, Source
from toy.drawing import KINDS
from datasets.shapes import COUNTS, draw_dataset
from trainers.prompting.errors import UserError

DRAWN = ("shapes", "shapes_shifted")
OWN = "folder"


def checklist(config: str, root: str) -> str:
    """What of a data set is there, what is missing and who has it: a line for each part."""
    source = SOURCES[config]
    folder, missing = os.path.join(root, source.folder), missing_parts(source, root)
    width = max(len(part) for part in source.parts)
    lines = [f"{config}: {folder}"]
    for part in source.parts:
        download = source.download_of(part)
        if part not in missing:
            mark, note = ("x", "") if is_there(folder, part) else ("-", "read only where there is no split")
        elif download is None:
            mark, note = " ", "by hand"
        else:
            where = "Google Drive" if download.drive else download.url.split("/")[2]
            if download.copy and os.path.isfile(os.path.join(root, download.copy)):
                where = f"copied from {download.copy}"
            words = ("" if download.file == part else download.file, download.size, where)
            mark, note = " ", ", ".join(word for word in words if word)
        lines.append(f"  [{mark}] {part:{width}}  {source.kind(part):11}  {note}".rstrip())
    return "\n".join(lines)


def prepare(config: str, root: str, dry_run: bool) -> bool:
    """Say what of a data set is missing and, unless it is a dry run, get it. Returns whether nothing is missing.

    Raises:
        UserError: something cannot be had.
    """
    if config == OWN:
        print(f"{config}: images of your own, --root is their folder; DATASETS.md shows how it is laid out")
        return True
    if config in DRAWN:
        cls, _ = dataset_class(config, root)
        folder = os.path.join(root, cls.dataset_dir)
        if not dry_run:
            draw_dataset(folder, cls.style, cls.split_file)
        print(f"{config}: {folder}\n  [{'x' if os.path.isdir(folder) else ' '}] drawn by this program, no download")
        return os.path.isdir(folder)
    source = SOURCES[config]
    folder = os.path.join(root, source.folder)
    print(checklist(config, root), flush=True)
    missing = missing_parts(source, root)
    if any(source.download_of(part) is None for part in missing):
        print(indent(source.manual.format(folder=folder), "    "))
    elif missing and not dry_run:
        fetch(source, root)
        print(f"{config}: complete")
        return True
    return not missing


def check_all(configs: Sequence[str], root: str, workers: int) -> bool:
    """Check data sets: a line for everything wrong, then a line for each data set. Returns whether all are whole."""
    rows = []
    for config in configs:
        source = SOURCES.get(config)
        if config in DRAWN:
            source = Source(config, len(KINDS), {part: count * len(KINDS) for part, count in COUNTS.items()}, ())
        result = check(config, root, source, workers)
        for problem in result.problems:
            print(problem, flush=True)
        count = len(result.problems)
        verdict = f"{count:,} problem{'' if count == 1 else 's'}" if count else "whole"
        rows.append((config, result.images, result.classes, verdict))
    width = max(len(config) for config, *_ in rows)
    for config, images, classes, verdict in rows:
        print(f"{config:{width}}  {images:>9,} images  {classes:>5,} classes  {verdict}")
    return all(verdict == "whole" for *_, verdict in rows)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, 1 where something is missing or damaged, or 2 for a mistake of the user's."""
    names = [*SOURCES, *DRAWN, OWN]
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=f"data sets: {', '.join(names)}; all: the first {len(SOURCES)}"
    )
    parser.add_argument("datasets", nargs="+", metavar="DATASET", choices=[*names, "all"], help="which (see below)")
    parser.add_argument("--root", required=True, help="folder of the data sets")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only say what is there and what would be fetched")
    what.add_argument("--check", action="store_true", help="decode every image that is there; offline, writes nothing")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help=f"threads of --check (default: {cores})")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    chosen = dict.fromkeys(name for word in args.datasets for name in (SOURCES if word == "all" else [word]))
    root = os.path.abspath(os.path.expanduser(args.root))
    if not os.path.isdir(root):
        print(f"error: {root}: no such folder; make it first, or correct --root", file=sys.stderr)
        return 2
    if args.check:
        return 0 if check_all(list(chosen), root, args.workers) else 1
    found: dict[str, bool] = {}  # whether a data set is complete
    for config in chosen:
        try:
            found[config] = prepare(config, root, args.dry_run)
        except (UserError, OSError) as error:  # the next data set may be to be had all the same
            print(f"error: {config}: {error}", file=sys.stderr)
            found[config] = False
        except KeyboardInterrupt:
            print(f"{config}: interrupted; what was fetched is kept, call again to go on", file=sys.stderr)
            return 1
    lacking = [config for config, complete in found.items() if not complete]
    if len(found) > 1:
        print(f"{sum(found.values())} of {len(found)} complete; missing something: {', '.join(lacking) or 'none'}")
    return 1 if lacking and not args.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
