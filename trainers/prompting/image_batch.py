"""Images of a training step or an evaluation, as a method sees them: features f(x), and f(x_c) with blocks pasted in.

:class:`ImageBatch` encodes pixels. :class:`StoredBatch` looks features up in a :class:`FeatureStore` first, and
:class:`ViewBatch` in a :class:`ViewCache` of augmented training images; both read pixels only for missing features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import distributed
from .backbone import Backbone
from .data import image_of
from .distributed import Share
from .feature_store import FeatureStore, digest
from .paste import paste, uniform_of_paths
from .random_states import seeded_view

CHUNK = 256  # class-conditional images pasted and encoded at a time
GRADIENT_CHUNK = 64  # the same where activations are held for a gradient

Key = tuple[int, int, int, int, int]  # image, view, class (-1: none), top, left


class ImageBatch:
    """B images (B, 3, H, W), normalised, on the encoder's device, and features of their class-conditional copies.

    At test time ``paths`` are their paths relative to the data root; in training None. ``share`` says which rows of a
    training batch they are, where several processes work on it.
    """

    def __init__(
        self,
        backbone: Backbone,
        pixels: Tensor,
        paths: Optional[Sequence[str]] = None,
        share: Optional[Share] = None,
    ) -> None:
        self.backbone, self.pixels, self.paths, self.share = backbone, pixels, paths, share
        self._raw: Optional[Tensor] = None

    def __len__(self) -> int:
        return len(self.pixels) if self.paths is None else len(self.paths)

    def raw_features(self) -> Tensor:
        """(B, E) features as the encoder returns them, computed once, without a graph."""
        if self._raw is None:
            with torch.no_grad():
                self._raw = self._encode()
        return self._raw

    def features(self) -> Tensor:
        """f(x): (B, E), of unit length."""
        return F.normalize(self.raw_features(), dim=-1)

    def pasted(self, blocks: Tensor, classes: Tensor, places: Tensor, store: bool = True) -> Tensor:
        """f(x_c), features of images with a block replaced by a visual prompt (3.2.1): (B, N, E), of unit length.

        Blocks that require gradients get them through the frozen encoder. Activations are then held for one chunk at a
        time and recomputed in the backward pass, so memory does not grow with B * N.

        Args:
            blocks: (C, 3, h, w) visual prompts, normalised like the images.
            classes: (B, N) classes c for each image.
            places: (B, 2) top and left of the block, the same for all classes of an image.
            store: whether the features may serve other runs, unlike those of blocks that this run learned.
        """
        owner = torch.arange(len(self)).repeat_interleave(classes.shape[1])
        raw = self._encode_pasted(blocks, owner, classes.flatten(), places, store)
        return F.normalize(raw, dim=-1).view(*classes.shape, -1)

    def uniform(self, seed: int) -> Tensor:
        """(B, 2) numbers in [0, 1) that place the blocks: of (seed, path) at test time, else from torch's state."""
        if self.paths is None:
            total, rows = (len(self), slice(None)) if self.share is None else (self.share.total, self.share.rows)
            return torch.rand(total, 2, dtype=torch.float64)[rows]
        return uniform_of_paths(self.paths, seed)

    def _encode(self) -> Tensor:
        return self.backbone.encode_image(self.pixels)

    def _encode_pasted(self, blocks: Tensor, owner: Tensor, classes: Tensor, places: Tensor, store: bool) -> Tensor:
        """(P, E) of P pairs of an image (its row in ``owner``) and a class, not of unit length."""
        return encode_pasted(self.backbone, self.pixels, blocks, owner, classes, places)


