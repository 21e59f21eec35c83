import io
import random
import re
import sys

import numpy as np
import pytest
import torch
from dassl.utils import (
    AverageMeter,
    Logger,
    MetricMeter,
    Registry,
    check_availability,
    check_isfile,
    collect_env_info,
    count_num_param,
    get_most_similar_str_to_a_from_b,
    listdir_nohidden,
    load_checkpoint,
    load_pretrained_weights,
    logger,
    meters,
    mkdir_if_missing,
    open_all_layers,
    open_specified_layers,
    read_image,
    read_json,
    registry,
    resume_from_checkpoint,
    save_checkpoint,
    set_random_seed,
    setup_logger,
    tolist_if_not,
    tools,
    torchtools,
    write_json,
)
from PIL import Image
from torch import nn


def test_submodules_hold_the_same_objects():
    assert (logger.Logger, meters.MetricMeter, registry.Registry) == (Logger, MetricMeter, Registry)
    assert (tools.read_json, torchtools.save_checkpoint) == (read_json, save_checkpoint)


def test_registry():
    table = Registry("THING")

    @table.register()
    class First:
        pass

    def second():
        pass

    table.register(second)
    assert table.get("First") is First and table.get("second") is second
    assert table.registered_names() == ["First", "second"]
    with pytest.raises(KeyError):
        table.register(second)
    table.register(second, force=True)
    with pytest.raises(KeyError):
        table.get("third")


def test_names():
    assert get_most_similar_str_to_a_from_b("OxfordPet", ["Caltech101", "OxfordPets", "DTD"]) == "OxfordPets"
    check_availability("a", ["a", "b"])
    with pytest.raises(ValueError, match=r"do you mean \[OxfordPets\]"):
        check_availability("OxfordPet", ["Caltech101", "OxfordPets"])
    assert tolist_if_not("a") == ["a"] and tolist_if_not(["a"]) == ["a"] and tolist_if_not((1,)) == [(1,)]


def test_average_meter():
    meter = AverageMeter()
    for value, n in ((1.0, 1), (torch.tensor(4.0), 3)):
        meter.update(value, n)
    assert (meter.val, meter.sum, meter.count, meter.avg) == (4.0, 13.0, 4, 3.25)
    meter.reset()
    assert (meter.val, meter.sum, meter.count, meter.avg) == (0, 0, 0, 0)

    moving = AverageMeter(ema=True)
    for value in (10.0, 20.0):
        moving.update(value)
    assert moving.avg == pytest.approx(0.9 * 1.0 + 0.1 * 20.0)


def test_metric_meter():
    meter = MetricMeter()
    meter.update({"loss": torch.tensor(2.0), "acc": 50})
    meter.update(None)
    meter.update({"loss": 1.0, "acc": 100})
    assert str(meter) == "loss 1.0000 (1.5000) acc 100.0000 (75.0000)"
    assert str(MetricMeter(", ")) == ""
    with pytest.raises(TypeError):
        meter.update([1.0])


def test_files(tmp_path):
    folder = tmp_path / "a" / "b"
    mkdir_if_missing(str(folder))
    mkdir_if_missing(str(folder))
    assert folder.is_dir()

    path = folder / "new" / "x.json"
    write_json({"k": [1, {"ü": None}]}, str(path))
    assert read_json(str(path)) == {"k": [1, {"ü": None}]}
    assert path.read_text().splitlines()[1] == '    "k": ['

    assert check_isfile(str(path))
    with pytest.warns(UserWarning, match="nothing.txt"):
        assert not check_isfile(str(folder / "nothing.txt"))

    for name in ("c", ".hidden", "a", "b"):
        (path.parent / name).touch()
    assert listdir_nohidden(str(path.parent), sort=True) == ["a", "b", "c", "x.json"]
    assert sorted(listdir_nohidden(str(path.parent))) == ["a", "b", "c", "x.json"]


def test_set_random_seed_fixes_all_three():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    set_random_seed(3)
    first = draw()
    assert draw() != first
    set_random_seed(3)
    assert draw() == first


def test_read_image_gives_rgb(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    image = read_image(str(tmp_path / "grey.png"))
    assert (image.mode, image.size, image.getpixel((2, 1))) == ("RGB", (3, 2), (7, 7, 7))


def test_env_info(monkeypatch):
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "torch's lines")
    collect_env_info.cache_clear()
    first, last = collect_env_info().splitlines()
    collect_env_info.cache_clear()
    assert first == "torch's lines" and re.fullmatch(r"\s+Pillow \([\w.]+\)", last)


def fake_console(monkeypatch):
    """Put a stream in the place of the standard output; monkeypatch puts the old one back."""
    # called in the test's body: pytest changes sys.stdout after the fixtures have run
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_logger_writes_to_both(tmp_path, monkeypatch):
    console = fake_console(monkeypatch)
    setup_logger(str(tmp_path / "out"))
    print("first line")
    sys.stdout.flush()
    assert console.getvalue() == "first line\n"
    assert (tmp_path / "out" / "log.txt").read_text() == "first line\n"


