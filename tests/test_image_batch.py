"""image_batch.py: features of images and of their class-conditional copies equal those of encoding them one by one."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Runs, naive_paste
from PIL import Image
from tiny import SIZE
from torchvision import transforms as T

from trainers.prompting import image_batch
from trainers.prompting.backbone import Backbone, load_clip
from trainers.prompting.image_batch import ImageBatch, ViewCache

TRANSFORM = T.Compose(
    [T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.4] * 3, [0.3] * 3)]
)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def backbone(clip_file):
    return load_clip(clip_file)


@pytest.fixture(scope="module")
def blocks():
    return torch.randn(8, 3, 9, 40, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def items(tmp_path):
    draw, found = np.random.RandomState(0), []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.fromarray(draw.randint(0, 255, (90, 80, 3), dtype=np.uint8)).save(path)
        found.append(SimpleNamespace(impath=str(path), label=i % 4, domain=0))
    return found


@pytest.fixture
def encoded(monkeypatch):
    """Numbers of images that the encoder sees."""
    sizes, encode_image = [], Backbone.encode_image
    monkeypatch.setattr(Backbone, "encode_image", lambda self, x: sizes.append(len(x)) or encode_image(self, x))
    return sizes


def draw_places(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, high + 1, (n,), generator=draw) for high in (SIZE - 9, SIZE - 40)], dim=1)


def naive_feature(backbone, image):
    with torch.no_grad():
        feature = backbone.visual(image[None])[0]
    return feature / feature.norm()


@pytest.mark.parametrize("chunk", [256, 3])
def test_features_equal_loop(backbone, blocks, monkeypatch, chunk):
    monkeypatch.setattr(image_batch, "CHUNK", chunk)
    images, classes = ImageBatch(backbone, torch.randn(3, 3, SIZE, SIZE)), torch.tensor([[0, 1], [1, 7], [5, 5]])
    places = draw_places(3)
    features, conditional = images.features(), images.pasted(blocks, classes, places)
    assert conditional.shape == (3, 2, 24) and len(images) == 3
    for i, image in enumerate(images.pixels):
        torch.testing.assert_close(features[i], naive_feature(backbone, image), **CLOSE)
        for n, c in enumerate(classes[i].tolist()):
            pasted = naive_paste(image, blocks[c], *places[i].tolist())
            torch.testing.assert_close(conditional[i, n], naive_feature(backbone, pasted), **CLOSE)
    assert not features.requires_grad and not conditional.requires_grad


def test_chunks_change_no_gradient_of_blocks(clip_file, monkeypatch):
    backbone, gradients = load_clip(clip_file).double(), []
    pixels, weights = torch.randn(3, 3, SIZE, SIZE).double(), torch.randn(3, 2, 24).double()
    classes, places = torch.tensor([[0, 1], [1, 2], [5, 0]]), draw_places(3)
    learned = torch.randn(8, 3, 9, 40).double().requires_grad_()
    for chunk in (64, 4):
        monkeypatch.setattr(image_batch, "GRADIENT_CHUNK", chunk)
        features = ImageBatch(backbone, pixels).pasted(learned, classes, places)
        gradients += torch.autograd.grad((features * weights).sum(), learned)
    torch.testing.assert_close(*gradients)
    assert [bool(g.abs().sum() > 0) for g in gradients[0]] == [True, True, True, False, False, True, False, False]


def cache_of(backbone, items, views=2, seed=1, room=2**30):
    return ViewCache(backbone, items, TRANSFORM, views, seed, room)


def test_cached_features_equal_loop(backbone, blocks, items):
    cache = cache_of(backbone, items)
    index, classes = torch.tensor([4, 0, 3, 0]), torch.tensor([[0, 7], [2, 5], [1, 2], [5, 6]])
    places = draw_places(6)[index]
    for view in (0, 1, 0):
        batch = cache.batch(index, view)
        features, conditional = batch.features(), batch.pasted(blocks, classes, places)
        assert torch.equal(batch.uniform(5), cache.uniform[index, view])
        for b, i in enumerate(index.tolist()):
            pixels = cache.pixels(i, view)
            torch.testing.assert_close(features[b], naive_feature(backbone, pixels), **CLOSE)
            for n, c in enumerate(classes[b].tolist()):
                pasted = naive_paste(pixels, blocks[c], *places[b].tolist())
                torch.testing.assert_close(conditional[b, n], naive_feature(backbone, pasted), **CLOSE)


def test_views_differ_repeat_and_leave_random_states_alone(backbone, items):
    first, again, other = cache_of(backbone, items), cache_of(backbone, items), cache_of(backbone, items, seed=2)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    pixels = {(i, view): first.pixels(i, view) for i in range(6) for view in range(2)}
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(again.pixels(*key), value) for key, value in reversed(pixels.items()))
    assert torch.equal(first.uniform, again.uniform) and not torch.equal(first.uniform, other.uniform)
    flat = torch.stack(list(pixels.values())).flatten(1)
    assert torch.cdist(flat, flat).add(torch.eye(12) * 1e9).min() > 1
    assert not torch.equal(other.pixels(0, 0), pixels[0, 0])


def test_nothing_is_encoded_twice(backbone, blocks, items, encoded):
    cache, places = cache_of(backbone, items, views=3), draw_places(6)
    index, classes = torch.arange(6), torch.tensor([[0, 1]] * 6)
    for epoch in range(9):
        batch = cache.batch(index, epoch)
        batch.features()
        batch.pasted(blocks, classes, places)
    assert sum(encoded) == len(cache) == 3 * 6 * (1 + 2)
    batch = cache.batch(index, 0)
    before = batch.pasted(blocks, classes, places)
    classes[2, 1] = 5  # another hard negative of one image
    encoded.clear()
    batch.pasted(blocks, classes, places)
    assert sum(encoded) == 1
    classes[2, 1] = 1
    assert torch.equal(batch.pasted(blocks, classes, places), before)


def test_resumed_cache_encodes_in_the_same_groups(backbone, blocks, items, encoded):
    """Features depend in their last digits on what is encoded with them."""
    places, requests = draw_places(6), [torch.tensor([0, 1, 2, 3, 4]), torch.tensor([5, 0]), torch.tensor([3])]

    def ask(cache):
        for index in requests:
            batch = cache.batch(index, 0)
            batch.features(), batch.pasted(blocks, index[:, None] % 4, places[index])

    first = cache_of(backbone, items)
    ask(first)
    groups = list(encoded)
    assert groups == [5, 5, 1, 1]
    resumed = cache_of(backbone, items)
    resumed.load_state_dict(first.state_dict())
    assert len(resumed) == 0
    encoded.clear()
    requests.reverse()
    ask(resumed)
    assert sorted(encoded) == sorted(groups)
    index = torch.arange(6)
    assert torch.equal(resumed.batch(index, 0).raw_features(), first.batch(index, 0).raw_features())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), resumed.state_dict().values()))


VIEWS = ("OPTIM.MAX_EPOCH", 6, "TRAINER.LOGOPROMPT.VIEWS", 2, "TRAINER.LOGOPROMPT.K", 3, "TEST.NO_TEST", True)


@pytest.mark.parametrize("done", [1, 4])
def test_interrupted_run_with_views_ends_with_the_same_prompts(data_root, rn_file, tmp_path, done):
    Runs(data_root, rn_file, tmp_path).check_resume(done, *VIEWS)
