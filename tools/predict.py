"""Predict any images with a finished run: the most probable classes, their scores, and what they are based on.

    python tools/predict.py --model-dir output/…/seed1 cat.jpg holiday/
    python tools/predict.py --model-dir output/…/seed1 holiday/ --explain why/ --classnames "tabby cat" dog

On a terminal a table, else (or with --json) a JSON object per line: {"path", "classes", "scores"} or {"path", "error"},
in the order of the images. Scores are p(c|x), for LoGoPrompt max(p(c|x), p(c|x_c)) of its K candidates.

The place of a block depends on an image's path below --root (default: the run's DATASET.ROOT), for other images on the
path below the folder given here, or on the file's name.

Exit status: 0; 1 if images could not be read (one line each on stderr, the others are predicted); 2 for a user's
mistake; 130 after Ctrl-C, 141 if nobody reads stdout any more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from trainers.predictor import Explanation, Prediction, Predictor, find_images
from trainers.prompting.errors import UserError
from trainers.prompting.names import clean_name, printable

ROWS = 24  # images on one sheet


def read_classnames(words: Sequence[str]) -> list[str]:
    """Class names as they are given, or the lines of a file. Raises UserError."""
    if len(words) > 1:
        return list(words)
    try:
        return list(filter(None, map(str.strip, Path(words[0]).read_text(encoding="utf-8-sig").splitlines())))
    except (OSError, ValueError) as error:
        raise UserError(f"--classnames {words[0]}: not a file of names; give such a file, or more names") from error


def table_writer(classnames: Sequence[str]) -> Callable[[Prediction], None]:
    """Prints predictions as rows of one table whose columns have fixed widths."""
    console = Console(markup=False, emoji=False, highlight=False)
    widest = max(5, min(max(len(clean_name(name)) for name in classnames), console.width // 2))
    header = iter([True])

    def write(prediction: Prediction) -> None:
        if prediction.error:  # reported on stderr
            return
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=next(header, False), pad_edge=False)
        table.add_column("image", width=max(10, min(60, console.width - widest - 10)), overflow="fold")
        table.add_column("class", width=widest, overflow="fold")
        table.add_column("score", width=6, justify="right")
        for i, (name, score) in enumerate(zip(prediction.classes, prediction.scores)):
            path, style = ("", "") if i else (printable(prediction.path), "bold")
            table.add_row(path, clean_name(name), f"{score:.4f}", style=style)
        console.print(table)

    return write


def picture_writer(out: Path, stack: ExitStack) -> Callable[[Explanation], None]:
    """Saves a picture of every image in the folder ``out``, or the first ones on one sheet of that name."""
    is_sheet, rows, names = out.suffix.lower() in (".jpg", ".jpeg", ".png"), [], Counter()
    (out.parent if is_sheet else out).mkdir(parents=True, exist_ok=True)

    def add(explanation: Explanation) -> None:
        name = "" if is_sheet else re.sub(r"[^\w.-]+", "_", os.path.splitext(explanation.prediction.relative)[0])
        names[name] += 1
        if not is_sheet:
            number = f"-{names[name]}" * (names[name] > 1)
            explanation.draw().save(out / f"{name}{number}.jpg", quality=90)
        elif names[name] <= ROWS:
            rows.append(explanation.draw())

    def finish() -> None:
        n, more = sum(names.values()), "; name a folder for a picture of each" * (names[""] > ROWS)
        if rows:
            Image.fromarray(np.vstack(rows)).save(out, quality=90)
            print(f"{out}: {len(rows)} of {n} images explained on one sheet{more}", file=sys.stderr)
        elif n:
            print(f"{out}: {n} picture{'s' * (n > 1)}, one for each image", file=sys.stderr)

    stack.callback(finish)
    return add


def predict(args: argparse.Namespace, stack: ExitStack) -> int:
    """Returns the number of images that failed."""
    classnames = args.classnames and read_classnames(args.classnames)
    for folder in filter(os.path.isdir, args.images if args.explain else ()):
        if Path(args.explain).resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--explain {args.explain}: is in {folder}, whose images are read; choose another place")
    draw = picture_writer(args.explain, stack) if args.explain else None
    where = {"backbone": args.backbone, "root": args.root}
    predictor = Predictor(args.model_dir, classnames, epoch=args.load_epoch, batch_size=args.batch_size, **where)
    if sys.stdout.isatty() and not args.json and not args.out:
        write = table_writer(predictor.classnames)
    else:
        file = stack.enter_context(args.out.open("w", encoding="utf-8")) if args.out else sys.stdout

        def write(prediction: Prediction) -> None:
            keys = ("path", "error") if prediction.error else ("path", "classes", "scores")
            line = json.dumps({key: getattr(prediction, key) for key in keys})  # ASCII, whatever the path contains
            file.write(f"{line}\n")  # in one call: Ctrl-C leaves whole lines
            file.flush()

    quiet = not sys.stderr.isatty() or (sys.stdout.isatty() and not args.out)  # results are progress enough
    total, skipped = None if quiet else sum(1 for _ in find_images(args.images)), []
    results: Any = (predictor.explain if draw else predictor)(predictor.find(args.images, skipped.append), args.top)
    done = failed = 0
    for done, result in enumerate(tqdm(results, total=total, unit="image", disable=quiet), 1):  # noqa: B007
        prediction = result.prediction if draw else result
        write(prediction)
        if prediction.error:
            failed += 1
            tqdm.write(f"error: {printable(prediction.error)}", file=sys.stderr)
        elif draw:
            draw(result)
    if args.out:
        print(f"{args.out}: {done} lines of JSON", file=sys.stderr)
    if failed:
        print(f"{failed} of {done} failed", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} files in folders were skipped: not the suffix of an image", file=sys.stderr)
    return failed


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status, see above."""
    title, _, epilog = __doc__.split("\n\n", 2)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=epilog, formatter_class=style)
    add = parser.add_argument
    add("images", nargs="+", help="image files, and folders that are searched for them")
    add("--model-dir", required=True, help="run folder")
    add("--load-epoch", type=int, help="epoch of its model; default: the best one, else the last")
    add("--backbone", default="", help="CLIP weights, if they are no longer where the run had them")
    add("--classnames", nargs="+", help="other classes: their names, or a file with one on each line")
    add("--root", default="", help="data root (default: the run's)")
    add("--top", type=int, default=5, metavar="K", help="classes to name for each image (5)")
    add("--batch-size", type=int, help="images scored at a time (default: as in the run's evaluation)")
    add("--json", action="store_true", help="JSON lines, also on a terminal")
    add("--out", type=Path, help="write JSON lines to this file, as they come")
    add("--explain", type=Path, metavar="DIR|FILE", help="draw images and candidates: into a folder, or one .jpg, .png")
    args = parser.parse_args(argv)
    if min(args.top, 1 if args.batch_size is None else args.batch_size) < 1:
        parser.error("--top and --batch-size must be at least 1")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that are read all the same
    try:
        with ExitStack() as stack:
            return int(predict(args, stack) > 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as error:
        named = getattr(error, "filename", None) and getattr(error, "strerror", None)
        print("error:", f"{error.filename}: {error.strerror}" if named else error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
