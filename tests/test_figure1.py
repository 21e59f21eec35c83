"""tools/figure1.py: its numbers against one image at a time, its picture against its numbers."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import NAMES

import figure1
import train
from trainers.prompting.paste import paste, places_of, uniform_of_paths
from trainers.prompting.render import render_blocks
from trainers.prompting.results import selection_prospect
from trainers.prompting.text_encoder import encode_texts


@pytest.fixture(scope="module")
def words(data_root, rn_file):
    return [
        *("--root", str(data_root), "--dataset-config-file", str(ROOT / "configs/datasets/caltech101.yaml")),
        *("--config-file", str(ROOT / "configs/trainers/LoGoPrompt/photo64_ep50_ctxv1.yaml"), "--backbone", rn_file),
        *("DATALOADER.NUM_WORKERS", "0", "DATALOADER.TEST.BATCH_SIZE", "7"),
    ]


@torch.no_grad()
def test_scores_equal_those_of_one_image_at_a_time(words, data_root):
    trainer = train.build_trainer(train.setup_cfg(train.parse_args(["--trainer", "LoGoPrompt", *words])))
    values, model, backbone = figure1.zero_shot(trainer), trainer.model, trainer.backbone
    texts = encode_texts(backbone, [f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    items = trainer.test_loader.dataset.data_source
    assert values["label"].tolist() == [item.label for item in items] and len(items) == 32
    for n in (0, 9, 31):
        image, label = trainer.test_loader.dataset[n]["img"].unsqueeze(0), items[n].label
        feature = torch.nn.functional.normalize(backbone.encode_image(image), dim=-1)[0]
        cosine = [sum(a * b for a, b in zip(feature.tolist(), text)) for text in texts.tolist()]
        assert values["cosine"][n].tolist() == pytest.approx(cosine, abs=1e-5)
        p = torch.tensor([c * backbone.logit_scale.exp() for c in cosine]).softmax(0)
        torch.testing.assert_close(values["none"][n], p, atol=1e-4, rtol=1e-3)
        path = items[n].impath.removeprefix(f"{data_root}/")
        place = places_of(uniform_of_paths([path], 0), 64, model.block, "random")
        hard = max((c for c in range(8) if c != label), key=lambda c: p[c])  # noqa: B023 (called at once)
        for name, c in (("true", label), ("hard", hard)):
            feature = backbone.encode_image(paste(image, model.visual_prompts[[c]], place))
            expected = backbone.logits(torch.nn.functional.normalize(feature, dim=-1), texts)[0].softmax(0)
            assert int(values[f"class of {name}"][n]) == c
            torch.testing.assert_close(values[name][n], expected, atol=1e-4, rtol=1e-3)
    assert (values["class of other"] != values["label"]).all()

    feature = backbone.encode_image((render_blocks([NAMES[2]], 64, 64) - model.mean) / model.std)
    expected = torch.cosine_similarity(feature, texts).tolist()
    assert values["names"][2].tolist() == pytest.approx(expected, abs=1e-5)
    rises = [[], []]
    for n in range(len(items)):
        for found, block in zip(rises, ("true", "hard")):
            c = int(values[f"class of {block}"][n])
            odds = [p / (1 - p) for p in (values[key][n, c].clamp(1e-6, 1 - 1e-6).item() for key in ("none", block))]
            found.append(math.log(odds[1] / odds[0]))
    torch.testing.assert_close(figure1.log_odds_rises(values), torch.tensor(rises).double(), atol=1e-3, rtol=1e-3)
    mean = [f"{sum(found) / len(found):+.2f}" for found in rises]
    assert all(number in figure1.verdicts(values)[1] for number in mean)


def test_verdicts():
    """A backbone that reads, and blocks of true classes that turn wrong predictions right."""
    n = 30
    p = torch.full((n, 2), 0.5) + torch.tensor([-0.1, 0.1])
    values = {"label": torch.zeros(n, dtype=torch.long), "names": torch.eye(2), "none": p, "hard": p}
    values |= {"true": p.flip(1), "class of true": values["label"], "class of hard": values["label"] + 1}
    reads, rises, accuracies = figure1.verdicts(values)
    assert "backbone reads" in reads and "100 %" in reads and "50.0 %" in reads
    assert "by +0.81" in rises and "by +0.00" in rises and "can correct" in rises
    assert [word for word in accuracies.split() if word[0].isdigit()] == ["0.0", "0.0"]


@pytest.mark.parametrize(
    "true, wrong, verdict",
    [(0.5, 0.1, "true"), (-0.1, 0.5, "wrong"), (0.5, 0.55, "Both"), (-0.1, -0.9, "Neither"), (-0.9, -0.1, "Neither")],
)
def test_selection_needs_a_class_that_gains(true, wrong, verdict):
    assert verdict in selection_prospect(true, wrong).split(". ")[1]


def test_command(words, tmp_path, capsys):
    out = tmp_path / "figure.png"
    assert figure1.main(["--out", str(out), *words]) == 0
    printed = capsys.readouterr().out
    assert "of the 32 test images" in printed and printed.splitlines()[-1] == str(out)
    table = [line for line in printed.splitlines() if line.startswith("| ")][1:]
    rows = {line.split()[1]: [float(word) for word in line.split()[3:-1:2]] for line in table}
    assert list(rows) == ["none", "true", "hard", "other"] and rows["none"][1] == 0
    assert all(0 <= p <= 1 and 0 <= raised <= 100 for p, raised, _ in rows.values())
    reds = (np.abs(np.asarray(Image.open(out).convert("RGB"), dtype=int) - [0xD1, 0x49, 0x5B]) < 12).all(-1)
    assert all(half.sum() > 100 for half in np.array_split(reds, 2, axis=1))
    assert figure1.main(["--out", str(out), *words, "TRAINER.LOGOPROMPT.KK", "1"]) == 2
    assert capsys.readouterr().err.startswith("error:")
