"""Blocks into images: where they go, and x, V_c -> x_c (section 3.2.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from .errors import UserError

LOCATIONS = ("random", "top", "bottom")


def block_size(image_size: int, height_ratio: float, width_ratio: float) -> tuple[int, int]:
    """(h, w) in pixels of a block that covers the given shares of an image. Raises UserError outside (0, 1]."""
    for key, ratio in (("BLOCK_HEIGHT", height_ratio), ("BLOCK_WIDTH", width_ratio)):
        if not 0 < ratio <= 1:
            raise UserError(f"TRAINER.LOGOPROMPT.{key} {ratio:g}: must be larger than 0 and at most 1, the whole image")
    return max(1, round(image_size * height_ratio)), max(1, round(image_size * width_ratio))


def uniform_numbers(key: str, n: int) -> list[float]:
    """n numbers in [0, 1) that depend on ``key`` alone: not on a random state, process or Python version."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4 * n).digest()
    return [int.from_bytes(digest[4 * i : 4 * i + 4], "little") / 2**32 for i in range(n)]


def uniform_of_paths(paths: Sequence[str], seed: int) -> torch.Tensor:
    """(B, 2) numbers in [0, 1) that depend on (seed, path) alone, for the places of blocks at test time.

    So a prediction depends neither on batch size, order nor workers. Paths are relative to the data root.
    """
    return torch.tensor([uniform_numbers(f"{seed}/{path}", 2) for path in paths], dtype=torch.float64).view(-1, 2)


def places_of(uniform: torch.Tensor, image_size: int, block: tuple[int, int], location: str) -> torch.Tensor:
    """(B, 2) numbers in [0, 1) -> (B, 2) places (top, left) in pixels of blocks of (h, w) pixels.

    With the location ``random`` every place that keeps the block inside the image is equally likely.
    """
    free = torch.tensor([image_size - block[0], image_size - block[1]])
    if location == "random":
        return (uniform * (free + 1)).long()
    top = {"top": 0, "bottom": int(free[0])}[location]
    return torch.tensor([top, int(free[1]) // 2]).expand(len(uniform), 2)


def paste(images: torch.Tensor, blocks: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Replace a block of every image by its visual prompt: x, V_c -> x_c (section 3.2.1).

    Args:
        images: (B, 3, H, W), which are not modified.
        blocks: (B, 3, h, w) in the same range and normalisation as the images; may require gradients.
        places: (B, 2) rows of (top, left). Raises ValueError for one where the block does not fit inside its image.
    """
    (height, width), (h, w) = images.shape[-2:], blocks.shape[-2:]
    if ((places < 0) | (places > places.new_tensor([height - h, width - w]))).any():
        raise ValueError(f"a block of {h}x{w} pixels does not fit inside an image of {height}x{width}")
    places = places.to(images.device)
    rows = torch.arange(height, device=images.device) - places[:, :1]  # (B, H): row within the block, if any
    columns = torch.arange(width, device=images.device) - places[:, 1:]
    inside = ((rows >= 0) & (rows < h)).unsqueeze(2) & ((columns >= 0) & (columns < w)).unsqueeze(1)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices around the channel slice put the channel last: (B, H, W, 3).
    spread = blocks[sample, :, rows.clamp(0, h - 1).unsqueeze(2), columns.clamp(0, w - 1).unsqueeze(1)]
    return torch.where(inside.unsqueeze(1), spread.movedim(-1, 1).to(images.dtype), images)
