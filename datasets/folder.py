"""The user's own images: a folder of class folders, no code to write."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from dassl.data.datasets import DATASET_REGISTRY

from trainers.prompting.errors import UserError

from .base import FewShotDataset
from .fewshot import FOLDER as SAMPLES
from .raw import list_folders, read_lines, walk_images
from .splits import SPLITS, Entry

CLASSNAMES = "classnames.txt"
TRAIN, VAL = 0.5, 0.2  # parts of a class's images, as in the splits that CoOp made; the rest is tested on


@DATASET_REGISTRY.register()
class Folder(FewShotDataset):
    """``<root>/<class>/<image>``, or ``<root>/{train,val,test}/<class>/<image>``; images may be nested deeper.

    Without parts of its own a folder is split by ``DATASET.SPLIT_SEED``: half of each class to train, a fifth to
    validate, the rest to test. A part is a matter of the seed and the path below the class folder, so that other images
    that come or go move few from one part to another. ``val/`` may be missing; without ``test/`` the images in ``val/``
    are the test images, as in ImageNet.

    Class names are the names of the folders, underscores being spaces, or what a ``classnames.txt`` beside them says,
    with lines ``<folder> <class name>``. Labels are in the order of the folders' names.

    Raises:
        UserError: no classes, a class without images to train on, or too few to split, a folder without a class name.
    """

    dataset_dir = ""
    image_dir = ""
    listed = True

    def prepare(self) -> None:
        folders = [name for name in list_folders(self.folder) if name != SAMPLES]
        own = [part for part in SPLITS if part in folders]
        if "train" in own:
            self.parts = self._read_parts(own)
        elif own:
            raise UserError(f"{self.folder}: {own[0]}/ is there and train/ is not; add it or rename the folder")
        else:
            self.parts = self._split(folders)

    def entries(self, part: str) -> list[Entry]:
        return self.parts[part]

    def _read_parts(self, own: list[str]) -> dict[str, list[Entry]]:
        if len(own) == 1:
            raise UserError(f"{self.folder}: train/ is there and neither test/ nor val/ is; add images to test on")
        classes = list_folders(self.path("train"))
        names = self._classnames(classes)
        parts: dict[str, list[Entry]] = {part: [] for part in SPLITS}
        for part in own:
            unknown = sorted(set(list_folders(self.path(part))) - set(classes))
            if unknown:
                raise UserError(f"{self.path(part, unknown[0])}: no class of that name in train/; rename or remove it")
            for label, (folder, paths) in enumerate(self._images(part, classes).items()):
                if part == "train" and not paths:
                    raise UserError(f"{self.path(part, folder)}: no images in it; add some or remove the folder")
                parts[part] += [Entry(path, label, names[folder]) for path in paths]
        if "test" not in own:
            print(f"{self.folder}: no test/, the images in val/ are tested on")
            parts.update(test=parts["val"], val=[])
        return parts

    def _split(self, classes: list[str]) -> dict[str, list[Entry]]:
        names = self._classnames(classes)
        seed = self.cfg.DATASET.SPLIT_SEED
        parts: dict[str, list[Entry]] = {part: [] for part in SPLITS}
        for label, (folder, paths) in enumerate(self._images("", classes).items()):
            if len(paths) < 2:
                raise UserError(
                    f"{self.path(folder)}: {len(paths)} image(s) of this class, at least 2 are needed (to train and to "
                    "test); add some or remove the folder"
                )
            order = sorted(paths, key=lambda path: hashlib.sha256(f"{seed}/{path}".encode()).digest())
            n_train = max(1, round(TRAIN * len(order)))
            n_val = min(round(VAL * len(order)), len(order) - n_train - 1)
            for part, chosen in zip(
                SPLITS, (order[:n_train], order[n_train : n_train + n_val], order[n_train + n_val :])
            ):
                parts[part] += [Entry(path, label, names[folder]) for path in sorted(chosen)]
        return parts

    def _images(self, part: str, classes: list[str]) -> dict[str, list[str]]:
        """Sorted paths of each class's images, relative to the data set."""
        prefix = f"{part}/" if part else ""
        return {
            name: [f"{prefix}{name}/{path}" for path in walk_images(os.path.join(self.folder, part, name))]
            for name in classes
        }

    def _classnames(self, classes: list[str]) -> dict[str, str]:
        if not classes:
            raise UserError(
                f"{self.folder}: no folders of images in it; put the images of each class into a folder of its own"
            )
        path = self.path(CLASSNAMES)
        if not os.path.isfile(path):
            return {name: name for name in classes}
        names: dict[str, str] = {}
        for line in read_lines(path):
            # folders may have blanks in their names: the longest one that fits
            fitting = [name for name in classes if line.startswith((f"{name} ", f"{name}\t"))]
            if fitting:
                folder = max(fitting, key=len)
                names[folder] = line[len(folder) :].strip()
        missing = [name for name in classes if name not in names]
        if missing:
            raise UserError(f'{path}: no line for the folder "{missing[0]}"; add "{missing[0]} <class name>"')
        return names


def extend_cfg(cfg: Any) -> None:
    """Add the config key of this data set."""
    cfg.DATASET.SPLIT_SEED = 1  # which split of a folder that has no parts of its own
