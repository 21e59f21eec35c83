"""The figures of tools/report.py: one for each table, as PNG and SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from report_data import Table

OURS = ("#d1495b", "o")  # LoGoPrompt
PALETTE = ("#4c86c6", "#2a9d8f", "#9b6bc2", "#c98a1b", "#7a8f3a", "#c2679b", "#5b6f9e", "#a0705a", "#3b9ab2", "#8a94a0")
MARKERS = "s^DvP<X>*"
GREY = "#8a94a0"
STYLE = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "grid.color": GREY, "grid.alpha": 0.25}


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
    panel, label, series = "column", "section", "row"  # what panels, positions and colours stand for
    if curves:
        panel, label = "section", "column"
    elif table.kind == "ablation":
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
            ax.errorbar(*(places, own["mean"])[::turn], **bars, **look, ms=4, lw=1.4, elinewidth=1)
            ax.plot(*(places, own.published)[::turn], **look, ms=7, mfc="none", ls="none")
        ax.set_title(title, fontsize=9.5)
        ax.grid(axis="y" if curves else "x", lw=0.6)
        if curves:
            ax.set_xticks(range(len(labels)), [text.split()[0] for text in labels])
            ax.set_xlabel("shots")
        else:
            ax.set_yticks(range(len(labels)), labels)
            ax.set(ylim=(len(labels) - 0.5, -0.5), xlabel="accuracy (%)")
            ax.tick_params(labelbottom=True)
            for edge in range(1, len(labels)):
                ax.axhline(edge - 0.5, color=GREY, lw=0.4, alpha=0.5)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    entries = [("this report" if series == "column" else name, *looks.get(name, OURS)) for name in names]
    entries = [(name, {"color": colour, "marker": marker, "ms": 5}) for name, colour, marker in entries]
    if cells.published.notna().any():
        entries.append(("hollow: the paper", {"color": GREY, "marker": "o", "mfc": "none", "ms": 7}))
    handles = [Line2D([], [], ls="none", label=name, **look) for name, look in entries]
    figure.suptitle(table.title, fontsize=11)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns), frameon=False)
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """A figure as a file of this kind; the same bytes every time."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": figure.get_suptitle()}):
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
    return buffer.getvalue()
