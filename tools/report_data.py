"""Finished runs as one DataFrame, and the paper's tables made of it: what tools/report.py renders."""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import pandas as pd
import yaml

# Not `from trainers.prompting`: the package imports torch, which takes longer than a whole report.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trainers"))

from prompting.errors import UserError
from prompting.results import NAME, harmonic_mean, read_results, replacing, selection_prospect  # noqa: F401 (for report.py)

ROOT = Path(__file__).resolve().parents[1]
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
# Config keys that make no row of their own: they do not change what is trained, or are shown otherwise.
FREE_KEYS = ("SEED", "OUTPUT_DIR", "RESUME", "VERBOSE", "USE_CUDA", "MODEL.BACKBONE.NAME", "MODEL.BACKBONE.WEIGHTS")
FREE_KEYS += ("TRAIN.CHECKPOINT_FREQ", "TRAIN.PRINT_FREQ", "TRAIN.TEXT_CHUNK", "TRAIN.COMPILE", "TRAIN.DECODED_GB")
FREE_KEYS += ("TEST.FEATURES", "TEST.NO_TEST", "TEST.SPLIT", "TEST.PER_CLASS_RESULT", "TEST.COMPUTE_CMAT")
FREE_KEYS += ("DATALOADER.NUM_WORKERS", "DATASET.NAME", "DATASET.TITLE", "DATASET.ROOT", "DATASET.NUM_SHOTS")
FREE_KEYS += ("DATASET.SUBSAMPLE_CLASSES", "OPTIM.MAX_EPOCH")
PATH = r"(?:local-dir:|~|/|\.{1,2}/).*|.*\.(?:pt|pth|bin|safetensors)"  # a backbone in a file or folder
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
    backbone: str  # of weights in a file its name
    config: str  # file in configs/trainers/<trainer>, without .yaml; empty if not known
    dataset: str  # DATASET.NAME; of an own folder DATASET.TITLE, else the name of the data root
    shots: int
    seed: int
    subset: str  # all, base or new
    accuracy: float  # in per cent
    epochs: int
    trained_on: str  # data set of the training, if it is another one
    overrides: dict  # KEY VALUE pairs of the command; empty for runs that did not record them
    seconds: Optional[float]
    commit: Optional[str]
    rise_true: float  # mean rise of the log-odds of the true class by its block; NaN without selection
    rise_wrong: float  # the same of the most probable wrong class
    warnings: list  # why the accuracy may not mean what it seems to
    learned: bool  # False: nothing was trained, the accuracy depends on neither seed nor shots
    model_dir: str  # run whose model was evaluated; empty if it is this one's
    settings: dict  # config.yaml of the training by dotted key, empty without that file


INDEX = ["section", "row", "seed"]
CELL = ["method", "dataset", "scope", "shots", "subset"]  # runs that agree in these would share a cell
ABOUT_ROWS = ["config", "backbone", "epochs", "trained on", "overrides", "run"]  # what tells rows of a method apart


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


@cache
def read_settings(folder: Path) -> dict:
    """``config.yaml`` of a run by dotted key, empty without that file. Raises ValueError."""
    if not (file := folder / "config.yaml").exists():
        return {}
    text = file.read_text(encoding="utf-8")
    # libyaml crashes on deeply nested text; a config takes 3,000 characters
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if len(text) < 20_000 else yaml.SafeLoader
    content = yaml.load(text, Loader=loader)
    if not content or not isinstance(content, dict):
        raise ValueError("config.yaml holds no keys")
    return pd.json_normalize(content, sep=".").iloc[0].to_dict()


def data_name(dataset: str, settings: dict) -> str:
    """A data set's name; of an own folder its title, or the data root with a slash in front."""
    root = str(settings.get("DATASET.ROOT", "")).strip("/")
    return (settings.get("DATASET.TITLE") or (root and f"/{root}") or dataset) if dataset == "Folder" else dataset


