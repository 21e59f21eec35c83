import random

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from dassl.config import get_cfg_default
from dassl.data.transforms import INTERPOLATION_MODES, build_transform
from dassl.data.transforms.transforms import Cutout, GaussianNoise, InstanceNormalization, Random2DTranslation
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def config(*choices):
    cfg = get_cfg_default()
    cfg.INPUT.SIZE = (24, 32)
    cfg.INPUT.TRANSFORMS = choices
    return cfg


def seeded(function, *args):
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    return function(*args)


def test_interpolation_modes():
    assert INTERPOLATION_MODES == {
        "bilinear": InterpolationMode.BILINEAR,
        "bicubic": InterpolationMode.BICUBIC,
        "nearest": InterpolationMode.NEAREST,
    }


def test_coop_training_transform(capsys):
    cfg = config("random_flip", "random_resized_crop", "normalize")
    cfg.INPUT.INTERPOLATION = "bicubic"
    tfm = build_transform(cfg)
    assert capsys.readouterr().out.splitlines() == [
        "Building transform_train",
        "+ random resized crop (size=(24, 32), scale=(0.08, 1.0))",
        "+ random flip",
        "+ to torch tensor of range [0, 1]",
        "+ normalization (mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])",
    ]
    by_hand = T.Compose(
        [
            T.RandomResizedCrop((24, 32), scale=(0.08, 1.0), interpolation=InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    assert torch.equal(seeded(tfm, IMAGE), seeded(by_hand, IMAGE))


def test_test_transform(capsys):
    tfm = build_transform(config("random_flip", "cutout", "gaussian_noise", "normalize"), is_train=False)
    assert capsys.readouterr().out.splitlines() == [
        "Building transform_test",
        "+ resize the smaller edge to 32",
        "+ 24x32 center crop",
        "+ to torch tensor of range [0, 1]",
        "+ normalization (mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])",
    ]
    resized = IMAGE.resize((40, 32), Image.BILINEAR)
    pixels = pil_to_tensor(resized.crop((4, 4, 36, 28))) / 255.0
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(tfm(IMAGE), (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), atol=1e-6)


def test_resized_unless_a_crop_does_it(capsys):
    assert build_transform(config("random_flip"))(IMAGE).shape == (3, 24, 32)
    assert "+ resize to 24x32\n" in capsys.readouterr().out
    cropped = build_transform(config("random_crop"))(IMAGE)
    assert cropped.shape == (3, 24, 32) and "resize" not in capsys.readouterr().out


CHOICES = [
    *("random_translation", "random_crop", "random_resized_crop", "random_flip", "colorjitter", "randomgrayscale"),
    *("gaussian_blur", "cutout", "normalize", "gaussian_noise", "instance_norm"),
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_changes_the_training_image_and_names_itself(choice, capsys):
    build_transform(config())
    plain_text = capsys.readouterr().out
    tfm = build_transform(config(choice))
    assert capsys.readouterr().out != plain_text
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    plain = build_transform(config())(IMAGE)
    results = [tfm(IMAGE) for _ in range(12)]
    assert all(result.shape == (3, 24, 32) for result in results)
    assert any(not torch.equal(result, plain) for result in results)


def test_choices_argument_and_no_transform(capsys):
    tfm = build_transform(config("normalize"), choices=["cutout"])
    assert "cutout" in capsys.readouterr().out and len(tfm.transforms) == 3
    cfg = config("normalize")
    cfg.INPUT.NO_TRANSFORM = True
    assert build_transform(cfg) is None
    assert capsys.readouterr().out == "Note: no transform is applied!\n"
    with pytest.raises((ValueError, AssertionError)):
        build_transform(config("random_flop"))


def test_cutout_by_hand():
    image = torch.ones(3, 20, 30)
    np.random.seed(4)
    expected = image.clone()
    for _ in range(3):
        y, x = np.random.randint(20), np.random.randint(30)
        for row in range(20):
            for column in range(30):
                if y - 4 <= row < y + 4 and x - 4 <= column < x + 4:
                    expected[:, row, column] = 0
    np.random.seed(4)
    assert torch.equal(Cutout(3, 8)(image), expected)
    assert image.min() == 1


def test_gaussian_noise():
    image = torch.zeros(3, 50, 50)
    noisy = GaussianNoise(2.0, 0.5, p=1.0)(image)
    assert noisy.mean() == pytest.approx(2.0, abs=0.05) and noisy.std() == pytest.approx(0.5, abs=0.05)
    assert GaussianNoise(p=0.0)(image) is image


def test_instance_normalization():
    out = InstanceNormalization()(torch.rand(3, 6, 7) * 5 + 2)
    assert torch.allclose(out.mean((1, 2)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out.flatten(1).std(1), torch.ones(3), atol=1e-5)


def test_translation_draws():
    move = Random2DTranslation(16, 24, p=1.0)
    random.seed(3)
    random.uniform(0, 1)
    left, top = round(random.uniform(0, 27 - 24)), round(random.uniform(0, 18 - 16))
    expected = IMAGE.resize((27, 18), Image.BILINEAR).crop((left, top, left + 24, top + 16))
    random.seed(3)
    assert np.array_equal(np.asarray(move(IMAGE)), np.asarray(expected))
    still = Random2DTranslation(16, 24, p=0.0)(IMAGE)
    assert np.array_equal(np.asarray(still), np.asarray(IMAGE.resize((24, 16), Image.BILINEAR)))
