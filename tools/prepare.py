"""List what is missing of the data sets, download it, or check what exists.

    python tools/prepare.py all --root DATA --dry-run          what exists, what is missing, where it would come from
    python tools/prepare.py oxford_pets dtd --root DATA        download what is missing
    python tools/prepare.py oxford_pets --root DATA --check    decode every image, offline

Data sets are named like their files in configs/datasets; "all" are those of CoOp. Existing files are never touched.
Exit status: 0; 1 where something is missing or damaged; 2 for a user's mistake. See docs/data.md.
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
from dataset_fetch import SOURCES, Source, exists, fetch
from datasets import shapes
from toy.drawing import KINDS
from trainers.prompting.errors import UserError

DRAWN = ("shapes", "shapes_shifted")
OWN = "folder"


def checklist(config: str, root: str) -> str:
    """Return what exists of a data set, what is missing and who has it, one line for each part."""
    source = SOURCES[config]
    folder, missing = os.path.join(root, source.folder), source.missing(root)
    kinds = dict.fromkeys(source.images, "images") | dict.fromkeys(source.raw, "annotations")
    lines = [f"{config}: {folder}"]
    for part in source.parts:
        download = source.download_of(part)
        if part not in missing:
            mark, note = ("x", "") if exists(folder, part) else ("-", "read only without CoOp's split")
        elif download is None:
            mark, note = " ", "by hand"
        else:
            place = download.url.split("/")[2] if download.url else "Google Drive"
            if download.copy and os.path.isfile(os.path.join(root, download.copy)):
                place = f"copied from {download.copy}"
            file = "" if download.file == part else download.file
            mark, note = " ", ", ".join(filter(None, (file, download.size, place)))
        kind = kinds.get(part, "split" if part.endswith(".json") else "class names")
        lines.append(f"  [{mark}] {part:{max(map(len, source.parts))}}  {kind:11}  {note}".rstrip())
    return "\n".join(lines)


def prepare(config: str, root: str, dry_run: bool) -> bool:
    """Print what is missing of a data set and, except in a dry run, get it. Returns whether it is complete.

    Raises:
        UserError: something cannot be downloaded.
    """
    if config == OWN:
        print(f"{config}: your own images, --root is their folder; docs/data.md shows the layout")
        return True
    if config in DRAWN:
        cls, _ = dataset_class(config, root)
        folder = os.path.join(root, cls.dataset_dir)
        if not dry_run:
            shapes.draw_dataset(folder, cls.style, cls.split_file)
        print(f"{config}: {folder}\n  [{'x' if os.path.isdir(folder) else ' '}] drawn by this program, no download")
        return os.path.isdir(folder)
    source = SOURCES[config]
    missing = source.missing(root)
    print(checklist(config, root), flush=True)
    if any(source.download_of(part) is None for part in missing):
        print(indent(source.manual.rstrip().format(folder=os.path.join(root, source.folder)), "    "))
    elif missing and not dry_run:
        fetch(source, root)
        print(f"{config}: complete")
        return True
    return not missing


def check_all(configs: Sequence[str], root: str, workers: int) -> bool:
    """Check data sets: print a line for every problem, then one for each data set. Returns whether all are complete."""
    rows = []
    for config in configs:
        source = SOURCES.get(config)
        if config in DRAWN:
            source = Source("", len(KINDS), {part: count * len(KINDS) for part, count in shapes.COUNTS.items()})
        result = check(config, root, source, workers)
        for problem in result.problems:
            print(problem, flush=True)
        n = len(result.problems)
        rows.append((config, result, f"{n:,} problem{'s' * (n > 1)}" if n else "complete"))
    for config, result, verdict in rows:
        name = config.ljust(max(map(len, configs)))
        print(f"{name}  {result.images:>9,} images  {result.classes:>5,} classes  {verdict}")
    return not any(result.problems for _, result, _ in rows)


def main(argv: Optional[Sequence[str]] = None) -> int:
    names = [*SOURCES, *DRAWN, OWN]
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=f"data sets: {', '.join(names)}; all: the first {len(SOURCES)}"
    )
    parser.add_argument("datasets", nargs="+", metavar="DATASET", choices=[*names, "all"], help="see below")
    parser.add_argument("--root", required=True, help="folder of the data sets")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="only list what exists and what would be downloaded")
    mode.add_argument("--check", action="store_true", help="decode every image; offline, writes nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads of --check (default: cores)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    chosen = list(dict.fromkeys(name for word in args.datasets for name in (SOURCES if word == "all" else [word])))
    root = os.path.abspath(os.path.expanduser(args.root))
    if not os.path.isdir(root):
        print(f"error: {root}: no such folder; create it or correct --root", file=sys.stderr)
        return 2
    if args.check:
        return 0 if check_all(chosen, root, args.workers) else 1
    complete = {}
    for config in chosen:
        try:
            complete[config] = prepare(config, root, args.dry_run)
        except (UserError, OSError) as error:  # go on with the next data set
            print(f"error: {config}: {error}", file=sys.stderr)
            complete[config] = False
        except KeyboardInterrupt:
            print(f"{config}: interrupted; call again to continue", file=sys.stderr)
            return 1
    lacking = [config for config in chosen if not complete[config]]
    if len(chosen) > 1:
        print(f"{sum(complete.values())} of {len(chosen)} complete; incomplete: {', '.join(lacking) or 'none'}")
    return 1 if lacking and not args.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
