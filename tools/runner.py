"""Runs of ``train.py`` inside one process, for the tools that compare several of them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # isort: skip (needs the line above; makes `import dassl` work)
from tqdm import tqdm

from trainers.prompting.results import read_results
from trainers.prompting.trainer import PromptTrainer

ROOT = Path(train.__file__).parent


def arguments(
    trainer: str, dataset: str, config: str, root: Path, folder: Path, seed: int, subset: str, flags: Sequence[str] = ()
) -> list[str]:
    """``train.py``'s arguments; KEY VALUE pairs may follow.

    Args:
        dataset: file in ``configs/datasets``, config: file in ``configs/trainers/<trainer>``, both without ``.yaml``.
        subset: all, base or new.
    """
    method = "CoOp" if trainer == "ZeroshotCLIP" else trainer  # as in CoOp: it has no settings of its own
    return [
        *("--root", str(root), "--seed", str(seed), "--trainer", trainer, "--output-dir", str(folder)),
        *("--dataset-config-file", str(ROOT / "configs" / "datasets" / f"{dataset}.yaml")),
        *("--config-file", str(ROOT / "configs" / "trainers" / method / f"{config}.yaml"), *flags),
        *("DATASET.NUM_SHOTS", "16", "DATASET.SUBSAMPLE_CLASSES", subset),
    ]


def run(argv: Sequence[str]) -> dict[str, Any]:
    """One run; what it says goes to its ``log.txt``. Returns its ``results.json``.

    Raises:
        SystemExit: it failed; why is on stderr.
    """
    with redirect_stdout(io.StringIO()):
        status = train.main(argv)
    if status:
        raise SystemExit(status)
    return read_results(argv[argv.index("--output-dir") + 1])


def base_to_new(
    trainer: str, dataset: str, config: str, root: Path, folder: Path, seed: int, opts: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train on the base classes, test on base and new: both ``results.json``."""
    results = []
    for subset in ("base", "new"):
        flags = ("--eval-only", "--model-dir", str(folder / "base")) if subset == "new" else ()
        if trainer == "ZeroshotCLIP":
            flags = ("--eval-only",)
        argv = arguments(trainer, dataset, config, root, folder / subset, seed, subset, flags)
        results.append(run([*argv, *opts]))
    return results[0], results[1]


@contextmanager
def training_bar(title: str) -> Iterator[None]:
    """A progress bar over the training batches of every run within; none where stderr is not a terminal."""
    original = PromptTrainer.forward_backward
    bars: list[tqdm] = []

    def forward_backward(self: PromptTrainer, batch: dict[str, Any]) -> dict[str, float]:
        if not bars:
            total = self.max_epoch * self.num_batches
            bars.append(tqdm(total=total, desc=f"{title}: training", disable=None, leave=False))
        summary = original(self, batch)
        bars[0].update()
        if bars[0].n == bars[0].total:
            bars.pop().close()
        return summary

    PromptTrainer.forward_backward = forward_backward
    try:
        yield
    finally:
        PromptTrainer.forward_backward = original
        for bar in bars:
            bar.close()


def relative(path: Path) -> str:
    """A path as it is shown to people: below the folder one is in where possible."""
    shown = os.path.relpath(path)
    return str(path) if shown.startswith("..") else shown
