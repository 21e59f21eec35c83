"""Training images as a source of features: fresh from pixels, or from a bank of views that are encoded once.

Both have ``features()``, f(x): (B, E), and ``conditional(classes)``, f(x_c): (B, N) classes -> (B, N, E).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .images import read_image

Encode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class FeatureBank:
    """R augmented views of every training image, each encoded once.

    A view and the place of its block are functions of (seed, image, number of the view). Images are kept decoded as far
    as there is room, and a view's pixels are made only when something of it has to be encoded: its own feature the
    first time, and that of a class-conditional copy when mining asks for a class it has not asked for. So later epochs
    hardly touch images.

    Memory: N * R * E numbers for the views and as many again for each class that is asked for.

    Args:
        items: N images with ``impath`` and ``label``.
        tfm: the augmentation, PIL image -> (3, H, W).
        views: R.
        seed: of the views.
        encode: (B, 3, H, W) -> (B, E).
        encode_pairs: images (B, 3, H, W), places (B, 2), (P,) rows, (P,) classes -> (P, E).
        draw_places: from (n, 2) numbers in [0, 1) to (n, 2) places.
        device: where the features are.
        room: bytes of images that are kept decoded; the others are read again when they are needed.
    """

    def __init__(
        self,
        items: Sequence[Any],
        tfm: Callable[[Any], torch.Tensor],
        views: int,
        seed: int,
        encode: Callable[[torch.Tensor], torch.Tensor],
        encode_pairs: Encode,
        draw_places: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
        room: float = 2**30,
    ) -> None:
        self.items, self.tfm, self.views, self.seed, self.device = items, tfm, views, seed, device
        self.encode, self.encode_pairs = encode, encode_pairs
        self._decoded: dict[int, Any] = {}
        self._room = room
        self._rows: dict[tuple[int, int, int], int] = {}  # (image, view, class, -1 for none) -> row of _features
        self._features = torch.empty(0)
        self._groups: list[torch.Tensor] = []  # (n, 3) keys of what was encoded together, in that order
        self._earlier: dict[tuple[int, int, int], int] = {}  # of those the ones that another process encoded
        uniform = torch.rand(len(items), views, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.places = draw_places(uniform.view(-1, 2)).reshape(len(items), views, 2)

    def __len__(self) -> int:
        """Features that it holds."""
        return len(self._rows)

    def batch(self, index: torch.Tensor, view: int) -> BankBatch:
        """(B,) numbers of images, in one of their views."""
        return BankBatch(self, index.tolist(), view % self.views)

    def pixels(self, i: int, view: int) -> torch.Tensor:
        """(3, H, W) of a view."""
        image = self._decoded.get(i) or read_image(self.items[i].impath)
        size = 3 * image.width * image.height
        if i not in self._decoded and self._room >= size:
            self._decoded[i], self._room = image, self._room - size
        digest = hashlib.blake2b(f"{self.seed}/{i}/{view}".encode(), digest_size=4).digest()
        with seeded(int.from_bytes(digest, "little")):
            return self.tfm(image)

    def look_up(self, index: Sequence[int], view: int, classes: Sequence[int]) -> torch.Tensor:
        """(P, E) features of P pairs of an image and a class, -1 for the image as it is; what is missing is encoded."""
        keys = [(i, view, c) for i, c in zip(index, classes)]
        for key in keys:
            if key in self._earlier and key not in self._rows:
                self._encode([tuple(k) for k in self._groups[self._earlier[key]].tolist()])
        missing = list(dict.fromkeys(key for key in keys if key not in self._rows))
        if missing:
            self._groups.append(torch.tensor(missing, dtype=torch.int32))
            self._encode(missing)
        return self._features[[self._rows[key] for key in keys]]

    def _encode(self, missing: Sequence[tuple[int, int, int]]) -> None:
        """Encode what is not there yet, all of one view."""
        view = missing[0][1]
        images = sorted({i for i, _, _ in missing})
        pixels = torch.stack([self.pixels(i, view) for i in images]).to(self.device)
        row = {i: n for n, i in enumerate(images)}
        plain = [key for key in missing if key[2] < 0]
        pasted = [key for key in missing if key[2] >= 0]
        if plain:
            self._add(plain, self.encode(pixels[[row[i] for i, _, _ in plain]]))
        if pasted:
            rows, c = ([row[i] for i, _, _ in pasted], [c for _, _, c in pasted])
            places = self.places[images, view]
            self._add(pasted, self.encode_pairs(pixels, places, torch.tensor(rows), torch.tensor(c)))

    def state(self) -> dict[str, torch.Tensor]:
        """What was encoded together. The last digits of a feature hang on it, so a run that goes on does the same."""
        sizes = torch.tensor([len(group) for group in self._groups], dtype=torch.int32)
        return {"keys": torch.cat([torch.empty(0, 3, dtype=torch.int32), *self._groups]), "sizes": sizes}

    def set_state(self, state: dict[str, torch.Tensor]) -> None:
        """Encode what is asked for as the bank did whose :meth:`state` this is; nothing is encoded now."""
        self._groups = list(state["keys"].split(state["sizes"].tolist())) if len(state["sizes"]) else []
        self._earlier = {tuple(key): n for n, group in enumerate(self._groups) for key in group.tolist()}

    def _add(self, keys: Sequence[tuple[int, int, int]], features: torch.Tensor) -> None:
        start, needed = len(self._rows), len(self._rows) + len(keys)
        if needed > len(self._features):  # doubling, so that a feature is copied a few times at most
            grown = features.new_empty(max(needed, 2 * len(self._features)), features.shape[1])
            grown[:start] = self._features[:start].view(start, features.shape[1])
            self._features = grown
        self._features[start:needed] = features
        self._rows.update((key, start + n) for n, key in enumerate(keys))


class BankBatch:
    """Images of a :class:`FeatureBank` in one view."""

    def __init__(self, bank: FeatureBank, index: Sequence[int], view: int) -> None:
        self.bank, self.index, self.view = bank, index, view

    def features(self) -> torch.Tensor:
        """f(x): (B, E), of unit length."""
        return self.bank.look_up(self.index, self.view, [-1] * len(self.index))

    def conditional(self, classes: torch.Tensor) -> torch.Tensor:
        """f(x_c) of (B, N) classes for each image: (B, N, E), of unit length."""
        n = classes.shape[1]
        owners = [i for i in self.index for _ in range(n)]
        return self.bank.look_up(owners, self.view, classes.flatten().tolist()).view(len(self.index), n, -1)


class _Numbers(Dataset):
    """What is left of a training image when its pixels are not needed."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self.items[i]
        return {"index": i, "label": item.label, "domain": item.domain, "impath": item.impath}


def numbers_loader(items: Sequence[Any], batch_size: int) -> DataLoader:
    """Numbers and labels of images in random order, in the batches of Dassl's training loader."""
    return DataLoader(_Numbers(items), batch_size=batch_size, shuffle=True, drop_last=len(items) >= batch_size)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All sources of random numbers an augmentation may use depend on ``seed``, and are afterwards as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
