"""Finished runs as one DataFrame, and the paper's tables made of it: what tools/report.py renders."""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
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
PAPER_SHOTS = "16 shots"
PAPER = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
PUBLISHED = {  # kind -> data sets and "average" by (method, column)
    kind: pd.DataFrame(
        {dataset: list(map(float, line.split())) for dataset, line in table["rows"].items()},
        pd.MultiIndex.from_product([table["methods"], table.get("columns", ["accuracy"])]),
    ).T
    for kind, table in PAPER.items()
    if "rows" in table
}
# Of Table 4: part, setting, its folder by scripts/logo/ablation.sh, printed value.
SETTINGS = [(part, row, *rest) for part, rows in PAPER["ablation"].items() for row, rest in rows.items()]
METHODS = dict.fromkeys(method for table in PUBLISHED.values() for method, _ in table.columns)
DATASETS = dict.fromkeys(name for table in PUBLISHED.values() for name in table.index.drop("average"))
PLACES = {name: i for i, name in enumerate([*METHODS, *DATASETS])}  # the paper's order


def same_backbone(name: str, paper: str) -> bool:
    """Whether ``MODEL.BACKBONE.NAME`` (a name, OpenAI's archive or open_clip's arch/tag) is the paper's backbone."""
    name = name.lower().removesuffix("/openai")
    name = Path(name).stem if name.endswith(".pt") else name
    return name.replace("/", "-") == paper.lower().replace("/", "-")


def published_value(kind: str, method: str, datasets: Sequence[str], column: str) -> float:
    """What the paper prints for a trainer on a data set or as the average of several; NaN where it prints nothing."""
    table = PUBLISHED.get(kind, pd.DataFrame()).get(method)  # data sets by columns
    if table is None:
        return np.nan
    if column == "H" and len(datasets) > 1:
        return round(harmonic_mean(*(published_value(kind, method, datasets, half) for half in ("base", "new"))), 2)
    printed = table[column].dropna()
    whole = set(datasets) == set(printed.index) - {"average"}  # else the average of some is computed
    return printed["average"] if whole else printed.reindex(datasets).mean(skipna=False)


class Run(NamedTuple):
    folder: str
    kind: str  # of TITLES
    scope: str  # the source of a transfer, the setting of an ablation, else empty
    method: str  # the trainer, with "+Adapter" or, for VP, "+TP" (text prompt) if it is on
    backbone: str
    config: str  # file in configs/trainers/<trainer>, without .yaml; empty if the folder is not named seed<N>
    dataset: str  # DATASET.NAME
    shots: int
    seed: int
    subset: str  # all, base or new
    accuracy: float  # in per cent
    collapsed: bool
    learned: bool  # False: nothing was trained, the accuracy depends on neither seed nor shots
    settings: dict  # config.yaml by dotted key, empty without that file


INDEX = ["section", "row", "seed"]
IDENTITY = list(Run._fields[1:10])  # two runs that agree in these are the same run


def find_runs(roots: Sequence[Path]) -> list[Path]:
    """Folders of finished and unfinished runs below ``roots``, each once. Raises UserError."""
    found, seen = [], set()
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        for name, folders, files in os.walk(root, followlinks=True):
            new = (real := os.path.realpath(name)) not in seen  # else named twice, or a link back
            folders[:] = sorted(folders) if new else []
            if new and any(entry.startswith((NAME, *RUN_MARKS)) for entry in (*files, *folders)):
                found.append(Path(name))
            seen.add(real)
    return found


def kind_and_scope(folder: Path, subset: str) -> tuple[str, str]:
    """Setting of a run, from its subset of classes and the innermost folder named by our scripts; else few-shot."""
    if subset != "all":
        return "base2new", ""
    named = r"/(ablation|few_shot|domain_generalization(?=/from_)|cross_dataset(?=/from_))(?=/(?:from_)?([^/]+))"
    kind, scope = (re.findall(named, folder.as_posix()) or [("few_shot", "")])[-1]
    return kind, "" if kind == "few_shot" else scope


