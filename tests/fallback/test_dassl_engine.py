import os
import re

import numpy as np
import pytest
import torch
from dassl.engine import SimpleTrainer, TrainerBase, TrainerX, build_trainer
from dassl.utils import load_checkpoint
from dassl_toy import SIDE, ToyTrainer, read_split, toy_cfg
from PIL import Image
from torch import nn


class Recorder(ToyTrainer):
    """Writes down the order in which its methods are called."""

    def __init__(self, cfg):
        self.calls = []
        super().__init__(cfg)


def _recorded(name):
    def method(self, *args, **kwargs):
        self.calls.append(name)
        return getattr(ToyTrainer, name)(self, *args, **kwargs)

    return method


HOOKS = [
    "check_cfg",
    "build_data_loader",
    "build_model",
    "before_train",
    "before_epoch",
    "run_epoch",
    "set_model_mode",
    "forward_backward",
    "model_zero_grad",
    "detect_anomaly",
    "model_update",
    "update_lr",
    "after_epoch",
    "save_model",
    "after_train",
    "test",
]
for _name in HOOKS:
    setattr(Recorder, _name, _recorded(_name))


def test_order_of_calls(tmp_path):
    trainer = Recorder(toy_cfg(tmp_path, "OPTIM.MAX_EPOCH", 2, "TRAIN.CHECKPOINT_FREQ", 0))
    assert trainer.calls == ["check_cfg", "build_data_loader", "build_model"]
    trainer.calls.clear()
    trainer.train()
    batch = ["forward_backward", "model_zero_grad", "detect_anomaly", "model_update"]
    epoch = ["before_epoch", "run_epoch", "set_model_mode", *batch, *batch, "update_lr", "after_epoch"]
    end = ["save_model", "after_train", "test", "set_model_mode"]
    assert trainer.calls == ["before_train", *epoch, *epoch, *end]


def test_validation_comes_before_saving(tmp_path):
    trainer = Recorder(toy_cfg(tmp_path, "OPTIM.MAX_EPOCH", 1, "TEST.FINAL_MODEL", "best_val"))
    trainer.calls.clear()
    trainer.train()
    after = trainer.calls[trainer.calls.index("after_epoch") :]
    assert [call for call in after if call != "set_model_mode"] == [
        "after_epoch",
        "test",
        "save_model",
        "save_model",
        "after_train",
        "test",
    ]


def test_attributes(tmp_path):
    cfg = toy_cfg(tmp_path)
    trainer = build_trainer(cfg)
    assert isinstance(trainer, ToyTrainer) and isinstance(trainer, (TrainerX, SimpleTrainer, TrainerBase))
    assert (trainer.start_epoch, trainer.epoch, trainer.max_epoch, trainer.output_dir) == (0, 0, 5, cfg.OUTPUT_DIR)
    assert (trainer.num_classes, trainer.lab2cname[2], trainer.best_result) == (3, "blue", -np.inf)
    assert trainer.train_loader_x is trainer.dm.train_loader_x and trainer.test_loader is trainer.dm.test_loader
    assert trainer.val_loader is trainer.dm.val_loader and trainer.train_loader_u is None
    assert trainer.cfg is cfg and trainer._writer is None and trainer.device == torch.device("cpu")
    assert list(trainer._models) == list(trainer._optims) == list(trainer._scheds) == ["linear"]
    trainer.train()
    assert (trainer.epoch, trainer.batch_idx, trainer.num_batches) == (4, 1, 2)


def test_unknown_trainer(tmp_path):
    with pytest.raises(ValueError, match=r"do you mean \[ToyTrainer\]"):
        build_trainer(toy_cfg(tmp_path, "TRAINER.NAME", "ToyTrainr"))


def tensors_of(cfg, split):
    """All images and labels of a split, read and normalised by hand."""
    data = read_split(cfg.DATASET.ROOT, split)
    pixels = np.stack([np.asarray(Image.open(item.impath), dtype=np.float32) for item in data]) / 255
    pixels = (pixels - np.float32(cfg.INPUT.PIXEL_MEAN)) / np.float32(cfg.INPUT.PIXEL_STD)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1)
    return images, torch.tensor([item.label for item in data])


def test_training_by_hand(tmp_path):
    cfg = toy_cfg(tmp_path, "OPTIM.WARMUP_EPOCH", 2)
    trainer = ToyTrainer(cfg)
    trainer.train()

    images, labels = tensors_of(cfg, "train")
    weight, bias = torch.zeros(3, 3 * SIDE * SIDE), torch.zeros(3)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    warmup = [1e-5, 0.01 / 2]
    cosine = [0.01 * (1 + np.cos(np.pi * epoch / 5)) / 2 for epoch in range(3)]
    for lr in warmup + cosine:
        for at in (0, 5):  # 12 images in batches of 5: the last two are left out
            x, y = images[at : at + 5], labels[at : at + 5]
            error = (torch.softmax(x @ weight.T + bias, 1) - nn.functional.one_hot(y, 3)) / 5
            gradients = error.T @ x + 5e-4 * weight, error.sum(0) + 5e-4 * bias
            velocity = [0.9 * v + g for v, g in zip(velocity, gradients)]
            weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    assert torch.allclose(trainer.model.weight, weight, atol=1e-5)
    assert torch.allclose(trainer.model.bias, bias, atol=1e-5)
    assert trainer.lrs == pytest.approx([lr for lr in warmup + cosine for _ in range(2)])

    images, labels = tensors_of(cfg, "test")
    accuracy = 100 * ((images @ weight.T + bias).argmax(1) == labels).float().mean().item()
    assert trainer.test() == pytest.approx(accuracy)


