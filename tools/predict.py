"""Predict any images with a finished run: the most probable classes, their scores, and what they rest on.

    python tools/predict.py --model-dir output/…/seed1 cat.jpg holiday/
    python tools/predict.py --model-dir output/…/seed1 holiday/ --explain why/ --classnames "tabby cat" dog

On a terminal a table, else (or with --json) a JSON object a line: {"path", "classes", "scores"} or {"path", "error"}.
Lines come in the order of the images as they are done; one that was begun is ended, also after Ctrl-C. Scores are
p(c|x), for LoGoPrompt max(p(c|x), p(c|x_c)) of its K candidates.

A block's place depends on an image's path below the data root. For an image that is not below --root (default: the
run's DATASET.ROOT) that is the path below the folder named here, or the file's name.

Exit status: 0; 1 where images could not be read (one line each on stderr, the others are predicted); 2 for a mistake
of the user's; 130 after Ctrl-C, 141 where nobody reads stdout any more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from trainers.predictor import Explanation, Prediction, Predictor, find_images, stacked
from trainers.prompting.errors import UserError
from trainers.prompting.names import clean_name

ROWS = 24  # images on one sheet


def read_classnames(words: Sequence[str]) -> list[str]:
    """Class names as they are given, or the lines of a file. Raises UserError."""
    if len(words) > 1:
        return list(words)
    try:
        text = Path(words[0]).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--classnames {words[0]}: one name, and no file of names that can be read") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


# ------------------------------------------------------------------------------------------------- output


def json_line(prediction: Prediction) -> str:
    """A prediction as one line of ASCII, whatever the path holds."""
    if prediction.error:
        return json.dumps({"path": prediction.path, "error": prediction.error})
    return json.dumps({"path": prediction.path, "classes": prediction.classes, "scores": prediction.scores})


class Rows:
    """A table that grows: columns have their width from the start, and an image is printed when it is done."""

    def __init__(self, console: Console, classnames: Sequence[str]) -> None:
        self.console, self.begun = console, False
        widest = max(len(clean_name(name)) for name in classnames)
        self.classes = max(5, min(widest, console.width // 2))
        self.paths = max(10, min(60, console.width - self.classes - 6 - 4))

    def __call__(self, prediction: Prediction) -> None:
        if prediction.error:  # it is said on stderr
            return
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=not self.begun, pad_edge=False)
        table.add_column("image", width=self.paths, overflow="fold")
        table.add_column("class", width=self.classes, overflow="fold")
        table.add_column("score", width=6, justify="right")
        for i, (name, score) in enumerate(zip(prediction.classes, prediction.scores)):
            style = "" if i else "bold"
            table.add_row(
                Text("" if i else printable(prediction.path)),
                Text(clean_name(name), style=style),
                Text(f"{score:.4f}", style=style),
            )
        self.begun = True
        self.console.print(table)


def printable(text: str) -> str:
    """A file's name may hold bytes that are no text, and control characters."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)


class Pictures:
    """What ``--explain`` writes: a picture for every image into a folder, or one sheet of the first ones."""

    def __init__(self, out: Path) -> None:
        self.out, self.sheet = out, out.suffix.lower() in (".jpg", ".jpeg", ".png")
        self.rows: list[Any] = []
        self.left = 0
        self.names: Counter[str] = Counter()
        (out.parent if self.sheet else out).mkdir(parents=True, exist_ok=True)

    def add(self, explanation: Explanation) -> None:
        if not self.sheet:
            safe = re.sub(r"[^\w.-]+", "_", explanation.prediction.relative)
            self.names[safe] += 1
            again = f"-{self.names[safe]}" if self.names[safe] > 1 else ""
            explanation.draw().save(self.out / f"{safe}{again}.jpg", quality=90)
        elif len(self.rows) < ROWS:
            self.rows.append(explanation.draw())
        else:
            self.left += 1

    def close(self) -> None:
        if self.rows:
            stacked(self.rows).save(self.out, quality=90)
        if self.left:
            print(f"{self.out}: the first {ROWS} images; name a folder for a picture of each", file=sys.stderr)


