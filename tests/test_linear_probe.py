"""The linear probe against scikit-learn on features taken by hand, its search for C against made-up accuracies."""

import json
import sys

import numpy as np
import pytest
import torch
from dassl.data.transforms import build_transform
from dassl.utils import read_image
from sklearn.linear_model import LogisticRegression
from tiny import NAMES, arguments

import train
from trainers.linear_probe import LinearClassifier, search


@pytest.fixture
def run(data_root, rn_file, tmp_path, monkeypatch):
    """Run ``train.py`` in this process; returns its results, and keeps the trainer as ``run.trainer``."""

    def call(*opts, flags=(), out="run", seed=1, status=0):
        built = []
        monkeypatch.setattr(train, "build_trainer", lambda cfg: built.append(original(cfg)) or built[0])
        argv = arguments("LinearProbe", data_root, rn_file, tmp_path / out, *opts, flags=flags, seed=seed)
        assert train.main(argv) == status
        sys.stdout.flush()  # of the log
        call.trainer = built[0] if built else None
        return json.loads((tmp_path / out / "results.json").read_text()) if status == 0 else None

    original = train.build_trainer
    call.folder = tmp_path
    return call


def by_hand(trainer, items):
    """Features of images without augmentation, and their labels."""
    tfm = build_transform(trainer.cfg, is_train=False)
    with torch.no_grad():
        features = trainer.model.backbone.visual(torch.stack([tfm(read_image(item.impath)) for item in items]))
    return features.double().numpy(), np.array([item.label for item in items])


def bisect(train_set, val_set):
    """What CoOp's script arrives at, in log space as there."""

    def accuracy(log_c):
        return LogisticRegression(C=10.0**log_c, max_iter=1000).fit(*train_set).score(*val_set)

    grid = [6, 4, 2, 0, -2, -4, -6]
    scores = [accuracy(log_c) for log_c in grid]
    peak = grid[scores.index(max(scores))]
    left, right = peak - 1, peak + 1
    for _ in range(8):
        ends = accuracy(left), accuracy(right)
        middle = (left + right) / 2
        best, left, right = (right, middle, right) if ends[0] < ends[1] else (left, left, middle)
    return 10.0**best


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_a_run_equals_scikit_learn_on_features_taken_by_hand(run):
    results = run("DATASET.SUBSAMPLE_CLASSES", "all")
    trainer, dataset = run.trainer, run.trainer.dm.dataset
    train_set, val_set, test_set = (by_hand(trainer, part) for part in (dataset.train_x, dataset.val, dataset.test))
    assert len(train_set[1]) == 4 * len(NAMES) and len(val_set[1]) == 2 * len(NAMES)
    c = bisect(train_set, val_set)
    log = (run.folder / "run" / "log.txt").read_text()
    assert f"Linear probe: C {c:g}, chosen on 16 validation images" in log
    probe = LogisticRegression(C=c, max_iter=1000).fit(*train_set)
    np.testing.assert_allclose(trainer.prompt_learner.weight.detach(), probe.coef_, rtol=1e-2, atol=1e-3)
    assert results["metrics"]["accuracy"] == pytest.approx(100 * probe.score(*test_set))
    assert results["run"]["trained"] and results["images"] == 4 * len(NAMES)


@pytest.mark.parametrize("liked", [1e6, 30.0, 1.0, 0.013, 1e-6, 1e-9])
def test_the_search_arrives_at_what_is_liked(liked):
    tried = []

    def accuracy(c):
        tried.append(c)
        return -abs(np.log10(c / liked))

    found = search(accuracy)
    assert tried[:7] == [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]
    assert len(tried) == 7 + 2 * 8
    nearest = min(max(liked, 1e-7), 1e7)
    assert abs(np.log10(found / nearest)) <= 2 / 2**7 + 1e-9  # the last interval's length


def test_where_all_are_equally_good_the_strongest_regularisation_near_the_first_wins():
    assert search(lambda c: 0.5) == pytest.approx(1e5)


def test_two_classes_of_which_scikit_learn_keeps_the_difference():
    draw = np.random.default_rng(0)
    labels = np.arange(40) % 2
    features = draw.normal(size=(40, 6)) + labels[:, None]
    regression = LogisticRegression().fit(features, labels)
    probe = LinearClassifier(6, 2).double()
    probe.take(regression)
    scores = probe(torch.from_numpy(features)).detach()
    np.testing.assert_allclose(scores.softmax(dim=1), regression.predict_proba(features), rtol=1e-9)
    single, probe = torch.from_numpy(features).float(), probe.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert probe(single).dtype == torch.float32


def test_a_given_c_is_not_searched_for(run):
    run("TRAINER.LINEARPROBE.C", 0.5)
    assert "Linear probe: C 0.5; " in (run.folder / "run" / "log.txt").read_text()


def test_evaluation_by_class_name(run, capsys):
    trained = run("DATASET.SUBSAMPLE_CLASSES", "all", out="a")
    state = torch.load(run.folder / "a" / "prompt_learner" / "model.pth.tar-1", weights_only=True)
    assert set(state["state_dict"]) == {"weight", "bias"} and state["classnames"] == NAMES
    assert all(isinstance(value, torch.Tensor) for value in state["state_dict"].values())
    flags = ["--eval-only", "--model-dir", run.folder / "a"]
    assert run("DATASET.SUBSAMPLE_CLASSES", "all", out="b", flags=flags)["metrics"] == trained["metrics"]
    run("DATASET.SUBSAMPLE_CLASSES", "new", out="c", flags=flags)
    assert run.trainer.classnames == NAMES[4:]
    assert torch.equal(run.trainer.prompt_learner.weight.detach(), state["state_dict"]["weight"][4:])

    run("DATASET.SUBSAMPLE_CLASSES", "base", out="base")
    capsys.readouterr()
    flags = ["--eval-only", "--model-dir", run.folder / "base"]
    run("DATASET.SUBSAMPLE_CLASSES", "new", out="new", flags=flags, status=2)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert f'was not trained on "{NAMES[4]}" and 3 more of these classes' in line


def test_nothing_is_chosen_on_test_images(run, monkeypatch, capsys):
    from datasets.caltech101 import Caltech101

    monkeypatch.setattr(Caltech101, "val", property(lambda self: self.test))
    run(status=2)
    assert "TRAINER.LINEARPROBE.C 0: Caltech101 has no validation images of its own" in capsys.readouterr().err
    run("TRAINER.LINEARPROBE.C", 1.0)


def test_mistakes(run, capsys):
    run("TRAINER.LINEARPROBE.C", -1.0, status=2)
    assert "TRAINER.LINEARPROBE.C -1: must be positive" in capsys.readouterr().err
    run(flags=["--eval-only"], status=2)
    assert "--model-dir" in capsys.readouterr().err


def test_runs_repeat_and_go_on(run):
    first = run(out="a")
    assert run(out="b", seed=1) == first
    (run.folder / "b" / "results.json").unlink()
    assert run(out="b") == first  # from its checkpoint
    states = [
        torch.load(run.folder / out / "prompt_learner" / "model.pth.tar-1", weights_only=True)["state_dict"]["weight"]
        for out in "ab"
    ]
    assert torch.equal(*states) and states[0].abs().max() > 0
