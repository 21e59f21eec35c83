"""feature_store.py: stored features change no prediction, survive kills and other writers, and never mix images up."""

import json
import multiprocessing
import os
import shutil
import sqlite3
import time
from contextlib import closing

import pytest
import torch
from helpers import Runs

from trainers.prompting import feature_store
from trainers.prompting.backbone import Backbone, load_clip
from trainers.prompting.feature_store import FeatureStore, NotAStore, connect, digest, encoder_key, image_key


class Evaluations:
    """Evaluations of trained models; each returns metrics, predictions and how many images the encoder has seen."""

    def __init__(self, data_root, backbone, folder, models):
        self.runs, self.models = Runs(data_root, backbone, folder), models
        self.store, self.encoded = folder / "store.sqlite", []

    def options(self, trainer):
        return ("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic") if trainer == "LoGoPrompt" else ()

    def model(self, trainer, *opts, seed=1):
        """The run folder of a model, trained once for all tests."""
        out = self.models / "-".join(map(str, (trainer, seed, *opts)))
        if not out.exists():
            opts = ("TEST.NO_TEST", True, "OPTIM.LR", 2.0, "DATALOADER.TEST.BATCH_SIZE", 100, *opts)
            self.runs(*self.options(trainer), *opts, trainer=trainer, seed=seed, out=out)
        return out

    def __call__(self, trainer="LoGoPrompt", *opts, store=True, seed=1, out="out", model=""):
        flags = ["--eval-only"]
        if trainer != "ZeroshotCLIP":
            flags = self.runs.evaluation(model or self.model(trainer, *opts, seed=seed))
        if store:
            opts = ("TEST.FEATURES", self.store, *opts)
        self.encoded.clear()
        built = self.runs(*self.options(trainer), *opts, trainer=trainer, seed=seed, out=out, flags=flags)
        evaluation = built.evaluation
        return evaluation.metrics, dict(sorted(evaluation.predictions.items())), sum(self.encoded)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def evaluate(data_root, rn_file, tmp_path, models, monkeypatch):
    evaluations, encode_image = Evaluations(data_root, rn_file, tmp_path, models), Backbone.encode_image

    def count(self, x):
        evaluations.encoded.append(len(x) if x.any() else 0)  # loading encodes a blank image
        return encode_image(self, x)

    monkeypatch.setattr(Backbone, "encode_image", count)
    return evaluations


def number_of_features(path):
    with closing(connect(str(path))) as db:
        return db.execute("SELECT count(*) FROM features").fetchone()[0]


@pytest.mark.parametrize("trainer", ["CoCoOp", "LoGoPrompt", "ZeroshotCLIP"])
def test_second_evaluation_encodes_nothing_and_predicts_the_same(evaluate, tmp_path, trainer):
    plain = evaluate(trainer, store=False)
    first, second = evaluate(trainer, out="first"), evaluate(trainer, out="second")
    assert plain[:2] == first[:2] == second[:2]
    assert plain[2] == first[2] == 16 * (1 + 4 if trainer == "LoGoPrompt" else 1)  # four classes, so K is 4
    assert second[2] == 0
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("first", "second")]
    assert all(found["run"].pop("seconds") for found in results) and results[0] == results[1]


def test_seeds_and_methods_share_features(evaluate):
    """Originals are encoded once, and a pair of image and class once."""
    options = ("TRAINER.LOGOPROMPT.K", 2)
    plain = [evaluate("LoGoPrompt", *options, store=False, seed=seed) for seed in (1, 2)]
    first, second = (evaluate("LoGoPrompt", *options, seed=seed) for seed in (1, 2))
    assert [first[:2], second[:2]] == [plain[0][:2], plain[1][:2]]
    stored = number_of_features(evaluate.store)
    assert first[2] == 16 * (1 + 2) and second[2] == stored - first[2] > 0
    assert evaluate("CoOp")[2] == 0
    assert evaluate("LoGoPrompt", *options)[:2] == first[:2]


@pytest.mark.parametrize(
    "key, value",
    [("TRAINER.LOGOPROMPT.VISUAL_SEED", 5), ("TRAINER.LOGOPROMPT.LOCATION", "top"),
     ("TRAINER.LOGOPROMPT.PREC", "bf16"), ("INPUT.INTERPOLATION", "bilinear")],
)  # fmt: skip
def test_other_settings_have_their_own_features(evaluate, key, value):
    model = evaluate.model("LoGoPrompt")
    evaluate(model=model)
    plain = evaluate("LoGoPrompt", key, value, store=False, model=model)
    stored = evaluate("LoGoPrompt", key, value, model=model)
    assert stored[:2] == plain[:2]
    assert stored[2] >= 16  # other blocks, places, preprocessing or precision
    assert evaluate("LoGoPrompt", key, value, model=model) == (*plain[:2], 0)


def test_features_of_tuned_blocks_are_not_stored(evaluate):
    first, second = (evaluate("LoGoPrompt", "TRAINER.LOGOPROMPT.TUNE_VISUAL", True) for _ in range(2))
    assert first[:2] == second[:2]
    assert number_of_features(evaluate.store) == 16  # the originals


def test_changed_file_is_encoded_again(evaluate, tmp_path):
    evaluate.runs.data_root = shutil.copytree(evaluate.runs.data_root, tmp_path / "data")
    evaluate("ZeroshotCLIP")
    folder = tmp_path / "data/caltech-101/101_ObjectCategories"
    path = folder / "face/image_0008.jpg"
    path.write_bytes((folder / "cup/image_0008.jpg").read_bytes())
    assert evaluate("ZeroshotCLIP")[2] == 1
    os.utime(path, ns=(1, 1))
    assert evaluate("ZeroshotCLIP")[2] == 1


