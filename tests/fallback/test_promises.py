"""What the fallback promises beyond Dassl: whole files, safe loading, errors in one line, a quiet log."""

import gc
import io
import json
import os
import pickle
import subprocess
import sys
import warnings

import dassl
import pytest
import torch
from dassl.utils import load_checkpoint, save_checkpoint, setup_logger, write_json
from dassl_toy import ToyTrainer, toy_cfg
from torch import nn


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail(*args, **kwargs):
    raise OSError("disk full")


@pytest.mark.parametrize("function", ["torch.save", "os.replace", "os.fsync"])
def test_failed_save_leaves_the_old_files(tmp_path, monkeypatch, function):
    save_checkpoint({"state_dict": {"a": torch.ones(3)}, "epoch": 1}, str(tmp_path))
    write_json([1], str(tmp_path / "x.json"))
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(function, fail)
        for epoch in (1, 2):
            with pytest.raises(OSError, match="disk full"):
                save_checkpoint({"state_dict": {"a": torch.zeros(3)}, "epoch": epoch}, str(tmp_path))
    with pytest.raises(TypeError):
        write_json([2, object()], str(tmp_path / "x.json"))
    assert contents(tmp_path) == before


def test_pointer_is_written_last(tmp_path, monkeypatch):
    replace, order = os.replace, []
    monkeypatch.setattr("os.replace", lambda source, to: (order.append(os.path.basename(to)), replace(source, to)))
    save_checkpoint({"state_dict": {}, "epoch": 1}, str(tmp_path), is_best=True)
    assert len(order) == 3 and order[-1] == "checkpoint"
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # they follow the umask


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("damage", ["bomb", "empty", "text", "cut", "pickle"])
def test_unsafe_or_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "epoch": Bomb() if damage == "bomb" else 1}, "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    damaged = {"bomb": whole, "empty": b"", "text": b"version https://git-lfs\n", "cut": whole[:-200]}
    (tmp_path / "x.pth").write_bytes(damaged.get(damage, pickle.dumps([1], protocol=2)[:-2]))
    with pytest.raises(RuntimeError, match=r"^cannot read checkpoint x.pth: [^\n]+$"):
        load_checkpoint("x.pth")
    assert os.listdir() == ["x.pth"]


@pytest.mark.parametrize("schedule", ["cosine", "multi_step", "single_step"])
def test_trainer_checkpoints_are_plain_and_training_is_quiet(tmp_path, schedule):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ToyTrainer(toy_cfg(tmp_path, "OPTIM.LR_SCHEDULER", schedule, "OPTIM.WARMUP_EPOCH", 2)).train()
    own = os.path.dirname(dassl.__file__)
    assert [str(w.message) for w in caught if w.filename.startswith(own) or "lr_scheduler" in str(w.message)] == []
    checkpoint = torch.load(tmp_path / "out" / "linear" / "model.pth.tar-5", weights_only=True)
    assert set(checkpoint) == {"state_dict", "epoch", "optimizer", "scheduler", "val_result"}
    assert (checkpoint["epoch"], checkpoint["scheduler"]["last_epoch"], checkpoint["val_result"]) == (5, 5, None)
    assert json.loads(json.dumps(checkpoint["scheduler"])) == checkpoint["scheduler"]


def test_resumes_only_from_checkpoints_of_one_epoch(tmp_path, capsys):
    out = str(tmp_path / "out")
    trainer = ToyTrainer(toy_cfg(tmp_path))
    trainer.register_model("second", nn.Linear(1, 1))
    os.makedirs(os.path.join(out, "linear"))  # killed during its first save
    assert trainer.resume_model_if_exist(out) == 0 and "train from scratch" in capsys.readouterr().out
    trainer.save_model(0, out)
    assert trainer.resume_model_if_exist(out) == 1
    save_checkpoint({"state_dict": trainer.model.state_dict(), "epoch": 2}, os.path.join(out, "linear"))
    with pytest.raises(RuntimeError, match="different epochs"):
        trainer.resume_model_if_exist(out)


def test_logger_copies_and_leaves_the_standard_output_open(tmp_path, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    setup_logger(str(tmp_path / "new"))
    assert not sys.stdout.isatty() and sys.stdout.write("abc") == 3
    assert (tmp_path / "new" / "log.txt").read_text() == "abc"  # without a flush: the log of a killed run is complete
    sys.stdout.close()
    sys.stdout.write("after")
    monkeypatch.setattr(sys, "stdout", stream)
    gc.collect()
    assert not stream.closed and stream.getvalue() == "abcafter"
    setup_logger(str(tmp_path / "new"))  # does not overwrite the old log
    sys.stdout.write("ü")
    assert sorted(contents(tmp_path / "new").values()) == [b"abc", "ü".encode()]


def test_process_with_a_logger_ends_quietly(tmp_path):
    code = "import sys; from dassl.utils import setup_logger; setup_logger(sys.argv[1]); print('to both')"
    folder = os.path.dirname(os.path.dirname(dassl.__file__))
    words = [sys.executable, "-B", "-W", "error", "-c", code, str(tmp_path / "train.log")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folder})
    assert (done.returncode, done.stdout, done.stderr) == (0, "to both\n", "")
    assert (tmp_path / "train.log").read_text() == "to both\n"
