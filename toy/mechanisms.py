"""The paper's mechanisms on the embedded world: a table for each, in one command.

    python toy/mechanisms.py                # everything; finished runs are not repeated
    python toy/mechanisms.py --only loss k  # see --help for the names

Settings are compared base-to-new on "Shapes" with the embedded CLIP over several seeds, and "shift" from "Shapes" to
"ShapesShifted". The experiment "loss" chooses the form of the loss and the learning rates on validation images of the
base classes; all other tables are test accuracies with the values in the configs.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from runner import ROOT, arguments, relative, run  # isort: skip (makes `import dassl` work)
import pandas as pd
import torch
from dassl.data.datasets import build_dataset
from tqdm import tqdm

import train
from trainers.prompting.errors import UserError
from trainers.prompting.results import harmonic_mean, is_finished, read_results, write_text

# Subset that is trained on, and what is tested: column -> (data set, None: the trained one; subset).
PROTOCOLS = {
    "base2new": ("base", {"base": (None, "base"), "new": (None, "new")}),
    "shift": ("all", {"source": (None, "all"), "ShapesShifted": ("shapes_shifted", "all")}),
}


class Row(NamedTuple):  # one setting of an experiment
    label: str
    trainer: str = "LoGoPrompt"
    opts: tuple[str, ...] = ()
    split: str = "test"
    protocol: str = "base2new"


def logo(label: str, **options: Any) -> Row:
    """LoGoPrompt with some of its keys."""
    return Row(label, opts=sum(((f"TRAINER.LOGOPROMPT.{key}", str(value)) for key, value in options.items()), ()))


def experiments(rates: Sequence[str]) -> dict[str, tuple[str, list[Row]]]:
    """Title and rows of every experiment; the shipped setting has no options."""
    ours = Row("LoGoPrompt as shipped")
    methods = [Row("ZeroshotCLIP", "ZeroshotCLIP"), Row("CoOp", "CoOp"), ours]
    forms = [logo("infonce", LOSS="infonce"), logo("paper", LOSS="paper"), methods[1]]
    loss = [
        form._replace(label=f"{form.label}, lr {rate}", opts=(*form.opts, "OPTIM.LR", rate), split="val")
        for form, rate in itertools.product(forms, rates)
    ]
    parts = [
        logo(f"{text}{', tunable' * tune}{', adapter' * adapter}", TEXT_PROMPT=text, TUNE_VISUAL=tune, ADAPTER=adapter)
        for text, tune, adapter in itertools.product(("generic", "two_stage"), (False, True), (False, True))
    ]
    uses = [logo(use, VISUAL_PROMPT=use) for use in ("none", "text_augmentation", "paired")]
    heights = [logo("h = H/14", BLOCK_HEIGHT=1 / 14), logo("h = 2H/7", BLOCK_HEIGHT=2 / 7)]
    places, numbers = [logo(p, LOCATION=p) for p in ("top", "bottom")], [logo(f"K = {k}", K=k) for k in (1, 3, 10)]
    return {
        "main": ("Base-to-new", methods),
        "method": ("Text prompts, visual prompts, adapter", parts),
        "shift": ("Domain generalization: another style", [row._replace(protocol="shift") for row in methods]),
        "loss": ("The two forms of Eq. 3 over learning rates (validation images)", loss),
        "table4a": ("Table 4a: use of the visual prompts", [*uses, ours]),
        "table4b": ("Table 4b: height of the block (as shipped: 1/7)", [*heights, ours]),
        "table4d": ("Table 4d: place of the block (as shipped: random)", [*places, ours]),
        "k": ("Hard negatives and candidates (as shipped: K = 5)", [*numbers, ours]),
    }


def words(args: argparse.Namespace, row: Row, folder: Path, seed: int, where: tuple, *flags: str) -> list[str]:
    """``train.py``'s arguments of a run on (data set, subset)."""
    argv = arguments(row.trainer, where[0] or args.dataset, args.config, args.data, folder, seed, where[1], flags)
    return [*argv, "DATALOADER.NUM_WORKERS", "0", *row.opts, *args.opts]