def test_broken_store_is_reported_once_and_the_run_goes_on(evaluate, tmp_path, monkeypatch):
    plain = evaluate("ZeroshotCLIP", store=False)

    def fail(self):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "_evict", fail)
        patch.setattr(feature_store, "BUFFER", 10)
        assert evaluate("ZeroshotCLIP", out="full")[:2] == plain[:2]
    assert (tmp_path / "full" / "log.txt").read_text().count("features are no longer stored") == 1


def test_other_file_is_refused(tmp_path, evaluate, capsys):
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("not a data base, but longer than the header of one" * 20)
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    for path in (text, other):
        before = path.read_bytes()
        with pytest.raises(NotAStore):
            FeatureStore(str(path), b"a")
        assert path.read_bytes() == before
    evaluate.runs("TEST.FEATURES", text, trainer="ZeroshotCLIP", flags=["--eval-only"], status=2)
    assert capsys.readouterr().err.splitlines()[-1].endswith("name another file")


def rows_of(n, width=4, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def keys_of(n, *more):
    return [digest(i, *more) for i in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_are_stored_to_the_bit(tmp_path, dtype):
    store, values = FeatureStore(str(tmp_path / "f"), b"a"), rows_of(1200).to(dtype)
    store.put(keys_of(1200), values)
    for _ in range(2):  # from the buffer, then from the file
        found = store.get(keys_of(1200) + keys_of(3, "other"))
        assert torch.equal(torch.stack(found[:1200]), values) and found[1200:] == [None] * 3
        assert found[0].dtype == dtype
        store.flush()
    store.close()
    assert torch.equal(torch.stack(FeatureStore(str(tmp_path / "f"), b"a").get(keys_of(1200))), values)
    assert FeatureStore(str(tmp_path / "f"), b"b").get(keys_of(3)) == [None] * 3  # of another encoder


def test_look_up_encodes_what_is_missing(tmp_path):
    store, values, asked = FeatureStore(str(tmp_path / "f"), b"a"), rows_of(6), []

    def encode(positions):
        asked.append(positions)
        return values[positions]

    assert torch.equal(store.look_up(keys_of(6)[:3], lambda rows: values[rows]), values[:3])
    assert torch.equal(store.look_up(keys_of(6)[::-1], lambda rows: encode([5 - i for i in rows])), values.flip(0))
    assert torch.equal(store.look_up(keys_of(2, "x"), encode, store=False), values[:2])
    assert torch.equal(store.look_up(keys_of(2, "x"), encode), values[:2])
    values[1, 2] = torch.nan
    store.look_up(keys_of(3, "bad"), encode)
    values[1, 2] = 0
    store.look_up(keys_of(3, "bad"), encode)  # values that are not finite were not stored
    assert asked == [[5, 4, 3], [0, 1], [0, 1], [0, 1, 2], [1]]


def test_keys_depend_on_every_part(rn_file):
    assert len({digest("a", "b"), digest("ab"), digest("a", b"b", ""), digest("b", "a")}) == 4
    assert image_key(__file__, "a") != image_key(__file__, "b")
    visual = load_clip(rn_file).visual
    keys = {encoder_key(visual, *words) for words in (("t", "fp32", "cpu"), ("u", "fp32", "cpu"), ("t", "fp16", "cpu"))}
    with torch.no_grad():
        visual.bn1.running_mean[0] += 1e-6
    keys |= {encoder_key(visual, "t", "fp32", device) for device in ("cpu", "cuda")}
    assert len(keys) == 5


def test_oldest_features_are_removed_beyond_the_limit(tmp_path):
    limit = 200_000
    store = FeatureStore(str(tmp_path / "f"), b"a", limit=limit)
    for i in range(40):
        store.put(keys_of(100, i), rows_of(100, 128, i))  # 50 kB each time
        store.flush()
    assert os.path.getsize(tmp_path / "f") < 2 * limit
    assert store.get(keys_of(100, 0)) == [None] * 100
    assert torch.equal(torch.stack(store.get(keys_of(100, 39))), rows_of(100, 128, 39))


def write_groups(path, first, last, started):
    store = FeatureStore(str(path), b"a")
    started.set()
    for i in range(first, last):
        store.put([digest(i, j) for j in range(50)], rows_of(50, 64, i))
        store.flush()
    store.close()


def writer(path, first, last):
    """A started process that writes groups of 50 features."""
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    process = fork.Process(target=write_groups, args=(path, first, last, started))
    process.start()
    assert started.wait(60)
    return process


def complete_groups(path, last):
    """Numbers of the groups of 50 features that are stored; each must be complete and have its own values."""
    store, complete = FeatureStore(str(path), b"a"), []
    for i in range(last):
        found = store.get([digest(i, j) for j in range(50)])
        if found[0] is None:
            assert found == [None] * 50
        else:
            assert torch.equal(torch.stack(found), rows_of(50, 64, i))
            complete.append(i)
    return complete


def test_several_writers_at_once(tmp_path):
    writers = [writer(tmp_path / "f", first, last) for first, last in ((0, 30), (0, 30), (20, 60))]
    for process in writers:
        process.join(timeout=300)
    assert [process.exitcode for process in writers] == [0, 0, 0]
    assert complete_groups(tmp_path / "f", 60) == list(range(60))


def test_store_survives_killed_writers(tmp_path):
    path = tmp_path / "f"
    for delay in (0.0, 0.02, 0.05):
        process = writer(path, 0, 10**6)
        time.sleep(delay)
        process.kill()
        process.join()
        complete_groups(path, 100)
    process = writer(path, 0, 40)
    process.join(timeout=300)
    assert process.exitcode == 0 and set(range(40)) <= set(complete_groups(path, 60))
