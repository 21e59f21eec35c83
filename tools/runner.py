"""Runs of ``train.py`` inside one process, for the programs that compare several of them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # isort: skip (needs the line above; makes `import dassl` work)
from trainers.prompting.results import read_results

ROOT = Path(train.__file__).parent


def arguments(
    trainer: str, dataset: str, config: str, root: Path, folder: Path, seed: int, subset: str, flags: Sequence[str] = ()
) -> list[str]:
    """``train.py``'s arguments, without KEY VALUE pairs; ``dataset`` and ``config`` are files without ``.yaml``."""
    method = "CoOp" if trainer in ("ZeroshotCLIP", "LinearProbe") else trainer  # as in CoOp: they have no configs
    return [
        *("--root", str(root), "--seed", str(seed), "--trainer", trainer, "--output-dir", str(folder)),
        *("--dataset-config-file", str(ROOT / "configs" / "datasets" / f"{dataset}.yaml")),
        *("--config-file", str(ROOT / "configs" / "trainers" / method / f"{config}.yaml"), *flags),
        *("DATASET.NUM_SHOTS", "16", "DATASET.SUBSAMPLE_CLASSES", subset),
    ]


class EpochLines(io.StringIO):
    """Passes on some of the epochs of what a run prints, at most one line for each."""

    def __init__(self) -> None:
        super().__init__()
        self.terminal, self.last = sys.stdout, ""

    def write(self, text: str) -> int:
        epoch = text.split(" batch")[0]
        if epoch.startswith("epoch [") and epoch != self.last:
            print(f"  {(epoch := epoch.strip())}", file=self.terminal, flush=True)
            self.last = epoch
        return len(text)


def run(argv: Sequence[str], progress: bool = False) -> dict[str, Any]:
    """One run, silent or with a line per epoch. Returns its ``results.json``; raises SystemExit if it failed."""
    with redirect_stdout(EpochLines() if progress else io.StringIO()):
        if status := train.main(argv):
            raise SystemExit(status)
    return read_results(argv[argv.index("--output-dir") + 1])


def relative(path: Path) -> str:
    """A path as it is shown to people: relative to the current folder, if it is below."""
    shown = os.path.relpath(path)
    return str(path) if shown.startswith("..") else shown