class Killed(ToyTrainer):
    """Stops as if killed at the start of epoch ``dies_at``."""

    dies_at = 0

    def before_epoch(self):
        if self.epoch == self.dies_at:
            raise KeyboardInterrupt


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("dies_at", [1, 4])
@pytest.mark.parametrize("other_folder", [False, True])
def test_resumed_run_equals_an_unbroken_one(tmp_path, dies_at, other_folder, capsys):
    unbroken = ToyTrainer(toy_cfg(tmp_path, "OUTPUT_DIR", str(tmp_path / "unbroken")))
    unbroken.train()
    assert "No checkpoint found, train from scratch\n" in capsys.readouterr().out

    cfg = toy_cfg(tmp_path)
    killed = Killed(cfg)
    killed.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        killed.train()

    if other_folder:
        cfg.RESUME, cfg.OUTPUT_DIR = cfg.OUTPUT_DIR, str(tmp_path / "second")
    resumed = ToyTrainer(cfg)
    resumed.train()
    assert f"Found checkpoint at {tmp_path}/out (will resume training)\n" in capsys.readouterr().out
    assert resumed.start_epoch == dies_at
    assert killed.lrs + resumed.lrs == unbroken.lrs
    assert same_weights(resumed.model, unbroken.model)
    assert os.path.exists(os.path.join(cfg.OUTPUT_DIR, "linear", "model.pth.tar-5"))


@pytest.mark.parametrize("freq,epochs", [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5])])
def test_checkpoint_frequency(tmp_path, freq, epochs):
    ToyTrainer(toy_cfg(tmp_path, "TRAIN.CHECKPOINT_FREQ", freq)).train()
    names = {f"model.pth.tar-{epoch}" for epoch in epochs} | {"checkpoint"}
    assert set(os.listdir(tmp_path / "out" / "linear")) == names
    checkpoint = load_checkpoint(str(tmp_path / "out" / "linear" / "model.pth.tar-5"))
    assert set(checkpoint) == {"state_dict", "epoch", "optimizer", "scheduler", "val_result"}
    assert (checkpoint["epoch"], checkpoint["val_result"]) == (5, None)


class Scripted(ToyTrainer):
    """Has the given results on val."""

    results = (10.0, 30.0, 20.0, 30.0, 5.0)

    def test(self, split=None):
        return self.results[self.epoch] if split == "val" else super().test(split)


def test_best_val(tmp_path, capsys):
    cfg = toy_cfg(tmp_path, "TEST.FINAL_MODEL", "best_val")
    trainer = Scripted(cfg)
    trainer.train()
    out = capsys.readouterr().out
    best = str(tmp_path / "out" / "linear" / "model-best.pth.tar")
    checkpoint = load_checkpoint(best)
    assert (checkpoint["epoch"], checkpoint["val_result"], trainer.best_result) == (2, 30.0, 30.0)
    # an equal result later on does not replace it
    second = load_checkpoint(str(tmp_path / "out" / "linear" / "model.pth.tar-2"))
    assert torch.equal(checkpoint["state_dict"]["weight"], second["state_dict"]["weight"])
    assert torch.equal(trainer.model.weight, checkpoint["state_dict"]["weight"])
    assert "Deploy the model with the best val performance\n" in out
    assert f"Load {best} to linear (epoch=2, val_result=30.0)\n" in out


def test_splits_to_test_on(tmp_path, capsys):
    trainer = ToyTrainer(toy_cfg(tmp_path))
    capsys.readouterr()
    for split, total in ((None, 9), ("test", 9), ("val", 6)):
        trainer.test(split)
        assert f"Evaluate on the *{split or 'test'}* set\n=> result\n* total: {total}\n" in capsys.readouterr().out
    assert not trainer.model.training

    ToyTrainer(toy_cfg(tmp_path, "TEST.SPLIT", "val")).test()
    assert "Evaluate on the *val* set\n" in capsys.readouterr().out
    ToyTrainer(toy_cfg(tmp_path, "DATASET.VAL_PERCENT", 0.0)).test("val")
    assert "Evaluate on the *test* set\n" in capsys.readouterr().out


