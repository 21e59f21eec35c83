"""paste.py: blocks go where they should, and the rest of the image stays."""

import pytest
import torch
from helpers import one_line

from trainers.prompting.paste import block_size, paste, places_of, uniform_numbers, uniform_of_paths


def random_places(n, size, block, location="random"):
    return places_of(torch.rand(n, 2, dtype=torch.float64), size, block, location)


def test_block_size():
    assert block_size(224, 1 / 7, 1.0) == (32, 224)
    assert block_size(224, 2 / 7, 0.5) == (64, 112)
    assert block_size(224, 0.001, 1.0) == (1, 224) and block_size(224, 1.0, 0.001) == (224, 1)
    for height, width, named in (
        (1.01, 1, "HEIGHT 1.01"),
        (0.0, 1, "HEIGHT 0"),
        (1, 1.5, "WIDTH 1.5"),
        (1, 0, "WIDTH 0"),
    ):
        message = one_line(lambda h=height, w=width: block_size(224, h, w))
        assert message.startswith(f"TRAINER.LOGOPROMPT.BLOCK_{named}: must be larger than 0 and at most 1")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("block", [(3, 8), (8, 8), (1, 1), (5, 2)])
def test_paste_equals_loop(block, dtype):
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 8, 8, generator=draw).to(dtype)
    blocks = torch.rand(6, 3, *block, generator=draw).to(dtype)
    places = random_places(6, 8, block)
    before = images.clone()
    pasted = paste(images, blocks, places)
    assert torch.equal(images, before)
    for i, (top, left) in enumerate(places.tolist()):
        for y in range(8):
            for x in range(8):
                inside = top <= y < top + block[0] and left <= x < left + block[1]
                expected = blocks[i, :, y - top, x - left] if inside else images[i, :, y, x]
                assert torch.equal(pasted[i, :, y, x], expected)


def test_result_has_dtype_and_device_of_the_images():
    places = torch.tensor([[0, 0], [4, 2]])
    images, blocks = torch.zeros(2, 3, 6, 6, dtype=torch.float16), torch.ones(2, 3, 2, 4)
    assert paste(images, blocks, places).dtype == torch.float16
    elsewhere = paste(images.to("meta"), blocks.to("meta"), places)  # places are drawn on the CPU
    assert elsewhere.device.type == "meta" and elsewhere.shape == images.shape
    assert paste(images[:0], blocks[:0], places[:0]).shape == (0, 3, 6, 6)


def test_gradients_reach_blocks_and_uncovered_pixels():
    images = torch.rand(2, 3, 6, 6, requires_grad=True)
    blocks = torch.rand(2, 3, 2, 4, requires_grad=True)
    paste(images, blocks, torch.tensor([[1, 2], [4, 0]])).sum().backward()
    assert torch.equal(blocks.grad, torch.ones_like(blocks))
    assert images.grad.sum() == 2 * 3 * (36 - 8)


@pytest.mark.parametrize("place", [(5, 0), (-1, 0), (0, 3), (0, -2)])
def test_block_outside_the_image_is_refused(place):
    with pytest.raises(ValueError, match="a block of 2x4 pixels does not fit inside an image of 6x6"):
        paste(torch.zeros(1, 3, 6, 6), torch.zeros(1, 3, 2, 4), torch.tensor([place]))


def test_places():
    torch.manual_seed(0)
    places = random_places(4000, 8, (3, 7))
    assert {tuple(p) for p in places.tolist()} == {(top, left) for top in range(6) for left in range(2)}
    assert torch.bincount(places[:, 0]).min() > 4000 / 6 * 0.8
    assert random_places(2, 8, (3, 8), "top").tolist() == [[0, 0]] * 2
    # narrower than the image: in the middle, the odd pixel to the right
    assert random_places(2, 9, (3, 4), "top").tolist() == [[0, 2]] * 2
    assert random_places(2, 9, (3, 4), "bottom").tolist() == [[6, 2]] * 2


def test_largest_number_keeps_the_block_inside():
    """In float32 1 - 2**-32 would be 1, and the block one pixel too low."""
    uniform = torch.full((1, 2), 1 - 2**-32, dtype=torch.float64)
    assert places_of(uniform, 64, (9, 32), "random").tolist() == [[55, 32]]
    assert uniform_of_paths(["a.jpg"], 0).dtype == torch.float64


def test_numbers_are_uniform_and_fixed():
    numbers = torch.tensor([uniform_numbers(str(i), 6) for i in range(1000)])
    assert numbers.min() >= 0 and numbers.max() < 1 and (numbers.mean(dim=0) - 0.5).abs().max() < 0.05
    assert uniform_numbers("a", 6)[:2] != uniform_numbers("b", 6)[:2]
    assert len(set(uniform_numbers("a", 6))) == 6


def test_places_depend_on_seed_and_path_only():
    paths = [f"a/{i}.jpg" for i in range(400)]
    uniform = uniform_of_paths(paths, 0)
    order = torch.randperm(400)
    assert torch.equal(uniform[order], uniform_of_paths([paths[i] for i in order], 0))
    torch.manual_seed(123)
    assert torch.equal(uniform, uniform_of_paths(paths, 0))
    assert not torch.equal(uniform, uniform_of_paths(paths, 1))
    places = places_of(uniform, 64, (9, 64), "random")
    assert set(places[:, 0].tolist()) == set(range(56)) and set(places[:, 1].tolist()) == {0}
    # known values: the same on every machine, in every version
    known = places_of(uniform_of_paths(["caltech-101/x.jpg", "b.png"], 1), 224, (32, 112), "random")
    assert known.tolist() == [[190, 30], [113, 23]]
