"""Reading images, so that one that cannot be read is named, and keeping few-shot images decoded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


def read_image(path: str) -> Image.Image:
    """The image at ``path``, fully decoded, in RGB.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read or decoded, for whatever reason (permissions, not an image, truncated, so large that
            Pillow takes it for a decompression bomb).
        Both carry a single argument, one line that names the path, so that a DataLoader can raise them again, as the
        same class, out of a worker process.
    """
    name = " ".join(path.splitlines())
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image file at {name}") from error
    except UnidentifiedImageError as error:
        raise OSError(f"cannot decode image {name}: not an image of a known format") from error
    # Pillow's decoders raise nearly anything on damaged files: SyntaxError, struct.error, ValueError, EOFError, …
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).splitlines()) or type(error).__name__
        raise OSError(f"cannot decode image {name}: {reason}") from error


class DecodedImages:
    """Images decoded once, in one block of memory that worker processes share.

    Args:
        size: bytes of all images together, 3 a pixel, as :func:`decoded_size` says.
    """

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8).share_memory_()
        self._places: list[tuple[int, int, int]] = []  # offset, height, width
        offset = 0
        with ThreadPoolExecutor() as pool:
            for image in pool.map(read_image, paths):
                pixels = torch.from_numpy(np.asarray(image).copy())
                self._memory[offset : offset + pixels.numel()] = pixels.flatten()
                self._places.append((offset, image.height, image.width))
                offset += pixels.numel()

    def __getitem__(self, i: int) -> Image.Image:
        offset, height, width = self._places[i]
        pixels = self._memory[offset : offset + 3 * height * width].view(height, width, 3)
        return Image.fromarray(pixels.numpy().copy())


def decoded_size(paths: Sequence[str], limit: float) -> Optional[int]:
    """Bytes that the images take decoded, without decoding them; None where that is more than ``limit``."""
    total = 0
    for path in paths:
        try:
            with Image.open(path) as image:
                total += 3 * image.width * image.height
        except Exception:  # noqa: BLE001 (whatever is wrong with it is said when it is read)
            read_image(path)
            raise
        if total > limit:
            return None
    return total
