"""Every data set of CoOp, read from a miniature in its exact format, against plain loops; damaged trees are refused."""

import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import sys

import pytest
import trees
from tiny import NAMES, arguments, caltech_tree

import train
from trainers.prompting.errors import UserError

SEED, SHOTS = 2, 2
PARTS = {"train": "train_x", "val": "val", "test": "test"}


def name_of(make):
    return getattr(make, "__name__", None)


def config(root, name, shots=SHOTS, subset="all", seed=SEED, *opts):
    from dassl.config import get_cfg_default

    cfg = get_cfg_default()
    train.extend_cfg(cfg)
    keys = {"NAME": name, "ROOT": str(root), "NUM_SHOTS": shots, "SUBSAMPLE_CLASSES": subset}
    cfg.merge_from_list([word for key, value in keys.items() for word in (f"DATASET.{key}", value)])
    cfg.merge_from_list(["SEED", seed, *opts])
    return cfg


def build(root, name, *args):
    from dassl.data.datasets import build_dataset

    return build_dataset(config(root, name, *args))


def message(root, name, *args):
    with pytest.raises(UserError) as caught:
        build(root, name, *args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def found(items, root, tree):
    """Rows as a test writes them down: path relative to the image folder, label, class name."""
    images = os.path.join(root, tree.folder, tree.images)
    return [(os.path.relpath(i.impath, images).replace(os.sep, "/"), i.label, i.classname) for i in items or ()]


def naive_split(tree, random):
    """CoOp's split of the raw data set, in plain loops."""
    if not tree.classes and not tree.trainval:
        return tree.parts
    split = {"train": [], "val": [], "test": list(tree.parts.get("test", ()))}
    if tree.trainval:
        labels = []
        for _, label, _ in tree.trainval:
            labels += [] if label in labels else [label]
        for label in labels:
            rows = [i for i, row in enumerate(tree.trainval) if row[1] == label]
            random.shuffle(rows)
            for position, row in enumerate(rows):
                split["val" if position < round(0.2 * len(rows)) else "train"].append(tree.trainval[row])
    for label, name, paths in tree.classes:
        paths = list(paths)
        random.shuffle(paths)
        for position, path in enumerate(paths):
            first, second = round(0.5 * len(paths)), round(0.5 * len(paths)) + round(0.2 * len(paths))
            split["train" if position < first else "val" if position < second else "test"].append((path, label, name))
    return split


def naive_sample(rows, shots, random):
    sample = []
    for label in dict.fromkeys(row[1] for row in rows):
        mine = [row for row in rows if row[1] == label]
        sample += random.sample(mine, shots) if len(mine) >= shots else mine
    return sample


def naive_half(parts, subset):
    n = len({label for _, label, _ in parts["train"]})
    middle = math.ceil(n / 2)
    low, high = {"all": (0, n), "base": (0, middle), "new": (middle, n)}[subset]
    return {p: [(f, label - low, c) for f, label, c in rows if low <= label < high] for p, rows in parts.items()}


def sampled(tree):
    return ("train",) if tree.name == "ImageNet" else ("train", "val")


def expect(tree, split, shots, draws):
    parts = dict(split)
    for part in sampled(tree):
        parts[part] = naive_sample(parts[part], min(shots, 4) if part == "val" else shots, draws)
    return parts


def assert_built(root, tree, expected):
    """All, base and new classes, the second and third time with the stored split and sample."""
    middle = math.ceil(len(tree.classnames) / 2)
    for subset, names in (("all", slice(None)), ("base", slice(middle)), ("new", slice(middle, None))):
        data = build(root, tree.name, SHOTS, subset)
        half = naive_half(expected, subset)
        assert {part: found(getattr(data, name), root, tree) for part, name in PARTS.items()} == half, subset
        assert data.classnames == tree.classnames[names]


@pytest.mark.parametrize("make", trees.FEW_SHOT, ids=name_of)
def test_without_a_split_file(make, tmp_path):
    """The split is made and saved, and the sample drawn after it from the same random stream, as in CoOp."""
    tree = make(tmp_path)
    draws = random.Random(SEED)
    split = naive_split(tree, draws)
    assert_built(tmp_path, tree, expect(tree, split, SHOTS, draws))
    path = tmp_path / tree.folder / tree.split_file
    if tree.classes or tree.trainval:
        written = json.loads(path.read_text())
        assert {part: [tuple(row) for row in written[part]] for part in ("train", "val", "test")} == split
    else:
        assert not path.exists()


@pytest.mark.parametrize("make", (*trees.FOLDERS, *trees.ANNOTATED), ids=name_of)
def test_with_a_split_file(make, tmp_path):
    """The file alone counts, in any order, without the raw annotations."""
    tree = make(tmp_path)
    split = naive_split(tree, random.Random(77))
    random.Random(5).shuffle(split["train"])
    (tmp_path / tree.folder / tree.split_file).write_text(json.dumps(split))
    for name in tree.raw:
        (tmp_path / tree.folder / name).unlink()
    draws = random.Random(SEED)
    assert_built(tmp_path, tree, expect(tree, split, SHOTS, draws))
    data = build(tmp_path, tree.name, -1)
    assert {part: found(getattr(data, name), tmp_path, tree) for part, name in PARTS.items()} == split


@pytest.mark.parametrize("make", trees.VARIANTS, ids=name_of)
def test_variants_of_imagenet(make, tmp_path, capsys):
    tree = make(tmp_path)
    data = build(tmp_path, tree.name, 16)
    assert found(data.test, tmp_path, tree) == found(data.train_x, tmp_path, tree) == tree.parts["test"]
    assert data.classnames == tree.classnames and data.val is None
    assert "SUBSAMPLE_CLASSES base" in message(tmp_path, tree.name, 16, "base")


def test_a_variant_cannot_be_trained_on(tmp_path, rn_file, capsys):
    trees.imagenet_a(tmp_path)
    argv = arguments("ZeroshotCLIP", tmp_path, rn_file, tmp_path / "out", "DATASET.NAME", "ImageNetA")
    assert train.main([*argv, "DATASET.SUBSAMPLE_CLASSES", "all"]) == 2
    assert "no training images: add --eval-only" in capsys.readouterr().err.splitlines()[-1]
    argv[argv.index("--output-dir") + 2 : argv.index("--output-dir") + 2] = ["--eval-only"]
    assert train.main([*argv, "DATASET.SUBSAMPLE_CLASSES", "all"]) == 0


def digest(items):
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def test_samples_match_original_coop(golden, real_data):
    tree = trees.Tree("Caltech101", "caltech101", "caltech-101", "101_ObjectCategories", [])
    reference = json.loads((golden / "fewshot_caltech101.json").read_text())
    assert len(reference) == 45
    for key, expected in reference.items():
        shots, seed, subset = key.replace("shots_", "").replace("seed_", "").split("-")
        data = build(real_data, tree.name, int(shots), subset, int(seed))
        for part, name in PARTS.items():
            rows = found(getattr(data, name), real_data, tree)
            assert (len(rows), digest(rows)) == (expected[part], expected[f"{part}_sha256"]), (key, part)
        if "train_items" in expected:  # one entry lists its training images in full
            assert [row[0] for row in found(data.train_x, real_data, tree)] == expected["train_items"]
        assert (data.num_classes, digest(data.classnames)) == (expected["classes"], expected["classnames_sha256"])


def sample_file(root, tree, shots=SHOTS, seed=SEED, ending="json"):
    return root / tree.folder / "split_fewshot" / f"shot_{shots}-seed_{seed}.{ending}"


def test_a_sample_depends_on_the_seed_alone(tmp_path):
    tree = trees.fgvc_aircraft(tmp_path)
    first = [i.impath for i in build(tmp_path, tree.name).train_x]
    sample_file(tmp_path, tree).unlink()
    random.seed(99)
    state = random.getstate()
    assert [i.impath for i in build(tmp_path, tree.name).train_x] == first
    assert random.getstate() == state
    assert [i.impath for i in build(tmp_path, tree.name, SHOTS, "all", 3).train_x] != first
    stored = os.listdir(tmp_path / tree.folder / "split_fewshot")
    build(tmp_path, tree.name, SHOTS, "all", -1)  # without a seed nothing is stored
    assert os.listdir(tmp_path / tree.folder / "split_fewshot") == stored


@pytest.mark.parametrize("make", (trees.eurosat, trees.stanford_cars, trees.imagenet), ids=name_of)
def test_stored_samples_stay_valid_when_the_data_move(make, tmp_path):
    tree = make(tmp_path / "a")
    before = found(build(tmp_path / "a", tree.name).train_x, tmp_path / "a", tree)
    root = (tmp_path / "a").rename(tmp_path / "b")
    stored = sample_file(root, tree)
    time, rows = stored.stat().st_mtime_ns, json.loads(stored.read_text())
    assert all(row[0].startswith(f"{tree.folder}/") for row in rows["train"])  # relative to the data root
    assert found(build(root, tree.name).train_x, root, tree) == before
    assert stored.stat().st_mtime_ns == time
    stored.write_text(json.dumps({**rows, "train": rows["train"][::-1]}))
    assert found(build(root, tree.name).train_x, root, tree) == before[::-1]  # it is what is read


def test_a_sample_of_another_split_or_a_damaged_one_is_replaced(tmp_path, capsys):
    tree = trees.sun397(tmp_path)
    build(tmp_path, tree.name)
    split = naive_split(tree, random.Random(99))
    (tmp_path / tree.folder / tree.split_file).write_text(json.dumps(split))
    expected = expect(tree, split, SHOTS, random.Random(SEED))["train"]
    assert found(build(tmp_path, tree.name).train_x, tmp_path, tree) == expected
    assert "drawn from other images" in capsys.readouterr().out
    stored = sample_file(tmp_path, tree)
    whole = stored.read_text()
    other = whole.replace("sun397/SUN397/", "sun397/../../", 1)
    for content in (whole[:-20], "[]", whole.replace("sun397/SUN397", "x"), other, whole.replace('"train"', '"b"')):
        stored.write_text(content)
        assert found(build(tmp_path, tree.name).train_x, tmp_path, tree) == expected
        assert "it is replaced" in capsys.readouterr().out
        assert stored.read_text() == whole


def test_a_data_root_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """With a split file nothing needs saving; a new split that cannot be saved is refused."""
    tree = trees.dtd(tmp_path)
    split = naive_split(tree, random.Random(1))
    expected = expect(tree, split, SHOTS, random.Random(SEED))["train"]
    (tmp_path / tree.folder / tree.split_file).write_text(json.dumps(split))

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("datasets.splits.write_text", refuse)  # root may write anywhere, so modes would not do
    assert found(build(tmp_path, tree.name).train_x, tmp_path, tree) == expected
    assert "not saved (Permission denied)" in capsys.readouterr().out
    (tmp_path / tree.folder / tree.split_file).unlink()
    assert "make the folder writable once" in message(tmp_path, tree.name)


def test_two_processes_make_split_and_sample_at_once(tmp_path):
    tree = trees.ucf101(tmp_path)
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=build, args=(tmp_path, tree.name, SHOTS, "all", seed)) for seed in (1, 2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    stored = json.loads((tmp_path / "ucf101" / tree.split_file).read_text())
    split = {part: [tuple(row) for row in rows] for part, rows in stored.items()}
    for seed in (1, 2):
        data = build(tmp_path, tree.name, SHOTS, "all", seed)
        assert set(found(data.train_x, tmp_path, tree)) <= set(split["train"])
        assert found(data.test, tmp_path, tree) == split["test"]
    assert {path.name for path in (tmp_path / "ucf101").rglob(".*")} <= {f".{tree.split_file}.lock"}


def test_a_class_with_fewer_images_than_shots(tmp_path, capsys):
    """As in CoOp all of its images are taken, once, with a warning."""
    tree = trees.eurosat(tmp_path)
    data = build(tmp_path, tree.name, 6)
    counts = [sum(item.label == label for item in data.train_x) for label in range(5)]
    assert counts == [5, 6, 6, 6, 6]  # halves of 10, 11, 12, 13, 14, rounded
    assert 'Warning: 1 of 5 classes have fewer than 6 training images: "Annual Crop Land" 5' in capsys.readouterr().out


def _init(self, impath, label, classname):
    self._impath, self._label, self._domain, self._classname = impath, label, 0, classname


# Like Dassl.pytorch's: attributes in a dictionary
Pickled = type("Datum", (), {"__init__": _init, "__module__": "dassl.data.datasets.base_dataset"})


@pytest.fixture
def pickled(monkeypatch):
    """``dump(path, {part: rows}, root)`` writes what CoOp writes."""
    module = sys.modules["dassl.data.datasets.base_dataset"]

    def dump(path, parts, root):
        path.parent.mkdir(exist_ok=True)
        content = {p: [Pickled(f"{root}/{f}", label, c) for f, label, c in rows] for p, rows in parts.items()}
        with monkeypatch.context() as patch:
            patch.setattr(module, "Datum", Pickled)
            path.write_bytes(pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL))

    return dump