def read_run(folder: Path) -> Optional[Run]:
    """A finished run; None if it was not tested. Raises ValueError, KeyError, TypeError."""
    settings, folder = {}, folder.resolve()
    if (file := folder / "config.yaml").exists():
        text = file.read_text(encoding="utf-8")
        # libyaml crashes on deeply nested text; a config takes 3,000 characters
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if len(text) < 20_000 else yaml.SafeLoader
        content = yaml.load(text, Loader=loader)
        if not content or not isinstance(content, dict):
            raise ValueError("config.yaml holds no keys")
        settings = pd.json_normalize(content, sep=".").iloc[0].to_dict()
    results = read_results(str(folder))
    run, metrics = results["run"], results["metrics"]
    if not metrics or results["split"] == "val":
        return None
    accuracy = metrics["accuracy"]
    if type(accuracy) not in (int, float) or not 0 <= accuracy <= 100:
        raise ValueError(f"accuracy {accuracy}")
    kinds = {"trainer": str, "dataset": str, "backbone": str, "shots": int, "seed": int, "subsample_classes": str}
    trainer, dataset, backbone, shots, seed, subset = (run[key] for key in kinds)
    for key, kind in kinds.items():
        if type(run[key]) is not kind or (key == "subsample_classes" and subset not in ("all", "base", "new")):
            raise ValueError(f"{key} {run[key]!r}")
    method = trainer + "+Adapter" * bool(settings.get(f"TRAINER.{trainer.upper()}.ADAPTER"))
    method += "+TP" * (settings.get("TRAINER.VP.TEXT_PROMPT") == "learned" and trainer == "VP")
    config = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else ""
    place, learned = kind_and_scope(folder, subset), bool(run.get("trained") or run.get("model_dir"))
    about = (method, backbone, config, dataset, shots, seed, subset, float(accuracy), bool(run.get("collapsed")))
    return Run(str(folder), *place, *about, learned, settings)


def read_runs(roots: Sequence[Path], seeds: Sequence[int]) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Runs, a row each; what makes the report incomplete; notes. UserError for a missing folder or a run in two."""
    folders, notes, found = find_runs(roots), [], []
    gaps = [f"unfinished: {folder} has no {NAME}" for folder in folders if not (folder / NAME).exists()]
    for folder in filter(lambda folder: (folder / NAME).exists(), folders):
        try:
            run = read_run(folder)
        except (OSError, KeyError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            why = f" has no {error}" if isinstance(error, KeyError) else f": {' '.join(str(error).split())}"
            gaps.append(f"damaged: {folder / NAME}{why}")
            continue
        if run is None:
            notes.append(f"left out: {folder} has no accuracy on test images")
        elif run.seed not in seeds and run.learned:
            notes.append(f"left out: {folder} has seed {run.seed}, which is not among --seeds")
        else:
            found.append(run)
            notes += [f"collapsed: the training of {folder}"] * run.collapsed
    runs = pd.DataFrame(found, columns=list(Run._fields))
    if same := [list(group.folder) for _, group in runs.groupby(IDENTITY, sort=False) if len(group) > 1]:
        raise UserError(*(f"the same run {len(f)} times: {', '.join(f)}; name the folder of one" for f in same))
    for _, group in runs.groupby([name for name in IDENTITY if name != "seed"], sort=False):
        first, a = group.folder.iloc[0], group.settings.iloc[0]
        for folder, b in zip(group.folder, group.settings):
            keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and not k.startswith(FREE_KEYS)]
            if a and b and keys:
                what = ", ".join(f"{key} {b.get(key)}, not {a.get(key)}" for key in keys[:3])
                gaps.append(f"mixed: {folder} has {what} as {first} has")
    return runs.drop(columns="settings"), gaps, notes


class Table(NamedTuple):
    """Sections (data sets, or parts of Table 4) of rows (methods, or settings)."""

    kind: str
    title: str
    heads: tuple[str, str]  # what sections and rows are
    cells: pd.DataFrame  # section, row, column, mean, std, n, seeds, published, difference, best, text, versus
    notes: list[str]


class Report(NamedTuple):
    runs: pd.DataFrame
    gaps: list[str]  # what makes it incomplete
    notes: list[str]
    seeds: Sequence[int]
    tables: list[Table]


def make_report(roots: Sequence[Path], seeds: Sequence[int]) -> Report:
    """Read all runs below ``roots`` and make a table of every setting. Raises UserError."""
    report = Report(*read_runs(roots, seeds), seeds, [])
    runs = report.runs.assign(
        order=report.runs.kind.map(list(TITLES).index),
        source=report.runs.scope.where(report.runs.kind != "ablation", ""),
        less=-report.runs.shots.where(report.runs.kind != "few_shot", 0),  # there they are the columns
        shots_text=[f"{n} shot{'s' * (n > 1)}" if n > 0 else "all images" for n in report.runs.shots],
    )
    runs["column"] = runs.shots_text.where(runs.kind == "few_shot", "accuracy")
    runs["column"] = runs.subset.where(runs.kind == "base2new", runs.column)
    for (order, *_), group in runs.groupby(["order", "source", "less"]):
        group = with_rows(group)
        if order < list(TITLES).index("ablation"):
            report.tables.append(setting_table(group, report))
        else:
            report.tables.extend(ablation_table(part, report) for _, part in group.groupby(["dataset", "row"]))
    return report


def with_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Add ``row``: the method, with config and backbone if there are several of them."""
    # Configs that differ in epochs alone (_ep50, CoOp's schedule) are one row unless a data set has several of them.
    runs = runs.assign(family=runs.config.str.replace(r"_ep\d+", "", regex=True))
    keys = ["method", "backbone", "family"]
    runs["several"] = runs.groupby([*keys, "dataset", "shots"]).config.transform("nunique") > 1
    runs["family"] = runs.config.where(runs.groupby(keys).several.transform("any"), runs.family)
    runs["row"] = [f"{r.method} ({', '.join(filter(None, [r.family, r.backbone]))})" for r in runs.itertuples()]
    return runs.assign(row=runs.row.where(runs.groupby("method").row.transform("nunique") > 1, runs.method))


