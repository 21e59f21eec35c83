"""Reading images: whatever is wrong with one, a single line names it, also out of a worker and with any Dassl."""

import gc
import os
import warnings

import numpy as np
import pytest
from dassl.config import get_cfg_default
from dassl.data.datasets import Datum
from PIL import Image
from torch.utils.data import DataLoader

from trainers.prompting.images import read_image
from trainers.prompting.trainer import ImageDataset


def jpeg(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")


def bad_images(folder):
    """Make a file for each way of failing; return {name: (path, class, end of the message)}."""
    jpeg(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    (folder / "empty.jpg").touch()
    (folder / "folder.jpg").mkdir()
    (folder / "two\nlines.jpg").write_text("x")
    return {
        "missing": (folder / "missing.jpg", FileNotFoundError, "no image file at {}"),
        "cut": (folder / "cut.jpg", OSError, "cannot decode image {}: image file is truncated"),
        "text": (folder / "text.jpg", OSError, "cannot decode image {}: not an image of a known format"),
        "empty": (folder / "empty.jpg", OSError, "cannot decode image {}: not an image of a known format"),
        "folder": (folder / "folder.jpg", OSError, "cannot decode image {}: Is a directory"),
        "lines": (folder / "two\nlines.jpg", OSError, "cannot decode image {}: not an image of a known format"),
    }


KINDS = ["missing", "cut", "text", "empty", "folder", "lines"]


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_image(tmp_path, kind):
    path, error, message = bad_images(tmp_path)[kind]
    with pytest.raises(OSError) as caught:
        read_image(str(path))
    assert type(caught.value) is error and len(caught.value.args) == 1
    assert str(caught.value).startswith(message.format(str(path).replace("\n", " ")))
    assert len(str(caught.value).splitlines()) == 1


def test_decompression_bomb(tmp_path, monkeypatch):
    jpeg(tmp_path / "large.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="cannot decode image .*large.jpg: .*decompression bomb") as caught:
        read_image(str(tmp_path / "large.jpg"))
    assert type(caught.value) is OSError


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_in_a_loader(tmp_path, num_workers):
    made = bad_images(tmp_path)
    bad = [made[kind] for kind in ("missing", "cut", "text", "empty", "lines")]
    made["missing"][0].touch()  # Dassl.pytorch looks for the file of a Datum, so it goes missing after that
    data = [Datum(str(path)) for path, _, _ in bad] + [Datum(str(tmp_path / "whole.jpg"))]
    made["missing"][0].unlink()
    dataset = ImageDataset(get_cfg_default(), data, transform=np.array)
    batches = iter(DataLoader(dataset, num_workers=num_workers))
    for path, error, message in bad:
        with pytest.raises(OSError) as caught:
            next(batches)
        assert type(caught.value) is error
        assert message.format(str(path).replace("\n", " ")) in str(caught.value).splitlines()[-1]
    assert [batch["img"].shape for batch in batches] == [(1, 64, 64, 3)]


def test_what_is_wrong_with_a_transform_is_not_blamed_on_the_image(tmp_path):
    def broken(image):
        raise ValueError("no such colour")

    jpeg(tmp_path / "whole.jpg")
    dataset = ImageDataset(get_cfg_default(), [Datum(str(tmp_path / "whole.jpg"))], transform=broken)
    with pytest.raises(ValueError, match="no such colour"):
        dataset[0]


def test_image_is_decoded_and_its_file_closed(tmp_path):
    jpeg(tmp_path / "x.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        image = read_image(str(tmp_path / "x.jpg"))
        os.remove(tmp_path / "x.jpg")
        assert image.getpixel((63, 63)) is not None
        gc.collect()
