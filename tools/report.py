"""The paper's tables and figures from finished runs, beside the published numbers.

    python tools/report.py output                       # everything in output/, into output/report/
    python tools/report.py output/base2new --seeds 1 --partial --out base2new_so_far

Every folder is searched for ``results.json``. What comes out: tables on the terminal, ``report.html`` (one page that
needs nothing else), ``report.md``, ``runs.csv`` and ``cells.csv`` (full precision) and a PNG and SVG per figure.

Cells are mean ± standard deviation (of the sample, n - 1) over seeds. Exit status: 0, or 1 where runs are missing,
unfinished or damaged or do not belong together (one line each; nothing is written unless --partial is there), or 2 for
a mistake of the user's, among them the same run in two folders.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from report_tables import KINDS, NAME, Cell, Report, Run, Table, UserError, collect, shown  # isort: skip
import jinja2
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from report_examples import Example, predictions
from report_figures import Plot, draw_plot, inline_svg, plots

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------------- text


def _cells(table: Table, cells: Sequence[Optional[Cell]]) -> Iterator[tuple[str, bool]]:
    """(text, whether it is the best) of the columns of a row, with those of the paper."""
    for cell, compared in zip(cells, table.compared):
        yield (cell.text, cell.best) if cell else ("–", False)
        if compared:
            known = cell is not None and cell.published is not None
            yield (f"{cell.published:.2f}" if known else "", False)
            yield (cell.signed if known else "", False)


def _headings(table: Table) -> list[str]:
    heads = list(table.first)
    for column, compared in zip(table.columns, table.compared):
        heads += [column, "paper", "diff."] if compared else [column]
    return heads


def rich_table(table: Table, stacked: bool) -> RichTable:
    """For the terminal; stacked: with the paper's number and the difference beneath ours, not beside it."""
    made = RichTable(title=Text(table.title), title_justify="left", title_style="bold")
    for i, head in enumerate([*table.first, *table.columns] if stacked else _headings(table)):
        style = "dim" if head in ("paper", "diff.") else ""
        made.add_column(Text(head), justify="left" if i < 2 else "right", style=style)
    for section, rows in table.sections:
        for i, (row, cells) in enumerate(rows):
            numbers = [Text(text, style="bold" if best else "") for text, best in _cells(table, cells)]
            if stacked:
                for at, compared in enumerate(table.compared):
                    paper = [str(numbers.pop(at + 1)) for _ in range(2 * compared)]
                    numbers[at].append("\n" * compared + " ".join(paper), style="dim not bold")
            made.add_row(Text(section if i == 0 else ""), Text(row), *numbers)
        made.add_section()
    return made


def terminal(report: Report, console: Console) -> None:
    """All tables, as wide as there is room."""
    for table in report.tables:
        made = rich_table(table, stacked=False)
        if console.measure(made, options=console.options.update(max_width=1000)).maximum > console.width:
            made = rich_table(table, stacked=True)
        console.print(made)
        for note in table.notes:
            console.print(Text(note), style="dim")
        console.print()


def markdown(report: Report) -> str:
    """All tables, and what is missing."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    text = ["# Report", summary(report)]
    if report.gaps or report.notes:
        text.append("\n".join(f"- {problem}" for problem in (*report.gaps, *report.notes)))
    for table in report.tables:
        heads = _headings(table)
        lines = [line(heads), line(["---", "---", *["---:"] * (len(heads) - 2)])]
        for section, rows in table.sections:
            for row, cells in rows:
                numbers = [f"**{text}**" if best else text for text, best in _cells(table, cells)]
                lines.append(line([section, row, *numbers]))
        text += [f"## {table.title}", "\n".join(lines), *table.notes]
    return "\n\n".join(text) + "\n"


def summary(report: Report) -> str:
    return (
        f"{len(report.runs)} runs, seeds {', '.join(map(str, report.seeds))}. Test accuracy in %, mean ± standard "
        'deviation (of the sample) over seeds; "paper" is the published value, "diff." ours minus it; bold is the best.'
    )


def runs_csv(report: Report) -> str:
    """A line a run."""
    return _csv(Run._fields, report.runs)


def cells_csv(report: Report) -> str:
    """A line for every cell of every table, in full precision."""
    heads = ("table", "section", "row", "column", "mean", "std", "n", "seeds", "published", "difference")
    lines = []
    for table in report.tables:
        for section, row, column, cell in table.cells:
            seeds = " ".join(map(str, sorted(cell.values)))
            numbers = (cell.mean, cell.std, len(cell.values), seeds, cell.published, cell.difference)
            lines.append((table.title, section, row, column, *numbers))
    return _csv(heads, lines)


def _csv(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(lines)
    return text.getvalue()


# ------------------------------------------------------------------------------------------------- page


def read_examples(folder: Path) -> list[tuple[str, str]]:
    """(data URI, caption) of the PNG and JPEG files of a folder, by name.

    Captions are those of its ``captions.json`` ({file name: caption}); without it the file names. Raises UserError.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (--examples)")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise UserError(f"{folder}: no PNG or JPEG files in it (--examples)")
    captions = {}
    source = folder / "captions.json"
    if source.exists():
        try:
            captions = json.loads(source.read_text(encoding="utf-8"))
            if not all(isinstance(text, str) for text in captions.values()):
                raise ValueError("a caption is no text")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{source}: not {{file name: caption}} ({error})") from error
        for name in captions.keys() - {path.name for path in files}:
            raise UserError(f"{source}: there is no picture {name} beside it")
    return [
        (
            f"data:image/{'png' if path.suffix.lower() == '.png' else 'jpeg'};base64,"
            + base64.b64encode(path.read_bytes()).decode(),
            captions.get(path.name, path.stem.replace("_", " ")),
        )
        for path in files
    ]