def short_names(names: pd.Series, paths: pd.Series) -> pd.Series:
    """Paths by their last part, or as many as tell them from others; other names as they are."""
    short = names
    for n in range(9, 0, -1):
        tails = names.where(~paths, names.str.split("/").str[-n:].str.join("/"))
        short = tails.where(names.groupby(tails).transform("nunique") == 1, short)
    return short


def read_run(folder: Path) -> Optional[Run]:
    """A finished run; None if it was not tested. Raises ValueError, KeyError, TypeError."""
    folder = folder.resolve()
    own, results = read_settings(folder), read_results(str(folder))
    run, metrics, observed = results["run"], results["metrics"], results.get("observed", {})
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
    model, settings = run.get("model_dir") or "", own
    if model:  # relative to where it ran, mostly the repository
        model = str(next(filter(Path.is_dir, (Path(model), ROOT / model)), Path(model)).resolve())
        settings = read_settings(Path(model)) or own
    method = trainer + "+Adapter" * bool(settings.get(f"TRAINER.{trainer.upper()}.ADAPTER"))
    method += "+TP" * (settings.get("TRAINER.VP.TEXT_PROMPT") == "learned" and trainer == "VP")
    config = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else Path(run.get("config_file") or "").stem
    (kind, scope), learned = kind_and_scope(folder, subset), bool(run.get("trained") or model)
    data, source = data_name(dataset, own), data_name(settings.get("DATASET.NAME", dataset), settings)
    half = settings.get("DATASET.SUBSAMPLE_CLASSES", "all")
    other = [Path(source).name] * (source != data) + [f"{half} classes"] * (half != "all" == subset)
    trained_on = ", ".join(other) if learned and not scope else ""
    warnings = [*results.get("warnings", ()), *["training collapsed"] * bool(run.get("collapsed"))]
    rises = (observed.get(f"log_odds_rise_{which}", np.nan) for which in ("true", "wrong"))
    about = (method, backbone, config, data, shots, seed, subset, float(accuracy), int(run.get("epochs") or 0))
    about += (trained_on, run.get("overrides", {}), run.get("seconds"), run.get("commit"), *rises)
    about += (warnings, learned, model)
    return Run(str(folder), kind, scope, *about, settings)


