import random

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from dassl.config import get_cfg_default
from dassl.data import DataManager, DatasetWrapper
from dassl.data.data_manager import build_data_loader
from dassl.data.datasets import DatasetBase, Datum
from dassl.data.samplers import build_sampler
from dassl.data.transforms import AVAI_CHOICES, build_transform
from dassl_toy import COUNTS, read_split, toy_cfg
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


def items(labels):
    return [Datum(f"{number}.jpg", label, 0, f"c{label}") for number, label in enumerate(labels)]


def test_datum_and_dataset():
    train, val = items([3, 0, 3, 1]), items([0])
    dataset = DatasetBase(train_x=train, val=val, test=train[:2])
    assert (dataset.train_x, dataset.train_u, dataset.val, dataset.test) == (train, None, val, train[:2])
    assert dataset.num_classes == 4
    assert dataset.lab2cname == {0: "c0", 1: "c1", 3: "c3"} and dataset.classnames == ["c0", "c1", "c3"]
    with pytest.raises(ValueError, match="train_x"):
        DatasetBase(train_x=[], test=train)
    datum = Datum("/nowhere/x.jpg", 3, 1, "cat")  # the file is not checked
    assert (datum.impath, datum.label, datum.domain, datum.classname) == ("/nowhere/x.jpg", 3, 1, "cat")
    with pytest.raises(AttributeError):
        datum.label = 4


@pytest.mark.parametrize("shots,repeat", [(1, False), (3, False), (3, True), (4, True), (9, True)])
def test_fewshot_draws(shots, repeat, capsys):
    data = items([2, 0, 0, 2, 1, 2, 0, 2, 0, 2])
    random.seed(7)
    expected = [[], []]
    for drawn, part in zip(expected, (data, data[:5])):
        for label in (2, 0, 1):  # in order of first appearance
            members = [item for item in part if item.label == label]
            if len(members) >= shots:
                drawn += random.sample(members, shots)
            else:
                drawn += random.choices(members, k=shots) if repeat else members
    after = random.random()
    random.seed(7)
    dataset = DatasetBase(train_x=data)
    assert dataset.generate_fewshot_dataset(data, data[:5], num_shots=shots, repeat=repeat) == expected
    assert random.random() == after and capsys.readouterr().out == f"Creating a {shots}-shot dataset\n"
    assert dataset.generate_fewshot_dataset(data) is data


def test_samplers():
    data = items([4] * 5 + [9] * 2 + [2] * 8)
    assert list(build_sampler("SequentialSampler", None, data)) == list(range(15))
    sampler = build_sampler("RandomSampler", None, data)
    assert sorted(sampler) == list(range(15)) and list(sampler) != list(sampler)
    with pytest.raises(ValueError, match="RandomClassSampler: choose one of RandomSampler"):
        build_sampler("RandomClassSampler", None, data)


@pytest.mark.parametrize("size,batches", [(4, [4]), (5, [5]), (6, [5]), (10, [5, 5]), (14, [5, 5])])
def test_train_loader_drops_an_incomplete_batch_unless_it_is_the_only_one(tmp_path, size, batches):
    cfg = toy_cfg(tmp_path)
    data = (read_split(cfg.DATASET.ROOT, "train") * 2)[:size]
    for is_train, total in ((True, sum(batches)), (False, size)):
        loader = build_data_loader(cfg, data_source=data, batch_size=5, tfm=pil_to_tensor, is_train=is_train)
        assert sum(len(batch["label"]) for batch in loader) == total


def test_loader_without_a_batch_is_refused(tmp_path):
    cfg = toy_cfg(tmp_path)
    for path in (tmp_path / "images" / "test").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="^the 0 images of the test split"):
        DataManager(cfg)


def test_data_manager(tmp_path, capsys):
    manager = DataManager(toy_cfg(tmp_path))
    table = "---------  ---------\nDataset    ToyImages\n# classes  3\n# train_x  12\n# val      6\n# test     9\n"
    assert table + table[:21] in capsys.readouterr().out
    assert (manager.num_classes, manager.num_source_domains, manager.train_loader_u) == (3, 0, None)
    assert manager.lab2cname == {0: "red", 1: "green", 2: "blue"}
    assert [len(manager.train_loader_x), len(manager.val_loader), len(manager.test_loader)] == [2, 2, 3]
    batches = list(manager.test_loader)
    assert torch.cat([batch["label"] for batch in batches]).tolist() == sorted([0, 1, 2] * COUNTS["test"])
    assert batches[-1]["img"].shape == (1, 3, 8, 8)
    assert DataManager(toy_cfg(tmp_path, "DATASET.VAL_PERCENT", 0.0)).val_loader is None


def test_image_order_does_not_depend_on_workers(tmp_path):
    orders = []
    for workers in (0, 1):
        cfg = toy_cfg(tmp_path, "DATALOADER.TRAIN_X.SAMPLER", "RandomSampler", "DATALOADER.NUM_WORKERS", workers)
        loader = DataManager(cfg).train_loader_x
        assert loader.persistent_workers == bool(workers)
        torch.manual_seed(0)
        orders.append([[batch["index"].tolist() for batch in loader] for _ in range(3)])
    assert orders[0] == orders[1] and orders[0][0] != orders[0][1]