def page(
    report: Report,
    figures: Sequence[Plot],
    predicted: tuple[Sequence[Example], Optional[Run]],
    examples: Sequence[tuple[str, str]],
    source: str,
) -> str:
    """``report.html``: CSS and pictures inside.

    Args:
        predicted: example predictions, and the run that made them.
        examples: (data URI, caption) of further pictures; source: of their captions.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    drawn = [(plot, [inline_svg(panel, f"{plot.name}-{i}") for i, panel in enumerate(plot.panels)]) for plot in figures]
    return environment.get_template("report.html").render(
        report=report, summary=summary(report), figures=drawn, predictions=predicted[0], predictor=predicted[1],
        examples=examples, source=source, shown=shown,
    )  # fmt: skip


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write files, each atomically; figures of an earlier report that are not among them go."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, folder / name)
        except BaseException:
            os.unlink(temporary)
            raise
    for old in folder.iterdir():
        if re.fullmatch(rf"({'|'.join(KINDS)})(_\d+)?\.(png|svg)", old.name) and old.name not in files:
            old.unlink()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, 1 for incomplete runs, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[-1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, help=f"folders that are searched for {NAME}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds that every cell must have")
    parser.add_argument("--partial", action="store_true", help="make the report of what there is")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "report", help="folder to write to")
    parser.add_argument(
        "--predictions", type=int, default=6, metavar="N",
        help="test images on the page with what one run predicts for them; 0: none, no model is loaded",
    )  # fmt: skip
    parser.add_argument(
        "--examples", type=Path, help="folder of PNG or JPEG pictures for the page, with captions.json or by file name"
    )
    args = parser.parse_args(argv)
    if args.predictions < 0:
        parser.error(f"--predictions {args.predictions}: must not be negative")
    seeds = sorted(set(args.seeds))
    try:
        examples = read_examples(args.examples) if args.examples else []
        found = collect(args.runs, seeds)
        if found.refused:
            for line in found.refused:
                print(f"error: {line}", file=sys.stderr)
            return 2
        report = Report(found, seeds)
        for line in (*report.gaps, *report.notes):
            print(line, file=sys.stderr)
        if not report.runs and (args.partial or not report.gaps):
            raise UserError(f"{', '.join(map(str, args.runs))}: no {NAME} with a test accuracy of --seeds in it")
        if report.gaps and not args.partial:
            print(
                f"incomplete ({len(report.gaps)} lines above): --partial makes the report all the same", file=sys.stderr
            )
            return 1
        figures = plots(report)
        source = "captions.json" if args.examples and (args.examples / "captions.json").exists() else "the file names"
        files = {f"{plot.name}.{kind}": draw_plot(plot, kind) for plot in figures for kind in ("png", "svg")}
        texts = {"runs.csv": runs_csv(report), "cells.csv": cells_csv(report), "report.md": markdown(report)}
        predicted, predictor, why = predictions(report.runs, args.predictions) if args.predictions else ([], None, "")
        if why:
            print(f"no example predictions (--predictions): {why}", file=sys.stderr)
        texts["report.html"] = page(report, figures, (predicted, predictor), examples, source)
        write(args.out, {**files, **{name: text.encode() for name, text in texts.items()}})
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console() if sys.stdout.isatty() else Console(width=200)
    terminal(report, console)
    print("\n".join(shown(args.out / name) for name in texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
