"""Features kept on disk: they change no prediction, survive kills and other writers, and are never another image's."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import arguments, caltech_tree

import train
from trainers.prompting import features
from trainers.prompting.backbone import Backbone, load_clip
from trainers.prompting.features import FeatureStore, NotAStore, clear, describe, digest, encoder_key, image_key

METHODS = ["CoOp", "LoGoPrompt", "ZeroshotCLIP"]


@pytest.fixture
def images(tmp_path):
    return caltech_tree(tmp_path / "data")


@pytest.fixture
def run(images, rn_file, tmp_path, monkeypatch):
    """Evaluate; returns accuracy, predictions, and how many images the encoder has seen."""
    seen = []
    original = Backbone.encode_image
    monkeypatch.setattr(Backbone, "encode_image", lambda self, x: seen.append(len(x)) or original(self, x))
    build = train.build_trainer

    def call(trainer="LoGoPrompt", *opts, store=True, seed=1, out="out", model="", backbone=rn_file):
        built = []
        if trainer != "ZeroshotCLIP" and not model:
            model = trained(trainer, seed, *opts)
        monkeypatch.setattr(train, "build_trainer", lambda cfg: built.append(build(cfg)) or built[0])
        flags = ["--eval-only", *(["--model-dir", model] if model else [])]
        if store:
            opts = ("TEST.FEATURES", tmp_path / "features.sqlite", *opts)
        if trainer == "LoGoPrompt":
            opts = ("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic", *opts)
        argv = arguments(trainer, images, backbone, tmp_path / out, *opts, flags=flags, seed=seed)
        seen.clear()
        assert train.main(argv) == 0
        sys.stdout.flush()  # of the log
        monkeypatch.setattr(train, "build_trainer", build)
        return built[0].metrics, dict(sorted(built[0].predictions.items())), sum(seen)

    def trained(trainer, seed=1, *opts):
        folder = tmp_path / "-".join(map(str, (trainer, seed, *opts)))
        if trainer == "LoGoPrompt":
            opts = ("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic", *opts)
        opts = ("TEST.NO_TEST", True, "OPTIM.LR", 2.0, "DATALOADER.TEST.BATCH_SIZE", 100, *opts)
        if not folder.exists():
            assert train.main(arguments(trainer, images, rn_file, folder, *opts, seed=seed)) == 0
        return str(folder)

    call.trained, call.store = trained, tmp_path / "features.sqlite"
    return call


@pytest.mark.parametrize("trainer", METHODS)
def test_the_second_evaluation_encodes_nothing_and_predicts_the_same(run, trainer):
    model = "" if trainer == "ZeroshotCLIP" else run.trained(trainer)
    plain = run(trainer, store=False, model=model)
    first = run(trainer, model=model)
    second = run(trainer, model=model, out="again")
    assert plain[:2] == first[:2] == second[:2]
    assert plain[2] == first[2] == 16 * (1 + 4 if trainer == "LoGoPrompt" else 1)  # four classes, so K is 4
    assert second[2] == 0
    results = [json.loads((run.store.parent / out / "results.json").read_text()) for out in ("out", "again")]
    assert results[0] == results[1]


@pytest.mark.parametrize("key, value", [("TRAINER.LOGOPROMPT.PREC", "bf16"), ("TRAIN.COMPILE", True)])
def test_other_ways_to_compute_have_features_of_their_own(run, monkeypatch, key, value):
    """bfloat16 and a compiled encoder predict as without a store, and do not take what float32 has left there."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))  # takes a minute
    model = run.trained("LoGoPrompt")
    run(model=model)
    plain = run("LoGoPrompt", key, value, store=False, model=model)
    for encoded in (16 * (1 + 4), 0):
        assert run("LoGoPrompt", key, value, model=model) == (*plain[:2], encoded)
    assert len(compiled) == (3 if key == "TRAIN.COMPILE" else 0)


def test_what_has_to_be_encoded_is_scored_once(run, monkeypatch):
    """CoCoOp's text features are costly: an image whose own features are missing is not scored without them."""
    from trainers.cocoop import CustomCLIP

    scored = []
    original = CustomCLIP.chunked_logits
    monkeypatch.setattr(CustomCLIP, "chunked_logits", lambda self, f: scored.append(len(f)) or original(self, f))
    model = run.trained("CoCoOp")
    for expected in (16, 0):
        scored.clear()
        assert run("CoCoOp", model=model)[2] == expected
        assert sum(scored) == 16


def test_seeds_and_methods_share_what_they_have_in_common(run):
    """Whatever the prompts: originals are encoded once, and a pair of image and class once."""
    models = [run.trained("LoGoPrompt", seed) for seed in (1, 2)]
    options = ("TRAINER.LOGOPROMPT.K", 2)
    plain = [run("LoGoPrompt", *options, store=False, model=model) for model in models]
    first = run("LoGoPrompt", *options, model=models[0])
    second = run("LoGoPrompt", *options, model=models[1], seed=2)
    assert [first[:2], second[:2]] == [plain[0][:2], plain[1][:2]]
    new = len(run_pairs(run)) - 32
    assert new > 0 and second[2] == new  # only pairs that the first had not asked for, and no original
    assert run("CoOp", model=run.trained("CoOp"))[2] == 0
    assert run("LoGoPrompt", *options, model=models[0])[:2] == first[:2]


