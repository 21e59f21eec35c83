"""EuroSAT (Helber et al. 2019), 10 classes of satellite images."""

from dassl.data.datasets import DATASET_REGISTRY

from .base import ClassFolderDataset


@DATASET_REGISTRY.register()
class EuroSAT(ClassFolderDataset):
    """``<root>/eurosat/2750/<class>/<class>_1.jpg``."""

    dataset_dir, image_dir = "eurosat", "2750"
    names = {
        "AnnualCrop": "Annual Crop Land",
        "HerbaceousVegetation": "Herbaceous Vegetation Land",
        "Highway": "Highway or Road",
        "Industrial": "Industrial Buildings",
        "Pasture": "Pasture Land",
        "PermanentCrop": "Permanent Crop Land",
        "Residential": "Residential Buildings",
        "SeaLake": "Sea or Lake",
    }
