"""Try the paper's mechanisms on the embedded world: every claim in miniature, one command.

    python tools/mechanisms.py                     # everything; finished runs are taken as they are
    python tools/mechanisms.py --only loss block   # see --help for the names

Settings are compared base-to-new on "Shapes" with the embedded CLIP over several seeds, and "shift" from "Shapes" to
"ShapesShifted". The form of the loss and the learning rates are chosen in the experiment "loss", on validation images
of the base classes; all other tables are test accuracies with what the configs say. The tables go to
``output/mechanisms/tables.md``. Another data set and config can be named. KEY VALUE pairs overrule the configs.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import re
import shutil
import statistics
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

from runner import ROOT, arguments, relative, run  # isort: skip (makes `import dassl` work)
import torch
from dassl.data.datasets import build_dataset
from tqdm import tqdm

import figure1
import train
from figure1 import of
from trainers import logoprompt
from trainers.prompting.backbone import TINY
from trainers.prompting.errors import UserError
from trainers.prompting.results import harmonic_mean, read_results, write_text
from trainers.prompting.synthetic import draw_colours
from trainers.prompting.trainer import PromptTrainer

CONFIG = "tiny96_ep10_ctxv1"


class Protocol(NamedTuple):
    """Which classes are trained on, and what is tested: column -> (data set, or "" for that of training; classes)."""

    trained: str
    tested: dict[str, tuple[str, str]]


PROTOCOLS = {
    "base2new": Protocol("base", {"base": ("", "base"), "new": ("", "new")}),
    "shift": Protocol("all", {"source": ("", "all"), "ShapesShifted": ("shapes_shifted", "all")}),
}


@dataclass(frozen=True)
class Row:
    """One setting of one experiment."""

    label: str
    trainer: str = "LoGoPrompt"
    opts: tuple[str, ...] = ()
    block: str = "text"  # what the visual prompts show: text, noise or plain
    split: str = "test"
    protocol: str = "base2new"
    dataset: str = "shapes"
    config: str = CONFIG

    @property
    def name(self) -> str:
        """Name of its folder: rows of several experiments with the same settings share their runs."""
        parts = [self.trainer, *(() if self.block == "text" else (self.block,)), *self.opts]
        name = "-".join(part.removeprefix("TRAINER.LOGOPROMPT.") for part in parts)
        return f"{self.dataset}-{self.config}/{self.protocol}/{re.sub(r'[^a-zA-Z0-9_.=-]+', '_', name)}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Measured accuracies, in per cent."""
        tested = tuple(PROTOCOLS[self.protocol].tested)
        return (*tested, "H") if self.protocol == "base2new" else tested


def _logo(key: str, *values: Any) -> list[Row]:
    return [Row(f"{key} {value}", opts=(f"TRAINER.LOGOPROMPT.{key}", str(value))) for value in values]


