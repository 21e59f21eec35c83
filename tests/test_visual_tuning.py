"""Tunable visual prompts: gradients against finite differences, the valid range, what belongs to which class."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_logoprompt import build
from test_two_stage import run, states  # noqa: F401 (a fixture)
from tiny import NAMES, SIZE
from yacs.config import CfgNode as CN

import preview
from trainers import logoprompt
from trainers.prompting.synthetic import VisualPrompts, random_places
from trainers.prompting.trainer import per_class_state

BASE, NEW = NAMES[:4], NAMES[4:]


@pytest.mark.parametrize("form", ["infonce", "paper"])
def test_the_gradient_is_that_of_finite_differences(clip_file, form):
    """In float64, of the whole loss, pixel by pixel; so it goes through the encoder and to the right block."""
    model = build(clip_file, NAMES[:4], TUNE_VISUAL=True, LOSS=form, TEXT_PROMPT="generic").double()
    model.backbone.logit_scale.data.fill_(2.5)
    images, labels = torch.randn(2, 3, SIZE, SIZE).double(), torch.tensor([0, 2])
    pixels = model.prompt_learner.visual_prompts.pixels

    def loss():
        torch.manual_seed(7)
        return model(images, labels)[0].sum()

    loss().backward()
    assert pixels.grad.shape == pixels.shape and (pixels.grad.flatten(1).abs().sum(1) > 0).any()
    checked = 0
    for c in range(4):  # the pixels of largest gradient, and one at random
        flat = pixels.grad[c].flatten()
        for i in (int(flat.abs().argmax()), 17):
            with torch.no_grad():
                ends = []
                for step in (1e-5, -1e-5):
                    pixels[c].view(-1)[i] += step
                    ends.append(loss().item())
                    pixels[c].view(-1)[i] -= step
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(flat[i].item(), rel=1e-3, abs=1e-7)
            checked += abs(flat[i].item()) > 1e-6
    assert checked >= 2


def test_gradients_reach_pixels_and_context_and_nothing_else(clip_file):
    model = build(clip_file, TUNE_VISUAL=True, TEXT_PROMPT="generic")
    losses, _ = model(torch.randn(4, 3, SIZE, SIZE), torch.arange(4))
    losses.sum().backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert found == {"prompt_learner.ctx", "prompt_learner.visual_prompts.pixels"}


def test_chunks_change_no_gradient(clip_file, monkeypatch):
    gradients = []
    for chunk in (64, 3):
        monkeypatch.setattr(logoprompt, "GRADIENT_CHUNK", chunk)
        model = build(clip_file, TUNE_VISUAL=True).double()
        torch.manual_seed(7)
        places = random_places(3, SIZE, model.block, "random")
        torch.manual_seed(8)
        images, classes = torch.randn(3, 3, SIZE, SIZE).double(), torch.tensor([[0, 1], [1, 2], [5, 0]])
        model.conditional_features(images, classes, places).pow(3).sum().backward()
        gradients.append(model.prompt_learner.visual_prompts.pixels.grad)
    torch.testing.assert_close(*gradients)
    assert (gradients[0].flatten(1).abs().sum(1) > 0).tolist() == [True, True, True, False, False, True, False, False]


def test_blocks_start_as_rendered_and_are_the_same_frozen_or_not(clip_file):
    frozen, tunable = build(clip_file), build(clip_file, TUNE_VISUAL=True)
    assert torch.equal(frozen.visual_prompts, tunable.visual_prompts)
    assert not frozen.visual_prompts.requires_grad and tunable.visual_prompts.requires_grad
    torch.manual_seed(0)
    images, paths = torch.randn(3, 3, SIZE, SIZE), list("abc")
    with torch.no_grad():
        scores = [model.select(model.batch(images, paths), model.text_features()) for model in (frozen, tunable)]
    torch.testing.assert_close(*scores)


def test_pixels_come_back_into_range():
    prompts = VisualPrompts(torch.rand(2, 3, 4, 5))
    with torch.no_grad():
        prompts.pixels += torch.randn_like(prompts.pixels)
    expected = [min(1.0, max(0.0, value)) for value in prompts.pixels.flatten().tolist()]
    prompts.project()
    assert prompts.pixels.flatten().tolist() == expected


def test_new_classes_keep_their_rendered_blocks():
    rendered = {name: torch.rand(3, 2, 5) for name in NAMES}
    base = VisualPrompts(torch.stack([rendered[name] for name in BASE]))
    with torch.no_grad():
        base.pixels.mul_(0.5)
    mixed = [NEW[0], BASE[2], NEW[1]]
    other = VisualPrompts(torch.stack([rendered[name] for name in mixed]))
    other.load_state_dict(per_class_state(other, base.state_dict(), mixed, BASE))
    assert torch.equal(other.pixels[0], rendered[NEW[0]]) and torch.equal(other.pixels[2], rendered[NEW[1]])
    assert torch.equal(other.pixels[1], rendered[BASE[2]] * 0.5)


def test_a_run_tunes_stores_and_hands_on_the_blocks(run):  # noqa: F811
    options = ("TRAINER.LOGOPROMPT.TUNE_VISUAL", "True", "TRAINER.LOGOPROMPT.VISUAL_LR", "50.0")
    trained = run(*options)
    pixels = states(run)[5]["visual_prompts.pixels"]
    rendered = logoprompt.draw_visual_prompts(trained.cfg.TRAINER.LOGOPROMPT, BASE, SIZE)
    assert pixels.shape == rendered.shape and not torch.equal(pixels, rendered)
    assert pixels.min() >= 0 and pixels.max() <= 1
    flags = ["--eval-only", "--model-dir", run.folder / "run"]
    everything = run(*options, "DATASET.SUBSAMPLE_CLASSES", "all", flags=flags, out="all")
    blocks = everything.model.prompt_learner.visual_prompts.pixels
    torch.testing.assert_close(blocks[:4].detach().cpu(), pixels)
    new = logoprompt.draw_visual_prompts(trained.cfg.TRAINER.LOGOPROMPT, NEW, SIZE)
    torch.testing.assert_close(blocks[4:].detach().cpu(), new)


def test_they_can_be_drawn_before_and_after(run, data_root, tmp_path, capsys):  # noqa: F811
    run("TRAINER.LOGOPROMPT.TUNE_VISUAL", "True", "TRAINER.LOGOPROMPT.VISUAL_LR", "50.0")
    pixels = states(run)[5]["visual_prompts.pixels"]
    config = ["--config-file", str(ROOT / "configs/trainers/LoGoPrompt/photo64_ep50_ctxv1.yaml")]
    model = ["--model-dir", str(run.folder / "run")]
    out = tmp_path / "sheet.png"
    assert preview.main(["--out", str(out), *config, *model, "--classnames", BASE[1], NEW[0]]) == 0
    sheet = torch.from_numpy(np.asarray(Image.open(out)).copy()).permute(2, 0, 1) / 255
    h, gap = pixels.shape[2], preview.GAP
    cells = [
        sheet[:, top : top + h, left : left + SIZE]
        for top in (gap, 2 * gap + h)
        for left in (gap, 2 * gap + SIZE)
    ]  # fmt: skip
    rendered = logoprompt.draw_visual_prompts(_method(), [BASE[1], NEW[0]], SIZE)
    for cell, expected in zip(cells, (rendered[0], pixels[1], rendered[1], rendered[1])):
        torch.testing.assert_close(cell, expected, atol=1 / 254, rtol=0)
    # in images: the block of the first column's class is the tuned one
    data = ["--root", str(data_root), "--dataset-config-file", str(ROOT / "configs/datasets/caltech101.yaml")]
    sheets = []
    for words in ([], model):
        assert preview.main(["--out", str(out), *config, *words, *data]) == 0
        sheets.append(np.asarray(Image.open(out)).copy())
    assert sheets[0].shape == sheets[1].shape and (sheets[0] != sheets[1]).any()

    run(out="frozen")
    assert (
        preview.main(["--out", str(out), *config, "--model-dir", str(run.folder / "frozen"), "--classnames", "x"]) == 2
    )
    assert "TUNE_VISUAL True" in capsys.readouterr().err.splitlines()[-1]
    model[1] = str(run.folder / "run")
    assert preview.main(["--out", str(out), *model, "--classnames", "x"]) == 2  # the default config has larger images
    assert "--config-file" in capsys.readouterr().err.splitlines()[-1]


def _method():
    cfg = CN({"TRAINER": CN(), "TRAIN": CN(), "TEST": CN()})
    logoprompt.extend_cfg(cfg)
    return cfg.TRAINER.LOGOPROMPT


def test_the_rate_of_the_pixels_follows_the_schedule(run, monkeypatch):  # noqa: F811
    from trainers.logoprompt import LoGoPrompt

    rates = []
    original = LoGoPrompt.run_epoch

    def note(self):
        rates.append([group["lr"] for group in self.optim.param_groups])
        original(self)

    monkeypatch.setattr(LoGoPrompt, "run_epoch", note)
    run("TRAINER.LOGOPROMPT.TUNE_VISUAL", "True", "TRAINER.LOGOPROMPT.VISUAL_LR", "10.0", "OPTIM.LR", "0.1")
    learning = [pair for pair in rates if pair[0] > 1e-4]
    assert len(learning) == 3  # five epochs, of which each stage warms up for one
    for text, visual in learning:
        assert visual == pytest.approx(100 * text)
    assert rates[0] == [1e-5, 1e-5]  # the warm-up's rate is that of all


def test_impossible_settings(run, capsys):  # noqa: F811
    run("TRAINER.LOGOPROMPT.VISUAL_LR", "-1.0", status=2)
    assert "VISUAL_LR -1" in capsys.readouterr().err
    run("TRAINER.LOGOPROMPT.TUNE_VISUAL", "True", "TRAINER.LOGOPROMPT.VISUAL_PROMPT", "none", status=2)
    assert "none to tune" in capsys.readouterr().err
