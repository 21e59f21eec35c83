"""Run folders: one process at a time writes there, and files are replaced as a whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import signal

import pytest
from conftest import run_script

from trainers.prompting import results, run_folder
from trainers.prompting.errors import UserError
from trainers.prompting.results import is_finished, remove_leftovers, write_text
from trainers.prompting.run_folder import locked


def forked(function):
    """Number of a child process whose exit status is what ``function`` returns."""
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


# ------------------------------------------------------------------------------------------------- locks


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A process that holds the lock of ``tmp_path / run``, with a child that survives it, like a loader's worker."""
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)
    reading, writing = os.pipe()

    def hold():
        with locked(str(tmp_path / "run")):
            os.write(writing, f"{forked(signal.pause)}\n".encode())
            signal.pause()

    process = forked(hold)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        child = int(pipe.readline())
    yield process
    os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_folder_in_use_is_refused_until_its_process_dies(holder, tmp_path):
    folder = str(tmp_path / "run")
    with pytest.raises(UserError, match=f"^{folder}: another run is writing into this folder; .*--output-dir$"):
        locked(folder).__enter__()
    with locked(str(tmp_path / "other")):
        pass
    os.kill(holder, signal.SIGKILL)
    assert status_of(holder) == -signal.SIGKILL
    with locked(folder):  # at once, although its child lives
        pass


def test_run_refuses_a_folder_in_use_before_it_writes_anything(holder, run, tmp_path):
    before = sorted(os.listdir(tmp_path / "run"))
    (line,) = run("CoOp", status=2).error.splitlines()
    assert line.startswith(f"error: {tmp_path / 'run'}: another run is writing")
    assert sorted(os.listdir(tmp_path / "run")) == before


def test_process_may_nest_the_lock_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)

    def attempt():
        with contextlib.suppress(UserError), locked(str(tmp_path)):
            return 0
        return 2

    with locked(str(tmp_path)), locked(f"{tmp_path}/."):
        assert status_of(forked(attempt)) == 2
    assert status_of(forked(attempt)) == 0


@pytest.mark.parametrize(
    "error, raised", [(OSError(38, "no locks"), False), (PermissionError(13, "denied", "x"), True)]
)
def test_locks_that_the_system_refuses(tmp_path, monkeypatch, capsys, error, raised):
    """A file system without locks is reported, a folder that cannot be written is named."""

    def refuse(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(run_folder.FileLock, "acquire", refuse)
    expected = pytest.raises(PermissionError, match=str(tmp_path)) if raised else contextlib.nullcontext()
    with expected, locked(str(tmp_path)):
        pass
    assert ("this file system has no locks" in capsys.readouterr().out) != raised


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock(1), without which scripts take no lock")
def test_script_refuses_a_folder_in_use(tmp_path):
    """It must not replace the asked.txt of a script that runs there."""
    places = {"CFG": "", "SHOTS": "", "OUTPUT": "out", "PYTHON": "echo"}
    assert run_script(tmp_path, "logo/base2new", "shapes", "1", **places).returncode == 0
    asked = sorted((tmp_path / "out").rglob("asked.txt"))[-1]  # of the base run
    before = asked.read_text()
    with open(asked.with_name(".asked.lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_script(tmp_path, "logo/base2new", "shapes", "1", "OPTIM.LR", "1", **places)
    told = "trainers/prompting/script_output.py difference"  # which says what differs
    assert done.returncode == 2 and done.stderr.startswith(f"{told} {asked.parent} ")
    assert asked.read_text() == before


# ------------------------------------------------------------------------------------------------- files


def test_interrupted_writing_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.write_results(str(tmp_path), {"metrics": {"accuracy": 12.5}})
    for error, kind in ((OSError(28, "No space left on device"), OSError), (ZeroDivisionError(), ZeroDivisionError)):

        def fail(handle, error=error):
            raise error

        with monkeypatch.context() as patch, pytest.raises(kind) as caught:
            patch.setattr(os, "fsync", fail)  # written, but not yet in place
            write_text(str(path), "new")
        assert kind is not OSError or (caught.value.errno, caught.value.filename) == (28, str(path))
        assert results.read_results(str(tmp_path)) == {"metrics": {"accuracy": 12.5}} and os.listdir(tmp_path) == [
            path.name
        ]


def test_only_temporary_files_are_removed(tmp_path):
    others = [
        "model.pth.tar-3",
        "model-best.pth.tar",
        "results.json",
        "my.tmp",
        ".results.json",
        ".hidden-1.tmp",
        "model.tmp",
    ]
    left = [".results.json-0123456789ab.tmp", ".model.pth.tar-3-ba9876543210.tmp"]
    for name in (*others, *left):
        (tmp_path / name).touch()
    remove_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    remove_leftovers(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------- results.json


@pytest.mark.parametrize("content", ["", '{"metrics": {"accuracy": 1.0}', "[]", "{}", '{"metrics": 3}', "\0"])
def test_damaged_results_count_as_unfinished(tmp_path, capsys, content):
    assert not is_finished(str(tmp_path))
    results.write_results(str(tmp_path), {"metrics": {"accuracy": 50.0}})
    assert is_finished(str(tmp_path)) and capsys.readouterr().err == ""
    (tmp_path / "results.json").write_text(content)
    assert not is_finished(str(tmp_path))
    assert f"{tmp_path}/results.json is damaged" in capsys.readouterr().err


def test_harmonic_mean():
    assert results.harmonic_mean(84.47, 74.24) == pytest.approx(79.03, abs=0.01)  # the paper's average of LoGoPrompt
    assert results.harmonic_mean(0, 0) == 0 and results.harmonic_mean(80, 0) == 0


def test_summary_of_runs_without_an_accuracy(tmp_path, capsys):
    for text in ("", "{}", '{"metrics": {}}'):
        (tmp_path / "results.json").write_text(text)
        assert results.main([str(tmp_path), str(tmp_path)]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"results.json of {tmp_path} or {tmp_path} holds no accuracy" in error
