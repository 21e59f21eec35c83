"""One process at a time writes into a run folder, also after one that was killed; several share a data root."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from test_base2new import SCRIPT
from test_base2new import run as run_script
from test_kill_and_resume import differences, in_epoch, make, victims, whole  # noqa: F401 (fixtures)
from victims import Victims

from datasets import shapes
from trainers.prompting import runs
from trainers.prompting.errors import UserError
from trainers.prompting.results import is_finished, remove_leftovers, write_results


def forked(function):
    """The number of a child process that calls ``function``; its exit status is what that returns."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = function()
        finally:
            os._exit(status)
    return child


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of ``tmp_path / 'run'``, with a child of its own that outlives it."""
    reading, writing = os.pipe()

    def hold():
        with runs.locked(str(tmp_path / "run")):
            child = forked(signal.pause)  # like a worker of a loader
            os.write(writing, f"{child}\n".encode())
            signal.pause()

    process = forked(hold)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        child = int(pipe.readline())
    yield process
    os.kill(child, signal.SIGKILL)
    if process not in killed:
        kill(process)


killed = set()


def kill(process):
    os.kill(process, signal.SIGKILL)
    assert status_of(process) == -signal.SIGKILL
    killed.add(process)


def test_a_folder_in_use_is_refused_and_one_of_a_killed_process_is_not(holder, tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    with pytest.raises(UserError, match=f"^{folder}: another run is writing into this folder; .*--output-dir$"):
        runs.locked(folder).__enter__()
    with runs.locked(str(tmp_path / "other")):  # only this one
        pass
    kill(holder)
    with runs.locked(folder):  # at once, whatever its child does
        pass


def test_a_process_may_ask_for_its_folder_several_times(tmp_path):
    def try_it():
        runs.PATIENCE = 0.0
        try:
            runs.locked(str(tmp_path)).__enter__()
        except UserError:
            return 2
        return 0

    with runs.locked(str(tmp_path)), runs.locked(f"{tmp_path}/."):
        assert status_of(forked(try_it)) == 2
    assert status_of(forked(try_it)) == 0


def test_train_py_says_so_in_one_line(holder, make, tmp_path, monkeypatch, capsys):  # noqa: F811
    import train

    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    place = make("stages")
    place.argv[place.argv.index("--output-dir") + 1] = str(tmp_path / "run")
    before = sorted(os.listdir(tmp_path / "run"))
    assert train.main(place.argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"error: {tmp_path / 'run'}: another run is writing")
    assert sorted(os.listdir(tmp_path / "run")) == before  # no log either


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(runs.FileLock, "acquire", refuse)
    with runs.locked(str(tmp_path / "new")):
        pass
    assert "no locks on this file system" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", "x.lock")

    monkeypatch.setattr(runs.FileLock, "acquire", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        runs.locked(str(tmp_path)).__enter__()


def test_only_temporary_files_are_leftovers(tmp_path):
    kept = ["model.pth.tar-3", "model-best.pth.tar", "results.json", "my.tmp", ".results.json", ".hidden-1.tmp"]
    left = [".results.json-0123456789ab.tmp", ".model.pth.tar-3-ba9876543210.tmp", "model.pth.tar-3.tmp"]
    for name in (*kept, *left):
        (tmp_path / name).touch()
    remove_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    remove_leftovers(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------- results.json


@pytest.mark.parametrize(
    "content", ["", "{", '{"metrics": {"accuracy": 1.0}', "[]", "{}", "null", '{"metrics": 3}', "\0"]
)
def test_damaged_results_are_none(tmp_path, capsys, content):
    (tmp_path / "results.json").write_text(content)
    assert not is_finished(str(tmp_path))
    assert f"{tmp_path}/results.json is damaged" in capsys.readouterr().err


def test_results_that_are_whole_or_not_there(tmp_path, capsys):
    assert not is_finished(str(tmp_path))
    write_results(str(tmp_path), {"metrics": {"accuracy": 50.0}})
    assert is_finished(str(tmp_path)) and capsys.readouterr().err == ""


def test_the_scripts_take_up_a_run_with_damaged_results(tmp_path):
    run_ = {"trainer": "CoOp", "dataset": "Shapes", "shots": 16, "seed": 1, "backbone": "tiny"}
    (tmp_path / "whole.json").write_text(json.dumps({"metrics": {"accuracy": 50.0}, "run": run_}))
    fake = tmp_path / "python"  # trains nothing, and is Python otherwise
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = train.py ] || exec {sys.executable} "$@"\n'
        'for word; do [ "$last" = --output-dir ] && out=$word; last=$word; done\n'
        f'cp {tmp_path}/whole.json "$out/results.json"\n'
    )
    fake.chmod(0o755)
    places = {"PYTHON": str(fake), "CFG": "", "SHOTS": "", "OUTPUT": str(tmp_path / "out")}
    assert run_script(tmp_path, "shapes", "1", **places).returncode == 0
    for content in ("", '{"metrics": {"accu'):
        new, base = sorted((tmp_path / "out").rglob("results.json"))
        new.write_text(content)
        done = run_script(tmp_path, "shapes", "1", **places)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished before, skipped") == 1 and f"{new} is damaged" in done.stderr
        assert new.read_text() == base.read_text()


# ------------------------------------------------------------------------------------------------- the scripts' lock


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock(1), without which scripts do without a lock")
def test_two_scripts_on_one_folder(tmp_path):
    """The second one must not write its own asked.txt beside the files of the first."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho begun\ncat {tmp_path}/wait > /dev/null\n")  # until somebody writes there
    fake.chmod(0o755)
    os.mkfifo(tmp_path / "wait")
    environment = {**os.environ, "PYTHON": str(fake), "CFG": "", "SHOTS": "", "OUTPUT": str(tmp_path / "out")}
    words = ["bash", str(SCRIPT), "shapes", "1"]
    first = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "begun\n"
    (asked,) = (tmp_path / "out").rglob("asked.txt")
    before = asked.read_text()
    other = {"PYTHON": "echo", "CFG": "", "OUTPUT": "out"}
    done = run_script(tmp_path, "shapes", "1", "OPTIM.LR", "1", SHOTS="", **other)
    assert done.returncode == 2 and done.stderr == (
        f"error: {asked.parent}: another run is writing into this folder; wait for its end or set OUTPUT\n"
    )
    assert asked.read_text() == before
    first.kill()  # the script alone: what it ran goes on, with a lock of its own
    first.wait()
    first.stdout.close()
    assert run_script(tmp_path, "shapes", "1", SHOTS="", **other).returncode == 0  # nothing blocks
    (tmp_path / "wait").write_text("")


