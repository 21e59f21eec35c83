"""What the few-shot benchmarks share: split files, few-shot samples, base and new classes, checks.

The samples equal those of the original CoOp code for the same seed.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dassl.data.datasets import DatasetBase, Datum

from trainers.prompting.errors import UserError

SPLITS = ("train", "val", "test")
SUBSETS = ("all", "base", "new")
MISSING = "{}: the split names this image and it is missing; unpack the data set again"
MAX_VAL_SHOTS = 4  # CoOp never validates on more images per class


class SplitDataset(DatasetBase):
    """A data set whose split is a ``split_zhou_<Name>.json`` of CoOp.

    Subclasses name ``dataset_dir`` (folder below the data root), ``image_dir`` (below that) and ``split_file``.
    ``DATASET.NUM_SHOTS`` images per class are drawn for training (and at most 4 for validation), then
    ``DATASET.SUBSAMPLE_CLASSES`` keeps all classes, the first half of the labels (base) or the second (new).

    Raises:
        UserError: no data folder, no split file, an unknown subset, a class without training images, a missing image.
    """

    image_dir = "images"
    split_file = ""

    def __init__(self, cfg: Any) -> None:
        root = data_root(cfg)
        folder = os.path.join(root, self.dataset_dir)
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder; --root must name the folder that holds {self.dataset_dir}/")
        split_path = os.path.join(folder, self.split_file)
        train, val, test = read_split(split_path, os.path.join(folder, self.image_dir))
        check_labels(train, val, test, source=split_path)
        if cfg.DATASET.NUM_SHOTS >= 1:
            with python_random(cfg.SEED):
                train = self.generate_fewshot_dataset(train, num_shots=cfg.DATASET.NUM_SHOTS)
                val = self.generate_fewshot_dataset(val, num_shots=min(cfg.DATASET.NUM_SHOTS, MAX_VAL_SHOTS))
        train, val, test = subsample_classes(train, val, test, subset=cfg.DATASET.SUBSAMPLE_CLASSES)
        if not test:
            raise UserError(f"{split_path}: no test images of the {cfg.DATASET.SUBSAMPLE_CLASSES} classes in it")
        check_files(train, val, test)
        super().__init__(train_x=train, val=val, test=test)


def data_root(cfg: Any) -> str:
    """``DATASET.ROOT`` as an absolute path. Raises UserError where it is empty or no folder."""
    if not cfg.DATASET.ROOT:
        raise UserError("DATASET.ROOT is empty: give the folder of the data sets with --root")
    root = os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT))
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; --root must name the folder of the data sets")
    return root


def read_split(path: str, image_dir: str) -> tuple[list[Datum], list[Datum], list[Datum]]:
    """Read CoOp's split file: ``{"train": [[path, label, classname], …], "val": …, "test": …}``.

    Args:
        path: the file.
        image_dir: what the image paths in it are relative to.

    Raises:
        UserError: no such file, or not of this format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            split = json.load(file)
        return tuple(
            [_datum(os.path.join(image_dir, image), int(label), classname) for image, label, classname in split[part]]
            for part in SPLITS
        )
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; CoOp's DATASETS.md says where to get it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a split file of CoOp ({type(error).__name__}: {error}); get it again") from error


def _datum(impath: str, label: int, classname: str) -> Datum:
    if label < 0 or not isinstance(classname, str):
        raise ValueError(f"{impath} has the label {label} and the class name {classname!r}")
    try:
        return Datum(impath=impath, label=label, classname=classname)
    except AssertionError as error:  # Dassl.pytorch's own looks for the file at once; ours leaves it to check_files
        raise UserError(MISSING.format(impath)) from error


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


def subsample_classes(*sources: Sequence[Datum], subset: str) -> list[list[Datum]]:
    """Keep all classes, the base classes or the new ones; kept labels are counted from 0 again.

    Args:
        sources: lists of images, the first of which (train) says which labels there are.
        subset: ``all``, ``base`` (the first ceil(C / 2) labels) or ``new`` (the others).
    """
    if subset not in SUBSETS:
        raise UserError(f"DATASET.SUBSAMPLE_CLASSES {subset}: choose one of {', '.join(SUBSETS)}")
    if subset == "all":
        return [list(source) for source in sources]
    labels = sorted({item.label for item in sources[0]})
    middle = math.ceil(len(labels) / 2)
    kept = labels[:middle] if subset == "base" else labels[middle:]
    if not kept:
        raise UserError(f"DATASET.SUBSAMPLE_CLASSES {subset}: {len(labels)} class(es) leave none for this half")
    print(f"SUBSAMPLE {subset.upper()} CLASSES!")
    relabel = {label: i for i, label in enumerate(kept)}
    return [
        [
            Datum(impath=item.impath, label=relabel[item.label], domain=item.domain, classname=item.classname)
            for item in source
            if item.label in relabel
        ]
        for source in sources
    ]


def check_labels(train: Sequence[Datum], val: Sequence[Datum], test: Sequence[Datum], source: str) -> None:
    """Every label from 0 to the largest one must have training images and one class name. Raises UserError."""
    names: dict[int, str] = {}
    for item in (*train, *val, *test):
        if names.setdefault(item.label, item.classname) != item.classname:
            raise UserError(
                f'{source}: label {item.label} is both "{names[item.label]}" and "{item.classname}"; give it one name'
            )
    if not train:
        raise UserError(f"{source}: no training images in it")
    trained = {item.label for item in train}
    for label in range(max(names) + 1):
        if label not in trained:
            called = f' ("{names[label]}")' if label in names else ""
            raise UserError(
                f"{source}: class {label}{called} has no training image; give it some or leave the class out"
            )


def check_files(*sources: Sequence[Datum]) -> None:
    """Every image must be there; folders are listed once instead of asking for each file. Raises UserError."""
    listed: dict[str, set[str]] = {}
    for item in (item for source in sources for item in source):
        folder, name = os.path.split(item.impath)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            raise UserError(MISSING.format(item.impath))
