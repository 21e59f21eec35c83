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
import warnings
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from textwrap import indent
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "datasets"


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    title, examples, _ = __doc__.split("\n\n", 2)
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    style = argparse.RawDescriptionHelpFormatter
    epilog = f"data sets: {', '.join(names)}\n\nexamples:\n{examples}"
    parser = argparse.ArgumentParser(description=title, epilog=epilog, formatter_class=style)
    parser.add_argument("datasets", nargs="+", metavar="DATASET", choices=[*names, "all"], help="see below")
    parser.add_argument("--root", required=True, help="folder of the data sets")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="only list what exists and what would be downloaded")
    mode.add_argument("--check", action="store_true", help="decode every image; offline, writes nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads of --check (default: cores)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes in the flags end here: the imports below take seconds

import fallback  # isort: skip  # noqa: F401 (makes `import dassl` work)
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from tqdm import tqdm
from yacs.config import CfgNode

import datasets
from dataset_fetch import SOURCES, Source, copied, fetch
from datasets import shapes
from datasets.splits import check_labels
from toy.drawing import KINDS
from trainers.prompting.data import read_image
from trainers.prompting.errors import UserError

DRAWN, OWN = ("shapes", "shapes_shifted"), "folder"


def dataset_class(config: str, root: str) -> tuple[type, CfgNode]:
    """Return the class of ``configs/datasets/<config>.yaml`` and a config to read it from a data root."""
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg((CONFIGS / f"{config}.yaml").read_text(encoding="utf-8")))
    cfg.DATASET.ROOT, cfg.SEED = root, 1
    return DATASET_REGISTRY.get(cfg.DATASET.NAME), cfg


def prepare(config: str, root: str, dry_run: bool) -> bool:
    """Print what is missing of a data set and, except in a dry run, get it. Returns whether it is complete."""
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
    folder, missing = os.path.join(root, source.folder), source.missing(root)
    print(f"{config}: {folder}")
    for part in source.parts:
        mark, note, download = " ", "by hand", source.download_of(part)
        if part not in missing:
            mark, note = "x", ""
        elif download:
            place = copied(download, root) or (download.url.split("/")[2] if download.url else "Google Drive")
            note = ", ".join(filter(None, ("" if download.file == part else download.file, download.size, place)))
        print(f"  [{mark}] {part:{max(map(len, source.parts))}}  {note}".rstrip(), flush=True)
    if any(source.download_of(part) is None for part in missing):
        print(indent(source.manual.rstrip().format(folder=folder), "    "))
    elif missing and not dry_run:
        fetch(source, root)
        print(f"{config}: complete")
        return True
    return not missing


def check(config: str, root: str, workers: int) -> tuple[list[str], str]:
    """Check a data set offline, without writing. Returns a line for every problem; counts of images and classes."""
    source = SOURCES.get(config)
    if config in DRAWN:
        source = Source("", len(KINDS), {part: count * len(KINDS) for part, count in shapes.COUNTS.items()})
    cls, cfg = dataset_class(config, root)
    try:
        folder, parts = cls.survey(cfg)
        check_labels({**parts, "train": parts["test"]} if cls.test_only else parts, source=folder)
    except (UserError, OSError) as error:
        return [str(error)], ""
    paths = dict.fromkeys(os.path.join(folder, entry.path) for entries in parts.values() for entry in entries)
    with warnings.catch_warnings(), ThreadPool(workers) as pool:  # Pillow releases Python's lock while it decodes
        warnings.simplefilter("ignore")  # of odd metadata
        reasons = pool.imap(_problem, paths, chunksize=32)
        problems = list(filter(None, tqdm(reasons, config, len(paths), leave=False, unit=" images", disable=None)))
    found = {f"{part} images": len(entries) for part, entries in parts.items()}
    found["classes"] = len({entry.label for entry in parts["test"] + parts["train"]})
    for part, n in (*source.counts.items(), ("classes", source.classes)) if source else ():
        kind = part if part == "classes" else f"{part} images"
        if found[kind] != n:
            problems.append(f"{config}: {found[kind]:,} {kind}, but {n:,} are published")
    return problems, f"{len(paths):>9,} images  {found['classes']:>5,} classes"


def _problem(path: str) -> str:
    """Return why an image cannot be read for training, or nothing."""
    try:
        read_image(path)
        return ""
    except OSError as error:
        return str(error)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_args(argv)
    chosen = list(dict.fromkeys(name for word in args.datasets for name in (SOURCES if word == "all" else [word])))
    root = os.path.abspath(os.path.expanduser(args.root))
    if not os.path.isdir(root):
        print(f"error: {root}: no such folder; create it or correct --root", file=sys.stderr)
        return 2
    if args.check:
        rows = []
        for config in chosen:
            problems, numbers = check(config, root, args.workers)
            sys.stdout.writelines(f"{problem}\n" for problem in problems)
            verdict = f"{len(problems):,} problem{'s' * (len(problems) > 1)}" if problems else "complete"
            rows.append("  ".join(filter(None, (config.ljust(max(map(len, chosen))), numbers, verdict))))
        print(*rows, sep="\n")
        return 0 if all(row.endswith("complete") for row in rows) else 1
    lacking = []
    for config in chosen:
        try:
            lacking += [] if prepare(config, root, args.dry_run) else [config]
        except (UserError, OSError) as error:  # go on with the next data set
            print(f"error: {config}: {error}", file=sys.stderr)
            lacking.append(config)
        except KeyboardInterrupt:
            print(f"{config}: interrupted; call again to continue", file=sys.stderr)
            return 1
    if len(chosen) > 1:
        done = len(chosen) - len(lacking)
        print(f"{done} of {len(chosen)} complete; incomplete: {', '.join(lacking) or 'none'}")
    return 1 if lacking and not args.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
