"""ImageNet (Deng et al. 2009), 1000 classes, and the base class of its test-only variants."""

from __future__ import annotations

import hashlib
import json
import os

from dassl.data.datasets import DATASET_REGISTRY

from trainers.prompting.errors import UserError

from .base import FewShotDataset
from .files import list_folders, list_images, read_lines, reading
from .splits import Entry, read_pickled, to_entry

CLASSNAMES = "classnames.txt"
PICKLED = "preprocessed.pkl"  # CoOp's listing


@DATASET_REGISTRY.register()
class ImageNet(FewShotDataset):
    """``<root>/imagenet/images/{train,val}/n01440764/….JPEG`` and ``classnames.txt``.

    As in CoOp, the validation images are the test images. CoOp lists the training images in the order of the file
    system and saves that in ``preprocessed.pkl``: where this file exists its order is used, so that samples equal those
    of CoOp on that machine. Otherwise images are sorted.
    """

    dataset_dir = "imagenet"
    sampled = ("train",)

    def prepare(self) -> None:
        self.parts = {}
        self.listed = not os.path.isfile(self.path(PICKLED))

    def entries(self, part: str) -> list[Entry]:
        folder = "train" if part == "train" else "val"  # read when needed: 1.28 million names take seconds
        if folder not in self.parts:
            if folder == "val" or self.listed:
                names = read_classnames(self.path(CLASSNAMES))
                listing = list_classes(os.path.join(self.images, folder))
                self.parts[folder] = label_folders(
                    listing, dict(zip(listing, listing)), names, self.path(CLASSNAMES), f"{folder}/"
                )
            else:
                with reading(self.path(PICKLED)):
                    self.parts[folder] = [
                        to_entry(("/".join(path.replace("\\", "/").split("/")[-3:]), label, name))
                        for path, label, name in read_pickled(self.path(PICKLED))["train"]
                    ]
        return self.parts[folder]

    def fingerprint(self) -> str:
        """Digest the modification times of the class folders, which is faster than reading all names."""
        if not self.listed:
            return f"{PICKLED} {os.path.getsize(self.path(PICKLED))}"
        times = folder_times(os.path.join(self.images, "train"))
        return hashlib.sha256(json.dumps(times).encode()).hexdigest()[:16]


class ImageNetVariant(FewShotDataset):
    """A data set on which models trained on ImageNet are tested.

    It has no training images: as in CoOp the test images are also ``train_x``, from which Dassl takes the classes.

    Raises:
        UserError: base or new classes are requested, which are halves of the training classes.
    """

    listed = True
    test_only = True
    sampled = ()

    def prepare(self) -> None:
        subset = self.cfg.DATASET.SUBSAMPLE_CLASSES
        if subset != "all":
            raise UserError(
                f"DATASET.SUBSAMPLE_CLASSES {subset}: {type(self).__name__} has no base and new classes; set it to all"
            )
        path = self.path(CLASSNAMES)
        names, listing = read_classnames(path), list_classes(self.images)
        test = label_folders(listing, self.wnids(names, listing), names, path)
        self.parts = {"train": test, "val": [], "test": test}

    def wnids(self, names: dict[str, str], listing: dict[str, list[str]]) -> dict[str, str]:
        """Return the WordNet id of each image folder, in the order of the labels."""
        return dict(zip(listing, listing))


def read_classnames(path: str) -> dict[str, str]:
    """Read CoOp's ``classnames.txt``, lines ``n01440764 tench``: the class name of each folder. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; `tools/prepare.py` makes it, docs/data.md says where CoOp has it")
    pairs = (line.partition(" ") for line in read_lines(path))
    return {folder: name.strip() for folder, _, name in pairs}


def folder_times(path: str) -> list[tuple[str, int]]:
    """Return the name and modification time in ns of each class folder; it changes with the images in the folder."""
    return [(folder, os.stat(os.path.join(path, folder)).st_mtime_ns) for folder in list_folders(path)]


def list_classes(path: str) -> dict[str, list[str]]:
    """Return the sorted image names of each class folder. Raises UserError where there are none."""
    listing = {folder: list_images(os.path.join(path, folder)) for folder in list_folders(path)}
    if not any(listing.values()):
        raise UserError(f"{path}: no images in class folders; unpack the images of the data set there (docs/data.md)")
    return listing


def label_folders(
    listing: dict[str, list[str]], wnids: dict[str, str], names: dict[str, str], source: str, prefix: str = ""
) -> list[Entry]:
    """Return the entries of class folders.

    Args:
        listing: image names of each folder.
        wnids: WordNet id of each folder, in the order of the labels.
        names: class name of each WordNet id, read from the file ``source``.
        prefix: put in front of the paths.
    """
    entries: list[Entry] = []
    for label, (folder, wnid) in enumerate(wnids.items()):
        if wnid not in names:
            raise UserError(f'{source}: no line for the folder "{wnid}"; add its class name or remove the folder')
        if not listing[folder]:
            raise UserError(f"{source}: no images of {wnid} (folder {prefix}{folder}); unpack the data set again")
        entries += [Entry(f"{prefix}{folder}/{image}", label, names[wnid]) for image in listing[folder]]
    return entries
