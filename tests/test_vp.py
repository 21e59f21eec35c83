"""Visual prompts: equal to the authors' code and to plain loops; places of random patches; a learned text prompt."""

import json

import pytest
import torch
from conftest import GOLDEN, differences, interrupt
from helpers import method_config, one_line
from reference import Reference, check_parameters, runs_of
from tiny import SIZE

from trainers import vp
from trainers.prompting.backbone import load_clip
from trainers.prompting.image_batch import ImageBatch
from trainers.prompting.paste import uniform_numbers
from trainers.prompting.text_encoder import encode_texts

RUNS = [run for run in runs_of(GOLDEN, "relatives_*.npz") if run[2] == "vp_padding"]
KINDS = ("padding", "fixed_patch", "random_patch")
LEARNED = ("TRAINER.VP.TEXT_PROMPT", "learned", "TRAINER.VP.CTX_INIT", "a photo of a")


def build(classnames, backbone, **options):
    return vp.CustomCLIP(method_config("VP", **options), classnames, backbone)


@pytest.mark.parametrize("stem, arch, run", [pytest.param(*run, id="-".join(run)) for run in RUNS])
def test_matches_original_visual_prompting(tmp_path, stem, arch, run):
    found = Reference(GOLDEN / f"{stem}.npz")
    initial, final = found.tensors(f"{arch}/{run}/init/"), found.tensors(f"{arch}/{run}/final/")
    backbone, size = found.clip(arch, tmp_path), initial["pad_up"].shape[2]
    model = build(found.meta["classnames"], backbone, PROMPT_SIZE=size)
    model.learned.load_state_dict(initial)
    images = ImageBatch(backbone, found.tensor(f"{arch}/images"))
    logits = model.score(images, model.text_features()).detach()
    torch.testing.assert_close(logits, found.tensor(f"{arch}/{run}/logits"), rtol=1e-5, atol=1e-4)
    optim = torch.optim.SGD(model.learned.parameters(), lr=found.meta["lr"][f"vp_{arch}"])
    found.check_steps(model, images, f"{arch}/{run}/", optim)
    check_parameters(model.learned.state_dict(), initial, final)


def naive_prompt(model, kind, image, place):
    """The image with the learned pixels added one by one."""
    image, state = image.clone(), {name: value[0] for name, value in model.learned.state_dict().items()}
    size = state["pad_up" if kind == "padding" else "patch"].shape[1]
    for y in range(SIZE):
        for x in range(SIZE):
            if kind != "padding":
                row, column = y - place[0], x - place[1]
                if 0 <= row < size and 0 <= column < size:
                    image[:, y, x] += state["patch"][:, row, column]
            elif y < size:
                image[:, y, x] += state["pad_up"][:, y, x]
            elif y >= SIZE - size:
                image[:, y, x] += state["pad_down"][:, y - (SIZE - size), x]
            elif x < size:
                image[:, y, x] += state["pad_left"][:, y - size, x]
            elif x >= SIZE - size:
                image[:, y, x] += state["pad_right"][:, y - size, x - (SIZE - size)]
    return image


