"""Base classes of the data sets: read or make the split, draw the few-shot sample, keep base or new classes, check."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from dassl.data.datasets import DatasetBase, Datum
from filelock import FileLock

from trainers.prompting.errors import UserError

from . import splits
from .files import list_folders, list_images, parse_lines
from .splits import SPLITS, Entry, Split

SAMPLES = "split_fewshot"  # CoOp's folder
MAX_VAL_SHOTS = 4  # CoOp validates on at most this many images per class


class FewShotDataset(DatasetBase):
    """A data set from which ``DATASET.NUM_SHOTS`` training images per class are drawn (0 or less: all of them).

    Subclasses name ``dataset_dir`` (folder below the data root) and ``image_dir`` (below that), and fill ``self.parts``
    in :meth:`prepare`. Raises UserError for an unknown subset, a missing folder or image.
    """

    image_dir = "images"
    sampled: tuple[str, ...] = ("train", "val")  # parts of which few-shot samples are drawn
    listed = False  # entries come from directory listings: the files exist
    test_only = False
    may_write = True  # splits and listings are saved in the data set's folder
    parts: Split

    def __init__(self, cfg: Any) -> None:
        self._open(cfg)
        subset = cfg.DATASET.SUBSAMPLE_CLASSES
        with splits.python_random(cfg.SEED):  # the split and the sample use one random stream, as in CoOp
            self.prepare()
            sample = self._sample(cfg.DATASET.NUM_SHOTS, cfg.SEED)
            parts = {part: sample[part] if part in sample else self.entries(part) for part in SPLITS}
        splits.check_labels(parts, source=self.source)
        parts = splits.subsample_classes(parts, subset)
        if not parts["test"]:
            raise UserError(f"{self.source}: no test images of the {subset} classes; add some")
        if not self.listed:
            splits.check_files(self.images, parts)
        train, val, test = (
            [Datum(impath=os.path.join(self.images, e.path), label=e.label, classname=e.classname) for e in parts[part]]
            for part in SPLITS
        )
        super().__init__(train_x=train, val=val or None, test=test)

    @classmethod
    def survey(cls, cfg: Any) -> tuple[str, Split]:
        """Return the image folder and all entries of each part. Opens no image, writes and prints nothing."""
        dataset = cls.__new__(cls)
        dataset._open(cfg)
        dataset.may_write = False
        with splits.python_random(cfg.SEED), redirect_stdout(io.StringIO()):
            dataset.prepare()
            return dataset.images, {part: dataset.entries(part) for part in SPLITS}

    def prepare(self) -> None:
        """Read or make the split."""
        raise NotImplementedError

    def entries(self, part: str) -> list[Entry]:
        """Return the images of ``train``, ``val`` or ``test``."""
        return self.parts[part]

    @property
    def source(self) -> str:
        """File or folder that defines the split, for error messages."""
        return self.folder

    def path(self, *parts: str) -> str:
        return os.path.join(self.folder, *parts)

    def fingerprint(self) -> str:
        """Return a digest of the images that samples are drawn from."""
        return digest([self.entries(part) for part in self.sampled])

    def _open(self, cfg: Any) -> None:
        self.cfg = cfg
        self.folder = os.path.normpath(os.path.join(data_root(cfg), self.dataset_dir))
        self.images = os.path.join(self.folder, self.image_dir)
        if not os.path.isdir(self.folder):
            raise UserError(f"{self.folder}: no such folder; --root must name the folder of {self.dataset_dir}/")

    def _sample(self, shots: int, seed: int) -> Split:
        """Return CoOp's pickled sample, the stored one, or a new draw, which is stored if there is a seed."""
        if shots < 1 or not self.sampled:
            return {}
        base = self.path(SAMPLES, f"shot_{shots}-seed_{seed}")
        if os.path.isfile(pickled := f"{base}.pkl"):
            print(f"Loading preprocessed few-shot data from {pickled}")
            return splits.match_pickled(pickled, {part: self.entries(part) for part in self.sampled})
        prefix = "".join(f"{part}/" for part in (self.dataset_dir, self.image_dir) if part)
        source = self.fingerprint() if seed >= 0 else ""
        sample = splits.read_sample(f"{base}.json", self.sampled, prefix, source) if seed >= 0 else None
        if sample is None:
            print(f"Creating a {shots}-shot dataset")
            limits = {"train": shots, "val": min(shots, MAX_VAL_SHOTS)}
            sample = {part: splits.draw(self.entries(part), limits[part]) for part in self.sampled}
            if seed >= 0:
                splits.write_sample(f"{base}.json", sample, prefix, source)
        splits.warn_of_small_classes(sample["train"], shots)
        return sample


