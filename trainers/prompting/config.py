"""Config keys with their defaults and valid values.

A method lists its keys in one table; :func:`add_keys` adds the defaults to a config and :func:`violations` checks the
values. All mistakes are reported at once, before any data or weights are loaded.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, Optional

from yacs.config import CfgNode

from .errors import UserError
from .names import flat_config, printable

PRECISIONS = ("fp16", "fp32", "amp", "bf16")  # fp16 casts the weights of both encoders, bf16 those of the image encoder
MAX_CONTEXT = 60  # of CLIP's 77 tokens; leaves 14 for a class name


class Rule(NamedTuple):
    """What a value must be, in words, and the check."""

    requirement: str
    holds: Callable[[Any], bool]


class Key(NamedTuple):
    """A config key: its default, and the rule for other values (None: any value of the default's type)."""

    default: Any
    rule: Optional[Rule] = None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def at_least(least: float) -> Rule:
    return Rule(f"must be at least {least:g}", lambda value: is_number(value) and value >= least)


def above(least: float) -> Rule:
    return Rule(f"must be larger than {least:g}", lambda value: is_number(value) and value > least)


def within(least: float, most: float) -> Rule:
    return Rule(f"must be {least:g} to {most:g}", lambda value: is_number(value) and least <= value <= most)


def one_of(choices: Collection[str]) -> Rule:
    return Rule(f"choose one of {', '.join(choices)}", lambda value: value in choices)


def only(value: Any, reason: str) -> Rule:
    return Rule(f"must be {value}: {reason}", lambda given: given == value)


NOT_A_FOLDER = Rule("is a folder, must be a file", lambda value: not os.path.isdir(os.path.expanduser(value)))
WORDS_OR_EMPTY = Rule(
    f"must hold 1 to {MAX_CONTEXT} words, or be empty for a random context",
    lambda value: not value or 1 <= len(value.split()) <= MAX_CONTEXT,
)
PREC = Key("fp16", one_of(PRECISIONS))
CONTEXT = {
    "N_CTX": Key(16, within(1, MAX_CONTEXT)),  # M, number of context vectors
    "CTX_INIT": Key("", WORDS_OR_EMPTY),  # words that the context starts from; empty: random
    "PREC": PREC,
}

# Keys that all methods share.
SHARED_KEYS = {
    "TEST.FEATURES": Key("", NOT_A_FOLDER),  # file that stores features of test images between runs; empty: none
    "TEST.FEATURES_GB": Key(4.0, at_least(0)),  # size limit of that file
    "TRAIN.TEXT_CHUNK": Key(0, at_least(0)),  # classes encoded at a time, to save memory; 0: all of them
    "TRAIN.COMPILE": Key(False),  # torch.compile the image encoder: takes minutes, changes last digits
    "TRAIN.DROP_LAST": Key(True),  # leave an incomplete last batch out of every epoch, as Dassl does
    "MODEL.BACKBONE.QUICK_GELU": Key(True),  # activation of weights given by path, as of OpenAI's; False: GELU
    "MODEL.BACKBONE.WEIGHTS": Key(""),  # file with the weights of an architecture of open_clip
    "TRAIN.DECODED_GB": Key(1.0, at_least(0)),  # training images stay decoded in memory up to this size; 0: never
}

# Dassl's own keys: yacs checks the types, torch and Dassl most values. These would make results wrong without a word.
DASSL_RULES = {
    **dict.fromkeys(("SEED", "OPTIM.WARMUP_EPOCH", "TRAIN.CHECKPOINT_FREQ"), at_least(-1)),
    "DATASET.NUM_SHOTS": Rule("must be at least 1, or -1 for all training images", lambda n: n >= 1 or n == -1),
    **dict.fromkeys(("DATALOADER.NUM_WORKERS", "OPTIM.LR", "OPTIM.WEIGHT_DECAY"), at_least(0)),
    **dict.fromkeys(("OPTIM.WARMUP_CONS_LR", "OPTIM.WARMUP_MIN_LR"), at_least(0)),
    **dict.fromkeys(("OPTIM.MAX_EPOCH", "TRAIN.PRINT_FREQ"), at_least(1)),
    **dict.fromkeys(("DATALOADER.TRAIN_X.BATCH_SIZE", "DATALOADER.TEST.BATCH_SIZE"), at_least(1)),
    "INPUT.SIZE": Rule(
        "must be height and width, whole numbers of pixels",
        lambda size: len(size) == 2 and all(type(n) is int and n >= 1 for n in size),
    ),
    "INPUT.NO_TRANSFORM": only(False, "a network takes tensors"),
    "INPUT.PIXEL_MEAN": Rule("must be three numbers", lambda mean: len(mean) == 3 and all(map(is_number, mean))),
    "INPUT.PIXEL_STD": Rule(
        "must be three numbers larger than 0", lambda std: len(std) == 3 and all(is_number(s) and s > 0 for s in std)
    ),
    "INPUT.RRCROP_SCALE": Rule(
        "must be the smallest and largest share of the area, above 0 and up to 1",
        lambda scale: len(scale) == 2 and all(map(is_number, scale)) and 0 < scale[0] <= scale[1] <= 1,
    ),
    "DATASET.SUBSAMPLE_CLASSES": one_of(("all", "base", "new")),
    "DATALOADER.K_TRANSFORMS": only(1, "a network takes one view of an image"),
    "DATALOADER.TEST.SAMPLER": one_of(("SequentialSampler", "RandomSampler")),  # others leave images out
    "MODEL.INIT_WEIGHTS": Rule("no such file", lambda path: not path or os.path.isfile(os.path.expanduser(path))),
    "OPTIM.STAGED_LR": only(False, "prompts have no layers to tell apart"),
    "OPTIM.GAMMA": above(0),
    "TEST.SPLIT": one_of(("test", "val")),
    "TEST.FINAL_MODEL": one_of(("last_step", "best_val")),
}


def add_keys(cfg: CfgNode, keys: Mapping[str, Key], node: str = "") -> None:
    """Add the shared keys and those of a method, below ``cfg.TRAINER.<node>``."""
    for name, key in SHARED_KEYS.items():
        *groups, leaf = name.split(".")
        reduce(lambda node, group: node.setdefault(group, CfgNode()), groups, cfg)[leaf] = key.default
    if node:
        cfg.TRAINER[node] = CfgNode({name: key.default for name, key in keys.items()})


def rules_of(keys: Mapping[str, Key]) -> dict[str, Rule]:
    """The rules of those keys that have one."""
    return {name: key.rule for name, key in keys.items() if key.rule is not None}


def violation(key: str, value: Any, requirement: str) -> str:
    """One line about a value that is not allowed."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, (list, tuple)):
        shown = reprlib.repr(tuple(value))
    shown = shown if shown.strip() else f'"{shown}"'
    return f"{key} {printable(shown[:200])}: {requirement}"


def violations(rules: Mapping[str, Rule], cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """A line for every value that breaks its rule; ``prefix`` comes before the keys, which the config may lack."""
    values = flat_config(cfg)
    for key, rule in rules.items():
        if prefix + key in values and not rule.holds(values[prefix + key]):
            yield violation(prefix + key, values[prefix + key], rule.requirement)


def lost_overrides(words: Sequence[str], cfg: CfgNode) -> Iterator[str]:
    """A line for every number among the KEY VALUE pairs of a command that a code base's train.py changed afterwards."""
    values = flat_config(cfg)
    for key, word in dict(zip(words, words[1:])).items():  # of equal keys the last counts
        if key in values and isinstance(values[key], (int, float)):
            asked = CfgNode._decode_cfg_value(word)
            if isinstance(asked, (int, float)) and asked != values[key]:
                requirement = f"this train.py changes it to {values[key]}; leave it out of the command"
                yield violation(key, asked, requirement)


def unmet(prefix: str, options: CfgNode, conditions: Collection[tuple[str, bool, str]]) -> list[str]:
    """A line for every condition on several keys that does not hold: (key, whether it holds, requirement)."""
    return [violation(prefix + key, options[key], requirement) for key, holds, requirement in conditions if not holds]


def user_error_messages(check: Callable[[], Any]) -> Iterator[str]:
    """The messages of the UserError that ``check`` raises, if it does."""
    try:
        check()
    except UserError as error:
        yield from error.args
