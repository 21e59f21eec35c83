"""Train or evaluate a method: CoOp's command line.

    python train.py --root DATA --seed 1 --trainer LoGoPrompt \\
        --dataset-config-file configs/datasets/caltech101.yaml \\
        --config-file configs/trainers/LoGoPrompt/vit_b16_ctxv1.yaml \\
        --output-dir output/test DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base

A mistake in what was asked for ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import ast
import os
import reprlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import reduce
from itertools import islice
from typing import Any, Optional

import fallback  # noqa: F401 (makes `import dassl` work)

# isort: split
import torch
import yaml
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import collect_env_info, set_random_seed, setup_logger
from yacs.config import CfgNode as CN

import datasets
import trainers
from trainers.prompting.errors import UserError
from trainers.prompting.names import flat_config, printable
from trainers.prompting.run_folder import locked

WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a list"}  # for types
WORDS[list] = WORDS[tuple]
MOST_VALUES = 10_000  # in a config file


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
        UserError: everything that is wrong, a line each: a file that is missing or no YAML, unknown keys, values of the
            wrong type, unknown names, values that nothing can be done with.
    """
    cfg = get_cfg_default()
    extend_cfg(cfg)
    wrong: list[str] = []
    for flag, path in (("--dataset-config-file", args.dataset_config_file), ("--config-file", args.config_file)):
        if path:
            wrong += merge_file(cfg, path, flag)
    reset_cfg(cfg, args)
    wrong += merge_pairs(cfg, args.opts)
    for kind, name, registry in (
        ("trainer (--trainer)", cfg.TRAINER.NAME, TRAINER_REGISTRY),
        ("data set (DATASET.NAME, --dataset-config-file)", cfg.DATASET.NAME, DATASET_REGISTRY),
    ):
        known = sorted(registry.registered_names())
        if name not in known:
            wrong.append(f'unknown {kind} "{name}"{_perhaps(name, known, 0.4)}: choose one of {", ".join(known)}')
        elif registry is TRAINER_REGISTRY:
            wrong += getattr(registry.get(name), "config_errors", lambda cfg: [])(cfg)
    if wrong:
        raise UserError(*wrong)
    cfg.freeze()
    return cfg


def merge_file(cfg: CN, path: str, flag: str) -> list[str]:
    """Let a YAML file overrule the config as far as it can. Returns a line for everything that is wrong with it."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        too_many = next(islice(_leaves(content), MOST_VALUES, None), None)
    except FileNotFoundError:
        return [f"{path}: no such file ({flag})"]
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8
        return [f"{path}: {' '.join(str(error).split())}"]
    if too_many:
        return [f"{path}: more than {MOST_VALUES} values, counted where they are referred to"]
    if not isinstance(content, dict):
        return [] if content is None else [f"{path}: not a mapping of config keys"]
    return [f"{path}: {wrong}" for wrong in _merge_tree(cfg, cfg, content)]


def _leaves(content: Any) -> Iterator[bool]:
    """As many items as there are values in what a YAML file holds; a few lines of references can make billions."""
    if isinstance(content, (dict, list)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _leaves(value)
    yield True


def _merge_tree(cfg: CN, node: CN, content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        group = node.get(name)
        if isinstance(group, CN) and isinstance(value, dict):
            yield from _merge_tree(cfg, group, value, f"{prefix}{name}.")
        else:
            yield from _merge(cfg, f"{prefix}{name}", value)


def merge_pairs(cfg: CN, pairs: Sequence[str]) -> list[str]:
    """Let KEY VALUE pairs overrule the config as far as they can. Returns a line for everything that is wrong."""
    wrong = [w for key, value in zip(pairs[::2], pairs[1::2]) for w in _merge(cfg, key, value)]
    if len(pairs) % 2:
        wrong.append(f"{pairs[-1]}: a value is missing, KEY VALUE pairs are needed")
    return [f"command line: {w}" for w in wrong]


def _merge(cfg: CN, key: str, value: Any) -> Iterator[str]:
    """Set a key as yacs does, and a number where it wants one with a decimal point; a line if that cannot be."""
    before = flat_config(cfg)
    if key not in before:
        group = any(known.startswith(f"{key}.") for known in before)
        yield f"{key}: a group of keys, not a key" if group else f"unknown key {key}{_perhaps(key, list(before), 0.6)}"
        return
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        value = ast.literal_eval(value) if isinstance(value, str) else value  # also 1e-5, which is a text in YAML
    old = before[key]
    if isinstance(old, float) and type(value) is int:
        with suppress(OverflowError):
            value = float(value)
    elif isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
        value = type(old)(value)
    if type(value) is not type(old):
        wanted, found = (WORDS.get(kind, kind.__name__) for kind in (type(old), type(value)))
        yield f"{key} {reprlib.repr(value)[:100]}: must be {wanted}, not {found}"
        return
    *path, leaf = key.split(".")
    reduce(CN.__getitem__, path, cfg)[leaf] = value


def _perhaps(name: str, known: Sequence[str], cutoff: float) -> str:
    hint = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f", perhaps {hint[0]}" if hint else ""


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
        return _fail(*map(str, error.args))
    except FloatingPointError as error:
        return _fail(f"{error}; training cannot go on: lower OPTIM.LR")
    except OSError as error:  # a file or folder that cannot be read or written; raised in a worker it has many lines
        if error.filename and error.strerror:
            return _fail(f"{error.filename}: {error.strerror}")
        return _fail(str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: "))
    return 0


def _fail(*messages: str) -> int:
    for message in messages:
        print(f"error: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before or after training, in which it is a matter of checkpoints
        print("interrupted", file=sys.stderr)
        sys.exit(130)
