"""The figures of tools/report.py: small panels, all of a table's in one file, one by one on the page."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any, Optional

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from report_tables import Cell, Report

COLOURS = {
    **{"ZeroshotCLIP": "#8a94a0", "CoOp": "#4c86c6", "CoCoOp": "#2a9d8f", "LoGoPrompt": "#d1495b"},
    **{"LoGoPrompt+Adapter": "#9b6bc2"},
}
SPARE = ("#c98a1b", "#7a8f3a", "#c2679b", "#5b6f9e", "#a0705a")
MARKERS = "so^DvPX<>"
INK = "#1f2933"
CURRENT = "#010203"  # in a page's pictures: replaced by the colour of the page's text


@dataclass
class Panel:
    """One small plot."""

    title: str
    labels: list[str]  # along the axis of what is not an accuracy
    series: list[tuple[str, str, str, list[Optional[Cell]]]]  # (name, colour, marker, one cell a label)
    curve: bool = False
    limits: Optional[tuple[float, float]] = None  # of the accuracies

    @property
    def extent(self) -> list[float]:
        """Whatever must be seen: ends of the deviations, and the paper's numbers."""
        cells = [cell for *_, cells in self.series for cell in cells if cell is not None]
        known = [cell.published for cell in cells if cell.published is not None]
        return [end for c in cells for end in (c.mean - (c.std or 0), c.mean + (c.std or 0))] + known


@dataclass
class Plot:
    """All panels of a table."""

    name: str  # of its files
    title: str
    panels: list[Panel]

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        return [series[:3] for series in self.panels[0].series]

    @property
    def compared(self) -> bool:
        return any(cell and cell.published is not None for p in self.panels for *_, cells in p.series for cell in cells)


def plots(report: Report) -> list[Plot]:
    """A figure for every table: curves over shots where there are several, else dots."""
    found: list[Plot] = []
    for table in report.tables:
        rows = list(dict.fromkeys(row for _, rows in table.sections for row, _ in rows))
        spare = [c for c in SPARE * len(rows)]
        looks = {row: (COLOURS.get(row) or spare.pop(0), MARKERS[i % len(MARKERS)]) for i, row in enumerate(rows)}
        if table.kind == "ablation":
            look = ("LoGoPrompt", COLOURS["LoGoPrompt"], "o")
            panels = [
                Panel(section, [row for row, _ in rows], [(*look, [cells[0] for _, cells in rows])])
                for section, rows in table.sections
            ]
        elif table.kind == "few_shot" and len(table.columns) > 1:
            labels = [column.split()[0] for column in table.columns]
            panels = [
                Panel(section, labels, [(row, *looks[row], cells) for row, cells in rows], curve=True)
                for section, rows in table.sections
            ]
        else:
            by_row = {row: [dict(rows)[row] for _, rows in table.sections] for row in rows}
            panels = [
                Panel(
                    column,
                    [section for section, _ in table.sections],
                    [(row, *looks[row], [cells[i] for cells in by_row[row]]) for row in rows],
                )
                for i, column in enumerate(table.columns)
            ]
        ends = [end for panel in panels for end in panel.extent]
        margin = 0.06 * max(max(ends) - min(ends), 1)
        for panel in panels:
            if not panel.curve:  # one scale, to be compared across
                panel.limits = (min(ends) - margin, max(ends) + margin)
        same = sum(plot.name.startswith(table.kind) for plot in found)
        found.append(Plot(f"{table.kind}_{same + 1}" if same else table.kind, table.title, panels))
    return found


def draw_panel(axes: Any, panel: Panel, ink: str) -> None:
    """Means with their deviation; hollow where it is the paper's number."""
    n = len(panel.series)
    for i, (_, colour, marker, cells) in enumerate(panel.series):
        there = [(place, cell) for place, cell in enumerate(cells) if cell is not None]
        if not panel.curve:  # beside each other, the first on top
            there = [(place + (i - (n - 1) / 2) * 0.7 / n, cell) for place, cell in there]
        means, places = [cell.mean for _, cell in there], [place for place, _ in there]
        errors = [cell.std or 0 for _, cell in there]
        style = {"color": colour, "marker": marker, "ms": 4, "lw": 1.4, "elinewidth": 1}
        known = [(place, cell.published) for place, cell in there if cell.published is not None]
        if panel.curve:
            axes.errorbar(places, means, yerr=errors, **style)
        else:
            axes.errorbar(means, places, xerr=errors, **{**style, "ls": "none"})
        hollow = {"mfc": "none", "mec": colour, "ms": 7, "marker": marker, "ls": "none", "mew": 1}
        if known:
            at, values = zip(*known)
            axes.plot(*((at, values) if panel.curve else (values, at)), **hollow)
    axes.set_title(panel.title, fontsize=9.5, color=ink)
    ticks = range(len(panel.labels))
    if panel.curve:
        axes.set_xticks(ticks, panel.labels)
        axes.set_xlabel("shots", fontsize=8.5, color=ink)
    else:
        axes.set_yticks(ticks, panel.labels)
        axes.set_ylim(len(panel.labels) - 0.5, -0.5)
        axes.set_xlim(panel.limits)
        for edge in range(1, len(panel.labels)):
            axes.axhline(edge - 0.5, color="#8a94a0", lw=0.4, alpha=0.5)
        axes.set_xlabel("accuracy (%)", fontsize=8.5, color=ink)
    axes.tick_params(labelsize=8.5, colors=ink)
    axes.grid(axis="y" if panel.curve else "x", color="#8a94a0", alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8a94a0")


def draw_plot(plot: Plot, kind: str) -> bytes:
    """All panels with a legend, as a PNG or SVG file."""
    n = len(plot.panels)
    columns = min(n, 4 if plot.panels[0].curve else 3 if n != 4 else 2)
    lines = math.ceil(n / columns)
    width, height = size(plot.panels[0] if plot.panels[0].curve else max(plot.panels, key=lambda p: len(p.labels)))
    figure = Figure(figsize=(width * columns, height * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, panel in zip(grid.flat, plot.panels):
        draw_panel(axes, panel, INK)
    for axes in grid.flat[n:]:
        axes.set_visible(False)
    handles = [axes_line(colour, marker, name) for name, colour, marker in plot.legend] + (
        [axes_line("#8a94a0", "o", "hollow: the paper", hollow=True)] if plot.compared else []
    )
    figure.suptitle(plot.title, fontsize=11, color=INK)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns), frameon=False)
    return save(figure, kind, plot.name)


def axes_line(colour: str, marker: str, name: str, hollow: bool = False) -> Any:
    """An entry of a legend."""
    face = "none" if hollow else colour
    return Line2D([], [], color=colour, marker=marker, ls="none", mfc=face, ms=7 if hollow else 5, label=name)


def size(panel: Panel) -> tuple[float, float]:
    """Width and height in inches."""
    if panel.curve:
        return 3.3, 2.6
    return 3.7, 0.9 + len(panel.labels) * max(0.28, 0.1 * len(panel.series) + 0.1)


def inline_svg(panel: Panel, name: str) -> Markup:
    """A panel for the page, its text in the colour of the page's."""
    figure = Figure(figsize=size(panel), layout="constrained")
    draw_panel(figure.subplots(), panel, CURRENT)
    svg = save(figure, "svg", name).decode().replace(CURRENT, "currentColor")
    return Markup(svg[svg.index("<svg") :])


def save(figure: Figure, kind: str, salt: str) -> bytes:
    """The same bytes every time: no dates, and ids that are unique on the page."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": salt}):
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=150, transparent=kind == "svg", metadata=metadata)
    return buffer.getvalue()
