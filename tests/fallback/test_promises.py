"""What the fallback promises beyond Dassl: whole files, safe loading, errors in one line."""

import gc
import io
import json
import os
import pickle
import subprocess
import sys
import warnings

import dassl
import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.data import DataManager
from dassl.data.data_manager import build_data_loader
from dassl.data.datasets import DatasetBase, Datum
from dassl.data.transforms import build_transform
from dassl.engine import SimpleTrainer
from dassl.evaluation import build_evaluator
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import Logger, load_checkpoint, mkdir_if_missing, save_checkpoint, setup_logger, write_json
from dassl_toy import ToyTrainer, rates, read_split, toy_cfg
from torch import nn


def test_says_that_it_is_the_fallback():
    assert dassl.__version__.endswith("+fallback")


# Files are whole or not there


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail(*args, **kwargs):
    raise OSError("disk full")


def half_save(state, stream):
    stream.write(b"half of it")
    raise OSError("disk full")


@pytest.mark.parametrize("function,replacement", [("torch.save", half_save), ("os.replace", fail), ("os.fsync", fail)])
def test_failed_checkpoint_leaves_the_old_one(tmp_path, monkeypatch, function, replacement):
    save_checkpoint({"state_dict": {"a": torch.ones(3)}, "epoch": 1}, str(tmp_path), model_name="m")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(function, replacement)
        for name in ("m", "other"):
            with pytest.raises(OSError, match="disk full"):
                save_checkpoint({"state_dict": {"a": torch.zeros(3)}, "epoch": 2}, str(tmp_path), model_name=name)
    assert contents(tmp_path) == before
    assert load_checkpoint(str(tmp_path / "m"))["epoch"] == 1


def test_pointer_is_written_last_and_whole(tmp_path, monkeypatch):
    save_checkpoint({"state_dict": {}, "epoch": 1}, str(tmp_path))
    replace = os.replace

    def refuse_pointer(source, target):
        if os.path.basename(target) == "checkpoint":
            assert os.path.exists(tmp_path / "model.pth.tar-2")
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr("os.replace", refuse_pointer)
    with pytest.raises(OSError):
        save_checkpoint({"state_dict": {}, "epoch": 2}, str(tmp_path))
    assert (tmp_path / "checkpoint").read_text() == "model.pth.tar-1\n"
    assert sorted(contents(tmp_path)) == ["checkpoint", "model.pth.tar-1", "model.pth.tar-2"]


def test_failed_json_leaves_the_old_one(tmp_path):
    write_json([1], str(tmp_path / "x.json"))
    with pytest.raises(TypeError):
        write_json([2, object()], str(tmp_path / "x.json"))
    assert sorted(contents(tmp_path)) == ["x.json"] and json.loads((tmp_path / "x.json").read_text()) == [1]


def test_written_files_follow_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    write_json([], str(tmp_path / "x.json"))
    assert (tmp_path / "x.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_json_into_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mkdir_if_missing("")
    write_json({}, "x.json")
    assert (tmp_path / "x.json").read_text() == "{}"


def test_saving_does_not_change_the_state(tmp_path):
    state = {"state_dict": {"module.a": torch.ones(1)}, "epoch": 1}
    save_checkpoint(state, str(tmp_path))
    assert list(state["state_dict"]) == ["module.a"]


# Checkpoints are data


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "epoch": Bomb()}, "bomb.pth")
    with pytest.raises(RuntimeError) as caught:
        load_checkpoint("bomb.pth")
    assert not os.path.exists("exploded")
    assert str(caught.value).startswith("cannot read checkpoint bomb.pth: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "pickle"])
def test_unreadable_checkpoint_is_named_in_one_line(tmp_path, damage):
    path = tmp_path / "model.pth.tar-1"
    torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    whole = path.read_bytes()
    damaged = {"empty": b"", "text": b"version https://git-lfs\n", "cut": whole[:-200]}
    path.write_bytes(damaged.get(damage, pickle.dumps([1], protocol=2)[:-2]))
    with pytest.raises(RuntimeError) as caught:
        load_checkpoint(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule,steps", [("cosine", (-1,)), ("multi_step", (2, 3)), ("single_step", (2,))])
def test_trainer_checkpoints_are_plain(tmp_path, schedule, steps):
    cfg = toy_cfg(tmp_path, "OPTIM.LR_SCHEDULER", schedule, "OPTIM.STEPSIZE", steps, "OPTIM.WARMUP_EPOCH", 2)
    ToyTrainer(cfg).train()
    checkpoint = torch.load(tmp_path / "out" / "linear" / "model.pth.tar-5", weights_only=True)
    assert checkpoint["scheduler"]["last_epoch"] == 5
    assert json.loads(json.dumps(checkpoint["scheduler"])) == checkpoint["scheduler"]


def test_numpy_results_are_saved_as_plain_numbers(tmp_path):
    trainer = ToyTrainer(toy_cfg(tmp_path))
    trainer.save_model(0, str(tmp_path / "out"), val_result=np.float64(12.5))
    checkpoint = torch.load(tmp_path / "out" / "linear" / "model.pth.tar-1", weights_only=True)
    assert type(checkpoint["val_result"]) is float


def test_confusion_matrix_is_a_tensor(tmp_path):
    cfg = get_cfg_default()
    cfg.OUTPUT_DIR = str(tmp_path / "new")
    cfg.TEST.COMPUTE_CMAT = True
    evaluator = build_evaluator(cfg)
    evaluator.process(torch.eye(3)[[0, 2, 2, 1]], torch.tensor([0, 0, 2, 2]))
    evaluator.evaluate()
    matrix = torch.load(tmp_path / "new" / "cmat.pt", weights_only=True)
    assert matrix.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.5, 0.5]]


