"""Finished runs, and the tables made of them: what tools/report.py shows.

Reads ``results.json`` of every run, and the ``config.yaml`` beside it for what the former does not say.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, NamedTuple, Optional, Union

import published  # isort: skip (makes `import prompting` work)
import yaml
from prompting.errors import UserError
from prompting.results import NAME, harmonic_mean, read_results

SIGNS = ("log.txt", "asked.txt", "prompt_learner")  # a folder with one of these is a run, finished or not
TRANSFERS = ("domain_generalization", "cross_dataset")
KINDS = ("base2new", "few_shot", *TRANSFERS, "ablation")
ORDER = ("ZeroshotCLIP", "CoOp", "CoCoOp", "VPT", "VisualPrompting", "DPT", "LoGoPrompt", "LoGoPrompt+Adapter")
# Settings that may differ between the seeds of a cell: they change no accuracy, or are compared elsewhere.
FREE_KEYS = ("SEED", "OUTPUT_DIR", "RESUME", "VERBOSE", "USE_CUDA", "DATASET.ROOT", "DATALOADER.NUM_WORKERS")
FREE_KEYS += ("TRAIN.", "TEST.")
# Parts of Table 4: (its name there, title, {row: folder that scripts/logo/ablation.sh makes}); "shipped" is in all.
ABLATION = (
    (
        "visual_prompt_type",
        "4a: use of the visual prompts",
        {
            "none": "4a_none",
            "text_augmentation": "4a_text_augmentation",
            "paired": "4a_paired",
            "selection": "shipped",
        },
    ),
    ("size_ratio", "4b: size of the block", {"1/14": "4b_1_14", "1/7": "shipped", "2/7": "4b_2_7"}),
    ("n_ctx", "4c: number of context vectors", {"2": "4c_2", "8": "4c_8", "16": "4c_16"}),
    ("location", "4d: place of the block", {"top": "4d_top", "bottom": "4d_bottom", "random": "shipped"}),
)
ABOUT_H = (
    "H of a data set is that of base and new averaged over seeds, H of the average that of base and new averaged over "
    "data sets, as in the paper (CLIP 71.70, CoOp 71.66, CoCoOp 75.83, LoGoPrompt 79.03; the means of the eleven H "
    "would be 71.59, 70.83, 75.44 and 78.74). Only for VPT and DPT it prints means of H (74.68, 44.54); here H of its "
    "averages stands for them. The deviation beside H is that of the H of each seed."
)


class Run(NamedTuple):
    """One finished run."""

    folder: str
    kind: str  # of KINDS
    scope: str  # the source of a transfer, the row of an ablation, else empty
    method: str  # the trainer, with "+Adapter" where that is on
    backbone: str
    config: str  # file in configs/trainers/<trainer>, without .yaml; empty where the folder does not say
    dataset: str  # DATASET.NAME
    shots: int
    seed: int
    subset: str  # all, base or new
    accuracy: float  # in per cent
    collapsed: bool
    learned: bool  # False: nothing was trained, so neither seeds nor shots have a say

    @property
    def identity(self) -> tuple[Any, ...]:
        return self[1:10]


class Row(NamedTuple):
    """What a row of a table is made of: runs of one method with one backbone and one kind of config."""

    method: str
    config: str
    backbone: str


@dataclass
class Cell:
    """A number of a table: an accuracy or H over seeds, in per cent."""

    mean: float
    values: dict[int, float]  # seed -> value; H of the means is not the mean of these
    published: Optional[float] = None
    best: bool = False
    short: bool = False  # of fewer seeds than expected

    @property
    def std(self) -> Optional[float]:
        return stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def difference(self) -> Optional[float]:
        return None if self.published is None else self.mean - self.published

    @property
    def signed(self) -> str:
        """The difference, with a minus as wide as the plus, and never as -0.00."""
        return "" if self.published is None else f"{round(self.difference, 2) + 0.0:+.2f}".replace("-", "\u2212")

    @property
    def spread(self) -> str:
        std = "" if self.std is None else f"± {self.std:.2f}"
        return f"{std} (n={len(self.values)})".strip() if self.short else std

    @property
    def text(self) -> str:
        return f"{self.mean:.2f} {self.spread}".strip()


@dataclass
class Table:
    """Sections (data sets, or parts of Table 4) of rows (methods, or settings) of one cell a column."""

    kind: str
    title: str
    first: tuple[str, str]  # what sections and rows are
    columns: list[str]
    sections: list[tuple[str, list[tuple[str, list[Optional[Cell]]]]]]
    notes: list[str] = field(default_factory=list)

    @property
    def cells(self) -> Iterator[tuple[str, str, str, Cell]]:
        """(section, row, column, cell) of all cells there are."""
        for section, rows in self.sections:
            for row, cells in rows:
                for column, cell in zip(self.columns, cells):
                    if cell is not None:
                        yield section, row, column, cell

    @property
    def compared(self) -> list[bool]:
        """Whether a column has published values."""
        found = {column for _, _, column, cell in self.cells if cell.published is not None}
        return [column in found for column in self.columns]


# ------------------------------------------------------------------------------------------------- reading


def find_runs(roots: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Folders of finished and of unfinished runs below ``roots``, each once. Raises UserError."""
    finished, unfinished, seen = [], [], set()
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        for name, folders, files in os.walk(root.resolve(), followlinks=True):
            real = os.path.realpath(name)
            if real in seen:  # named twice, or a link back
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            if NAME in files:
                finished.append(Path(real))
            elif any(entry.startswith(SIGNS) for entry in (*files, *folders)):
                unfinished.append(Path(real))
    return finished, unfinished


