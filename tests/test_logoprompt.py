"""trainers/logoprompt.py as a whole against the method written as plain loops, in float64.

These tests fail if the loss, the mining, the selection or the pasting is replaced by something simpler.
"""

import math

import pytest
import torch
from tiny import NAMES, SIZE
from yacs.config import CfgNode as CN

from trainers import logoprompt
from trainers.prompting.backbone import load_clip
from trainers.prompting.synthetic import fixed_places, random_places

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def build(clip_file, classnames=NAMES, transforms=("normalize",), **options):
    inputs = CN({"TRANSFORMS": transforms, "PIXEL_MEAN": MEAN, "PIXEL_STD": STD})
    cfg = CN({"TRAINER": CN(), "TRAIN": CN(), "TEST": CN(), "INPUT": inputs})
    logoprompt.extend_cfg(cfg)
    cfg.TRAINER.LOGOPROMPT.merge_from_list([x for pair in {"N_CTX": 4, **options}.items() for x in pair])
    torch.manual_seed(0)
    model = logoprompt.CustomCLIP(cfg, classnames, load_clip(clip_file))
    model.prompt_learner.ctx.data = torch.randn_like(model.prompt_learner.ctx) * 0.3
    return model


def naive_paste(image, block, top, left):
    image = image.clone()
    for y in range(block.shape[1]):
        for x in range(block.shape[2]):
            image[:, top + y, left + x] = block[:, y, x]
    return image


def naive_probabilities(model, image, text_features):
    """p(c|x) for one image, as C numbers: softmax of cosines times exp(logit_scale)."""
    feature = model.backbone.visual(image.unsqueeze(0))[0].double()
    feature = feature / feature.norm()
    scale = model.backbone.logit_scale.double().exp().item()
    logits = [scale * sum(a * b for a, b in zip(feature.tolist(), t)) for t in text_features.tolist()]
    top = max(logits)
    total = sum(math.exp(v - top) for v in logits)
    return [math.exp(v - top) / total for v in logits]


def naive_text_features(model):
    features = model.text_encoder(*model.prompt_learner()).double()
    return features / features.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("form", ["paper", "infonce"])
@pytest.mark.parametrize("location", ["random", "top", "bottom"])
@pytest.mark.parametrize("k, classes", [(3, 8), (5, 8), (5, 3), (1, 2)])
def test_training_loss_equals_the_loop(clip_file, form, location, k, classes):
    model = build(clip_file, NAMES[:classes], K=k, LOSS=form, LOCATION=location, BLOCK_WIDTH=0.75)
    model.backbone.logit_scale.data.fill_(2.5)  # probabilities far from 0 and 1
    images = torch.randn(5, 3, SIZE, SIZE)
    labels = torch.arange(5) % classes
    torch.manual_seed(7)
    losses, log_p = model(images, labels)
    torch.manual_seed(7)
    places = random_places(5, SIZE, model.block, location).tolist()

    lower = 0
    with torch.no_grad():
        text = naive_text_features(model)
        for i, (image, y) in enumerate(zip(images, labels.tolist())):
            p = naive_probabilities(model, image, text)
            assert log_p[i].exp().tolist() == pytest.approx(p, rel=1e-3)
            negatives = [c for c in sorted(range(classes), key=lambda c: -p[c]) if c != y][:k]
            conditional = {
                c: naive_probabilities(model, naive_paste(image, model.visual_prompts[c], *places[i]), text)[c]
                for c in (y, *negatives)
            }
            positive = min(p[y], conditional[y])
            lower += conditional[y] < p[y]
            others = sum(max(p[c], conditional[c]) for c in negatives)
            expected = -math.log(positive / (others + (positive if form == "infonce" else 0)))
            assert losses[i].item() == pytest.approx(expected, abs=2e-3)
    assert model.conditional_minimum.item() == pytest.approx(lower / 5)


@pytest.mark.parametrize("k, classes", [(5, 8), (2, 8), (5, 3), (8, 8), (1, 2)])
def test_selection_equals_the_loop(clip_file, k, classes):
    model = build(clip_file, NAMES[:classes], K=k, VISUAL_SEED=3)
    model.backbone.logit_scale.data.fill_(2.5)
    images = torch.randn(5, 3, SIZE, SIZE)
    paths = [f"caltech-101/{i}.jpg" for i in range(5)]
    with torch.no_grad():
        scores = model.select(model.batch(images, paths), model.text_features())
        text = naive_text_features(model)
        for i, (image, place) in enumerate(zip(images, fixed_places(paths, 3, SIZE, model.block, "random").tolist())):
            p = naive_probabilities(model, image, text)
            candidates = sorted(range(classes), key=lambda c: -p[c])[:k]
            final = {
                c: max(p[c], naive_probabilities(model, naive_paste(image, model.visual_prompts[c], *place), text)[c])
                for c in candidates
            }
            assert scores[i].argmax() == max(final, key=final.get)
            expected = [final.get(c, 0.0) for c in range(classes)]
            assert scores[i].exp().tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("use", ["none", "text_augmentation", "paired"])
