"""tools/figure1.py: its numbers against loops, its picture against its numbers."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import NAMES

import figure1
import train
from trainers.prompting.synthetic import fixed_places, paste, render_blocks
from trainers.prompting.text import encode_texts


@pytest.fixture(scope="module")
def words(data_root, rn_file):
    return [
        *("--root", str(data_root), "--dataset-config-file", str(ROOT / "configs/datasets/caltech101.yaml")),
        *("--config-file", str(ROOT / "configs/trainers/LoGoPrompt/photo64_ep50_ctxv1.yaml"), "--backbone", rn_file),
        *("DATALOADER.NUM_WORKERS", "0", "DATALOADER.TEST.BATCH_SIZE", "7"),
    ]


@pytest.fixture(scope="module")
def trainer(words):
    return figure1.build(train.parse_args(["--trainer", "LoGoPrompt", "--no-train", *words]))


@torch.no_grad()
def test_scores_against_one_image_at_a_time(trainer):
    values = figure1.zero_shot(trainer)
    network, backbone = trainer.model, trainer.model.backbone
    texts = encode_texts(backbone, [f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    items = [
        (batch["img"][i : i + 1], trainer.relative_paths(batch)[i], int(batch["label"][i]))
        for batch in trainer.test_loader
        for i in range(len(batch["label"]))
    ]
    assert values["label"].tolist() == [label for _, _, label in items] and len(items) == 32
    for n in (0, 9, 31):
        image, path, label = items[n]
        cosine = [sum(a * b for a, b in zip(backbone.encode_image(image)[0].tolist(), t)) for t in texts.tolist()]
        assert values["cosine"][n].tolist() == pytest.approx(cosine, abs=1e-5)
        p = torch.tensor([c * backbone.logit_scale.exp() for c in cosine]).softmax(0)
        torch.testing.assert_close(values["none"][n], p, atol=1e-4, rtol=1e-3)
        place = fixed_places([path], network.seed, 64, network.block, "random")
        hard = max((c for c in range(8) if c != label), key=lambda c: p[c])  # noqa: B023 (called at once)
        for name, c in (("true", label), ("hard", hard)):
            assert int(values[f"class of {name}"][n]) == c
            feature = backbone.encode_image(paste(image, network.visual_prompts[[c]], place))
            expected = backbone.logits(feature, texts)[0].softmax(0)
            torch.testing.assert_close(values[name][n], expected, atol=1e-4, rtol=1e-3)
    assert (values["class of other"] != values["label"]).all()


@torch.no_grad()
def test_text_images_and_their_ranks(trainer):
    text = figure1.text_images(trainer)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trainer.cfg.INPUT.PIXEL_MEAN, trainer.cfg.INPUT.PIXEL_STD))
    picture = (render_blocks([NAMES[2]], 64, 64) - mean) / std
    backbone = trainer.model.backbone
    expected = (backbone.encode_image(picture) * encode_texts(backbone, ["a photo of a inline skate."])).sum()
    assert text[2].item() == pytest.approx(expected.item(), abs=1e-5)
    cosine = torch.tensor([[0.1, 0.5], [0.3, 0.2], [0.2, 0.9]])
    assert figure1.ranks(cosine, torch.tensor([0.25, 0.95])).tolist() == [2, 1]


def test_the_command(words, tmp_path, capsys):
    out = tmp_path / "figure.png"
    assert figure1.main(["--out", str(out), *words]) == 0
    printed = capsys.readouterr().out
    assert "of the 32 test images" in printed and printed.splitlines()[-1] == str(out)
    picture = np.asarray(Image.open(out).convert("RGB"), dtype=int)
    reds = (np.abs(picture - [0xD1, 0x49, 0x5B]) < 12).all(-1)
    assert reds[:, : reds.shape[1] // 2].sum() > 100 and reds[:, reds.shape[1] // 2 :].sum() > 100
    assert figure1.main(["--out", str(out), *words, "TRAINER.LOGOPROMPT.KK", "1"]) == 2
    assert capsys.readouterr().err.startswith("error:")
