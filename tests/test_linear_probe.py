"""The linear probe against scikit-learn on features computed by hand, its search for C against CoOp's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import differences
from dassl.data.transforms import build_transform
from dassl.utils import read_image
from sklearn.linear_model import LogisticRegression
from tiny import NAMES

from trainers.linear_probe import LinearClassifier, search


def by_hand(trainer, items):
    """Features of images without augmentation, and their labels."""
    tfm = build_transform(trainer.cfg, is_train=False)
    with torch.no_grad():
        features = trainer.backbone.visual(torch.stack([tfm(read_image(item.impath)) for item in items]))
    return features.double().numpy(), np.array([item.label for item in items])


def coop_search(train_set, val_set):
    """The search of CoOp's script, in log space as there."""

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
def test_run_equals_scikit_learn_and_coop_s_search(run):
    done = run("LinearProbe", "DATASET.SUBSAMPLE_CLASSES", "all")
    trainer, dataset = done.trainer, done.trainer.dm.dataset
    train_set, val_set, test_set = (by_hand(trainer, part) for part in (dataset.train_x, dataset.val, dataset.test))
    assert len(train_set[1]) == 4 * len(NAMES) and len(val_set[1]) == 2 * len(NAMES)
    c = coop_search(train_set, val_set)
    assert f"Linear probe: C {c:g}, chosen on 16 validation images" in done.log
    probe = LogisticRegression(C=c, max_iter=1000).fit(*train_set)
    np.testing.assert_allclose(trainer.model.learned.weight.detach(), probe.coef_, rtol=1e-2, atol=1e-3)
    assert done.results["metrics"]["accuracy"] == pytest.approx(100 * probe.score(*test_set))
    assert done.results["run"]["trained"] and done.results["images"] == 4 * len(NAMES)
    assert sorted(done.checkpoint(1)["state_dict"]) == ["bias", "weight"]


@pytest.mark.parametrize("best", [1e6, 30.0, 0.013, 1e-9])
def test_search_finds_the_best_c(best):
    tried = []

    def accuracy(c):
        tried.append(c)
        return -abs(np.log10(c / best))

    found = search(accuracy)
    assert tried[:7] == [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6] and len(tried) == 7 + 2 * 8
    assert abs(np.log10(found / max(best, 1e-7))) <= 2 / 2**7 + 1e-9  # length of the last interval
    assert search(lambda c: 0.5) == pytest.approx(1e5)  # of equals the strongest regularisation near the first


def test_two_classes_of_which_scikit_learn_returns_the_difference():
    draw = np.random.default_rng(0)
    labels = np.arange(40) % 2
    features = draw.normal(size=(40, 6)) + labels[:, None]
    regression = LogisticRegression().fit(features, labels)
    probe = LinearClassifier(6, 2).double()
    probe.copy_from(regression)
    scores = probe(torch.from_numpy(features)).detach()
    np.testing.assert_allclose(scores.softmax(dim=1), regression.predict_proba(features), rtol=1e-9)
    with torch.autocast("cpu", torch.bfloat16):
        assert probe.float()(torch.from_numpy(features).float()).dtype == torch.float32


def test_a_given_c_needs_no_validation_images(run):
    def validate_on_test_images(trainer):
        data = trainer.data.dataset
        trainer.data.dataset = SimpleNamespace(train_x=data.train_x, val=data.test, test=data.test)

    error = run("LinearProbe", status=2, prepare=validate_on_test_images).error
    assert "TRAINER.LINEARPROBE.C 0: Caltech101 has no validation images of its own" in error
    log = run("LinearProbe", "TRAINER.LINEARPROBE.C", 0.5, prepare=validate_on_test_images).log
    assert "Linear probe: C 0.5; " in log


def test_finished_fit_is_resumed(trained, run):
    first = run("LinearProbe")
    (first.folder / "results.json").unlink()
    again = run("LinearProbe")
    assert "Resuming from" in again.log and differences(first.outcome, again.outcome) == []
    assert again.timeless == trained("LinearProbe").timeless
