"""The bank of views: what it hands out is what encoding the view would give, and nothing is encoded twice."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_logoprompt import build, naive_paste
from test_two_stage import check_that_it_goes_on, run, states  # noqa: F401 (a fixture and its helper)
from tiny import SIZE
from torchvision import transforms as T

from trainers.logoprompt import FreshImages
from trainers.prompting.backbone import Backbone
from trainers.prompting.bank import FeatureBank, numbers_loader, seeded
from trainers.prompting.synthetic import places_at

TFM = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.4] * 3, [0.3] * 3)])


@pytest.fixture
def items(tmp_path):
    draw = np.random.RandomState(0)
    found = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.fromarray(draw.randint(0, 255, (90, 80, 3), dtype=np.uint8)).save(path)
        found.append(SimpleNamespace(impath=str(path), label=i % 4, domain=0))
    return found


def bank_of(model, items, views=2, seed=1, tfm=TFM, room=2**30):
    def draw(uniform):
        return places_at(uniform, SIZE, model.block, "random")

    encode = model.backbone.encode_image
    return FeatureBank(items, tfm, views, seed, encode, model.encode_pasted, draw, torch.device("cpu"), room)


@pytest.fixture
def counted(monkeypatch):
    seen = []
    original = Backbone.encode_image
    monkeypatch.setattr(Backbone, "encode_image", lambda self, x: seen.append(len(x)) or original(self, x))
    return seen


def test_features_equal_those_of_encoding_the_view(clip_file, items):
    model = build(clip_file)
    bank = bank_of(model, items)
    index, classes = torch.tensor([4, 0, 3, 0]), torch.tensor([[0, 7], [2, 5], [1, 2], [5, 6]])
    with torch.no_grad():
        for view in (0, 1, 0):
            batch = bank.batch(index, view)
            features, conditional = batch.features(), batch.conditional(classes)
            for b, i in enumerate(index.tolist()):
                pixels = bank.pixels(i, view)
                torch.testing.assert_close(features[b], model.backbone.encode_image(pixels[None])[0])
                for n, c in enumerate(classes[b].tolist()):
                    pasted = naive_paste(pixels, model.visual_prompts[c], *bank.places[i, view].tolist())
                    expected = model.backbone.encode_image(pasted[None])[0]
                    torch.testing.assert_close(conditional[b, n], expected, atol=1e-5, rtol=1e-4)


def test_views_differ_repeat_and_leave_no_trace(clip_file, items):
    model = build(clip_file)
    first, again, other = bank_of(model, items), bank_of(model, items), bank_of(model, items, seed=2)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    pixels = {(i, view): first.pixels(i, view) for i in range(6) for view in range(2)}
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(again.pixels(*key), value) for key, value in reversed(pixels.items()))
    assert torch.equal(first.places, again.places) and not torch.equal(first.places, other.places)
    flat = torch.stack(list(pixels.values())).flatten(1)
    assert torch.cdist(flat, flat).add(torch.eye(12) * 1e9).min() > 1
    assert not torch.equal(other.pixels(0, 0), pixels[0, 0])


def test_an_augmentation_may_use_any_source_of_random_numbers():
    for draw in (random.random, np.random.rand, lambda: torch.rand(()).item()):
        with seeded(5):
            first = draw()
        with seeded(5):
            assert draw() == first
        with seeded(6):
            assert draw() != first


def test_nothing_is_encoded_twice(clip_file, items, counted):
    model = build(clip_file)
    bank = bank_of(model, items, views=3)
    index, classes = torch.arange(6), torch.tensor([[0, 1]] * 6)
    counted.clear()
    with torch.no_grad():
        for epoch in range(9):
            batch = bank.batch(index, epoch)
            batch.features()
            batch.conditional(classes)
    assert sum(counted) == len(bank) == 3 * 6 * (1 + 2)
    decoded = len(bank._decoded)
    batch = bank.batch(index, 0)
    before = batch.conditional(classes)
    classes[2, 1] = 5  # mining asks for another class of one image
    counted.clear()
    batch.conditional(classes)
    assert sum(counted) == 1 and decoded == 6
    classes[2, 1] = 1
    assert torch.equal(batch.conditional(classes), before)


def test_without_room_for_decoded_images_views_are_the_same(clip_file, items):
    model = build(clip_file)
    plain, narrow = bank_of(model, items), bank_of(model, items, room=2 * 3 * 90 * 80 + 1)  # two images and a little
    for i in (0, 1, 2, 3, 0, 2):
        assert torch.equal(narrow.pixels(i, 0), plain.pixels(i, 0))
    assert len(plain._decoded) == 4 and sorted(narrow._decoded) == [0, 1]


def test_a_step_on_the_bank_equals_one_on_the_same_pixels(clip_file, items, monkeypatch):
    import trainers.logoprompt as logoprompt

    model = build(clip_file, K=3)
    model.backbone.logit_scale.data.fill_(2.5)
    bank = bank_of(model, items)
    index, label = torch.tensor([5, 1, 2]), torch.tensor([1, 1, 2])
    pixels = torch.stack([bank.pixels(i, 1) for i in index.tolist()])
    monkeypatch.setattr(logoprompt, "random_places", lambda *args: bank.places[index, 1])
    outcomes = []
    for images in (FreshImages(model, pixels), bank.batch(index, 1)):
        model.zero_grad()
        losses, log_p = model.contrast(images, label)
        losses.sum().backward()
        outcomes.append([losses, log_p, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(outcomes[0]) > 2
    for plain, kept in zip(*outcomes):
        torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-4)


def test_batches_are_those_of_training(items):
    for size, expected in ((2, [2, 2, 2]), (4, [4]), (8, [6])):
        batches = list(numbers_loader(items, size))
        assert [len(batch["index"]) for batch in batches] == expected
        for batch in batches:
            assert batch["label"].tolist() == [items[i].label for i in batch["index"]]
    orders = {tuple(torch.cat([b["index"] for b in numbers_loader(items, 2)]).tolist()) for _ in range(5)}
    assert len(orders) > 1


# ------------------------------------------------------------------------------------------------- through train.py


def test_later_epochs_encode_next_to_nothing(run, counted):  # noqa: F811
    """16 images, 2 views, 6 epochs of which the last four meet views that are known."""
    words = ("TRAINER.LOGOPROMPT.VIEWS", 2, "OPTIM.MAX_EPOCH", 6, "TEST.NO_TEST", True, "TRAINER.LOGOPROMPT.K", 3)
    trainer = run(*words)
    assert sum(counted) == len(trainer.bank) <= 16 * 2 * (1 + 4)  # four classes: all of them after two epochs
    counted.clear()
    run(*words[2:], out="fresh")
    assert sum(counted) == 16 * 6 * (1 + 4)


@pytest.mark.parametrize("done", [1, 4])
def test_an_interrupted_run_goes_on_to_the_same_prompts(run, monkeypatch, done):  # noqa: F811
    """Its bank is empty again, and is filled with the same views."""
    check_that_it_goes_on(run, monkeypatch, done, "TRAINER.LOGOPROMPT.VIEWS", 2)


def test_a_run_with_views_repeats(run):  # noqa: F811
    words = ("TRAINER.LOGOPROMPT.VIEWS", 2)
    run(*words)
    run(*words, out="again")
    first, again = (states(run, out=out) for out in ("run", "again"))
    assert first.keys() == again.keys()
    for epoch in first:
        assert all(torch.equal(first[epoch][key], again[epoch][key]) for key in first[epoch])


def test_views_that_make_no_sense(run, capsys):  # noqa: F811
    for words in ((-1,), (2, "TRAINER.LOGOPROMPT.TUNE_VISUAL", True)):
        run("TRAINER.LOGOPROMPT.VIEWS", *words, status=2)
        assert "VIEWS" in capsys.readouterr().err.splitlines()[-1]
