"""ImageNet (Deng et al. 2009), 1000 classes."""

from __future__ import annotations

import os

from dassl.data.datasets import DATASET_REGISTRY

from trainers.prompting.errors import UserError

from .base import FewShotDataset, digest
from .files import list_folders, list_images, read_lines, reading
from .splits import Entry, read_pickled, to_entry

CLASSNAMES = "classnames.txt"
PICKLED = "preprocessed.pkl"  # CoOp's listing


@DATASET_REGISTRY.register()
class ImageNet(FewShotDataset):
    """``<root>/imagenet/images/{train,val}/n01440764/….JPEG`` and ``classnames.txt``.

    As in CoOp, the validation images are the test images. CoOp saves the file system's order of the training images in
    ``preprocessed.pkl``; if it exists, that order is used and samples equal CoOp's. Otherwise images are sorted.
    """

    dataset_dir = "imagenet"
    sampled = ("train",)

    def prepare(self) -> None:
        self.parts = {}
        self.pickled, self.listed = self.path(PICKLED), not os.path.isfile(self.path(PICKLED))
        train, val = (list_folders(os.path.join(self.images, folder)) for folder in ("train", "val"))
        if different := sorted(set(train) ^ set(val)):
            here, lacking = ("train", "val") if different[0] in train else ("val", "train")
            raise UserError(
                f"{self.images}: {different[0]} is in {here}/ and not in {lacking}/; unpack the data set again"
            )

    def entries(self, part: str) -> list[Entry]:
        folder = "train" if part == "train" else "val"
        if folder in self.parts:  # read when needed: 1.28 million names take seconds
            return self.parts[folder]
        if folder == "val" or self.listed:
            self.parts[folder] = read_folders(self.path(CLASSNAMES), self.images, f"{folder}/")
        else:
            with reading(self.pickled):
                rows = read_pickled(self.pickled)["train"]
                paths = ("/".join(path.replace("\\", "/").split("/")[-3:]) for path, _, _ in rows)
                self.parts[folder] = [to_entry((path, *row[1:])) for path, row in zip(paths, rows)]
            now = {item.path.split("/")[1]: item.label for item in self.entries("test")}
            for item in self.parts[folder]:
                name = item.path.split("/")[1]
                if now.get(name) != item.label:
                    raise UserError(
                        f"{self.pickled}: {name} has another label than in {self.images}/val; delete the file"
                    )
        return self.parts[folder]

    def fingerprint(self) -> str:
        """Digest the modification times of the class folders, which is faster than reading all names."""
        if not self.listed:
            return f"{PICKLED} {os.path.getsize(self.pickled)}"
        train = os.path.join(self.images, "train")
        return digest([(name, os.stat(os.path.join(train, name)).st_mtime_ns) for name in list_folders(train)])


def read_classnames(path: str) -> dict[str, str]:
    """Read CoOp's ``classnames.txt``, lines ``n01440764 tench``: the class name of each folder. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; `tools/prepare.py` gets it, docs/data.md says where CoOp has it")
    pairs = (line.partition(" ") for line in read_lines(path))
    return {folder: name.strip() for folder, _, name in pairs}


def read_folders(source: str, images: str, prefix: str = "", numbered: bool = False) -> list[Entry]:
    """Return the images of class folders in ``images/prefix``, labels in the order of the folders' names.

    ``source`` is ``classnames.txt``. If ``numbered``, folders are named by label, the number of its line, from 0.
    """
    names, path = read_classnames(source), os.path.join(images, prefix.rstrip("/")).rstrip("/")
    listing = {folder: list_images(os.path.join(path, folder)) for folder in list_folders(path)}
    if not any(listing.values()):
        raise UserError(f"{path}: no images in class folders; unpack the images of the data set there (docs/data.md)")
    wnids = {str(label): wnid for label, wnid in enumerate(names)} if numbered else {name: name for name in listing}
    if set(wnids) != set(listing):
        raise UserError(f"{source}: {len(names)} classes, but the image folders are not 0 to {len(names) - 1}")
    entries: list[Entry] = []
    for label, (folder, wnid) in enumerate(wnids.items()):
        if wnid not in names:
            raise UserError(f'{source}: no line for the folder "{wnid}"; add its class name or remove the folder')
        if not listing[folder]:
            raise UserError(f"{source}: no images of {wnid} (folder {prefix}{folder}); unpack the data set again")
        entries += [Entry(f"{prefix}{folder}/{image}", label, names[wnid]) for image in listing[folder]]
    return entries
