import random

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from dassl.config import get_cfg_default
from dassl.data.transforms import AVAI_CHOICES, INTERPOLATION_MODES, build_transform
from PIL import Image

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
SIZE, BICUBIC = (24, 32), T.InterpolationMode.BICUBIC
NORMALIZE = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def config(*choices):
    cfg = get_cfg_default()
    cfg.INPUT.SIZE, cfg.INPUT.INTERPOLATION, cfg.INPUT.TRANSFORMS = SIZE, "bicubic", choices
    return cfg


def seeded(function):
    """Several results of a transform with fixed seeds."""
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    return torch.stack([function(IMAGE) for _ in range(8)])


CROP = T.RandomResizedCrop(SIZE, scale=(0.08, 1.0), interpolation=BICUBIC)
BY_HAND = {  # chosen, not in the order of application: transforms of plain torchvision
    ("normalize", "random_flip", "random_resized_crop"): [CROP, T.RandomHorizontalFlip(), T.ToTensor(), NORMALIZE],
    ("random_crop",): [T.RandomCrop(SIZE, padding=4), T.ToTensor()],
    ("gaussian_blur", "randomgrayscale", "colorjitter"): [
        T.Resize(SIZE, BICUBIC),
        T.ColorJitter(0.4, 0.4, 0.4, 0.1),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(21)], p=0.5),
        T.ToTensor(),
    ],
}


@pytest.mark.parametrize("choices", BY_HAND)
def test_training_transform_equals_torchvision(choices):
    assert torch.equal(seeded(build_transform(config(*choices))), seeded(T.Compose(BY_HAND[choices])))


def test_test_transform_has_no_augmentation():
    augmented = [choice for choice in AVAI_CHOICES if choice != "normalize"]
    by_hand = T.Compose([T.Resize(32, BICUBIC), T.CenterCrop(SIZE), T.ToTensor()])
    assert torch.equal(seeded(build_transform(config(*augmented), is_train=False)), seeded(by_hand))
    tfm = build_transform(config(*AVAI_CHOICES), is_train=False)
    assert torch.equal(tfm(IMAGE), NORMALIZE(by_hand(IMAGE)))


def test_log_lines(capsys):
    build_transform(config("random_flip", "random_resized_crop", "normalize"))
    build_transform(config("normalize"), choices=["cutout"])
    to_tensor = "+ to torch tensor of range [0, 1]"
    crop, flip = "+ random resized crop (size=(24, 32), scale=(0.08, 1.0))", "+ random flip"
    normalize = "+ normalization (mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])"
    cutout = ["Building transform_train", "+ resize to 24x32", to_tensor, "+ cutout (n_holes=1, length=16)"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Building transform_train", crop, flip, to_tensor, normalize, *cutout]
    build_transform(config("cutout"), is_train=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Building transform_test", "+ resize the smaller edge to 32", "+ 24x32 center crop", to_tensor]


def test_no_transform_and_unknown_names(capsys):
    assert set(INTERPOLATION_MODES) == {"bilinear", "bicubic", "nearest"}
    cfg = config("normalize")
    cfg.INPUT.NO_TRANSFORM = True
    assert build_transform(cfg) is None and capsys.readouterr().out == "Note: no transform is applied!\n"
    for name in ("random_flop", "randaugment"):
        with pytest.raises(ValueError, match=rf"^\[{name}\] is not one of"):
            build_transform(config(name))


def test_cutout_by_hand():
    cfg = config("cutout")
    cfg.INPUT.CUTOUT_N, cfg.INPUT.CUTOUT_LEN = 3, 8
    results = seeded(build_transform(cfg))
    np.random.seed(2)
    for result in results:
        expected = T.ToTensor()(T.Resize(SIZE, BICUBIC)(IMAGE))
        for _ in range(3):
            y, x = np.random.randint(24), np.random.randint(32)
            inside = [(r, c) for r in range(y - 4, y + 4) for c in range(x - 4, x + 4) if 0 <= r < 24 and 0 <= c < 32]
            for row, column in inside:
                expected[:, row, column] = 0
        assert torch.equal(result, expected)


def test_translation_by_hand():
    results = seeded(build_transform(config("random_translation")))
    resized = IMAGE.resize((32, 24), Image.BICUBIC)
    random.seed(2)
    for result in results:
        expected = resized
        if random.uniform(0, 1) <= 0.5:
            left, top = round(random.uniform(0, 36 - 32)), round(random.uniform(0, 27 - 24))
            expected = resized.resize((36, 27), Image.BILINEAR).crop((left, top, left + 32, top + 24))
        assert torch.equal(result, T.ToTensor()(expected))
    assert 1 < len(results.unique(dim=0))
