"""A newcomer's mistakes: exit status 2, and one line that names the remedy."""

import contextlib
import io
import os

import pytest
from conftest import ROOT, run_script

import train
from trainers.prompting.results import write_results

CONFIGS = ROOT / "configs"

TINY = CONFIGS / "trainers" / "CoOp" / "tiny96_ep10_ctxv1.yaml"


def flags(output="run", root="data", trainer="CoOp", config=CONFIGS / "trainers" / "CoOp" / "rn50.yaml"):
    dataset = CONFIGS / "datasets" / "caltech101.yaml"
    words = [
        "--root",
        root,
        "--seed",
        1,
        "--trainer",
        trainer,
        "--dataset-config-file",
        dataset,
        "--config-file",
        config,
    ]
    return [*map(str, words), *(["--output-dir", output] if output else [])]


SCRIPTS = {  # words and environment of base2new.sh -> mistake and remedy
    "misspelt trainer": (["shapes", "1"], {"TRAINER": "LoGoPromt"}, "TRAINER LoGoPromt", "LoGoPrompt"),
    "misspelt data set": (["shape", "1"], {}, "data set shape", "shapes_shifted"),
    "no shots": (["shapes", "1"], {"SHOTS": "0"}, "SHOTS 0", "at least 1"),
    "seed in words": (["shapes", "one"], {}, "SEED one", "whole number"),
    "no data": (["caltech101", "1"], {"DATA": "nowhere"}, "DATA nowhere", "set DATA to"),
    "another run in the folder": (
        ["shapes", "1", "OPTIM.LR", "0.1"],
        {},
        "OPTIM.LR is not set there, 0.1 now",
        "OUTPUT=",
    ),
    "flag of train.py": (["shapes", "1", "--eval-only"], {}, "--eval-only: no such option", "--help"),
}
PROGRAM = {  # of train.py
    "wrong root": (flags(root="nowhere"), "nowhere", "--root"),
    "misspelt trainer": (flags(trainer="LogoPromt"), '"LogoPromt"', "perhaps LoGoPrompt"),
    "misspelt key": ([*flags(), "OPTIM.MAX_EPOCHS", "2"], "OPTIM.MAX_EPOCHS", "perhaps OPTIM.MAX_EPOCH"),
    "no value": ([*flags(), "OPTIM.LR"], "OPTIM.LR", "KEY VALUE pairs are needed"),
    "no output folder": (flags(output=""), "--output-dir is missing", "name a folder"),
    "no shots": ([*flags(), "DATASET.NUM_SHOTS", "0"], "DATASET.NUM_SHOTS 0", "-1 for all"),
    "another directory": (flags(config="configs/trainers/CoOp/rn50.yaml"), "no such file", str(CONFIGS)),
    "nothing to evaluate": ([*flags(config=TINY), "--eval-only"], "--eval-only without a model", "add --model-dir"),
    "no network": ([*flags(), "--backbone", "RN50"], "the weights cannot be downloaded", "BACKBONE=FILE"),
}


def one_line(error, mistake, remedy):
    (line,) = error.splitlines()
    assert line.startswith("error: ") and mistake in line and remedy in line, line


@pytest.mark.parametrize("mistake", SCRIPTS)
def test_mistakes_in_a_script(tmp_path, mistake):
    words, environment, named, remedy = SCRIPTS[mistake]
    folder = (
        tmp_path / "out" / "base2new" / "train_base" / "shapes" / "shots_16" / "CoOp" / "tiny96_ep10_ctxv1" / "seed1"
    )
    if mistake == "another run in the folder":
        made = {"PYTHON": "echo", "CFG": "", "SHOTS": "", "OUTPUT": "out", "TRAINER": "CoOp"}
        assert run_script(tmp_path, "logo/base2new", "shapes", "1", **made).returncode == 0
        write_results(str(folder), {"metrics": {}})
    settings = {"CFG": "", "SHOTS": "", "OUTPUT": "out", "TRAINER": "CoOp", **environment}
    done = run_script(tmp_path, "logo/base2new", *words, **settings)
    assert done.returncode == 2
    one_line(done.stderr, named, remedy)


@pytest.mark.parametrize("mistake", PROGRAM)
def test_mistakes_in_a_command(tmp_path, data_root, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    os.symlink(data_root, "data")
    monkeypatch.setenv("HOME", str(tmp_path))  # no cached weights
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers
    words, named, remedy = PROGRAM[mistake]
    with contextlib.redirect_stderr(error := io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert train.main(words) == 2
    one_line(error.getvalue(), named, remedy)