# ------------------------------------------------------------------------------------------------- one data root


def test_two_runs_draw_one_few_shot_sample(make, whole):  # noqa: F811
    """Both are halfway through writing it at the same time; one is killed there."""
    unbroken, names = whole("stages")
    first, second = make("stages"), make("stages")
    data = second.folder / "data" / "caltech-101"
    shutil.rmtree(data)
    data.symlink_to(first.folder / "data" / "caltech-101")
    half = names.index("half written") + 1
    assert first.run(die_at=half)[0] == -signal.SIGKILL
    samples = first.folder / "data" / "caltech-101" / "split_fewshot"
    assert [path.suffix for path in samples.iterdir()] == [".tmp"]
    other = Victims()
    try:
        first.start(), other.start(second.argv, second.log)
        for place, (status, said) in ((first, first.victims.end()), (second, other.end())):
            assert status == 0, place.errors
            assert differences(unbroken["predictions"], said["predictions"]) == []
    finally:
        other.close()
    assert [path.name for path in samples.glob("*.json")] == ["shot_4-seed_1.json"]
    assert (samples / "shot_4-seed_1.json").read_bytes() == unbroken["shot_4-seed_1.json"]


def test_two_processes_draw_one_data_set(tmp_path, monkeypatch):
    """They begin together; each draws, and the one that is later takes what the first has made."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 1, "val": 1, "test": 1})
    reading, writing = os.pipe()

    def draw():
        os.close(writing)
        os.read(reading, 1)  # until both are there
        shapes.draw_dataset(str(tmp_path / "shapes"), "scene", "split.json")
        return 0

    children = [forked(draw) for _ in range(2)]
    os.close(reading)
    os.close(writing)
    assert [status_of(child) for child in children] == [0, 0]
    assert os.listdir(tmp_path) == ["shapes"]
    assert len(list((tmp_path / "shapes" / "images").rglob("*.png"))) == 96
    assert len(json.loads((tmp_path / "shapes" / "split.json").read_text())["test"]) == 32


def test_checkpoints_hold_plain_types_alone(make):  # noqa: F811
    place = make("bank")
    assert place.run(die_at=in_epoch(5))[0] == -signal.SIGKILL
    checkpoint = torch.load(place.checkpoints / "model.pth.tar-4", weights_only=True)
    kinds = {"dict", "list", "tuple", "str", "int", "float", "bool", "NoneType", "Tensor", "OrderedDict"}

    def types(value):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return {type(value).__name__}.union(*map(types, inner))

    assert types(checkpoint) <= kinds and checkpoint["method"]["bank"]["keys"].shape[1] == 3
    assert set(checkpoint["random"]) == {"python", "numpy", "torch", "cuda"}
