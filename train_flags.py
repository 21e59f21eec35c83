"""CoOp's command line. Standard library only: ``--help`` does not wait for torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Optional

EXAMPLE = """example:
  python train.py --root data --seed 1 --trainer LoGoPrompt \\
      --dataset-config-file configs/datasets/shapes.yaml \\
      --config-file configs/trainers/LoGoPrompt/tiny96_ep10_ctxv1.yaml \\
      --output-dir output/mine DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base

docs/reference.md lists the config keys and the files of a run."""


def parser(description: str = "Train or evaluate a method.", epilog: str = EXAMPLE) -> argparse.ArgumentParser:
    """A parser with CoOp's flags, to which other programs may add their own."""
    made = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--root", default="", help="folder of the data sets")
    add("--output-dir", default="", help="run folder, which receives all output")
    add("--resume", default="", help="run folder from which training continues")
    add("--config-file", default="", help="config of the method")
    add("--dataset-config-file", default="", help="config of the data set")
    add("--trainer", default="", help="name of the trainer")
    add("--backbone", default="", help="CLIP weights: a name, a path or arch/tag (MODEL.BACKBONE.NAME)")
    add("--head", default="", help="unused, as in CoOp (MODEL.HEAD.NAME)")
    add("--model-dir", default="", help="run folder whose model --eval-only evaluates")
    add("--seed", type=int, default=-1, help="of all random numbers; negative: none (-1)")
    add("--source-domains", nargs="+", help="source domains")
    add("--target-domains", nargs="+", help="target domains")
    add("--transforms", nargs="+", help="data augmentation")
    add("--eval-only", action="store_true", help="evaluate without training")
    add("--load-epoch", type=int, help="epoch of that model; default: the best one, else the last")
    add("--no-train", action="store_true", help="build everything, then stop")
    add("opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config keys that override the files")
    return made


def listed() -> str:
    """The flags as ``--help`` lists them, for programs that pass them on to ``train.py``."""
    return parser(epilog="").format_help().split("\n\n", 2)[2]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse CoOp's flags."""
    return parser().parse_args(argv)