def encode_pasted(
    backbone: Backbone, pixels: Tensor, blocks: Tensor, owner: Tensor, classes: Tensor, places: Tensor
) -> Tensor:
    """Paste and encode in chunks: P pairs of an image (its row in ``owner``) and a class -> (P, E)."""

    def encode(i: Tensor, c: Tensor) -> Tensor:  # indexing in here: nothing pasted is retained
        # With several CPU threads the gradient of blocks[c] would be summed in any order.
        chosen = blocks.index_select(0, c.to(blocks.device))
        return backbone.encode_image(paste(pixels[i], chosen, places[i]))

    learning = blocks.requires_grad and torch.is_grad_enabled()
    chunk = GRADIENT_CHUNK if learning else CHUNK
    run = partial(checkpoint, encode, use_reentrant=False) if learning else encode
    with torch.set_grad_enabled(learning):
        return torch.cat([run(i, c) for i, c in zip(owner.split(chunk), classes.split(chunk))])


class StoredBatch(ImageBatch):
    """Test images whose features may be in a store, under their :func:`image_key`.

    ``read`` turns rows into pixels on the encoder's device; it is called for images of which something is missing.
    """

    def __init__(
        self, backbone: Backbone, paths: Sequence[str], store: FeatureStore, keys: Sequence[bytes], read: Callable
    ) -> None:
        super().__init__(backbone, torch.empty(0), paths)
        self._store, self._keys, self._read = store, keys, read

    def _encode(self) -> Tensor:
        found = self._store.look_up(self._keys, lambda rows: self.backbone.encode_image(self._read(rows)))
        return found.to(self.backbone.logit_scale.device)

    def _encode_pasted(self, blocks: Tensor, owner: Tensor, classes: Tensor, places: Tensor, store: bool) -> Tensor:
        at, pairs = places.tolist(), zip(owner.tolist(), classes.tolist())
        keys = [digest(self._keys[i], *at[i], self._store.block_digest(blocks, c)) for i, c in pairs]

        def encode(missing: list[int]) -> Tensor:
            images, rows = owner[missing].unique(return_inverse=True)
            pixels = self._read(images.tolist())
            return encode_pasted(self.backbone, pixels, blocks, rows, classes[missing], places[images])

        return self._store.look_up(keys, encode, store).to(self.backbone.logit_scale.device)


