"""Zero-shot CLIP against open_clip and, prompt by prompt, its ensemble."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import start
from tiny import NAMES, arguments
from yacs.config import CfgNode as CN

from trainers.prompting.backbone import load_clip
from trainers.prompting.text_encoder import encode_texts
from trainers.zsclip import EnsembleMethod

PETS, PLAIN = "a photo of a {}, a type of pet.", "a photo of a {}."
SEVEN = ["itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."]
SEVEN += ["a {} in a video game.", "art of the {}.", "a photo of the small {}."]


@pytest.fixture(scope="module")
def backbone(clip_file):
    return load_clip(clip_file).double()


def test_text_features_of_the_ensemble_are_the_mean_over_prompts(backbone):
    """Seven templates on ImageNet, eight elsewhere."""
    for dataset, own in (("OxfordPets", [PETS]), ("Shapes", [PLAIN]), ("ImageNet", []), ("OxfordPets", [PETS])):
        expected = []
        for name in NAMES:
            prompts = [template.format(name.replace("_", " ")) for template in SEVEN + own]
            total = sum(encode_texts(backbone, [prompt])[0] for prompt in prompts)
            expected.append(total / total.norm())
        method = EnsembleMethod(CN({"DATASET": {"NAME": dataset}}), NAMES, backbone)
        torch.testing.assert_close(method.text_features(), torch.stack(expected))


def test_predictions_equal_open_clip(clip_file, data_root, tmp_path):
    """Built, tokenised and compared by open_clip alone."""
    run = start(arguments("ZeroshotCLIP", data_root, clip_file, tmp_path / "run", flags=["--eval-only"]))
    state = torch.load(clip_file, weights_only=True)
    model = open_clip.model.build_model_from_openai_state_dict(dict(state)).float().eval()
    model.load_state_dict(state)  # again, since building rounds them to float16
    labels = []
    with torch.no_grad():
        texts = open_clip.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES[:4]])
        text = F.normalize(model.encode_text(texts), dim=-1)
        for batch in run.trainer.test_loader:
            image = F.normalize(model.encode_image(batch["img"]), dim=-1)
            scores = model.logit_scale.exp() * image @ text.T
            labels += scores.argmax(dim=1).tolist()
            torch.testing.assert_close(run.trainer.model_inference(batch["img"]), scores, atol=1e-3, rtol=1e-4)
    assert list(run.trainer.evaluation.predictions.values()) == labels
