"""Caltech101 (Fei-Fei, Fergus, Perona 2004), 100 classes in CoOp's split."""

from dassl.data.datasets import DATASET_REGISTRY

from .base import ClassFolderDataset


@DATASET_REGISTRY.register()
class Caltech101(ClassFolderDataset):
    """``<root>/caltech-101/101_ObjectCategories/<class>/image_0001.jpg``."""

    dataset_dir, image_dir = "caltech-101", "101_ObjectCategories"
    ignored = ("BACKGROUND_Google", "Faces_easy")
    names = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