def experiments(
    rates: Sequence[str], dataset: str = "shapes", config: str = CONFIG
) -> dict[str, tuple[str, list[Row]]]:
    """Title and rows of every experiment. The shipped setting stands in each as it is, without an option."""
    ours = Row("LoGoPrompt as shipped")
    relatives = [Row("ZeroshotCLIP", "ZeroshotCLIP"), Row("CoOp", "CoOp"), ours]
    forms = [
        Row(f"{form}, lr {rate}", opts=("TRAINER.LOGOPROMPT.LOSS", form, "OPTIM.LR", rate), split="val")
        for form in ("infonce", "paper")
        for rate in rates
    ]
    forms += [Row(f"CoOp, lr {rate}", "CoOp", ("OPTIM.LR", rate), split="val") for rate in rates]
    forms.append(Row("ZeroshotCLIP", "ZeroshotCLIP", split="val"))
    ratios = [
        Row(f"h = H {name}", opts=("TRAINER.LOGOPROMPT.BLOCK_HEIGHT", str(value)))
        for name, value in (("1/14", 1 / 14), ("2/7", 2 / 7))
    ]
    uses = _logo("VISUAL_PROMPT", "none", "text_augmentation", "paired")
    blocks = [Row("noise, another for every class", block="noise"), Row("plain, in the class's colour", block="plain")]
    switches = {"TEXT_PROMPT": ("generic", "two_stage"), "TUNE_VISUAL": (False, True), "ADAPTER": (False, True)}
    method = [
        Row(
            f"{text.replace('_', '-')}, {'tunable' if tune else 'frozen'}{', adapter' if adapter else ''}",
            opts=tuple(
                word
                for key, value in zip(switches, (text, tune, adapter))
                for word in (f"TRAINER.LOGOPROMPT.{key}", str(value))
            ),
        )
        for text, tune, adapter in itertools.product(*switches.values())
    ]
    known = {
        "main": ("Base-to-new", relatives),
        "method": ("Text prompts, visual prompts, adapter", method),
        "shift": ("Domain generalization: another style", [replace(row, protocol="shift") for row in relatives]),
        "loss": ("The two forms of Eq. 3 over learning rates (validation images)", forms),
        "table4a": ("Table 4a: use of the visual prompts", [*uses, ours]),
        "table4b": ("Table 4b: size of the block (as shipped: 1/7)", [*ratios, ours]),
        "table4d": ("Table 4d: place of the block (as shipped: random)", [*_logo("LOCATION", "top", "bottom"), ours]),
        "block": ("What the block shows", [*blocks, ours]),
        "k": ("Hard negatives and candidates (as shipped: K = 5)", [*_logo("K", 1, 3, 10), ours]),
    }
    return {
        name: (title, [replace(row, dataset=dataset, config=config) for row in rows])
        for name, (title, rows) in known.items()
    }


# ------------------------------------------------------------------------------------------------- runs


@contextmanager
def other_blocks(kind: str) -> Iterator[None]:
    """Draw something else than class names into the blocks."""
    original = logoprompt.draw_visual_prompts

    def draw(method: Any, classnames: Sequence[str], image_size: int) -> torch.Tensor:
        blocks = original(method, classnames, image_size)
        if kind == "plain":
            _, background = draw_colours(classnames, method.VISUAL_SEED, method.MIN_CONTRAST)
            return background[:, :, None, None].expand_as(blocks).clone()
        for block, name in zip(blocks, classnames):
            generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[:7], "little"))
            block.copy_(torch.rand(block.shape, generator=generator))
        return blocks

    if kind != "text":
        logoprompt.draw_visual_prompts = draw
    try:
        yield
    finally:
        logoprompt.draw_visual_prompts = original


@contextmanager
def gradient_norms() -> Iterator[list[float]]:
    """The norm of the gradient at every step of the training within."""
    original, norms = PromptTrainer.forward_backward, []

    def forward_backward(self: PromptTrainer, batch: dict[str, Any]) -> dict[str, float]:
        summary = original(self, batch)
        grads = [p.grad.norm() for p in self.prompt_learner.parameters() if p.grad is not None]
        norms.append(float(torch.stack(grads).norm()))
        return summary

    PromptTrainer.forward_backward = forward_backward
    try:
        yield norms
    finally:
        PromptTrainer.forward_backward = original


def fingerprint(argv: Sequence[str]) -> str:
    """Eight hex digits of all that decides a run: every config key, defaults included, and the weights."""
    cfg = train.setup_cfg(train.parse_args(argv))
    cfg.defrost()
    cfg.OUTPUT_DIR = cfg.DATASET.ROOT = cfg.TEST.FEATURES = ""
    text = cfg.dump().encode()
    weights = Path(TINY if cfg.MODEL.BACKBONE.NAME == "tiny" else cfg.MODEL.BACKBONE.NAME)
    return f"{zlib.crc32(text + (weights.read_bytes() if weights.is_file() else b'')):08x}"


