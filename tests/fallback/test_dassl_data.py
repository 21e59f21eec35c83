import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dassl.data import DataManager, DatasetWrapper
from dassl.data.data_manager import build_data_loader
from dassl.data.datasets import DatasetBase, Datum
from dassl.data.samplers import build_sampler
from dassl_toy import COUNTS, read_split, toy_cfg
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


def items(labels):
    return [SimpleNamespace(label=label, classname=f"c{label}", number=n) for n, label in enumerate(labels)]


def test_dataset_properties():
    train, val = items([3, 0, 3, 1]), items([0])
    dataset = DatasetBase(train_x=train, val=val, test=train[:2])
    assert (dataset.train_x, dataset.train_u, dataset.val, dataset.test) == (train, None, val, train[:2])
    assert dataset.num_classes == 4
    assert dataset.lab2cname == {0: "c0", 1: "c1", 3: "c3"} and dataset.classnames == ["c0", "c1", "c3"]
    with pytest.raises(ValueError, match="train_x"):
        DatasetBase(train_x=[], test=train)


def test_datum_is_read_only_and_does_not_check_its_file(monkeypatch):
    def fail(*args):
        raise AssertionError("the file was checked")

    monkeypatch.setattr("os.stat", fail)
    datum = Datum("/nowhere/x.jpg", 3, 1, "cat")
    assert (datum.impath, datum.label, datum.domain, datum.classname) == ("/nowhere/x.jpg", 3, 1, "cat")
    with pytest.raises(AttributeError):
        datum.label = 4


def naive_fewshot(labels, shots, repeat):
    drawn = []
    for label in dict.fromkeys(labels):
        members = [n for n, own in enumerate(labels) if own == label]
        if len(members) >= shots:
            drawn += random.sample(members, shots)
        else:
            drawn += random.choices(members, k=shots) if repeat else members
    return drawn


@pytest.mark.parametrize("shots,repeat", [(1, False), (3, False), (3, True), (4, True), (9, True)])
def test_fewshot_draws(shots, repeat, capsys):
    data = items([2, 0, 0, 2, 1, 2, 0, 2, 0, 2])
    dataset = DatasetBase(train_x=data)
    random.seed(7)
    expected = [naive_fewshot([item.label for item in part], shots, repeat) for part in (data, data[:5])]
    after = random.random()
    random.seed(7)
    drawn = dataset.generate_fewshot_dataset(data, data[:5], num_shots=shots, repeat=repeat)
    assert [[item.number for item in part] for part in drawn] == expected and random.random() == after
    assert capsys.readouterr().out == f"Creating a {shots}-shot dataset\n"
    assert dataset.generate_fewshot_dataset(data) is data


def test_samplers():
    data = items([4] * 5 + [9] * 2 + [2] * 8)
    members = {4: [0, 1, 2, 3, 4], 9: [5, 6], 2: [7, 8, 9, 10, 11, 12, 13, 14]}

    def naive_epoch():
        chunks = {}
        for label, own in members.items():
            own = list(own) if len(own) >= 3 else [int(i) for i in np.random.choice(own, size=3, replace=True)]
            random.shuffle(own)
            chunks[label] = [own[at : at + 3] for at in range(0, len(own), 3) if len(own[at : at + 3]) == 3]
        left, epoch = [4, 9, 2], []
        while len(left) >= 2:
            for label in random.sample(left, 2):
                epoch.extend(chunks[label].pop(0))
                left = [other for other in left if chunks[other]]
        return epoch

    def fix_seeds():
        random.seed(1)
        np.random.seed(1)

    fix_seeds()
    sampler = build_sampler("RandomClassSampler", None, data, batch_size=6, n_ins=3)
    result = len(sampler), list(sampler), list(sampler)
    fix_seeds()
    assert result == (len(naive_epoch()), naive_epoch(), naive_epoch())
    with pytest.raises(ValueError, match="N_INS"):
        build_sampler("RandomClassSampler", None, data, batch_size=2, n_ins=3)

    assert list(build_sampler("SequentialSampler", None, data)) == list(range(15))
    sampler = build_sampler("RandomSampler", None, data)
    assert sorted(sampler) == list(range(15)) and list(sampler) != list(sampler)
    with pytest.raises(ValueError, match="RandomClassSampler"):
        build_sampler("Shuffled", None, data)


@pytest.mark.parametrize("size,batches", [(4, [4]), (5, [5]), (6, [5]), (10, [5, 5]), (14, [5, 5])])
def test_train_loader_drops_an_incomplete_batch_unless_it_is_the_only_one(tmp_path, size, batches):
    cfg = toy_cfg(tmp_path)
    data = (read_split(cfg.DATASET.ROOT, "train") * 2)[:size]
    loader = build_data_loader(cfg, data_source=data, batch_size=5, tfm=pil_to_tensor, is_train=True)
    assert [len(batch["label"]) for batch in loader] == batches
    loader = build_data_loader(cfg, data_source=data, batch_size=5, tfm=pil_to_tensor, is_train=False)
    assert sum(len(batch["label"]) for batch in loader) == size


def test_loader_without_a_batch_is_refused(tmp_path):
    cfg = toy_cfg(tmp_path)
    data = read_split(cfg.DATASET.ROOT, "train")[:7]  # labels 0, 0, 0, 0, 1, 1, 1
    with pytest.raises(ValueError, match="^the 7 images of the train_x split make no batch of 9 with RandomClassSamp"):
        build_data_loader(cfg, "RandomClassSampler", data, batch_size=9, n_ins=3, split="train_x")
    for name in os.listdir(tmp_path / "images" / "test"):
        os.remove(tmp_path / "images" / "test" / name)
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
    assert batches[0]["img"].shape == (4, 3, 8, 8) and batches[-1]["img"].shape == (1, 3, 8, 8)

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
    out = capsys.readouterr().out
    assert "* Using custom transform for training\n* Using custom transform for testing\n" in out
    train, test = next(iter(manager.train_loader_x)), next(iter(manager.test_loader))
    assert train["img"].dtype == torch.uint8 and train["train"].all()
    assert test["img"].tolist() == [-1] * 4 and not test["train"].any()


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
