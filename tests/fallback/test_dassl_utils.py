import pytest
import torch
from dassl import utils
from dassl.config import get_cfg_default
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
    assert utils.read_image("grey.png").getpixel((2, 1)) == (7, 7, 7)  # RGB


def test_saved_checkpoints(tmp_path):
    state = {"state_dict": {f"module.{key}": value for key, value in net().state_dict().items()}, "epoch": 7}
    utils.save_checkpoint(state, str(tmp_path), is_best=True)
    assert utils.listdir_nohidden(str(tmp_path), sort=True) == ["checkpoint", "model-best.pth.tar", "model.pth.tar-7"]
    assert (tmp_path / "checkpoint").read_text() == "model.pth.tar-7\n" and "module.0.bias" in state["state_dict"]
    best = utils.load_checkpoint(str(tmp_path / "model-best.pth.tar"))
    other = net()
    assert utils.resume_from_checkpoint(str(tmp_path), other) == best["epoch"] == 7
    assert all(torch.equal(value, best["state_dict"][key]) for key, value in other.state_dict().items())


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


def test_each_call_returns_a_copy_of_the_defaults():
    get_cfg_default().INPUT.PIXEL_MEAN.append(1.0)
    get_cfg_default().DATALOADER.TRAIN_X.BATCH_SIZE = 1
    cfg = get_cfg_default()
    assert cfg.INPUT.PIXEL_MEAN == [0.485, 0.456, 0.406] and cfg.DATALOADER.TRAIN_X.BATCH_SIZE == 32
    assert (cfg.OPTIM.NAME, cfg.OPTIM.LR, cfg.OPTIM.WEIGHT_DECAY, cfg.OPTIM.STEPSIZE) == ("adam", 3e-4, 5e-4, (-1,))
    assert (cfg.TEST.FINAL_MODEL, cfg.TRAIN.PRINT_FREQ, cfg.DATASET.NUM_SHOTS, cfg.SEED) == ("last_step", 10, -1, -1)


def test_merges_a_coop_style_file_and_an_old_dump(tmp_path):
    path = tmp_path / "vit.yaml"
    size = 'INPUT:\n  SIZE: (32, 32)\n  TRANSFORMS: ["random_flip", "normalize"]\n  GN_STD: 0.2\n  RANDAUGMENT_N: 3\n'
    path.write_text(f"DATALOADER:\n  TRAIN_X:\n    BATCH_SIZE: 4\n{size}")
    cfg = get_cfg_default()
    cfg.merge_from_file(str(path))
    cfg.merge_from_list(["OPTIM.MAX_EPOCH", "50"])
    assert (cfg.DATALOADER.TRAIN_X.BATCH_SIZE, cfg.INPUT.SIZE, cfg.OPTIM.MAX_EPOCH) == (4, (32, 32), 50)
    assert tuple(cfg.INPUT.TRANSFORMS) == ("random_flip", "normalize")
    path.write_text(cfg.dump())
    again = get_cfg_default()
    again.merge_from_file(str(path))
    assert again == cfg