def test_ablations_of_table_4a_equal_the_loop(clip_file, use):
    model, whole = (build(clip_file, K=3, VISUAL_PROMPT=v) for v in (use, "selection"))
    for m in (model, whole):
        m.backbone.logit_scale.data.fill_(2.5)
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 3, 3, 7])
    torch.manual_seed(7)
    losses, _ = model(images, labels)
    torch.manual_seed(7)
    places = random_places(4, SIZE, model.block, "random").tolist()
    with torch.no_grad():
        text = naive_text_features(model)
        for i, (image, y) in enumerate(zip(images, labels.tolist())):
            p = naive_probabilities(model, image, text)[y]
            pasted = naive_paste(image, model.visual_prompts[y], *places[i])
            conditional = naive_probabilities(model, pasted, text)[y]
            if use == "none":
                assert losses[i].item() == pytest.approx(-math.log(p), abs=2e-3)
            elif use == "text_augmentation":
                assert losses[i].item() == pytest.approx(-(math.log(p) + math.log(conditional)) / 2, abs=2e-3)
        if use == "paired":  # trained like the whole method
            torch.manual_seed(7)
            torch.testing.assert_close(losses, whole(images, labels)[0])
        # none of them selects: the original image alone decides
        scores = model.select(model.batch(images, list("abcd")), model.text_features())
        expected = [naive_probabilities(model, image, text) for image in images]
        torch.testing.assert_close(scores.exp(), torch.tensor(expected), atol=1e-4, rtol=1e-3)


def test_blocks_are_normalised_like_the_images(clip_file):
    raw, normalised = build(clip_file, transforms=()), build(clip_file)
    assert raw.visual_prompts.shape == (len(NAMES), 3, 9, SIZE) and raw.visual_prompts.min() >= 0
    for channel in range(3):
        expected = (raw.visual_prompts[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(normalised.visual_prompts[:, channel], expected)


def test_a_class_keeps_its_block_in_every_subset(clip_file):
    everything, new = build(clip_file), build(clip_file, NAMES[4:])
    assert torch.equal(everything.visual_prompts[4:], new.visual_prompts)


@pytest.mark.parametrize("text", ["two_stage", "generic"])
def test_gradients_reach_the_text_prompts_and_nothing_else(clip_file, text):
    model = build(clip_file, TEXT_PROMPT=text)
    visual_graph = []
    model.backbone.visual.register_forward_hook(lambda m, i, output: visual_graph.append(output.requires_grad))
    mlp = [f"meta_net.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    stages = {"generic": [["ctx"]], "two_stage": [mlp, ["ctx"]]}[text]
    for i, expected in enumerate(stages):
        if i == 1:
            model.prompt_learner.begin_stage_2()
        model.zero_grad(set_to_none=True)
        losses, _ = model(torch.randn(4, 3, SIZE, SIZE), torch.arange(4))
        losses.sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert list(found) == [f"prompt_learner.{name}" for name in expected]
        assert found[f"prompt_learner.{expected[-1]}"].abs().max() > 0
    assert not any(visual_graph) and not model.visual_prompts.requires_grad


def test_chunks_change_nothing(clip_file, monkeypatch):
    model = build(clip_file)
    images, paths = torch.randn(5, 3, SIZE, SIZE), list("abcde")
    with torch.no_grad():
        text = model.text_features()
        whole = model.select(model.batch(images, paths), text)
        monkeypatch.setattr(logoprompt, "CHUNK", 3)
        torch.testing.assert_close(model.select(model.batch(images, paths), text), whole, atol=1e-4, rtol=1e-4)


def test_one_class_and_duplicate_names(clip_file):
    single = build(clip_file, ["cup"])
    losses, _ = single(torch.randn(2, 3, SIZE, SIZE), torch.zeros(2, dtype=torch.long))
    assert losses.tolist() == [0.0, 0.0]
    twins = build(clip_file, ["missile", "cup", "missile", "face"])
    losses, _ = twins(torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 2]))
    assert torch.isfinite(losses).all()
    assert torch.equal(twins.visual_prompts[0], twins.visual_prompts[2])


def test_half_precision_encoders_give_finite_float32_losses(clip_file):
    model = build(clip_file)
    model.backbone.half_weights()
    images, labels = torch.randn(3, 3, SIZE, SIZE), torch.arange(3)
    prompts = logoprompt.PromptLearner(model.backbone, NAMES, 4)
    assert prompts.ctx.dtype == torch.float16
    torch.manual_seed(7)
    model.prompt_learner = prompts
    losses, log_p = model(images, labels)
    assert losses.dtype == log_p.dtype == torch.float32
    assert torch.isfinite(losses).all()
