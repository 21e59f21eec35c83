"""Hard negatives, the min-max contrastive loss (Eq. 3) and visual prompt selection (section 3.2.2).

Everything is computed in log space and at least in float32, whatever the precision of the encoders. Probabilities are
softmaxes over all C classes, for the original image and for every class-conditional image.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOSSES = ("infonce", "paper")


def log_probabilities(logits: Tensor) -> Tensor:
    """log p(c|x), a softmax over the last dimension; half precision is converted to float32 first."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def top_classes(logits: Tensor, k: int) -> Tensor:
    """The k most probable classes: (B, C) -> (B, min(k, C)), best first; of equals the lower label comes first."""
    # A stable sort, because the order of ties in topk depends on the device.
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def hard_negatives(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """c_1 … c_K: the K most probable classes of the original image other than its label y (section 3.2.2).

    (B, C) logits and (B,) labels -> (B, min(K, C - 1)) labels, most probable first.
    """
    ranked = top_classes(logits, logits.shape[-1])
    rank = (ranked == label.unsqueeze(1)).long().argmax(dim=1, keepdim=True)  # of y; the classes behind it move up
    place = torch.arange(min(k, logits.shape[-1] - 1), device=logits.device).expand(len(label), -1)
    return ranked.gather(1, place + (place >= rank))


def min_max_loss(
    positive: Tensor, positive_conditional: Tensor, negative: Tensor, negative_conditional: Tensor, form: str
) -> Tensor:
    """Eq. 3: L = -log( min(p(y|x), p(y|x_y)) / sum_k max(p(c_k|x), p(c_k|x_{c_k})) ), per image.

    Args:
        positive: (B,) log p(y|x).
        positive_conditional: (B,) log p(y|x_y).
        negative: (B, K) log p(c_k|x).
        negative_conditional: (B, K) log p(c_k|x_{c_k}).
        form: ``"paper"`` as printed (unbounded below: the positive is not in the denominator), ``"infonce"`` with the
            positive added to the denominator, as in InfoNCE, which the paper extends (then L >= 0).

    Returns (B,) losses; zero without negatives (C = 1).
    """
    hardest_positive = torch.minimum(positive, positive_conditional)
    hardest_negatives = torch.maximum(negative, negative_conditional)
    if hardest_negatives.shape[1] == 0:
        return hardest_positive * 0
    if form == "infonce":
        hardest_negatives = torch.cat([hardest_positive.unsqueeze(1), hardest_negatives], dim=1)
    return hardest_negatives.logsumexp(dim=1) - hardest_positive


def select(original: Tensor, candidates: Tensor, conditional: Tensor) -> Tensor:
    """Visual prompt selection: argmax_k max(p(c_k|x), p(c_k|x_{c_k})) over the top-K classes (section 3.2.2).

    (B, C) log p(c|x), (B, K) the top-K classes of x and (B, K) log p(c_k|x_{c_k}) -> (B, C) scores whose argmax is the
    prediction: log max(p(c_k|x), p(c_k|x_{c_k})) for the candidates, -inf for all other classes.
    """
    winners = torch.maximum(original.gather(1, candidates), conditional)
    return torch.full_like(original, float("-inf")).scatter(1, candidates, winners)