class ViewCache:
    """R augmented views of every training image, each encoded once (``VIEWS``).

    A view and the place of its block are functions of (seed, image, number of the view). Its pixels are made only when
    a feature is missing: its own at first, and that of a class-conditional copy when mining first asks for that class.
    So later epochs hardly touch images. Memory: N * R * E numbers, and as many again for each class asked for.

    Args:
        items: N images with ``impath`` and ``label``.
        transform: the augmentation, PIL image -> (3, H, W).
        views: R.
        room: bytes of images that stay decoded; the others are read again when needed.
    """

    def __init__(
        self, backbone: Backbone, items: Sequence[Any], transform: Callable, views: int, seed: int, room: float = 2**30
    ) -> None:
        self.backbone, self.items, self.transform, self.views, self.seed = backbone, items, transform, views, seed
        self._decoded: dict[int, Any] = {}
        self._room = room
        self._features: dict[Key, Tensor] = {}
        self._groups: list[Tensor] = []  # (n, 5) keys that were encoded together, in that order
        self._group_of: dict[Key, int] = {}  # group of the keys that an earlier process encoded
        draw = torch.Generator().manual_seed(seed)
        self.uniform = torch.rand(len(items), views, 2, dtype=torch.float64, generator=draw)

    def __len__(self) -> int:
        """Number of cached features."""
        return len(self._features)

    def batch(self, index: Tensor, epoch: int) -> ViewBatch:
        """The images numbered ``index`` (B,), in the view whose turn it is in an epoch."""
        return ViewBatch(self, index.tolist(), epoch % self.views)

    def pixels(self, i: int, view: int) -> Tensor:
        """(3, H, W) of a view."""
        image = self._decoded.get(i) or image_of(self.items[i])
        size = 3 * image.width * image.height
        if i not in self._decoded and self._room >= size:
            self._decoded[i], self._room = image, self._room - size
        with seeded_view(self.seed, i, view):
            return self.transform(image)

    def look_up(self, keys: Sequence[Key], blocks: Optional[Tensor] = None) -> Tensor:
        """(P, E) features of P keys, not of unit length; missing ones are encoded.

        The last digits of a feature depend on what is encoded with it, so a resumed run encodes in the same groups.
        """
        for key in keys:
            if key not in self._features and key in self._group_of:
                self._encode([tuple(k) for k in self._groups[self._group_of[key]].tolist()], blocks)
        missing = list(dict.fromkeys(key for key in keys if key not in self._features))
        if missing:
            self._groups.append(torch.tensor(missing, dtype=torch.int32))
            self._encode(missing, blocks)
        return torch.stack([self._features[key] for key in keys])

    def _encode(self, keys: Sequence[Key], blocks: Optional[Tensor]) -> None:
        """Encode keys of one view, all of them with a class or all without."""
        place_of = {key[0]: key[3:] for key in sorted(keys)}
        position = {i: n for n, i in enumerate(place_of)}
        pixels = torch.stack([self.pixels(i, keys[0][1]) for i in place_of]).to(self.backbone.logit_scale.device)
        rows = torch.tensor([position[key[0]] for key in keys])
        if keys[0][2] < 0:
            features = self.backbone.encode_image(pixels[rows])
        else:
            classes, places = torch.tensor([key[2] for key in keys]), torch.tensor(list(place_of.values()))
            features = encode_pasted(self.backbone, pixels, blocks, rows, classes, places)
        self._features.update(zip(keys, features))

    def state_dict(self) -> dict[str, Tensor]:
        """What was encoded together, in order."""
        sizes = torch.tensor([len(group) for group in self._groups], dtype=torch.int32)
        return {"keys": torch.cat([torch.empty(0, 5, dtype=torch.int32), *self._groups]), "sizes": sizes}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Encode in the groups of the run whose :meth:`state_dict` this is, once their features are asked for."""
        if state["keys"].shape[1] == 5:  # else of an earlier version: features are encoded in new groups
            self._groups = list(state["keys"].split(state["sizes"].tolist()))
            self._group_of = {tuple(key): n for n, group in enumerate(self._groups) for key in group.tolist()}


class ViewBatch(ImageBatch):
    """Training images of a :class:`ViewCache` in one view."""

    def __init__(self, cache: ViewCache, index: list[int], view: int) -> None:
        super().__init__(cache.backbone, torch.empty(0))
        self._cache, self._index, self._view = cache, index, view

    def __len__(self) -> int:
        return len(self._index)

    def uniform(self, seed: int) -> Tensor:
        return self._cache.uniform[self._index, self._view]

    def _encode(self) -> Tensor:
        return self._cache.look_up([(i, self._view, -1, 0, 0) for i in self._index])

    def _encode_pasted(self, blocks: Tensor, owner: Tensor, classes: Tensor, places: Tensor, store: bool) -> Tensor:
        at, pairs = places.tolist(), zip(owner.tolist(), classes.tolist())
        return self._cache.look_up([(self._index[i], self._view, c, *at[i]) for i, c in pairs], blocks)


def training_images(
    batch: dict[str, Any], backbone: Backbone, views: Optional[ViewCache], epoch: int
) -> tuple[ImageBatch, Tensor, Share]:
    """This process's images of a batch from a loader, their labels (B,), and which part of the batch they are."""
    device = backbone.logit_scale.device
    if views is None:  # the loader has left out what others work on
        share = distributed.share(int(batch["total"][0]) if "total" in batch else len(batch["label"]))
        images = ImageBatch(backbone, batch["img"].to(device, non_blocking=True), share=share)
        return images, batch["label"].to(device), share
    share = distributed.share(len(batch["index"]))
    return views.batch(batch["index"][share.rows], epoch), batch["label"][share.rows].to(device), share
