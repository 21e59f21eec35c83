import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dassl.data import DataManager, DatasetWrapper
from dassl.data.data_manager import build_data_loader
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, build_dataset
from dassl.data.samplers import build_sampler
from dassl_toy import COUNTS, ToyImages, read_split, toy_cfg
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


def items(labels, domains=None):
    domains = domains or [0] * len(labels)
    return [
        SimpleNamespace(label=label, domain=domain, classname=f"c{label}", number=number)
        for number, (label, domain) in enumerate(zip(labels, domains))
    ]


def numbers(drawn):
    return [item.number for item in drawn]


LABELS = [2, 0, 0, 2, 1, 2, 0, 2, 0, 2]  # first appearance: 2, 0, 1; five of 2, four of 0, one of 1


def test_dataset_properties():
    train, val = items([3, 0, 3, 1]), items([0])
    dataset = DatasetBase(train_x=train, val=val, test=train[:2])
    assert (dataset.train_x, dataset.train_u, dataset.val, dataset.test) == (train, None, val, train[:2])
    assert dataset.num_classes == 4
    assert dataset.lab2cname == {0: "c0", 1: "c1", 3: "c3"}
    assert dataset.classnames == ["c0", "c1", "c3"]


def test_registered_dataset(tmp_path):
    assert isinstance(build_dataset(toy_cfg(tmp_path)), ToyImages)
    assert "ToyImages" in DATASET_REGISTRY.registered_names()
    with pytest.raises(ValueError, match="ToyImages"):
        build_dataset(toy_cfg(tmp_path, "DATASET.NAME", "ToyImage"))


@pytest.mark.parametrize("shots,repeat", [(1, False), (3, False), (3, True), (4, True), (9, True)])
def test_fewshot_draws(shots, repeat):
    data = items(LABELS)
    dataset = DatasetBase(train_x=data)
    of_class = {label: [n for n, own in enumerate(LABELS) if own == label] for label in (2, 0, 1)}

    random.seed(7)
    expected = []
    for members in of_class.values():
        if len(members) >= shots:
            expected += random.sample(members, shots)
        else:
            expected += random.choices(members, k=shots) if repeat else members
    after = random.random()

    random.seed(7)
    assert numbers(dataset.generate_fewshot_dataset(data, num_shots=shots, repeat=repeat)) == expected
    assert random.random() == after


def test_fewshot_of_several_lists(capsys):
    data = items(LABELS)
    dataset = DatasetBase(train_x=data)
    assert dataset.generate_fewshot_dataset(data) is data
    train, val = dataset.generate_fewshot_dataset(data, data[:5])
    assert train is data and numbers(val) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out == ""

    random.seed(0)
    expected = [random.sample([0, 3, 5, 7, 9], 2), random.sample([1, 2, 6, 8], 2), [4]]
    expected_val = [random.sample([0, 3], 2), random.sample([1, 2], 2), [4]]
    random.seed(0)
    train, val = dataset.generate_fewshot_dataset(data, data[:5], num_shots=2)
    assert numbers(train) == sum(expected, []) and numbers(val) == sum(expected_val, [])
    assert capsys.readouterr().out == "Creating a 2-shot dataset\n"


def test_splits():
    data = items([1, 0, 1], [5, 6, 6])
    dataset = DatasetBase(train_x=data)
    assert {k: numbers(v) for k, v in dataset.split_dataset_by_label(data).items()} == {1: [0, 2], 0: [1]}
    assert {k: numbers(v) for k, v in dataset.split_dataset_by_domain(data).items()} == {5: [0], 6: [1, 2]}


def test_domains():
    class Domains(DatasetBase):
        domains = ["art", "photo"]

    dataset = Domains(train_x=items([0]))
    dataset.check_input_domains(["art"], ["photo"])
    with pytest.raises(ValueError):
        dataset.is_input_domain_valid(["art", "sketch"])
    with pytest.raises((ValueError, AssertionError)):
        dataset.check_input_domains([], ["art"])