def place(folder: Path, subset: str) -> tuple[str, str]:
    """Kind and scope of a run, by its subset of classes and the names that the scripts give to folders (the innermost).

    What was trained on all classes in a folder of another name is taken as few-shot.
    """
    if subset != "all":
        return "base2new", ""
    parts = folder.parts
    for part, following in zip(reversed(parts[:-1]), reversed(parts[1:])):
        if part == "few_shot":
            return part, ""
        if part == "ablation":
            return part, following
        if part in TRANSFERS and following.startswith("from_"):
            return part, following.removeprefix("from_")
    return "few_shot", ""


def read_settings(folder: Path) -> dict[str, Any]:
    """``config.yaml`` of a run as {dotted key: value}; empty where there is none."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict) or not node:
            return {prefix: node}
        return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}

    loader = yaml.SafeLoader
    if len(text) < 20_000:  # a config takes 3,000; on a text nested deeply enough libyaml ends the process
        loader = getattr(yaml, "CSafeLoader", loader)
    return flat(yaml.load(text, Loader=loader))


def read_run(folder: Path, settings: dict[str, Any]) -> Optional[Run]:
    """A finished run; None where it measured nothing on test images. Raises ValueError, KeyError, TypeError."""
    results = read_results(str(folder))
    run, metrics = results["run"], results["metrics"]
    if not metrics or results["split"] == "val":
        return None
    accuracy = metrics["accuracy"]
    if type(accuracy) not in (int, float) or not 0 <= accuracy <= 100:
        raise ValueError(f"accuracy {accuracy}")
    for key, kind in {"trainer": str, "dataset": str, "backbone": str, "shots": int, "seed": int}.items():
        if type(run[key]) is not kind:
            raise ValueError(f"{key} {run[key]!r}")
    subset = run["subsample_classes"]
    if subset not in ("all", "base", "new"):
        raise ValueError(f"subsample_classes {subset!r}")
    method = run["trainer"]
    if settings.get(f"TRAINER.{method.upper()}.ADAPTER"):
        method += "+Adapter"
    config = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else ""
    return Run(
        str(folder), *place(folder, subset), method, run["backbone"], config, run["dataset"], run["shots"], run["seed"],
        subset, float(accuracy), bool(run.get("collapsed")), bool(run.get("trained") or run.get("model_dir")),
    )  # fmt: skip


class Found(NamedTuple):
    """What there is below the folders, and what to say of it."""

    runs: list[Run]
    gaps: list[str]  # make the command fail
    notes: list[str]  # worth knowing
    refused: list[str]  # mistakes


def collect(roots: Sequence[Path], seeds: Sequence[int]) -> Found:
    """Read all runs and check what can be said of each and of those that share a cell. Raises UserError."""
    finished, unfinished = find_runs(roots)
    gaps = [f"unfinished: {shown(folder)} has no {NAME}" for folder in unfinished]
    notes, runs, settings = [], [], {}
    for folder in finished:
        try:
            own = read_settings(folder)
            run = read_run(folder, own)
        except KeyError as error:
            gaps.append(f"damaged: {shown(folder / NAME)} has no {error}")
            continue
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            gaps.append(f"damaged: {shown(folder / NAME)}: {' '.join(str(error).split())}")
            continue
        if run is None:
            notes.append(f"left out: {shown(folder)} measured nothing on test images")
        elif run.seed not in seeds and run.learned:
            notes.append(f"left out: {shown(folder)} has seed {run.seed}, which is not among --seeds")
        else:
            runs.append(run)
            settings[run] = own
            if run.collapsed:
                notes.append(f"collapsed: the training of {shown(folder)}")
    twins, cells = defaultdict(list), defaultdict(list)
    for run in runs:
        twins[run.identity].append(run)
        cells[run._replace(folder="", seed=0, accuracy=0, collapsed=False)].append(run)
    refused = [
        f"the same run {len(same)} times: {', '.join(shown(run.folder) for run in same)}; name the folder of one"
        for same in twins.values()
        if len(same) > 1
    ]
    for one, *others in cells.values():
        for other in others:
            here, there = settings[one], settings[other]
            keys = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
            keys = [key for key in keys if not key.startswith(FREE_KEYS)]
            if here and there and keys:
                what = ", ".join(f"{key} {there.get(key)}, not {here.get(key)}" for key in keys[:3])
                gaps.append(f"mixed: {shown(other.folder)} has {what} as {shown(one.folder)} has")
    return Found(runs, gaps, notes, refused)


def shown(path: Any) -> str:
    """A path as short as it can be said from here."""
    short = os.path.relpath(path)
    return str(path) if short.startswith("..") else short


# ------------------------------------------------------------------------------------------------- tables

Series = dict[int, float]  # seed -> value
Where = Union[str, list[str]]  # a data set, or those that an average is over


class Grid:
    """The runs of one table: row -> data set -> column -> seed -> accuracy."""

    def __init__(self, runs: Iterable[Run], column: Any) -> None:
        self.values: dict[Row, dict[str, dict[Any, Series]]] = {}
        runs = list(runs)
        for run, row in zip(runs, rows_of(runs)):
            series = self.values.setdefault(row, {}).setdefault(run.dataset, {}).setdefault(column(run), {})
            series[run.seed] = run.accuracy
        self.learned = {row for run, row in zip(runs, rows_of(runs)) if run.learned}
        self.rows = sorted(self.values, key=lambda row: (_rank(ORDER, row.method), row))
        names = list(published.NAMES.values())
        self.datasets = sorted({d for of in self.values.values() for d in of}, key=lambda d: (_rank(names, d), d))
        self.columns = sorted({c for of in self.values.values() for columns in of.values() for c in columns})

    def series(self, row: Row, where: Where, column: Any) -> Series:
        """Seed -> accuracy on a data set, or averaged over several, for every seed that all of them have."""
        if isinstance(where, str):
            return self.values[row].get(where, {}).get(column, {})
        parts = [self.series(row, dataset, column) for dataset in where]
        seeds = set.intersection(*(set(part) for part in parts))
        return {seed: mean(part[seed] for part in parts) for seed in sorted(seeds)}

    def label(self, row: Row) -> str:
        if sum(other.method == row.method for other in self.rows) == 1:
            return row.method
        return f"{row.method} ({', '.join(filter(None, (row.config, row.backbone)))})"

    def gaps(self, title: str, seeds: Sequence[int], columns: Sequence[Any], name: Any = str) -> list[str]:
        """A line for every row and data set that lacks runs which another one has."""
        lines = []
        for row in self.rows:
            for dataset in self.datasets:
                lacking = defaultdict(list)  # columns -> seeds that lack just these
                if row in self.learned:
                    for seed in seeds:
                        missing = [c for c in columns if seed not in self.series(row, dataset, c)]
                        lacking[tuple(missing)].append(seed)
                else:  # one run says all; with other shots it would be the same
                    missing = [c for c in columns if not self.series(row, dataset, c)]
                    halves = columns if columns == ["base", "new"] else ()
                    lacking[tuple(missing if halves or len(missing) == len(columns) else ())] = []
                for missing, of in lacking.items():
                    if missing:
                        what = "" if list(missing) == [""] else f", {' and '.join(map(name, missing))}"
                        which = f" with seed {', '.join(map(str, of))}" if of else ""
                        lines.append(f"missing: {title}: {self.label(row)} on {dataset}{what}{which}")
        return lines


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """The row of each run. Configs that differ in epochs alone (``_ep50``) are one row, as CoOp's schedule goes by
    shots and data set, unless a data set has several of them."""

    def family(run: Run) -> str:
        return re.sub(r"_ep\d+", "", run.config)

    known = defaultdict(set)
    for run in runs:
        known[run.method, run.backbone, family(run), run.dataset, run.shots].add(run.config)
    split = {key[:3] for key, configs in known.items() if len(configs) > 1}
    return [
        Row(r.method, r.config if (r.method, r.backbone, family(r)) in split else family(r), r.backbone) for r in runs
    ]


def _rank(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def accuracy_cell(series: Series) -> Optional[Cell]:
    return Cell(mean(series.values()), series) if series else None


def h_cell(base: Series, new: Series) -> Optional[Cell]:
    """H of mean base and mean new over the seeds that have both; its values are the H of each seed."""
    both = sorted(base.keys() & new.keys())
    if not both:
        return None
    means = (mean(half[seed] for seed in both) for half in (base, new))
    return Cell(harmonic_mean(*means), {seed: harmonic_mean(base[seed], new[seed]) for seed in both})


class Report:
    """All tables of some runs, and what is missing in them."""

    def __init__(self, found: Found, seeds: Sequence[int]) -> None:
        self.runs, self.seeds = found.runs, seeds
        self.gaps, self.notes = list(found.gaps), list(found.notes)
        self.tables: list[Table] = []
        groups = defaultdict(list)
        for run in found.runs:
            shots = run.shots if run.kind != "few_shot" else 0  # there they are the columns
            scope = run.scope if run.kind != "ablation" else ""
            groups[KINDS.index(run.kind), scope, -shots].append(run)
        for (kind, scope, shots), runs in sorted(groups.items()):
            build = {"base2new": self._base2new, "few_shot": self._few_shot, "ablation": self._ablation}
            build.get(KINDS[kind], self._transfer)(runs, scope, -shots)
        for table in self.tables:
            self._finish(table)

    def _base2new(self, runs: list[Run], _: str, shots: int) -> None:
        title = f"Table 1: base-to-new, {_shots(shots)}"
        grid = Grid(runs, lambda run: run.subset)
        self.gaps += grid.gaps(f"base-to-new, {_shots(shots)}", self.seeds, ["base", "new"])

        def cells(row: Row, where: Where) -> list[Optional[Cell]]:
            base, new = (grid.series(row, where, half) for half in ("base", "new"))
            return [accuracy_cell(base), accuracy_cell(new), h_cell(base, new)]

        table = self._table("base2new", title, grid, ["base", "new", "H"], cells, grid.datasets, shots)
        table.notes.append(ABOUT_H)
        datasets = _averaged(grid.datasets)
        parts = {row: [cells(row, dataset)[2] for dataset in datasets] for row in grid.rows}
        means = [
            f"{grid.label(row)} {mean(cell.mean for cell in own):.2f}" for row, own in parts.items() if None not in own
        ]
        if len(datasets) > 1 and means:
            table.notes.append(f"Mean of the {len(datasets)} H, for comparison: {', '.join(means)}.")

    def _few_shot(self, runs: list[Run], _: str, __: int) -> None:
        grid = Grid(runs, lambda run: run.shots)
        for row in grid.values.keys() - grid.learned:  # whatever the shots
            for of in grid.values[row].values():
                of.update({n: of.get(n) or next(iter(of.values())) for n in grid.columns})
        self.gaps += grid.gaps("few-shot", self.seeds, grid.columns, _shots)
        self._table(
            "few_shot",
            "Table 2 and Figure 3: few-shot classification",
            grid,
            grid.columns,
            lambda row, where: [accuracy_cell(grid.series(row, where, n)) for n in grid.columns],
            grid.datasets,
        )

    def _transfer(self, runs: list[Run], source: str, shots: int) -> None:
        kind = runs[0].kind
        origin = published.NAMES.get(source, source.replace("_", "")).lower()
        grid = Grid(runs, lambda run: "")
        name = {"domain_generalization": "Table 3: domain generalization", "cross_dataset": "Cross-data-set transfer"}
        title = f"{name[kind]} from {source}, {_shots(shots)}"
        self.gaps += grid.gaps(f"{kind.replace('_', ' ')} from {source}", self.seeds, [""])
        grid.datasets.sort(key=lambda dataset: dataset.lower() != origin)  # the source first
        if kind == "cross_dataset":
            datasets = [dataset for dataset in grid.datasets if dataset.lower() != origin]
            note = "The average is over the targets (CoCoOp's convention)."
        else:
            datasets = grid.datasets
            note = "The average includes the source, as in the paper."
        table = self._table(
            kind,
            title,
            grid,
            ["accuracy"],
            lambda row, where: [accuracy_cell(grid.series(row, where, ""))],
            datasets,
            shots if source == "imagenet" else 0,
        )
        table.notes.append(note)

    def _table(
        self,
        kind: str,
        title: str,
        grid: Grid,
        columns: list[Any],
        cells: Callable[[Row, Where], list[Optional[Cell]]],
        averaged: list[str],
        shots: int = 0,
    ) -> Table:
        """A table of methods by data sets with the average on top, and the paper's numbers where they are for the same.

        Args:
            cells: one a column. averaged: data sets that the average may be of. shots: 0: the columns are shots.
        """
        averaged = _averaged(averaged)
        plan: list[tuple[str, Where]] = [(dataset, dataset) for dataset in grid.datasets]
        if len(averaged) > 1:
            plan.insert(0, (f"Average of {len(averaged)} data sets", averaged))
        sections = []
        for label, where in plan:
            rows = []
            for row in grid.rows:
                found = cells(row, where)
                for column, cell in zip(columns, found):
                    if cell is None:
                        continue
                    cell.short = row in grid.learned and len(cell.values) < len(self.seeds)
                    n, name = (shots, column) if isinstance(column, str) else (column, "accuracy")
                    if n == published.SHOTS and published.compares(kind, row.backbone):
                        look = published.value if isinstance(where, str) else published.average
                        cell.published = look(kind, row.method, where, name)
                rows.append((grid.label(row), found))
            sections.append((label, rows))
        names = [column if isinstance(column, str) else _shots(column) for column in columns]
        table = Table(kind, title, ("data set", "method"), names, sections)
        others = sorted({row.backbone for row in grid.rows if not published.compares(kind, row.backbone)})
        if kind in published.TABLES and others:
            paper = published.TABLES[kind][1]
            table.notes.append(f"The paper's backbone is {paper}: nothing to compare {', '.join(others)} with.")
        if len(averaged) > 1 and any(None in found for _, found in sections[0][1]):
            table.notes.append("A method without runs on one of the data sets has no average.")
        self.tables.append(table)
        return table

    def _ablation(self, runs: list[Run], _: str, shots: int) -> None:
        """One table for every data set and config: rows are settings."""
        groups = defaultdict(list)
        for run, row in zip(runs, rows_of(runs)):
            groups[run.dataset, row].append(run)
        for (dataset, row), own in sorted(groups.items()):
            series: dict[str, Series] = defaultdict(dict)
            for run in own:
                series[run.scope][run.seed] = run.accuracy
            parts = [(part, title, dict(folders)) for part, title, folders in ABLATION]
            if "4c_16" not in series and not row.config.endswith("ctxv1"):
                parts[2][2]["16"] = "shipped"  # without initial words M is 16
            comparable = (dataset, shots) == ("ImageNet", published.SHOTS)
            comparable = comparable and published.same_backbone(row.backbone, published.ABLATION_BACKBONE)
            known = {folder for *_, folders in parts for folder in folders.values()}
            others = {name: name for name in sorted(series.keys() - known)}
            sections = []
            for part, title, folders in (*parts, *([("", "others", others)] if others else [])):
                rows = []
                for name, folder in folders.items():
                    cell = accuracy_cell(series[folder])
                    if cell is not None:
                        cell.short = len(cell.values) < len(self.seeds)
                        cell.published = published.ABLATION.get(part, {}).get(name) if comparable else None
                    rows.append((name, [cell]))
                sections.append((title, rows))
            several = sum((name, other.backbone) == (dataset, row.backbone) for name, other in groups) > 1
            where = ", ".join([f"{row.method} on {dataset}", row.backbone, *([row.config] * several), _shots(shots)])
            table = Table("ablation", f"Table 4: ablations, {where}", ("part", "setting"), ["accuracy"], sections)
            if not comparable:
                table.notes.append("The paper's are on ImageNet with RN50 and 16 shots: nothing to compare with.")
            self.tables.append(table)
            for folder in sorted({*known, *series}):
                lacking = [str(seed) for seed in self.seeds if seed not in series[folder]]
                if lacking:
                    self.gaps.append(f"missing: ablation: {where}, row {folder} with seed {', '.join(lacking)}")

    @staticmethod
    def _finish(table: Table) -> None:
        """Mark the best of every section and column that has several."""
        for _, rows in table.sections:
            for i in range(len(table.columns)):
                cells = [cells[i] for _, cells in rows if cells[i] is not None]
                top = max((round(cell.mean, 2) for cell in cells), default=0)
                for cell in cells:
                    cell.best = len(cells) > 1 and round(cell.mean, 2) == top


def _averaged(datasets: Sequence[str]) -> list[str]:
    """Data sets that an average is over: those of the paper where there are any, else all."""
    return [dataset for dataset in datasets if dataset in published.NAMES.values()] or list(datasets)


def _shots(n: int) -> str:
    return "1 shot" if n == 1 else f"{n} shots"
