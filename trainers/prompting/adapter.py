"""A cache of training features that adds to the logits (LoGoPrompt + adapter), after Tip-Adapter (Zhang et al.)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn

ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # tried by choose()
BETAS = (1.0, 3.0, 5.5, 8.0)


class CacheAdapter(nn.Module):
    """alpha * sum_n exp(-beta (1 - cos(f(x), k_n))) [y_n = c], to be added to the logit of class c.

    A key k_n is the image feature of a training image, then learned; y_n is its label. An empty cache adds nothing, and
    neither does a key of a class that is not at hand, so other classes keep their scores.

    Attributes:
        keys: (N, E), a parameter.
        labels: (N,) y_n among the classes at hand; -1 for a class that is not, and where the cache is empty.
        alpha, beta: scalars, not learned.

    Args:
        n_keys: N.
        n_features: E.
        n_cls: C, the classes at hand.
    """

    def __init__(self, n_keys: int, n_features: int, n_cls: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.n_cls = n_cls
        self.keys = nn.Parameter(torch.zeros(n_keys, n_features))
        self.register_buffer("labels", torch.full((n_keys,), -1))
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.filled = False  # whether there are keys of classes at hand; known here so that no step has to ask a GPU
        self.register_load_state_dict_post_hook(lambda module, _: module._count())

    def _count(self) -> None:
        self.filled = bool((self.labels >= 0).any())

    @torch.no_grad()
    def fill(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Take (N, E) image features of unit length and their (N,) labels as they are."""
        self.keys.copy_(features)
        self.labels.copy_(labels)
        self._count()

    def empty(self) -> None:
        """Forget all keys."""
        self.labels.fill_(-1)
        self._count()

    def affinity(self, image_features: torch.Tensor) -> torch.Tensor:
        """(…, E) of unit length -> (…, N) cosines with the keys."""
        keys = nn.functional.normalize(self.keys, dim=-1)
        return image_features.to(keys.dtype) @ keys.t()

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(…, E) image features of unit length -> (…, C) what is added to the logits."""
        return self.additions(self.affinity(image_features), self.alpha, self.beta)

    def additions(self, affinity: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """(…, N) cosines with the keys -> (…, C) what is added to the logits."""
        added = affinity.new_zeros(*affinity.shape[:-1], self.n_cls + 1)  # one more for classes that are not at hand
        labels = torch.where(self.labels >= 0, self.labels, self.n_cls)
        return alpha * added.index_add(-1, labels, (-beta * (1 - affinity)).exp())[..., :-1]

    @torch.no_grad()
    def choose(self, image_features: torch.Tensor, logits: torch.Tensor, label: torch.Tensor) -> float:
        """Set alpha and beta to those of the grid with the highest accuracy on N validation images as they are, without
        selection; among equals the least alpha, then the least beta. Returns the accuracy in percent.

        Args:
            image_features: (N, E); logits: (N, C) without the cache; label: (N,).
        """
        affinity, best = self.affinity(image_features), -1.0
        for alpha in ALPHAS:
            for beta in BETAS:
                scores = logits + self.additions(affinity, torch.tensor(alpha), torch.tensor(beta))
                accuracy = 100 * (scores.argmax(dim=1) == label).float().mean().item()
                if accuracy > best:
                    best = accuracy
                    self.alpha.fill_(alpha)
                    self.beta.fill_(beta)
        return best

    def of_classes(self, state: dict[str, torch.Tensor], rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """See :func:`trainers.prompting.trainer.per_class_state`: the labels become those of the classes at hand."""
        here = torch.full((max([*rows, int(state["labels"].max()), 0]) + 2,), -1)  # the last entry is for label -1
        for own, known in enumerate(rows):
            if known >= 0:
                here[known] = own
        if state["keys"].shape != self.keys.shape and state["keys"].shape[1:] == self.keys.shape[1:]:
            # trained on another number of images
            self.keys = nn.Parameter(self.keys.new_zeros(state["keys"].shape))
            self.labels = self.labels.new_full(state["labels"].shape, -1)
        return {**state, "labels": here[state["labels"]]}
