"""datasets/: the samples of the original CoOp code, and one clear line for a broken tree."""

import hashlib
import json
import os
import random
import shutil

import pytest
from tiny import NAMES, caltech_tree

from datasets.splits import python_random
from train import extend_cfg
from trainers.prompting.errors import UserError


def config(root, shots=4, subset="all", seed=1):
    from dassl.config import get_cfg_default

    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_list(["DATASET.NAME", "Caltech101", "DATASET.ROOT", str(root), "DATASET.NUM_SHOTS", shots])
    cfg.merge_from_list(["DATASET.SUBSAMPLE_CLASSES", subset, "SEED", seed])
    return cfg


def build(*args, **kwargs):
    from dassl.data.datasets import build_dataset

    return build_dataset(config(*args, **kwargs))


def digest(items):
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def rows(items, image_dir):
    return [[os.path.relpath(i.impath, image_dir).replace(os.sep, "/"), i.label, i.classname] for i in items]


def test_every_sample_equals_the_original_s(golden, real_data):
    reference = json.loads((golden / "fewshot_caltech101.json").read_text())
    image_dir = real_data / "caltech-101" / "101_ObjectCategories"
    assert len(reference) == 45
    for key, expected in reference.items():
        shots, seed, subset = key.replace("shots_", "").replace("seed_", "").split("-")
        data = build(real_data, int(shots), subset, int(seed))
        for part, items in (("train", data.train_x), ("val", data.val), ("test", data.test)):
            drawn = rows(items, image_dir)
            assert len(drawn) == expected[part], (key, part)
            assert digest(drawn) == expected[f"{part}_sha256"], (key, part)
        assert data.num_classes == expected["classes"]
        assert digest(data.classnames) == expected["classnames_sha256"], key
        if "train_items" in expected:  # one entry lists its training images in full
            assert [path for path, _, _ in rows(data.train_x, image_dir)] == expected["train_items"]


def test_shots_and_subsets(data_root):
    for shots in (1, 2, 4):
        data = build(data_root, shots)
        assert len(data.train_x) == shots * len(NAMES)
        assert len(data.val) == min(shots, 2) * len(NAMES)  # two validation images per class are all there is
    base, new = build(data_root, subset="base"), build(data_root, subset="new")
    assert base.classnames + new.classnames == NAMES == build(data_root).classnames
    assert [sorted({i.label for i in d.test}) for d in (base, new)] == [[0, 1, 2, 3]] * 2
    assert len(build(data_root, shots=-1).train_x) == 6 * len(NAMES)


def test_an_odd_number_of_classes_gives_base_the_larger_half(tmp_path):
    caltech_tree(tmp_path, NAMES[:5], train=1, val=1, test=1)
    assert build(tmp_path, 1, "base").num_classes == 3
    assert build(tmp_path, 1, "new").classnames == NAMES[3:5]


def test_a_negative_seed_draws_afresh():
    with python_random(-1):
        a = random.random()
    with python_random(-1):
        assert random.random() != a


# ------------------------------------------------------------------------------------------------- broken trees


@pytest.fixture
def tree(data_root, tmp_path):
    shutil.copytree(data_root, tmp_path / "data")
    return tmp_path / "data"


def edit_split(tree, change):
    path = tree / "caltech-101" / "split_zhou_Caltech101.json"
    split = json.loads(path.read_text())
    change(split)
    path.write_text(json.dumps(split))
    return path


def message(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        build(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_folder(tmp_path):
    assert "caltech-101" in message(tmp_path) and "--root" in message(tmp_path)
    assert str(tmp_path / "none") in message(tmp_path / "none")
    assert "--root" in message("")


def test_no_split_or_not_a_split(tree):
    path = tree / "caltech-101" / "split_zhou_Caltech101.json"
    item = '{"train": [["a.jpg", %s]], "val": [], "test": []}'
    wrong = [item % "0", item % "0, 42", item % "0, null", item % '-1, "face"', item % '"zero", "face"']
    for content in ("{", "[1, 2]", '{"train": []}', *wrong):
        path.write_text(content)
        assert str(path) in message(tree)


def test_missing_image_is_named(tree):
    victim = tree / "caltech-101" / "101_ObjectCategories" / "face" / "image_0009.jpg"  # a test image
    victim.unlink()
    assert str(victim) in message(tree)
    shutil.rmtree(victim.parent)
    assert str(victim.parent) in message(tree)


def test_empty_classes_gaps_and_double_names(tree):
    def empty(split):
        split["train"] = [row for row in split["train"] if row[1] != 3]

    path = edit_split(tree, empty)
    assert str(path) in message(tree) and 'class 3 ("electric guitar")' in message(tree)

    def gap(split):
        for part in split.values():
            part[:] = [row for row in part if row[1] != 3]

    edit_split(tree, gap)
    assert "class 3" in message(tree)

    def shift(split):
        for part in split.values():
            part[:] = [[image, label + (label < 3), name] for image, label, name in part]

    edit_split(tree, shift)
    assert "class 0 has no training image" in message(tree)

    def rename(split):
        split["train"] = [[image, label - 1, name] for image, label, name in split["train"]]

    edit_split(tree, rename)
    assert "give it one name" in message(tree)


def test_no_test_images_and_no_training_images(tree):
    edit_split(tree, lambda split: split.update(test=[row for row in split["test"] if row[1] < 4]))
    build(tree, subset="base")
    assert "no test images of the new classes" in message(tree, subset="new")
    edit_split(tree, lambda split: split.update(train=[]))
    assert "no training images" in message(tree)


def test_unknown_subset_and_too_few_classes(tree, tmp_path):
    assert "all, base, new" in message(tree, subset="old")
    caltech_tree(tmp_path / "one", NAMES[:1], train=1, val=1, test=1)
    assert "new" in message(tmp_path / "one", 1, "new")
