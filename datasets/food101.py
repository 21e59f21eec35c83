"""Food-101 (Bossard, Guillaumin, Van Gool 2014), 101 classes."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .base import SplitDataset
from .raw import Split, split_folders


@DATASET_REGISTRY.register()
class Food101(SplitDataset):
    """``<root>/food-101/images/<class>/<number>.jpg``."""

    dataset_dir = "food-101"
    split_file = "split_zhou_Food101.json"

    def make_split(self) -> Split:
        return split_folders(self.images)
