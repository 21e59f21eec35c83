"""Reading images: whatever is wrong with one, a single line names it, also out of a worker and with any Dassl."""

import gc
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import Datum
from PIL import Image
from tiny import arguments
from torch.utils.data import DataLoader
from torchvision import transforms as T

import train
from trainers.prompting.data import DecodedImages, decoded_size, read_image
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


def test_decoded_images_are_the_same(data_root):
    """Kept or read anew, an item is the same; workers share what is kept."""
    cfg = get_cfg_default()
    items = [Datum(str(path), 1, 0, "x") for path in sorted(data_root.rglob("image_000[01].jpg"))]
    paths = [item.impath for item in items]
    tfm = T.Compose([T.RandomResizedCrop(32), T.ToTensor()])
    plain, kept = (ImageDataset(cfg, items, transform=tfm, is_train=True) for _ in range(2))
    size = sum(3 * read_image(path).width * read_image(path).height for path in paths)
    assert decoded_size(paths, 2**30) == size and decoded_size(paths, size - 1) is None
    kept.decode(size - 1)
    assert kept.decoded is None
    kept.decode(size)
    assert isinstance(kept.decoded, DecodedImages)
    for i, path in enumerate(paths):
        assert kept.decoded[i].tobytes() == read_image(path).tobytes() and kept.decoded[i].size == read_image(path).size
        torch.manual_seed(i)
        expected = plain[i]
        torch.manual_seed(i)
        found = kept[i]
        assert found.keys() == expected.keys() and torch.equal(found.pop("img"), expected.pop("img"))
        assert found == expected
    kept.transform = T.Compose([T.Resize((32, 32)), T.ToTensor()])
    plain.transform = kept.transform
    (batch,) = DataLoader(kept, batch_size=len(items), num_workers=2)
    assert torch.equal(batch["img"], torch.stack([plain[i]["img"] for i in range(len(items))]))
    kept.decoded._memory.zero_()  # it is what is read
    assert kept[0]["img"].max() == 0


def test_a_training_run_keeps_its_images(data_root, rn_file, tmp_path, monkeypatch):
    built = []
    original = train.build_trainer
    monkeypatch.setattr(train, "build_trainer", lambda cfg: built.append(original(cfg)) or built[-1])
    states = []
    for name, limit in (("kept", 1.0), ("not", 0.0)):
        argv = arguments("LoGoPrompt", data_root, rn_file, tmp_path / name, "TRAIN.DECODED_GB", limit)
        assert train.main(argv) == 0
        assert (built[-1].train_loader_x.dataset.decoded is not None) == (limit > 0)
        assert isinstance(built[-1].train_loader_x.dataset, ImageDataset)
        path = tmp_path / name / "prompt_learner" / "model.pth.tar-2"
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    sys.stdout.flush()
    assert "% of it waiting for images" in (tmp_path / "not" / "log.txt").read_text()  # of the last logger


def test_too_little_shared_memory_is_said_and_put_up_with(data_root, monkeypatch, capsys):
    """Containers have 64 MB of it; without workers none is taken."""

    def fail(self):
        raise RuntimeError("unable to allocate shared memory(shm)\nfor file </torch_1>")

    items = [Datum(str(path), 0, 0, "x") for path in sorted(data_root.rglob("image_0000.jpg"))]
    data = ImageDataset(get_cfg_default(), items, transform=T.ToTensor(), is_train=True)
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    data.decode(2**30)
    assert data.decoded is None and data[0]["img"].shape[0] == 3
    assert len(capsys.readouterr().out.splitlines()) == 1
    data.decode(2**30, shared=False)
    assert data.decoded is not None