def predict(args: argparse.Namespace, out: Callable[[Predictor], Callable[[Prediction], None]], quiet: bool) -> int:
    """Returns the number of images that failed."""
    classnames = read_classnames(args.classnames) if args.classnames else None
    for folder in filter(os.path.isdir, args.images if args.explain else ()):
        if Path(args.explain).resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"--explain {args.explain}: lies in {folder}, whose images are predicted; name another place"
            )
    pictures = Pictures(args.explain) if args.explain else None
    predictor = Predictor(
        args.model_dir, classnames, epoch=args.load_epoch, backbone=args.backbone, root=args.root,
        batch_size=args.batch_size,
    )  # fmt: skip
    write = out(predictor)
    total = None if quiet else sum(1 for _ in find_images(args.images))
    skipped: Counter[str] = Counter()
    sources = predictor.find(args.images, lambda path: skipped.update(["files"]))
    if pictures:
        results: Iterable[Any] = predictor.explain(sources, args.top)
    else:
        results = predictor(sources, args.top)
    done = failed = 0
    try:
        for result in tqdm(results, total=total, unit="image", disable=quiet):
            prediction = result.prediction if pictures else result
            write(prediction)
            done += 1
            if prediction.error:
                failed += 1
                tqdm.write(f"error: {printable(prediction.error)}", file=sys.stderr)
            elif pictures:
                pictures.add(result)
    finally:
        if pictures:
            pictures.close()
    if failed:
        print(f"{failed} of {done} failed", file=sys.stderr)
    if skipped["files"]:
        print(f"{skipped['files']} files in folders were skipped: not the suffix of an image", file=sys.stderr)
    return failed


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("images", nargs="+", help="image files, and folders that are searched for them")
    parser.add_argument("--model-dir", required=True, help="run folder")
    parser.add_argument("--load-epoch", type=int, help="epoch of its model; default: the best one, else the last")
    parser.add_argument("--backbone", default="", help="CLIP weights, where they are no longer where the run had them")
    parser.add_argument("--classnames", nargs="+", help="other classes: their names, or a file with one on each line")
    parser.add_argument("--root", default="", help="data root (default: the run's)")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to name for each image (5)")
    parser.add_argument("--batch-size", type=int, help="images scored at a time (default: as in the run's evaluation)")
    parser.add_argument("--json", action="store_true", help="JSON lines, also on a terminal")
    parser.add_argument("--out", type=Path, help="write JSON lines to this file, as they come")
    parser.add_argument(
        "--explain", type=Path, metavar="DIR|FILE",
        help="draw the images with their candidates: a picture of each, or (.jpg, .png) one sheet",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for flag, value in (("--top", args.top), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            parser.error(f"{flag} {value}: must be at least 1")
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status, see above."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that are read all the same
    table = sys.stdout.isatty() and not args.json and not args.out
    quiet = not sys.stderr.isatty() or (sys.stdout.isatty() and not args.out)  # results are progress enough
    with ExitStack() as stack:
        try:

            def write_to(predictor: Predictor) -> Callable[[Prediction], None]:
                if table:
                    return Rows(Console(), predictor.classnames)
                file = stack.enter_context(open(args.out, "w", encoding="utf-8")) if args.out else sys.stdout

                def write_json(prediction: Prediction) -> None:
                    file.write(f"{json_line(prediction)}\n")
                    file.flush()

                return write_json

            return 1 if predict(args, write_to, quiet) else 0
        except BrokenPipeError:  # whoever read stdout has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (UserError, OSError) as error:
            named = isinstance(error, OSError) and error.filename and error.strerror
            print(f"error: {error.filename}: {error.strerror}" if named else f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