def digest(value: Any) -> str:
    """Return a short digest of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def data_root(cfg: Any) -> str:
    """Return ``DATASET.ROOT`` as an absolute path. Raises UserError where it is empty or not a folder."""
    if not cfg.DATASET.ROOT:
        raise UserError("DATASET.ROOT is empty: name the folder of the data sets with --root")
    root = os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT))
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; --root must name the folder of the data sets")
    return root


class SplitDataset(FewShotDataset):
    """A data set with CoOp's split file, ``split_zhou_<Name>.json``; without it, a split is made and saved."""

    split_file: str

    def __init_subclass__(cls) -> None:
        cls.split_file = f"split_zhou_{cls.__name__}.json"

    @property
    def source(self) -> str:
        return self.path(self.split_file)

    def prepare(self) -> None:
        if os.path.isfile(self.source):
            self.parts = splits.read_split(self.source)
            made_from = splits.read_json(self.source).get("made_from")  # in splits that this code made
            if made_from not in (None, self.made_from()):
                print(
                    f"WARNING: {self.source} was made from other files than those in {self.folder} now: delete it, and "
                    "a new split is made"
                )
        elif not self.may_write:
            self.parts = self.make_split()
        else:
            try:
                with FileLock(self.path(f".{self.split_file}.lock")):
                    if not os.path.isfile(self.source):  # no other process made it meanwhile
                        split = self.make_split()
                        splits.check_labels(split, source=self.folder)
                        splits.check_files(self.images, split)
                        text = json.dumps({**split, "made_from": self.made_from()}, indent=4)
                        splits.write_text(self.source, text)
                        print(f"Saved split to {self.source}")
                self.parts = splits.read_split(self.source)
            except PermissionError as error:
                remedy = "put CoOp's file there (docs/data.md) or make the folder writable once"
                reason = f"no such file, and a new split cannot be saved ({error.strerror})"
                raise UserError(f"{self.source}: {reason}: {remedy}") from error

    def made_from(self) -> str:
        """Return a digest of the files that a split is made from: names and numbers of images, sizes of annotations."""
        files = [self.path(name) for name in getattr(self, "lists", ()) if os.path.isfile(self.path(name))]
        folders = list_folders(self.images) if os.path.isdir(self.images) else []
        counts = [(name, len(list_images(os.path.join(self.images, name)))) for name in folders]
        return digest([counts, [os.path.getsize(path) for path in files]])

    def make_split(self) -> Split:
        """Make the split from the raw data, with CoOp's draws and the seed of the run."""
        raise UserError(f"{self.source}: no such file; docs/data.md says where to get it")


class ClassFolderDataset(SplitDataset):
    """A data set whose images are in class folders; without CoOp's split file each class is split 50/20/30."""

    names: Mapping[str, str] = {}  # class names of folders that are not named after their class
    ignored: Sequence[str] = ()  # folders that are not classes

    def make_split(self) -> Split:
        folders = [folder for folder in list_folders(self.images) if folder not in self.ignored]
        if not folders:
            raise UserError(f"{self.images}: no class folders; unpack the images of the data set there (docs/data.md)")
        paths = {f: [f"{f}/{name}" for name in list_images(os.path.join(self.images, f))] for f in folders}
        return splits.split_classes([(label, self.names.get(f, f), paths[f]) for label, f in enumerate(folders)])


class AnnotatedDataset(SplitDataset):
    """A data set with annotated training and test images; a fifth of the training images are for validation."""

    lists: tuple[str, str]  # annotation files of the training and the test images

    def make_split(self) -> Split:
        trainval, test = map(self.annotated, self.lists)
        return {**splits.split_trainval(trainval), "test": test}

    def annotated(self, name: str) -> list[Entry]:
        return parse_lines(self.path(name), self.parse)

    def parse(self, line: str) -> Entry:
        """Read a line of an annotation file. May raise ValueError, KeyError or IndexError."""
        raise NotImplementedError