@pytest.mark.parametrize("root", ["/home/someone/data/oxford_pets/images", r"D:\data\oxford_pets\images"])
def test_a_pickle_of_coop_is_honoured(root, pickled, tmp_path):
    tree = trees.oxford_pets(tmp_path)
    build(tmp_path, tree.name, -1)
    split = naive_split(tree, random.Random(SEED))
    chosen = {"train": split["train"][1::3], "val": split["val"][::2]}
    pickled(sample_file(tmp_path, tree, ending="pkl"), chosen, root)
    data = build(tmp_path, tree.name)
    assert found(data.train_x, tmp_path, tree) == chosen["train"]
    assert found(data.val, tmp_path, tree) == chosen["val"]


def test_the_order_of_coop_s_listing_of_imagenet_counts(pickled, tmp_path):
    tree = trees.imagenet(tmp_path)
    rows = list(tree.parts["train"])
    random.Random(3).shuffle(rows)
    rows.sort(key=lambda row: row[1])
    parts = {"train": rows, "test": tree.parts["test"]}
    pickled(tmp_path / "imagenet" / "preprocessed.pkl", parts, "/elsewhere/imagenet/images")
    data = build(tmp_path, tree.name)
    assert found(data.train_x, tmp_path, tree) == naive_sample(rows, SHOTS, random.Random(SEED))
    assert found(data.test, tmp_path, tree) == tree.parts["test"]


