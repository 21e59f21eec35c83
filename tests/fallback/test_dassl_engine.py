import os
import re

import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.evaluation import build_evaluator
from dassl.metrics import compute_accuracy
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


@pytest.mark.parametrize("dies_at,other_folder", [(1, False), (2, True), (4, False)])  # the warm-up takes 2 epochs
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


@pytest.mark.parametrize("freq,epochs", [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5])])
def test_checkpoint_frequency(tmp_path, freq, epochs):
    ToyTrainer(toy_cfg(tmp_path, "TRAIN.CHECKPOINT_FREQ", freq)).train()
    names = {f"model.pth.tar-{epoch}" for epoch in epochs} | {"checkpoint"}
    assert set(os.listdir(tmp_path / "out" / "linear")) == names


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
    out = capsys.readouterr().out
    assert "Deploy the model with the best val performance\n" in out
    assert f"Load {best} to linear (epoch=2, val_result=30.0)\n" in out


def test_evaluated_splits(tmp_path, capsys):
    default, chosen, missing = (), ("TEST.SPLIT", "val"), ("DATASET.VAL_PERCENT", 0.0)
    expected = [(default, None, "test"), (default, "val", "val"), (chosen, None, "val"), (missing, "val", "test")]
    for options, split, used in expected:
        total = 6 if used == "val" else 9
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
    end = "Finish training\nDeploy the last-epoch model\nEvaluate on the *test* set\n=> result\n"
    assert end in "\n".join(lines) and re.fullmatch(r"Elapsed: \d:\d\d:\d\d", lines[-1])


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ToyTrainer(toy_cfg(tmp_path, "TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 3)).train()
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    results = {f"{split}/{kind}" for split in ("val", "test") for kind in ("accuracy", "error_rate", "macro_f1")}
    assert set(events.Tags()["scalars"]) == results | {"train/loss", "train/acc", "train/lr"}
    assert [event.step for event in events.Scalars("train/lr")] == [0, 1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("val/accuracy")] == [0, 1, 2]


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
    trainer.set_model_mode("eval", "other")
    assert trainer.model.training and not other.training
    trainer.model_backward_and_update(trainer.model.weight.sum() + other.weight.sum(), names=["other"])
    trainer.update_lr("other")
    assert not trainer.model.weight.any() and trainer.get_current_lr() == 0.01
    trainer.model_update()
    assert trainer.model.weight.max().item() == pytest.approx(-0.01)
    with pytest.raises(FloatingPointError):
        trainer.model_backward_and_update(trainer.model.weight.sum() * float("nan"))


def test_known_answer(capsys):
    cfg = get_cfg_default()
    cfg.TEST.PER_CLASS_RESULT = True
    with pytest.raises(ValueError, match="lab2cname"):
        build_evaluator(cfg)
    evaluator = build_evaluator(cfg, lab2cname={label: f"n{label}" for label in range(7)})
    capsys.readouterr()
    evaluator.process(torch.eye(7)[[0, 0, 1]], torch.tensor([0, 0, 0]))
    evaluator.process(torch.eye(7)[[2, 6, 2]], torch.tensor([2, 2, 4]))
    # label 0: 2 of 3, F1 = 4/5; label 2: 1 of 2, predicted twice, F1 = 2/4; label 4: none
    expected = {"accuracy": 50.0, "error_rate": 50.0, "macro_f1": 130 / 3, "perclass_accuracy": 350 / 9}
    assert evaluator.evaluate() == pytest.approx(expected)
    total = "=> result\n* total: 6\n* correct: 3\n* accuracy: 50.0%\n* error: 50.0%\n* macro_f1: 43.3%\n"
    first = "=> per-class result\n* class: 0 (n0)\ttotal: 3\tcorrect: 2\tacc: 66.7%\n"
    second = "* class: 2 (n2)\ttotal: 2\tcorrect: 1\tacc: 50.0%\n"
    third = "* class: 4 (n4)\ttotal: 1\tcorrect: 0\tacc: 0.0%\n* average: 38.9%\n"
    assert capsys.readouterr().out == total + first + second + third
    evaluator.reset()
    evaluator.process(torch.eye(7)[[3] * 1234], torch.full((1234,), 3))
    assert list(evaluator.evaluate().values()) == [100.0, 0.0, 100.0, 100.0]
    assert "* total: 1,234\n* correct: 1,234\n" in capsys.readouterr().out


def test_agrees_with_naive_counts(tmp_path):
    cfg = get_cfg_default()
    cfg.OUTPUT_DIR, cfg.TEST.COMPUTE_CMAT = str(tmp_path / "new"), True
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 5, 300).tolist(), rng.integers(1, 7, 300).tolist()
    evaluator = build_evaluator(cfg)
    evaluator.process(torch.eye(7)[guess], torch.tensor(truth))
    results, pairs = evaluator.evaluate(), list(zip(truth, guess))
    assert results["accuracy"] == pytest.approx(100 * sum(t == g for t, g in pairs) / 300)
    f1 = [2 * pairs.count((c, c)) / (truth.count(c) + guess.count(c)) for c in range(5)]
    assert results["macro_f1"] == pytest.approx(100 * sum(f1) / 5)
    expected = [[pairs.count((t, g)) / max(truth.count(t), 1) for g in range(7)] for t in range(7)]
    assert torch.load(tmp_path / "new" / "cmat.pt", weights_only=True).tolist() == expected


def test_compute_accuracy_by_counting():
    torch.manual_seed(0)
    scores, target = torch.randn(40, 9), torch.randint(0, 9, (40,))
    ranks = [sum(float(s) > float(row[t]) for s in row) for row, t in zip(scores, target)]
    results = compute_accuracy(scores, target, topk=(1, 2, 5))
    assert [r.item() for r in results] == pytest.approx([100 * sum(r < k for r in ranks) / 40 for k in (1, 2, 5)])
    assert compute_accuracy((scores, None), target)[0].item() == results[0].item()
