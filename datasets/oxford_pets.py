"""Oxford-IIIT Pet (Parkhi et al. 2012), 37 breeds."""

from dassl.data.datasets import DATASET_REGISTRY

from .base import AnnotatedDataset
from .splits import Entry


@DATASET_REGISTRY.register()
class OxfordPets(AnnotatedDataset):
    """``<root>/oxford_pets/images/<Breed>_1.jpg`` and ``annotations/{trainval,test}.txt``."""

    dataset_dir = "oxford_pets"
    lists = ("annotations/trainval.txt", "annotations/test.txt")

    def parse(self, line: str) -> Entry:
        """Read ``<Breed>_<number> <label from 1> <species> <label of the species>``."""
        image, label, _, _ = line.split(" ")
        return Entry(f"{image}.jpg", int(label) - 1, image.rpartition("_")[0].lower())
