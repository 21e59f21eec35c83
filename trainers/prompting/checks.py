"""What config values can be: one table of rules that all trainers share, and a few more for each method.

Everything that is wrong is said at once, a line each with the key, the value and what is allowed, before any data or
weights are loaded.
"""

from __future__ import annotations

import io
import math
import os
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import torch.nn as nn
from dassl.data.transforms import build_transform
from dassl.data.transforms.transforms import AVAI_CHOICES, INTERPOLATION_MODES
from dassl.evaluation.build import EVALUATOR_REGISTRY
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.optim.lr_scheduler import AVAI_SCHEDS
from dassl.optim.optimizer import AVAI_OPTIMS
from yacs.config import CfgNode

from .errors import UserError
from .names import flat_config, printable

SAMPLERS = ("RandomSampler", "SequentialSampler", "RandomDomainSampler", "SeqDomainSampler", "RandomClassSampler")
PRECISIONS = ("fp16", "fp32", "amp", "bf16")  # bf16: autocast like amp, in bfloat16, which needs no scaled loss
MOST_CONTEXT = 60  # of CLIP's 77 tokens: leaves 14 for a class name


class Rule(NamedTuple):
    """What a value must be, in words, and whether it is."""

    allowed: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def at_least(least: float) -> Rule:
    return Rule(f"must be at least {least:g}", lambda value: _number(value) and value >= least)


def within(least: float, most: float) -> Rule:
    return Rule(f"must be {least:g} to {most:g}", lambda value: _number(value) and least <= value <= most)


def above(least: float) -> Rule:
    return Rule(f"must be larger than {least:g}", lambda value: _number(value) and value > least)


def one_of(known: Collection[str]) -> Rule:
    return Rule(f"choose one of {', '.join(known)}", lambda value: value in known)


def some_of(known: Collection[str]) -> Rule:
    return Rule(f"choose from {', '.join(known)}", lambda values: all(value in known for value in values))


def numbers(count: int, rule: Rule, what: str) -> Rule:
    return Rule(what, lambda values: len(values) == count and all(map(rule.holds, values)))


def _whole(least: int) -> Rule:
    return Rule("", lambda value: type(value) is int and value >= least)


FILE_OR_NONE = Rule("no such file", lambda value: not value or os.path.isfile(os.path.expanduser(value)))
NO_FOLDER = Rule("must be a file, this is a folder", lambda value: not os.path.isdir(os.path.expanduser(value)))
WORDS_OR_NONE = Rule(
    f"no words in it, or more than {MOST_CONTEXT}; leave it empty for a random context",
    lambda value: not value or 1 <= len(value.split()) <= MOST_CONTEXT,
)
CONTEXT = {"N_CTX": within(1, MOST_CONTEXT), "CTX_INIT": WORDS_OR_NONE, "PREC": one_of(PRECISIONS)}

