"""The paper's tables and figures from finished runs, next to the published numbers.

    python tools/report.py output                       # everything in output/, into output/report/
    python tools/report.py output/base2new --seeds 1 --partial --out base2new_so_far

Every folder is searched for ``results.json``. The tables are printed and written to ``report.html`` (self-contained),
``report.md`` and ``cells.csv`` (full precision), the runs to ``runs.csv``, each figure to a PNG and an SVG. Runs that
are missing, unfinished or damaged are listed at the end.

Exit status: 0; 1 if there are such runs and --partial is not given; 2 for a mistake in the call.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Optional

import numpy as np
import pandas as pd
from markdown_it import MarkdownIt
from matplotlib import rc_context
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from report_data import NAME, TITLES, Report, Table, UserError, make_report, replacing

ROOT = Path(__file__).resolve().parents[1]
# A method has the same colour (Okabe and Ito's, for all kinds of colour vision) and marker in every report.
METHODS = ("LoGoPrompt", "CoOp", "CoCoOp", "ZeroshotCLIP", "CLIPAdapter", "TipAdapterF", "ProGrad", "KgCoOp", "ProDA")
METHODS += ("TipAdapter", "VP", "VPT", "DPT", "LinearProbe", "LoGoPrompt+Adapter", "VP+TP", "ZeroshotCLIP2")
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#444444", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^DvPX<>*h"
FILLS = ("full", "left", "bottom", "right", "top")  # of several rows of a method
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.4}
MIN_SPAN = 5.0  # points on an axis: smaller differences do not fill a figure
MISSING = "Missing or left out"


def clean(text: str) -> str:
    """A name in Markdown: no name of a run can make a link, an image or a column."""
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", text)


def table_text(table: Table) -> str:
    """A table in Markdown, with the published value and the difference next to each column that has them."""
    cells = table.cells.assign(text=table.cells.text.where(~table.cells.best, "**" + table.cells.text + "**"))
    lines = cells[["section", "row"]].drop_duplicates()
    about = table.about.loc[lines.row]
    columns = list(zip(table.heads, (lines.section.where(lines.section != lines.section.shift(), ""), about["name"])))
    columns += [(name, about[name]) for name in about.columns[1:] if about[name].any()]
    columns = [(name, values.map(clean)) for name, values in columns]
    for name, part in cells.groupby("column", sort=False):
        columns += [(name, part.text.replace("", "–"))]
        columns += [("paper", part.versus)] * bool(part.published.notna().any())
    heads, content = zip(*columns)
    align = ["right" if name in {*cells.column, "paper"} else "left" for name in heads]
    return tabulate(list(zip(*content)), heads, tablefmt="pipe", disable_numparse=True, colalign=align)


def table_html(table: Table) -> str:
    """A table in HTML, narrow: sections have lines of their own, details are small or, on wide screens, columns."""
    about = table.about.loc[:, (table.about != "").any()]
    columns, lines = list(dict.fromkeys(table.cells.column)), []
    for section, cells in table.cells.groupby("section", sort=False):
        lines += [f'<tr class="section"><th colspan="{len(columns) + len(about.columns)}">{escape(section)}']
        for row, values in cells.groupby("row", sort=False):
            name, *details = map(escape, about.loc[row])
            label = escape(row).removeprefix(name).strip(" ()")
            line = f'<tr><th>{name}<small class="narrow">{label}</small>'
            for cell in values.itertuples():
                number, _, deviation = cell.text.partition(" ")
                paper = f"<small>paper {cell.versus}</small>" * bool(cell.versus)
                line += f"<td>{'<b>' * cell.best}{number or '–'}</b><small>{deviation}</small>{paper}"
            lines += [line + "".join(f'<td class="wide">{text}' for text in details)]
    heads = "".join(f"<th>{escape(text)}" for text in (table.heads[1], *columns))
    heads += "".join(f'<th class="wide">{text}' for text in about.columns[1:])
    return f"<table><thead><tr>{heads}</thead><tbody>{''.join(lines)}</tbody></table>"


def markdown(report: Report, figure_files: Sequence[str] = ()) -> str:
    """All tables, each with its figure if there are files, and what is missing."""
    gaps = Counter(line.partition(":")[0] for line in report.gaps)
    text = (
        f"Runs: {len(report.runs)}, seeds: {', '.join(map(str, sorted(set(report.runs.seed))))}. Test accuracy in %, "
        "mean ± standard deviation (of the sample) over seeds; with the paper's value and the difference; bold is best."
    )
    text += f" **{', '.join(f'{n} {kind}' for kind, n in gaps.items())}: see the end.**" * bool(gaps)
    parts = ["# LoGoPrompt: report", text]
    for i, table in enumerate(report.tables):
        parts += [f"## {clean(table.title)}", table_text(table), *map(clean, table.notes)]
        parts += [f"![{clean(table.title)}]({name})" for name in figure_files[i : i + 1] if name]
    lines = [f"- {clean(line)}" for line in [*report.gaps, *report.notes]]
    parts += [f"## {MISSING}", "\n".join(lines)] * bool(lines)
    return "\n\n".join(parts) + "\n"


def figures(tables: Sequence[Table], narrow: bool = False) -> list[tuple[str, Optional[Figure]]]:
    """(file name without suffix, figure) of every table, ("", None) for one of a single number."""
    ours = [name for table in tables if table.kind != "ablation" for name in table.about["name"]]
    looks = {name: i for i, name in enumerate(dict.fromkeys([*METHODS, *ours]))}
    found, kinds = [], Counter()
    for table in tables:
        kinds[table.kind] += 1
        name = table.kind + f"_{kinds[table.kind]}" * (kinds[table.kind] > 1)
        with rc_context(STYLE):
            found += [(name, draw_table(table, looks, narrow)) if table.cells["mean"].count() > 1 else ("", None)]
    return found


def draw_table(table: Table, looks: dict[str, int], narrow: bool) -> Figure:
    """Means with deviations and, hollow, the paper's numbers: curves over shots if there are several, else dots."""
    cells, curves = table.cells.dropna(subset=["mean"]), table.kind == "few_shot" and table.cells.column.nunique() > 1
    panel, label, series = ("section", "column", "row") if curves else ("column", "section", "row")
    if table.kind == "ablation":
        panel, label, series = "section", "row", "column"

    def positions(part: pd.DataFrame) -> pd.DataFrame:
        """Where each value is on the axis of the labels; no two are in the same place."""
        found = part[[label, series]].drop_duplicates()
        n, number = (pd.factorize(found[name])[0] for name in (label, series))
        return found.assign(at=n + 0.2 * (number - number.mean()) / len(styles) if curves else n + np.arange(len(n)))

    styles: dict[str, dict[str, str]] = {}  # of a series
    for row, method in table.about["name"].items() if series == "row" else [("accuracy", "LoGoPrompt")]:
        turn, n = divmod(list(table.about["name"])[: len(styles)].count(method), len(FILLS))
        look = {"marker": MARKERS[(looks[method] + 3 * turn) % len(MARKERS)], "fillstyle": FILLS[n]}
        styles[row] = {"color": COLOURS[looks[method] % len(COLOURS)], **look, "label": textwrap.fill(row, 45)}
    panels = dict(list(cells.groupby(panel, sort=False)))
    places = [positions(cells if panel == "column" else part) for part in panels.values()]
    columns = 1 if narrow else min(len(panels), 4 if curves else 3, 2 if len(panels) == 4 else 9)
    rows, width = math.ceil(len(panels) / columns), 4.3 if narrow else 3.6 * columns
    across = max(1, int(15 * width / (9 + max(len(style["label"]) for style in styles.values()))))  # of the legend
    height = 2.6 if curves else 0.9 + 0.17 * max(place["at"].max() for place in places)
    height = height * rows + 0.8 + 0.2 * math.ceil(len(styles) / across)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=not curves, sharey=panel == "column").flat)
    turn = 1 if curves else -1  # values from left to right
    for ax, (title, part), place in zip(axes, panels.items(), places):
        for name, own in part.merge(place).groupby(series, sort=False):
            bars = {"yerr" if curves else "xerr": own["std"].fillna(0), "ls": "-" if curves else "none", "lw": 1.2}
            ax.errorbar(*(own["at"], own["mean"])[::turn], **bars, **styles[name], ms=6, mfcalt="white")
            look = {**styles[name], "fillstyle": "none", "ls": "none", "ms": 9, "label": "hollow: the paper"}
            if own.published.notna().any():
                ax.plot(*(own["at"], own.published)[::turn], **look)
        ax.set_title(title if curves or len(panels) > 1 else "", fontsize=9.5)
        ax.grid(axis="y" if curves else "x", lw=0.6)
        ticks = place.groupby(label, sort=False)["at"].mean()
        if curves:
            ax.set(xticks=ticks, xticklabels=[text.split()[0] for text in ticks.index], xlabel="shots")
        else:
            ax.set(yticks=ticks, yticklabels=[textwrap.fill(text, 18) for text in ticks.index], xlabel="accuracy (%)")
            ax.set_ylim(place["at"].max() + 0.8, -0.8)
            ax.tick_params(labelbottom=True)
        limits, set_limits = (ax.get_ylim(), ax.set_ylim) if curves else (ax.get_xlim(), ax.set_xlim)
        margin = max(0, MIN_SPAN - (limits[1] - limits[0])) / 2
        set_limits(limits[0] - margin, limits[1] + margin)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.suptitle(textwrap.fill(table.title, 20 + 30 * columns), fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across, frameon=False)
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """A figure as a file of this kind; the same bytes every time."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": figure.get_suptitle()}):
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
    return buffer.getvalue()


def example_predictions(runs: pd.DataFrame, n: int) -> tuple[str, list[tuple[bytes, str]]]:
    """The first run that can be loaded, of LoGoPrompt as shipped if possible, and pictures with captions."""
    shipped = ~runs.overrides.map(lambda overrides: any(key.startswith("TRAINER.") for key in overrides)).astype(bool)
    shipped &= (runs.method == "LoGoPrompt") & ((runs.kind != "ablation") | (runs.scope == "shipped"))
    runs = runs.assign(other=~shipped, foreign=~runs.method.str.startswith("LoGoPrompt"), flags=runs.warnings.str.len())
    runs = runs.sort_values(["other", "foreign", "flags", "seed"], kind="stable")
    reason = ""
    for run in runs.drop_duplicates(["method", "dataset", "backbone"]).head(4 if n else 0).itertuples():
        try:
            return f"{run.method}, {run.dataset}, {run.backbone}, seed {run.seed}", predict(run.folder, n)
        except Exception as error:  # noqa: BLE001 (the report does without, whatever the reason)
            reason = reason or f"{run.folder}: {' '.join(str(error).split())}"
    if reason:
        print(f"no example predictions (--predictions): {reason}", file=sys.stderr)
    return "", []


def predict(folder: str, n: int) -> list[tuple[bytes, str]]:
    """``n`` of 3n test images of a run's data set, spread over its classes; those changed by selection come first."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a report downloads nothing
    sys.path.insert(0, str(ROOT))
    from trainers.predictor import Predictor, run_config, survey  # takes seconds to import
    from trainers.prompting.backbone import CACHE, OPENAI_MODELS

    cfg = run_config(folder)
    classnames, items = survey(cfg)
    test = pd.DataFrame(items, columns=["path", "label"])
    test["turn"] = test.groupby("label").cumcount()  # one image of every class, then a second one
    test = test.sample(frac=1, random_state=0).sort_values("turn", kind="stable").head(3 * n)
    truth = {path: classnames[label] for path, label in zip(test.path, test.label)}
    for path in truth:  # before weights are read
        os.stat(path)
    name = cfg.MODEL.BACKBONE.NAME
    if name in OPENAI_MODELS and not list(Path(CACHE).expanduser().glob(f"{OPENAI_MODELS[name][0]}[.p]*")):
        raise FileNotFoundError(f"the weights of {name} are not in {CACHE}")
    explained = tqdm(Predictor(folder, classnames).explain(truth), total=len(truth), disable=None)
    found = [explanation for explanation in explained if not explanation.prediction.error]
    if not found:
        raise ValueError("none of its test images can be read")
    pictures = []
    for explanation in sorted(found, key=lambda explanation: explanation.selected == 0)[:n]:
        buffer, path, predicted = io.BytesIO(), explanation.prediction.path, explanation.prediction.classes[0]
        explanation.truth = truth[path]
        explanation.draw().save(buffer, "png")
        verdict = "right" if predicted == truth[path] else "wrong"
        pictures.append((buffer.getvalue(), f"{'/'.join(Path(path).parts[-2:])}: {verdict}, {predicted}"))
    return pictures


