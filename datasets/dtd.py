"""Describable Textures (Cimpoi et al. 2014), 47 classes."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .base import SplitDataset
from .raw import Split, split_folders


@DATASET_REGISTRY.register()
class DescribableTextures(SplitDataset):
    """``<root>/dtd/images/<class>/<class>_0001.jpg``."""

    dataset_dir = "dtd"
    split_file = "split_zhou_DescribableTextures.json"

    def make_split(self) -> Split:
        return split_folders(self.images)
