"""Files, images, seeds and names."""

from __future__ import annotations

import json
import os
import random
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import SequenceMatcher
from functools import cache
from typing import IO, Any

import numpy as np
import PIL
import torch
from PIL import Image

__all__ = [
    "atomic_write",
    "check_availability",
    "check_isfile",
    "collect_env_info",
    "get_most_similar_str_to_a_from_b",
    "listdir_nohidden",
    "mkdir_if_missing",
    "read_image",
    "read_json",
    "set_random_seed",
    "tolist_if_not",
    "write_json",
]


def mkdir_if_missing(dirname: str) -> None:
    """Create ``dirname`` and its parents; an existing folder, and "" for the current one, are fine."""
    if dirname:
        os.makedirs(dirname, exist_ok=True)


def check_isfile(fpath: str) -> bool:
    """Tell whether ``fpath`` is a file, with a warning where it is not."""
    found = os.path.isfile(fpath)
    if not found:
        warnings.warn(f'No file found at "{fpath}"', stacklevel=2)
    return found


@contextmanager
def atomic_write(fpath: str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes the name ``fpath`` only once it is completely written.

    The text goes to a temporary file in the same folder (a rename is atomic only within one file system), which is
    pushed to the disk and then renamed. Whatever goes wrong before that leaves an older ``fpath`` as it was and no
    temporary file behind.
    """
    # not tempfile.mkstemp, whose files only their owner may read whatever the umask says
    partial = f"{fpath}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, fpath)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(partial)
        raise


def read_json(fpath: str) -> Any:
    """Return the content of a JSON file."""
    with open(fpath, encoding="utf-8") as stream:
        return json.load(stream)


def write_json(obj: Any, fpath: str) -> None:
    """Write ``obj`` as JSON, indented by 4, in one step (see :func:`atomic_write`); missing folders are created."""
    mkdir_if_missing(os.path.dirname(fpath))
    with atomic_write(fpath, "w") as stream:
        json.dump(obj, stream, indent=4, separators=(",", ": "))


def set_random_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (the CPU and every GPU)."""
    for seeder in (random.seed, np.random.seed, torch.manual_seed, torch.cuda.manual_seed_all):
        seeder(seed)


def read_image(path: str) -> Image.Image:
    """Return the image at ``path``, fully decoded, in RGB; Pillow's errors as they are."""
    with Image.open(path) as image:
        return image.convert("RGB")


@cache  # asks pip and others, which takes a second, and nothing changes while a process lives
def collect_env_info() -> str:
    """Return PyTorch's multi-line report on the system, with Pillow's version added."""
    from torch.utils.collect_env import get_pretty_env_info  # slow to import, and needed once a run at most

    return f"{get_pretty_env_info()}\n        Pillow ({PIL.__version__})"


def listdir_nohidden(path: str, sort: bool = False) -> list[str]:
    """Return the names in folder ``path`` that do not start with a dot; sorted if asked for, else in any order."""
    names = (name for name in os.listdir(path) if name[0] != ".")
    return sorted(names) if sort else list(names)


def get_most_similar_str_to_a_from_b(a: str, b: Sequence[str]) -> str | None:
    """Return the string of ``b`` most like ``a`` (the last of several equally like it); None where ``b`` is empty."""
    return max(reversed(list(b)), key=lambda text: SequenceMatcher(None, a, text).ratio(), default=None)


def check_availability(requested: str, available: Sequence[str]) -> None:
    """Raise a ValueError that proposes the nearest name unless ``requested`` is one of ``available``."""
    if requested in available:
        return
    nearest = get_most_similar_str_to_a_from_b(requested, available)
    raise ValueError(f"[{requested}] is not one of {list(available)} (do you mean [{nearest}]?)")


def tolist_if_not(x: Any) -> list:
    """Return ``x`` if it is a list, else a list of it alone."""
    return x if isinstance(x, list) else [x]
