"""Train or evaluate a method, with CoOp's command line.

    python train.py --root DATA --seed 1 --trainer LoGoPrompt \\
        --dataset-config-file configs/datasets/caltech101.yaml \\
        --config-file configs/trainers/LoGoPrompt/vit_b16_ctxv1.yaml \\
        --output-dir output/test DATASET.NUM_SHOTS 16 DATASET.SUBSAMPLE_CLASSES base

Mistakes of the user are reported on stderr, one line each, and end the run with exit status 2.
"""

from __future__ import annotations

import ast
import os
import reprlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import reduce
from itertools import islice
from typing import TYPE_CHECKING, Any, Optional

from train_flags import parse_args

if __name__ == "__main__":
    parse_args()  # --help and mistakes in the flags end here: the imports below take seconds

import fallback  # noqa: F401 (makes `import dassl` work)

# isort: split
import torch
import yaml
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import collect_env_info, set_random_seed
from yacs.config import CfgNode as CN

import datasets
import trainers
from fallback.dassl.utils import setup_logger  # Dassl's own buffers the log and fails at exit where the disk is full
from trainers.prompting import distributed
from trainers.prompting.console import BriefConsole
from trainers.prompting.errors import UserError, messages
from trainers.prompting.names import flat_config
from trainers.prompting.results import write_text
from trainers.prompting.run_folder import command, locked

if TYPE_CHECKING:
    import argparse

TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}
TYPE_NAMES[tuple] = TYPE_NAMES[list] = "a list"
MAX_VALUES = 10_000  # in a config file


def extend_cfg(cfg: CN) -> None:
    """Add the config keys that Dassl does not have."""
    trainers.extend_cfg(cfg)
    datasets.extend_cfg(cfg)


def reset_cfg(cfg: CN, args: argparse.Namespace) -> None:
    """Override the config with the flags."""
    flags = {
        "DATASET.ROOT": args.root,
        "OUTPUT_DIR": os.path.expanduser(args.output_dir),
        "RESUME": args.resume,
        "SEED": args.seed,
        "DATASET.SOURCE_DOMAINS": args.source_domains,
        "DATASET.TARGET_DOMAINS": args.target_domains,
        "INPUT.TRANSFORMS": args.transforms,
        "TRAINER.NAME": args.trainer,
        "MODEL.BACKBONE.NAME": args.backbone,
        "MODEL.HEAD.NAME": args.head,
    }
    for key, value in flags.items():
        if value or (key == "SEED" and value == 0):
            _set(cfg, key, value)


def setup_cfg(args: argparse.Namespace) -> CN:
    """Merge defaults, the data set's file, the method's file, the flags and the KEY VALUE pairs, in this order.

    Raises UserError with a line for every mistake.
    """
    cfg = get_cfg_default()
    extend_cfg(cfg)
    errors = [f"{w}: flags must come before the KEY VALUE pairs" for w in map(str, args.opts) if w.startswith("--")]
    if not args.eval_only and (args.model_dir or args.load_epoch is not None):
        flag = "--model-dir" if args.model_dir else "--load-epoch"
        errors.append(f"{flag}: names a model to evaluate; add --eval-only, or --resume to train on from a run")
    for flag in ("--dataset-config-file", "--config-file"):
        if path := getattr(args, flag[2:].replace("-", "_")):
            errors += merge_file(cfg, path, flag)
    if missing := [line for line in errors if ": no such file (" in line]:
        raise UserError(*missing)  # what else is wrong may be due to that
    reset_cfg(cfg, args)
    errors += merge_pairs(cfg, args.opts)
    registries = {"trainer (--trainer)": (cfg.TRAINER.NAME, TRAINER_REGISTRY)}
    registries["data set (DATASET.NAME, --dataset-config-file)"] = (cfg.DATASET.NAME, DATASET_REGISTRY)
    for kind, (name, registry) in registries.items():
        known = sorted(registry.registered_names())
        if name not in known:
            errors.append(f'unknown {kind} "{name}"{_hint(name, known, 0.4)}: choose one of {", ".join(known)}')
        elif registry is TRAINER_REGISTRY:
            errors += getattr(registry.get(name), "config_errors", lambda cfg: [])(cfg)
    if errors:
        raise UserError(*errors)
    cfg.freeze()
    return cfg


