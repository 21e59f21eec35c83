"""Train or evaluate a method: CoOp's command line.

    python train.py --root DATA --seed 1 --trainer LoGoPrompt \\
        --dataset-config-file configs/datasets/caltech101.yaml \\
        --config-file configs/trainers/LoGoPrompt/vit_b16_ctxv1.yaml \\
        --output-dir output/test DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base

A mistake in what was asked for ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Callable, Optional

import fallback  # noqa: F401 (makes `import dassl` work)

# isort: split
import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import collect_env_info, set_random_seed, setup_logger
from yacs.config import CfgNode as CN

import datasets
import trainers
from trainers.prompting.errors import UserError
from trainers.prompting.names import flat_config
from trainers.prompting.runs import locked


def extend_cfg(cfg: CN) -> None:
    """Add the config keys that Dassl does not have."""
    trainers.extend_cfg(cfg)
    datasets.extend_cfg(cfg)


def reset_cfg(cfg: CN, args: argparse.Namespace) -> None:
    """Let the flags overrule the config files."""
    flags = {
        "DATASET.ROOT": args.root,
        "OUTPUT_DIR": os.path.expanduser(args.output_dir),
        "RESUME": args.resume,
        "SEED": args.seed if args.seed > 0 else None,
        "DATASET.SOURCE_DOMAINS": args.source_domains,
        "DATASET.TARGET_DOMAINS": args.target_domains,
        "INPUT.TRANSFORMS": args.transforms,
        "TRAINER.NAME": args.trainer,
        "MODEL.BACKBONE.NAME": args.backbone,
        "MODEL.HEAD.NAME": args.head,
    }
    for key, value in flags.items():
        if value:
            *path, leaf = key.split(".")
            node = cfg
            for part in path:
                node = node[part]
            node[leaf] = value


def setup_cfg(args: argparse.Namespace) -> CN:
    """Defaults, then the data set's file, the method's file, the flags, and last the KEY VALUE pairs.

    Raises:
        UserError: a file that is missing or no YAML, an unknown key, a value of the wrong type, an unknown name.
    """
    cfg = get_cfg_default()
    extend_cfg(cfg)
    for flag, path in (("--dataset-config-file", args.dataset_config_file), ("--config-file", args.config_file)):
        if path:
            _merge(cfg, path, lambda path=path: cfg.merge_from_file(path), flag)
    reset_cfg(cfg, args)
    _merge(cfg, "command line", lambda: cfg.merge_from_list(args.opts))
    for kind, name, registry in (
        ("trainer (--trainer)", cfg.TRAINER.NAME, TRAINER_REGISTRY),
        ("data set (DATASET.NAME, --dataset-config-file)", cfg.DATASET.NAME, DATASET_REGISTRY),
    ):
        known = sorted(registry.registered_names())
        if name not in known:
            hint = get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f", perhaps {hint[0]}" if hint else ""
            raise UserError(f'unknown {kind} "{name}"{hint}: choose one of {", ".join(known)}')
    cfg.freeze()
    return cfg


def _merge(cfg: CN, source: str, merge: Callable[[], None], flag: str = "") -> None:
    """Run one of yacs's merges and say in one line what is wrong with it, and where."""
    try:
        merge()
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file ({flag})") from error
    except Exception as error:  # noqa: BLE001 (yaml and yacs each have errors of their own)
        message = " ".join(str(error.args[0] if error.args else error).split())
        unknown = re.search(r"Non-existent (?:config )?key: (\S+)", message)
        if unknown:
            hint = get_close_matches(unknown[1], list(flat_config(cfg)), n=1, cutoff=0.6)
            message = f"unknown key {unknown[1]}" + (f", perhaps {hint[0]}" if hint else "")
        raise UserError(f"{source}: {message or 'not a mapping of config keys'}") from error


def print_args(args: argparse.Namespace, cfg: CN) -> None:
    """Print what the run was asked to do, in CoOp's form."""
    print("***************\n** Arguments **\n***************")
    for key, value in sorted(vars(args).items()):
        print(f"{key}: {value}")
    print(f"************\n** Config **\n************\n{cfg}")


def run(args: argparse.Namespace) -> None:
    """One run: train and test, or test only, with the output folder to itself."""
    cfg = setup_cfg(args)
    with locked(cfg.OUTPUT_DIR):
        _run(args, cfg)


def _run(args: argparse.Namespace, cfg: CN) -> None:
    if cfg.SEED >= 0:
        print(f"Setting fixed seed: {cfg.SEED}")
        set_random_seed(cfg.SEED)
    setup_logger(cfg.OUTPUT_DIR)
    if torch.cuda.is_available() and cfg.USE_CUDA:
        torch.backends.cudnn.benchmark = True
    print_args(args, cfg)
    print(f"Collecting env info ...\n** System info **\n{collect_env_info()}\n")

    try:
        trainer = build_trainer(cfg)
    except ValueError as error:  # Dassl's word for an option it does not know (optimiser, transform, sampler, …)
        raise UserError(" ".join(str(error).split())) from error
    if args.eval_only:
        trainer.load_model(args.model_dir, epoch=args.load_epoch)
        trainer.test()
    elif not args.no_train:
        if getattr(trainer.dm.dataset, "test_only", False):
            raise UserError(
                f"{cfg.DATASET.NAME} has no training images: add --eval-only, and --model-dir for a trained one"
            )
        trainer.train()


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """CoOp's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    text = {"type": str, "default": ""}
    parser.add_argument("--root", help="folder of the data sets", **text)
    parser.add_argument("--output-dir", help="folder for everything that the run writes", **text)
    parser.add_argument("--resume", help="run folder from which training goes on", **text)
    parser.add_argument("--seed", type=int, default=-1, help="only a positive value fixes the seed")
    parser.add_argument("--source-domains", nargs="+", help="source domains")
    parser.add_argument("--target-domains", nargs="+", help="target domains")
    parser.add_argument("--transforms", nargs="+", help="data augmentation")
    parser.add_argument("--config-file", help="config of the method", **text)
    parser.add_argument("--dataset-config-file", help="config of the data set", **text)
    parser.add_argument("--trainer", help="name of the trainer", **text)
    parser.add_argument("--backbone", help="CLIP weights: a name, a path or arch/tag (MODEL.BACKBONE.NAME)", **text)
    parser.add_argument("--head", help="unused here, as in CoOp (MODEL.HEAD.NAME)", **text)
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument("--model-dir", help="run folder whose model is evaluated with --eval-only", **text)
    parser.add_argument("--load-epoch", type=int, help="epoch of that model; default: the best one, else the last")
    parser.add_argument("--no-train", action="store_true", help="build everything, do not train")
    parser.add_argument("opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs that overrule the config")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a mistake of the user's. A signal in training is a SystemExit (130, 143)."""
    try:
        run(parse_args(argv))
    except UserError as error:
        return _fail(str(error))
    except FloatingPointError as error:
        return _fail(f"{error}; training cannot go on: lower OPTIM.LR")
    except OSError as error:  # a file or folder that cannot be read or written; raised in a worker it has many lines
        if error.filename and error.strerror:
            return _fail(f"{error.filename}: {error.strerror}")
        return _fail(str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: "))
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before or after training, in which it is a matter of checkpoints
        print("interrupted", file=sys.stderr)
        sys.exit(130)
