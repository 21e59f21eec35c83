"""Describable Textures (Cimpoi et al. 2014), 47 classes."""

from dassl.data.datasets import DATASET_REGISTRY

from .base import ClassFolderDataset


@DATASET_REGISTRY.register()
class DescribableTextures(ClassFolderDataset):
    """``<root>/dtd/images/<class>/<class>_0001.jpg``."""

    dataset_dir = "dtd"
