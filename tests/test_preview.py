"""tools/preview.py: pictures of the right things in the right places, mistakes in one line."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tiny import NAMES

import preview
from trainers.prompting.paste import places_of, uniform_of_paths
from trainers.prompting.render import render_blocks


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255


def test_blocks_of_class_names(tmp_path):
    out, gap, names = tmp_path / "blocks.png", preview.GAP, ["tabby cat", "fire truck", "cup"]
    assert preview.main(["--out", str(out), "--classnames", *names]) == 0
    sheet = pixels(out)
    assert sheet.shape == (2 * (32 + gap) + gap, 2 * (224 + gap) + gap, 3)
    expected = render_blocks(names, 32, 224)[1].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(sheet[gap : gap + 32, 2 * gap + 224 : 2 * gap + 448], expected, atol=1 / 255)


def test_sheet_shows_test_images_as_logoprompt_sees_them(data_root, tmp_path):
    out, gap, size = tmp_path / "sheet.png", preview.GAP, 64
    words = ["--out", str(out), "--images", "3", "--others", "2", "--root", str(data_root), "--seed", "1"]
    words += [
        "--dataset-config-file",
        str(ROOT / "configs/datasets/caltech101.yaml"),
        "INPUT.SIZE",
        f"({size}, {size})",
    ]
    assert preview.main(words) == 0
    sheet, wide = pixels(out), 3 * size  # as enlarged
    assert sheet.shape == (3 * (wide + gap) + gap, 4 * (wide + gap) + gap, 3)
    assert preview.main(words) == 0 and np.array_equal(pixels(out), sheet)

    blocks = render_blocks(NAMES, 9, size).permute(0, 2, 3, 1).numpy()
    images = [f"caltech-101/101_ObjectCategories/{n}/image_{i:04d}.jpg" for n in NAMES for i in range(8, 12)]
    tops = set(places_of(uniform_of_paths(images, 0), size, (9, size), "random")[:, 0].tolist())
    for row in range(3):
        large = [sheet[gap + row * (wide + gap) :, gap + i * (wide + gap) :][:wide, :wide] for i in range(4)]
        original, *copies = small = [picture[::3, ::3] for picture in large]
        assert all(np.array_equal(a, b.repeat(3, axis=0).repeat(3, axis=1)) for a, b in zip(large, small))
        places = set()
        for copy in copies:
            top, bottom = (copy != original).any(axis=(1, 2)).nonzero()[0][[0, -1]]
            assert bottom - top < 9  # only a strip changes
            fits = {t for t in tops if any(np.allclose(copy[t : t + 9], block, atol=1 / 255) for block in blocks)}
            assert fits  # a class's block, where a test image may have it
            places |= fits
        assert len(places) == 1  # the same for all copies of an image


@pytest.mark.parametrize(
    "words, fault",
    [
        (["--classnames", "熊猫"], "FONT"),
        (["--root", "nowhere", "DATASET.NAME", "Caltech101"], "nowhere"),
        (["--classnames", "cup", "TRAINER.LOGOPROMPT.BLOCK_HEIGHT", "2.0"], "BLOCK_HEIGHT"),
        (["--classnames", "cup", "TRAINER.LOGOPROMPT.BLOCK_HIGHT", "0.5"], "perhaps TRAINER.LOGOPROMPT.BLOCK_HEIGHT"),
        (["--classnames", "cup", "--out", "no/folder/x.png"], "no/folder/x.png"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, words, fault):
    assert preview.main(["--out", str(tmp_path / "x.png"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and fault in error
