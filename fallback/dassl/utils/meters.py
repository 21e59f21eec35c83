"""Running averages of numbers seen during an epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["AverageMeter", "MetricMeter"]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


class AverageMeter:
    """The latest value (``val``), the weighted ``sum`` and ``count``, and the average (``avg``).

    Args:
        ema: if True, ``avg`` is an exponential moving average that starts at 0 and keeps 0.9 of itself at each update.
    """

    def __init__(self, ema: bool = False) -> None:
        self.ema = ema
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val: float | torch.Tensor, n: int = 1) -> None:
        """Take in ``val`` (a number or a tensor of one element), which stands for ``n`` samples."""
        self.val = _number(val)
        self.count += n
        self.sum += n * self.val
        self.avg = 0.9 * self.avg + 0.1 * self.val if self.ema else self.sum / self.count


class MetricMeter:
    """One :class:`AverageMeter` for each name; ``str()`` gives ``name val (avg)`` for all, as in the training log."""

    def __init__(self, delimiter: str = " ") -> None:
        self.delimiter = delimiter
        self.meters: defaultdict[str, AverageMeter] = defaultdict(AverageMeter)

    def update(self, input_dict: Mapping[str, float | torch.Tensor] | None) -> None:
        """Take in a dictionary of numbers or one-element tensors; None is ignored, anything else a TypeError."""
        if input_dict is None:
            return
        if not isinstance(input_dict, dict):
            raise TypeError(f"MetricMeter.update() takes a dict, not {type(input_dict).__name__}")
        for key, value in input_dict.items():
            self.meters[key].update(value)

    def __str__(self) -> str:
        return self.delimiter.join(f"{key} {meter.val:.4f} ({meter.avg:.4f})" for key, meter in self.meters.items())
