"""Reading images, so that one that cannot be read is named."""

from __future__ import annotations

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
