"""Caltech101 (Fei-Fei, Fergus, Perona 2004), 100 classes in CoOp's split."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .base import SplitDataset
from .raw import Split, split_folders

IGNORED = ("BACKGROUND_Google", "Faces_easy")
NAMES = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}


@DATASET_REGISTRY.register()
class Caltech101(SplitDataset):
    """``<root>/caltech-101/101_ObjectCategories/<class>/image_0001.jpg``."""

    dataset_dir = "caltech-101"
    image_dir = "101_ObjectCategories"
    split_file = "split_zhou_Caltech101.json"

    def make_split(self) -> Split:
        return split_folders(self.images, NAMES, IGNORED)
