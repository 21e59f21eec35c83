"""Finished runs as one DataFrame, and the paper's tables made of it: what tools/report.py renders."""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pandas as pd
import yaml

# Not `from trainers.prompting`: the package imports torch, which takes longer than a whole report.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trainers"))

from prompting.errors import UserError
from prompting.results import NAME, harmonic_mean, read_results, replacing  # noqa: F401 (replacing: for report.py)

RUN_MARKS = ("log.txt", "asked.txt", "prompt_learner")  # one of these in a folder: a run, finished or not
TITLES = {
    "base2new": "Table 1: base-to-new",
    "few_shot": "Table 2 and Figure 3: few-shot classification",
    "domain_generalization": "Table 3: domain generalization",
    "cross_dataset": "Cross-dataset transfer",
    "ablation": "Table 4: ablations",
}
ABOUT = {
    "base2new": "H is computed from the means of base and new, as in the paper, not as the mean of several H (only for "
    "VPT and DPT the paper prints means of H, 74.68 and 44.54). Its deviation is that of the H of each seed.",
    "domain_generalization": "The average includes the source, as in the paper.",
    "cross_dataset": "The average is over the targets (CoCoOp's convention).",
}
# Config keys that may differ between the seeds of a cell: they do not change what is trained.
FREE_KEYS = ("SEED", "OUTPUT_DIR", "RESUME", "VERBOSE", "USE_CUDA", "DATASET.ROOT", "DATALOADER.NUM_WORKERS")
FREE_KEYS += ("TRAIN.", "TEST.")
H = np.vectorize(harmonic_mean, otypes=[float])

PAPER_SHOTS = 16
PAPER = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
PUBLISHED = {  # kind -> data sets and "average" by (method, column)
    kind: pd.DataFrame(
        {dataset: list(map(float, line.split())) for dataset, line in table["rows"].items()},
        pd.MultiIndex.from_product([table["methods"], table["columns"]]),
    ).T
    for kind, table in PAPER.items()
    if "rows" in table
}
PAPER_METHODS = list(dict.fromkeys(method for table in PUBLISHED.values() for method, _ in table.columns))
PAPER_DATASETS = list(dict.fromkeys(name for table in PUBLISHED.values() for name in table.index.drop("average")))


# ------------------------------------------------------------------------------------------------- published values


def same_backbone(name: str, paper: str) -> bool:
    """Whether ``MODEL.BACKBONE.NAME`` (a name, OpenAI's archive or open_clip's arch/tag) is the paper's backbone."""
    name = name.lower().removesuffix("/openai")
    name = Path(name).stem if name.endswith(".pt") else name
    return name.replace("/", "-") == paper.lower().replace("/", "-")


def published_value(kind: str, method: str, datasets: Sequence[str], column: str) -> float:
    """What the paper prints for a trainer on one data set or as the average of several; NaN where it prints nothing.

    The average is the printed one if it covers exactly these data sets, else that of the values printed for them; H of
    an average is always computed from the averages of base and new.
    """
    table = PUBLISHED.get(kind, pd.DataFrame()).get(method)  # data sets by columns
    if table is None:
        return np.nan
    if column == "H" and len(datasets) > 1:
        halves = (published_value(kind, method, datasets, half) for half in ("base", "new"))
        return round(harmonic_mean(*halves), 2)
    printed = table[column].dropna()
    if set(datasets) == set(printed.index) - {"average"}:
        return printed["average"]
    return printed.reindex(datasets).mean(skipna=False)


# ------------------------------------------------------------------------------------------------- reading runs


class Run(NamedTuple):
    """One finished run."""

    folder: str
    kind: str  # of TITLES
    scope: str  # the source of a transfer, the setting of an ablation, else empty
    method: str  # the trainer, with "+Adapter" if it is on
    backbone: str
    config: str  # file in configs/trainers/<trainer>, without .yaml; empty if the folder is not named seed<N>
    dataset: str  # DATASET.NAME
    shots: int
    seed: int
    subset: str  # all, base or new
    accuracy: float  # in per cent
    collapsed: bool
    learned: bool  # False: nothing was trained, the accuracy depends on neither seed nor shots


IDENTITY = list(Run._fields[1:10])  # two runs that agree in these are the same run
CELL = [name for name in Run._fields if name not in ("folder", "seed", "accuracy", "collapsed")]


def shown(path: Any) -> str:
    """A path relative to the current folder if it is below it."""
    short = os.path.relpath(path)
    return str(path) if short.startswith("..") else short


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
            elif any(entry.startswith(RUN_MARKS) for entry in (*files, *folders)):
                unfinished.append(Path(real))
    return finished, unfinished