def test_custom_transforms_and_wrapper(tmp_path, capsys):
    class Marked(DatasetWrapper):
        def __getitem__(self, idx):
            return {**super().__getitem__(idx), "train": self.is_train}

    manager = DataManager(toy_cfg(tmp_path), pil_to_tensor, lambda image: -1, Marked)
    assert "* Using custom transform for training\n* Using custom transform for testing\n" in capsys.readouterr().out
    train, test = next(iter(manager.train_loader_x)), next(iter(manager.test_loader))
    assert train["img"].dtype == torch.uint8 and train["train"].all() and not test["train"].any()
    assert test["img"].tolist() == [-1] * 4


def test_wrapper_items(tmp_path):
    cfg = toy_cfg(tmp_path)
    data = read_split(cfg.DATASET.ROOT, "train")
    item = DatasetWrapper(cfg, data, transform=[pil_to_tensor, lambda image: image.size])[5]
    assert torch.equal(item.pop("img"), pil_to_tensor(Image.open(data[5].impath))) and item.pop("img2") == (8, 8)
    assert item == {"label": 1, "domain": 0, "impath": data[5].impath, "index": 5}
    plain = DatasetWrapper(cfg, data)
    assert len(plain) == 12 and plain[5]["img"].mode == "RGB"
    for option in (("DATALOADER.K_TRANSFORMS", 2), ("DATALOADER.RETURN_IMG0", True)):
        with pytest.raises(ValueError, match="need Dassl"):
            DatasetWrapper(toy_cfg(tmp_path, *option), data, pil_to_tensor, is_train=True)


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
SIZE, BICUBIC = (24, 32), T.InterpolationMode.BICUBIC
NORMALIZE = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def config(*choices):
    cfg = get_cfg_default()
    cfg.INPUT.SIZE, cfg.INPUT.INTERPOLATION, cfg.INPUT.TRANSFORMS = SIZE, "bicubic", choices
    return cfg


def seeded(function):
    """Several results of a transform with fixed seeds."""
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    return torch.stack([function(IMAGE) for _ in range(8)])


CROP = T.RandomResizedCrop(SIZE, scale=(0.08, 1.0), interpolation=BICUBIC)
COLOUR = [T.ColorJitter(0.4, 0.4, 0.4, 0.1), T.RandomGrayscale(0.2), T.RandomApply([T.GaussianBlur(21)], p=0.5)]
BY_HAND = {  # chosen, not in the order of application: transforms of plain torchvision
    ("normalize", "random_flip", "random_resized_crop"): [CROP, T.RandomHorizontalFlip(), T.ToTensor(), NORMALIZE],
    ("random_crop",): [T.RandomCrop(SIZE, padding=4), T.ToTensor()],
    ("gaussian_blur", "randomgrayscale", "colorjitter"): [T.Resize(SIZE, BICUBIC), *COLOUR, T.ToTensor()],
}


@pytest.mark.parametrize("choices", BY_HAND)
def test_training_transform_equals_torchvision(choices):
    assert torch.equal(seeded(build_transform(config(*choices))), seeded(T.Compose(BY_HAND[choices])))


def test_test_transform_has_no_augmentation():
    augmented = [choice for choice in AVAI_CHOICES if choice != "normalize"]
    by_hand = T.Compose([T.Resize(32, BICUBIC), T.CenterCrop(SIZE), T.ToTensor()])
    assert torch.equal(seeded(build_transform(config(*augmented), is_train=False)), seeded(by_hand))
    tfm = build_transform(config(*AVAI_CHOICES), is_train=False)
    assert torch.equal(tfm(IMAGE), NORMALIZE(by_hand(IMAGE)))


def test_log_lines(capsys):
    build_transform(config("random_flip", "random_resized_crop", "normalize"))
    build_transform(config("normalize"), choices=["randomgrayscale"])
    to_tensor = "+ to torch tensor of range [0, 1]"
    crop, flip = "+ random resized crop (size=(24, 32), scale=(0.08, 1.0))", "+ random flip"
    normalize = "+ normalization (mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])"
    grey = ["Building transform_train", "+ resize to 24x32", "+ random gray scale", to_tensor]
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Building transform_train", crop, flip, to_tensor, normalize, *grey]
    build_transform(config("randomgrayscale"), is_train=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Building transform_test", "+ resize the smaller edge to 32", "+ 24x32 center crop", to_tensor]


def test_no_transform_and_unknown_names(capsys):
    cfg = config("normalize")
    cfg.INPUT.NO_TRANSFORM = True
    assert build_transform(cfg) is None and capsys.readouterr().out == "Note: no transform is applied!\n"
    with pytest.raises(ValueError, match=r"^\[randaugment\] is not one of"):
        build_transform(config("randaugment"))