# Resuming


def test_folder_without_pointer_is_no_checkpoint(tmp_path, capsys):
    trainer = ToyTrainer(toy_cfg(tmp_path))
    os.makedirs(tmp_path / "out" / "linear")
    assert trainer.resume_model_if_exist(str(tmp_path / "out")) == 0
    assert "train from scratch" in capsys.readouterr().out


def test_checkpoints_of_different_epochs_are_refused(tmp_path):
    trainer = ToyTrainer(toy_cfg(tmp_path))
    trainer.register_model("second", nn.Linear(1, 1))
    trainer.save_model(0, str(tmp_path / "out"))
    assert trainer.resume_model_if_exist(str(tmp_path / "out")) == 1
    save_checkpoint({"state_dict": trainer.model.state_dict(), "epoch": 2}, str(tmp_path / "out" / "linear"))
    with pytest.raises(RuntimeError, match="different epochs"):
        trainer.resume_model_if_exist(str(tmp_path / "out"))


def test_resumed_run_keeps_a_better_earlier_model(tmp_path):
    class Scripted(ToyTrainer):
        results = (10.0, 30.0, 20.0, 25.0, 5.0)

        def test(self, split=None):
            return self.results[self.epoch] if split == "val" else super().test(split)

    settings = ("TEST.FINAL_MODEL", "best_val")
    Scripted(toy_cfg(tmp_path, *settings, "OPTIM.MAX_EPOCH", 3)).train()
    resumed = Scripted(toy_cfg(tmp_path, *settings))
    resumed.train()
    assert (resumed.start_epoch, resumed.best_result) == (3, 30.0)
    assert load_checkpoint(str(tmp_path / "out" / "linear" / "model-best.pth.tar"))["epoch"] == 2


def test_weights_without_a_result_can_be_loaded(tmp_path, capsys):
    trainer = ToyTrainer(toy_cfg(tmp_path))
    trainer.save_model(0, str(tmp_path / "out"))
    trainer.load_model(str(tmp_path / "out"), epoch=1)
    assert "(epoch=1, val_result=None)\n" in capsys.readouterr().out


def schedule(**values):
    """An optimiser and its schedule as the values describe them."""
    cfg = get_cfg_default().OPTIM
    for key, value in values.items():
        setattr(cfg, key, value)
    optimizer = build_optimizer(nn.Linear(2, 2), cfg)
    return optimizer, build_lr_scheduler(optimizer, cfg)


@pytest.mark.parametrize("name,stepsize", [("single_step", (2,)), ("multi_step", (2, 4)), ("cosine", (-1,))])
@pytest.mark.parametrize("kind", ["constant", "linear"])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 7])  # before, during, at the end of and after the warm-up
def test_resumed_schedule_goes_on_as_if_unbroken(name, stepsize, kind, stop):
    settings = {"LR_SCHEDULER": name, "STEPSIZE": stepsize, "WARMUP_EPOCH": 3, "WARMUP_TYPE": kind, "MAX_EPOCH": 8}
    unbroken = rates(*schedule(**settings), 8)
    first = schedule(**settings)
    assert rates(*first, stop) == unbroken[:stop]
    second = schedule(**settings)
    for old, new in zip(first, second):
        new.load_state_dict(old.state_dict())
    assert rates(*second, 8 - stop) == unbroken[stop:]


@pytest.mark.parametrize("dies_at", [1, 2, 4])  # in the warm-up, at its end, after it
def test_resumed_run_with_a_warmup_equals_an_unbroken_one(tmp_path, dies_at):
    class Killed(ToyTrainer):
        def before_epoch(self):
            if self.epoch == dies_at:
                raise KeyboardInterrupt

    settings = ("OPTIM.WARMUP_EPOCH", 2)
    unbroken = ToyTrainer(toy_cfg(tmp_path, *settings, "OUTPUT_DIR", str(tmp_path / "unbroken")))
    unbroken.train()
    killed, resumed = Killed(toy_cfg(tmp_path, *settings)), ToyTrainer(toy_cfg(tmp_path, *settings))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed.train()
    assert killed.lrs + resumed.lrs == unbroken.lrs
    assert torch.equal(resumed.model.weight, unbroken.model.weight)


