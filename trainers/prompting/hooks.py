"""Parts of the training loop with a state of their own; ``trainer.py`` calls them from Dassl's hooks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn as nn
from yacs.config import CfgNode

from . import distributed
from .method import Stage, TrainingData

MIN_GAIN = 5.0  # percentage points above chance; losing half of less may be noise
MIN_SCALE = 2.0**-16  # of the loss in mixed precision: gradients that still overflow do so for another reason
MAX_PATHS_SHOWN = 3


@dataclass
class StageSchedule:
    """Gives every stage of training its own learning-rate schedule. Dassl steps it like a scheduler."""

    stages: Sequence[Stage]
    optim: torch.optim.Optimizer
    optim_cfg: CfgNode  # a stage overrides its epochs and learning rate
    build: Callable[[torch.optim.Optimizer, CfgNode], Any]  # makes a torch scheduler
    data: TrainingData  # handed to the stages
    schedulers: Sequence[Any] = ()  # of the current stage, one for every warm-up

    def __post_init__(self) -> None:
        ends = accumulate(stage.epochs for stage in self.stages)
        spans = [(stage, end) for stage, end in zip(self.stages, ends) if stage.epochs > 0]
        self._by_first_epoch = {end - stage.epochs: stage for stage, end in spans}
        self._by_end = {end: stage for stage, end in spans}
        self.warnings = [
            f"stage {i} has {stage.epochs} epoch{'s' * (stage.epochs > 1)}, all warm-up: it hardly learns. Raise "
            "OPTIM.MAX_EPOCH or lower OPTIM.WARMUP_EPOCH"
            for i, stage in enumerate(self.stages, start=1)
            if 0 < stage.epochs <= self.optim_cfg.WARMUP_EPOCH
        ]

    def before_epoch(self, epoch: int) -> None:
        """Begin the stage whose first epoch this is."""
        for warning in self.warnings if epoch == 0 else ():
            print(f"WARNING: {warning}")
        if stage := self._by_first_epoch.get(epoch):
            self._start(stage)
            stage.begin(self.data)

    def after_epoch(self, epoch: int) -> None:
        """End the stage whose last epoch this was."""
        if stage := self._by_end.get(epoch + 1):
            stage.end(self.data)

    def step(self) -> None:
        """Set the learning rate of the next epoch."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # of steps without an optimizer's
            for scheduler in self.schedulers:
                scheduler.step()

    def resume(self, epochs_done: int) -> None:
        """Restore the schedule after a number of epochs; it is a function of the epoch, so it has no state on disk."""
        first = max((first for first in self._by_first_epoch if first <= epochs_done), default=None)
        if first is not None:
            self._start(self._by_first_epoch[first])
            for _ in range(epochs_done - first):
                self.step()

    def _start(self, stage: Stage) -> None:
        by_warmup: dict[int, list[dict[str, Any]]] = {}
        for group in self.optim.param_groups:
            group["lr"] = group["initial_lr"] = group.get("own_lr", stage.lr)
            by_warmup.setdefault(group.get("warmup_epoch", self.optim_cfg.WARMUP_EPOCH), []).append(group)
        cfg = {**self.optim_cfg, "MAX_EPOCH": stage.epochs, "LR": stage.lr}
        self.schedulers = [
            self.build(_Part(groups) if len(by_warmup) > 1 else self.optim, CfgNode({**cfg, "WARMUP_EPOCH": warmup}))
            for warmup, groups in by_warmup.items()
        ]


class _Part(torch.optim.Optimizer):
    """Some groups of an optimizer, whose dictionaries it shares, so that they can have a scheduler of their own."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})


class FiniteGuard:
    """Raises FloatingPointError that names epoch, batch and images when a number is not finite."""

    _position: str = ""
    _paths: Sequence[str] = ()

    def before_step(self, position: str, paths: Sequence[str]) -> None:
        """Note epoch and batch, in words, and the images of the batch."""
        self._position, self._paths = position, paths

    def check_loss(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss).all():
            self._fail(f"the loss is {loss.detach().float().mean().item()}")

    def check_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients and not torch.stack([torch.isfinite(g).all() for g in gradients]).all():
            self._fail("the loss is finite, its gradients are not")

    def check_scale(self, scale: float) -> None:
        """Scale of the loss in mixed precision, which halves after every overflow."""
        if scale < MIN_SCALE:
            self._fail("the gradients overflow, however small the loss is scaled")

    def check_parameters(self, module: nn.Module, position: str) -> None:
        for name, parameter in module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise FloatingPointError(f"{position}: {name} is no longer finite")

    def _fail(self, fault: str) -> None:
        paths = list(dict.fromkeys(chain.from_iterable(distributed.gather(list(self._paths)))))
        more = f" and {len(paths) - MAX_PATHS_SHOWN} more" if len(paths) > MAX_PATHS_SHOWN else ""
        images = f"{', '.join(paths[:MAX_PATHS_SHOWN])}{more}"
        raise FloatingPointError(f"{self._position}: {fault}; images of the batch: {images}")


class CollapseMonitor:
    """Warns when training drives the predictions to chance, as the min-max loss can with a weak backbone.

    An epoch collapses when its accuracy on training images (without selection) has lost more than half of the best
    epoch's gain over chance; the first epoch, of warm-up, shows what the prompts could do before training.
    """

    def __init__(self, num_classes: int) -> None:
        self.chance = 100.0 / max(num_classes, 1)
        self.best, self.collapsed = 0.0, False
        self._sum, self._count = 0.0, 0

    def after_step(self, accuracy: float, n: int) -> None:
        """Add the accuracy of a batch of n images, in percent."""
        self._sum, self._count = self._sum + accuracy * n, self._count + n

    def after_epoch(self, epoch: int) -> None:
        """Judge an epoch, counted from 1."""
        accuracy = self._sum / max(self._count, 1)
        self._sum, self._count = 0.0, 0
        self.best = max(self.best, accuracy)
        gain = self.best - self.chance
        collapsed = gain > MIN_GAIN and accuracy - self.chance < gain / 2
        if collapsed and not self.collapsed:
            print(
                f"WARNING: training collapses: accuracy on training images is {accuracy:.1f} % in epoch {epoch}, it "
                f"was {self.best:.1f} % before (chance is {self.chance:.1f} %). Lower OPTIM.LR or, with LoGoPrompt, "
                "choose another LOSS; the method does not help a backbone that cannot read class names."
            )
        self.collapsed = collapsed

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "collapsed": self.collapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.collapsed = state["best"], state["collapsed"]


class EpochTimer:
    """Measures how much of an epoch is spent waiting for images."""

    _start = _busy = 0.0

    def before_epoch(self) -> None:
        self._start, self._busy = time.perf_counter(), 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a training step."""
        start = time.perf_counter()
        yield
        self._busy += time.perf_counter() - start

    def after_epoch(self, position: str) -> None:
        passed = time.perf_counter() - self._start
        print(f"{position} took {passed:.1f} s, {100 * (1 - self._busy / passed):.0f} % of it waiting for images")
