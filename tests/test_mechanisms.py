"""toy/mechanisms.py: rows are measured once on the images that they name, and the tables hold what was measured."""

import sys

import pandas as pd
import pytest

from datasets import shapes
from toy import mechanisms
from trainers.prompting.results import read_results


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command on few images, in this process; returns status and what it printed."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 3, "val": 2, "test": 3})

    def call(*words):
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        opts = ("--opts", "OPTIM.MAX_EPOCH", "1", "DATASET.NUM_SHOTS", "1")
        status = mechanisms.main(["--output", str(tmp_path), "--jobs", "1", "--seeds", "1", *words, *opts])
        return status, capsys.readouterr()

    return call


def rows_of(text):
    return {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }


def test_tables_hold_what_the_runs_measured(command, tmp_path, monkeypatch):
    status, printed = command("--only", "main")
    text = (tmp_path / "tables_main.md").read_text()
    table = rows_of(text)
    assert status == 0 and text in printed.out and table[""] == ["base", "new", "H"]
    for name in ("ZeroshotCLIP", "CoOp", "LoGoPrompt as shipped"):
        (folder,) = tmp_path.glob(f"{name.split()[0]}-seed1-base2new-*")
        base, new = (read_results(folder / f"test_{subset}") for subset in ("base", "new"))
        a, b = (results["metrics"]["accuracy"] for results in (base, new))
        assert table[name] == [f"{value:.2f} ± 0.00" for value in (a, b, 2 * a * b / (a + b))]
        assert base["images"] == new["images"] == 3 * 16
    monkeypatch.setattr(mechanisms, "run", lambda argv: pytest.fail("run again"))
    assert command("--only", "main")[1].out == printed.out


def test_shift_trains_on_all_classes_and_tests_both_styles(command, tmp_path, monkeypatch):
    coop = mechanisms.experiments([])["shift"][1][1]
    monkeypatch.setattr(mechanisms, "experiments", lambda rates: {"shift": ("Another style", [coop])})
    table = rows_of(command("--only", "shift")[1].out)
    (folder,) = tmp_path.glob("CoOp-seed1-shift-*")
    assert read_results(folder / "train")["classes"] == 32 and table[""] == ["source", "ShapesShifted"]
    for column, accuracy in zip(("source", "ShapesShifted"), table["CoOp"]):
        results = read_results(folder / f"test_{column}")
        assert (results["classes"], results["images"]) == (32, 3 * 32)
        assert results["run"]["dataset"] == column.replace("source", "Shapes")
        assert accuracy == f"{results['metrics']['accuracy']:.2f} ± 0.00"


def test_learning_rates_are_chosen_on_validation_images(command, tmp_path, monkeypatch):
    calls, run = [], mechanisms.run
    monkeypatch.setattr(mechanisms, "run", lambda argv: calls.append(argv) or run(argv))
    status, printed = command("--only", "loss", "--rates", "0.002")
    assert status == 0 and "on the 32 validation images of the base classes" in printed.out
    folders = list(tmp_path.glob("*-seed1-*"))
    assert len(calls) == 3 * 3 and len(folders) == 3  # trained, tested on base and new
    for folder in folders:
        assert read_results(folder / "train")["metrics"] == {}
        assert {read_results(folder / f"val_{subset}")["split"] for subset in ("base", "new")} == {"val"}


def test_choice_prefers_small_learning_rates_and_ignores_new_classes():
    labels = [f"{form}, lr {rate}" for form in ("infonce", "paper") for rate in ("0.01", "0.1", "1")]
    labels += ["CoOp, lr 0.01", "CoOp, lr 0.1"]
    trainers = {"CoOp": "CoOp", "infonce": "LoGoPrompt", "paper": "LoGoPrompt"}
    base = [60.0, 78.0, 80.0, 60.0, 79.0, 20.0, 50.0, 90.0]  # one standard error of 80 % on 400 images is 2
    runs = [
        {
            "label": label,
            "trainer": trainers[label.split(",")[0]],
            "base": b + seed - 1.5,
            "new": 100 - b,
            "images": 400,
            "collapsed": b < 30 and seed == 1,
        }
        for label, b in zip(labels, base)
        for seed in (1, 2)
    ]
    ours, coop = mechanisms.choice(pd.DataFrame(runs)).split("\n\n")
    assert ours.endswith("(80.00, standard error 2.00): infonce, lr 1; chosen: paper, lr 0.1 (79.00).")
    assert coop.endswith("chosen: CoOp, lr 0.1 (90.00).")
    table = rows_of(mechanisms.table(pd.DataFrame(runs)))
    assert list(table)[-8:] == labels and table["paper, lr 1"] == ["20.00 ± 0.71", "80.00 ± 0.00", "1 of 2"]


def test_mistakes_end_in_one_line(command):
    for mistake in (["--config", "nosuch"], ["--dataset", "nosuch"]):
        status, printed = command("--only", "main", *mistake)
        assert status == 2 and printed.err.startswith("error: ")
    with pytest.raises(SystemExit) as end:
        command("--only", "nonsense")
    assert end.value.code == 2
