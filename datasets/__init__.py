"""Data sets, one file each. Importing the package registers all of them with Dassl."""

import fallback  # noqa: F401 (must come first: it makes `import dassl` work)

from . import (
    caltech101,
    dtd,
    eurosat,
    fgvc_aircraft,
    folder,
    food101,
    imagenet,
    imagenet_a,
    imagenet_r,
    imagenet_sketch,
    imagenetv2,
    oxford_flowers,
    oxford_pets,
    shapes,
    stanford_cars,
    sun397,
    ucf101,
)


def extend_cfg(cfg) -> None:
    """Add the config keys of the data sets."""
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"  # all, base or new
    folder.extend_cfg(cfg)


__all__ = [
    "caltech101",
    "dtd",
    "eurosat",
    "extend_cfg",
    "fgvc_aircraft",
    "folder",
    "food101",
    "imagenet",
    "imagenet_a",
    "imagenet_r",
    "imagenet_sketch",
    "imagenetv2",
    "oxford_flowers",
    "oxford_pets",
    "shapes",
    "stanford_cars",
    "sun397",
    "ucf101",
]
