"""toy/pretrain.py: reproducible, and the weights in the repository perform as stated."""

import math
import os

import pytest
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import tokenize
from PIL import Image

from toy import pretrain
from toy.drawing import KINDS
from trainers.prompting.backbone import TINY, TINY_VIT, load_clip


def short_run(seed=1, workers=0):
    words = {"steps": 4, "second-steps": 1, "batch-size": 8, "drawings": 24, "warmup": 2}
    words |= {"seed": seed, "workers": workers, "device": "cpu"}
    return pretrain.pretrain(pretrain.arguments([str(x) for key, value in words.items() for x in (f"--{key}", value)]))


def test_the_weights_depend_on_the_seed_alone_and_load(tmp_path):
    first, again, other = short_run(), short_run(workers=2), short_run(seed=2)
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["visual.conv1.weight"], other["visual.conv1.weight"])
    committed = torch.load(TINY, weights_only=True)
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in committed.items()}
    torch.save(first, tmp_path / "x.pt")
    assert load_clip(str(tmp_path / "x.pt")).input_resolution == pretrain.SIZE


def test_fine_tuning_starts_from_tiny_and_shows_words_that_agree():
    """A step of a rate close to zero leaves the weights as they are; most words on drawings are their names."""
    words = ["--agreeing=1", "--batch-size=8", "--drawings=24", "--workers=0", "--device=cpu", "--second-lr=1e-12"]
    tuned, tiny = pretrain.pretrain(pretrain.arguments(words)), torch.load(TINY, weights_only=True)
    same = [key for key in tiny if "running" not in key]  # BatchNorm has seen a batch
    assert all(torch.allclose(tuned[key].float(), tiny[key].float(), atol=1e-3) for key in same)
    assert pretrain.AGREEING[0][pretrain.NAMED_OBJECT] > 3 * pretrain.AGREEING[0][pretrain.LABELLED_OBJECT]
    assert sum(pretrain.AGREEING[0]) == pytest.approx(1)


def test_mistakes_end_in_one_line(tmp_path, capsys):
    for words in (["--report-only", "--out", str(tmp_path / "x.pt")], ["--out", str(tmp_path / "no" / "x.pt")]):
        assert pretrain.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_sheet(tmp_path):
    assert pretrain.main(["--sheet", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 1000


def test_captions_name_what_is_shown():
    """Every kind of sample occurs; the caption of a drawing names its kind, that of a word the word."""
    images, facts = pretrain.drawings(30, 1)
    samples = pretrain.Samples(images, facts, 1, 600, 600)
    captions = [samples[i][1] for i in range(600)]
    nouns = sorted([*KINDS, *pretrain.words()], key=len, reverse=True)
    assert all(any(noun in caption for noun in nouns) for caption in captions)
    shown = {kind for kind, *_ in facts}
    labelled = [c for c in captions if "with the word" in c]
    assert 20 < len(labelled) < 200
    assert all(any(f" {kind} " in f" {c.split(' with')[0]} " for kind in shown) for c in labelled)
    assert any(c.startswith("a sign that says") for c in captions)


def test_contrastive_loss_against_a_loop():
    torch.manual_seed(0)
    captions = torch.tensor([3, 1, 3, 0])
    image, text = (torch.nn.functional.normalize(torch.randn(4, 6).double(), dim=1) for _ in range(2))
    scale = torch.tensor(5.0).double()
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(4):
            logits = [5.0 * sum(float(x) * float(y) for x, y in zip(a[i], b[j])) for j in range(4)]
            log_sum = math.log(sum(math.exp(v) for v in logits))
            same = [j for j in range(4) if captions[j] == captions[i]]
            total -= sum(logits[j] - log_sum for j in same) / len(same) / 4
    assert pretrain.contrastive_loss(image, text, scale, captions).item() == pytest.approx(total / 2, rel=1e-6)


def test_encode_text_matches_open_clip():
    torch.manual_seed(0)
    model = CLIP(pretrain.EMBED_DIM, pretrain.VISION, pretrain.TEXT, quick_gelu=True).eval()
    captions = ["a photo of a star.", "the word umbrella on a house.", "key."]
    with torch.no_grad():
        ours = pretrain.encode_text(model, captions, torch.device("cpu"))
        torch.testing.assert_close(ours, model.encode_text(tokenize(captions)), atol=1e-5, rtol=1e-5)


def test_learning_rate():
    args = pretrain.arguments(["--out", "x", "--steps", "1000", "--warmup", "100", "--lr", "0.01"])
    rates = [pretrain.learning_rate(step, args) for step in range(1000)]
    assert rates[0] == pytest.approx(0.0001) and rates[100] == pytest.approx(0.01) == max(rates)
    assert rates[99:] == sorted(rates[99:], reverse=True) and rates[-1] < 1e-6


def test_the_weights_recognise_and_read():
    """As in the README, with fewer renderings; toy/pretrain.py --report-only prints all."""
    assert os.path.getsize(TINY) <= 16e6
    results = pretrain.report(TINY, seed=3, n=160)
    assert results["zero-shot, pre-training styles"] > 80
    assert results["read the class name on the default block, among class names"] > 85
    assert results["drawing with any class's block: the drawing is recognised"] > 50


def test_the_vision_transformer_depends_on_the_seed_alone_and_sees(monkeypatch):
    monkeypatch.setattr(pretrain, "VIT_DRAWINGS", 48)
    first, again = (pretrain.pretrain_vit(1, steps=2) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    committed = torch.load(TINY_VIT, weights_only=True)
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in committed.items()}
    assert os.path.getsize(TINY_VIT) <= 2e6
    results = pretrain.report("tiny-vit", seed=3, n=160)
    assert results["zero-shot, pre-training styles"] >= 85
    tiny, vit = load_clip("tiny"), load_clip("tiny-vit")
    assert torch.equal(tiny.token_embedding.weight, vit.token_embedding.weight)
