import os
import re

import numpy as np
import pytest
import torch
from dassl.utils import load_checkpoint
from dassl_toy import SIDE, ToyTrainer, read_split, toy_cfg
from PIL import Image
from torch import nn

BATCH = ["forward_backward", "model_zero_grad", "detect_anomaly", "model_update"]
EPOCH = ["before_epoch", "run_epoch", "set_model_mode", *BATCH, *BATCH, "update_lr", "after_epoch"]
BUILD = ["check_cfg", "build_data_loader", "build_model"]


class Recorder(ToyTrainer):
    """Records the order in which its methods are called."""

    def __getattribute__(self, name):
        if name in {*BUILD, *EPOCH, "before_train", "save_model", "after_train", "test"}:
            self.__dict__.setdefault("calls", []).append(name)
        return super().__getattribute__(name)


def test_order_of_calls(tmp_path):
    trainer = Recorder(toy_cfg(tmp_path, "OPTIM.MAX_EPOCH", 2, "TRAIN.CHECKPOINT_FREQ", 0))
    trainer.train()
    end = ["save_model", "after_train", "test", "set_model_mode"]
    assert trainer.calls == [*BUILD, "before_train", *EPOCH, *EPOCH, *end]

    best = Recorder(toy_cfg(tmp_path, "OPTIM.MAX_EPOCH", 1, "TEST.FINAL_MODEL", "best_val", "RESUME", "/nowhere"))
    best.train()
    validation = ["test", "set_model_mode", "save_model"]  # before the checkpoint of the epoch
    assert best.calls == [*BUILD, "before_train", *EPOCH, *validation, *end]


def tensors_of(cfg, split):
    """All images and labels of a split, read and normalised by hand."""
    data = read_split(cfg.DATASET.ROOT, split)
    pixels = np.stack([np.asarray(Image.open(item.impath), dtype=np.float32) for item in data]) / 255
    pixels = (pixels - np.float32(cfg.INPUT.PIXEL_MEAN)) / np.float32(cfg.INPUT.PIXEL_STD)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1), torch.tensor([item.label for item in data])


def test_training_by_hand(tmp_path):
    cfg = toy_cfg(tmp_path, "OPTIM.WARMUP_EPOCH", 2)
    trainer = ToyTrainer(cfg)
    trainer.train()

    images, labels = tensors_of(cfg, "train")
    weight, bias = torch.zeros(3, 3 * SIDE * SIDE), torch.zeros(3)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    schedule = [1e-5, 0.01 / 2] + [0.01 * (1 + np.cos(np.pi * epoch / 5)) / 2 for epoch in range(3)]
    for lr in schedule:
        for at in (0, 5):  # 12 images in batches of 5: the last two are left out
            x, y = images[at : at + 5], labels[at : at + 5]
            error = (torch.softmax(x @ weight.T + bias, 1) - nn.functional.one_hot(y, 3)) / 5
            gradients = error.T @ x + 5e-4 * weight, error.sum(0) + 5e-4 * bias
            velocity = [0.9 * v + g for v, g in zip(velocity, gradients)]
            weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    assert torch.allclose(trainer.model.weight, weight, atol=1e-5)
    assert torch.allclose(trainer.model.bias, bias, atol=1e-5)
    assert trainer.lrs == pytest.approx([lr for lr in schedule for _ in range(2)])

    images, labels = tensors_of(cfg, "test")
    accuracy = 100 * ((images @ weight.T + bias).argmax(1) == labels).float().mean().item()
    assert trainer.test() == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "dies_at,other_folder", [(1, False), (2, True), (4, False)]
)  # in, at the end of, after warm-up
def test_resumed_run_equals_an_unbroken_one(tmp_path, dies_at, other_folder, capsys):
    class Killed(ToyTrainer):
        def before_epoch(self):
            if self.epoch == dies_at:
                raise KeyboardInterrupt

    unbroken = ToyTrainer(toy_cfg(tmp_path, "OPTIM.WARMUP_EPOCH", 2, "OUTPUT_DIR", str(tmp_path / "unbroken")))
    unbroken.train()
    cfg = toy_cfg(tmp_path, "OPTIM.WARMUP_EPOCH", 2)
    killed = Killed(cfg)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    if other_folder:
        cfg.RESUME, cfg.OUTPUT_DIR = cfg.OUTPUT_DIR, str(tmp_path / "second")
    resumed = ToyTrainer(cfg)
    resumed.train()
    assert f"Found checkpoint at {tmp_path}/out (will resume training)\n" in capsys.readouterr().out
    assert resumed.start_epoch == dies_at and killed.lrs + resumed.lrs == unbroken.lrs
    assert torch.equal(resumed.model.weight, unbroken.model.weight)
    assert os.path.exists(os.path.join(cfg.OUTPUT_DIR, "linear", "model.pth.tar-5"))


@pytest.mark.parametrize("freq,epochs", [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5])])
def test_checkpoint_frequency(tmp_path, freq, epochs):
    ToyTrainer(toy_cfg(tmp_path, "TRAIN.CHECKPOINT_FREQ", freq)).train()
    names = {f"model.pth.tar-{epoch}" for epoch in epochs} | {"checkpoint"}
    assert set(os.listdir(tmp_path / "out" / "linear")) == names
    checkpoint = load_checkpoint(str(tmp_path / "out" / "linear" / "model.pth.tar-5"))
    assert set(checkpoint) == {"state_dict", "epoch", "optimizer", "scheduler", "val_result"}
    assert (checkpoint["epoch"], checkpoint["val_result"]) == (5, None)