def merge_file(cfg: CN, path: str, flag: str) -> list[str]:
    """Override the config with the valid keys of a YAML file. Returns one line for every mistake in it."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        too_many = next(islice(_values(content), MAX_VALUES, None), None)
    except FileNotFoundError:
        here = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
        return [f"{path}: no such file ({flag}){f', perhaps {here}' if os.path.isfile(here) else ''}"]
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        return [f"{path}: {' '.join(str(error).split())}"]
    if too_many:
        return [f"{path}: more than {MAX_VALUES} values, with every reference counted"]
    if not isinstance(content, dict):
        return [] if content is None else [f"{path}: not a mapping of config keys"]
    return [f"{path}: {error}" for error in _merge_tree(cfg, cfg, content)]


def _values(content: Any) -> Iterator[bool]:
    """Yield once per value; a few lines of YAML references can expand to billions."""
    if isinstance(content, (dict, list)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _values(value)
    yield True


def _merge_tree(cfg: CN, node: CN, content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        group = node.get(name)
        if isinstance(group, CN) and isinstance(value, dict):
            yield from _merge_tree(cfg, group, value, f"{prefix}{name}.")
        else:
            yield from _merge(cfg, f"{prefix}{name}", value)


def merge_pairs(cfg: CN, pairs: Sequence[str]) -> list[str]:
    """Override the config with the valid KEY VALUE pairs. Returns one line for every mistake."""
    if any(str(word).startswith("--") for word in pairs):  # reported by setup_cfg
        return []
    errors = [error for key, value in zip(pairs[::2], pairs[1::2]) for error in _merge(cfg, key, value)]
    if len(pairs) % 2:
        errors.append(f"{pairs[-1]}: a value is missing, KEY VALUE pairs are needed")
    return [f"command line: {error}" for error in errors]


def _merge(cfg: CN, key: str, value: Any) -> Iterator[str]:
    """Set a key as yacs does, but also accept whole numbers for floats. Yields a line if it cannot be set."""
    current = flat_config(cfg)
    if key not in current:
        group = any(known.startswith(f"{key}.") for known in current)
        yield f"{key}: a group of keys, not a key" if group else f"unknown key {key}{_hint(key, list(current), 0.6)}"
        return
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        value = ast.literal_eval(value) if isinstance(value, str) else value  # also 1e-5, a string in YAML
    old = current[key]
    if isinstance(old, float) and type(value) is int:
        with suppress(OverflowError):
            value = float(value)
    elif isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
        value = type(old)(value)
    if type(value) is type(old):
        _set(cfg, key, value)
    else:
        needed, given = (TYPE_NAMES.get(kind, kind.__name__) for kind in (type(old), type(value)))
        yield f"{key} {reprlib.repr(value)[:100]}: must be {needed}, not {given}"


def _set(cfg: CN, key: str, value: Any) -> None:
    *path, leaf = key.split(".")
    reduce(CN.__getitem__, path, cfg)[leaf] = value


def _hint(name: str, known: Sequence[str], cutoff: float) -> str:
    """A suggestion for a misspelt name, or nothing."""
    matches = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f", perhaps {matches[0]}" if matches else ""


def run(args: argparse.Namespace) -> None:
    """Train and test, or only test, holding the lock of the output folder."""
    cfg = setup_cfg(args)
    if not args.output_dir and "OUTPUT_DIR" not in args.opts[::2]:
        raise UserError("--output-dir is missing: name a folder for this run")
    distributed.start(cfg.USE_CUDA)
    with locked(cfg.OUTPUT_DIR):
        if cfg.SEED >= 0:
            print(f"Setting fixed seed: {cfg.SEED}")
            set_random_seed(cfg.SEED)
        if distributed.is_main():
            setup_logger(cfg.OUTPUT_DIR)
            describe_run(args, cfg)
        if torch.cuda.is_available() and cfg.USE_CUDA:
            torch.backends.cudnn.benchmark = True
        try:
            trainer = build_trainer(cfg)
        except ValueError as error:  # Dassl's exception for unknown options (optimizer, transform, sampler, …)
            raise UserError(" ".join(str(error).split())) from error
        trainer.words = ["--config-file", args.config_file, *args.opts]
        if args.eval_only:
            trainer.load_model(args.model_dir, epoch=args.load_epoch)
            trainer.test()
        elif not args.no_train:
            if getattr(trainer.dm.dataset, "test_only", False):
                remedy = "add --eval-only, and --model-dir for a trained model"
                raise UserError(f"{cfg.DATASET.NAME} has no training images: {remedy}")
            trainer.train()
        for loader in filter(None, (trainer.train_loader_x, trainer.val_loader, trainer.test_loader)):
            loader._iterator = None  # ends its workers; the garbage collector would wait five seconds for each


def describe_run(args: argparse.Namespace, cfg: CN) -> None:
    """Write ``environment.txt``, and shorten what a terminal shows unless the command asks for more."""
    if "TRAIN.PRINT_FREQ" not in args.opts:
        sys.stdout.console = BriefConsole(sys.stdout.console)
    path, place = os.path.join(cfg.OUTPUT_DIR, "environment.txt"), f"(in {os.getcwd()})"
    write_text(path, f"{command()}\n{place}\n\n** Config **\n{cfg}\n** System info **\n{collect_env_info()}\n")
    print(f"Command, config and system: {path}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status: 0, or 2 for a mistake of the user. A signal in training raises SystemExit (130, 143)."""
    try:
        run(parse_args(argv))
        return 0
    except Exception as error:
        if (lines := messages(error)) is None:
            raise
        if distributed.claim("message"):
            print(*(f"error: {line}" for line in lines), sep="\n", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before or after training, where there is no checkpoint to save
        if distributed.claim("message"):
            print(f"Interrupted. To start again, in {os.getcwd()}: {command()}", file=sys.stderr)
        sys.exit(130)
