"""logoprompt.py as a whole against the method written as loops, in float64, and its stages in real runs."""

import json
import math

import pytest
import torch
from helpers import (
    MEAN,
    STD,
    Runs,
    build,
    method_config,
    naive_logits,
    naive_min_max_loss,
    naive_paste,
    naive_probabilities,
    naive_ranking,
    naive_text_features,
)
from tiny import NAMES, SIZE
from torchvision.transforms.functional import to_tensor

from trainers import logoprompt
from trainers.prompting.image_batch import ImageBatch
from trainers.prompting.render import blocks_of, render_blocks

BASE, NEW = NAMES[:4], NAMES[4:]


def batch_of(model, n, paths=None, seed=0):
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, SIZE, SIZE, dtype=torch.float64, generator=draw).to(model.backbone.dtype)
    return ImageBatch(model.backbone, pixels, paths)


def loss_and_places(model, images, labels):
    """A training step and the places that it drew."""
    torch.manual_seed(7)
    step = model.loss(images, labels)
    torch.manual_seed(7)
    return step, model.places(images).tolist()


def conditional_probability(model, image, c, place, text):
    """p(c|x_c)."""
    return naive_probabilities(model, naive_paste(image, model.visual_prompts[c], *place), text)[c]


@pytest.mark.parametrize(
    "k, classes, options",
    [
        (3, 8, {"LOSS": "paper"}),
        (5, 8, {"LOSS": "infonce", "LOCATION": "top", "BLOCK_WIDTH": 0.75}),
        (5, 3, {"LOSS": "paper", "LOCATION": "bottom", "TEXT_PROMPT": "generic"}),
        (1, 2, {"LOSS": "infonce", "TUNE_VISUAL": True}),
        (3, 8, {"LOSS": "infonce", "ADAPTER": True}),
    ],
)
def test_training_loss_equals_loop(clip_file, k, classes, options):
    model = build(clip_file, NAMES[:classes], K=k, **options)
    if "ADAPTER" in options:
        model.learned.adapter.fill(torch.randn(10, 24).double(), torch.arange(10) % classes)
    images, labels = batch_of(model, 5), torch.arange(5) % classes
    step, places = loss_and_places(model, images, labels)
    losses, smaller = [], 0
    with torch.no_grad():
        text = naive_text_features(model)
        for i, (image, y) in enumerate(zip(images.pixels, labels.tolist())):
            p = naive_probabilities(model, image, text)
            assert step.logits[i].exp().tolist() == pytest.approx(p, rel=1e-9)
            negatives = [c for c in naive_ranking(p) if c != y][:k]
            conditional = {c: conditional_probability(model, image, c, places[i], text) for c in (y, *negatives)}
            losses.append(naive_min_max_loss(p, conditional, y, negatives, options["LOSS"]))
            smaller += conditional[y] < p[y]
    assert list(step.losses) == ["loss"] and step.total.item() == pytest.approx(sum(losses) / 5, rel=1e-9)
    assert step.log["conditional_minimum"].item() == pytest.approx(100 * smaller / 5)


@pytest.mark.parametrize("k, classes, adapter", [(5, 8, False), (2, 8, True), (5, 3, False), (1, 2, False)])
def test_selection_equals_loop(clip_file, k, classes, adapter):
    model = build(clip_file, NAMES[:classes], K=k, VISUAL_SEED=3, ADAPTER=adapter)
    if adapter:
        model.learned.adapter.fill(torch.randn(10, 24).double(), torch.arange(10) % classes)
    images = batch_of(model, 5, [f"caltech-101/{i}.jpg" for i in range(5)])
    with torch.no_grad():
        text, places = naive_text_features(model), model.places(images).tolist()
        comparison = model.compare(images, model.text_features())
        assert torch.equal(comparison.scores, model.score(images, model.text_features()))
        assert comparison.places.tolist() == places
        for i, image in enumerate(images.pixels):
            p = naive_probabilities(model, image, text)
            candidates = naive_ranking(p)[:k]
            conditional = {c: conditional_probability(model, image, c, places[i], text) for c in candidates}
            final = {c: max(p[c], conditional[c]) for c in candidates}
            assert comparison.scores[i].argmax() == max(final, key=final.get)
            assert comparison.scores[i].exp().tolist() == pytest.approx([final.get(c, 0.0) for c in range(classes)])
            assert comparison.original[i].exp().tolist() == pytest.approx(p)
            assert comparison.candidates[i].tolist() == candidates
            assert comparison.conditional[i].exp().tolist() == pytest.approx([conditional[c] for c in candidates])


