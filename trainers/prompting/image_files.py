"""Image files that a user names: files, folders, and everything below them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Optional, Union

from .data import ENDINGS
from .names import relative_path

PathLike = Union[str, "os.PathLike[str]"]


class Source(NamedTuple):
    """An image file to predict."""

    path: str
    relative: str  # below the data root: decides where blocks are pasted
    problem: str = ""  # why it cannot be read


def find_images(
    paths: Iterable[PathLike], roots: Sequence[str] = (), skipped: Optional[Callable[[str], None]] = None
) -> Iterator[Source]:
    """The given files, and the images in given folders and their subfolders, in order of name; one at a time.

    In a folder, images are recognised by their suffix and hidden files are ignored; ``skipped`` is called with the path
    of every other file. Links are followed, except to a folder that contains them. An image's relative path is the one
    below the first data root that contains it, else below the given folder, or the name of a given file.
    """
    for path in map(os.fspath, paths):
        if not path:
            yield Source('""', "", "the name of an image is empty")
            continue
        if not os.path.isdir(path):
            yield Source(path, _relative(path, [*roots, os.path.dirname(path)]))
            continue
        found = None
        for found, problem in _walk(path, frozenset(), skipped):
            yield Source(found, _relative(found, [*roots, path]), problem)
        if found is None:
            yield Source(path, "", "no images in this folder")


def _walk(folder: str, above: frozenset, skipped: Optional[Callable[[str], None]]) -> Iterator[tuple[str, str]]:
    """(path, problem) of the images below a folder, unless it is one of those above it (device, inode)."""
    try:
        status = os.stat(folder)
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        yield folder, error.strerror
        return
    identity = status.st_dev, status.st_ino
    for path in [] if identity in above else (os.path.join(folder, name) for name in names):
        if os.path.isdir(path):
            yield from _walk(path, above | {identity}, skipped)
        elif path.lower().endswith(ENDINGS):
            yield path, ""
        elif skipped is not None:
            skipped(path)


def _relative(path: str, roots: Sequence[str]) -> str:
    below = (relative_path(path, root) for root in roots)
    found = next((relative for relative in below if not relative.startswith("../")), os.path.basename(path))
    return found.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a file name need not be text
