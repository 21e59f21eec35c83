"""Image transforms chosen by the configuration."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from torchvision.transforms import functional as F
from torchvision.transforms.functional import InterpolationMode

from ...utils import check_availability

__all__ = [
    "AVAI_CHOICES",
    "INTERPOLATION_MODES",
    "Cutout",
    "GaussianNoise",
    "InstanceNormalization",
    "Random2DTranslation",
    "build_transform",
]

# center_crop is accepted without effect: the test transform always has it, the training transform never
_GEOMETRY = ["random_translation", "random_crop", "random_resized_crop", "center_crop", "random_flip"]
_COLOUR = ["colorjitter", "randomgrayscale", "gaussian_blur"]
_ON_TENSORS = ["cutout", "normalize", "gaussian_noise", "instance_norm"]
# names that Dassl.pytorch knows, and no more than names here
_ONLY_IN_DASSL = ["randaugment", "randaugment2", "randaugment_fixmatch"]
_ONLY_IN_DASSL += [f"{name}_policy" for name in ("imagenet", "cifar10", "svhn")]
AVAI_CHOICES = _GEOMETRY + _COLOUR + _ON_TENSORS + _ONLY_IN_DASSL

INTERPOLATION_MODES = {mode.value: mode for mode in map(InterpolationMode, ("bilinear", "bicubic", "nearest"))}


class Random2DTranslation:
    """Resize to (height, width) or, with probability ``p``, to 1.125 times that and crop at a random place.

    Draws from Python's ``random``: one number, and two more (x, then y) when the image is moved.
    """

    def __init__(
        self, height: int, width: int, p: float = 0.5, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> None:
        self.height, self.width = height, width
        self.p, self.interpolation = p, interpolation

    def __call__(self, img: Image.Image) -> Image.Image:
        target = [self.height, self.width]
        if random.uniform(0, 1) > self.p:
            return F.resize(img, target, self.interpolation)
        larger = [round(side * 1.125) for side in target]
        left = round(random.uniform(0, larger[1] - self.width))
        top = round(random.uniform(0, larger[0] - self.height))
        return F.crop(F.resize(img, larger, self.interpolation), top, left, *target)


class InstanceNormalization:
    """Bring each channel of a (C, H, W) tensor to mean 0 and (unbiased) standard deviation 1."""

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        std, mean = torch.std_mean(img, dim=(1, 2), keepdim=True)
        return (img - mean) / (std + self.eps)


class Cutout:
    """Set ``n_holes`` squares of a (C, H, W) tensor to 0.

    Their centres (y, then x) are drawn from NumPy's global generator; what reaches beyond the edge is cut off, so that
    squares there are smaller than ``length`` pixels.
    """

    def __init__(self, n_holes: int = 1, length: int = 16) -> None:
        self.n_holes, self.length = n_holes, length

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        out = img.clone()
        reach = self.length // 2
        for _ in range(self.n_holes):
            y, x = np.random.randint(img.shape[1]), np.random.randint(img.shape[2])
            out[:, max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach] = 0.0
        return out


class GaussianNoise:
    """Add normal noise to a tensor with probability ``p`` (drawn from Python's ``random``; the noise is torch's)."""

    def __init__(self, mean: float = 0, std: float = 0.15, p: float = 0.5) -> None:
        self.mean, self.std, self.p = mean, std, p

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        if random.uniform(0, 1) > self.p:
            return img
        return img + (torch.randn(img.shape) * self.std + self.mean)


def build_transform(cfg: Any, is_train: bool = True, choices: Sequence[str] | None = None) -> T.Compose | None:
    """Return the transform from a PIL image to a (3, H, W) tensor; None with INPUT.NO_TRANSFORM.

    Args:
        choices: names from AVAI_CHOICES to use in place of INPUT.TRANSFORMS; the order of application does not
            depend on theirs.

    Raises:
        ValueError: an unknown name, or one that only Dassl.pytorch has.
    """
    node = cfg.INPUT
    if node.NO_TRANSFORM:
        print("Note: no transform is applied!")
        return None
    choices = node.TRANSFORMS if choices is None else choices
    for choice in choices:
        if choice in _ONLY_IN_DASSL:
            raise ValueError(f"the fallback for Dassl has no transform {choice}; install Dassl.pytorch to use it")
        check_availability(choice, AVAI_CHOICES)

    print(f"Building transform_{'train' if is_train else 'test'}")
    steps = (_train_steps if is_train else _test_steps)(node, choices) + _final_steps(node, is_train)
    chosen = []
    for name, message, build in steps:
        if name is None or name in choices:
            print(f"+ {message}")
            chosen.append(build())
    return T.Compose(chosen)


# The three functions below return (name, message, builder): the step is taken when its name is chosen, or always where
# the name is None. Builders are called for chosen steps alone, as settings of the others may be invalid.


def _train_steps(node: Any, choices: Sequence[str]) -> list[tuple]:
    """The steps of the training transform up to the tensor."""
    size = node.SIZE
    mode = INTERPOLATION_MODES[node.INTERPOLATION]
    b, c, s, h = node.COLORJITTER_B, node.COLORJITTER_C, node.COLORJITTER_S, node.COLORJITTER_H
    steps = []
    if "random_crop" not in choices and "random_resized_crop" not in choices:  # neither brings the image to its size
        steps.append((None, f"resize to {size[0]}x{size[1]}", lambda: T.Resize(size, mode)))
    return [
        *steps,
        ("random_translation", "random translation", lambda: Random2DTranslation(size[0], size[1])),
        (
            "random_crop",
            f"random crop (padding = {node.CROP_PADDING})",
            lambda: T.RandomCrop(size, padding=node.CROP_PADDING),
        ),
        (
            "random_resized_crop",
            f"random resized crop (size={size}, scale={node.RRCROP_SCALE})",
            lambda: T.RandomResizedCrop(size, scale=node.RRCROP_SCALE, interpolation=mode),
        ),
        ("random_flip", "random flip", T.RandomHorizontalFlip),
        (
            "colorjitter",
            f"color jitter (brightness={b}, contrast={c}, saturation={s}, hue={h})",
            lambda: T.ColorJitter(b, c, s, h),
        ),
        ("randomgrayscale", "random gray scale", lambda: T.RandomGrayscale(node.RGS_P)),
        (
            "gaussian_blur",
            f"gaussian blur (kernel={node.GB_K})",
            lambda: T.RandomApply([T.GaussianBlur(node.GB_K)], p=node.GB_P),
        ),
    ]


def _test_steps(node: Any, choices: Sequence[str]) -> list[tuple]:
    """The steps of the test transform up to the tensor."""
    edge = max(node.SIZE)
    mode = INTERPOLATION_MODES[node.INTERPOLATION]
    return [
        (None, f"resize the smaller edge to {edge}", lambda: T.Resize(edge, mode)),
        (None, f"{node.SIZE[0]}x{node.SIZE[1]} center crop", lambda: T.CenterCrop(node.SIZE)),
    ]


def _final_steps(node: Any, is_train: bool) -> list[tuple]:
    """The step to the tensor and those after it."""
    mean, std = node.PIXEL_MEAN, node.PIXEL_STD
    steps = [
        (None, "to torch tensor of range [0, 1]", T.ToTensor),
        (
            "cutout",
            f"cutout (n_holes={node.CUTOUT_N}, length={node.CUTOUT_LEN})",
            lambda: Cutout(node.CUTOUT_N, node.CUTOUT_LEN),
        ),
        ("normalize", f"normalization (mean={mean}, std={std})", lambda: T.Normalize(mean, std)),
        (
            "gaussian_noise",
            f"gaussian noise (mean={node.GN_MEAN}, std={node.GN_STD})",
            lambda: GaussianNoise(node.GN_MEAN, node.GN_STD),
        ),
        ("instance_norm", "instance normalization", InstanceNormalization),
    ]
    augmentations = () if is_train else ("cutout", "gaussian_noise")
    return [step for step in steps if step[0] not in augmentations]
