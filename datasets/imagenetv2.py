"""ImageNetV2 (Recht et al. 2019): new photographs of ImageNet's 1000 classes."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .imagenet import ImageNetVariant


@DATASET_REGISTRY.register()
class ImageNetV2(ImageNetVariant):
    """``<root>/imagenetv2/imagenetv2-matched-frequency-format-val/<label>/….jpeg`` and ``classnames.txt``."""

    dataset_dir = "imagenetv2"
    image_dir = "imagenetv2-matched-frequency-format-val"

    def folders(self, names: dict[str, str]) -> list[str]:
        return list(names)  # its folders are numbers: lines of classnames.txt, from 0
