"""Splits and few-shot samples: how they are drawn, stored, read and checked.

For the same seed they equal those of the original CoOp code. Where CoOp lists folders in the order of the file system,
which differs between machines, listings are sorted here.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, Optional

from trainers.prompting.errors import UserError
from trainers.prompting.names import clean_name
from trainers.prompting.results import write_text

SPLITS = ("train", "val", "test")
SUBSETS = ("all", "base", "new")
P_TRAIN, P_VAL = 0.5, 0.2  # CoOp's shares of a class's images; the rest is for testing
MAX_NAMED = 3  # classes named in a warning


class Entry(NamedTuple):
    """An image of a split: path relative to the image folder, with "/"; label from 0; class name."""

    path: str
    label: int
    classname: str


Split = dict[str, list[Entry]]  # entries of "train", "val" and "test"


@contextmanager
def python_random(seed: int) -> Iterator[None]:
    """Seed Python's ``random``, as CoOp does, and restore its state afterwards; a negative seed changes nothing."""
    state = random.getstate()
    if seed >= 0:
        random.seed(seed)
    try:
        yield
    finally:
        if seed >= 0:
            random.setstate(state)


def by_label(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Group entries by label, labels in order of first appearance."""
    groups: dict[int, list[Entry]] = {}
    for item in entries:
        groups.setdefault(item.label, []).append(item)
    return list(groups.values())


def split_trainval(trainval: Sequence[Entry]) -> Split:
    """Split annotated training images into training and validation images, 80 % and 20 % of each class."""
    train, val = [], []
    for items in by_label(trainval):
        n_val = round(len(items) * P_VAL)
        _require_images(n_val, items[0].classname, len(items))
        random.shuffle(items)
        val += items[:n_val]
        train += items[n_val:]
    return {"train": train, "val": val}


def split_classes(classes: Sequence[tuple[int, str, list[str]]]) -> Split:
    """Split each class (label, name, paths), half for training, a fifth for validation. Shuffles paths in place."""
    split: Split = {part: [] for part in SPLITS}
    for label, classname, paths in classes:
        random.shuffle(paths)
        n_train, n_val = round(len(paths) * P_TRAIN), round(len(paths) * P_VAL)
        _require_images(min(n_train, n_val, len(paths) - n_train - n_val), classname, len(paths))
        for part, chosen in zip(SPLITS, cut(paths, n_train, n_val)):
            split[part] += [Entry(path, label, classname) for path in chosen]
    return split


def cut(paths: list[str], n_train: int, n_val: int) -> tuple[list[str], ...]:
    return paths[:n_train], paths[n_train : n_train + n_val], paths[n_train + n_val :]


def _require_images(smallest_part: int, classname: str, total: int) -> None:
    if smallest_part < 1:
        raise UserError(f'class "{classname}" has {total} image(s), too few to split into three parts; add some')


def subsample_classes(parts: Split, subset: str) -> Split:
    """Keep all classes, the base (the first ceil(C / 2) labels of ``train``) or the new ones; renumber them from 0."""
    if subset not in SUBSETS:
        raise UserError(f"DATASET.SUBSAMPLE_CLASSES {subset}: choose one of {', '.join(SUBSETS)}")
    if subset == "all":
        return parts
    labels = sorted({item.label for item in parts["train"]})
    middle = math.ceil(len(labels) / 2)
    chosen = labels[:middle] if subset == "base" else labels[middle:]
    if not chosen:
        raise UserError(f"DATASET.SUBSAMPLE_CLASSES {subset}: no class left, the data set has {len(labels)}; use all")
    print(f"SUBSAMPLE {subset.upper()} CLASSES!")
    relabel = {label: i for i, label in enumerate(chosen)}
    return {
        part: [item._replace(label=relabel[item.label]) for item in entries if item.label in relabel]
        for part, entries in parts.items()
    }


def check_labels(parts: Split, source: str) -> None:
    """Check that every label up to the largest one has training images and one class name. Raises UserError."""
    names: dict[int, str] = {}
    for item in chain.from_iterable(parts.values()):
        name = names.setdefault(item.label, item.classname)
        if name != item.classname:
            raise UserError(f'{source}: label {item.label} is both "{name}" and "{item.classname}"; give it one name')
        if not clean_name(name).strip():
            raise UserError(f"{source}: label {item.label} has an empty class name; give it one")
    if not (trained := {item.label for item in parts["train"]}):
        raise UserError(f"{source}: no training images; add some")
    for label in set(range(max(names) + 1)) - trained:
        name = f' ("{names[label]}")' if label in names else ""
        remedy = "add some or remove the class (labels count from 0)"
        raise UserError(f"{source}: class {label}{name} has no training images; {remedy}")


def check_files(images: str, parts: Split) -> None:
    """Check that every image exists. Lists each folder once; asking for each file is slow on network drives."""
    if not os.path.isdir(images):
        raise UserError(f"{images}: no such folder; unpack the images of the data set there (docs/data.md)")
    listed: dict[str, set[str]] = {}
    for path in (os.path.join(images, item.path) for item in chain.from_iterable(parts.values())):
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            raise UserError(f"{path}: this image of the split is missing; unpack the data set again")


def read_json(path: str) -> Any:
    """Read a JSON file. Raises ValueError where it is damaged or nested too deeply."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            return json.load(file)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def to_entry(row: Sequence[Any]) -> Entry:
    """Convert ``[path, label, class name]`` from a JSON file. Raises ValueError or TypeError."""
    path, label, classname = row
    if isinstance(label, float) or int(label) < 0 or not isinstance(classname, str) or not isinstance(path, str):
        raise ValueError(f"{path} has the label {label} and the class name {classname!r}")
    path = path.replace("\\", "/")
    if os.path.isabs(path) or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"{path} points outside the data set")
    (path + classname).encode()  # JSON can hold unpaired surrogates; UnicodeEncodeError is a ValueError
    return Entry(path, int(label), classname)


