"""Food-101 (Bossard, Guillaumin, Van Gool 2014), 101 classes."""

from dassl.data.datasets import DATASET_REGISTRY

from .base import ClassFolderDataset


@DATASET_REGISTRY.register()
class Food101(ClassFolderDataset):
    """``<root>/food-101/images/<class>/<number>.jpg``."""

    dataset_dir = "food-101"
