"""Data sets on which models trained on ImageNet are tested."""

from dassl.data.datasets import DATASET_REGISTRY

from trainers.prompting.errors import UserError

from .base import FewShotDataset
from .imagenet import CLASSNAMES, read_folders


class ImageNetVariant(FewShotDataset):
    """``<root>/<dataset_dir>/<image_dir>/n02051845/….jpg`` and ``classnames.txt``.

    There are no training images: as in CoOp the test images are also ``train_x``, from which Dassl takes the classes.
    Base and new classes are halves of the training classes, so there are none.
    """

    listed = test_only = True
    sampled = ()
    numbered = False

    def prepare(self) -> None:
        if (subset := self.cfg.DATASET.SUBSAMPLE_CLASSES) != "all":
            name = type(self).__name__
            raise UserError(f"DATASET.SUBSAMPLE_CLASSES {subset}: {name} has no base and new classes; set it to all")
        test = read_folders(self.path(CLASSNAMES), self.images, numbered=self.numbered)
        self.parts = {"train": test, "val": [], "test": test}


@DATASET_REGISTRY.register()
class ImageNetV2(ImageNetVariant):
    """Recht et al. 2019: new photographs of the 1000 classes, in folders named by label."""

    dataset_dir, image_dir, numbered = "imagenetv2", "imagenetv2-matched-frequency-format-val", True


@DATASET_REGISTRY.register()
class ImageNetSketch(ImageNetVariant):
    """Wang et al. 2019: sketches of the 1000 classes."""

    dataset_dir, image_dir = "imagenet-sketch", "images"


@DATASET_REGISTRY.register()
class ImageNetA(ImageNetVariant):
    """Hendrycks et al. 2021: photographs that a ResNet-50 gets wrong, of 200 classes."""

    dataset_dir, image_dir = "imagenet-adversarial", "imagenet-a"


@DATASET_REGISTRY.register()
class ImageNetR(ImageNetVariant):
    """Hendrycks et al. 2021: art, drawings, toys … of 200 classes."""

    dataset_dir, image_dir = "imagenet-rendition", "imagenet-r"