def measure(row: Row, seed: int, root: Path, output: Path, opts: tuple[str, ...], threads: int) -> dict[str, Any]:
    """Train a row with one seed unless that was done, and test it on base and new. Accuracies and signs of trouble.

    What other settings, defaults or weights made lies in another folder and is never taken for this.
    """
    torch.set_num_threads(threads)
    protocol = PROTOCOLS[row.protocol]
    common = ("DATALOADER.NUM_WORKERS", "0", *row.opts, *opts)

    def words(dataset: str, folder: Path, subset: str, *flags: str) -> list[str]:
        return [*arguments(row.trainer, dataset, row.config, root, folder, seed, subset, flags), *common]

    made_by = fingerprint(words(row.dataset, output, protocol.trained))
    folder = output / row.name / f"seed{seed}-{made_by}"
    path = folder / f"{row.split}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = {"folder": str(folder), "collapsed": False, "gradient": None}
    with other_blocks(row.block):
        if row.trainer != "ZeroshotCLIP":
            note = folder / "train" / "gradients.json"
            if not note.exists():
                shutil.rmtree(folder / "train", ignore_errors=True)  # interrupted: its first gradients are not known
                with gradient_norms() as norms:
                    run([*words(row.dataset, folder / "train", protocol.trained), "TEST.NO_TEST", "True"])
                tenth = max(1, len(norms) // 10)
                write_text(str(note), json.dumps({"first": statistics.mean(norms[:tenth]), "largest": max(norms)}))
            found["gradient"] = json.loads(note.read_text())
            found["collapsed"] = read_results(str(folder / "train"))["run"]["collapsed"]
        for column, (dataset, subset) in protocol.tested.items():
            flags = ("--eval-only", *(() if row.trainer == "ZeroshotCLIP" else ("--model-dir", str(folder / "train"))))
            argv = words(dataset or row.dataset, folder / f"{row.split}_{column}", subset, *flags)
            # Without NUM_SHOTS all validation images are there, not only four a class.
            result = run([*argv, "DATASET.NUM_SHOTS", "0", "TEST.SPLIT", row.split])
            found[column], found[f"images_{column}"] = result["metrics"]["accuracy"], result["images"]
    if "H" in row.columns:
        found["H"] = harmonic_mean(found["base"], found["new"])
    write_text(str(path), json.dumps(found))
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation (of the sample)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def table(rows: Sequence[Row], results: dict[tuple[str, str, int], dict[str, Any]], seeds: Sequence[int]) -> str:
    """Markdown, a line a row."""
    signs = any(row.split == "val" for row in rows)
    head = ["setting", *rows[0].columns]
    head += ["collapsed", "gradient, first tenth", "gradient, largest"] if signs else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        runs = [results[row.name, row.split, seed] for seed in seeds]
        cells = [row.label, *(spread([r[key] for r in runs]) for key in row.columns)]
        if signs:
            if runs[0]["gradient"] is None:  # not trained
                cells += [""] * 3
            else:
                cells.append(f"{sum(bool(r['collapsed']) for r in runs)} of {len(runs)}")
                cells += [f"{statistics.mean(r['gradient'][key] for r in runs):.3g}" for key in ("first", "largest")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def choice(rows: Sequence[Row], results: dict[tuple[str, str, int], dict[str, Any]], seeds: Sequence[int]) -> str:
    """What to ship of the experiment "loss", by validation images of the base classes alone: of the settings whose
    accuracy is within one standard error of the best one's, that with the smallest learning rate, which leads least far
    away from the words the context starts from. New classes have no say, nor have test images."""
    lines = []
    for trainer in ("LoGoPrompt", "CoOp"):
        runs = {row: [results[row.name, row.split, seed] for seed in seeds] for row in rows if row.trainer == trainer}
        accuracy = {row: statistics.mean(run["base"] for run in found) for row, found in runs.items()}
        best = max(accuracy, key=accuracy.get)
        n = runs[best][0]["images_base"]
        error = (accuracy[best] * (100 - accuracy[best]) / n) ** 0.5
        near = [row for row in accuracy if accuracy[row] >= accuracy[best] - error]
        taken = min(near, key=lambda row: (float(row.opts[-1]), -accuracy[row]))  # noqa: B023 (called at once)
        lines.append(
            f"{trainer}: best on the {n} validation images of the base classes is {best.label} ({accuracy[best]:.2f}, "
            f"standard error {error:.2f}); chosen is {taken.label} ({accuracy[taken]:.2f})."
        )
    return "\n\n".join(lines)


# ------------------------------------------------------------------------------------------------- figure 1b


def figure1b(root: Path, folder: Path, dataset: str, config: str, opts: Sequence[str]) -> str:
    """Zero-shot scores of all classes' test images, as they are and with the block of the true or of a wrong class."""
    lines = ["| block | p(y) | p(y) raised in | p(c of the block) | accuracy |", "|---|---|---|---|---|"]
    for kind, title in (("text", "class name"), ("noise", "noise"), ("plain", "plain colour")):
        argv = arguments("LoGoPrompt", dataset, config, root, folder, 1, "all", ("--no-train",))
        with other_blocks(kind):
            trainer = figure1.build(train.parse_args([*argv, *opts]))
        values = figure1.zero_shot(trainer, f"figure 1b, {title}")
        plain, label = values["none"], values["label"]
        p_y = of(plain, label)
        if kind == "text":
            lines.append(f"| none | {p_y.mean():.3f} | | | {_accuracy(plain, label)} |")
        for name, whose in zip(figure1.BLOCKS, ("the true class", "the most probable wrong class", "any wrong class")):
            pasted, classes = values[name], values[f"class of {name}"]
            raised = 100 * (of(pasted, label) > p_y).float().mean()
            change = f"{of(plain, classes).mean():.3f} → {of(pasted, classes).mean():.3f}"
            cells = (f"{title}, {whose}", f"{of(pasted, label).mean():.3f}", f"{raised:.0f} % of images", change)
            lines.append(f"| {' | '.join(cells)} | {_accuracy(pasted, label)} |")
    return "\n".join(lines)


def _accuracy(scores: torch.Tensor, label: torch.Tensor) -> str:
    return f"{100 * (scores.argmax(1) == label).float().mean():.1f} %"


# ------------------------------------------------------------------------------------------------- command


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "mechanisms", help="folder for everything")
    parser.add_argument("--data", type=Path, help="data root; default: data/ in the output folder")
    parser.add_argument("--dataset", default="shapes", help="file in configs/datasets, without .yaml")
    parser.add_argument("--config", default=CONFIG, help="file in configs/trainers/<trainer>, without .yaml")
    parser.add_argument("--only", nargs="+", default=[], help=f"of {', '.join([*experiments([]), 'figure1b'])}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--rates", nargs="+", default=["0.002", "0.02", "0.2", "2.0"], help="learning rates of the experiment loss"
    )
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs that overrule the configs"
    )
    args = parser.parse_args(argv)
    output = args.output.resolve()
    root = (args.data or output / "data").resolve()
    known = experiments(args.rates, args.dataset, args.config)
    unknown = set(args.only) - {*known, "figure1b"}
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: choose of {', '.join([*known, 'figure1b'])}")
    chosen = {name: known[name] for name in known if not args.only or name in args.only}

    sections, results = [], {}
    try:
        # Data sets that are drawn where they are missing are drawn here, once, before several processes want them.
        for name in {args.dataset, *(["shapes_shifted"] if "shift" in chosen else [])}:
            argv = arguments("ZeroshotCLIP", name, args.config, root, output, 1, "all")
            cfg = train.setup_cfg(train.parse_args([*argv, *args.opts]))
            with redirect_stdout(io.StringIO()):
                build_dataset(cfg)
        if not args.only or "figure1b" in args.only:
            body = figure1b(root, output / "figure1b", args.dataset, args.config, args.opts)
            sections.append(("Figure 1b: zero-shot scores with and without a block", body))
        jobs = {(r.name, r.split, seed): (r, seed) for _, rows in chosen.values() for r in rows for seed in args.seeds}
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            futures = {
                pool.submit(measure, row, seed, root, output, tuple(args.opts), 1): key
                for key, (row, seed) in jobs.items()
            }
            try:
                for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
                    results[futures[future]] = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for title, rows in chosen.values():
        body = table(rows, results, args.seeds)
        sections.append((title, body if rows != known["loss"][1] else f"{body}\n\n{choice(rows, results, args.seeds)}"))
    numbers = ", ".join(map(str, args.seeds))
    text = f"Seeds {numbers}; mean ± standard deviation, per cent.\n\n" + "\n\n".join(
        f"## {t}\n\n{body}" for t, body in sections
    )
    name = "tables.md" if not args.only else f"tables_{'_'.join(args.only)}.md"
    write_text(str(output / name), f"{text}\n")
    print(f"{text}\n\n{relative(output / name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
