"""scripts/logo/base2new.sh as its users type it: from anywhere, skipped when finished, resumed when not."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from trainers.prompting.results import harmonic_mean, main, read_results, write_results

SCRIPT = ROOT / "scripts" / "logo" / "base2new.sh"
TINY = ["OPTIM.MAX_EPOCH", "2", "DATALOADER.NUM_WORKERS", "0", "DATALOADER.TRAIN_X.BATCH_SIZE", "8"]


def run(cwd, *words, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, "CFG": "photo64_ep50_ctxv1", "SHOTS": "2", **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("trainer", ["ZeroshotCLIP", "CoOp", "LoGoPrompt"])
def test_three_numbers_from_another_folder(trainer, data_root, rn_file, tmp_path):
    places = {
        "DATA": os.path.relpath(data_root, tmp_path),
        "BACKBONE": os.path.relpath(rn_file, tmp_path),
        "OUTPUT": "my output",
        "TRAINER": trainer,
    }
    words = ("caltech101", "1", *TINY)
    done = run(tmp_path, *words, **places)
    assert done.returncode == 0, done.stderr
    base, new, h = (float(v) for v in re.findall(r"^ *(?:base|new|H) +(\d+\.\d\d)$", done.stdout, re.M)[-3:])
    first = "test_base" if trainer == "ZeroshotCLIP" else "train_base"
    folders = [
        tmp_path / "my output" / "base2new" / kind / "caltech101/shots_2" / trainer / "photo64_ep50_ctxv1/seed1"
        for kind in (first, "test_new")
    ]
    measured = [read_results(str(folder))["metrics"]["accuracy"] for folder in folders]
    assert [base, new] == pytest.approx(measured, abs=0.005)
    assert h == pytest.approx(harmonic_mean(*measured), abs=0.005)
    assert read_results(str(folders[1]))["run"]["subsample_classes"] == "new"

    if trainer != "LoGoPrompt":
        return
    # a second time: nothing is run again
    stamps = [(folder / "results.json").stat().st_mtime_ns for folder in folders]
    done = run(tmp_path, *words, **places)
    assert done.returncode == 0 and done.stdout.count("finished before, skipped") == 2
    assert stamps == [(folder / "results.json").stat().st_mtime_ns for folder in folders]
    # other options must not be answered with these results
    done = run(tmp_path, *words, "TRAINER.LOGOPROMPT.K", "2", **places)
    assert done.returncode == 2 and "belongs to another run" in done.stderr
    # an unfinished run is taken up again
    (folders[0] / "results.json").unlink()
    done = run(tmp_path, *words, **places)
    assert done.returncode == 0 and "Resuming from" in done.stdout
    assert read_results(str(folders[0]))["metrics"]["accuracy"] == measured[0]


def test_usage_and_failures_end_with_status_2(tmp_path, data_root, rn_file):
    done = run(tmp_path, "caltech101")
    assert done.returncode == 2 and "usage:" in done.stderr
    done = run(tmp_path, "no_such_set", "1", OUTPUT="out")
    assert done.returncode == 2 and "configs/datasets/no_such_set.yaml" in done.stderr
    done = run(tmp_path, "caltech101", "1", OUTPUT="out", DATA="nowhere", BACKBONE=rn_file)
    assert done.returncode == 2 and str(tmp_path / "nowhere") in done.stderr


def test_harmonic_mean():
    assert harmonic_mean(84.47, 74.24) == pytest.approx(79.03, abs=0.01)  # the paper's average of LoGoPrompt
    assert harmonic_mean(50, 50) == 50
    assert harmonic_mean(0, 0) == 0 and harmonic_mean(80, 0) == 0


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_results(str(tmp_path), {"metrics": {"accuracy": 12.5}})
    monkeypatch.setattr(json, "dump", lambda obj, file, **kwargs: file.write("{") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_results(str(tmp_path), {"metrics": {"accuracy": 99.0}})
    assert read_results(str(tmp_path)) == {"metrics": {"accuracy": 12.5}}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_summary_of_runs_that_are_not_finished(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main([]) == 2