def setting_table(runs: pd.DataFrame, report: Report) -> Table:
    """Methods by data sets, with their average on top; the columns of few-shot runs are the numbers of shots."""
    kind, scope, shots = runs.iloc[0][["kind", "scope", "shots_text"]]
    title = TITLES[kind] + f" from {scope}" * bool(scope) + f", {shots}" * (kind != "few_shot")
    columns = ["base", "new"] if kind == "base2new" else runs.sort_values("shots").column.unique()
    values = runs.assign(section=runs.dataset).pivot(index=INDEX, columns="column", values="accuracy")
    values = values.reindex(columns=columns)
    info = runs.groupby("row").agg({"method": "first", "backbone": "first", "learned": "any"})
    if kind == "few_shot":  # an untrained method has the same accuracy with all shots
        untrained = ~values.index.get_level_values("row").map(info.learned).to_numpy(bool)
        values[untrained] = values[untrained].ffill(axis=1).bfill(axis=1)
    # Methods in the paper's order, then others, then LoGoPrompt; the source of a transfer before other data sets.
    last = len(PLACES)
    rows = sorted(info.index, key=lambda r: (r.startswith("LoGoPrompt"), PLACES.get(info.method[r], last), r))
    source = set(runs.dataset[runs.folder.str.contains(f"/from_{scope}/{scope}/", regex=False)] if scope else ())
    datasets = sorted(runs.dataset.unique(), key=lambda d: (d not in source, PLACES.get(d, last), d))
    averaged = [d for d in datasets if kind != "cross_dataset" or d not in source]
    averaged = [d for d in averaged if d in PLACES] or averaged
    members = {dataset: [dataset] for dataset in datasets}
    if len(averaged) > 1:
        members = {f"Average of {len(averaged)} data sets": averaged, **members}
        groups = values.loc[averaged].groupby(level=["row", "seed"])
        means = groups.mean().where(groups.count() == len(averaged))  # of the seeds that all data sets have
        values = pd.concat([pd.concat({next(iter(members)): means}, names=["section"]), values])
    if kind == "base2new":
        values["H"] = H(values.base, values.new)
    backbone, notes = PAPER.get(kind, {}).get("backbone", ""), [ABOUT[kind]] if kind in ABOUT else []
    same = {row for row in rows if same_backbone(info.backbone[row], backbone)}
    if (others := sorted(set(info.backbone.drop(same)))) and backbone:
        notes.append(f"No comparison for {', '.join(others)}: the paper's backbone is {backbone}.")
    lines = list(product(members, rows))
    published = [
        published_value(kind, info.method[row], members[section], column if kind == "base2new" else "accuracy")
        if row in same and PAPER_SHOTS in (column, shots * (kind != "few_shot")) and scope in ("", "imagenet")
        else np.nan
        for (section, row), column in product(lines, values.columns)
    ]
    cells = make_cells(values, lines, info.learned, published, title, report)
    return Table(kind, title, ("data set", "method"), cells, notes)