def test_best_val(tmp_path, capsys):
    class Scripted(ToyTrainer):
        def test(self, split=None):
            return (10.0, 30.0, 20.0, 30.0, 5.0)[self.epoch] if split == "val" else super().test(split)

    trainer = Scripted(toy_cfg(tmp_path, "TEST.FINAL_MODEL", "best_val"))
    trainer.train()
    best = str(tmp_path / "out" / "linear" / "model-best.pth.tar")
    weight = load_checkpoint(best)["state_dict"]["weight"]
    assert (load_checkpoint(best)["epoch"], trainer.best_result) == (2, 30.0)  # an equal result does not replace it
    assert torch.equal(trainer.model.weight, weight)
    assert torch.equal(load_checkpoint(best.replace("-best.pth.tar", ".pth.tar-2"))["state_dict"]["weight"], weight)
    out = capsys.readouterr().out
    assert "Deploy the model with the best val performance\n" in out
    assert f"Load {best} to linear (epoch=2, val_result=30.0)\n" in out


def test_evaluated_splits(tmp_path, capsys):
    for options, split, used, total in (
        ((), None, "test", 9),
        ((), "val", "val", 6),
        (("TEST.SPLIT", "val"), None, "val", 6),
        (("DATASET.VAL_PERCENT", 0.0), "val", "test", 9),
    ):
        trainer = ToyTrainer(toy_cfg(tmp_path, *options))
        trainer.test(split)
        assert f"Evaluate on the *{used}* set\n=> result\n* total: {total}\n" in capsys.readouterr().out
        assert not trainer.model.training
    ToyTrainer(toy_cfg(tmp_path, "TEST.NO_TEST", True, "TEST.FINAL_MODEL", "best_val")).train()
    assert "Evaluate" not in capsys.readouterr().out


LINE = re.compile(
    r"epoch \[(\d+)/(\d+)\] batch \[(\d+)/(\d+)\] time \d+\.\d{3} \(\d+\.\d{3}\) data \d+\.\d{3} \(\d+\.\d{3}\) "
    r"loss \d+\.\d{4} \(\d+\.\d{4}\) acc \d+\.\d{4} \(\d+\.\d{4}\) lr (\d\.\d{4}e-\d\d) eta \d+:\d\d:\d\d"
)


@pytest.mark.parametrize("freq,batches", [(1, ["1", "2"]), (2, ["2"]), (10, ["1", "2"])])
def test_log_lines(tmp_path, capsys, freq, batches):
    ToyTrainer(toy_cfg(tmp_path, "TRAIN.PRINT_FREQ", freq, "OPTIM.WARMUP_EPOCH", 2)).train()
    lines = capsys.readouterr().out.splitlines()
    found = [LINE.fullmatch(line).groups() for line in lines if line.startswith("epoch")]
    assert [groups[:4] for groups in found] == [(str(e), "5", b, "2") for e in range(1, 6) for b in batches]
    assert found[0][4] == ("1.0000e-05" if batches[0] == "1" else "5.0000e-03")  # the schedule was stepped
    end = lines[lines.index("Finish training") :]
    assert end[1:3] == ["Deploy the last-epoch model", "Evaluate on the *test* set"]
    assert re.fullmatch(r"Elapsed: \d:\d\d:\d\d", end[-1])


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ToyTrainer(toy_cfg(tmp_path, "TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 3)).train()
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    results = {f"{split}/{kind}" for split in ("val", "test") for kind in ("accuracy", "error_rate", "macro_f1")}
    assert set(events.Tags()["scalars"]) == results | {"train/loss", "train/acc", "train/lr"}
    assert [event.step for event in events.Scalars("train/lr")] == [0, 1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("val/accuracy")] == [0, 1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(tmp_path, value):
    trainer = ToyTrainer(toy_cfg(tmp_path))
    with pytest.raises(FloatingPointError):
        trainer.model_backward_and_update(trainer.model.weight.sum() * value)
    assert not trainer.model.weight.any()


def test_load_model(tmp_path, capsys):
    cfg = toy_cfg(tmp_path)
    trained, fresh = ToyTrainer(cfg), ToyTrainer(cfg)
    nn.init.ones_(trained.model.weight)
    trained.save_model(4, cfg.OUTPUT_DIR, val_result=np.float64(12.34))  # stored as a float: weights_only
    fresh.load_model(cfg.OUTPUT_DIR, epoch=5)
    assert torch.equal(fresh.model.weight, trained.model.weight)
    assert "(epoch=5, val_result=12.3)\n" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="model-best"):
        fresh.load_model(cfg.OUTPUT_DIR)
    fresh.load_model("")
    assert capsys.readouterr().out.startswith("Note that load_model() is skipped as no pretrained model is given")


def test_several_models(tmp_path):
    trainer = ToyTrainer(toy_cfg(tmp_path))
    other = nn.Linear(1, 1, bias=False)
    trainer.register_model("other", other)  # has no optimizer
    assert trainer.get_model_names() == ["linear", "other"] and trainer.get_model_names("other") == ["other"]
    with pytest.raises(ValueError, match="already registered"):
        trainer.register_model("other", other)
    trainer.set_model_mode("eval", "other")
    assert trainer.model.training and not other.training
    trainer.model_backward_and_update(trainer.model.weight.sum() + other.weight.sum(), names=["other"])
    trainer.update_lr("other")
    assert not trainer.model.weight.any() and trainer.get_current_lr() == 0.01
    trainer.model_update()
    assert trainer.model.weight.max().item() == pytest.approx(-0.01)
