"""Stanford Cars (Krause et al. 2013), 196 models."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .base import SplitDataset
from .raw import Split, load_mat, reading, split_trainval
from .splits import Entry


@DATASET_REGISTRY.register()
class StanfordCars(SplitDataset):
    """``<root>/stanford_cars/{cars_train,cars_test}/00001.jpg``, ``devkit/``, ``cars_test_annos_withlabels.mat``."""

    dataset_dir = "stanford_cars"
    image_dir = ""
    split_file = "split_zhou_StanfordCars.json"

    def make_split(self) -> Split:
        trainval = self._annotated("cars_train", self.path("devkit", "cars_train_annos.mat"))
        test = self._annotated("cars_test", self.path("cars_test_annos_withlabels.mat"))
        train, val = split_trainval(trainval)
        return {"train": train, "val": val, "test": test}

    def _annotated(self, folder: str, path: str) -> list[Entry]:
        """Labels count from 1. Class names begin with the year, which the data set has at the end."""
        meta = self.path("devkit", "cars_meta.mat")
        with reading(meta):
            names = [str(name[0]).split(" ") for name in load_mat(meta)["class_names"][0]]
        names = [" ".join([name[-1], *name[:-1]]) for name in names]
        with reading(path):
            labelled = [(str(a["fname"][0]), int(a["class"][0, 0]) - 1) for a in load_mat(path)["annotations"][0]]
            if any(label < 0 for _, label in labelled):
                raise ValueError("a label below 1")
            return [Entry(f"{folder}/{image}", label, names[label]) for image, label in labelled]