def kind_and_scope(folder: Path, subset: str) -> tuple[str, str]:
    """Setting of a run, from its subset of classes and the innermost folder named by our scripts; else few-shot."""
    if subset != "all":
        return "base2new", ""
    named = r"/(ablation|few_shot|domain_generalization(?=/from_)|cross_dataset(?=/from_))(?=/(?:from_)?([^/]+))"
    kind, scope = (re.findall(named, folder.as_posix()) or [("few_shot", "")])[-1]
    return kind, "" if kind == "few_shot" else scope


def read_settings(folder: Path) -> dict[str, Any]:
    """``config.yaml`` of a run as {dotted key: value}; empty if the file does not exist."""
    if not (folder / "config.yaml").exists():
        return {}
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    loader = yaml.SafeLoader
    if len(text) < 20_000:  # a config takes 3,000; libyaml crashes on deeply nested text
        loader = getattr(yaml, "CSafeLoader", loader)
    settings = yaml.load(text, Loader=loader)
    if not settings or not isinstance(settings, dict):
        raise ValueError("config.yaml holds no keys")
    return pd.json_normalize(settings, sep=".").iloc[0].to_dict()


def read_run(folder: Path, settings: dict[str, Any]) -> Optional[Run]:
    """A finished run; None if it was not tested. Raises ValueError, KeyError, TypeError."""
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
        str(folder), *kind_and_scope(folder, subset), method, run["backbone"], config, run["dataset"], run["shots"],
        run["seed"], subset, float(accuracy), bool(run.get("collapsed")),
        bool(run.get("trained") or run.get("model_dir")),
    )  # fmt: skip


