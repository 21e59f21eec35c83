"""toy/demo.py (``make demo``): the table holds what the runs measured, and the pictures show it."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datasets import shapes
from toy import demo

SHORT = ["OPTIM.MAX_EPOCH", "2", "DATASET.NUM_SHOTS", "2", "DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A demo of two epochs and two shots on few images."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(shapes, "COUNTS", {"train": 3, "val": 1, "test": 3})
        assert demo.main(["--output", str(folder), *SHORT]) == 0
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


def test_sheet_shows_explanations(output):
    sheet = np.asarray(Image.open(output / "class_conditional.png"))
    assert sheet.shape[0] % demo.ROWS == 0
    for row in np.split(sheet, demo.ROWS):  # a green frame in every row, right of the image itself
        green = (np.abs(row.astype(int) - [0x1A, 0x7F, 0x37]) < 6).all(axis=-1).sum(axis=0) > 100
        assert green.any() and green.argmax() > sheet.shape[1] // 8


def test_bars_are_as_high_as_the_numbers(tmp_path):
    rows = {"ZeroshotCLIP": [40.0, 20.0, 26.7], "CoOp": [80.0, 10.0, 17.8], "LoGoPrompt": [60.0, 50.0, 54.5]}
    demo.bar_chart(pd.DataFrame.from_dict(rows, orient="index", columns=["Base", "New", "H"]), tmp_path / "chart.png")
    picture = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB"), dtype=int)
    picture = picture[picture.shape[0] // 7 :]  # below the legend
    for name, values in rows.items():
        colour = [int(demo.COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)]
        columns = (np.abs(picture - colour) <= 2).all(-1).sum(0)
        starts, ends = np.diff(np.concatenate([[0], columns > 8, [0]]).astype(int)).nonzero()[0].reshape(-1, 2).T
        heights = columns[(starts + ends) // 2]
        assert heights / heights[0] * values[0] == pytest.approx(values, abs=1)


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