def ablation_table(runs: pd.DataFrame, report: Report) -> Table:
    """Parts of Table 4 and their settings, for one method, data set, config and number of shots."""
    first, spec = runs.iloc[0], pd.DataFrame(SETTINGS, columns=["section", "row", "scope", "published"])
    if "4c_16" not in set(runs.scope) and not first.family.endswith("ctxv1"):
        spec = spec.replace({"scope": {"4c_16": "shipped"}})  # without initial words M is 16
    others = sorted(set(runs.scope) - set(spec.scope))
    spec = pd.concat([spec, pd.DataFrame({"section": "others", "row": others, "scope": others})])
    values = spec.merge(runs[["scope", "seed", "accuracy"]]).set_index(INDEX)[["accuracy"]]
    where = first.row if first.row != first.method else f"{first.method} ({first.backbone})"
    title = f"{TITLES['ablation']}, {where} on {first.dataset}, {first.shots_text}"
    lines, learned = list(zip(spec.section, spec.row)), pd.Series(True, spec.row.unique())
    comparable = (first.method, first.dataset, first.shots_text) == ("LoGoPrompt", "ImageNet", PAPER_SHOTS)
    comparable &= same_backbone(first.backbone, "RN50")
    note = f"No comparison: the paper's ablations are on ImageNet with RN50 and {PAPER_SHOTS}."
    cells = make_cells(values, lines, learned, list(spec.published) if comparable else np.nan, title, report)
    return Table("ablation", title, ("part", "setting"), cells, [] if comparable else [note])


def make_cells(values: pd.DataFrame, rows: list, learned: pd.Series, published: Any, title: str, report: Report):
    """``Table.cells`` of accuracies by (section, row, seed) and column; adds to the gaps what lacks seeds."""
    # rows: (section, row) in display order, with or without runs; one that is not learned needs one seed.
    keys = ["section", "row", "column"]
    long = values.melt(ignore_index=False, var_name="column", value_name="value").dropna().reset_index()
    long = long.sort_values("seed", kind="stable").assign(text=long.seed.astype(str))
    stats = {"mean": ("value", "mean"), "std": ("value", "std"), "n": ("value", "size"), "seeds": ("text", " ".join)}
    index = pd.MultiIndex.from_tuples([(*line, column) for line in rows for column in values], names=keys)
    cells = long.groupby(keys).agg(**stats).reindex(index)
    if "H" in values:  # of the means, not the mean of the seeds' H
        halves = values.dropna().groupby(level=["section", "row"]).mean()
        cells.loc[[(*line, "H") for line in halves.index], "mean"] = H(halves.base, halves.new)
    cells["published"] = pd.Series(published, cells.index, dtype=float).where(cells["mean"].notna())
    cells["difference"] = cells["mean"] - cells.published
    groups = (rounded := cells["mean"].round(2)).groupby(level=["section", "column"])
    cells["best"] = (groups.transform("count") > 1) & (rounded == groups.transform("max"))
    few = cells.index.get_level_values("row").map(learned).to_numpy(bool) & (cells.n < len(report.seeds))
    difference = cells.difference.round(2) + 0.0  # never -0.00
    cells["text"] = text(cells["mean"], "{:.2f}") + text(cells["std"], " ± {:.2f}")
    cells["text"] += text(cells.n.where(few), " (n={:.0f})")
    cells["versus"] = text(cells.published, "{:.2f} ") + text(difference, "({:+.2f})").str.replace("-", "\u2212")
    cells = cells.reset_index()
    gaps: dict[tuple[str, str, str], list[str]] = defaultdict(list)  # section, row, seeds -> columns
    for section, row, column, have in zip(cells.section, cells.row, cells.column, cells.seeds.fillna("")):
        lack = [str(seed) for seed in report.seeds if learned[row] and str(seed) not in have.split()]
        if (lack or not have) and column != "H" and not section.startswith("Average of "):
            gaps[section, row, ", ".join(lack)].append(column)
    for (section, row, lack), columns in gaps.items():
        which = f", {' and '.join(columns)}" * (len(columns) < len(set(values) - {"H"}))
        which += f" with seed {lack}" * bool(lack)
        report.gaps.append(f"missing: {title.split(': ')[-1]}: {row} on {section}{which}")
    return cells


def text(values: pd.Series, form: str) -> pd.Series:
    return values.map(form.format).where(values.notna(), "")
