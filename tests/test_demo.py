"""toy/demo.py (``make demo``): the table holds what the runs measured, and the pictures show it."""

import json
import sys

import numpy as np
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
    for row in np.split(sheet, demo.ROWS):  # a frame in every row, right of the image itself
        frame = (np.abs(row.astype(int) - [0x1F, 0x29, 0x33]) < 6).all(axis=-1).sum(axis=0) > 100
        assert frame.any() and frame.argmax() > sheet.shape[1] // 8


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