def test_no_test(tmp_path, capsys):
    ToyTrainer(toy_cfg(tmp_path, "TEST.NO_TEST", True, "TEST.FINAL_MODEL", "best_val")).train()
    assert "Evaluate" not in capsys.readouterr().out
    assert not os.path.exists(tmp_path / "out" / "linear" / "model-best.pth.tar")


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
    # the schedule has been stepped by the time the last batch of an epoch is logged
    assert found[0][4] == ("1.0000e-05" if batches[0] == "1" else "5.0000e-03")
    assert found[-1][4] == f"{0.01 * (1 + np.cos(np.pi * 3 / 5)) / 2:.4e}"
    end = lines[lines.index("Finish training") :]
    assert end[1:3] == ["Deploy the last-epoch model", "Evaluate on the *test* set"]
    assert re.fullmatch(r"Elapsed: \d:\d\d:\d\d", end[-1])


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = ToyTrainer(toy_cfg(tmp_path, "TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 3))
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    results = {f"{split}/{kind}" for split in ("val", "test") for kind in ("accuracy", "error_rate", "macro_f1")}
    assert set(events.Tags()["scalars"]) == results | {"train/loss", "train/acc", "train/lr"}
    assert [event.step for event in events.Scalars("train/lr")] == [0, 1, 2, 3, 4, 5]
    assert events.Scalars("train/lr")[0].value == pytest.approx(0.01)
    assert [event.step for event in events.Scalars("val/accuracy")] == [0, 1, 2]
    assert [event.step for event in events.Scalars("test/accuracy")] == [2]


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    trainer = ToyTrainer(toy_cfg(tmp_path))
    for value in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError):
            trainer.model_backward_and_update(trainer.model.weight.sum() * value)
        assert not trainer.model.weight.any()


def test_load_model(tmp_path, capsys):
    cfg = toy_cfg(tmp_path)
    trained = ToyTrainer(cfg)
    trained.train()
    fresh = ToyTrainer(cfg)
    trained.save_model(4, cfg.OUTPUT_DIR, val_result=12.34, model_name="model.pth.tar-9")
    fresh.load_model(cfg.OUTPUT_DIR, epoch=9)
    assert same_weights(fresh.model, trained.model)
    assert "(epoch=5, val_result=12.3)\n" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="model-best"):
        fresh.load_model(cfg.OUTPUT_DIR)
    capsys.readouterr()
    fresh.load_model("")
    assert capsys.readouterr().out.startswith("Note that load_model() is skipped as no pretrained model is given")


class Two(TrainerBase):
    """Two models with one parameter each, of which only the first has an optimiser and a schedule."""

    def __init__(self):
        super().__init__()
        for name in ("a", "b"):
            setattr(self, name, nn.Linear(1, 1, bias=False))
        self.optim = torch.optim.SGD(self.a.parameters(), lr=0.5)
        self.register_model("a", self.a, self.optim, torch.optim.lr_scheduler.StepLR(self.optim, 1))
        self.register_model("b", self.b)


def test_several_models():
    trainer = Two()
    assert trainer.get_model_names() == ["a", "b"]
    assert trainer.get_model_names("b") == ["b"] and trainer.get_model_names(["a"]) == ["a"]
    with pytest.raises((ValueError, AssertionError)):
        trainer.get_model_names("c")
    with pytest.raises((ValueError, AssertionError)):
        trainer.register_model("a", nn.Linear(1, 1))

    trainer.set_model_mode("eval", "b")
    assert trainer.a.training and not trainer.b.training
    trainer.set_model_mode("test")
    assert not trainer.a.training
    trainer.set_model_mode("train")
    assert trainer.a.training and trainer.b.training
    with pytest.raises(KeyError):
        trainer.set_model_mode("trian")

    before = trainer.a.weight.item(), trainer.b.weight.item()
    trainer.model_backward_and_update(trainer.a.weight.sum() + trainer.b.weight.sum())
    trainer.update_lr()
    assert (trainer.a.weight.item(), trainer.b.weight.item()) == pytest.approx((before[0] - 0.5, before[1]))
    assert trainer.optim.param_groups[0]["lr"] == pytest.approx(0.05)
    trainer.model_backward_and_update(trainer.a.weight.sum(), names="b")
    assert trainer.a.weight.item() == pytest.approx(before[0] - 0.5)


def test_base_trainer():
    class Early(TrainerBase):
        def __init__(self):
            self.register_model("m", nn.Linear(1, 1))

    with pytest.raises(AttributeError):
        Early()

    base = TrainerBase()
    base.write_scalar("tag", 1.0)
    base.close_writer()
    with pytest.raises(NotImplementedError):
        base.train(0, 1)

    class Counting(TrainerBase):
        def __init__(self):
            super().__init__()
            self.seen = []

        def run_epoch(self):
            self.seen.append(self.epoch)

    counting = Counting()
    counting.train(2, 5)
    assert (counting.seen, counting.start_epoch, counting.max_epoch) == ([2, 3, 4], 2, 5)
