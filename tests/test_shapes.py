"""toy/drawing.py and datasets/shapes.py: drawings are reproducible, the data set is made once and as a whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import RandomState
from yacs.config import CfgNode as CN

from datasets import shapes
from toy.drawing import COLOURS, KINDS, STYLES, draw
from toy.pretrain import PRETRAINING_STYLES
from trainers.prompting.errors import UserError

COUNTS = {"train": 2, "val": 1, "test": 1}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", COUNTS)


def config(root, subset="all", shots=2, seed=1):
    return CN({"SEED": seed, "DATASET": CN({"ROOT": str(root), "NUM_SHOTS": shots, "SUBSAMPLE_CLASSES": subset})})


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


@pytest.mark.parametrize("style", sorted(STYLES))
def test_a_drawing_depends_on_its_random_state_alone(style):
    for kind in KINDS:
        first, again, other = (draw(kind, STYLES[style], RandomState(s), 32) for s in ((1, 2), (1, 2), (1, 3)))
        assert first.image.size == (32, 32) and first.kind == kind
        assert first.image.tobytes() == again.image.tobytes() and first == again
        assert first.image.tobytes() != other.image.tobytes()


def test_named_colours_are_those_of_the_drawing():
    right = 0
    for i in range(100):
        made = draw("heart", STYLES["flat"], RandomState(i), 64)
        image = np.asarray(made.image, dtype=float)
        thing = np.abs(image - image[0, 0]).sum(-1) > 60  # the corner shows the background
        distance = {name: np.abs(image - np.array(c)).sum(-1)[thing].mean() for name, c in COLOURS.items()}
        right += min(distance, key=distance.get) == made.colour
    assert right >= 90


def test_pre_training_sees_neither_style_of_the_data_sets():
    used = {STYLES[name] for name in PRETRAINING_STYLES}
    for data_set in (shapes.Shapes, shapes.ShapesShifted):
        fills = set(STYLES[data_set.style].fills)
        assert not any(fills & set(style.fills) for style in used)  # not the same under another name


def test_made_once_and_the_same_everywhere(few, tmp_path):
    first = shapes.Shapes(config(tmp_path / "a" / "deep"))
    folder = tmp_path / "a" / "deep" / "shapes"
    assert len(first.train_x) == 2 * len(KINDS) and len(first.test) == len(KINDS) and len(first.val) == len(KINDS)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    shapes.Shapes(config(tmp_path / "a" / "deep"))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    shapes.Shapes(config(tmp_path / "b"))
    assert files(tmp_path / "b" / "shapes") == files(folder)  # to the byte
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["shapes"]
    shapes.ShapesShifted(config(tmp_path / "b"))
    images = [content for path, content in files(tmp_path / "b").items() if path.endswith(".png")]
    assert len(images) == len(set(images)) == 2 * len(KINDS) * sum(COUNTS.values())  # no image occurs twice


def test_a_folder_with_other_content_is_not_touched(few, tmp_path):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="delete the folder"):
        shapes.Shapes(config(tmp_path))
    assert files(tmp_path) == {"shapes/thesis.txt": b"mine"}
    (tmp_path / "shapes" / shapes.MARK).write_text(json.dumps({"version": 0}))
    with pytest.raises(UserError, match="delete the folder"):
        shapes.Shapes(config(tmp_path))
    with pytest.raises(UserError, match="DATASET.ROOT"):
        shapes.Shapes(config(""))


def test_interrupted_or_overtaken(few, tmp_path, monkeypatch):
    """An interruption leaves nothing behind; of two processes at once the later one uses what the first made."""
    drawn, calls, stamps = shapes.draw, [], {}

    def stop(*args):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return drawn(*args)

    def overtake(*args):
        monkeypatch.setattr(shapes, "draw", drawn)
        shapes.Shapes(config(tmp_path))  # the other process
        stamps.update({p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")})
        return drawn(*args)

    monkeypatch.setattr(shapes, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        shapes.Shapes(config(tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shapes, "draw", overtake)
    assert len(shapes.Shapes(config(tmp_path)).test) == len(KINDS)
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]
    assert stamps and stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}


@pytest.mark.parametrize("data_set", (shapes.Shapes, shapes.ShapesShifted))
def test_the_embedded_clip_has_room_to_improve(data_set):
    """Zero-shot accuracy is far above chance and well below 90 %."""
    from trainers.prompting.backbone import load_clip
    from trainers.prompting.text_encoder import encode_texts

    backbone, n = load_clip("tiny"), 5
    texts = encode_texts(backbone, [f"a photo of a {kind}." for kind in KINDS])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276)))
    size = backbone.input_resolution
    drawings = [draw(kind, STYLES[data_set.style], RandomState([5, i]), size).image for kind in KINDS for i in range(n)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in drawings])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        predicted = backbone.logits(backbone.encode_image((pixels - mean) / std), texts).argmax(1)
    accuracy = (predicted == torch.arange(len(KINDS)).repeat_interleave(n)).float().mean().item()
    assert 5 / len(KINDS) < accuracy < 0.85