def read_split(path: str) -> Split:
    """Read CoOp's split file: ``{"train": [[path, label, class name], …], "val": …, "test": …}``. Raises UserError."""
    try:
        split = read_json(path)
        return {part: [to_entry(row) for row in split[part]] for part in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a split file of CoOp ({reason}); download it again") from error


def draw(entries: Sequence[Entry], shots: int) -> list[Entry]:
    """Draw ``shots`` entries of each label; all entries of a label that has fewer."""
    drawn = (random.sample(items, shots) if len(items) >= shots else items for items in by_label(entries))
    return list(chain.from_iterable(drawn))


def warn_of_small_classes(train: Sequence[Entry], shots: int) -> None:
    """Print a warning where classes have fewer than ``shots`` training images."""
    groups = by_label(train)
    if small := [f'"{items[0].classname}" {len(items)}' for items in groups if len(items) < shots]:
        names = ", ".join(small[:MAX_NAMED]) + (", …" if len(small) > MAX_NAMED else "")
        print(f"Warning: {len(small)} of {len(groups)} classes have fewer than {shots} training images: {names}")


def read_sample(path: str, parts: Sequence[str], prefix: str, source: str) -> Optional[Split]:
    """Read a stored few-shot sample; None where no file exists, or it is damaged or was drawn from other images.

    Stored paths begin with ``prefix``; ``source`` is a digest of the images to draw from.
    """
    if not os.path.isfile(path):
        return None
    try:
        stored = read_json(path)
        if stored["source"] != source:
            print(f"{path}: drawn from other images than the current ones; it is replaced")
            return None
        sample = {part: [to_entry(row) for row in stored[part]] for part in parts}
        if not all(item.path.startswith(prefix) for item in chain.from_iterable(sample.values())):
            raise ValueError(f"paths outside {prefix}")
    except (ValueError, KeyError, TypeError) as error:
        print(f"{path}: not a few-shot sample ({type(error).__name__}: {error}); it is replaced")
        return None
    return {part: [item._replace(path=item.path[len(prefix) :]) for item in items] for part, items in sample.items()}


def write_sample(path: str, sample: Split, prefix: str, source: str) -> None:
    """Store a few-shot sample; where the folder is read-only, say so: the draw is the same every time."""
    rows = {part: [(f"{prefix}{e.path}", e.label, e.classname) for e in items] for part, items in sample.items()}
    try:
        write_text(path, json.dumps({"source": source, **rows}, ensure_ascii=False))
        print(f"Saving preprocessed few-shot data to {path}")
    except OSError as error:
        print(f"{path}: few-shot data not saved ({error.strerror})")


class PickledDatum:
    """Stands in for a pickled ``Datum``: attributes and nothing else."""

    _impath, _label, _classname = "", -1, ""


class DatumUnpickler(pickle.Unpickler):
    """Reads lists of Dassl's ``Datum``; no other class or function is looked up, let alone called."""

    def find_class(self, module: str, name: str) -> type:
        if name == "Datum" and module.split(".")[0] == "dassl":
            return type("PickledDatum", (PickledDatum,), {})  # a new class, since a pickle can set class attributes
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_pickled(path: str) -> dict[str, list[tuple[str, int, str]]]:
    """Read a pickle of CoOp: ``{part: [(path on the machine that wrote it, label, name), …]}``. Raises UserError."""

    def fields(item: Any) -> tuple[str, int, str]:
        values = item._impath, item._label, item._classname
        if not isinstance(item, PickledDatum) or [type(value) for value in values] != [str, int, str]:
            raise TypeError(f"{type(item).__name__} is not an image")
        return values

    try:
        with open(path, "rb") as file:
            content = DatumUnpickler(file).load()
        return {str(part): [fields(item) for item in items] for part, items in content.items()}
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 (damaged pickles raise almost anything)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a list of images written by CoOp ({reason}); delete it") from error


def match_pickled(path: str, parts: Split) -> Split:
    """Find the images of a pickle among the entries of each part by the ends of their paths. Raises UserError."""
    pickled, matched = read_pickled(path), {}
    for part, entries in parts.items():
        if part not in pickled:
            raise UserError(f'{path}: it has no "{part}"; delete it')
        known, matched[part] = {item.path: item for item in entries}, []
        for impath, label, name in pickled[part]:
            words = impath.replace("\\", "/").split("/")
            tails = ("/".join(words[i:]) for i in range(len(words)))
            found = next((known[tail] for tail in tails if tail in known), None)
            if found is None or (found.label, found.classname) != (label, name):
                raise UserError(f'{path}: {impath} ("{name}", {label}) is not a {part} image of the split; delete it')
            matched[part].append(found)
    return matched
