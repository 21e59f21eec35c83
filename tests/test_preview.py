"""tools/preview.py: pictures of the right things in the right places, mistakes in one line."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tiny import NAMES

import preview
from trainers.prompting.synthetic import fixed_places, render_blocks


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255


def test_blocks_of_class_names(tmp_path):
    out = tmp_path / "blocks.png"
    assert preview.main(["--out", str(out), "--classnames", "tabby cat", "fire truck", "cup"]) == 0
    sheet, gap = pixels(out), preview.GAP
    assert sheet.shape == (2 * (32 + gap) + gap, 2 * (224 + gap) + gap, 3)
    expected = render_blocks(["tabby cat", "fire truck", "cup"], 32, 224)[1].permute(1, 2, 0).numpy()
    drawn = sheet[gap : gap + 32, 2 * gap + 224 : 2 * gap + 448]
    np.testing.assert_allclose(drawn, expected, atol=1 / 255)


def test_a_sheet_holds_originals_and_what_logoprompt_sees(data_root, tmp_path):
    out, gap, size = tmp_path / "sheet.png", preview.GAP, 64
    words = ["--out", str(out), "--images", "3", "--others", "2", "--root", str(data_root), "--seed", "1"]
    words += ["--dataset-config-file", str(ROOT / "configs" / "datasets" / "caltech101.yaml")]
    assert preview.main([*words, "INPUT.SIZE", f"({size}, {size})"]) == 0
    sheet = pixels(out)
    assert sheet.shape == (3 * (size + gap) + gap, 4 * (size + gap) + gap, 3)
    first = sheet.copy()
    assert preview.main([*words, "INPUT.SIZE", f"({size}, {size})"]) == 0
    assert np.array_equal(pixels(out), first)  # the same seed, the same sheet

    blocks = render_blocks(NAMES, 9, size).permute(0, 2, 3, 1).numpy()
    images = {f"caltech-101/101_ObjectCategories/{n}/image_{i:04d}.jpg" for n in NAMES for i in range(8, 12)}
    tops = set(fixed_places(sorted(images), 0, size, (9, size), "random")[:, 0].tolist())
    for row in range(3):
        cells = [sheet[gap + row * (size + gap) :, gap + column * (size + gap) :][:size, :size] for column in range(4)]
        places = set()
        for cell in cells[1:]:
            changed = np.abs(cell - cells[0]).max(axis=(1, 2)) > 0
            top, bottom = changed.nonzero()[0][[0, -1]]
            assert bottom - top + 1 <= 9  # nothing but a strip is different
            fits = [t for t in tops if any(np.allclose(cell[t : t + 9], block, atol=1 / 255) for block in blocks)]
            assert fits  # it is one of the classes' blocks, at a place that a test image may have
            places.update(fits)
        assert len(places) == 1  # the same place for all copies of an image


@pytest.mark.parametrize(
    "words, said",
    [
        (["--classnames", "熊猫"], "FONT"),
        (["--root", "nowhere", "DATASET.NAME", "Caltech101"], "nowhere"),
        (["--classnames", "cup", "TRAINER.LOGOPROMPT.BLOCK_HEIGHT", "2.0"], "BLOCK_HEIGHT"),
        (["--classnames", "cup", "TRAINER.LOGOPROMPT.BLOCK_HIGHT", "0.5"], "perhaps TRAINER.LOGOPROMPT.BLOCK_HEIGHT"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, said):
    assert preview.main(["--out", str(tmp_path / "x.png"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_picture_that_cannot_be_written(tmp_path, capsys):
    for name in ("x.nonsense", "no/folder/x.png"):
        assert preview.main(["--out", str(tmp_path / name), "--classnames", "cup"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        preview.main(["--out", str(tmp_path / "x.png"), "--images", "0"])
    assert end.value.code == 2
