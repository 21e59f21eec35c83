"""ImageNet-R (Hendrycks et al. 2021): art, drawings, toys … of 200 of ImageNet's classes."""

from dassl.data.datasets import DATASET_REGISTRY

from .imagenet import ImageNetVariant


@DATASET_REGISTRY.register()
class ImageNetR(ImageNetVariant):
    """``<root>/imagenet-rendition/imagenet-r/n02051845/….jpg`` and ``classnames.txt``."""

    dataset_dir = "imagenet-rendition"
    image_dir = "imagenet-r"
