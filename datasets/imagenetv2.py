"""ImageNetV2 (Recht et al. 2019): new photographs of ImageNet's 1000 classes."""

from dassl.data.datasets import DATASET_REGISTRY

from trainers.prompting.errors import UserError

from .imagenet import CLASSNAMES, ImageNetVariant


@DATASET_REGISTRY.register()
class ImageNetV2(ImageNetVariant):
    """``<root>/imagenetv2/imagenetv2-matched-frequency-format-val/<label>/….jpeg`` and ``classnames.txt``."""

    dataset_dir = "imagenetv2"
    image_dir = "imagenetv2-matched-frequency-format-val"

    def wnids(self, names: dict[str, str], listing: dict[str, list[str]]) -> dict[str, str]:
        """Folders are named by label: the number of the line in ``classnames.txt``, from 0."""
        numbered = {str(label): wnid for label, wnid in enumerate(names)}
        if set(listing) != set(numbered):
            raise UserError(
                f"{self.path(CLASSNAMES)}: {len(names)} classes, but the image folders are not 0 to {len(names) - 1}"
            )
        return numbered