@pytest.mark.parametrize("use", ["none", "text_augmentation", "paired"])
def test_ablations_of_table_4a_equal_loop(rn_file, use):
    model = build(rn_file, K=3, VISUAL_PROMPT=use)
    images, labels = batch_of(model, 4, list("abcd")), torch.tensor([0, 3, 3, 7])
    step, places = loss_and_places(model, images, labels)
    found, expected, scores = model.compare(images, model.text_features()), 0.0, []
    with torch.no_grad():
        text = naive_text_features(model)
        test_places = model.places(images).tolist()
        for i, (image, y) in enumerate(zip(images.pixels, labels.tolist())):
            p = naive_probabilities(model, image, text)
            if use != "paired":  # cross-entropy; the original image alone decides
                expected -= math.log(p[y]) / 4
                scores.append([math.log(q) for q in p])
                continue

            def pair(c, place, image=image):  # the logit of a class on its own class-conditional image
                return naive_logits(model, naive_paste(image, model.visual_prompts[c], *place), text)[c]

            group = [y, *[c for c in naive_ranking(p) if c != y][:3]]
            logits = [pair(c, places[i]) for c in group]
            expected += (math.log(sum(math.exp(z - logits[0]) for z in logits))) / 4
            candidates = naive_ranking(p)[:3]
            assert found.candidates[i].tolist() == candidates
            logits = {c: pair(c, test_places[i]) for c in candidates}
            total = math.log(sum(map(math.exp, logits.values())))
            scores.append([logits[c] - total if c in logits else -math.inf for c in range(len(NAMES))])
    assert step.total.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(found.scores, torch.tensor(scores, dtype=torch.float64))


def test_without_selection_the_original_image_alone_decides(rn_file):
    model, images = build(rn_file, SELECT_AT_TEST=False), batch_of(build(rn_file), 3, list("abc"))
    found = model.compare(images, model.text_features())
    assert found.candidates is None and torch.equal(found.scores, found.original)
    losses = [loss_and_places(m, images, torch.tensor([0, 3, 7]))[0].total for m in (model, build(rn_file))]
    assert torch.equal(*losses)  # trained in the same way


@pytest.mark.parametrize("use", ["none", "text_augmentation"])
def test_options_without_effect_are_refused(use):
    cfg = method_config("LOGOPROMPT", VISUAL_PROMPT=use, TUNE_VISUAL=True, SELECT_AT_TEST=False)
    errors = [line for line in logoprompt.CustomCLIP.config_errors(cfg) if "VISUAL_PROMPT selection" in line]
    assert [line.split()[0] for line in errors] == [
        "TRAINER.LOGOPROMPT.TUNE_VISUAL",
        "TRAINER.LOGOPROMPT.SELECT_AT_TEST",
    ]


