"""The paper's mechanisms on the toy world: a table for each, in one command.

    python toy/mechanisms.py                # everything; finished runs are not repeated
    python toy/mechanisms.py --only loss k  # see --help for the names

Settings are compared base-to-new on "Shapes" over several seeds; "shift" goes from "Shapes" to "ShapesShifted". "loss"
chooses the form of the loss and its learning rates on validation images of the base classes, "rates" the learning rates
of the other methods.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Optional

# Subset that is trained on, and what is tested: column -> (subset, data set unless it is the trained one).
PROTOCOLS = {
    "base2new": ("base", {"base": ("base", None), "new": ("new", None)}),
    "shift": ("all", {"source": ("all", None), "ShapesShifted": ("all", "shapes_shifted")}),
    "few_shot": ("all", {"accuracy": ("all", None)}),  # for each of SHOTS
}
SHOTS = (1, 4, 16)
# Methods with a learning rate, other than CoOp and ours, and the factor that takes --rates to the authors' range.
METHODS = dict.fromkeys(("ProGrad", "KgCoOp", "ProDA", "CLIPAdapter", "VPT", "DPT"), 1.0) | {
    "TipAdapterF": 0.05,
    "VP": 200,
}


ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):  # one setting of an experiment
    label: str
    trainer: str = "LoGoPrompt"
    opts: tuple[str, ...] = ()
    split: str = "test"
    protocol: str = "base2new"
    config: str = ""  # file in configs/trainers/<trainer>; empty: that of the command


def experiments(rates: Sequence[str]) -> dict[str, tuple[str, list[Row]]]:
    """Title and rows of every experiment; the shipped setting has no options."""

    def logo(label: str, **options: Any) -> Row:
        return Row(label, opts=sum(((f"TRAINER.LOGOPROMPT.{key}", str(v)) for key, v in options.items()), ()))

    ours, coop = Row("LoGoPrompt as shipped"), Row("CoOp", "CoOp")
    zero, zero_vit = (
        Row(f"ZeroshotCLIP{name}", "ZeroshotCLIP", opts)
        for name, opts in (("", ()), (", tiny-vit", ("MODEL.BACKBONE.NAME", "tiny-vit")))
    )
    cocoop = Row("CoCoOp", "CoCoOp", config="tiny96_c4_ep10_batch1_ctxv1")
    others = [
        Row(name, name) for name in ("ProGrad", "KgCoOp", "ProDA", "CLIPAdapter", "TipAdapter", "TipAdapterF", "VP")
    ]
    vit = [zero_vit, Row("VPT, tiny-vit", "VPT"), Row("DPT, tiny-vit", "DPT")]
    methods = [zero, coop, ours]
    few = [
        row._replace(protocol="few_shot")
        for row in (zero, Row("LinearProbe", "LinearProbe"), coop, *others, *vit, ours)
    ]
    scaled = [(name, f"{float(rate) * factor:g}") for name, factor in METHODS.items() for rate in rates]
    chosen = [Row(f"{name}, lr {rate}", name, ("OPTIM.LR", rate), "val") for name, rate in scaled]
    forms = product([logo("infonce", LOSS="infonce"), logo("paper", LOSS="paper"), coop], rates)
    loss = [Row(f"{r.label}, lr {rate}", r.trainer, (*r.opts, "OPTIM.LR", rate), "val") for r, rate in forms]
    parts = [
        logo(f"{text}{', tunable' * tune}{', adapter' * adapter}", TEXT_PROMPT=text, TUNE_VISUAL=tune, ADAPTER=adapter)
        for text, tune, adapter in product(("generic", "two_stage"), (False, True), (False, True))
    ]
    uses = [logo(use, VISUAL_PROMPT=use) for use in ("none", "text_augmentation", "paired")]
    uses.append(logo("selection in training alone", SELECT_AT_TEST=False))
    heights = [logo("h = H/14", BLOCK_HEIGHT=1 / 14), logo("h = 2H/7", BLOCK_HEIGHT=2 / 7)]
    places, numbers = [logo(p, LOCATION=p) for p in ("top", "bottom")], [logo(f"K = {k}", K=k) for k in (1, 3, 10)]
    return {
        "main": ("Base-to-new", methods),
        "methods": ("Base-to-new, all methods", [zero, coop, cocoop, *others, *vit, ours]),
        "few_shot": ("Few-shot, all classes", few),
        "rates": ("Learning rates of the other methods (validation images)", chosen),
        "method": ("Text prompts, visual prompts, adapter", parts),
        "shift": ("Domain generalization: another style", [row._replace(protocol="shift") for row in methods]),
        "loss": ("The two forms of Eq. 3 over learning rates (validation images)", loss),
        "table4a": ("Table 4a: use of the visual prompts", [*uses, ours]),
        "table4b": ("Table 4b: height of the block (as shipped: 1/7)", [*heights, ours]),
        "table4d": ("Table 4d: place of the block (as shipped: random)", [*places, ours]),
        "k": ("Hard negatives and candidates (as shipped: K = 5)", [*numbers, ours]),
    }


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    names = list(experiments([]))
    title, examples = __doc__.split("\n\n")[:2]
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=f"examples:\n{examples}", formatter_class=style)
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "output" / "mechanisms", help="folder for everything")
    add("--data", type=Path, help="data root; default: data/ in the output folder")
    add("--dataset", default="shapes", help="file in configs/datasets, without .yaml (shapes)")
    add("--config", default="tiny96_ep10_ctxv1", help="file in configs/trainers/<trainer>, without .yaml")
    add("--only", nargs="+", default=names, choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--rates", nargs="+", default=["0.002", "0.02", "0.2", "2.0"], help="learning rates of the experiment loss")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, with one thread each; 1: in this process")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs that overrule the configs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and mistakes in the flags end here: the imports below take seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from runner import arguments, relative, run  # isort: skip (makes `import dassl` work)
import pandas as pd
import torch
from tqdm import tqdm

import train
from trainers.prompting.errors import UserError
from trainers.prompting.results import harmonic_mean, is_finished, read_results, write_text


def measure(args: argparse.Namespace, row: Row, seed: int) -> dict[str, Any]:
    """Train a row with one seed and test it: accuracies by column. Finished runs with the same settings are reused."""
    if row.protocol == "few_shot" and "DATASET.NUM_SHOTS" not in row.opts:
        rows = {n: row._replace(opts=(*row.opts, "DATASET.NUM_SHOTS", str(n))) for n in SHOTS}
        return {f"{n} shot{'s' * (n > 1)}": measure(args, r, seed)["accuracy"] for n, r in rows.items()}
    trained, tested = PROTOCOLS[row.protocol]

    def words(folder: Path, subset: str, dataset: Optional[str] = None, flags: Sequence[str] = ()) -> list[str]:
        where = dataset or args.dataset, row.config or args.config, args.data
        argv = arguments(row.trainer, *where, folder, seed, subset, flags)
        return [*argv, "DATALOADER.NUM_WORKERS", "0", *row.opts, *args.opts]

    config = train.setup_cfg(train.parse_args(words(args.output, trained))).dump()
    folder, found = args.output / f"{row.trainer}-seed{seed}-{row.protocol}-{zlib.crc32(config.encode()):08x}", {}
    flags = ["--eval-only"]
    if row.trainer != "ZeroshotCLIP":
        path = folder / "train"
        results = read_results(path) if is_finished(path) else run([*words(path, trained), "TEST.NO_TEST", "True"])
        found["collapsed"] = results["run"]["collapsed"]
        flags += ["--model-dir", str(path)]
    opts = ("DATASET.NUM_SHOTS", "-1", "TEST.SPLIT", row.split)  # -1: all validation images, not four per class
    for column, where in tested.items():
        path = folder / f"{row.split}_{column}"
        results = read_results(path) if is_finished(path) else run([*words(path, *where, flags), *opts])
        found[column], found["images"] = results["metrics"]["accuracy"], results["images"]
    return {**found, "H": harmonic_mean(found["base"], found["new"])} if row.protocol == "base2new" else found


def table(runs: pd.DataFrame) -> str:
    """Mean ± standard deviation over seeds, a line per setting; how many runs collapsed, if any did."""
    groups = runs.groupby("label", sort=False)
    columns = runs.columns.drop(["label", "trainer", "collapsed", "images"], errors="ignore")
    cells = {c: [f"{g.mean():.2f} ± {g.std() if len(g) > 1 else 0:.2f}" for _, g in groups[c]] for c in columns}
    if "collapsed" in runs and runs["collapsed"].eq(True).any():
        cells["collapsed"] = [f"{g.eq(True).sum()} of {len(g)}" for _, g in groups["collapsed"]]
    return pd.DataFrame(cells, index=list(groups.groups)).to_markdown()


def choice(runs: pd.DataFrame) -> str:
    """The smallest learning rate within one standard error of the best, on validation images of the base classes."""
    lines, n = [], runs["images"].iloc[0]
    mean = runs.groupby(["trainer", "label"], sort=False)["base"].mean()
    for trainer, accuracy in mean.groupby(level="trainer", sort=False):
        accuracy = accuracy[trainer]
        error = ((highest := accuracy.max()) * (100 - highest) / n) ** 0.5
        near = accuracy[accuracy >= highest - error].sort_values(ascending=False, kind="stable")
        chosen = min(near.index, key=lambda label: float(label.split()[-1]))
        where = f"on the {n} validation images of the base classes ({highest:.2f}, standard error {error:.2f})"
        lines.append(f"Best {where}: {accuracy.idxmax()}; chosen: {chosen} ({near[chosen]:.2f}).")
    return "\n\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a user's mistake."""
    args, names = parse_args(argv), list(experiments([]))
    args.output, args.data = args.output.resolve(), (args.data or args.output / "data").resolve()
    chosen = {name: experiments(args.rates)[name] for name in args.only}
    jobs = [(row._replace(label=""), seed) for _, rows in chosen.values() for row in rows for seed in args.seeds]
    todo = list(dict.fromkeys(jobs))
    try:
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            runs = (pool.map if args.jobs > 1 else map)(partial(measure, args), *zip(*todo))
            found = dict(zip(todo, tqdm(runs, "runs", len(todo), disable=None)))
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sections = [f"Seeds {args.seeds}; mean ± standard deviation, percent."]
    for name, (title, rows) in chosen.items():
        measured = [(row, found[row._replace(label=""), seed]) for row in rows for seed in args.seeds]
        frame = pd.DataFrame([{"label": row.label, "trainer": row.trainer, **cells} for row, cells in measured])
        sections += [f"## {title}", table(frame), *([choice(frame)] if name in ("loss", "rates") else [])]
    path = args.output / ("tables.md" if args.only == names else f"tables_{'_'.join(args.only)}.md")
    write_text(str(path), (text := "\n\n".join(sections)) + "\n")
    print(f"{text}\n\n{relative(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
