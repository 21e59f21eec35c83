"""Top-k accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["compute_accuracy"]


def compute_accuracy(
    output: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor, topk: Sequence[int] = (1,)
) -> list[torch.Tensor]:
    """Return the accuracy among the k highest scores, for each k of ``topk``.

    Args:
        output: scores, (batch, classes); of a tuple or list the first element counts.
        target: labels, (batch,).

    Returns:
        One tensor of shape (1,), in percent, for each k.
    """
    scores = output[0] if isinstance(output, (tuple, list)) else output
    ranked = scores.topk(max(topk), dim=1).indices  # (batch, max k), best first
    hits = (ranked == target.view(-1, 1)).float().sum(dim=0).cumsum(dim=0)  # [k - 1]: labels among the k best
    return [hits[k - 1 : k] * (100.0 / target.shape[0]) for k in topk]
