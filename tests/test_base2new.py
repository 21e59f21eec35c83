"""scripts/logo/base2new.sh as its users type it: from anywhere, skipped when finished, resumed when not."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from trainers.prompting.results import harmonic_mean, main, read_results, write_results

SCRIPT = ROOT / "scripts" / "logo" / "base2new.sh"
TINY = ["OPTIM.MAX_EPOCH", "2", "DATALOADER.NUM_WORKERS", "0", "DATALOADER.TRAIN_X.BATCH_SIZE", "8"]


def run(cwd, *words, script=SCRIPT, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, "CFG": "photo64_ep50_ctxv1", "SHOTS": "2", **environment}
    return subprocess.run(
        ["bash", str(script), *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
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
    # through a link, with CDPATH set, and with OUTPUT below the home folder: the same runs
    (tmp_path / "link.sh").symlink_to(SCRIPT)
    elsewhere = {**places, "OUTPUT": "~/my output", "HOME": str(tmp_path), "CDPATH": "."}
    done = run(tmp_path, *words, script=tmp_path / "link.sh", **elsewhere)
    assert done.returncode == 0 and done.stdout.count("finished before, skipped") == 2, done.stderr
    # other options must not be answered with these results
    done = run(tmp_path, *words, "TRAINER.LOGOPROMPT.K", "2", **places)
    assert done.returncode == 2 and "belongs to another run" in done.stderr
    # an unfinished run is taken up again
    (folders[0] / "results.json").unlink()
    done = run(tmp_path, *words, **places)
    assert done.returncode == 0 and "Resuming from" in done.stdout
    assert read_results(str(folders[0]))["metrics"]["accuracy"] == measured[0]


@pytest.mark.parametrize(
    "dataset, config",
    [
        ("caltech101", "vit_b16_ctxv1"),
        ("shapes", "tiny96_ep10_ctxv1"),  # the embedded world comes with its own CLIP
        ("shapes_shifted", "tiny96_ep10_ctxv1"),
    ],
)
def test_the_config_that_belongs_to_a_data_set(dataset, config, tmp_path):
    done = run(tmp_path, dataset, "1", OUTPUT="out", CFG="", PYTHON="echo")  # prints what it would run
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"--config-file configs/trainers/LoGoPrompt/{config}.yaml") == 2
    assert done.stdout.count(f"--dataset-config-file configs/datasets/{dataset}.yaml") == 2


def test_usage_and_failures_end_with_status_2(tmp_path, data_root, rn_file):
    done = run(tmp_path, "no_such_set", "1", OUTPUT="out")
    assert done.returncode == 2 and "configs/datasets/no_such_set.yaml" in done.stderr
    done = run(tmp_path, "caltech101", "1", CFG="no_such_config", OUTPUT="out")
    assert done.returncode == 2 and "configs/trainers/LoGoPrompt/no_such_config.yaml" in done.stderr
    done = run(tmp_path, "caltech101", "1", OUTPUT="out", DATA="nowhere", BACKBONE=rn_file)
    assert done.returncode == 2 and str(tmp_path / "nowhere") in done.stderr
    # a mistake leaves nothing behind that would stand in the way of the corrected command
    done = run(tmp_path, "caltech101", "1", "OPTIM.MAX_EPOCH", "0", OUTPUT="out", DATA=str(data_root), BACKBONE=rn_file)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: OPTIM.MAX_EPOCH 0")


def test_harmonic_mean():
    assert harmonic_mean(84.47, 74.24) == pytest.approx(79.03, abs=0.01)  # the paper's average of LoGoPrompt
    assert harmonic_mean(50, 50) == 50
    assert harmonic_mean(0, 0) == 0 and harmonic_mean(80, 0) == 0


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_results(str(tmp_path), {"metrics": {"accuracy": 12.5}})
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)  # written, and not yet in place
    with pytest.raises(ZeroDivisionError):
        write_results(str(tmp_path), {"metrics": {"accuracy": 99.0}})
    assert read_results(str(tmp_path)) == {"metrics": {"accuracy": 12.5}}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_summary_of_runs_that_are_not_finished(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize("text", ["{", "{}", '{"metrics": {}}'])
def test_summary_of_results_without_an_accuracy(tmp_path, capsys, text):
    (tmp_path / "results.json").write_text(text)
    capsys.readouterr()
    assert main([str(tmp_path), str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "results.json" in error and str(tmp_path) in error and "no accuracy" in error