def test_text_augmentation_adds_a_drawn_image_per_class(run):
    """Its name over the whole image, in the training set alone; the data set and validation stay as they are."""
    start, runs = run
    for views in (0, 2):
        options = ("TRAINER.LOGOPROMPT.VISUAL_PROMPT", "text_augmentation", "TRAINER.LOGOPROMPT.VIEWS", views)
        trained = start(*options, "DATALOADER.TRAIN_X.BATCH_SIZE", 4, out=f"views{views}")
        real, items = trained.dm.dataset.train_x, trained.train_items
        classnames = trained.classnames
        assert items[: len(real)] == real and [item.label for item in items[len(real) :]] == list(
            range(len(classnames))
        )
        assert len(trained.train_loader_x.dataset) == len(real) + len(classnames)
        for item, block in zip(items[len(real) :], render_blocks(classnames, SIZE, SIZE)):
            assert item.image.size == (SIZE, SIZE)
            torch.testing.assert_close(to_tensor(item.image), block, atol=0.5 / 255, rtol=0)


def test_blocks_are_normalised_like_the_images(rn_file):
    raw, normalised = build(rn_file, transforms=()), build(rn_file)
    assert raw.visual_prompts.shape == (len(NAMES), 3, 9, SIZE)
    assert raw.visual_prompts.min() >= 0 and raw.visual_prompts.max() <= 1
    for channel in range(3):
        expected = (raw.visual_prompts[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(normalised.visual_prompts[:, channel], expected, atol=1e-6, rtol=1e-6)


MLP = {f"meta_net.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    "stage, options, expected",
    [
        (1, {}, MLP),
        (2, {}, {"ctx"}),
        (1, {"TEXT_PROMPT": "generic"}, {"ctx"}),
        (1, {"TUNE_VISUAL": True}, MLP | {"visual_prompts.pixels"}),
        (2, {"TUNE_VISUAL": True}, {"ctx", "visual_prompts.pixels"}),
        (3, {"TUNE_VISUAL": True, "ADAPTER": True}, {"adapter.keys"}),
        (3, {"TEXT_PROMPT": "generic", "ADAPTER": True}, {"adapter.keys"}),
    ],
)
def test_gradients_reach_what_the_stage_trains_and_nothing_else(rn_file, stage, options, expected):
    model, graphs = build(rn_file, **options), []
    model.backbone.visual.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    if stage >= 2 and "TEXT_PROMPT" not in options:
        model.learned.begin_stage_2()
    if stage == 3:
        model.learned.adapter.fill(torch.randn(10, 24).double(), torch.arange(10) % len(NAMES))
    model.loss(batch_of(model, 4), torch.arange(4)).total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {f"learned.{name}" for name in expected}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert any(graphs) == ("visual_prompts.pixels" in expected)  # no graph through the frozen image encoder


@pytest.mark.parametrize("form", ["infonce", "paper"])
def test_gradient_of_pixels_equals_finite_differences(clip_file, form):
    model = build(clip_file, BASE, TUNE_VISUAL=True, LOSS=form, TEXT_PROMPT="generic")
    images, labels, pixels = batch_of(model, 2), torch.tensor([0, 2]), model.learned.visual_prompts.pixels

    def loss():
        torch.manual_seed(7)
        return model.loss(images, labels).total

    loss().backward()
    checked = 0
    for c in range(4):  # the pixel of largest gradient, and another one
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


@pytest.fixture
def run(data_root, rn_file, tmp_path):
    runs = Runs(data_root, rn_file, tmp_path)
    return lambda *opts, **more: runs("OPTIM.MAX_EPOCH", 5, *opts, **more), runs


def test_every_stage_trains_its_own_parameters(run):
    train, runs = run
    train("TRAIN.CHECKPOINT_FREQ", 1, "TRAINER.LOGOPROMPT.MLP_REDUCTION", 2)  # with one hidden unit it may be dead
    found = runs.states()
    assert sorted(found) == [1, 2, 3, 4, 5]  # three of stage 1, two of stage 2
    for before, after in ((1, 2), (2, 3), (3, 4), (4, 5)):
        same = {key for key in found[before] if torch.equal(found[before][key], found[after][key])}
        assert ("ctx" in same) == (after <= 3) and MLP.isdisjoint(same) == (after <= 3)
        assert found[after]["trained"].tolist() == [after > 3] * 4


@pytest.mark.parametrize("stage_1", [0, 2, 5])
def test_every_stage_has_its_own_schedule(run, monkeypatch, stage_1):
    """One epoch of warm-up, then a cosine; also for the pixels, at their own rate."""
    train, _ = run
    rates, run_epoch = [], logoprompt.LoGoPrompt.run_epoch

    def note(trainer):
        rates.append(sorted({group["lr"] for group in trainer.optim.param_groups}))
        run_epoch(trainer)

    monkeypatch.setattr(logoprompt.LoGoPrompt, "run_epoch", note)
    options = {"STAGE1_EPOCHS": stage_1, "STAGE2_LR": 0.01, "TUNE_VISUAL": True, "VISUAL_LR": 10.0}
    train("OPTIM.LR", 0.1, *(x for key, v in options.items() for x in (f"TRAINER.LOGOPROMPT.{key}", v)))
    expected = []
    for lr, epochs in ((0.1, stage_1), (0.01, 5 - stage_1)):
        cosine = [(1 + math.cos(math.pi * (e - 1) / epochs)) / 2 for e in range(1, epochs)]
        expected += [[1e-5]] * (epochs > 0) + [[lr * factor, 10 * factor] for factor in cosine]
    assert len(rates) == 5
    for found, values in zip(rates, expected):
        assert found == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("done", [1, 3, 4])
def test_interrupted_run_ends_with_the_same_prompts(run, done):
    run[1].check_resume(done, "OPTIM.MAX_EPOCH", 5, "TRAINER.LOGOPROMPT.TUNE_VISUAL", True)


def test_log_is_read_by_parse_test_res_of_coop(run):
    """It takes the last accuracy after "Finish training", or after "=> result" of test-only runs."""
    train, runs = run
    train("TEST.FINAL_MODEL", "best_val")  # logs an accuracy on validation images after every epoch
    train("DATASET.SUBSAMPLE_CLASSES", "new", out="new", flags=runs.evaluation())
    for out, signal in (("run", "Finish training"), ("new", "=> result")):
        before, after = (runs.folder / out / "log.txt").read_text().split(f"\n{signal}\n")[-2:]
        accuracy = json.loads((runs.folder / out / "results.json").read_text())["metrics"]["accuracy"]
        assert after.count(f"* accuracy: {accuracy:.1f}%\n") == after.count("* accuracy: ") == 1
        assert before.count("* accuracy: ") == (5 if out == "run" else 0)


def test_one_checkpoint_serves_base_new_and_all_classes(run):
    """Text of untrained classes comes from stage 1, their blocks are the rendered ones."""
    train, runs = run
    tuned = ("TRAINER.LOGOPROMPT.TUNE_VISUAL", True, "TRAINER.LOGOPROMPT.VISUAL_LR", 50.0)
    trained = train(*tuned)
    pixels = runs.states()[5]["visual_prompts.pixels"]
    rendered = blocks_of(trained.cfg.TRAINER.LOGOPROMPT, NAMES, SIZE)
    assert pixels.min() >= 0 and pixels.max() <= 1 and not torch.equal(pixels, rendered[:4])
    text, blocks = {}, {}
    for subset, names in (("base", BASE), ("new", NEW), ("all", NAMES)):
        tested = train(*tuned, "DATASET.SUBSAMPLE_CLASSES", subset, flags=runs.evaluation(), out=subset)
        assert tested.classnames == names
        text[subset], blocks[subset] = tested.model.text_features(), tested.model.learned.visual_prompts.pixels
        results = json.loads((runs.folder / subset / "results.json").read_text())
        assert results["classes"] == len(names) and results["images"] == 4 * len(names)
    torch.testing.assert_close(text["base"], trained.model.text_features())
    torch.testing.assert_close(text["all"], torch.cat([text["base"], text["new"]]))
    torch.testing.assert_close(blocks["all"].detach().cpu(), torch.cat([pixels, rendered[4:]]))