def run_pairs(run):
    with sqlite3.connect(run.store) as db:
        return db.execute("SELECT key FROM features").fetchall()[16:]


@pytest.mark.parametrize(
    "change",
    [
        ("TRAINER.LOGOPROMPT.VISUAL_SEED", 5),
        ("TRAINER.LOGOPROMPT.BLOCK_HEIGHT", 0.3),
        ("TRAINER.LOGOPROMPT.LOCATION", "top"),
        ("INPUT.TRANSFORMS", ("random_resized_crop",)),
        ("INPUT.INTERPOLATION", "bilinear"),
    ],
)
def test_nothing_is_taken_for_something_else(run, change):
    run()
    plain = run("LoGoPrompt", *change, store=False)
    kept = run("LoGoPrompt", *change)
    assert kept[:2] == plain[:2]
    assert kept[2] >= 16  # other blocks, places or preprocessing have to be encoded


def test_another_image_under_the_same_name_is_encoded(run, images):
    run("ZeroshotCLIP")
    path = next((images / "caltech-101/101_ObjectCategories/face").glob("image_0008.jpg"))
    other = images / "caltech-101/101_ObjectCategories/cup/image_0008.jpg"
    path.write_bytes(other.read_bytes())
    assert run("ZeroshotCLIP")[2] == 1
    os.utime(path, ns=(1, 1))
    assert run("ZeroshotCLIP")[2] == 1


def test_other_weights_have_features_of_their_own(run, tmp_path):
    from tiny import clip_state_dict

    torch.save(clip_state_dict("rn", seed=1), tmp_path / "other.pt")
    run("ZeroshotCLIP")
    assert run("ZeroshotCLIP", backbone=tmp_path / "other.pt")[2] == 16
    assert [(count, name.split(",")[1:]) for name, count, _ in describe(run.store)] == [
        (16, [" 64 pixels", " fp32", " cpu"])
    ] * 2


def test_tuned_blocks_are_not_kept(run):
    options = ("TRAINER.LOGOPROMPT.TUNE_VISUAL", True)
    first, second = run("LoGoPrompt", *options), run("LoGoPrompt", *options)
    assert first[:2] == second[:2]
    assert describe(run.store)[0][1] == 16  # the originals


