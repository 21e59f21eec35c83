"""ImageNet (Deng et al. 2009), 1000 classes, and what its variants for testing share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, Optional

from dassl.data.datasets import DATASET_REGISTRY

from trainers.prompting.errors import UserError
from trainers.prompting.results import write_text

from .base import FewShotDataset
from .fewshot import read_pickled
from .raw import list_folders, list_images, read_lines, reading
from .splits import Entry, entry, read_json

CLASSNAMES = "classnames.txt"
PICKLED = "preprocessed.pkl"  # CoOp's listing
LISTING = "listing_{}.json"  # ours


@DATASET_REGISTRY.register()
class ImageNet(FewShotDataset):
    """``<root>/imagenet/images/{train,val}/n01440764/….JPEG`` and ``classnames.txt``.

    The validation images are the test images, as is usual and in CoOp. CoOp lists the training images in the order of
    the file system and keeps that in ``preprocessed.pkl``: where one lies there its order counts, so that the samples
    are those that CoOp draws on that machine. Elsewhere the images are sorted.
    """

    dataset_dir = "imagenet"
    sampled = ("train",)
    listed = True

    def prepare(self) -> None:
        self._entries: dict[str, list[Entry]] = {}
        self.listed = not os.path.isfile(self.path(PICKLED))

    def entries(self, part: str) -> list[Entry]:
        folder = "train" if part == "train" else "val"
        if folder not in self._entries:
            pickled = self.path(PICKLED) if folder == "train" else ""
            if os.path.isfile(pickled):
                with reading(pickled):
                    self._entries[folder] = [
                        entry(("/".join(path.replace("\\", "/").split("/")[-3:]), label, name))
                        for path, label, name in read_pickled(pickled)["train"]
                    ]
            else:
                names = read_classnames(self.path(CLASSNAMES))
                kept = self.path(LISTING.format(folder)) if self.keep else ""
                listing = list_classes(os.path.join(self.images, folder), kept)
                self._entries[folder] = label_folders(listing, names, self.path(CLASSNAMES), f"{folder}/")
        return self._entries[folder]

    def fingerprint(self) -> str:
        """Without reading 1.28 million names: the times at which the class folders were changed last."""
        if os.path.isfile(self.path(PICKLED)):
            return f"{PICKLED} {os.path.getsize(self.path(PICKLED))}"
        times = folder_times(os.path.join(self.images, "train"))
        return hashlib.sha256(json.dumps(times).encode()).hexdigest()[:16]


class ImageNetVariant(FewShotDataset):
    """A data set to test on models that were trained on ImageNet; it has no training images of its own.

    Its test images stand where Dassl wants training images, from which it learns the classes, as in CoOp.

    Raises:
        UserError: base or new classes are asked for, which are halves of what was trained on.
    """

    listed = True
    test_only = True
    sampled = ()

    def prepare(self) -> None:
        subset = self.cfg.DATASET.SUBSAMPLE_CLASSES
        if subset != "all":
            raise UserError(f"DATASET.SUBSAMPLE_CLASSES {subset}: {type(self).__name__} has no halves; set it to all")
        names = read_classnames(self.path(CLASSNAMES))
        self._entries = label_folders(
            list_classes(self.images), names, self.path(CLASSNAMES), folders=self.folders(names)
        )

    def folders(self, names: dict[str, str]) -> Optional[list[str]]:
        """Folders in the order of their labels; None: sorted."""
        return None

    def entries(self, part: str) -> list[Entry]:
        return [] if part == "val" else self._entries


def read_classnames(path: str) -> dict[str, str]:
    """CoOp's ``classnames.txt``, lines ``n01440764 tench``: class name of each folder. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; `tools/prepare.py` makes it, DATASETS.md says where CoOp has it")
    pairs = (line.partition(" ") for line in read_lines(path))
    return {folder: name.strip() for folder, _, name in pairs}


def folder_times(path: str) -> list[tuple[str, int]]:
    """Name of each class folder and the time in ns at which an image came, went or was renamed in it."""
    return [(folder, os.stat(os.path.join(path, folder)).st_mtime_ns) for folder in list_folders(path)]


def list_classes(path: str, kept: str = "") -> dict[str, list[str]]:
    """Sorted image names of each class folder.

    Args:
        kept: JSON file that keeps the listing: a folder is listed again when it has been changed since.
    """
    before: dict[str, Any] = {}
    if kept and os.path.isfile(kept):
        try:
            before = {folder: (time, names) for folder, time, names in read_json(kept)}
        except (ValueError, TypeError) as error:
            print(f"{kept}: no listing ({type(error).__name__}: {error}); it is replaced")
    now = {}
    for folder, time in folder_times(path):
        known = before.get(folder)
        now[folder] = (time, known[1] if known and known[0] == time else list_images(os.path.join(path, folder)))
    if not any(names for _, names in now.values()):
        raise UserError(f"{path}: no images in class folders; unpack the images of the data set there (DATASETS.md)")
    if kept and now != before:
        try:
            write_text(kept, json.dumps([(folder, time, names) for folder, (time, names) in now.items()]))
        except OSError as error:  # a data root that cannot be written: it is listed every time
            print(f"{kept}: listing not kept ({error.strerror})")
    return {folder: names for folder, (_, names) in now.items()}


def label_folders(
    listing: dict[str, list[str]],
    names: dict[str, str],
    source: str,
    prefix: str = "",
    folders: Optional[Sequence[str]] = None,
) -> list[Entry]:
    """Entries of class folders; labels count them in their order.

    Args:
        names: class name of each folder, source: the file they are from.
        prefix: what stands in front of the folders in the paths.
        folders: keys of ``names`` in the order of the labels, whose images are in folders called "0", "1", …
    """
    entries: list[Entry] = []
    if folders is not None and set(listing) != {str(label) for label in range(len(folders))}:
        raise UserError(
            f"{source}: {len(folders)} classes, and the image folders are not called 0 to {len(folders) - 1}"
        )
    for label, folder in enumerate(listing if folders is None else folders):
        place = folder if folders is None else str(label)
        if folder not in names:
            raise UserError(f'{source}: no line for the folder "{folder}"; add its class name or remove the folder')
        if not listing[place]:
            raise UserError(f"{source}: no images of {folder} (folder {prefix}{place}); unpack the data set again")
        entries += [Entry(f"{prefix}{place}/{image}", label, names[folder]) for image in listing[place]]
    return entries