SHARED: dict[str, Rule] = {
    "SEED": at_least(-1),
    "INPUT.SIZE": numbers(2, _whole(1), "height and width are needed, whole numbers of pixels"),
    "INPUT.INTERPOLATION": one_of(tuple(INTERPOLATION_MODES)),
    "INPUT.TRANSFORMS": some_of(tuple(AVAI_CHOICES)),
    "INPUT.NO_TRANSFORM": Rule("must be False, a network takes tensors", lambda value: value is False),
    "INPUT.PIXEL_MEAN": numbers(3, Rule("", _number), "three numbers are needed, of red, green and blue"),
    "INPUT.PIXEL_STD": numbers(3, above(0), "three numbers larger than 0 are needed, of red, green and blue"),
    "INPUT.CROP_PADDING": at_least(0),
    "INPUT.RRCROP_SCALE": Rule(
        "must be the least and the largest share of the area, from above 0 to 1",
        lambda values: numbers(2, within(0, 1), "").holds(values) and 0 < values[0] <= values[1],
    ),
    "INPUT.CUTOUT_N": at_least(0),
    "INPUT.CUTOUT_LEN": at_least(1),
    "INPUT.GN_STD": at_least(0),
    "INPUT.COLORJITTER_B": at_least(0),
    "INPUT.COLORJITTER_C": at_least(0),
    "INPUT.COLORJITTER_S": at_least(0),
    "INPUT.COLORJITTER_H": within(0, 0.5),
    "INPUT.RGS_P": within(0, 1),
    "INPUT.GB_P": within(0, 1),
    "INPUT.GB_K": Rule("must be odd and at least 1", lambda value: value >= 1 and value % 2 == 1),
    "DATASET.NUM_SHOTS": Rule("must be at least 1, or -1 or 0 for all images", lambda value: value >= -1),
    "DATASET.SUBSAMPLE_CLASSES": one_of(("all", "base", "new")),
    "DATALOADER.NUM_WORKERS": at_least(0),
    "DATALOADER.K_TRANSFORMS": Rule("must be 1, a network takes one view of an image", lambda value: value == 1),
    "DATALOADER.TRAIN_X.SAMPLER": one_of(SAMPLERS),
    "DATALOADER.TRAIN_X.BATCH_SIZE": at_least(1),
    "DATALOADER.TRAIN_X.N_DOMAIN": at_least(-1),
    "DATALOADER.TRAIN_X.N_INS": at_least(1),
    "DATALOADER.TEST.SAMPLER": one_of(SAMPLERS[:2]),  # the others leave images out
    "DATALOADER.TEST.BATCH_SIZE": at_least(1),
    "MODEL.INIT_WEIGHTS": FILE_OR_NONE,
    "OPTIM.NAME": one_of(AVAI_OPTIMS),
    "OPTIM.LR": at_least(0),
    "OPTIM.WEIGHT_DECAY": at_least(0),
    "OPTIM.MOMENTUM": within(0, 1),
    "OPTIM.SGD_DAMPNING": within(0, 1),
    "OPTIM.RMSPROP_ALPHA": within(0, 1),
    "OPTIM.ADAM_BETA1": Rule("must be 0 to 1, 1 left out", lambda value: 0 <= value < 1),
    "OPTIM.ADAM_BETA2": Rule("must be 0 to 1, 1 left out", lambda value: 0 <= value < 1),
    "OPTIM.STAGED_LR": Rule("must be False, prompts have no layers to tell apart", lambda value: value is False),
    "OPTIM.LR_SCHEDULER": one_of(AVAI_SCHEDS),
    "OPTIM.STEPSIZE": Rule(
        "must be whole numbers of epochs, or (-1,) for the last one",
        lambda values: len(values) > 0 and all(type(n) is int and (n > 0 or n == -1) for n in values),
    ),
    "OPTIM.GAMMA": above(0),
    "OPTIM.MAX_EPOCH": at_least(1),
    "OPTIM.WARMUP_EPOCH": at_least(-1),
    "OPTIM.WARMUP_TYPE": one_of(("constant", "linear")),
    "OPTIM.WARMUP_CONS_LR": at_least(0),
    "OPTIM.WARMUP_MIN_LR": at_least(0),
    "TRAIN.CHECKPOINT_FREQ": at_least(-1),
    "TRAIN.PRINT_FREQ": at_least(1),
    "TRAIN.DECODED_GB": at_least(0),
    "TRAIN.TEXT_CHUNK": at_least(0),
    "TEST.EVALUATOR": Rule(
        "no such evaluator, Dassl's is Classification", lambda value: value in EVALUATOR_REGISTRY.registered_names()
    ),
    "TEST.SPLIT": one_of(("test", "val")),
    "TEST.FINAL_MODEL": one_of(("last_step", "best_val")),
    "TEST.FEATURES": NO_FOLDER,
    "TEST.FEATURES_GB": at_least(0),
}


def complaint(key: str, value: Any, allowed: str) -> str:
    """One line about a value that cannot be."""
    if isinstance(value, float):
        shown = f"{value:g}"
    elif isinstance(value, (list, tuple)):
        shown = reprlib.repr(tuple(value))
    else:
        shown = str(value) if str(value).strip() else f'"{value}"'
    return f"{key} {printable(shown[:200])}: {allowed}"


def against(rules: Mapping[str, Rule], cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """A line for every value that breaks its rule; keys that the config lacks are left out.

    Args:
        prefix: what stands before the keys of ``rules``, for example ``TRAINER.COOP.``.
    """
    values = flat_config(cfg)
    for key, rule in rules.items():
        if prefix + key in values and not rule.holds(values[prefix + key]):
            yield complaint(prefix + key, values[prefix + key], rule.allowed)


def against_dassl(cfg: CfgNode) -> Iterator[str]:
    """What Dassl says of values that are right one by one and wrong together, or that this Dassl does not have."""
    attempts = (
        ("INPUT.TRANSFORMS", lambda: [build_transform(cfg, is_train) for is_train in (True, False)]),
        ("OPTIM.NAME", lambda: build_lr_scheduler(build_optimizer(nn.Linear(1, 1), cfg.OPTIM), cfg.OPTIM)),
    )
    for key, attempt in attempts:
        try:
            with redirect_stdout(io.StringIO()):
                attempt()
        except (ValueError, TypeError, AssertionError) as error:
            yield complaint(key, flat_config(cfg)[key], " ".join(str(error).split()))


def said(attempt: Callable[[], Any]) -> Iterator[str]:
    """What a UserError says that an attempt ends with, if it does."""
    try:
        attempt()
    except UserError as error:
        yield from error.args