def test_batches_and_training_change_nothing(run, images, rn_file, tmp_path):
    whole = run()
    clear(run.store)
    assert run("LoGoPrompt", "DATALOADER.TEST.BATCH_SIZE", 3)[:2] == whole[:2]
    assert run("LoGoPrompt", "DATALOADER.TEST.BATCH_SIZE", 5)[2] == 0
    # the best model of a run is chosen by evaluations of the same validation images
    words = ("TEST.FINAL_MODEL", "best_val", "TEST.FEATURES", tmp_path / "val.sqlite")
    states = []
    for opts in (words, words[:2]):
        folder = tmp_path / f"trained{len(opts)}"
        assert train.main(arguments("LoGoPrompt", images, rn_file, folder, *opts)) == 0
        states.append(torch.load(folder / "prompt_learner" / "model.pth.tar-2", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# ------------------------------------------------------------------------------------------------- the store


def rows(n, width=4, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def keys(n, *more):
    return [digest(i, *more) for i in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_put_is_got_to_the_bit(tmp_path, dtype):
    store = FeatureStore(str(tmp_path / "f"), b"a")
    values = rows(1200).to(dtype)
    store.put(keys(1200), values)
    for _ in range(2):  # out of the buffer, then out of the file
        found = store.get(keys(1200) + keys(3, "other"))
        assert torch.equal(torch.stack(found[:1200]), values) and found[1200:] == [None] * 3
        assert found[0].dtype == dtype
        store.flush()
    store.close()
    assert torch.equal(torch.stack(FeatureStore(str(tmp_path / "f"), b"a").get(keys(1200))), values)
    assert FeatureStore(str(tmp_path / "f"), b"b").get(keys(3)) == [None] * 3  # another encoder's


def test_keys_depend_on_every_part(tmp_path, rn_file):
    assert len({digest("a", "b"), digest("ab"), digest("a", b"b", ""), digest("b", "a")}) == 4
    visual = load_clip(rn_file).visual
    base = encoder_key(visual, "tfm", "fp32", "cpu")
    others = [("tfm2", "fp32", "cpu"), ("tfm", "fp16", "cpu"), ("tfm", "fp32", "cuda")]
    assert len({base, *(encoder_key(visual, *other) for other in others)}) == 4
    with torch.no_grad():
        visual.bn1.running_mean[0] += 1e-6
    assert encoder_key(visual, "tfm", "fp32", "cpu") != base
    path = tmp_path / "x"
    path.write_bytes(b"1")
    assert image_key(str(path), "a") != image_key(str(path), "b")


def test_the_limit_holds_and_the_newest_stay(tmp_path):
    limit = 200_000
    store = FeatureStore(str(tmp_path / "f"), b"a", limit=limit)
    for i in range(40):
        store.put(keys(100, i), rows(100, 128, i))  # 50 kB each time
        store.flush()
    assert os.path.getsize(tmp_path / "f") < 2 * limit
    assert store.get(keys(100, 0)) == [None] * 100
    assert torch.equal(torch.stack(store.get(keys(100, 39))), rows(100, 128, 39))


def test_something_else_is_refused(tmp_path, run, capsys):
    (tmp_path / "text").write_text("not a data base, and longer than its header is, so that it is looked at" * 20)
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE mine (x)")
    for name in ("text", "other"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(NotAStore):
            FeatureStore(str(tmp_path / name), b"a")
        assert features.main([str(tmp_path / name), "--clear"]) == 2
        assert (tmp_path / name).read_bytes() == before
    assert features.main([str(tmp_path / "none")]) == 2
    argv = arguments("ZeroshotCLIP", tmp_path / "data", "tiny", tmp_path / "x", "TEST.FEATURES", tmp_path / "text")
    argv += ["INPUT.SIZE", "(96, 96)"]
    argv.insert(argv.index("--output-dir"), "--eval-only")
    assert train.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("name another file")


def test_without_the_store_a_run_goes_on(run, tmp_path, monkeypatch):
    """A disk that is full, a store that breaks: said once, and everything is encoded."""
    plain = run("ZeroshotCLIP", store=False)

    def fail(self):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "_evict", fail)
        patch.setattr(features, "BUFFER", 10)
        assert run("ZeroshotCLIP", out="full")[:2] == plain[:2]
    assert (tmp_path / "full" / "log.txt").read_text().count("features are not kept from here on") == 1
    (tmp_path / "blocked").write_text("")
    words = ("TEST.FEATURES", tmp_path / "blocked" / "f")
    assert run("ZeroshotCLIP", *words, store=False, out="blocked_run")[:2] == plain[:2]
    assert "features are not kept" in (tmp_path / "blocked_run" / "log.txt").read_text()


def test_the_program(tmp_path, capsys):
    store = FeatureStore(str(tmp_path / "f"), b"a", "tiny, 96 pixels")
    store.put(keys(10), rows(10, 256))
    store.flush()
    assert features.main([str(tmp_path / "f")]) == 0
    assert "10 features       0.0 MB  tiny, 96 pixels" in capsys.readouterr().out
    assert features.main([str(tmp_path / "f"), "--clear"]) == 0
    assert store.get(keys(10)) == [None] * 10
    store.put(keys(10), rows(10, 256))  # a run at work goes on
    store.flush()
    assert torch.equal(torch.stack(store.get(keys(10))), rows(10, 256))
    assert FeatureStore(str(tmp_path / "f"), b"b").encoder != store.encoder


WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from trainers.prompting.features import FeatureStore, digest
store = FeatureStore(sys.argv[2], b"a")
print("ready", flush=True)
i = int(sys.argv[3])
while i < int(sys.argv[4]):
    value = torch.randn(50, 64, generator=torch.Generator().manual_seed(i))
    store.put([digest(i, j) for j in range(50)], value)
    store.flush()
    i += 1
store.close()
"""


def writer(path, first, last):
    words = [sys.executable, "-c", WRITER, str(Path(train.__file__).parent), str(path), str(first), str(last)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def whole_groups(path, last):
    """Of the groups of 50 features each is there as a whole, with its own values, or not at all; returns which are."""
    store = FeatureStore(str(path), b"a")
    there = []
    for i in range(last):
        found = store.get([digest(i, j) for j in range(50)])
        if found[0] is None:
            assert found == [None] * 50
        else:
            value = torch.randn(50, 64, generator=torch.Generator().manual_seed(i))
            assert torch.equal(torch.stack(found), value)
            there.append(i)
    return there


def test_several_writers_at_once(tmp_path):
    writers = [writer(tmp_path / "f", first, last) for first, last in ((0, 30), (0, 30), (20, 60))]
    assert all(process.wait(timeout=300) == 0 for process in writers)
    assert whole_groups(tmp_path / "f", 60) == list(range(60))


def test_a_writer_killed_at_any_moment(tmp_path):
    """The store stays whole, and the next run fills in what is missing."""
    path = tmp_path / "f"
    for delay in (0.0, 0.02, 0.05):
        process = writer(path, 0, 10**6)
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        whole_groups(path, 200)
    assert writer(path, 0, 40).wait(timeout=300) == 0
    assert set(range(40)) <= set(whole_groups(path, 60))
