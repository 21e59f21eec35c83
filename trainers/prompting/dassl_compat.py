"""Differences between versions of Dassl.pytorch and torch, in one place."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import dassl.optim.lr_scheduler as dassl_schedules
import torch
import torch.nn as nn
from dassl.data.transforms import build_transform
from dassl.evaluation.build import EVALUATOR_REGISTRY
from dassl.optim import build_lr_scheduler
from dassl.optim import build_optimizer as dassl_build_optimizer
from torch.optim.lr_scheduler import LRScheduler
from yacs.config import CfgNode

from .config import violation
from .errors import UserError
from .names import flat_config


def patch_dassl_warmup() -> None:
    """Let Dassl.pytorch (2022) build its warm-up on torch >= 2.7, whose schedulers no longer accept ``verbose``."""
    warmup = getattr(dassl_schedules, "_BaseWarmupScheduler", None)
    if warmup is None or "verbose" in inspect.signature(LRScheduler.__init__).parameters:
        return

    def init(self, optimizer, successor, warmup_epoch, last_epoch=-1, verbose=False):  # noqa: ANN001 (Dassl's)
        self.successor, self.warmup_epoch = successor, warmup_epoch
        LRScheduler.__init__(self, optimizer, last_epoch)

    warmup.__init__ = init


def build_optimizer(module: nn.Module, cfg: CfgNode, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Dassl's optimizer for ``cfg.OPTIM``; ``groups`` are parameters of the module with options of their own.

    Raises UserError where this Dassl (0.5) has no parameter groups for them.
    """
    if not groups:
        return dassl_build_optimizer(module, cfg)
    if len(inspect.signature(dassl_build_optimizer).parameters) < 3:
        raise UserError("parameters with their own optimizer options need Dassl.pytorch 0.6.3 or newer: update Dassl")
    own = {parameter for group in groups for parameter in group["params"]}
    others = {"params": [parameter for parameter in module.parameters() if parameter not in own]}
    # "own_lr" tells the schedule of a stage what to scale
    rated = [{**group, "own_lr": group["lr"]} if "lr" in group else group for group in groups]
    return dassl_build_optimizer(module, cfg, [*([others] if others["params"] else []), *rated])


def grad_scaler() -> Any:
    """torch's gradient scaler, which moved in torch 2.3."""
    return torch.amp.GradScaler("cuda") if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler()


def dassl_errors(cfg: CfgNode) -> Iterator[str]:
    """A line for every value that this Dassl or torch refuses when transforms, optimizer and schedule are built."""
    known = EVALUATOR_REGISTRY.registered_names()
    if cfg.TEST.EVALUATOR not in known:
        yield violation("TEST.EVALUATOR", cfg.TEST.EVALUATOR, f"no such evaluator; choose one of {', '.join(known)}")
    patch_dassl_warmup()
    # Nothing here may draw from the global random state (PReLU does not): the run must be the same as CoOp's.
    attempts = {
        "INPUT.TRANSFORMS": lambda: [build_transform(cfg, is_train) for is_train in (True, False)],
        "OPTIM.NAME": lambda: build_lr_scheduler(dassl_build_optimizer(nn.PReLU(), cfg.OPTIM), cfg.OPTIM),
    }
    for key, attempt in attempts.items():
        try:
            with redirect_stdout(io.StringIO()):
                attempt()
        except (ValueError, TypeError, AssertionError, KeyError, ZeroDivisionError) as error:
            yield violation(key, flat_config(cfg)[key], " ".join(str(error).split()) or type(error).__name__)
