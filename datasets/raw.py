"""Splits made from a data set's raw files where CoOp's split file is missing, with the draws of the original code.

CoOp listed folders in the order of the file system, which no two machines share. Here listings are sorted, so a split
made from folders is a function of the seed; it equals CoOp's where that was sorted too. Splits made from annotation
files equal CoOp's everywhere.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional

from torchvision.datasets.folder import IMG_EXTENSIONS

from trainers.prompting.errors import UserError
from trainers.prompting.names import printable

from .splits import Entry

Split = dict[str, list[Entry]]


def list_folders(path: str) -> list[str]:
    """Sorted names of the folders in ``path``, hidden ones left out. Raises UserError where it is no folder."""
    try:
        with os.scandir(path) as found:
            return _as_text(path, [item.name for item in found if item.is_dir() and not item.name.startswith(".")])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such folder; unpack the images of the data set there (DATASETS.md)") from error


def list_images(path: str) -> list[str]:
    """Sorted names of the image files in ``path``, by their endings, hidden ones left out."""
    return _as_text(path, [name for name in os.listdir(path) if is_image(name)])


def _as_text(path: str, names: list[str]) -> list[str]:
    """Names sorted. Raises UserError for one of bytes that are no UTF-8: it could not be kept in a file of ours."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: a name that is not in UTF-8, {printable(name)}; rename it") from error
    return sorted(names)


def is_image(name: str) -> bool:
    """Whether a file name ends like an image's (torchvision's list) and is not hidden."""
    return not name.startswith(".") and name.lower().endswith(IMG_EXTENSIONS)


def walk_images(path: str) -> list[str]:
    """Sorted paths, with "/" and relative to ``path``, of the image files in it and in folders below; none hidden."""
    found = []
    for folder, below, names in os.walk(path, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = os.path.relpath(folder, path).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        found += [f"{prefix}{name}" for name in names if is_image(name)]
    return _as_text(path, found)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What goes wrong inside is said in one line that names the annotation file. Raises UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: no such file; it is part of the data set (DATASETS.md)") from error
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not as the data set has it ({what}); get it again") from error


def read_lines(path: str) -> list[str]:
    """Lines of a text file, stripped, empty ones left out. Raises UserError where there are none."""
    with reading(path), open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
        if not lines:
            raise ValueError("it is empty")
        return lines


def load_mat(path: str) -> dict[str, Any]:
    """A MATLAB file (version 5), read by SciPy."""
    from scipy.io import loadmat

    with reading(path):
        try:
            return loadmat(path)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 (on a damaged file it raises errors of SciPy, of zlib and others)
            raise ValueError(error) from error


def split_trainval(trainval: Sequence[Entry], p_val: float = 0.2) -> tuple[list[Entry], list[Entry]]:
    """CoOp's split of images that are to be trained and validated on: of each class ``p_val`` for validation."""
    by_label: defaultdict[int, list[int]] = defaultdict(list)
    for i, item in enumerate(trainval):
        by_label[item.label].append(i)
    train, val = [], []
    for indices in by_label.values():
        n_val = round(len(indices) * p_val)
        _need(n_val, trainval[indices[0]].classname, len(indices))
        random.shuffle(indices)
        val += [trainval[i] for i in indices[:n_val]]
        train += [trainval[i] for i in indices[n_val:]]
    return train, val


def split_classes(classes: Sequence[tuple[int, str, list[str]]], p_train: float = 0.5, p_val: float = 0.2) -> Split:
    """CoOp's split of a data set without one, class by class: 50 % to train, 20 % to validate, the rest to test.

    Args:
        classes: label, class name and image paths of each class; a list of paths is shuffled in place.
    """
    split: Split = {"train": [], "val": [], "test": []}
    for label, classname, paths in classes:
        random.shuffle(paths)
        n_train, n_val = round(len(paths) * p_train), round(len(paths) * p_val)
        _need(min(n_train, n_val, len(paths) - n_train - n_val), classname, len(paths))
        bounds = {"train": (0, n_train), "val": (n_train, n_train + n_val), "test": (n_train + n_val, len(paths))}
        for part, (first, last) in bounds.items():
            split[part] += [Entry(path, label, classname) for path in paths[first:last]]
    return split


def _need(images: int, classname: str, total: int) -> None:
    if images < 1:
        raise UserError(
            f'class "{classname}" has {total} image(s), too few to train, validate and test on; give it more'
        )


def split_folders(image_dir: str, names: Optional[Mapping[str, str]] = None, ignored: Sequence[str] = ()) -> Split:
    """CoOp's split of a folder of class folders.

    Args:
        names: class names of folders that are not called like their class.
        ignored: folders that are no class.
    """
    folders = [folder for folder in list_folders(image_dir) if folder not in ignored]
    if not folders:
        raise UserError(f"{image_dir}: no class folders in it; unpack the images of the data set there (DATASETS.md)")
    return split_classes(
        [
            (
                label,
                (names or {}).get(folder, folder),
                [f"{folder}/{name}" for name in list_images(os.path.join(image_dir, folder))],
            )
            for label, folder in enumerate(folders)
        ]
    )
