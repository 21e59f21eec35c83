"""Numbers that would look plausible and be wrong are refused, or carry a warning in the log and in ``results.json``."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, start
from dassl.config import get_cfg_default
from dassl.data.datasets import build_dataset
from PIL import Image
from tiny import NAMES, arguments, clip_state_dict
from torch.utils.data import DataLoader, SequentialSampler

from datasets.splits import read_split
from train import extend_cfg
from trainers.prompting import loading
from trainers.prompting.backbone import load_clip
from trainers.prompting.checkpoint import BEST
from trainers.prompting.data import MAX_ASPECT, handle_last_batch, read_image
from trainers.prompting.errors import UserError
from trainers.prompting.evaluation import FewShotFeatures, at_chance, check_scores, evaluate
from trainers.prompting.feature_store import FeatureStore
from trainers.prompting.method import Comparison
from trainers.prompting.results import described
from trainers.prompting.results import main as print_results


@pytest.fixture(scope="module")
def folder(data_root, tmp_path_factory):
    """Three classes as train/ and test/ folders, without validation images."""
    root = tmp_path_factory.mktemp("own")
    for name in NAMES[:3]:
        images = sorted((data_root / "caltech-101" / "101_ObjectCategories" / name).iterdir())
        for part, some in (("train", images[:5]), ("test", images[5:9])):
            for image in some:
                (root / part / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(image, root / part / name)
    return root


def own(folder, rn_file, out, *opts, trainer="CoOp", flags=()):
    """A run on a folder of images."""
    argv = arguments(trainer, folder, rn_file, out, "DATASET.SUBSAMPLE_CLASSES", "all", *opts, flags=flags)
    argv[argv.index("--dataset-config-file") + 1] = str(ROOT / "configs" / "datasets" / "folder.yaml")
    return start(argv)


# ------------------------------------------------------------------------------------------------- validation images


@pytest.mark.parametrize("key, value", [("TEST.FINAL_MODEL", "best_val"), ("TEST.SPLIT", "val")])
def test_nothing_is_chosen_or_measured_on_missing_validation_images(folder, rn_file, tmp_path, key, value):
    found = own(folder, rn_file, tmp_path / "run", key, value)
    assert found.status == 2 and found.error.count("\n") == 1
    assert f"{key} {value}" in found.error and "no validation images of its own" in found.error
    assert (
        not (tmp_path / "run" / "results.json").exists() and not (tmp_path / "run" / "prompt_learner" / BEST).exists()
    )


# ------------------------------------------------------------------------------------------------- not a number


def test_weights_that_are_not_finite_are_refused_by_file_and_name(tmp_path):
    state = clip_state_dict("rn")
    state["visual.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "damaged.pt")
    with pytest.raises(UserError, match=r"visual\.conv1\.weight in .*damaged\.pt is not finite"):
        load_clip(str(tmp_path / "damaged.pt"))


def test_checkpoint_that_is_not_finite_is_refused_by_file_and_key(run, tmp_path):
    trained = run("CoOp", out="trained")
    path = trained.checkpoints / "model.pth.tar-2"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["ctx"][0, 0] = float("inf")
    torch.save(checkpoint, path)
    found = run("CoOp", out="test", flags=["--eval-only", "--model-dir", tmp_path / "trained"], status=2)
    assert str(path) in found.error and "ctx is not finite" in found.error


def test_scores_that_are_not_numbers_name_the_image():
    scores = torch.tensor([[0.0, -torch.inf], [1.0, 2.0], [float("nan"), 3.0]])
    check_scores(scores[:2], ["a", "b"])
    for bad in (scores, torch.full((3, 2), -torch.inf), torch.full((3, 2), torch.inf)):
        with pytest.raises(UserError, match="c.png: its scores" if bad is scores else "a.png: its scores"):
            check_scores(bad, ["a.png", "b.png", "c.png"])


def test_features_that_are_not_numbers_are_neither_fitted_nor_stored(tmp_path):
    images = [{"img": torch.zeros(2, 3), "label": torch.tensor([0, 1]), "impath": ["good.png", "bad.png"]}]
    bad = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])
    data = SimpleNamespace(train_x=[], val=[], test=[])
    with pytest.raises(UserError, match="bad.png: its features"):
        FewShotFeatures(data, "X", lambda items, view: images, lambda _: bad).train_features()
    store = FeatureStore(str(tmp_path / "f"), b"encoder")
    store.put([b"good", b"bad"], bad)
    store.flush()
    assert [value is None for value in store.get([b"good", b"bad"])] == [False, True]


# ------------------------------------------------------------------------------------------------- flags and settings


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model-dir", "x"], "--model-dir: names a model to evaluate; add --eval-only"),
        (["--load-epoch", "3"], "--load-epoch: names a model to evaluate; add --eval-only"),
        (["DATASET.NUM_SHOTS", "1", "--backbone", "tiny"], "--backbone: flags must come before the KEY VALUE pairs"),
        (["SEED", "1", "--eval-only"], "--eval-only: flags must come before the KEY VALUE pairs"),
    ],
)
def test_flags_without_effect_are_refused(data_root, rn_file, tmp_path, words, message):
    argv = arguments("CoOp", data_root, rn_file, tmp_path / "run", *([] if words[0].startswith("--") else words))
    found = start(argv if not words[0].startswith("--") else [*words, *argv])
    assert found.status == 2 and message in found.error and found.error.count("\n") == 1


def test_missing_output_folder_is_refused(data_root, rn_file):
    argv = arguments("CoOp", data_root, rn_file, "x")
    at = argv.index("--output-dir")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", sys.stdout)
        from train import main

        assert main(argv[:at] + argv[at + 2 :]) == 2


def test_seed_0_is_a_seed(run):
    runs = [run("CoOp", "TRAINER.COOP.CTX_INIT", "", out=str(i), seed=0) for i in range(2)]
    assert runs[0].results["run"]["seed"] == 0
    assert torch.equal(*(found.checkpoint(2)["state_dict"]["ctx"] for found in runs))


def test_results_of_a_loaded_model_name_the_shots_and_seed_of_its_training(run, tmp_path):
    trained = run("CoOp", out="train").results["run"]
    run(
        "CoOp",
        "DATASET.NUM_SHOTS",
        -1,
        "SEED",
        -1,
        out="test",
        flags=["--eval-only", "--model-dir", tmp_path / "train"],
    )
    found = json.loads((tmp_path / "test" / "results.json").read_text())["run"]
    assert (found["shots"], found["seed"]) == (trained["shots"], trained["seed"]) == (4, 1)


def test_other_settings_than_in_training_are_warned_of(run, tmp_path):
    run("CoOp", out="trained")
    flags = ["--eval-only", "--model-dir", tmp_path / "trained"]
    same = run("CoOp", out="same", flags=flags).results["warnings"]
    found = run("CoOp", "TRAINER.COOP.CLASS_TOKEN_POSITION", "front", out="front", flags=flags)
    assert not [line for line in same if "was trained" in line]
    (warning,) = [line for line in found.results["warnings"] if "was trained" in line]
    assert warning == "the model was trained with TRAINER.COOP.CLASS_TOKEN_POSITION end, now it is front"
    assert warning in found.log


def test_other_weights_or_another_method_are_refused(run, data_root, tmp_path):
    run("CoOp", out="trained")
    torch.save(clip_state_dict("rn", seed=1), tmp_path / "other.pt")
    flags = ["--eval-only", "--model-dir", tmp_path / "trained"]
    found = start(arguments("CoOp", data_root, tmp_path / "other.pt", tmp_path / "a", flags=flags))
    assert found.status == 2 and "was trained with other CLIP weights" in found.error
    found = run("LoGoPrompt", "TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic", out="b", flags=flags, status=2)
    assert "was trained with --trainer CoOp, not LoGoPrompt" in found.error


@pytest.mark.parametrize("key, value", [("PIXEL_MEAN", "[0.5, 0.5, 0.5]"), ("PIXEL_STD", "[1.0, 1.0, 1.0]")])
def test_normalisation_must_be_the_backbone_s(run, key, value):
    found = run("CoOp", f"INPUT.{key}", value, status=2)
    backbone = {"PIXEL_MEAN": "0.48145466", "PIXEL_STD": "0.26862954"}[key]
    assert f"INPUT.{key} ({value[1:-1]})" in found.error and backbone in found.error


def test_normalisation_may_not_be_missing(run):
    assert "lacks normalize" in run("CoOp", "INPUT.TRANSFORMS", "['random_flip']", status=2).error


def test_activation_follows_the_config_next_to_the_weights_or_the_option(tmp_path, capsys):
    torch.save(clip_state_dict("vit"), tmp_path / "open_clip_pytorch_model.bin")
    path = str(tmp_path / "open_clip_pytorch_model.bin")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    quick, gelu = (load_clip(path, quick_gelu=choice).encode_image(images) for choice in (True, False))
    assert not torch.allclose(quick, gelu)
    config = tmp_path / "open_clip_config.json"
    for settings, expected in (({}, gelu), ({"quick_gelu": True}, quick)):
        config.write_text(json.dumps({"model_cfg": settings}))
        assert torch.equal(load_clip(path).encode_image(images), expected)
        assert str(config) in capsys.readouterr().out
    config.write_text("[]")
    with pytest.raises(UserError, match="open_clip_config.json"):
        load_clip(path)


# ------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("size", [(200_000, 1), (1, 3 * MAX_ASPECT)])
def test_thin_images_are_refused_by_everybody(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "thin.png")
    with pytest.raises(OSError, match=r"thin\.png: .*too long and thin"):
        read_image(str(tmp_path / "thin.png"))
    Image.new("RGB", (MAX_ASPECT, 1)).save(tmp_path / "wide.png")
    assert read_image(str(tmp_path / "wide.png")).size == (MAX_ASPECT, 1)


def test_images_left_out_of_every_epoch_are_reported_or_used(capsys):
    loader = DataLoader(range(10), batch_size=4, sampler=SequentialSampler(range(10)), drop_last=True)
    assert handle_last_batch(loader, drop_last=True) is loader and "2 of 10" in capsys.readouterr().out
    assert sorted(torch.cat(list(handle_last_batch(loader, drop_last=False))).tolist()) == list(range(10))
    whole = DataLoader(range(8), batch_size=4, drop_last=True)
    assert handle_last_batch(whole, drop_last=True) is whole and not capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- what was learned


def test_training_that_is_all_warm_up_is_warned_of(run, tmp_path, capsys):
    found = run("CoOp", "OPTIM.MAX_EPOCH", 1, out="base")
    (warning,) = found.results["warnings"]
    assert "all epochs are warm-up" in warning and "raise OPTIM.MAX_EPOCH above 1" in warning
    assert found.log.splitlines()[-1].endswith(warning)
    two = run("LoGoPrompt", "OPTIM.MAX_EPOCH", 2, out="two")
    assert "until every stage has more than 1" in two.results["warnings"][0]
    stages = [line for line in two.log.splitlines() if line.startswith("Stage ")]
    assert stages == [f"Stage {n} of 2: epochs {n} to {n}, learning rate 0.002" for n in (1, 2)]
    print_results([str(tmp_path / "base"), str(tmp_path / "base")])
    assert capsys.readouterr().out.count(warning) == 2  # what the scripts print


class Constant:
    """A method that predicts one class, whatever the image."""

    def __init__(self, n_classes):
        self.n_classes, self.classnames = n_classes, [""] * n_classes

    def text_features(self):
        return None

    def compare(self, images, text_features):
        scores = torch.zeros(len(images.paths), self.n_classes)
        return Comparison(scores, scores, scores)


class Accuracy:
    def reset(self):
        self.right = []

    def process(self, scores, label):
        self.right += (scores.argmax(dim=1) == label).tolist()

    def evaluate(self):
        return {"accuracy": 100 * sum(self.right) / len(self.right)}


class Paths(list):
    @property
    def paths(self):
        return list(self)


@pytest.mark.parametrize(
    "labels, n_classes, expected",
    [
        ([0, 1, 2], 3, "every image"),
        ([0, 0, 0], 3, None),
        ([0, 0, 0], 1, "one class to choose from"),
        ([0] * 50, 2, None),
        ([1] * 21, 2, "guessing (chance is 50.0 %)"),
        ([1] * 20, 2, None),
    ],
)
def test_meaningless_accuracies_are_warned_of(labels, n_classes, expected, capsys):
    batches = [(Paths(f"{i}.png" for i in range(len(labels))), torch.tensor(labels))]
    found = evaluate(Constant(n_classes), batches, Accuracy(), "test", len(labels))
    assert len(found.warnings) == (expected is not None)
    assert all(expected in warning and warning in capsys.readouterr().out for warning in found.warnings)


@pytest.mark.parametrize("right, images, n_classes, expected", [
    (4, 100, 50, False),  # chance is 2 % with a standard error of 1.4 %
    (3, 100, 50, True),
    (0, 100, 50, True),
    (0, 20, 50, False),
    (12, 21, 2, True),
    (13, 21, 2, False),
])  # fmt: skip
def test_accuracy_at_chance(right, images, n_classes, expected):
    assert at_chance(100 * right / images, images, n_classes) == expected


def test_what_was_not_asked_for_is_named():
    assert described({"shots": 0, "seed": -1}) == "all training images, no seed"
    assert described({"shots": 1, "seed": 0}) == "1 shot, seed 0"
    assert described({"shots": 16, "seed": 3}) == "16 shots, seed 3"


def test_bfloat16_needs_a_cpu_that_has_it(run, monkeypatch):
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)
    found = run("CoOp", "TRAINER.COOP.PREC", "bf16", "OPTIM.MAX_EPOCH", 1)
    assert "PREC bf16 needs a CPU with bfloat16 instructions: computing in float32" in found.log
    assert found.trainer.backbone.dtype == torch.float32


# ------------------------------------------------------------------------------------------------- data sets


def copies(data_root, folder, count=4, ending=".jpg"):
    """A class folder of images with an ending."""
    folder.mkdir(parents=True)
    images = sorted((data_root / "caltech-101" / "101_ObjectCategories" / "cup").iterdir())[:count]
    for i, image in enumerate(images):
        with Image.open(image) as opened:
            opened.save(folder / f"{i}{ending}", {".gif": "GIF", ".webp": "WEBP"}.get(ending, "JPEG"))
    return folder


def test_every_ending_that_pillow_decodes_is_an_image_and_others_are_named(data_root, rn_file, tmp_path):
    endings = (".jfif", ".jpe", ".gif", ".JPG", ".webp")
    for ending in endings:
        copies(data_root, tmp_path / "own" / ending[1:], ending=ending)
    (tmp_path / "own" / "jpe" / "notes.txt").touch()
    copies(data_root, tmp_path / "own" / "jpe" / "@eaDir")  # thumbnails of a NAS
    copies(data_root, tmp_path / "own" / "@eaDir")
    found = own(tmp_path / "own", rn_file, tmp_path / "run", "OPTIM.MAX_EPOCH", 1)
    assert found.status == 0, found.error
    dataset = found.trainer.dm.dataset
    assert len(dataset.classnames) == len(endings)
    assert sum(map(len, (dataset.train_x, dataset.val or [], dataset.test))) == 4 * len(endings)
    assert "1 file(s) that Pillow cannot decode" in found.log and ".txt" in found.log and "notes.txt" in found.log


@pytest.mark.parametrize("mark", [" ", "\t", ",", ", ", ";"])
def test_classnames_with_a_byte_order_mark_and_other_separators(data_root, rn_file, tmp_path, mark):
    for name in ("1", "2"):
        copies(data_root, tmp_path / "own" / name)
    (tmp_path / "own" / "classnames.txt").write_text(f"1{mark}a star\n2{mark}big boat\n", encoding="utf-8-sig")
    found = own(tmp_path / "own", rn_file, tmp_path / "run", "OPTIM.MAX_EPOCH", 1)
    assert found.status == 0 and found.trainer.classnames == ["a star", "big boat"]


def test_split_with_a_byte_order_mark_and_backslashes(tmp_path):
    rows = [["cup\\1.jpg", 0, "cup"]]
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": rows, "val": rows, "test": rows}), encoding="utf-8-sig")
    assert read_split(str(path))["train"][0].path == "cup/1.jpg"


def test_split_made_from_incomplete_data_is_reported(tmp_path, capsys):
    tree = eurosat(tmp_path)
    shutil.move(tree / "Forest", tmp_path / "Forest")
    build(tmp_path, "eurosat")
    assert "was made from other files" not in capsys.readouterr().out
    build(tmp_path, "eurosat")
    assert "was made from other files" not in capsys.readouterr().out
    shutil.move(tmp_path / "Forest", tree / "Forest")
    build(tmp_path, "eurosat")
    assert "was made from other files" in capsys.readouterr().out


def test_split_of_missing_images_is_not_saved(tmp_path):
    folder = tmp_path / "dtd"
    for name in ("blotchy", "woven"):
        for i in range(10):
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / "images" / name / f"{i}.jpg")
    (folder / "images" / "woven" / "0.jpg").unlink()
    with pytest.MonkeyPatch.context() as patch:  # annotations that name an image that is not there
        patch.setattr("datasets.base.list_images", lambda path: [f"{i}.jpg" for i in range(10)])
        with pytest.raises(UserError, match=r"woven.0\.jpg"):
            build(tmp_path, "dtd")
    assert not list(folder.glob("split_zhou*.json"))


def eurosat(root):
    """A miniature of EuroSAT's folders, without a split file."""
    tree = root / "eurosat" / "2750"
    for name in ("AnnualCrop", "Forest", "Highway"):
        for i in range(10):
            (tree / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tree / name / f"{i}.jpg")
    return tree


def build(root, config):
    """Build a data set from its config file."""
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "datasets" / f"{config}.yaml"))
    cfg.DATASET.ROOT, cfg.SEED = str(root), 1
    return build_dataset(cfg)


def test_changed_folders_of_imagenet_name_the_folder_or_the_stale_file(tmp_path):
    tree = tmp_path / "imagenet"
    for part, names in (("train", ("n01", "n02", "n03")), ("val", ("n01", "n03"))):
        for name in names:
            (tree / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tree / "images" / part / name / "a.JPEG")
    (tree / "classnames.txt").write_text("n01 tench\nn02 goldfish\nn03 shark\n")
    with pytest.raises(UserError, match="n02 is in train/ and not in val/"):
        build(tmp_path, "imagenet")
