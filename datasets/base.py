"""The life of a few-shot data set: read or make the split, draw the sample, keep base or new classes, check.

Samples equal those of the original CoOp code for the same seed. Only images that are used become ``Datum`` objects.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import Any

from dassl.data.datasets import DatasetBase, Datum
from filelock import FileLock

from trainers.prompting.errors import UserError

from .fewshot import few_shot
from .splits import (
    SPLITS,
    Entry,
    check_files,
    check_labels,
    data_root,
    python_random,
    read_split,
    subsample_classes,
    write_split,
)


class FewShotDataset(DatasetBase):
    """A data set of which ``DATASET.NUM_SHOTS`` images a class are trained on (0 or less: all of them).

    ``DATASET.SUBSAMPLE_CLASSES`` keeps all classes, the first half of the labels (base) or the second (new).

    Subclasses name ``dataset_dir`` (folder below the data root) and ``image_dir`` (below that), and say in
    :meth:`entries` what there is.

    Raises:
        UserError: no data folder, an unknown subset, a class without training images, a missing image.
    """

    image_dir = "images"
    sampled: tuple[str, ...] = ("train", "val")  # what few-shot samples are drawn of
    listed = False  # entries come from listing the folders, so that their files are there
    test_only = False
    keep = True  # what was made or listed is written to the data set's folder

    def __init__(self, cfg: Any) -> None:
        self._open(cfg)
        shots, subset = cfg.DATASET.NUM_SHOTS, cfg.DATASET.SUBSAMPLE_CLASSES
        # A split that has to be made and the sample are one stream of numbers, as in CoOp.
        with python_random(cfg.SEED):
            self.prepare()
            drawn = few_shot(self, shots, cfg.SEED) if shots >= 1 and self.sampled else {}
            parts = {part: drawn.get(part) if part in drawn else self.entries(part) for part in SPLITS}
        check_labels(parts, source=self.source)
        parts = subsample_classes(parts, subset)
        if not parts["test"]:
            raise UserError(f"{self.source}: no test images of the {subset} classes in it")
        if not self.listed:
            check_files(self.images, parts)
        train, val, test = (self._data(parts[part]) for part in SPLITS)
        super().__init__(train_x=train, val=val or None, test=test)

    @classmethod
    def survey(cls, cfg: Any) -> tuple[str, dict[str, list[Entry]]]:
        """The image folder and all entries of each part: no image is asked for, nothing is written, nothing printed."""
        dataset = cls.__new__(cls)
        dataset._open(cfg)
        dataset.keep = False
        with python_random(cfg.SEED), redirect_stdout(io.StringIO()):
            dataset.prepare()
            return dataset.images, {part: dataset.entries(part) for part in SPLITS}

    def _open(self, cfg: Any) -> None:
        root = data_root(cfg)
        self.folder = os.path.join(root, self.dataset_dir)
        if not os.path.isdir(self.folder):
            raise UserError(
                f"{self.folder}: no such folder; --root must name the folder that holds {self.dataset_dir}/"
            )
        self.images = os.path.join(self.folder, self.image_dir)
        self.cfg = cfg

    def prepare(self) -> None:
        """Whatever has to be read or made before :meth:`entries` is asked."""

    def entries(self, part: str) -> list[Entry]:
        """The images of ``train``, ``val`` or ``test``."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """The file or folder that says what there is, for error messages."""
        return self.folder

    def path(self, *parts: str) -> str:
        """A file of the data set."""
        return os.path.join(self.folder, *parts)

    def fingerprint(self) -> str:
        """Changes when what the few-shot samples are drawn of does."""
        rows = [self.entries(part) for part in self.sampled]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def _data(self, entries: Iterable[Entry]) -> list[Datum]:
        return [Datum(impath=os.path.join(self.images, e.path), label=e.label, classname=e.classname) for e in entries]


class SplitDataset(FewShotDataset):
    """A data set whose split is a ``split_zhou_<Name>.json`` of CoOp, in the data set's folder.

    Where the file is missing, :meth:`make_split` makes the split from the raw annotations like CoOp, with the seed of
    the run, and it is written: every later run has the same one.
    """

    split_file = ""

    @property
    def source(self) -> str:
        return os.path.join(self.folder, self.split_file)

    def prepare(self) -> None:
        made = None
        if not os.path.isfile(self.source) and not self.keep:
            made = self.make_split()
        elif not os.path.isfile(self.source):
            try:
                with FileLock(os.path.join(self.folder, f".{self.split_file}.lock")):
                    if not os.path.isfile(self.source):  # nobody else made it while this process waited
                        made = self.make_split()
                        check_labels(made, source=self.folder)
                        write_split(self.source, made)
            except PermissionError as error:
                raise UserError(
                    f"{self.source}: no such file, and a split made now could not be kept ({error.strerror} in "
                    f"{self.folder}): put CoOp's there (DATASETS.md) or make the folder writable once"
                ) from error
        self.parts = made or read_split(self.source)

    def entries(self, part: str) -> list[Entry]:
        return self.parts[part]

    def make_split(self) -> dict[str, list[Entry]]:
        """The split as CoOp makes it where its file is missing."""
        raise UserError(f"{self.source}: no such file; DATASETS.md says where to get it")
