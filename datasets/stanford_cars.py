"""Stanford Cars (Krause et al. 2013), 196 models."""

from dassl.data.datasets import DATASET_REGISTRY

from .base import AnnotatedDataset
from .files import load_mat, reading
from .splits import Entry


@DATASET_REGISTRY.register()
class StanfordCars(AnnotatedDataset):
    """``<root>/stanford_cars/{cars_train,cars_test}/00001.jpg``, ``devkit/``, ``cars_test_annos_withlabels.mat``."""

    dataset_dir, image_dir = "stanford_cars", ""
    lists = ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")

    def annotated(self, name: str) -> list[Entry]:
        """Read labels, which count from 1, and class names, of which CoOp moves the year to the front."""
        folder = "cars_train" if name == self.lists[0] else "cars_test"
        meta, path = self.path("devkit", "cars_meta.mat"), self.path(name)
        with reading(meta):
            names = [str(name[0]).split(" ") for name in load_mat(meta)["class_names"][0]]
        names = [" ".join([name[-1], *name[:-1]]) for name in names]
        with reading(path):
            labelled = [(str(a["fname"][0]), int(a["class"][0, 0]) - 1) for a in load_mat(path)["annotations"][0]]
            if any(label < 0 for _, label in labelled):
                raise ValueError("a label below 1")
            return [Entry(f"{folder}/{image}", label, names[label]) for image, label in labelled]
