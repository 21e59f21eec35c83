"""Reading images, so that one that cannot be read is named, and keeping few-shot images decoded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Optional

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

# Only these are tried, whatever a file is called: Pillow knows formats that start another program (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 178_956_970  # Pillow's own limit, half a gigabyte in RGB; from half of it on Pillow would warn
READING = 1  # version of what read_image makes of a file; features that are kept hang on it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: str) -> Image.Image:
    """The image at ``path``, fully decoded, in RGB with 8 bits, as CoOp reads it (``Image.convert``).

    So transparency is left out, of several frames the first one counts, and an image is not turned as its EXIF
    orientation says. Beyond CoOp, where Pillow would clip all but the darkest to white: pixels of 16 bits (and whole
    numbers of more) are scaled, 65535 being white; so are floats, white being 1 where none is above it, else 255.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read or decoded, for whatever reason (permissions, not one of ``FORMATS``, truncated, more
            than ``MAX_PIXELS`` pixels or texts that unpack to megabytes).
        Both carry a single argument, one line that names the path, so that a DataLoader can raise them again, as the
        same class, out of a worker process.
    """
    name = " ".join(path.splitlines())
    try:
        with _open(path) as image:
            image.info.pop("transparency", None)  # Pillow warns that it is left out
            return (_scaled(image) if image.mode[0] in "IF" else image).convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image file at {name}") from error
    except UnidentifiedImageError as error:
        raise OSError(f"cannot decode image {name}: not an image of a known format") from error
    # Pillow's decoders raise nearly anything on damaged files: SyntaxError, struct.error, ValueError, EOFError, …
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).splitlines()) or type(error).__name__
        raise OSError(f"cannot decode image {name}: {reason}") from error


@contextmanager
def _open(path: str) -> Iterator[Image.Image]:
    """An image file of which only the header has been read."""
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, {MAX_PIXELS} are the limit")
        yield image


def _scaled(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits, or of floats, in 8 bits."""
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=np.inf, neginf=0)
    white = 65535.0 if image.mode[0] == "I" else 1.0 if pixels.max(initial=0) <= 1 else 255.0
    return Image.fromarray(np.rint(np.clip(pixels / white, 0, 1) * 255).astype(np.uint8))


class DecodedImages:
    """Images decoded once, in one block of memory.

    Args:
        size: bytes of all images together, 3 a pixel, as :func:`decoded_size` says.
        shared: worker processes use it too.

    Raises:
        RuntimeError: there is not so much shared memory (in a container it may be 64 MB).
    """

    def __init__(self, paths: Sequence[str], size: int, shared: bool = True) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8)
        if shared:
            self._memory.share_memory_()
        self._places: list[tuple[int, int, int]] = []  # offset, height, width
        offset = 0
        with ThreadPoolExecutor() as pool:
            for image in tqdm(pool.map(read_image, paths), "decoding", len(paths), leave=False, disable=None):
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
            with _open(path) as image:
                total += 3 * image.width * image.height
        except Exception:  # noqa: BLE001 (whatever is wrong with it is said when it is read)
            read_image(path)
            raise
        if total > limit:
            return None
    return total
