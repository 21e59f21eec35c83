"""Zero-shot CLIP and its ensemble of prompts, one prompt at a time."""

from types import SimpleNamespace

import pytest
import torch
from tiny import NAMES

from trainers.prompting.backbone import load_clip
from trainers.prompting.text import encode_texts
from trainers.zsclip import ZeroshotCLIP, ZeroshotCLIP2


@pytest.fixture(scope="module")
def backbone(clip_file):
    return load_clip(clip_file).double()


def text_features(kind, backbone, dataset):
    trainer = kind.__new__(kind)  # without data
    trainer.model, trainer.dm = backbone, SimpleNamespace(dataset=SimpleNamespace(classnames=NAMES))
    trainer.cfg = SimpleNamespace(DATASET=SimpleNamespace(NAME=dataset))
    return trainer.text_features()


@pytest.mark.parametrize(
    "dataset, own",
    [
        ("OxfordPets", "a photo of a {}, a type of pet."),
        ("Caltech101", "a photo of a {}."),
        ("EuroSAT", "a centered satellite photo of {}."),
    ],
)
def test_one_prompt(backbone, dataset, own):
    expected = encode_texts(backbone, [own.format(name.replace("_", " ")) for name in NAMES])
    torch.testing.assert_close(text_features(ZeroshotCLIP, backbone, dataset), expected)


def test_an_ensemble_is_the_mean_of_its_prompts_features_every_time(backbone):
    """Seven templates on ImageNet, eight elsewhere; what one trainer adds, the next one does not inherit."""
    seven = ["itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."]
    seven += ["a {} in a video game.", "art of the {}.", "a photo of the small {}."]
    for dataset, own in (
        ("OxfordPets", ["a photo of a {}, a type of pet."]),
        ("Shapes", ["a photo of a {}."]),
        ("ImageNet", []),
        ("OxfordPets", ["a photo of a {}, a type of pet."]),
    ):
        expected = []
        for name in NAMES:
            prompts = [template.format(name.replace("_", " ")) for template in seven + own]
            total = sum(encode_texts(backbone, [prompt])[0] for prompt in prompts)
            expected.append(total / total.norm())
        torch.testing.assert_close(text_features(ZeroshotCLIP2, backbone, dataset), torch.stack(expected))
