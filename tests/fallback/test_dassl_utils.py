import random

import numpy as np
import pytest
import torch
from dassl import utils
from PIL import Image
from torch import nn


def net():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))


def test_registry():
    table = utils.Registry("THING")

    @table.register()
    class First:
        pass

    table.register(net)
    assert table.get("First") is First and table.registered_names() == ["First", "net"]
    with pytest.raises(KeyError):
        table.register(net)
    table.register(net, force=True)
    with pytest.raises(ValueError, match=r"do you mean \[OxfordPets\]"):
        utils.check_availability("OxfordPet", ["Caltech101", "OxfordPets"])


def test_meters():
    average = utils.AverageMeter()
    for value, n in ((1.0, 1), (torch.tensor(4.0), 3)):
        average.update(value, n)
    assert (average.val, average.sum, average.count, average.avg) == (4.0, 13.0, 4, 3.25)
    meter = utils.MetricMeter()
    for values in ({"loss": torch.tensor(2.0), "acc": 50}, None, {"loss": 1.0, "acc": 100}):
        meter.update(values)
    assert str(meter) == "loss 1.0000 (1.5000) acc 100.0000 (75.0000)"


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    utils.mkdir_if_missing("")
    utils.mkdir_if_missing("a/b")
    utils.write_json({"k": [1, {"ü": None}]}, "a/b/x.json")
    assert utils.read_json("a/b/x.json") == {"k": [1, {"ü": None}]}
    assert (tmp_path / "a/b/x.json").read_text().splitlines()[1] == '    "k": ['
    assert utils.check_isfile("a/b/x.json")
    with pytest.warns(UserWarning, match="nothing.txt"):
        assert not utils.check_isfile("nothing.txt")
    for name in ("c", ".hidden", "b"):
        (tmp_path / "a/b" / name).touch()
    assert utils.listdir_nohidden("a/b", sort=True) == sorted(utils.listdir_nohidden("a/b")) == ["b", "c", "x.json"]
    Image.new("L", (3, 2), 7).save("grey.png")
    image = utils.read_image("grey.png")
    assert (image.mode, image.size, image.getpixel((2, 1))) == ("RGB", (3, 2), (7, 7, 7))


def test_set_random_seed_fixes_all_generators():
    drawn = []
    for _ in range(2):
        utils.set_random_seed(3)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]


def test_env_info_adds_pillow(monkeypatch):
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "torch's lines")
    assert collect_env_info.__wrapped__().startswith("torch's lines\n        Pillow (")


def test_checkpoint_round_trip(tmp_path, capsys):
    model, other = net(), net()
    optims = [torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9) for m, lr in ((model, 0.1), (other, 0.5))]
    model(torch.ones(1, 3)).sum().backward()
    optims[0].step()
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    state = {"state_dict": wrapped, "epoch": 7, "optimizer": optims[0].state_dict()}
    utils.save_checkpoint(state, str(tmp_path), is_best=True)
    assert utils.listdir_nohidden(str(tmp_path), sort=True) == ["checkpoint", "model-best.pth.tar", "model.pth.tar-7"]
    assert (tmp_path / "checkpoint").read_text() == "model.pth.tar-7\n" and "module.0.bias" in state["state_dict"]
    assert list(utils.load_checkpoint(str(tmp_path / "model-best.pth.tar"))["state_dict"]) == list(model.state_dict())
    capsys.readouterr()
    assert utils.resume_from_checkpoint(str(tmp_path), other, optims[1]) == 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    momenta = [[optim.state[p]["momentum_buffer"] for p in optim.param_groups[0]["params"]] for optim in optims]
    assert all(torch.equal(a, b) for a, b in zip(*momenta)) and optims[1].param_groups[0]["lr"] == 0.1
    lines = ["Loaded model weights", "Loaded optimizer", "Previous epoch: 7"]
    assert capsys.readouterr().out.splitlines()[1:] == lines


def test_load_pretrained_weights(tmp_path, capsys):
    model, path = net(), str(tmp_path / "w.pth")
    assert utils.count_num_param(model) == 20
    assert utils.count_num_param(params=[{"params": model[1].weight}, {"params": [model[0].bias]}]) == 10
    before = model[1].weight.clone()
    weights = {"module.0.weight": torch.full((2, 3), 5.0), "1.weight": torch.zeros(9, 2), "tail": torch.zeros(1)}
    torch.save({"state_dict": weights}, path)
    utils.load_pretrained_weights(model, path)
    assert torch.equal(model[0].weight, weights["module.0.weight"]) and torch.equal(model[1].weight, before)
    assert "['1.weight', 'tail']" in capsys.readouterr().out
    torch.save({"tail": torch.zeros(1)}, path)
    with pytest.warns(UserWarning, match="Cannot load"):
        utils.load_pretrained_weights(model, path)