def test_a_pickle_that_is_not_of_this_data_set(pickled, tmp_path):
    tree = trees.oxford_pets(tmp_path)
    split = naive_split(tree, random.Random(SEED))
    build(tmp_path, tree.name, -1)
    path = sample_file(tmp_path, tree, ending="pkl")
    stranger = ("Unknown_1.jpg", 0, "abyssinian")
    mislabelled = (split["train"][0][0], 1, "abyssinian")
    for parts in ({"train": [stranger], "val": []}, {"train": [mislabelled], "val": []}, {"train": split["train"]}):
        pickled(path, parts, "/data")
        assert str(path) in message(tmp_path, tree.name)
    for content in (b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"train": [1], "val": []})):
        path.write_bytes(content)
        assert f"{path}: not a list of images" in message(tmp_path, tree.name)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(Malicious.mark),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"train": [x], "val": []}])
def test_a_malicious_pickle_executes_nothing(protocol, wrap, tmp_path):
    tree = trees.oxford_pets(tmp_path)
    build(tmp_path, tree.name, -1)
    Malicious.mark = tmp_path / "executed"
    path = sample_file(tmp_path, tree, ending="pkl")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(wrap(Malicious()), protocol=protocol))
    assert str(path) in message(tmp_path, tree.name)
    assert not Malicious.mark.exists()
    pickle.loads(path.read_bytes())  # it would have
    assert Malicious.mark.exists()


