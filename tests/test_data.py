"""data.py: images of every kind are read or refused by name, decoded once, and augmented as the seed says."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import Datum
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T

from trainers.prompting.data import ImageDataset, decoded_size, index_loader, read_image
from trainers.prompting.random_states import random_states, seeded, set_random_states

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)


def pixels(path):
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(
    "mode, kind",
    [("RGB", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("L", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "PNG"),
     ("P", "GIF"), ("1", "PNG"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("RGBA", "WEBP"), ("YCbCr", "JPEG"),
     ("LAB", "TIFF"), ("L", "BMP"), ("RGB", "PPM")],
)  # fmt: skip
def test_images_of_8_bits_are_read_as_in_coop(mode, kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    image = Image.fromarray(COLOURS).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(RAMP))
    image.save(path, kind)
    with Image.open(path) as opened:
        assert (pixels(path) == np.asarray(opened.convert("RGB"))).all()


@pytest.mark.parametrize(
    "values, kind, expected",
    [
        (np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16), "PNG", [0, 1, 4, 128, 255]),
        (np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16), "TIFF", [0, 1, 4, 128, 255]),
        (np.array([[-5, 0, 257, 65535, 2**30]], dtype=np.int32), "TIFF", [0, 0, 1, 255, 255]),
        (np.array([[0, 0.5, 1, -1, np.nan]], dtype=np.float32), "TIFF", [0, 128, 255, 0, 0]),
        (np.array([[0, 0.6, 200, 255, 1e9]], dtype=np.float32), "TIFF", [0, 1, 200, 255, 255]),
        (np.array([[0, 1, np.inf, -np.inf, 254.4]], dtype=np.float32), "TIFF", [0, 1, 255, 0, 254]),
    ],
)
def test_more_than_8_bits_are_scaled(values, kind, expected, tmp_path):
    """Pillow would clip 16 bits to white."""
    Image.fromarray(values).save(tmp_path / "x", kind)
    assert pixels(tmp_path / "x")[0, :, 0].tolist() == expected


def test_exif_orientation_is_ignored(tmp_path):
    """As in CoOp; viewers would turn this image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOURS[:8]).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as found:
        assert found.getexif()[0x0112] == 6
    assert (pixels(tmp_path / "x.png") == COLOURS[:8]).all()
    assert decoded_size([str(tmp_path / "x.png")], 1e9) == 3 * 8 * 16


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF"])
def test_first_frame_counts(kind, tmp_path):
    frames = [Image.new("L", (8, 8), value).convert("RGB") for value in (200, 0, 90)]
    frames[0].save(tmp_path / "x", kind, save_all=True, append_images=frames[1:])
    assert abs(pixels(tmp_path / "x").astype(int) - 200).max() <= 1


def jpeg(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")


UNREADABLE = {
    "missing.jpg": (FileNotFoundError, "no image file at {}"),
    "cut.jpg": (OSError, "cannot decode image {}: image file is truncated"),
    "text.jpg": (OSError, "cannot decode image {}: not an image of a known format"),
    "empty.jpg": (OSError, "cannot decode image {}: not an image of a known format"),
    "folder.jpg": (OSError, "cannot decode image {}: Is a directory"),
    "two\nlines.jpg": (OSError, "cannot decode image {}: not an image of a known format"),
}


@pytest.fixture
def unreadable(tmp_path):
    """A folder with a file for each way of failing, and a whole image."""
    jpeg(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "two\nlines.jpg").write_text("x")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_in_a_loader(unreadable, num_workers):
    bad = [name for name in UNREADABLE if name != "folder.jpg"]
    (unreadable / "missing.jpg").touch()  # Dassl.pytorch checks that the file of a Datum exists
    data = [Datum(str(unreadable / name)) for name in [*bad, "whole.jpg"]]
    (unreadable / "missing.jpg").unlink()
    dataset = ImageDataset(get_cfg_default(), data, transform=np.array)
    batches = iter(DataLoader(dataset, num_workers=num_workers))
    for name in bad:
        error, message = UNREADABLE[name]
        with pytest.raises(OSError) as caught:
            next(batches)
        assert type(caught.value) is error
        assert message.format(str(unreadable / name).replace("\n", " ")) in str(caught.value).splitlines()[-1]
    assert [batch["img"].shape for batch in batches] == [(1, 64, 64, 3)]


def test_decoded_images_are_those_of_the_files(data_root):
    items = [Datum(str(path), 1, 0, "x") for path in sorted(data_root.rglob("image_000[01].jpg"))]
    paths, transform = [item.impath for item in items], T.Compose([T.RandomResizedCrop(32), T.ToTensor()])
    plain, decoded = (ImageDataset(get_cfg_default(), items, transform=transform, is_train=True) for _ in range(2))
    size = sum(3 * read_image(path).width * read_image(path).height for path in paths)
    assert decoded_size(paths, 2**30) == size and decoded_size(paths, size - 1) is None
    decoded.decode(size - 1)
    assert decoded.decoded is None
    decoded.decode(size)
    assert len(decoded.decoded) == len(items)
    for i, path in enumerate(paths):
        assert decoded.decoded[i].tobytes() == read_image(path).tobytes()
        assert decoded.decoded[i].size == read_image(path).size
        torch.manual_seed(i)
        expected = plain[i]
        torch.manual_seed(i)
        found = decoded[i]
        assert torch.equal(found.pop("img"), expected.pop("img")) and found == expected
    decoded.transform = plain.transform = T.Compose([T.Resize((32, 32)), T.ToTensor()])
    (batch,) = DataLoader(decoded, batch_size=len(items), num_workers=2)
    assert torch.equal(batch["img"], torch.stack([plain[i]["img"] for i in range(len(items))]))
    decoded.decoded = [Image.new("RGB", image.size) for image in decoded.decoded]  # files are no longer read
    assert decoded[0]["img"].max() == 0


def test_index_loader_draws_the_batches_of_training():
    items = [SimpleNamespace(impath=str(i), label=i % 4, domain=0) for i in range(6)]
    for size, expected in ((2, [2, 2, 2]), (4, [4]), (8, [6])):
        batches = list(index_loader(items, size))
        assert [len(batch["index"]) for batch in batches] == expected
        for batch in batches:
            assert batch["label"].tolist() == [items[i].label for i in batch["index"]]
    orders = {tuple(torch.cat([b["index"] for b in index_loader(items, 2)]).tolist()) for _ in range(5)}
    assert len(orders) > 1


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_random_states_of_python_numpy_and_torch(draw):
    states = random_states()
    first = draw()
    with seeded(5):
        seeded_draw = draw()
    second = draw()
    with seeded(5):
        assert draw() == seeded_draw
    with seeded(6):
        assert draw() != seeded_draw
    set_random_states(states)
    assert [draw(), draw()] == [first, second]  # seeded() left no trace
