"""Oxford-IIIT Pet (Parkhi et al. 2012), 37 breeds."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .base import SplitDataset
from .raw import Split, read_lines, reading, split_trainval
from .splits import Entry


@DATASET_REGISTRY.register()
class OxfordPets(SplitDataset):
    """``<root>/oxford_pets/images/<Breed>_1.jpg`` and ``annotations/{trainval,test}.txt``."""

    dataset_dir = "oxford_pets"
    split_file = "split_zhou_OxfordPets.json"

    def make_split(self) -> Split:
        test = self._annotated("test.txt")
        train, val = split_trainval(self._annotated("trainval.txt"))
        return {"train": train, "val": val, "test": test}

    def _annotated(self, name: str) -> list[Entry]:
        """Lines are ``<Breed>_<number> <label from 1> <species> <label of the species>``."""
        path = self.path("annotations", name)
        entries = []
        with reading(path):
            for line in read_lines(path):
                image, label, _, _ = line.split(" ")
                entries.append(Entry(f"{image}.jpg", int(label) - 1, image.rpartition("_")[0].lower()))
        return entries
