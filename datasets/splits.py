"""What all data sets share: entries of a split, split files, base and new classes, checks.

Nothing is asked of the file system image by image: folders are listed once.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from trainers.prompting.errors import UserError
from trainers.prompting.names import clean_name
from trainers.prompting.results import write_text

SPLITS = ("train", "val", "test")
SUBSETS = ("all", "base", "new")
MISSING = "{}: the split names this image and it is missing; unpack the data set again"


class Entry(NamedTuple):
    """An image of a split: path relative to the image folder, with "/"; label from 0; class name."""

    path: str
    label: int
    classname: str


# ------------------------------------------------------------------------------------------------- root, randomness


def data_root(cfg: Any) -> str:
    """``DATASET.ROOT`` as an absolute path. Raises UserError where it is empty or no folder."""
    if not cfg.DATASET.ROOT:
        raise UserError("DATASET.ROOT is empty: give the folder of the data sets with --root")
    root = os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT))
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; --root must name the folder of the data sets")
    return root


@contextmanager
def python_random(seed: int) -> Iterator[None]:
    """Draw from a state that depends on ``seed`` alone and leave the global state of ``random`` as it was.

    CoOp draws right after seeding, so the samples are the same; unlike there, what is drawn before or later neither
    changes the sample nor is changed by it. A negative seed means: do not seed.
    """
    if seed < 0:
        yield
        return
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


# ------------------------------------------------------------------------------------------------- split files


def entry(row: Sequence[Any]) -> Entry:
    """``[path, label, classname]`` of a JSON file as an entry. Raises ValueError or TypeError where it is none."""
    path, label, classname = row
    if isinstance(label, float) or int(label) < 0 or not isinstance(classname, str) or not isinstance(path, str):
        raise ValueError(f"{path} has the label {label} and the class name {classname!r}")
    if os.path.isabs(path) or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"{path} leads out of the data set")
    (path + classname).encode()  # JSON can hold halves of characters; UnicodeEncodeError is a ValueError
    return Entry(path, int(label), classname)


def read_json(path: str) -> Any:
    """What a JSON file holds. Raises ValueError where it is none, or nested deeper than a stack can bear."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def read_split(path: str) -> dict[str, list[Entry]]:
    """Read CoOp's split file: ``{"train": [[path, label, classname], …], "val": …, "test": …}``.

    Raises:
        UserError: not of this format.
    """
    try:
        split = read_json(path)
        return {part: [entry(row) for row in split[part]] for part in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a split file of CoOp ({type(error).__name__}: {error}); get it again") from error


def write_split(path: str, split: dict[str, list[Entry]]) -> None:
    """Write a split in CoOp's format, atomically."""
    write_text(path, json.dumps(split, indent=4))
    print(f"Saved split to {path}")


# ------------------------------------------------------------------------------------------------- subsets, checks


def subsample_classes(parts: dict[str, list[Entry]], subset: str) -> dict[str, list[Entry]]:
    """Keep all classes, the base classes or the new ones; kept labels are counted from 0 again.

    Args:
        parts: entries of each part; those of ``train`` say which labels there are.
        subset: ``all``, ``base`` (the first ceil(C / 2) labels) or ``new`` (the others).
    """
    if subset not in SUBSETS:
        raise UserError(f"DATASET.SUBSAMPLE_CLASSES {subset}: choose one of {', '.join(SUBSETS)}")
    if subset == "all":
        return parts
    labels = sorted({item.label for item in parts["train"]})
    middle = math.ceil(len(labels) / 2)
    kept = labels[:middle] if subset == "base" else labels[middle:]
    if not kept:
        raise UserError(f"DATASET.SUBSAMPLE_CLASSES {subset}: {len(labels)} class(es) leave none for this half")
    print(f"SUBSAMPLE {subset.upper()} CLASSES!")
    relabel = {label: i for i, label in enumerate(kept)}
    return {
        part: [item._replace(label=relabel[item.label]) for item in entries if item.label in relabel]
        for part, entries in parts.items()
    }


def check_labels(parts: dict[str, list[Entry]], source: str) -> None:
    """Every label from 0 to the largest one must have training images and one class name. Raises UserError."""
    names: dict[int, str] = {}
    for item in (item for entries in parts.values() for item in entries):
        if names.setdefault(item.label, item.classname) != item.classname:
            raise UserError(
                f'{source}: label {item.label} is both "{names[item.label]}" and "{item.classname}"; give it one name'
            )
    for label, name in names.items():
        if not clean_name(name).strip():
            raise UserError(f"{source}: label {label} has an empty class name; give it one")
    if not parts["train"]:
        raise UserError(f"{source}: no training images in it")
    trained = {item.label for item in parts["train"]}
    for label in range(max(names) + 1):
        if label not in trained:
            called = f' ("{names[label]}")' if label in names else ""
            raise UserError(
                f"{source}: class {label}{called} has no training image; give it some or leave the class out "
                "(labels count from 0)"
            )


def check_files(images: str, parts: dict[str, list[Entry]]) -> None:
    """Every image must be there; folders are listed once instead of asking for each file. Raises UserError."""
    if not os.path.isdir(images):
        raise UserError(f"{images}: no such folder; unpack the images of the data set there (DATASETS.md)")
    listed: dict[str, set[str]] = {}
    for item in (item for entries in parts.values() for item in entries):
        folder, name = os.path.split(item.path)
        if folder not in listed:
            path = os.path.join(images, folder)
            listed[folder] = set(os.listdir(path)) if os.path.isdir(path) else set()
        if name not in listed[folder]:
            raise UserError(MISSING.format(os.path.join(images, item.path)))