def test_logger_leaves_an_old_log_alone(tmp_path, monkeypatch):
    fake_console(monkeypatch)
    (tmp_path / "log.txt").write_text("old")
    setup_logger(str(tmp_path))
    print("new")
    sys.stdout.flush()
    assert (tmp_path / "log.txt").read_text() == "old"
    (other,) = [path for path in tmp_path.iterdir() if path.name != "log.txt"]
    assert re.fullmatch(r"log\.txt-\d{4}(-\d\d){5}", other.name) and other.read_text() == "new\n"


def test_logger_with_a_file_name_or_without_any(tmp_path, monkeypatch):
    console = fake_console(monkeypatch)
    setup_logger(None)
    assert sys.stdout is console
    setup_logger(str(tmp_path / "train.log"))
    print("x")
    sys.stdout.flush()
    assert (tmp_path / "train.log").read_text() == "x\n"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.head = nn.Linear(2, 4)


def test_checkpoint_round_trip(tmp_path, capsys):
    torch.manual_seed(0)
    model = Net()
    optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.head(model.body(torch.ones(1, 3))).sum().backward()
    sched = torch.optim.lr_scheduler.StepLR(optim, 2)
    optim.step()
    sched.step()
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    state = {"state_dict": wrapped, "epoch": 7, "optimizer": optim.state_dict(), "scheduler": sched.state_dict()}
    save_checkpoint(state, str(tmp_path / "net"), is_best=True)

    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == [
        "checkpoint",
        "model-best.pth.tar",
        "model.pth.tar-7",
    ]
    assert (tmp_path / "net" / "checkpoint").read_text() == "model.pth.tar-7\n"
    assert f"Checkpoint saved to {tmp_path}/net/model.pth.tar-7\n" in capsys.readouterr().out
    assert list(load_checkpoint(str(tmp_path / "net" / "model-best.pth.tar"))["state_dict"]) == list(model.state_dict())

    torch.manual_seed(1)
    other = Net()
    optim2 = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    sched2 = torch.optim.lr_scheduler.StepLR(optim2, 2)
    assert resume_from_checkpoint(str(tmp_path / "net"), other, optim2, sched2) == 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    momentum = [optim.state[p]["momentum_buffer"] for p in model.parameters()]
    momentum2 = [optim2.state[p]["momentum_buffer"] for p in other.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, momentum2))
    assert (optim2.param_groups[0]["lr"], sched2.last_epoch) == (0.1, 1)
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f'Loading checkpoint from "{tmp_path}/net/model.pth.tar-7"',
        "Loaded model weights",
        "Loaded optimizer",
        "Loaded scheduler",
        "Previous epoch: 7",
    ]


def test_checkpoint_under_another_name(tmp_path):
    save_checkpoint({"state_dict": {"module.a": torch.ones(1)}, "epoch": 2}, str(tmp_path), False, False, "best")
    assert list(load_checkpoint(str(tmp_path / "best"))["state_dict"]) == ["module.a"]
    assert (tmp_path / "checkpoint").read_text() == "best\n"


def test_load_checkpoint_without_a_file(tmp_path):
    with pytest.raises(ValueError):
        load_checkpoint(None)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_checkpoint(str(tmp_path / "nothing"))


def test_open_layers():
    model = Net().eval()
    open_specified_layers(model, "head")
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert (model.body.training, model.head.training) == (False, True)
    open_specified_layers(nn.DataParallel(model), ["body"])
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    open_all_layers(model)
    assert all(p.requires_grad for p in model.parameters()) and model.body.training and model.head.training
    with pytest.raises((AttributeError, AssertionError)):
        open_specified_layers(model, ["tail"])


def test_count_num_param():
    model = Net()
    assert count_num_param(model) == 3 * 2 + 2 + 2 * 4 + 4
    assert count_num_param(params=model.head.parameters()) == 12
    assert count_num_param(params=[{"params": model.head.weight}, {"params": model.body.bias}]) == 10
    with pytest.raises(ValueError):
        count_num_param()


def test_load_pretrained_weights(tmp_path, capsys):
    model = Net()
    kept = model.head.weight.clone()
    weights = {"module.body.weight": torch.full((2, 3), 5.0), "head.weight": torch.zeros(9, 2), "tail": torch.zeros(1)}
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    load_pretrained_weights(model, str(tmp_path / "w.pth"))
    assert torch.equal(model.body.weight, weights["module.body.weight"]) and torch.equal(model.head.weight, kept)
    assert "['head.weight', 'tail']" in capsys.readouterr().out

    torch.save({"tail": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="Cannot load"):
        load_pretrained_weights(model, str(tmp_path / "w.pth"))
