"""Flowers-102 (Nilsback, Zisserman 2008), 102 classes."""

from dassl.data.datasets import DATASET_REGISTRY

from .base import SplitDataset
from .files import load_mat, reading
from .splits import Split, read_json, split_classes


@DATASET_REGISTRY.register()
class OxfordFlowers(SplitDataset):
    """``<root>/oxford_flowers/jpg/image_00001.jpg``, ``imagelabels.mat``, ``cat_to_name.json``."""

    dataset_dir, image_dir = "oxford_flowers", "jpg"

    def make_split(self) -> Split:
        labels_path, names_path = self.path("imagelabels.mat"), self.path("cat_to_name.json")
        images: dict[int, list[str]] = {}  # classes in order of first appearance
        with reading(labels_path):
            for i, label in enumerate(load_mat(labels_path)["labels"][0], 1):  # images and labels count from 1
                images.setdefault(int(label), []).append(f"image_{i:05d}.jpg")
        with reading(names_path):
            names = read_json(names_path)
            return split_classes([(label - 1, names[str(label)], paths) for label, paths in images.items()])
