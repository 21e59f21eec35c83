"""Few-shot samples: CoOp's draw, kept as JSON with paths relative to the data root; CoOp's own pickles are honoured."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

from trainers.prompting.errors import UserError
from trainers.prompting.results import write_text

from .splits import Entry, entry, read_json

if TYPE_CHECKING:
    from .base import FewShotDataset

FOLDER = "split_fewshot"  # CoOp's
MAX_VAL_SHOTS = 4  # CoOp never validates on more images per class
WORST = 3  # classes named in a warning


def few_shot(dataset: FewShotDataset, shots: int, seed: int) -> dict[str, list[Entry]]:
    """The sample of a data set for a seed: ``{part: entries}`` of ``dataset.sampled``.

    A ``split_fewshot/shot_<shots>-seed_<seed>.pkl`` of CoOp is taken as it is. Otherwise the sample is drawn from
    Python's random numbers as they stand, and a JSON file of that name keeps it; one that was drawn from something else
    than what is there now is replaced. Without a seed nothing is kept.

    Raises:
        UserError: a pickle that holds anything else than a sample of these images.
    """
    base = os.path.join(dataset.folder, FOLDER, f"shot_{shots}-seed_{seed}")
    if os.path.isfile(f"{base}.pkl"):
        print(f"Loading preprocessed few-shot data from {base}.pkl")
        return _read_pickle(f"{base}.pkl", dataset)
    kept = seed >= 0
    source = dataset.fingerprint() if kept else ""
    sample = _read_sample(f"{base}.json", dataset, source) if kept else None
    if sample is None:
        print(f"Creating a {shots}-shot dataset")
        sample = {
            part: draw(dataset.entries(part), shots if part == "train" else min(shots, MAX_VAL_SHOTS))
            for part in dataset.sampled
        }
        if kept:
            _write_sample(f"{base}.json", dataset, sample, source)
    _warn_of_small_classes(sample["train"], shots)
    return sample


def draw(entries: Sequence[Entry], shots: int) -> list[Entry]:
    """``shots`` entries of each label, labels in order of first appearance; all of a class that has fewer, once."""
    by_label: defaultdict[int, list[Entry]] = defaultdict(list)
    for item in entries:
        by_label[item.label].append(item)
    return [e for items in by_label.values() for e in (random.sample(items, shots) if len(items) >= shots else items)]


def _warn_of_small_classes(train: Sequence[Entry], shots: int) -> None:
    count: defaultdict[str, int] = defaultdict(int)
    for item in train:
        count[item.classname] += 1
    small = [f'"{name}" {n}' for name, n in count.items() if n < shots]
    if small:
        which = ", ".join(small[:WORST]) + (", …" if len(small) > WORST else "")
        print(f"Warning: {len(small)} of {len(count)} classes have fewer than {shots} training images: {which}")


# ------------------------------------------------------------------------------------------------- JSON


def _prefix(dataset: FewShotDataset) -> str:
    """The image folder relative to the data root, as it stands before a path."""
    parts = [part for part in (dataset.dataset_dir, dataset.image_dir) if part]
    return "".join(f"{part}/" for part in parts)


def _read_sample(path: str, dataset: FewShotDataset, source: str) -> Optional[dict[str, list[Entry]]]:
    """None where nothing is kept that was drawn from what is there."""
    if not os.path.isfile(path):
        return None
    prefix = _prefix(dataset)
    try:
        kept = read_json(path)
        if kept["source"] != source:
            print(f"{path}: drawn from other images than are there now; it is replaced")
            return None
        sample: dict[str, list[Entry]] = {}
        for part in dataset.sampled:
            items = [entry(row) for row in kept[part]]
            if not all(item.path.startswith(prefix) for item in items):
                raise ValueError(f"paths outside of {prefix}")
            sample[part] = [item._replace(path=item.path[len(prefix) :]) for item in items]
        return sample
    except (ValueError, KeyError, TypeError) as error:
        print(f"{path}: no few-shot sample ({type(error).__name__}: {error}); it is replaced")
        return None


def _write_sample(path: str, dataset: FewShotDataset, sample: dict[str, list[Entry]], source: str) -> None:
    prefix = _prefix(dataset)
    rows = {part: [(f"{prefix}{e.path}", e.label, e.classname) for e in items] for part, items in sample.items()}
    try:
        write_text(path, json.dumps({"source": source, **rows}, ensure_ascii=False))
        print(f"Saving preprocessed few-shot data to {path}")
    except OSError as error:  # a data root that cannot be written: the draw is the same every time
        print(f"{path}: few-shot data not kept ({error.strerror})")


# ------------------------------------------------------------------------------------------------- CoOp's pickles


class PickledDatum:
    """What a pickled ``Datum`` becomes: attributes and nothing else."""

    _impath, _label, _classname = "", -1, ""


class DatumUnpickler(pickle.Unpickler):
    """Reads lists of Dassl's ``Datum`` and nothing else: no other class or function is looked up, let alone called."""

    def find_class(self, module: str, name: str) -> type:
        if name == "Datum" and module.split(".")[0] == "dassl":
            return type("PickledDatum", (PickledDatum,), {})  # a pickle can set attributes of what it has named
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_pickled(path: str) -> dict[str, list[tuple[str, int, str]]]:
    """``{part: [(path, label, classname), …]}`` of a pickle of CoOp, with the paths of the machine that wrote it.

    Raises:
        UserError: it holds anything else.
    """
    try:
        with open(path, "rb") as file:
            content = DatumUnpickler(file).load()
        return {str(part): [_fields(item) for item in items] for part, items in content.items()}
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 (a damaged pickle raises nearly anything)
        raise UserError(
            f"{path}: not a list of images written by CoOp ({' '.join(str(error).split()) or type(error).__name__}); "
            "delete it"
        ) from error


def _fields(item: Any) -> tuple[str, int, str]:
    fields = item._impath, item._label, item._classname
    if not isinstance(item, PickledDatum) or [type(field) for field in fields] != [str, int, str]:
        raise TypeError(f"{type(item).__name__} is no image")
    return fields


def _read_pickle(path: str, dataset: FewShotDataset) -> dict[str, list[Entry]]:
    """Its images are found by the end of their paths, since the folder they were in may have been another."""
    content = read_pickled(path)
    sample = {}
    for part in dataset.sampled:
        if part not in content:
            raise UserError(f'{path}: no "{part}" in it; delete it')
        known = {item.path: item for item in dataset.entries(part)}
        sample[part] = []
        for impath, label, classname in content[part]:
            words = impath.replace("\\", "/").split("/")
            tails = ("/".join(words[i:]) for i in range(len(words)))
            found = next((known[tail] for tail in tails if tail in known), None)
            if found is None or (found.label, found.classname) != (label, classname):
                raise UserError(
                    f'{path}: {impath} ("{classname}", {label}) is not a {part} image of the split; delete it'
                )
            sample[part].append(found)
    return sample
