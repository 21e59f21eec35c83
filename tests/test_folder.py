"""datasets/folder.py: your own images in class folders."""

import random
import shutil

import pytest
from test_datasets import build, found, message
from tiny import arguments
from trees import Tree, image, text

import train

TREE = Tree("Folder", "folder", "", "", [])
CLASSES = {"Golden_Retriever": 10, "cat": 7, "sea lion": 20}


def make(root, classes=CLASSES, prefix="", nested=False):
    for name, count in classes.items():
        for i in range(count):
            image(root / prefix / name / ("deeper" if nested and i % 2 else "") / f"IMG {i}.JPG")
    return root


def parts(data, root):
    return {name: found(getattr(data, name), root, TREE) for name in ("train_x", "val", "test")}


def test_a_folder_is_split_class_by_class(tmp_path):
    make(tmp_path, nested=True)
    image(tmp_path / ".thumbnails" / "x.jpg")
    text(tmp_path / "cat" / "notes.txt", ["not an image"])
    data = build(tmp_path, "Folder", -1)
    assert data.classnames == list(CLASSES)
    labels = {part: [row[1] for row in rows] for part, rows in parts(data, tmp_path).items()}
    counts = {part: [found.count(label) for label in range(3)] for part, found in labels.items()}
    assert counts == {"train_x": [5, 4, 10], "val": [2, 1, 4], "test": [3, 2, 6]}  # 50 %, 20 %, the rest
    rows = [row for rows in parts(data, tmp_path).values() for row in rows]
    assert len(set(rows)) == len(rows) == sum(CLASSES.values())
    assert {row[0] for row in rows} == {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("IMG*")}


def test_the_split_depends_on_split_seed_alone(tmp_path):
    make(tmp_path / "a")
    first = parts(build(tmp_path / "a", "Folder", -1), tmp_path / "a")
    assert parts(build(tmp_path / "a", "Folder", -1, "all", 3), tmp_path / "a")["test"] == first["test"]
    other = parts(build(tmp_path / "a", "Folder", -1, "all", 3, "DATASET.SPLIT_SEED", 2), tmp_path / "a")
    assert other["test"] != first["test"]
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert parts(build(tmp_path / "b", "Folder", -1), tmp_path / "b") == first


def test_an_added_image_moves_few_others(tmp_path):
    make(tmp_path, {"a": 40, "b": 40})
    before = parts(build(tmp_path, "Folder", -1), tmp_path)
    image(tmp_path / "a" / "one more.png")
    after = parts(build(tmp_path, "Folder", -1), tmp_path)
    moved = sum(len(set(before[part]) - set(after[part])) for part in before)
    assert moved <= 2


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid", "TESTING")])
def test_folders_of_parts(names, tmp_path, capsys):
    for part, count in zip(names, (5, 2, 3)):
        make(tmp_path, {name: count for name in CLASSES}, part)
    data = build(tmp_path, "Folder", 4)
    assert [len(rows) for rows in parts(data, tmp_path).values()] == [12, 6, 9]
    assert all(row[0].startswith(f"{names[0]}/") for row in found(data.train_x, tmp_path, TREE))
    shutil.rmtree(tmp_path / names[2] / "cat")  # a class without test images
    assert len(build(tmp_path, "Folder", 4).test) == 6
    shutil.rmtree(tmp_path / names[2])
    data = build(tmp_path, "Folder", 4)
    assert len(data.test) == 6 and data.val is None and "used for testing" in capsys.readouterr().out


def test_few_shot_base_and_new(tmp_path):
    make(tmp_path)
    data = build(tmp_path, "Folder", 2, "base")
    assert data.classnames == ["Golden_Retriever", "cat"] and len(data.train_x) == 4
    assert build(tmp_path, "Folder", 2, "new").classnames == ["sea lion"]
    rows = [row for row in parts(build(tmp_path, "Folder", -1), tmp_path)["train_x"] if row[1] == 0]
    assert found(data.train_x, tmp_path, TREE)[:2] == random.Random(2).sample(rows, 2)  # the seed of these tests
    assert build(tmp_path, "Folder", 2).classnames == list(CLASSES)  # the stored samples are not a class


def test_classnames_txt(tmp_path):
    make(tmp_path)
    lines = ["cat house cat", "sea lion California sea lion", "Golden_Retriever\tgolden retriever"]
    text(tmp_path / "classnames.txt", lines)
    assert build(tmp_path, "Folder").classnames == ["golden retriever", "house cat", "California sea lion"]
    text(tmp_path / "classnames.txt", ["cat house cat", "sea lion seal"])
    said = message(tmp_path, "Folder")
    assert str(tmp_path / "classnames.txt") in said and '"Golden_Retriever <class name>"' in said


def test_bad_folders(tmp_path):
    assert "put the images of each class into their own folder" in message(tmp_path, "Folder")
    image(tmp_path / "a.jpg")
    assert "put the images of each class" in message(tmp_path, "Folder")
    make(tmp_path, {"cat": 5, "dog": 1})
    assert f"{tmp_path / 'dog'}: 1 image(s) of this class" in message(tmp_path, "Folder")
    make(tmp_path / "b", {"cat": 5}, "test")
    assert "train/ does not" in message(tmp_path / "b", "Folder")
    make(tmp_path / "b", {"cat": 5, "dog": 0}, "train")
    (tmp_path / "b" / "train" / "dog").mkdir()
    assert f"{tmp_path / 'b/train/dog'}: no images" in message(tmp_path / "b", "Folder")
    make(tmp_path / "c", {"cat": 5}, "train")
    assert "add images for testing" in message(tmp_path / "c", "Folder")
    make(tmp_path / "d", {"cat": 5}, "train")
    make(tmp_path / "d", {"cat": 5}, "Training")
    assert "both Training/ and train/ are train images" in message(tmp_path / "d", "Folder")
    make(tmp_path / "c", {"cow": 5}, "test")
    assert str(tmp_path / "c" / "test" / "cow") in message(tmp_path / "c", "Folder")


@pytest.mark.parametrize(
    "layout", ["photos/cat photos/dog", "a/train a/test", "cat/dog dog/cat", "train/cat/train train/dog test/cat"]
)
def test_a_folder_of_another_level_is_refused(layout, tmp_path):
    for path in layout.split():
        make(tmp_path, {"x": 3}, path)
    assert "--root must name" in message(tmp_path, "Folder")


def test_training_and_testing(tmp_path, rn_file):
    make(tmp_path / "mine", {"red bird": 2, "blue bird": 3, "bee": 12})
    argv = arguments("LoGoPrompt", tmp_path / "mine", rn_file, tmp_path / "out", "DATASET.NAME", "Folder")
    assert train.main([*argv, "DATASET.SUBSAMPLE_CLASSES", "all"]) == 0
    assert (tmp_path / "out" / "results.json").is_file()