def page(report: Report, wide: Sequence[bytes], narrow: Sequence[bytes], run: str, pictures: list) -> str:
    """``report.html``: the Markdown with narrower tables, CSS, and figures and pictures inside."""

    def data(image: bytes) -> str:
        kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
        return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"

    files = [f"{i}.svg" if figure else "" for i, figure in enumerate(wide)]
    body = MarkdownIt("js-default").render(markdown(report, files))
    tables = map(table_html, report.tables)
    body = re.sub(r"<table>.*?</table>", lambda _: next(tables), body, flags=re.DOTALL)
    for i, (figure, other) in enumerate(zip(wide, narrow)):
        source = f'<source media="(max-width: 900px)" srcset="{data(other)}">'
        body = re.sub(rf'<img src="{i}.svg"([^>]*)>', rf'<picture>{source}<img src="{data(figure)}"\1></picture>', body)
    body, missing, end = body.partition(f"<h2>{MISSING}</h2>")
    body += f"<h2>Example predictions ({escape(run)})</h2>" * bool(pictures)
    for image, caption in pictures:
        body += f'<figure><figcaption>{escape(caption)}</figcaption><img src="{data(image)}" alt=""></figure>'
    body += f"<details><summary>{MISSING}</summary>{end}</details>" * bool(missing)
    return Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("<!-- report -->", body)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=style)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help=f"folders searched for {NAME}")
    add("--seeds", nargs="+", type=int, default=[], help="seeds that every cell must have; none: those of its row")
    add("--partial", action="store_true", help="exit status 0 even if runs are missing")
    add("--out", type=Path, default=ROOT / "output" / "report", help="folder to write to")
    add("--predictions", type=int, default=6, metavar="N", help="test images with the predictions of one run; 0: none")
    args = parser.parse_args(argv)
    if args.predictions < 0:
        parser.error(f"--predictions {args.predictions}: must not be negative")
    try:
        report = make_report(args.runs, sorted(set(args.seeds)))
        for line in (*report.gaps, *report.notes):
            print(line, file=sys.stderr)
        if report.runs.empty:
            raise UserError(f"{', '.join(map(str, args.runs))}: no {NAME} with a test accuracy of --seeds")
        drawn, narrow = figures(report.tables), figures(report.tables, narrow=True)
        files = {f"{name}.{kind}": render(f, kind) for name, f in drawn if f for kind in ("png", "svg")}
        svgs = [files.get(f"{name}.svg", b"") for name, _ in drawn], [render(f, "svg") if f else b"" for _, f in narrow]
        columns = ["table", "section", "row", "column", "mean", "std", "n", "seeds", "published", "difference"]
        cells = pd.concat([table.cells.assign(table=table.title) for table in report.tables]).dropna(subset=["mean"])
        runs = report.runs.drop(columns="settings")
        runs["overrides"] = [", ".join(f"{key} {value}" for key, value in asked.items()) for asked in runs.overrides]
        runs["warnings"] = runs.warnings.str.join("; ")
        texts = {
            "runs.csv": runs.to_csv(index=False),
            "cells.csv": cells.astype({"n": int})[columns].to_csv(index=False),
            "report.md": markdown(report, [f"{name}.svg" * bool(name) for name, _ in drawn]),
            "report.html": page(report, *svgs, *example_predictions(report.runs, args.predictions)),
        }
        files.update((name, text.encode()) for name, text in texts.items())
        for name, data in files.items():
            with replacing(str(args.out / name)) as file:
                file.write(data)
        for old in args.out.iterdir():  # figures of an earlier report
            if re.fullmatch(rf"({'|'.join(TITLES)})(_\d+)?\.(png|svg)", old.name) and old.name not in files:
                old.unlink()
    except (UserError, OSError) as error:
        for line in error.args if isinstance(error, UserError) else [error]:
            print(f"error: {line}", file=sys.stderr)
        return 2
    print(markdown(report), *(args.out / name for name in texts), sep="\n")
    if report.gaps and not args.partial:
        print(f"incomplete ({len(report.gaps)} lines at the end of the report)", file=sys.stderr)
    return int(bool(report.gaps) and not args.partial)


if __name__ == "__main__":
    sys.exit(main())
