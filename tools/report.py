"""The paper's tables and figures from finished runs, next to the published numbers.

    python tools/report.py output                       # everything in output/, into output/report/
    python tools/report.py output/base2new --seeds 1 --partial --out base2new_so_far

Every folder is searched for ``results.json``. The tables are printed and written to ``report.html`` (self-contained),
``report.md`` and ``cells.csv`` (full precision), the runs to ``runs.csv``, each figure to a PNG and an SVG.

Exit status: 0; 1 if runs are missing, unfinished, damaged or mixed (one line each; nothing is written without
--partial); 2 for a mistake in the call, among them the same run in two folders.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    title, examples, _ = __doc__.split("\n\n", 2)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=f"examples:\n{examples}", formatter_class=style)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders searched for results.json")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds that every cell must have (1 2 3)")
    add("--partial", action="store_true", help="make the report even if runs are missing")
    add("--out", type=Path, default=ROOT / "output" / "report", help="folder to write to (output/report)")
    add(
        "--predictions",
        type=int,
        default=6,
        metavar="N",
        help="test images with the predictions of one run; 0: none (6)",
    )
    args = parser.parse_args(argv)
    if args.predictions < 0:
        parser.error(f"--predictions {args.predictions}: must not be negative")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes in the flags end here: the imports below take seconds

import pandas as pd
from markdown_it import MarkdownIt
from matplotlib import rc_context
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from report_data import NAME, TITLES, Report, Table, UserError, make_report, replacing

OURS = ("#d1495b", "o")  # LoGoPrompt
PALETTE = ("#4c86c6", "#2a9d8f", "#9b6bc2", "#c98a1b", "#7a8f3a", "#c2679b", "#5b6f9e", "#a0705a", "#3b9ab2", "#8a94a0")
MARKERS = "s^DvP<X>*"
GREY = "#8a94a0"
STYLE = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "grid.color": GREY, "grid.alpha": 0.25}


def clean(text: str) -> str:
    """A name in Markdown: no name of a run can make a link, an image or a column."""
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", text)


def table_text(table: Table) -> str:
    """A table in Markdown, with the published value and the difference next to each column that has them."""
    cells = table.cells.assign(text=table.cells.text.where(~table.cells.best, "**" + table.cells.text + "**"))
    lines = cells[["section", "row"]].drop_duplicates()
    sections = lines.section.where(lines.section != lines.section.shift(), "")
    columns = list(zip(table.heads, (sections.map(clean), lines.row.map(clean))))
    for name, part in cells.groupby("column", sort=False):
        columns += [(name, part.text.replace("", "–"))]
        columns += [("paper", part.versus)] * bool(part.published.notna().any())
    heads, content = zip(*columns)
    align = ["left", "left", *["right"] * (len(heads) - 2)]
    return tabulate(list(zip(*content)), heads, tablefmt="pipe", disable_numparse=True, colalign=align)


def markdown(report: Report, figure_files: Sequence[str] = ()) -> str:
    """All tables, each with its figure if there are files, and what is missing."""
    summary = (
        f"Runs: {len(report.runs)}, seeds: {', '.join(map(str, report.seeds))}. Test accuracy in %, mean ± standard "
        "deviation (of the sample) over seeds; with the paper's value and the difference; bold is the best."
    )
    parts = ["# LoGoPrompt: report", summary, "\n".join(f"- {clean(line)}" for line in [*report.gaps, *report.notes])]
    for i, table in enumerate(report.tables):
        parts += [f"## {clean(table.title)}", table_text(table), *table.notes]
        parts += [f"![{clean(table.title)}]({name})" for name in figure_files[i : i + 1]]
    return "\n\n".join(filter(None, parts)) + "\n"


def figures(tables: Sequence[Table]) -> list[tuple[str, Figure]]:
    """(file name without suffix, figure) of every table; a row has the same colour and marker in all of them."""
    rows = dict.fromkeys(row for table in tables if table.kind != "ablation" for row in table.cells.row)
    others = [row for row in rows if row != "LoGoPrompt"]
    looks = {row: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(others)}
    kinds = [table.kind for table in tables]
    names = [kind if (n := kinds[:i].count(kind)) == 0 else f"{kind}_{n + 1}" for i, kind in enumerate(kinds)]
    with rc_context(STYLE):
        return [(name, draw_table(table, looks)) for name, table in zip(names, tables)]


def draw_table(table: Table, looks: dict[str, tuple[str, str]]) -> Figure:
    """Means with deviations and, hollow, the paper's numbers: curves over shots if there are several, else dots."""
    cells, curves = table.cells, table.kind == "few_shot" and table.cells.column.nunique() > 1
    panel, label, series = ("section", "column", "row") if curves else ("column", "section", "row")
    if table.kind == "ablation":
        panel, label, series = "section", "row", "column"
    panels, names = dict(list(cells.groupby(panel, sort=False))), list(cells[series].unique())
    columns = min(len(panels), 4 if curves else 3 if len(panels) != 4 else 2)
    lines = math.ceil(len(panels) / columns)
    n_labels = max(part[label].nunique() for part in panels.values())
    width, height = (3.3, 2.6) if curves else (3.7, 0.9 + n_labels * max(0.28, 0.1 * len(names) + 0.1))
    figure = Figure(figsize=(width * columns, height * lines + 0.7), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=not curves, sharey=panel == "column").flat)
    for ax, (title, part) in zip(axes, panels.items()):
        labels = list(part[label].unique())
        for i, name in enumerate(names):
            own, (colour, marker) = part[part[series] == name].set_index(label).reindex(labels), looks.get(name, OURS)
            shift = 0 if curves else (i - (len(names) - 1) / 2) * 0.7 / len(names)  # the first on top
            places, turn = [place + shift for place in range(len(labels))], 1 if curves else -1
            bars = {"yerr" if curves else "xerr": own["std"].fillna(0), "ls": "-" if curves else "none"}
            look = {"color": colour, "marker": marker}
            ax.errorbar(*(places, own["mean"])[::turn], **bars, **look, ms=4, lw=1.4, elinewidth=1, label=name)
            if own.published.notna().any():
                points = (places, own.published)[::turn]
                ax.plot(*points, **look, ms=7, mfc="none", ls="none", label="hollow: the paper")
        ax.set_title(title, fontsize=9.5)
        ax.grid(axis="y" if curves else "x", lw=0.6)
        if curves:
            ax.set_xticks(range(len(labels)), [text.split()[0] for text in labels])
            ax.set_xlabel("shots")
        else:
            ax.set_yticks(range(len(labels)), labels)
            ax.set(ylim=(len(labels) - 0.5, -0.5), xlabel="accuracy (%)")
            ax.tick_params(labelbottom=True)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.suptitle(table.title, fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 * columns, frameon=False)
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """A figure as a file of this kind; the same bytes every time."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": figure.get_suptitle()}):
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
    return buffer.getvalue()


def example_predictions(runs: pd.DataFrame, n: int) -> tuple[str, list[tuple[bytes, str]]]:
    """The first run that can be loaded, LoGoPrompt's before others', and pictures with captions of its predictions."""
    runs = runs.assign(other=~runs.method.str.startswith("LoGoPrompt")).sort_values(["other", "seed"], kind="stable")
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
        explanation.draw().save(buffer, "png")
        verdict = "right" if predicted == truth[path] else "wrong"
        pictures.append((buffer.getvalue(), f"{'/'.join(Path(path).parts[-2:])}: {verdict}, {predicted}"))
    return pictures


def page(report: Report, figure_files: dict[str, bytes], run: str, pictures: list[tuple[bytes, str]]) -> str:
    """``report.html``: the Markdown with CSS and pictures inside."""
    text = markdown(report, list(figure_files)) + f"\n## Example predictions ({clean(run)})\n" * bool(pictures)
    for i, (_, caption) in enumerate(pictures):
        text += f"\n![{clean(caption)}](picture-{i})\n\n{clean(caption)}\n"
    body = MarkdownIt("js-default").render(text)
    for name, data in {**figure_files, **{f"picture-{i}": data for i, (data, _) in enumerate(pictures)}}.items():
        kind = "png" if data.startswith(b"\x89PNG") else "svg+xml"
        body = body.replace(f'src="{name}"', f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}"')
    return Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("<!-- report -->", body)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    args = parse_args(argv)
    try:
        report = make_report(args.runs, sorted(set(args.seeds)))
        for line in (*report.gaps, *report.notes):
            print(line, file=sys.stderr)
        if report.runs.empty and (args.partial or not report.gaps):
            raise UserError(f"{', '.join(map(str, args.runs))}: no {NAME} with a test accuracy of --seeds")
        if report.gaps and not args.partial:
            print(f"incomplete ({len(report.gaps)} lines above): use --partial to report anyway", file=sys.stderr)
            return 1
        files = {f"{name}.{kind}": render(f, kind) for name, f in figures(report.tables) for kind in ("png", "svg")}
        svgs = {name: data for name, data in files.items() if name.endswith("svg")}
        columns = ["table", "section", "row", "column", "mean", "std", "n", "seeds", "published", "difference"]
        cells = pd.concat([table.cells.assign(table=table.title) for table in report.tables]).dropna(subset=["mean"])
        texts = {
            "runs.csv": report.runs.to_csv(index=False),
            "cells.csv": cells.astype({"n": int})[columns].to_csv(index=False),
            "report.md": markdown(report, list(svgs)),
            "report.html": page(report, svgs, *example_predictions(report.runs, args.predictions)),
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
