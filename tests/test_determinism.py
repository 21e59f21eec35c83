"""One seed, one result: whatever the workers, batches, what is kept from earlier, order of listings, and threads.

Beside it: ``test_trainers.py`` (batch size, order and workers of test images; the same run twice; a run that was
interrupted), ``test_features.py`` (the store), ``test_bank.py`` (kept views), ``test_images.py`` (kept images).
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from PIL import Image
from test_trainers import TRAINED, run  # noqa: F401 (a fixture)
from tiny import arguments, caltech_tree

import datasets
from trainers.prompting import images as reading
from trainers.prompting.data import DecodedImages, decoded_size


def outcome(run, trainer, *opts, out, flags=(), seed=1):  # noqa: F811
    """Everything that a run has learned and measured."""
    results = run(trainer, *opts, out=out, flags=flags, seed=seed)
    path = run.folder / out / "prompt_learner" / "model.pth.tar-2"
    state = torch.load(path, weights_only=True)["state_dict"]
    return state, results["metrics"], run.trainer.predictions


def same(first, second):
    (state, *measured), (other, *measured_too) = first, second
    return measured == measured_too and all(torch.equal(state[k], other[k]) for k in state.keys() | other.keys())


@pytest.mark.parametrize("trainer", TRAINED)
def test_runs_do_not_depend_on_how_they_are_watched_or_evaluated(run, trainer):  # noqa: F811
    """Batches of the evaluation, log lines, checkpoints, a summary."""
    plain = outcome(run, trainer, out="plain")
    more = ("DATALOADER.TEST.BATCH_SIZE", 3, "TRAIN.PRINT_FREQ", 1, "TRAIN.CHECKPOINT_FREQ", 1, "VERBOSE", False)
    assert same(plain, outcome(run, trainer, *more, out="watched"))
    assert not same(plain, outcome(run, trainer, out="other", seed=2))  # the comparison can fail


@pytest.mark.parametrize("trainer", TRAINED)
def test_runs_do_not_depend_on_what_is_kept(run, trainer, monkeypatch):  # noqa: F811
    """Features (none, an empty store, a full one), the few-shot sample (drawn, read), decoded images (or not)."""
    plain = outcome(run, trainer, out="plain")
    store = ("TEST.FEATURES", run.folder / "features.sqlite")
    for name in ("cold", "warm"):
        assert same(plain, outcome(run, trainer, *store, out=name))
    shutil.rmtree(os.path.join(run.trainer.cfg.DATASET.ROOT, "caltech-101", "split_fewshot"))
    assert same(plain, outcome(run, trainer, *store, "TRAIN.DECODED_GB", 0.0, out="drawn anew"))


def test_runs_with_workers_repeat(run):  # noqa: F811
    """Whatever their number; without any other augmentations, bit for bit Dassl's, and nothing else."""
    two = ("DATALOADER.NUM_WORKERS", 2)
    first = outcome(run, "LoGoPrompt", *two, out="a")
    assert same(first, outcome(run, "LoGoPrompt", *two, out="b"))
    assert same(first, outcome(run, "LoGoPrompt", "DATALOADER.NUM_WORKERS", 1, out="c"))
    for more in (("INPUT.TRANSFORMS", "('normalize',)"), ("TRAINER.LOGOPROMPT.VIEWS", 2)):  # no dice rolled in workers
        first = outcome(run, "LoGoPrompt", *more, out=f"{more[0]}0")
        assert same(first, outcome(run, "LoGoPrompt", *more, *two, out=f"{more[0]}2"))


@pytest.mark.parametrize("trainer", TRAINED)
def test_predictions_do_not_depend_on_threads(run, trainer):  # noqa: F811
    """Sums in another order differ in their last digits; predictions here do not hang on those."""
    run(trainer, out="model")
    flags = ["--eval-only", "--model-dir", run.folder / "model"]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((run(trainer, flags=flags, out=f"{threads}")["metrics"], run.trainer.predictions))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_kept_images_do_not_depend_on_threads(data_root, monkeypatch):
    paths = [str(path) for path in sorted(data_root.rglob("image_000[0-3].jpg"))]
    size, found = decoded_size(paths, 1e9), []
    pool = reading.ThreadPoolExecutor
    for threads in (1, 8):
        monkeypatch.setattr(reading, "ThreadPoolExecutor", lambda threads=threads: pool(threads))
        kept = DecodedImages(paths, size)
        found.append([kept[i].tobytes() for i in range(len(paths))])
    assert found[0] == found[1] and len(set(found[0])) == len(paths)


def test_another_process_does_the_same(rn_file, tmp_path):
    """Order of sets (PYTHONHASHSEED); a data set that lies elsewhere and was written in another order."""
    states, measured = [], []
    for i in range(2):
        root = caltech_tree(tmp_path / str(i) / "data", train=4, val=1, test=2)
        folder = root / "caltech-101" / "101_ObjectCategories"
        for path in sorted(folder.rglob("*.jpg"), reverse=bool(i)):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
        out = tmp_path / str(i) / "out"
        argv = [sys.executable, str(ROOT / "train.py"), *arguments("LoGoPrompt", root, rn_file, out)]
        environment = {**os.environ, "PYTHONHASHSEED": str(i)}
        done = subprocess.run(argv, env=environment, cwd=tmp_path / str(i), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        states.append(torch.load(out / "prompt_learner" / "model.pth.tar-2", weights_only=True)["state_dict"])
        measured.append(json.loads((out / "results.json").read_text())["metrics"])
    assert measured[0] == measured[1]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0].keys() | states[1].keys())


class Listing:
    """What ``os.scandir`` returns, in an order of our own."""

    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.items)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    close = __exit__


@pytest.mark.parametrize("name", ["Caltech101", "Folder"])
def test_a_split_does_not_depend_on_the_order_of_a_listing(name, tmp_path, monkeypatch):
    """Made from folders, whichever order the file system lists them in."""
    found, listed = [], []
    list_names, scan = os.listdir, os.scandir
    for backwards in (False, True):
        root = tmp_path / str(backwards)
        folder = root / "caltech-101" / "101_ObjectCategories" if name == "Caltech101" else root
        for part in ("cup", "dog", "ant"):
            (folder / part).mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (8, 8)).save(folder / part / f"{i}.jpg")
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        cfg.DATASET.ROOT, cfg.DATASET.NUM_SHOTS, cfg.SEED = str(root), 2, 1

        def order(items, backwards=backwards):
            items = sorted(items, key=lambda item: getattr(item, "name", item), reverse=backwards)
            listed.append(len(items))
            return items

        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda path=".", order=order: order(list_names(path)))
            patch.setattr(os, "scandir", lambda path=".", order=order: Listing(order(scan(path))))
            dataset = DATASET_REGISTRY.get(name)(cfg)
        parts = (dataset.train_x, dataset.val, dataset.test)
        found.append([[(os.path.relpath(x.impath, root), x.label) for x in part] for part in parts])
    assert found[0] == found[1] and len(found[0][0]) == 6
    assert listed.count(10) >= 6  # it was these listings that were turned round
