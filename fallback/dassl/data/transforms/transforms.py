"""Image transforms chosen by the configuration."""

import random
from functools import partial

import numpy as np
import torchvision.transforms as T
from torchvision.transforms import functional as F

from ...utils import check_availability

AVAI_CHOICES = [  # the order given in INPUT.TRANSFORMS has no effect, nor has center_crop: every test transform crops
    *("random_translation", "random_crop", "random_resized_crop", "center_crop", "random_flip", "colorjitter"),
    *("randomgrayscale", "gaussian_blur", "cutout", "normalize"),
]
INTERPOLATION_MODES = {mode.value: mode for mode in map(T.InterpolationMode, ("bilinear", "bicubic", "nearest"))}


def random_translation(img, height: int, width: int):
    """Resize to (height, width) or, half of the time, to 1.125 times that and crop; draws from Python's ``random``."""
    if random.uniform(0, 1) > 0.5:
        return F.resize(img, [height, width])
    larger = [round(height * 1.125), round(width * 1.125)]
    left = round(random.uniform(0, larger[1] - width))
    top = round(random.uniform(0, larger[0] - height))
    return F.crop(F.resize(img, larger), top, left, height, width)


def cutout(img, n_holes: int, length: int):
    """Set squares of a (C, H, W) tensor to 0; NumPy draws y, then x of each centre."""
    img, half = img.clone(), length // 2
    for _ in range(n_holes):
        y, x = np.random.randint(img.shape[1]), np.random.randint(img.shape[2])
        img[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0.0
    return img


def build_transform(cfg, is_train=True, choices=None):
    """Build the transform from a PIL image to a (3, H, W) tensor; ``choices`` replaces INPUT.TRANSFORMS."""
    node = cfg.INPUT
    if node.NO_TRANSFORM:
        print("Note: no transform is applied!")
        return None
    choices = node.TRANSFORMS if choices is None else choices
    for choice in choices:
        check_availability(choice, AVAI_CHOICES)
    size, mode = node.SIZE, INTERPOLATION_MODES[node.INTERPOLATION]
    augment = choices if is_train else ()
    steps = []

    def add(message, step) -> None:
        print(f"+ {message}")
        steps.append(step)

    print(f"Building transform_{'train' if is_train else 'test'}")
    if not is_train:
        add(f"resize the smaller edge to {max(size)}", T.Resize(max(size), mode))
        add(f"{size[0]}x{size[1]} center crop", T.CenterCrop(size))
    elif "random_crop" not in choices and "random_resized_crop" not in choices:
        add(f"resize to {size[0]}x{size[1]}", T.Resize(size, mode))
    if "random_translation" in augment:
        add("random translation", partial(random_translation, height=size[0], width=size[1]))
    if "random_crop" in augment:
        add(f"random crop (padding = {node.CROP_PADDING})", T.RandomCrop(size, padding=node.CROP_PADDING))
    if "random_resized_crop" in augment:
        crop = T.RandomResizedCrop(size, scale=node.RRCROP_SCALE, interpolation=mode)
        add(f"random resized crop (size={size}, scale={node.RRCROP_SCALE})", crop)
    if "random_flip" in augment:
        add("random flip", T.RandomHorizontalFlip())
    if "colorjitter" in augment:
        b, c, s, h = node.COLORJITTER_B, node.COLORJITTER_C, node.COLORJITTER_S, node.COLORJITTER_H
        add(f"color jitter (brightness={b}, contrast={c}, saturation={s}, hue={h})", T.ColorJitter(b, c, s, h))
    if "randomgrayscale" in augment:
        add("random gray scale", T.RandomGrayscale(node.RGS_P))
    if "gaussian_blur" in augment:
        add(f"gaussian blur (kernel={node.GB_K})", T.RandomApply([T.GaussianBlur(node.GB_K)], p=node.GB_P))
    add("to torch tensor of range [0, 1]", T.ToTensor())
    if "cutout" in augment:
        n, length = node.CUTOUT_N, node.CUTOUT_LEN
        add(f"cutout (n_holes={n}, length={length})", partial(cutout, n_holes=n, length=length))
    if "normalize" in choices:
        mean, std = node.PIXEL_MEAN, node.PIXEL_STD
        add(f"normalization (mean={mean}, std={std})", T.Normalize(mean, std))
    return T.Compose(steps)
