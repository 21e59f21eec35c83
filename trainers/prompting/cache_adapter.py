"""Tip-Adapter's cache of training features, whose values are added to the logits (Zhang et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn as nn

GRID = tuple(product((0.0, 0.25, 0.5, 1.0, 2.0, 4.0), (1.0, 3.0, 5.5, 8.0)))  # of alpha and beta, for search()


class CacheAdapter(nn.Module):
    """alpha * sum_n exp(-beta (1 - cos(f(x), k_n))) [y_n = c], to be added to the logit of class c.

    A key k_n is the image feature of a training image, learned from there on; y_n is its label. An empty cache adds
    nothing, nor does a key whose class is not among the current ones, so unseen classes keep their scores.

    Args:
        unit_length: whether keys are scaled to unit length again after they were learned; Tip-Adapter-F leaves them.

    Attributes:
        keys: (N, E), a parameter; N is 0 until :meth:`fill`.
        labels: (N,) y_n among the current classes; -1 for other classes, and for all keys of an emptied cache.
    """

    def __init__(self, n_features: int, n_cls: int, alpha: float, beta: float, unit_length: bool = True) -> None:
        super().__init__()
        self.n_cls, self.unit_length = n_cls, unit_length
        self.keys = nn.Parameter(torch.zeros(0, n_features))
        self.register_buffer("labels", torch.full((0,), -1))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.filled = False  # cached to avoid a device sync in every step
        self.register_load_state_dict_post_hook(CacheAdapter._update_filled)

    def _update_filled(self, _: Any = None) -> None:
        self.filled = bool((self.labels >= 0).any())

    def _resize(self, n_keys: int) -> None:
        self.keys.data = self.keys.new_zeros(n_keys, self.keys.shape[1])  # the optimizer still holds the parameter
        self.labels = self.labels.new_full((n_keys,), -1)

    @torch.no_grad()
    def fill(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Store (N, E) image features, scaled to unit length, and their (N,) labels."""
        self._resize(len(features))
        self.keys.copy_(nn.functional.normalize(features, dim=-1))
        self.labels.copy_(labels)
        self._update_filled()

    def empty(self) -> None:
        """Forget all keys."""
        self.labels.fill_(-1)
        self._update_filled()

    def affinity(self, image_features: torch.Tensor) -> torch.Tensor:
        """(…, E) of unit length -> (…, N) cosines with the keys."""
        with torch.autocast(self.keys.device.type, enabled=False):  # exponentials magnify what half precision loses
            keys = nn.functional.normalize(self.keys, dim=-1) if self.unit_length else self.keys
            return image_features.to(keys.dtype) @ keys.t()

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(…, E) image features of unit length -> (…, C), to be added to the logits."""
        return self.cache_logits(self.affinity(image_features), self.alpha, self.beta)

    def cache_logits(self, affinity: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """(…, N) cosines with the keys -> (…, C), to be added to the logits."""
        summed = affinity.new_zeros(*affinity.shape[:-1], self.n_cls + 1)  # the last column takes other classes' keys
        labels = torch.where(self.labels >= 0, self.labels, self.n_cls)
        return alpha * summed.index_add(-1, labels, (-beta * (1 - affinity)).exp())[..., :-1]

    @torch.no_grad()
    def search(
        self,
        image_features: torch.Tensor,
        logits: torch.Tensor,
        label: torch.Tensor,
        grid: Sequence[tuple[float, float]] = GRID,
    ) -> None:
        """Choose alpha and beta from pairs of them by accuracy on N validation images; of equals the first.

        Takes (N, E) features of unit length and (N, C) logits without the cache; prints what was chosen.
        """
        affinity, accuracy, of_beta = self.affinity(image_features), {}, {}
        for alpha, beta in grid:
            if beta not in of_beta:  # the costly part; pairs with the same beta are best neighbours
                of_beta = {beta: self.cache_logits(affinity, torch.tensor(1.0), torch.tensor(beta))}
            scores = logits + torch.tensor(alpha) * of_beta[beta]
            accuracy[alpha, beta] = 100 * (scores.argmax(dim=1) == label).float().mean().item()
        alpha, beta = best = max(accuracy, key=accuracy.get)
        self.alpha.fill_(alpha)
        self.beta.fill_(beta)
        chosen = f"chosen on {len(label)} validation images ({accuracy[best]:.1f} %)"
        print(f"Adapter: alpha {alpha:g}, beta {beta:g}, {chosen}")

    def remap_classes(self, state: dict[str, torch.Tensor], rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Express a state dict of other classes in the current ones, see ``checkpoint.remap_state_to_classes``."""
        if state["keys"].shape[1:] == self.keys.shape[1:]:
            self._resize(len(state["keys"]))
        current = {known: i for i, known in enumerate(rows) if known >= 0}
        return {**state, "labels": torch.tensor([current.get(label, -1) for label in state["labels"].tolist()]).long()}