def epoch_of(name, data, **settings):
    """Length and two epochs of a sampler made and used with fixed seeds."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    sampler = build_sampler(name, None, data, **settings)
    return len(sampler), [int(i) for i in sampler], [int(i) for i in sampler]


def test_plain_samplers():
    data = items(LABELS)
    assert epoch_of("SequentialSampler", data) == (10, list(range(10)), list(range(10)))
    length, first, second = epoch_of("RandomSampler", data)
    assert length == 10 and sorted(first) == list(range(10)) and first != second
    with pytest.raises(ValueError):
        build_sampler("Shuffled", None, data)


DOMAINS = [0, 1, 2] * 7 + [1, 1]


def naive_domain_epoch(choose, share):
    left = {domain: [i for i, own in enumerate(DOMAINS) if own == domain] for domain in (0, 1, 2)}
    epoch = []
    while min(map(len, left.values())) >= share:
        for domain in choose():
            for index in random.sample(left[domain], share):
                epoch.append(index)
                left[domain].remove(index)
    return epoch


@pytest.mark.parametrize(
    "name,n_domain,choose",
    [
        ("RandomDomainSampler", 2, lambda: random.sample([0, 1, 2], 2)),
        ("RandomDomainSampler", 0, lambda: random.sample([0, 1, 2], 3)),
        ("SeqDomainSampler", 0, lambda: [0, 1, 2]),
    ],
)
def test_domain_samplers(name, n_domain, choose):
    result = epoch_of(name, items([0] * len(DOMAINS), DOMAINS), batch_size=6, n_domain=n_domain)
    share = 6 // (n_domain or 3)
    random.seed(1)
    # the first epoch is drawn in the constructor, for the length
    length = len(naive_domain_epoch(choose, share))
    assert result == (length, naive_domain_epoch(choose, share), naive_domain_epoch(choose, share))
    with pytest.raises((ValueError, AssertionError)):
        build_sampler(name, None, items([0] * 23, DOMAINS), batch_size=7, n_domain=n_domain)


def test_class_sampler():
    labels = [0] * 7 + [1] * 4 + [2] * 1 + [3] * 5
    data = items(labels)
    length, first, second = epoch_of("RandomClassSampler", data, batch_size=4, n_ins=2)
    assert first != second
    for epoch in (first, second):
        assert len(epoch) % 4 == 0
        for at in range(0, len(epoch), 4):
            one, two, three, four = (labels[i] for i in epoch[at : at + 4])
            assert one == two != three == four
        unrepeated = [i for i in epoch if labels[i] != 2]
        assert max(Counter(unrepeated).values()) == 1
    # 3, 2, 1 and 2 pairs: an epoch ends when fewer than two classes have any left
    assert length in (12, 16)
    for settings in ({"batch_size": 2, "n_ins": 3}, {"batch_size": 10, "n_ins": 2}):
        with pytest.raises((ValueError, AssertionError)):
            build_sampler("RandomClassSampler", None, data, **settings)


def test_class_sampler_draws():
    labels = [4] * 5 + [9] * 2
    members = {4: [0, 1, 2, 3, 4], 9: [5, 6]}

    def naive_epoch():
        chunks = {}
        for label, own in members.items():
            own = list(own) if len(own) >= 3 else [int(i) for i in np.random.choice(own, size=3, replace=True)]
            random.shuffle(own)
            chunks[label] = own[:3]
        return sum((chunks[label] for label in random.sample([4, 9], 2)), [])

    result = epoch_of("RandomClassSampler", items(labels), batch_size=6, n_ins=3)
    random.seed(1)
    np.random.seed(1)
    assert result == (len(naive_epoch()), naive_epoch(), naive_epoch())


@pytest.mark.parametrize("size,batches", [(4, [4]), (5, [5]), (6, [5]), (10, [5, 5]), (14, [5, 5])])
def test_train_loader_drops_an_incomplete_batch_unless_it_is_the_only_one(tmp_path, size, batches):
    cfg = toy_cfg(tmp_path)
    data = (read_split(cfg.DATASET.ROOT, "train") * 2)[:size]
    loader = build_data_loader(cfg, data_source=data, batch_size=5, tfm=pil_to_tensor, is_train=True)
    assert [len(batch["label"]) for batch in loader] == batches
    loader = build_data_loader(cfg, data_source=data, batch_size=5, tfm=pil_to_tensor, is_train=False)
    assert sum(len(batch["label"]) for batch in loader) == size


def test_data_manager(tmp_path, capsys):
    manager = DataManager(toy_cfg(tmp_path))
    out = capsys.readouterr().out
    assert "# train_x  12\n# val      6\n# test     9\n" in out and "Dataset    ToyImages\n# classes  3\n" in out
    assert (manager.num_classes, manager.num_source_domains) == (3, 0)
    assert manager.lab2cname == {0: "red", 1: "green", 2: "blue"}
    assert manager.train_loader_u is None
    assert [len(manager.train_loader_x), len(manager.val_loader), len(manager.test_loader)] == [2, 2, 3]
    batches = list(manager.test_loader)
    labels = torch.cat([batch["label"] for batch in batches])
    assert labels.tolist() == sorted([0, 1, 2] * COUNTS["test"])
    assert batches[0]["img"].shape == (4, 3, 8, 8) and batches[-1]["img"].shape == (1, 3, 8, 8)

    capsys.readouterr()
    manager = DataManager(toy_cfg(tmp_path, "DATASET.VAL_PERCENT", 0.0, "VERBOSE", False))
    assert manager.val_loader is None and "train_x" not in capsys.readouterr().out


def test_custom_transforms_and_wrapper(tmp_path, capsys):
    class Marked(DatasetWrapper):
        def __getitem__(self, idx):
            return {**super().__getitem__(idx), "train": self.is_train}

    cfg = toy_cfg(tmp_path)
    manager = DataManager(cfg, lambda image: pil_to_tensor(image), lambda image: -1, Marked)
    out = capsys.readouterr().out
    assert "* Using custom transform for training\n" in out and "* Using custom transform for testing\n" in out
    train, test = next(iter(manager.train_loader_x)), next(iter(manager.test_loader))
    assert train["img"].dtype == torch.uint8 and train["train"].all()
    assert test["img"].tolist() == [-1] * 4 and not test["train"].any()


def test_wrapper_items(tmp_path):
    cfg = toy_cfg(tmp_path, "DATALOADER.K_TRANSFORMS", 2, "DATALOADER.RETURN_IMG0", True)
    data = read_split(cfg.DATASET.ROOT, "train")
    pixels = pil_to_tensor(Image.open(data[5].impath))

    item = DatasetWrapper(cfg, data, transform=pil_to_tensor, is_train=True)[5]
    assert {key: item[key] for key in ("label", "domain", "impath", "index")} == {
        "label": 1,
        "domain": 0,
        "impath": data[5].impath,
        "index": 5,
    }
    assert len(item["img"]) == 2 and all(torch.equal(version, pixels) for version in item["img"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD))
    assert torch.allclose(item["img0"], (pixels / 255.0 - mean) / std, atol=1e-6)

    item = DatasetWrapper(cfg, data, transform=[pil_to_tensor, lambda image: image.size], is_train=False)[5]
    assert torch.equal(item["img"], pixels) and item["img2"] == (8, 8)

    plain = DatasetWrapper(toy_cfg(tmp_path), data)
    assert len(plain) == 12 and plain[5]["img"].mode == "RGB" and "img0" not in plain[5]
    with pytest.raises(ValueError):
        DatasetWrapper(cfg, data, transform=None, is_train=True)