def test_datum_does_not_look_for_its_file(monkeypatch):
    monkeypatch.setattr("os.stat", fail)
    monkeypatch.setattr("os.path.isfile", fail)
    assert Datum("/nowhere/x.jpg", 3, 1, "cat").impath == "/nowhere/x.jpg"
    with pytest.raises(TypeError):
        Datum(b"/nowhere/x.jpg")


# Loaders, transforms, models


def test_empty_splits_are_named(tmp_path):
    cfg = toy_cfg(tmp_path)
    with pytest.raises(ValueError, match="^the val split has no images$"):
        build_data_loader(cfg, data_source=[], split="val")
    with pytest.raises(ValueError, match="train_x"):
        DatasetBase(train_x=[], test=[])
    for name in os.listdir(tmp_path / "images" / "test"):
        os.remove(tmp_path / "images" / "test" / name)
    with pytest.raises(ValueError, match="^the test split has no images$"):
        DataManager(cfg)


def test_loader_without_a_batch_is_named(tmp_path):
    cfg = toy_cfg(tmp_path)
    data = read_split(cfg.DATASET.ROOT, "train")[:7]  # labels 0, 0, 0, 0, 1, 1, 1
    with pytest.raises(ValueError, match="^the 7 images of the train_x split make no batch of 7 with RandomClassSamp"):
        build_data_loader(cfg, "RandomClassSampler", data, batch_size=7, n_ins=3, split="train_x")


def test_workers_live_on_between_epochs(tmp_path):
    manager = DataManager(toy_cfg(tmp_path, "DATALOADER.NUM_WORKERS", 1))
    loaders = (manager.train_loader_x, manager.val_loader, manager.test_loader)
    assert all(loader.persistent_workers and not loader.pin_memory for loader in loaders)
    epochs = [[batch["label"].tolist() for batch in manager.test_loader] for _ in range(2)]
    assert epochs[0] == epochs[1] == [[0, 0, 0, 1], [1, 1, 2, 2], [2]]
    assert not DataManager(toy_cfg(tmp_path)).train_loader_x.persistent_workers


def test_order_of_images_does_not_depend_on_workers(tmp_path):
    orders = []
    for workers in (0, 1):
        cfg = toy_cfg(tmp_path, "DATALOADER.TRAIN_X.SAMPLER", "RandomSampler", "DATALOADER.NUM_WORKERS", workers)
        manager = DataManager(cfg)
        torch.manual_seed(0)
        orders.append([[batch["index"].tolist() for batch in manager.train_loader_x] for _ in range(3)])
    assert orders[0] == orders[1] and orders[0][0] != orders[0][1]


@pytest.mark.parametrize("name", ["randaugment", "randaugment_fixmatch", "randaugment2", "svhn_policy"])
def test_transforms_that_only_dassl_has(name):
    with pytest.raises(ValueError, match=rf"^the fallback .* {name}; install Dassl\.pytorch"):
        build_transform(get_cfg_default(), choices=[name])


def test_compute_accuracy_of_several_k():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    accuracies = compute_accuracy(scores, torch.tensor([1, 0]), topk=(1, 2, 4))
    assert [a.item() for a in accuracies] == [0.0, 50.0, 100.0]


def test_trainer_without_a_model(tmp_path):
    with pytest.raises(NotImplementedError, match="SimpleTrainer must define build_model"):
        SimpleTrainer(toy_cfg(tmp_path))


# Standard output


def test_logger_leaves_the_standard_output_open(tmp_path, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    setup_logger(str(tmp_path))
    tee = sys.stdout
    assert tee.isatty() and tee.getvalue() == "" and tee.write("abc") == 3
    monkeypatch.setattr(sys, "stdout", stream)
    tee.close()
    tee.close()
    tee.write("after")
    del tee
    gc.collect()
    assert not stream.closed and stream.getvalue() == "abcafter"
    with Logger(str(tmp_path / "new" / "x.txt")) as logger:
        logger.write("line\n")
        assert (tmp_path / "new" / "x.txt").read_text() == "line\n"  # without a flush: the log of a killed run is whole
    assert logger.file is None and (tmp_path / "log.txt").read_text() == "abc"


def test_process_with_a_logger_ends_quietly(tmp_path):
    code = "import sys; from dassl.utils import setup_logger; setup_logger(sys.argv[1]); print('to both')"
    path = os.pathsep.join([os.path.dirname(os.path.dirname(dassl.__file__)), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "to both\n", "")
    assert (tmp_path / "log.txt").read_text() == "to both\n"


# Quiet


def test_schedule_gives_no_warning():
    cfg = get_cfg_default().OPTIM
    cfg.WARMUP_EPOCH = 1
    optimizer = build_optimizer(nn.Linear(1, 1), cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = build_lr_scheduler(optimizer, cfg)
        scheduler.step()  # no optimizer.step() before: a gradient scaler skips the first ones
        scheduler.step(5)
    assert scheduler.last_epoch == 5


def test_training_gives_no_warning_of_ours(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ToyTrainer(toy_cfg(tmp_path)).train()
    own = os.path.dirname(dassl.__file__)
    assert [str(w.message) for w in caught if w.filename.startswith(own) or "lr_scheduler" in str(w.message)] == []
