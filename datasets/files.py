"""Listing image folders and reading annotation files, with errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, TypeVar

from trainers.prompting.data import ENDINGS
from trainers.prompting.errors import UserError
from trainers.prompting.names import printable, relative_path

T = TypeVar("T")
HIDDEN = (".", "@eaDir")  # beginnings of folders that are not shown; the second holds a NAS's thumbnails


def list_folders(path: str) -> list[str]:
    """Return the sorted names of the folders in ``path`` without hidden ones. Raises UserError where it is missing."""
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder; unpack the images of the data set there (docs/data.md)")
    with os.scandir(path) as found:
        return _sorted(path, [item.name for item in found if item.is_dir() and not item.name.startswith(HIDDEN)])


def list_images(path: str) -> list[str]:
    """Return the sorted names of the image files in ``path``, judged by their endings, without hidden ones."""
    return _sorted(path, [name for name in os.listdir(path) if is_image(name)])


def walk_images(path: str, others: list[str]) -> list[str]:
    """Return the sorted paths of the image files in ``path`` and below, relative to it, with "/"; no hidden ones.

    The paths of all other files are appended to ``others``.
    """
    found = []
    for folder, below, names in os.walk(path, followlinks=True):
        below[:] = [name for name in below if not name.startswith(HIDDEN)]
        found += [relative_path(os.path.join(folder, name), path) for name in names if is_image(name)]
        others += [os.path.join(folder, name) for name in names if not is_image(name) and name[0] != "."]
    return _sorted(path, found)


def is_image(name: str) -> bool:
    """Return whether a file name is not hidden and ends like an image that Pillow decodes here."""
    return not name.startswith(".") and name.lower().endswith(ENDINGS)


def _sorted(path: str, names: list[str]) -> list[str]:
    """Sort names. Raises UserError for bytes that are not UTF-8: JSON files could not store such a name."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: {printable(name)} is not a UTF-8 file name; rename it") from error
    return sorted(names)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn errors while reading an annotation file into a UserError of one line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: no such file; it is part of the data set (docs/data.md)") from error
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not in the data set's format ({reason}); download it again") from error


def read_lines(path: str) -> list[str]:
    """Return the non-empty lines of a text file, stripped. Raises UserError where there are none."""
    with reading(path), open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file if line.strip()]
        if not lines:
            raise ValueError("it is empty")
        return lines


def parse_lines(path: str, parse: Callable[[str], T]) -> list[T]:
    """Parse every line of an annotation file. Raises UserError."""
    lines = read_lines(path)
    with reading(path):
        return [parse(line) for line in lines]


def load_mat(path: str) -> dict[str, Any]:
    """Read a MATLAB file (version 5). Raises UserError."""
    from scipy.io import loadmat

    with reading(path):
        try:
            return loadmat(path)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 (damaged files raise errors of SciPy, zlib and others)
            raise ValueError(error) from error
