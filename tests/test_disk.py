"""A full disk and a folder that cannot be written: one line, exit status 2, and nothing that was whole is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_kill_and_resume import differences, in_epoch, make, victims, whole  # noqa: F401 (fixtures)

from trainers.prompting.results import replacing, write_text

MAY_MOUNT = [["unshare", "-rm"], []]  # as anybody, where the system lets them; as root


def mounting(folder):
    """What to put before a command that mounts, None where nothing helps."""
    for words in MAY_MOUNT:
        if words and shutil.which(words[0]) is None:
            continue
        script = f"mount -t tmpfs -o size=64k none {folder} && umount {folder}"
        if subprocess.run([*words, "sh", "-c", script], capture_output=True).returncode == 0:
            return words
    return None


def test_a_full_disk(make, whole, tmp_path):  # noqa: F811
    """A disk of which less and less is free: wherever a run meets its end, the same command completes it afterwards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = mounting(folder)
    if words is None:
        pytest.skip("no file system can be mounted here, not even in a namespace (test_a_limit_on_files goes on)")
    (unbroken, _), place = whole("stages"), make("stages")
    place.argv[place.argv.index("--output-dir") + 1] = str(folder / "run")
    program = [sys.executable, str(ROOT / "tests" / "soak" / "small_disk.py")]
    sizes = ["0", "8", "24", "60", "100"]
    done = subprocess.run(
        [*words, *program, str(folder), json.dumps(place.argv), *sizes], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    epochs = []
    for full, after in json.loads(done.stdout.splitlines()[-1]):
        assert full["status"] == 2, full
        (line,) = full["errors"].splitlines()
        assert line.startswith("error: ") and line.endswith(": No space left on device") and str(folder) in line
        assert not [name for name in full["files"] if name.endswith((".tmp", "results.json"))]
        assert full["read"] == list(range(1, len(full["read"]) + 1))  # every checkpoint is whole
        epochs.append(len(full["read"]))
        assert after["status"] == 0 and after["predictions"] == unbroken["predictions"]
        for key, value in unbroken["model.pth.tar-5"]["state_dict"].items():
            assert after["parameters"][key] == value.tolist()
    assert epochs[0] == 0 < epochs[-1]


def test_a_limit_on_files(make, whole):  # noqa: F811
    """The same where nothing can be mounted: no file may become as large as a checkpoint."""
    unbroken, _ = whole("stages")
    place = make("stages", "TRAIN.DECODED_GB", 0.0)  # shared memory counts as a file
    assert place.run(die_at=in_epoch(3))[0] == -signal.SIGKILL
    size = (place.checkpoints / "model.pth.tar-2").stat().st_size
    assert place.run(file_size=size - 100)[0] == 2
    assert place.errors == f"error: {place.checkpoints}/model.pth.tar-3: File too large\n"
    kept = sorted(path.name for path in place.checkpoints.iterdir())
    assert kept == ["checkpoint", "model.pth.tar-1", "model.pth.tar-2"]
    assert differences(unbroken, place.finish()[0]) == []


def test_the_file_is_named_and_the_old_one_kept(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(str(path), "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError) as caught:
            write_text(str(path), "new")
    assert (caught.value.errno, caught.value.filename) == (28, str(path))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(OSError) as caught, replacing(str(tmp_path / "y" / "x.json")):
        raise FileNotFoundError(2, "No such file or directory", "mine")  # of whoever writes: left as it is
    assert caught.value.filename == "mine" and os.listdir(tmp_path / "y") == []


def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(str(tmp_path / "x"), "")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")
@pytest.mark.parametrize("part", ["", "prompt_learner"])
def test_a_folder_that_cannot_be_written(make, part):  # noqa: F811
    place = make("stages")
    assert place.run(die_at=in_epoch(2))[0] == -signal.SIGKILL
    folder = place.out / part
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):  # root, whom modes do not stop
        folder.chmod(0o755)
        words = mounting(folder)
        if words is None:
            pytest.skip("root may write anywhere, and nothing can be mounted")
        script = f'mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && exec "$@"'
        words = [*words, "sh", "-c", script, "sh"] if words else None
        if words is None:
            pytest.skip("root may write anywhere, and has no namespace to mount in")
    else:
        words = []
    program = [*words, sys.executable, str(ROOT / "train.py"), *place.argv]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    folder.chmod(0o755)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {folder}") and line.split(": ")[-1] in (
        "Permission denied",
        "Read-only file system",
    )
    assert all(path.read_bytes() == content for path, content in before.items())
    assert torch.load(place.checkpoints / "model.pth.tar-1", weights_only=True)["epoch"] == 1