def measure(args: argparse.Namespace, row: Row, seed: int) -> dict[str, Any]:
    """Train a row with one seed and test it: accuracies by column. Finished runs with the same settings are reused."""
    trained, tested = PROTOCOLS[row.protocol]
    config = train.setup_cfg(train.parse_args(words(args, row, args.output, seed, (None, trained)))).dump()
    folder, found = args.output / f"{row.trainer}-seed{seed}-{row.protocol}-{zlib.crc32(config.encode()):08x}", {}

    def result(name: str, where: tuple, flags: Sequence[str], *opts: str) -> dict[str, Any]:
        path = folder / name
        return read_results(path) if is_finished(path) else run([*words(args, row, path, seed, where, *flags), *opts])

    flags = ["--eval-only"]
    if row.trainer != "ZeroshotCLIP":
        found["collapsed"] = result("train", (None, trained), (), "TEST.NO_TEST", "True")["run"]["collapsed"]
        flags += ["--model-dir", str(folder / "train")]
    for column, where in tested.items():  # NUM_SHOTS 0: all validation images, not four per class
        opts = ("DATASET.NUM_SHOTS", "0", "TEST.SPLIT", row.split)
        results = result(f"{row.split}_{column}", where, flags, *opts)
        found[column], found["images"] = results["metrics"]["accuracy"], results["images"]
    return {**found, "H": harmonic_mean(found["base"], found["new"])} if row.protocol == "base2new" else found


def table(runs: pd.DataFrame) -> str:
    """Mean ± standard deviation over seeds, a line per setting; how many runs collapsed, if any did."""
    groups = runs.groupby("label", sort=False)
    columns = runs.columns.drop(["label", "collapsed", "images"], errors="ignore")
    cells = {c: [f"{g.mean():.2f} ± {g.std() if len(g) > 1 else 0:.2f}" for _, g in groups[c]] for c in columns}
    if "collapsed" in runs and runs["collapsed"].eq(True).any():
        cells["collapsed"] = [f"{g.eq(True).sum()} of {len(g)}" for _, g in groups["collapsed"]]
    return pd.DataFrame(cells, index=list(groups.groups)).to_markdown()


def choice(runs: pd.DataFrame) -> str:
    """The smallest learning rate within one standard error of the best, on validation images of the base classes."""
    lines, mean, n = [], runs.groupby("label", sort=False)["base"].mean(), runs["images"].iloc[0]
    for _, accuracy in mean.groupby(mean.index.str.startswith("CoOp")):
        best, highest = accuracy.idxmax(), accuracy.max()
        error = (highest * (100 - highest) / n) ** 0.5
        near = accuracy[accuracy >= highest - error].sort_values(ascending=False, kind="stable")
        chosen = min(near.index, key=lambda label: float(label.split()[-1]))
        where = f"on the {n} validation images of the base classes ({highest:.2f}, standard error {error:.2f})"
        lines.append(f"Best {where}: {best}; chosen: {chosen} ({near[chosen]:.2f}).")
    return "\n\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a user's mistake."""
    names = list(experiments([]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
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
    args = parser.parse_args(argv)
    args.output, args.data = args.output.resolve(), (args.data or args.output / "data").resolve()
    chosen = {name: experiments(args.rates)[name] for name in args.only}
    jobs = list({(r._replace(label=""), seed): 0 for _, rows in chosen.values() for r in rows for seed in args.seeds})
    sections = []
    try:
        for dataset in {None, *(["shapes_shifted"] if "shift" in chosen else [])}:  # drawn once, before all runs
            with redirect_stdout(io.StringIO()):
                argv = words(args, Row("", "ZeroshotCLIP"), args.output, 1, (dataset, "all"))
                build_dataset(train.setup_cfg(train.parse_args(argv)))
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            runs = (pool.map if args.jobs > 1 else map)(partial(measure, args), *zip(*jobs))
            found = dict(zip(jobs, tqdm(runs, "runs", len(jobs))))
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, (title, rows) in chosen.items():
        keys = [(row, seed) for row in rows for seed in args.seeds]
        frame = pd.DataFrame([{"label": row.label, **found[row._replace(label=""), seed]} for row, seed in keys])
        sections += [f"## {title}", table(frame), *([choice(frame)] if name == "loss" else [])]
    text = "\n\n".join([f"Seeds {args.seeds}; mean ± standard deviation, percent.", *sections])
    path = args.output / ("tables.md" if args.only == names else f"tables_{'_'.join(args.only)}.md")
    write_text(str(path), f"{text}\n")
    print(f"{text}\n\n{relative(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
