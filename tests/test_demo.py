"""tools/demo.py (``make demo``): the table it promises, and pictures that show what they say."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import demo
from datasets import shapes

SHORT = ["OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "2", "DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A demo of two epochs and two shots on few images."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", {"train": 3, "val": 1, "test": 3})
        assert demo.main(["--output", str(folder), *SHORT]) == 0
    return folder


def test_the_table_holds_what_the_runs_measured(output):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (output / "table.md").open()]
    assert rows[0][:4] == ["Method", "Base", "New", "H"]
    assert [row[0] for row in rows[2:]] == ["ZeroshotCLIP", "CoOp", "LoGoPrompt"]
    for name, *values in rows[2:]:
        measured = [
            json.loads((output / "runs" / name / subset / "results.json").read_text())["metrics"]["accuracy"]
            for subset in ("base", "new")
        ]
        base, new, h = map(float, values[:3])
        assert [base, new] == pytest.approx(measured, abs=0.005)
        assert h == pytest.approx(2 * base * new / (base + new), abs=0.01)


def test_everything_is_below_the_output_folder_and_named(output, capsys, monkeypatch):
    assert {p.name for p in output.iterdir()} == {"data", "runs", "table.md", "chart.png", "class_conditional.png"}
    monkeypatch.setattr(shapes, "COUNTS", {"train": 3, "val": 1, "test": 3})
    before = (output / "table.md").read_text()
    assert demo.main(["--output", str(output), *SHORT]) == 0  # again: the same numbers
    printed = capsys.readouterr().out
    assert before == (output / "table.md").read_text() and before in printed
    for name in ("table.md", "chart.png", "class_conditional.png"):
        assert re.search(rf"^\S*{re.escape(name)}$", printed, re.M)


def test_bars_are_as_high_as_the_numbers(tmp_path):
    rows = {"ZeroshotCLIP": (40.0, 20.0, 26.7), "CoOp": (80.0, 10.0, 17.8), "LoGoPrompt": (60.0, 50.0, 54.5)}
    demo.bar_chart(rows, tmp_path / "chart.png")
    picture = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB"), dtype=int)
    heights = {}
    for name, values in rows.items():
        colour = [int(demo.COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        mask = (np.abs(picture - colour) <= 2).all(-1)[picture.shape[0] // 7 :]  # below the legend
        columns = mask.sum(0)
        runs = np.flatnonzero(np.diff(np.concatenate([[0], columns > 8, [0]]).astype(int))).reshape(-1, 2)
        assert len(runs) == 3
        heights[name] = [columns[(a + b) // 2] for a, b in runs]
        per_percent = heights[name][0] / values[0]
        assert [h / per_percent for h in heights[name]] == pytest.approx(values, abs=1)


def test_the_sheet_marks_what_was_selected(output, tmp_path, monkeypatch):
    """The framed column of every row is the class that the trainer's own evaluation predicts."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 3, "val": 1, "test": 3})
    trainer = demo.trained(output / "data", output / "runs" / "LoGoPrompt", 1, SHORT)
    figures = []
    monkeypatch.setattr(demo.plt, "close", figures.append)
    demo.contact_sheet(trainer, tmp_path / "sheet.png", n_rows=4)
    monkeypatch.undo()
    monkeypatch.setattr(shapes, "COUNTS", {"train": 3, "val": 1, "test": 3})
    trainer.test()
    names = trainer.classnames
    rows = np.array(figures[0].axes).reshape(4, -1)
    assert rows.shape[1] == 1 + trainer.cfg.TRAINER.LOGOPROMPT.K
    labels = {item.impath: item.label for item in trainer.dm.dataset.test}
    predicted = {names[labels[p]]: set() for p in labels}
    for path, label in trainer.predictions.items():
        truth = next(names[labels[p]] for p in labels if p.replace("\\", "/").endswith(path))
        predicted[truth].add(names[label])
    for row in rows:
        framed = [axis for axis in row if axis.patches]
        assert len(framed) == 1 and not row[0].patches
        truth = row[0].get_title().split("\n")[0].removeprefix("true: ")
        chosen = framed[0].get_title().split("\n")[0]
        assert chosen in predicted[truth]
        best = max(row[1:], key=lambda a: max(float(v) for v in a.get_title().split("\n")[1].split(" → ")))
        values = [max(float(v) for v in a.get_title().split("\n")[1].split(" → ")) for a in (best, framed[0])]
        assert values[1] == pytest.approx(values[0], abs=0.011)  # the largest, up to the digits shown
    assert (tmp_path / "sheet.png").stat().st_size > 10000


def test_mistakes_end_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(["--output", str(tmp_path), "TRAINER.LOGOPROMPT.KK", "3"])
    assert end.value.code == 2
    assert "unknown key TRAINER.LOGOPROMPT.KK" in capsys.readouterr().err


def test_runs_of_somebody_else_are_not_replaced(tmp_path, capsys):
    thesis = tmp_path / "runs" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    assert demo.main(["--output", str(tmp_path), *SHORT]) == 2
    assert "choose another --output" in capsys.readouterr().err and thesis.read_text() == "mine"
