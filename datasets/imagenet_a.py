"""ImageNet-A (Hendrycks et al. 2021): photographs that a ResNet-50 gets wrong, of 200 of ImageNet's classes."""

from dassl.data.datasets import DATASET_REGISTRY

from .imagenet import ImageNetVariant


@DATASET_REGISTRY.register()
class ImageNetA(ImageNetVariant):
    """``<root>/imagenet-adversarial/imagenet-a/n02051845/….jpg`` and ``classnames.txt``."""

    dataset_dir = "imagenet-adversarial"
    image_dir = "imagenet-a"
