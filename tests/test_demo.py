"""toy/demo.py (``make demo``): the table holds what the runs measured, and the pictures show it."""

import io
import json
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest

from datasets import shapes
from toy import demo
from trainers.prompting.explanation import Candidate, Explanation

SHORT = ["OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "2", "DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A demo of two epochs and two shots on few images."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(shapes, "COUNTS", {"train": 3, "val": 1, "test": 3})
        with redirect_stdout(printed := io.StringIO()):
            assert demo.main(["--output", str(folder), *SHORT]) == 0
    lines = printed.getvalue().splitlines()  # not a terminal: progress all the same
    assert lines.count("  epoch [1/2]") == lines.count("  epoch [2/2]") == 2  # CoOp, LoGoPrompt
    assert len([line for line in lines if line.startswith("  new classes: ")]) == 3
    return folder


def test_table_holds_what_the_runs_measured(output):
    assert {p.name for p in output.iterdir()} == {"data", "runs", "table.md", "chart.png", "class_conditional.png"}
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in (output / "table.md").open()]
    assert rows[0][1:] == ["Base", "New", "H"] and [row[0] for row in rows[2:]] == list(demo.COLOURS)
    for name, *values in rows[2:]:
        folder, (base, new, h) = output / "runs" / name, map(float, values)
        for subset, value in (("base", base), ("new", new)):
            measured = json.loads((folder / subset / "results.json").read_text())["metrics"]["accuracy"]
            assert value == pytest.approx(measured, abs=0.005)
        assert h == pytest.approx(2 * base * new / (base + new), abs=0.01)


def test_sheet_shows_what_the_selection_did(output):
    """One row of each kind; every true class that is selected is green, every other one red."""
    folder = output / "runs" / "LoGoPrompt" / "base"
    found = demo.examples(folder)
    predictions = json.loads((folder / "results.json").read_text())
    changed = predictions["observed"]["changed_by_selection"] > 0
    assert "left as it was" in found and (len(found) > 1) <= changed
    for kind, (explanation, true) in found.items():
        names = [candidate.classname for candidate in explanation.candidates]
        scores = [max(candidate.original, candidate.conditional) for candidate in explanation.candidates]
        assert explanation.prediction.classes[0] == names[explanation.selected] == names[np.argmax(scores)]
        assert names[0] == names[np.argmax([candidate.original for candidate in explanation.candidates])]
        was, now = names[0] == true, names[explanation.selected] == true
        assert [was, now] == {"put right": [False, True], "spoiled": [True, False]}.get(kind, [True, True])
    for part, (explanation, true) in zip(demo.contact_sheet(found).subfigs, found.values()):
        captions = [axis.xaxis.label for axis in part.axes]
        chosen = captions[1 + explanation.selected]
        first = explanation.candidates[0]
        assert captions[0].get_text() == f"x: {first.classname.replace('_', ' ')} {first.original:.2f}"
        for caption, candidate in ((captions[0], first), (chosen, explanation.candidates[explanation.selected])):
            assert caption.get_color() == (demo.RIGHT if candidate.classname == true else demo.WRONG)
        assert {caption.get_color() for caption in captions[1:] if caption is not chosen} <= {demo.INK, "black"}
        assert [axis.spines["top"].get_visible() for axis in part.axes].count(True) == 1


def explanation(selected, *names):
    return Explanation(None, candidates=[Candidate(name, 0.1) for name in names], selected=selected)


@pytest.mark.parametrize("selected, true, kind", [
    (0, "car", "left as it was"), (1, "car", "spoiled"), (1, "bus", "put right"), (0, "bus", None), (1, "cat", None),
])  # fmt: skip
def test_kinds(selected, true, kind):
    assert demo.kind_of(explanation(selected, "car", "bus"), true) == kind


def test_mistakes_end_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(["--output", str(tmp_path / "new"), "TRAINER.LOGOPROMPT.KK", "3"])
    assert end.value.code == 2 and "unknown key TRAINER.LOGOPROMPT.KK" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "thesis.txt").write_text("mine")
    assert demo.main(["--output", str(tmp_path), *SHORT]) == 2
    demo.empty_folder(tmp_path / "runs" / "own")
    demo.empty_folder(tmp_path / "runs" / "own")  # an earlier demo's is replaced
    assert "choose another --output" in capsys.readouterr().err and (tmp_path / "runs" / "thesis.txt").exists()