def read_runs(roots: Sequence[Path], seeds: Sequence[int]) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Runs, a row each; what makes the report incomplete; notes. UserError for a missing folder."""
    folders, notes, found = find_runs(roots), [], []
    gaps = [f"unfinished: {folder} has no {NAME}" for folder in folders if not (folder / NAME).exists()]
    for folder in filter(lambda folder: (folder / NAME).exists(), folders):
        try:
            run = read_run(folder)
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
            why = f" has no {error}" if isinstance(error, KeyError) else f": {' '.join(str(error).split())}"
            gaps.append(f"damaged: {folder / NAME}{why}")
            continue
        if run is None:
            notes.append(f"left out: {folder} has no accuracy on test images")
        elif seeds and run.seed not in seeds and run.learned:
            notes.append(f"left out: {folder} has seed {run.seed}, which is not among --seeds")
        else:
            found.append(run)
    runs = pd.DataFrame(found, columns=list(Run._fields))
    if found:
        runs["backbone"] = short_names(runs.backbone, runs.backbone.str.fullmatch(PATH))
        runs["dataset"] = short_names(runs.dataset, runs.dataset.str.startswith("/"))
    return runs, gaps, notes


class Table(NamedTuple):
    """Sections (data sets, or parts of Table 4) of rows (methods, or settings)."""

    kind: str
    title: str
    heads: tuple[str, str]  # what sections and rows are
    cells: pd.DataFrame  # section, row, column, mean, std, n, seeds, published, difference, best, text, versus
    about: pd.DataFrame  # of every row: name, and as ABOUT_ROWS what tells it from others of that name
    notes: list[str]


class Report(NamedTuple):
    runs: pd.DataFrame
    gaps: list[str]  # what makes it incomplete
    notes: list[str]
    seeds: Sequence[int]  # that every cell must have; empty: those of the runs in its row
    tables: list[Table]


def make_report(roots: Sequence[Path], seeds: Sequence[int]) -> Report:
    """Read all runs below ``roots`` and make a table of every setting. Raises UserError."""
    report = Report(*read_runs(roots, seeds), seeds, [])
    runs = report.runs.assign(
        order=report.runs.kind.map(list(TITLES).index),
        source=report.runs.scope.where(report.runs.kind != "ablation", ""),
        shots_text=[f"{n} shot{'s' * (n > 1)}" if n > 0 else "all images" for n in report.runs.shots],
    ).sort_values("model_dir", kind="stable")
    several = runs.groupby(["kind", "dataset"]).shots.transform("nunique") > 1
    runs["less"] = -runs.shots.where((runs.kind != "few_shot") | ~several, 0)  # else they are the columns
    runs["column"] = runs.shots_text.where(runs.kind == "few_shot", "accuracy")
    runs["column"] = runs.subset.where(runs.kind == "base2new", runs.column)
    for (order, *_), group in runs.groupby(["order", "source", "less"]):
        group = with_rows(group, report)
        if order < list(TITLES).index("ablation"):
            report.tables.append(setting_table(group, report))
        else:
            report.tables.extend(ablation_table(part, report) for _, part in group.groupby(["dataset", "row"]))
    return report


def with_rows(runs: pd.DataFrame, report: Report) -> pd.DataFrame:
    """Runs of a table, each once, with ``ABOUT_ROWS`` (empty where they tell nothing apart) and their ``row``."""
    settings = pd.DataFrame([s if learned else {} for s, learned in zip(runs.settings, runs.learned)], runs.index)
    settings = settings.astype(str).where(settings.notna())
    settings = settings.loc[:, ~settings.columns.astype(str).str.startswith(FREE_KEYS) & (settings.nunique() > 1)]
    settings = settings.fillna(settings.mode().head(1).squeeze())  # a key of another version is no difference
    asked = {key for overrides in runs.overrides for key in overrides}
    keys = sorted(settings, key=lambda key: (key not in asked, key))
    # Configs that differ in epochs alone (_ep50, CoOp's schedule) are one row unless a data set has several of them.
    config = runs.config.where(runs.config != "")  # not known is no difference
    family = config.str.replace(r"_ep\d+", "", regex=True)
    told = runs[CELL].assign(**{"trained on": runs.trained_on, "backbone": runs.backbone, "family": family})
    told = told.assign(epochs=runs.epochs.where(runs.learned, 0).astype(str), config=config).join(settings[keys])
    shown = ["trained on"]
    for name in told.columns[len(CELL) + 1 :]:
        within = ["method"] if name in ("backbone", "family") else CELL  # rows of several data sets share a backbone
        varies = told.groupby(within + shown * (name not in asked))[name].transform("nunique") > 1
        told[name] = told[name].where(varies.groupby(told.method).transform("any"), "").fillna("")
        shown.append(name)
    told["config"] = told.config.where(told.config != "", told.family)
    for key in keys:  # the usual value is not mentioned
        usual = told.groupby(["method", key])[key].transform("size") * 2 > told.groupby("method")[key].transform("size")
        told[key] = told[key].where(~usual, "")
    short = {key: key.split(".", 2)[-1] if key.startswith("TRAINER.") else key for key in keys}
    told["overrides"] = [", ".join(f"{short[k]} {t[k]}" for k in keys if t[k]) for t in told.to_dict("records")]
    named = {"backbone_of_run": runs.backbone, "epochs_of_run": runs.epochs.where(runs.learned, "").astype(str)}
    runs = runs.assign(**named, family=family).drop(columns=ABOUT_ROWS, errors="ignore")
    runs = runs.join(told[ABOUT_ROWS[:-1]]).assign(run="")
    same = [*CELL, *ABOUT_ROWS, "seed"]
    model = runs.model_dir.where(runs.model_dir != "", runs.folder)
    for name in (model, runs.folder):  # other accuracies for no recorded reason
        for _, group in runs.groupby(same):
            names, other = name[group.index], group.accuracy != group.accuracy.iloc[0]
            for folder in names[other].unique():
                runs.loc[name == folder, "run"] = os.path.relpath(folder, os.path.commonpath(list(names)))
    first = runs.groupby(same).folder.transform("first")
    again = runs[first != runs.folder]
    report.notes.extend(f"counted once: {folder} repeats {first[i]}" for i, folder in again.folder.items())
    runs = runs.drop(again.index)
    epochs = runs.epochs.where(runs.epochs == "", runs.epochs + " epochs").replace("1 epochs", "1 epoch")
    labels = runs[ABOUT_ROWS].assign(epochs=epochs, **{"trained on": ("on " + runs["trained on"]).replace("on ", "")})
    labels = [", ".join(filter(None, label)) for label in labels.itertuples(index=False)]
    return runs.assign(row=[f"{m} ({label})" if label else m for m, label in zip(runs.method, labels)])


def setting_table(runs: pd.DataFrame, report: Report) -> Table:
    """Methods by data sets, with their average on top; the columns of few-shot runs are the numbers of shots."""
    kind, scope, shots = runs.iloc[0][["kind", "scope", "shots_text"]]
    title = TITLES[kind] + f" from {scope}" * bool(scope) + f", {shots}" * (kind != "few_shot")
    columns = list(runs.sort_values(["shots", "subset"]).column.unique())
    title += f", {shots}" * (kind == "few_shot" and len(columns) == 1)
    runs = runs.assign(section=runs.dataset)
    values = runs.pivot(index=INDEX, columns="column", values="accuracy").reindex(columns=columns)
    info = runs.groupby("row").agg({"method": "first", "backbone_of_run": "first", "learned": "any"})
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
    if {"base", "new"} <= set(columns):
        values["H"] = H(values.base, values.new)
    backbone, notes = PAPER.get(kind, {}).get("backbone", ""), [ABOUT[kind]] if kind in ABOUT else []
    same = {row for row in rows if same_backbone(info.backbone_of_run[row], backbone)}
    if (others := sorted(set(info.backbone_of_run.drop(same)))) and backbone:
        notes.append(f"No comparison for {', '.join(others)}: the paper's backbone is {backbone}.")
    with_values = set(values.dropna(how="all").index.droplevel("seed"))
    lines = [line for line in product(members, rows) if line in with_values]
    published = [
        published_value(kind, info.method[row], members[section], column if kind == "base2new" else "accuracy")
        if row in same and PAPER_SHOTS in (column, shots * (kind != "few_shot")) and scope in ("", "imagenet")
        else np.nan
        for (section, row), column in product(lines, values.columns)
    ]
    cells = make_cells(values, lines, runs, published, title, report)
    about = runs.drop_duplicates("row").set_index("row").rename(columns={"method": "name"})
    for name in ("backbone", "epochs"):
        about[name] = about[f"{name}_of_run"] if about[name].any() else ""
    about = about.loc[rows, ["name", *ABOUT_ROWS]]
    return Table(kind, title, ("data set", "method"), cells, about, notes + run_notes(runs))


def ablation_table(runs: pd.DataFrame, report: Report) -> Table:
    """Parts of Table 4 and their settings, for one method, data set, config and number of shots."""
    first, spec = runs.iloc[0], pd.DataFrame(SETTINGS, columns=["section", "row", "scope", "published"])
    if "4c_16" not in set(runs.scope) and not first.family.endswith("ctxv1"):
        spec = spec.replace({"scope": {"4c_16": "shipped"}})  # without initial words M is 16
    others = sorted(set(runs.scope) - set(spec.scope))
    spec = pd.concat([spec, pd.DataFrame({"section": "others", "row": others, "scope": others})])
    where = first.row if first.row != first.method else f"{first.method} ({first.backbone_of_run})"
    runs = spec.merge(runs.drop(columns="row"))
    values = runs.set_index(INDEX)[["accuracy"]]
    title = f"{TITLES['ablation']}, {where} on {first.dataset}, {first.shots_text}"
    spec = spec[spec.scope.isin(runs.scope)]
    lines = list(zip(spec.section, spec.row))
    comparable = (first.method, first.dataset, first.shots_text) == ("LoGoPrompt", "ImageNet", PAPER_SHOTS)
    comparable &= same_backbone(first.backbone_of_run, "RN50")
    note = f"No comparison: the paper's ablations are on ImageNet with RN50 and {PAPER_SHOTS}."
    cells = make_cells(values, lines, runs, list(spec.published) if comparable else np.nan, title, report)
    about = pd.DataFrame({"name": spec.row.unique()}, spec.row.unique())
    return Table("ablation", title, ("part", "setting"), cells, about, run_notes(runs) + [note] * (not comparable))


def run_notes(runs: pd.DataFrame) -> list[str]:
    """Warnings of the runs in a table, and what their class-conditional images say about selection."""
    notes, where = [], runs.row + " on " + runs.section + ", seed " + runs.seed.astype(str)
    flagged = pd.DataFrame({"warning": runs.warnings, "where": where}).explode("warning").dropna()
    for warning, group in flagged.groupby("warning", sort=False)["where"]:
        others = f" and {len(group) - 3} more runs" * (len(group) > 3)
        notes.append(f"† {'; '.join(group[:3])}{others}: {warning}.")
    for row, group in runs.dropna(subset=["rise_true"]).groupby("row", sort=False):
        of = f"{row}, mean of {len(group)} run{'s' * (len(group) > 1)}"
        notes.append(f"{of}: {selection_prospect(group.rise_true.mean(), group.rise_wrong.mean())}")
    return notes


def make_cells(values: pd.DataFrame, rows: list, runs: pd.DataFrame, published: object, title: str, report: Report):
    """``Table.cells`` of accuracies by (section, row, seed) and column; adds to the gaps what lacks seeds."""
    # rows: (section, row) in display order; one that is not learned needs one seed.
    keys, learned = ["section", "row", "column"], runs.groupby("row").learned.any()
    seeds, own = report.seeds or set(runs.seed[runs.learned]), runs.groupby("row").seed.apply(set).map(sorted)
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
    few = cells.index.get_level_values("row").map(learned).to_numpy(bool) & (cells.n < len(seeds))
    difference = cells.difference.round(2) + 0.0  # never -0.00
    flagged = cells.index.isin(pd.MultiIndex.from_frame(runs.loc[runs.warnings.str.len() > 0, keys]))
    cells["text"] = text(cells["mean"], "{:.2f}") + np.where(flagged, "†", "") + text(cells["std"], " ± {:.2f}")
    cells["text"] += text(cells.n.where(few), " (n={:.0f})")
    cells["versus"] = text(cells.published, "{:.2f} ") + text(difference, "({:+.2f})").str.replace("-", "\u2212")
    cells = cells.reset_index()
    gaps: dict[tuple[str, str, str], list[str]] = defaultdict(list)  # section, row, seeds -> columns
    for section, row, column, have in zip(cells.section, cells.row, cells.column, cells.seeds.fillna("")):
        lack = [str(seed) for seed in report.seeds or own[row] if learned[row] and str(seed) not in have.split()]
        if (lack or not have) and column != "H" and not section.startswith("Average of "):
            gaps[section, row, ", ".join(lack)].append(column)
    for (section, row, lack), columns in gaps.items():
        which = f", {' and '.join(columns)}" * (len(columns) < len(set(values) - {"H"}))
        which += f" with seed {lack}" * bool(lack)
        report.gaps.append(f"missing: {title.split(': ')[-1]}: {row} on {section}{which}")
    return cells


def text(values: pd.Series, form: str) -> pd.Series:
    return values.map(form.format).where(values.notna(), "")