@pytest.mark.parametrize("make", trees.ALL, ids=name_of)
def test_no_folder_no_images(make, tmp_path):
    tree = make(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    assert str(tmp_path / "bad" / tree.folder) in message(tmp_path / "bad", tree.name)
    (tmp_path / "bad" / tree.folder).mkdir()
    assert str(tmp_path / "bad" / tree.folder) in message(tmp_path / "bad", tree.name)
    if tree.images:  # everything but the images
        shutil.rmtree(tmp_path / "good" / tree.folder / tree.images)
        said = message(tmp_path / "good", tree.name)
        assert str(tmp_path / "good" / tree.folder / tree.images) in said and "unpack" in said
        (tmp_path / "good" / tree.folder / tree.images).mkdir()
        assert str(tmp_path / "good" / tree.folder / tree.images) in message(tmp_path / "good", tree.name)


@pytest.mark.parametrize("make", trees.ALL, ids=name_of)
def test_annotations_that_are_missing_or_damaged(make, tmp_path):
    tree = make(tmp_path)
    for name in tree.raw:
        path = tmp_path / tree.folder / name
        content = path.read_bytes()
        path.unlink()
        assert f"{path}: no such file" in message(tmp_path, tree.name)
        path.write_bytes(b"one two three four five six\n")
        assert str(tmp_path / tree.folder) in message(tmp_path, tree.name)
        path.write_bytes(b"")
        assert str(tmp_path / tree.folder) in message(tmp_path, tree.name)
        path.write_bytes(content)
    build(tmp_path, tree.name)


@pytest.fixture
def caltech(data_root, tmp_path):
    """A copy of a miniature Caltech101 with a split file, and a function that changes the file."""
    root = shutil.copytree(data_root, tmp_path / "data")
    path = root / "caltech-101" / "split_zhou_Caltech101.json"
    split = json.loads(path.read_text())

    def edit(change):
        path.write_text(json.dumps({part: change(part, [tuple(row) for row in rows]) for part, rows in split.items()}))
        return message(root, "Caltech101")

    return root, path, edit


def test_user_mistakes_are_named(caltech, tmp_path):
    root, _, _ = caltech
    assert str(tmp_path / "none") in message(tmp_path / "none", "Caltech101")
    assert "--root" in message("", "Caltech101")
    assert "all, base, new" in message(root, "Caltech101", 1, "old")
    caltech_tree(tmp_path / "one", NAMES[:1], train=1, val=1, test=1)
    assert "SUBSAMPLE_CLASSES new" in message(tmp_path / "one", "Caltech101", 1, "new")
    victim = root / "caltech-101" / "101_ObjectCategories" / "face" / "image_0009.jpg"  # a test image
    victim.unlink()
    assert str(victim) in message(root, "Caltech101")
    trees.food101(tmp_path)
    for path in list((tmp_path / "food-101/images/sushi").iterdir())[1:]:
        path.unlink()
    assert 'class "sushi" has 1 image' in message(tmp_path, "Food101")
    images = tmp_path / trees.imagenet_r(tmp_path).folder / "imagenet-r"
    folder = images / "n01491361"
    folder.mkdir()
    assert "no images of n01491361" in message(tmp_path, "ImageNetR")
    shutil.copy(images / "n01440764/0.jpg", folder.rename(images / "n99999999"))
    assert '"n99999999"' in message(tmp_path, "ImageNetR")


def test_split_files_that_are_malformed(caltech):
    root, path, _ = caltech
    item = '{"train": [["a.jpg", %s]], "val": [], "test": []}'
    wrong = [item % row for row in ("0", "0, 42", "0, null", '-1, "face"', '"zero", "face"', '0.5, "face"')]
    for content in ("{", "[1, 2]", '{"train": []}', *wrong):
        path.write_text(content)
        assert f"{path}: not a split file" in message(root, "Caltech101")


def test_classes_without_images_or_with_two_names(caltech):
    root, path, edit = caltech
    said = edit(lambda part, rows: [row for row in rows if part != "train" or row[1] != 3])
    assert str(path) in said and 'class 3 ("electric guitar")' in said
    assert "class 3 has no" in edit(lambda part, rows: [row for row in rows if row[1] != 3])
    assert "class 0 has no" in edit(lambda part, rows: [(image, label + (label < 3), "x") for image, label, _ in rows])
    assert "one name" in edit(lambda part, rows: [(i, label - (part == "train"), n) for i, label, n in rows if label])
    assert "empty class name" in edit(lambda part, rows: [(i, label, n if label else "_") for i, label, n in rows])
    assert "no training images" in edit(lambda part, rows: [] if part == "train" else rows)
    assert "no test images" in edit(lambda part, rows: [] if part == "test" else rows)
