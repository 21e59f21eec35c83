"""Your own images: a folder of class folders, without code."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

from dassl.data.datasets import DATASET_REGISTRY

from trainers.prompting.errors import UserError

from .base import SAMPLES, FewShotDataset
from .files import is_image, list_folders, read_lines, walk_images
from .splits import P_TRAIN, P_VAL, SPLITS, Entry, Split, cut

CLASSNAMES = "classnames.txt"
WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
PART_NAMES = {word: part for part, words in WORDS.items() for word in words}  # of folders, in any case


@DATASET_REGISTRY.register()
class Folder(FewShotDataset):
    """``<root>/<class>/<image>``, or ``<root>/{train,val,test}/<class>/<image>``; images may be nested deeper.

    Without folders of parts, the images are split by ``DATASET.SPLIT_SEED``. The part of an image depends on the seed
    and its path, so that adding or removing images moves few others. ``val/`` may be missing; without ``test/`` the
    images in ``val/`` are the test images, as in ImageNet. Class names are the names of the folders, or those given in
    ``classnames.txt``, lines ``<folder> <class name>``. Labels follow the order of the folders' names.
    """

    dataset_dir = image_dir = ""
    listed = True

    def prepare(self) -> None:
        folders = [name for name in list_folders(self.folder) if name != SAMPLES]
        own: dict[str, str] = {}  # folder of each part
        for name in folders:
            part = PART_NAMES.get(name.casefold())
            if part in own:
                raise UserError(f"{self.folder}: both {own[part]}/ and {name}/ are {part} images; rename or remove one")
            if part:
                own[part] = name
        if own and "train" not in own:
            name = next(iter(own.values()))
            raise UserError(f"{self.folder}: {name}/ exists but train/ does not; add it or rename the folder")
        if len(own) == 1:
            raise UserError(f"{self.folder}: train/ exists but neither test/ nor val/; add images for testing")
        self.parts = self._read_parts(own) if own else self._split(folders)

    def _read_parts(self, own: dict[str, str]) -> Split:
        classes = list_folders(self.path(own["train"]))
        names = self._classnames(classes)
        parts: Split = {part: [] for part in SPLITS}
        for part, folder in own.items():
            if unknown := set(list_folders(self.path(folder))) - set(classes):
                other = self.path(folder, min(unknown))
                raise UserError(f"{other}: no class of that name in {own['train']}/; rename or remove it")
            for label, (name, paths) in enumerate(self._images(folder, classes).items()):
                if part == "train" and not paths:
                    raise UserError(f"{self.path(folder, name)}: no images; add some or remove the folder")
                parts[part] += [Entry(path, label, names[name]) for path in paths]
        if "test" not in own:
            print(f"{self.folder}: no test/, so the images in {own['val']}/ are used for testing")
            parts.update(test=parts["val"], val=[])
        return parts

    def _split(self, classes: list[str]) -> Split:
        names = self._classnames(classes)
        parts: Split = {part: [] for part in SPLITS}
        for label, (folder, paths) in enumerate(self._images("", classes).items()):
            if len(paths) < 2:
                reason = f"{len(paths)} image(s) of this class, training and testing need one each"
                raise UserError(f"{self.path(folder)}: {reason}; add some or remove the folder")
            prefix = f"{self.cfg.DATASET.SPLIT_SEED}/"
            order = sorted(paths, key=lambda path: hashlib.sha256((prefix + path).encode()).digest())
            n_train = max(1, round(P_TRAIN * len(order)))
            n_val = min(round(P_VAL * len(order)), len(order) - n_train - 1)
            for part, chosen in zip(SPLITS, cut(order, n_train, n_val)):
                parts[part] += [Entry(path, label, names[folder]) for path in sorted(chosen)]
        return parts

    def _images(self, part: str, classes: list[str]) -> dict[str, list[str]]:
        """Return the sorted paths of each class's images, relative to the data set.

        A class folder without images is refused if its folders look like parts or classes, or if it is the only one.
        """
        found, others = {}, []
        for name in classes:
            folder = os.path.join(self.folder, part, name)
            here = os.path.isdir(folder)
            below = set(list_folders(folder)) - {name} if here else set()
            suspicious = len(classes) == 1 or all(f in classes or f.casefold() in PART_NAMES for f in below)
            if below and suspicious and not any(is_image(file) for file in os.listdir(folder)):
                remedy = "--root must name the folder of the class folders, or that of train/, val/ and test/"
                raise UserError(f"{folder}: no images in it, only folders such as {min(below)}/; {remedy}")
            prefix = f"{part}/{name}" if part else name
            found[name] = [f"{prefix}/{path}" for path in walk_images(folder, others)] if here else []
        if others:
            kinds = ", ".join(sorted({os.path.splitext(name)[1].lower() or "no ending" for name in others})[:5])
            print(f"{len(others)} file(s) that Pillow cannot decode here ({kinds}), such as {others[0]}")
        return found

    def _classnames(self, classes: list[str]) -> dict[str, str]:
        if not classes:
            raise UserError(f"{self.folder}: no folders of images; put the images of each class into their own folder")
        path = self.path(CLASSNAMES)
        if not os.path.isfile(path):
            return {name: name for name in classes}
        names: dict[str, str] = {}
        for line in read_lines(path):
            # folders may have spaces in their names: take the longest that fits
            folder = max((name for name in classes if re.match(re.escape(name) + r"[\s,;]", line)), key=len, default="")
            names[folder] = line[len(folder) :].strip(" \t,;")
        for name in classes:
            if name not in names:
                raise UserError(f'{path}: no line for the folder "{name}"; add "{name} <class name>"')
        return names


def extend_cfg(cfg: Any) -> None:
    """Add the config keys of this data set."""
    cfg.DATASET.TITLE = ""  # its name in reports; empty: the name of the data root
    cfg.DATASET.SPLIT_SEED = 1  # selects the split of a folder without train/, val/ and test/
