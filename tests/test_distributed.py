"""One run on several processes: the same steps and predictions as on one, one message when it ends early, resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start
from tiny import arguments

from trainers.prompting.distributed import share

METHOD = "TRAINER.LOGOPROMPT."
# Two or three processes share batches of 10, 5 or 1 of 16 images, all of them where 64 are wanted, and 16 test images.
RUNS = {
    "CoOp": ("CoOp",),
    "small data set": ("CoOp", "DATALOADER.TRAIN_X.BATCH_SIZE", 64, "TEST.FINAL_MODEL", "best_val"),
    "CoCoOp": ("CoCoOp", "DATALOADER.TRAIN_X.BATCH_SIZE", 1),
    "two-stage": ("LoGoPrompt", "DATALOADER.TRAIN_X.BATCH_SIZE", 5, "TRAIN.DROP_LAST", False),
    "tuned, workers": ("LoGoPrompt", METHOD + "TUNE_VISUAL", True, "DATALOADER.NUM_WORKERS", 1),
    "adapter": ("LoGoPrompt", METHOD + "ADAPTER", True),
    "views": ("LoGoPrompt", METHOD + "VIEWS", 2),
    "ProGrad": ("ProGrad",),
    "ProDA": ("ProDA", "TRAINER.PRODA.N_PROMPT", 4),
    "VP": ("VP", "TRAINER.VP.VISUAL_PROMPT", "random_patch"),
    "TipAdapterF": ("TipAdapterF",),
    "LinearProbe": ("LinearProbe",),
    "no such key": ("CoOp", "OPTIM.NO_SUCH_KEY", 1),
}


def torchrun(processes, *words, **kwargs):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        *map(str, words),
    ]
    kwargs = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.Popen(command, **kwargs)


@pytest.fixture(scope="module")
def found(data_root, rn_file, tmp_path_factory):
    """What ``distributed_runs.py`` found with 1, 2 and 3 processes, and what they printed on stderr."""
    results = {}
    for n in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"processes{n}")
        argv = {}
        for name, (trainer, *opts) in RUNS.items():
            opts = ("DATALOADER.TRAIN_X.BATCH_SIZE", 10, *opts, "OPTIM.MAX_EPOCH", 4)
            argv[name] = [str(word) for word in arguments(trainer, data_root, rn_file, folder / name, *opts)]
        (folder / "runs.json").write_text(json.dumps(argv))
        words = ROOT / "tests" / "distributed_runs.py", folder / "runs.json", folder / "found.json"
        process = torchrun(n, *words, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        results[n] = {**json.loads((folder / "found.json").read_text()), "errors": errors, "folder": folder}
    return results


@pytest.mark.parametrize("name", [name for name in RUNS if name != "no such key"])
@pytest.mark.parametrize("processes", [2, 3])
def test_steps_and_predictions_equal_those_of_one_process(found, processes, name):
    one, several = found[1][name], found[processes][name]
    assert one["status"] == several["status"] == 0
    assert several["losses"][:2] == pytest.approx(one["losses"][:2], rel=1e-5)
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-4)  # random weights magnify rounding
    assert several["predictions"] == one["predictions"]
    assert several["metrics"] == pytest.approx(one["metrics"], rel=1e-4)  # accuracies are multiples of 1/16
    results = json.loads((found[processes]["folder"] / name / "results.json").read_text())
    assert results["run"]["processes"] == processes and results["images"] == len(one["predictions"])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_mistake_is_reported_once(found, processes):
    assert found[processes]["no such key"]["status"] == 2
    assert found[processes]["errors"].count("NO_SUCH_KEY") == 1


def test_a_mistake_in_the_first_run_is_reported_once(tmp_path):
    process = torchrun(2, "train.py", "--config-file", "no such file", "--output-dir", tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and errors.count("error: no such file: no such file") == 1


@pytest.mark.parametrize("total", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_the_batch(total, count):
    shares = [share(total, number, count) for number in range(count)]
    assert sum(s.weight for s in shares) == pytest.approx(1)
    assert [row for s in shares if s.weight for row in range(total)[s.rows]] == list(range(total))
    assert all(len(range(total)[s.rows]) >= 1 and s.total == total for s in shares)
    sizes = [len(range(total)[s.rows]) * bool(s.weight) for s in shares]
    assert max(sizes) - min(sizes) <= 1


def process_of(launcher, rank):
    """Process id of a rank of a torchrun."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes():
                return int(path.name)
        except OSError:  # it has ended
            continue
    return None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to find the processes of torchrun")
@pytest.mark.parametrize("number, victim", [(signal.SIGKILL, 1), (signal.SIGTERM, None)])
def test_killed_run_says_so_once_and_resumes_on_one_process(data_root, rn_file, tmp_path, number, victim):
    """``victim``: rank that is killed; None: torchrun itself is."""

    def argv(out):
        opts = ("OPTIM.MAX_EPOCH", 40, "DATALOADER.TRAIN_X.BATCH_SIZE", 5, "TRAIN.PRINT_FREQ", 1)
        return [str(word) for word in arguments("LoGoPrompt", data_root, rn_file, tmp_path / out, *opts)]

    unbroken = start(argv("unbroken"))
    process, log = torchrun(2, "train.py", *argv("killed")), tmp_path / "killed" / "log.txt"
    deadline = time.monotonic() + 300
    while "epoch [4/40] batch" not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid if victim is None else process_of(process, victim), number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    again = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 train.py"
    assert errors.count("the last good checkpoint is") == errors.count(again) == 1
    assert not (tmp_path / "killed" / "results.json").exists()

    resumed = start(argv("killed"))
    assert resumed.status == 0 and resumed.trainer.start_epoch >= 3
    for key, value in unbroken.outcome["state"].items():
        torch.testing.assert_close(resumed.outcome["state"][key], value, rtol=1e-5, atol=1e-6)
    assert resumed.outcome["predictions"] == unbroken.outcome["predictions"]
