"""Learning-rate schedules counted in epochs, with an optional warm-up."""

from __future__ import annotations

import math
from typing import Any, Callable

import torch
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["AVAI_SCHEDS", "EpochScheduler", "build_lr_scheduler"]

AVAI_SCHEDS = ["cosine", "multi_step", "single_step"]


class EpochScheduler(LRScheduler):
    """Sets each learning rate to a closed form of the epoch, so that the epoch is all the state it has.

    Only the constructor and ``get_last_lr`` of torch's class are relied on, which have not changed since torch 2.0.

    Args:
        optimizer: its current learning rates are the base ones.
        rate: maps (epoch, base learning rate) to a learning rate; epochs start at 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Callable[[int, float], float]) -> None:
        self._rate = rate
        super().__init__(optimizer)  # calls step() once, which sets the learning rates of epoch 0

    def get_lr(self) -> list[float]:
        """Return the learning rate of each parameter group in the current epoch."""
        return [self._rate(self.last_epoch, base) for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Go to the next epoch, or to ``epoch``, and set the learning rates."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and learning rates, as plain numbers and lists."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": list(self.base_lrs),
            "_last_lr": list(self._last_lr),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``; the shape of the schedule stays the one this object was built with.

        The optimiser's learning rates are part of its own state and are not touched.
        """
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._last_lr = list(state_dict["_last_lr"])


def _single_step(optim_cfg: Any) -> Callable[[int], float]:
    steps = optim_cfg.STEPSIZE
    period = steps[-1] if isinstance(steps, (list, tuple)) else steps
    if not isinstance(period, int):
        raise TypeError(f"OPTIM.STEPSIZE must be an integer for single_step, not {type(period).__name__}")
    if period < 1:
        period = optim_cfg.MAX_EPOCH
    return lambda count: optim_cfg.GAMMA ** (count // period)


def _multi_step(optim_cfg: Any) -> Callable[[int], float]:
    steps = optim_cfg.STEPSIZE
    if not isinstance(steps, (list, tuple)):
        raise TypeError(f"OPTIM.STEPSIZE must be a list for multi_step, not {type(steps).__name__}")
    milestones = [epoch for epoch in steps if epoch >= 0]  # -1, the default, is never reached
    return lambda count: optim_cfg.GAMMA ** sum(epoch <= count for epoch in milestones)


def _cosine(optim_cfg: Any) -> Callable[[int], float]:
    half_period = float(optim_cfg.MAX_EPOCH)
    return lambda count: (1.0 + math.cos(math.pi * count / half_period)) / 2.0


_FACTORS = {"single_step": _single_step, "multi_step": _multi_step, "cosine": _cosine}


def build_lr_scheduler(optimizer: torch.optim.Optimizer, optim_cfg: Any) -> EpochScheduler:
    """Build the schedule ``optim_cfg`` (the OPTIM node) describes; ``step()`` is due after each epoch.

    During the first WARMUP_EPOCH epochs the learning rate is WARMUP_CONS_LR (constant), or WARMUP_MIN_LR in the first
    and then ``base * epoch / WARMUP_EPOCH`` (linear). After that the schedule proper begins at the base learning rate,
    with its count at 0 (WARMUP_RECOUNT) or at WARMUP_EPOCH.

    Raises:
        ValueError: OPTIM.LR_SCHEDULER or OPTIM.WARMUP_TYPE is unknown.
        TypeError: OPTIM.STEPSIZE does not fit the schedule.
    """
    name = optim_cfg.LR_SCHEDULER
    if name not in AVAI_SCHEDS:
        raise ValueError(f"OPTIM.LR_SCHEDULER must be one of {AVAI_SCHEDS}, not {name}")
    factor = _FACTORS[name](optim_cfg)

    warmup = max(optim_cfg.WARMUP_EPOCH, 0)
    if warmup == 0:
        return EpochScheduler(optimizer, lambda epoch, base: base * factor(epoch))

    kind = optim_cfg.WARMUP_TYPE
    if kind not in ("constant", "linear"):
        raise ValueError(f"OPTIM.WARMUP_TYPE must be constant or linear, not {kind}")
    constant_lr, first_lr = optim_cfg.WARMUP_CONS_LR, optim_cfg.WARMUP_MIN_LR
    start = 0 if optim_cfg.WARMUP_RECOUNT else warmup
    # A schedule that starts late still starts from the base rate: in Dassl only its count is moved on, and what it has
    # multiplied the rate by at count 0 (GAMMA for a milestone 0, else 1) stands. A cosine moved on to its very end is 0
    # there, with no epoch left to use it.
    scale = factor(0) / factor(start) if factor(start) else 0.0

    def rate(epoch: int, base: float) -> float:
        if epoch >= warmup:
            return base * scale * factor(start + epoch - warmup)
        if kind == "constant":
            return constant_lr
        return first_lr if epoch == 0 else base * epoch / warmup

    return EpochScheduler(optimizer, rate)