@torch.no_grad()
@pytest.mark.parametrize("size", [5, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_match_loops(clip_file, kind, size):
    """At test time the place of a random patch depends on seed and path alone, whatever else is in the batch."""
    backbone, names = load_clip(clip_file).double(), ["cup", "wind_chime", "face"]
    model = build(names, backbone, VISUAL_PROMPT=kind, PROMPT_SIZE=size, PLACE_SEED=7).double()
    pixels, paths = (
        torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double(),
        ["a", "b/c", "d"],
    )
    text = encode_texts(backbone, [f"This is a photo of a {name.replace('_', ' ')}" for name in names])
    scores, free = model.score(ImageBatch(backbone, pixels, paths), model.text_features()), SIZE - (size or 9) + 1
    for image, path, row in zip(pixels, paths, scores):
        place = [int(u * free) for u in uniform_numbers(f"7/{path}", 2)] if kind == "random_patch" else [0, 0]
        feature = backbone.visual(naive_prompt(model, kind, image, place).unsqueeze(0))[0]
        expected = backbone.logit_scale.exp() * text @ (feature / feature.norm())
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-9)
    order = [2, 0]
    others = ImageBatch(backbone, pixels[order], [paths[i] for i in order])
    torch.testing.assert_close(model.score(others, model.text_features()), scores[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_differences(clip_file, kind):
    backbone = load_clip(clip_file).double()
    model = build(["cup", "wind_chime", "face"], backbone, VISUAL_PROMPT=kind).double()
    backbone.logit_scale.data.fill_(2.0)
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()
    images, label = ImageBatch(backbone, pixels, ["a", "b", "c"]), torch.tensor([0, 1, 2])
    model.loss(images, label).total.backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    for parameter in model.learned.parameters():
        i = int(parameter.grad.abs().argmax())
        slope, found = parameter.grad.view(-1)[i].item(), []
        for step in (1e-5, -2e-5):
            parameter.data.view(-1)[i] += step
            found.append(model.loss(images, label).total.item())
        assert abs(slope) > 1e-6 and (found[0] - found[1]) / 2e-5 == pytest.approx(slope, rel=1e-3)


def test_training_draws_a_place_for_every_image(rn_file):
    model = build(["cup", "face"], load_clip(rn_file), VISUAL_PROMPT="random_patch", PROMPT_SIZE=3)
    with torch.no_grad():
        model.learned.patch.fill_(1)
        added = model.learned(ImageBatch(model.backbone, torch.zeros(400, 3, SIZE, SIZE)), 0)
    assert (added.sum(dim=(1, 2, 3)) == 27).all() and len(added.unique(dim=0)) > 350
    covered = added.sum(dim=(0, 1)) > 0
    assert covered[0].any() and covered[-1].any() and covered[:, 0].any() and covered[:, -1].any()


def test_pixels_and_text_are_learned_together(run):
    """Table 2's VP+TP, each part with its own learning rate."""
    opts = ("OPTIM.LR", 40, "OPTIM.MAX_EPOCH", 3, "OPTIM.WARMUP_EPOCH", -1, "TRAIN.CHECKPOINT_FREQ", 1)
    done = run("VP", *LEARNED, *opts)
    states = [done.checkpoint(n)["state_dict"] for n in (1, 2)]
    assert sorted(states[0]) == ["pad_down", "pad_left", "pad_right", "pad_up", "text.ctx"]
    assert all(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    pixels, text = done.checkpoint(1)["optimizer"]["param_groups"]
    assert (pixels["weight_decay"], text["weight_decay"]) == (0, 5e-4)
    assert (pixels["lr"], text["lr"]) == pytest.approx((40 * 0.75, 0.002 * 0.75))  # cosine, after one of three epochs


@pytest.mark.parametrize("opts", [(), ("TRAINER.VP.VISUAL_PROMPT", "random_patch", *LEARNED)], ids=["VP", "VP+TP"])
def test_base_to_new(opts, run, tmp_path):
    """Nothing learned belongs to a class; predictions do not depend on the batch size or a feature store."""
    trained = run("VP", *opts, "TEST.FEATURES", tmp_path / "features.sqlite", out="base")
    flags = ["--eval-only", "--model-dir", tmp_path / "base"]
    tested = run("VP", *opts, "DATALOADER.TEST.BATCH_SIZE", 3, out="base_test", flags=flags)
    assert tested.outcome["predictions"] == trained.outcome["predictions"]
    run("VP", *opts, "DATASET.SUBSAMPLE_CLASSES", "new", out="new_test", flags=flags)
    assert json.loads((tmp_path / "new_test" / "results.json").read_text())["images"] == 16


def test_interrupted_run_ends_as_an_unbroken_one(run):
    opts = ("TRAINER.VP.VISUAL_PROMPT", "random_patch", *LEARNED, "OPTIM.MAX_EPOCH", 3, "TRAIN.CHECKPOINT_FREQ", 1)
    whole = run("VP", *opts, out="whole")
    with pytest.raises(KeyboardInterrupt):
        run("VP", *opts, out="broken", prepare=interrupt(2))
    broken = run("VP", *opts, out="broken")
    assert "Resuming from" in broken.log and differences(whole.outcome, broken.outcome) == []


@pytest.mark.parametrize("kind, most", [("padding", 31), ("fixed_patch", 64), ("random_patch", 64)])
def test_prompts_that_do_not_fit(rn_file, kind, most):
    backbone = load_clip(rn_file)
    build(["cup"], backbone, VISUAL_PROMPT=kind, PROMPT_SIZE=most)
    error = one_line(lambda: build(["cup"], backbone, VISUAL_PROMPT=kind, PROMPT_SIZE=most + 1))
    assert error.startswith(f"TRAINER.VP.PROMPT_SIZE {most + 1}: must be at most {most} ")