def read_runs(roots: Sequence[Path], seeds: Sequence[int]) -> tuple[pd.DataFrame, Sequence[int], list[str], list[str]]:
    """All runs below ``roots``, a row each.

    Returns:
        The runs, the seeds, problems that make the report incomplete, and notes.

    Raises:
        UserError: no such folder, or the same run in several folders.
    """
    finished, unfinished = find_runs(roots)
    gaps = [f"unfinished: {shown(folder)} has no {NAME}" for folder in unfinished]
    notes, found, settings = [], [], {}
    for folder in finished:
        try:
            settings[str(folder)] = read_settings(folder)
            run = read_run(folder, settings[str(folder)])
        except (OSError, KeyError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            why = f" has no {error}" if isinstance(error, KeyError) else f": {' '.join(str(error).split())}"
            gaps.append(f"damaged: {shown(folder / NAME)}{why}")
            continue
        if run is None:
            notes.append(f"left out: {shown(folder)} has no accuracy on test images")
        elif run.seed not in seeds and run.learned:
            notes.append(f"left out: {shown(folder)} has seed {run.seed}, which is not among --seeds")
        else:
            found.append(run)
            if run.collapsed:
                notes.append(f"collapsed: the training of {shown(folder)}")
    runs = pd.DataFrame(found, columns=list(Run._fields))
    same = [list(map(shown, group.folder)) for _, group in runs.groupby(IDENTITY, sort=False) if len(group) > 1]
    if same:
        raise UserError(*(f"the same run {len(f)} times: {', '.join(f)}; name the folder of one" for f in same))
    for _, group in runs.groupby(CELL, sort=False):
        first, *others = group.folder
        for other in others:
            a, b = settings[first], settings[other]
            keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
            keys = [key for key in keys if not key.startswith(FREE_KEYS)]
            if a and b and keys:
                what = ", ".join(f"{key} {b.get(key)}, not {a.get(key)}" for key in keys[:3])
                gaps.append(f"mixed: {shown(other)} has {what} as {shown(first)} has")
    return runs, seeds, gaps, notes


# ------------------------------------------------------------------------------------------------- tables


class Table(NamedTuple):
    """Sections (data sets, or parts of Table 4) of rows (methods, or settings).

    Attributes:
        heads: what sections and rows are.
        cells: a line for every section, row and column, in display order, those without runs too: mean, std, n, seeds,
            published, difference, best, and text and versus as displayed.
    """

    kind: str
    title: str
    heads: tuple[str, str]
    cells: pd.DataFrame
    notes: list[str]


@dataclass
class Report:
    """All tables of some runs; gaps make it incomplete, notes do not."""

    runs: pd.DataFrame
    seeds: Sequence[int]
    gaps: list[str]
    notes: list[str]
    tables: list[Table] = field(default_factory=list)


def make_report(roots: Sequence[Path], seeds: Sequence[int]) -> Report:
    """Read all runs below ``roots`` and make a table of every setting. Raises UserError."""
    report = Report(*read_runs(roots, seeds))
    runs = report.runs.assign(
        order=report.runs.kind.map(list(TITLES).index),
        source=report.runs.scope.where(report.runs.kind != "ablation", ""),
        less=-report.runs.shots.where(report.runs.kind != "few_shot", 0),  # there they are the columns
    )
    for (_, source, less), group in runs.groupby(["order", "source", "less"]):
        group = with_rows(group)
        if group.kind.iloc[0] != "ablation":
            report.tables.append(setting_table(group, source, -less, report))
        else:
            report.tables += [ablation_table(part, report) for _, part in group.groupby(["dataset", "row"])]
    return report


def with_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Add ``row``: the method, with config and backbone if there are several of them.

    Configs that differ in epochs alone (``_ep50``) are one row, as CoOp's schedule depends on shots and data set,
    unless a data set has several of them.
    """
    runs = runs.assign(family=runs.config.str.replace(r"_ep\d+", "", regex=True))
    keys = ["method", "backbone", "family"]
    runs["several"] = runs.groupby([*keys, "dataset", "shots"]).config.transform("nunique") > 1
    runs["family"] = runs.config.where(runs.groupby(keys).several.transform("any"), runs.family)
    runs["row"] = [f"{r.method} ({', '.join(filter(None, [r.family, r.backbone]))})" for r in runs.itertuples()]
    return runs.assign(row=runs.row.where(runs.groupby("method").row.transform("nunique") > 1, runs.method))


def shots_text(n: int) -> str:
    return "1 shot" if n == 1 else f"{n} shots"


def setting_table(runs: pd.DataFrame, scope: str, shots: int, report: Report) -> Table:
    """Methods by data sets, with their average on top; ``shots`` is 0 if they are the columns."""
    kind = runs.kind.iloc[0]
    title = TITLES[kind] + (f" from {scope}" if scope else "") + (f", {shots_text(shots)}" if shots else "")
    shots_of = {shots_text(n): n for n in sorted(runs.shots.unique())}
    columns = {"base2new": ["base", "new"], "few_shot": list(shots_of)}.get(kind, ["accuracy"])
    column = {"base2new": runs.subset, "few_shot": runs.shots.map(shots_text)}.get(kind, "accuracy")
    values = runs.assign(section=runs.dataset, column=column)
    values = values.pivot(index=["section", "row", "seed"], columns="column", values="accuracy")
    values = values.reindex(columns=columns)
    info = runs.groupby("row").agg({"method": "first", "backbone": "first", "learned": "any"})
    if kind == "few_shot":  # an untrained method has the same accuracy with all shots
        untrained = ~values.index.get_level_values("row").map(info.learned).to_numpy(bool)
        values[untrained] = values[untrained].ffill(axis=1).bfill(axis=1)

    # Methods in the paper's order, then others, then LoGoPrompt; the source of a transfer, whose runs are in the folder
    # of its name, before other data sets.
    known = {name: i for i, name in enumerate([*PAPER_METHODS, *PAPER_DATASETS])}
    rows = sorted(info.index, key=lambda r: (r.startswith("LoGoPrompt"), known.get(info.method[r], len(known)), r))
    source = set(runs.dataset[runs.folder.str.contains(f"/from_{scope}/{scope}/", regex=False)] if scope else ())
    datasets = sorted(runs.dataset.unique(), key=lambda d: (d not in source, known.get(d, len(known)), d))
    report.gaps += missing_runs(values, list(product(datasets, rows)), info.learned, title, report.seeds)
    averaged = [d for d in datasets if kind != "cross_dataset" or d not in source]
    averaged = [d for d in averaged if d in known] or averaged
    members = {dataset: [dataset] for dataset in datasets}
    if len(averaged) > 1:
        average = f"Average of {len(averaged)} data sets"
        groups = values.loc[averaged].groupby(level=["row", "seed"])
        means = groups.mean().where(groups.count() == len(averaged))  # of the seeds that all data sets have
        values = pd.concat([pd.concat({average: means}, names=["section"]), values])
        members = {average: averaged, **members}
    if kind == "base2new":
        values["H"] = H(values.base, values.new)

    cells = summarize(values, list(product(members, rows)), info.learned, report.seeds)
    backbone, notes = PAPER.get(kind, {}).get("backbone", ""), list(filter(None, [ABOUT.get(kind)]))
    same = {row for row in rows if same_backbone(info.backbone[row], backbone)}
    others = sorted(set(info.backbone.drop(same)))
    if backbone and others:
        notes.append(f"No comparison for {', '.join(others)}: the paper's backbone is {backbone}.")
    published = [
        published_value(kind, info.method[row], members[section], column if shots else "accuracy")
        if row in same and shots_of.get(column, shots) == PAPER_SHOTS and scope in ("", "imagenet")
        else np.nan
        for section, row, column in cells.index
    ]
    return Table(kind, title, ("data set", "method"), compare(cells, published), notes)


def ablation_table(runs: pd.DataFrame, report: Report) -> Table:
    """Parts of Table 4 and their settings, for one method, data set, config and number of shots."""
    first, paper = runs.iloc[0], PAPER["ablation"]
    spec = pd.DataFrame(paper["settings"], columns=["section", "row", "scope", "published"])
    if "4c_16" not in set(runs.scope) and not first.family.endswith("ctxv1"):
        spec = spec.replace({"scope": {"4c_16": "shipped"}})  # without initial words M is 16
    others = sorted(set(runs.scope) - set(spec.scope))
    spec = pd.concat([spec, pd.DataFrame({"section": "others", "row": others, "scope": others})])
    values = spec.merge(runs[["scope", "seed", "accuracy"]]).set_index(["section", "row", "seed"])[["accuracy"]]
    where = first.row if first.row != first.method else f"{first.method} ({first.backbone})"
    title = f"{TITLES['ablation']}, {where} on {first.dataset}, {shots_text(first.shots)}"
    lines, learned = list(zip(spec.section, spec.row)), pd.Series(True, spec.row.unique())
    report.gaps += missing_runs(values, lines, learned, title, report.seeds)
    cells = summarize(values, lines, learned, report.seeds)
    comparable = (first.method, first.dataset, first.shots) == ("LoGoPrompt", paper["dataset"], PAPER_SHOTS)
    comparable = comparable and same_backbone(first.backbone, paper["backbone"])
    note = f"No comparison: the paper's ablations are on ImageNet with RN50 and {PAPER_SHOTS} shots."
    cells = compare(cells, list(spec.published) if comparable else np.nan)
    return Table("ablation", title, ("part", "setting"), cells, [] if comparable else [note])


def missing_runs(
    values: pd.DataFrame, lines: Sequence[tuple[str, str]], learned: pd.Series, title: str, seeds: Sequence[int]
) -> list[str]:
    """A message for every (section, row) of ``lines`` without all seeds and columns; untrained rows need one seed."""
    every_seed = sorted({*seeds, *values.index.unique("seed")})
    full = values.reindex([(*line, seed) for line in lines for seed in every_seed])
    untrained = ~full.index.get_level_values("row").map(learned).to_numpy(bool)
    full[untrained] = full.groupby(level=["section", "row"]).transform("first")[untrained]
    messages: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for (section, row, seed), present in full.notna().iterrows():
        if seed in seeds and not present.all():
            what = ", " + " and ".join(present.index[~present]) if present.any() else ""
            messages[section, row, what].append(str(seed))
    return [
        f"missing: {title.split(': ')[-1]}: {row} on {section}{what}"
        + f" with seed {', '.join(of)}" * bool(learned[row])
        for (section, row, what), of in messages.items()
    ]


def summarize(
    values: pd.DataFrame, lines: Sequence[tuple[str, str]], learned: pd.Series, seeds: Sequence[int]
) -> pd.DataFrame:
    """Accuracies by (section, row, seed) and column -> mean, std, n, seeds by (section, row, column)."""
    keys = ["section", "row", "column"]
    long = values.melt(ignore_index=False, var_name="column", value_name="value").dropna().reset_index()
    long = long.sort_values("seed", kind="stable").assign(text=long.seed.astype(str))
    stats = {"mean": ("value", "mean"), "std": ("value", "std"), "n": ("value", "size"), "seeds": ("text", " ".join)}
    cells = long.groupby(keys).agg(**stats).reindex([(*line, column) for line in lines for column in values.columns])
    if "H" in values:  # of the means, not the mean of the seeds' H
        halves = values.dropna().groupby(level=["section", "row"]).mean()
        cells.loc[[(*line, "H") for line in halves.index], "mean"] = H(halves.base, halves.new)
    cells["few"] = cells.index.get_level_values("row").map(learned).to_numpy(bool) & (cells.n < len(seeds))
    return cells.rename_axis(index=keys)


def compare(cells: pd.DataFrame, published: Any) -> pd.DataFrame:
    """Add the published values, the best of every section and column, and the texts."""
    cells = cells.assign(published=published)
    cells["published"] = cells.published.where(cells["mean"].notna())
    cells["difference"] = cells["mean"] - cells.published
    rounded = cells["mean"].round(2)
    groups = rounded.groupby(level=["section", "column"])
    cells["best"] = (groups.transform("count") > 1) & (rounded == groups.transform("max"))
    n, difference = cells.n.where(cells.few), cells.difference.round(2) + 0.0  # never -0.00
    cells["text"] = text(cells["mean"], "{:.2f}") + text(cells["std"], " ± {:.2f}") + text(n, " (n={:.0f})")
    cells["versus"] = text(cells.published, "{:.2f} ") + text(difference, "({:+.2f})").str.replace("-", "\u2212")
    return cells.reset_index()


def text(values: pd.Series, form: str) -> pd.Series:
    """Formatted numbers; NaN is empty."""
    return pd.Series(["" if np.isnan(value) else form.format(value) for value in values], values.index, dtype=object)
