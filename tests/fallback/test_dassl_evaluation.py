import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.evaluation import EVALUATOR_REGISTRY, Classification, build_evaluator
from dassl.metrics import compute_accuracy

NAMES = {label: f"n{label}" for label in range(7)}


def scores_for(predictions):
    return torch.eye(7)[torch.tensor(predictions)]


def test_known_answer(capsys):
    cfg = get_cfg_default()
    cfg.TEST.PER_CLASS_RESULT = True
    evaluator = build_evaluator(cfg, lab2cname=NAMES)
    assert isinstance(evaluator, Classification)
    capsys.readouterr()
    evaluator.process(scores_for([0, 0, 1]), torch.tensor([0, 0, 0]))
    evaluator.process(scores_for([2, 6, 2]), torch.tensor([2, 2, 4]))
    results = evaluator.evaluate()
    # label 0: 2 of 3, F1 = 4/5; label 2: 1 of 2, predicted twice, F1 = 2/4; label 4: none
    assert list(results) == ["accuracy", "error_rate", "macro_f1", "perclass_accuracy"]
    assert list(results.values()) == pytest.approx([50.0, 50.0, 100 * (0.8 + 0.5) / 3, 100 * (2 / 3 + 1 / 2) / 3])
    assert capsys.readouterr().out.splitlines() == [
        "=> result",
        "* total: 6",
        "* correct: 3",
        "* accuracy: 50.0%",
        "* error: 50.0%",
        "* macro_f1: 43.3%",
        "=> per-class result",
        "* class: 0 (n0)\ttotal: 3\tcorrect: 2\tacc: 66.7%",
        "* class: 2 (n2)\ttotal: 2\tcorrect: 1\tacc: 50.0%",
        "* class: 4 (n4)\ttotal: 1\tcorrect: 0\tacc: 0.0%",
        "* average: 38.9%",
    ]
    evaluator.reset()
    evaluator.process(scores_for([3]), torch.tensor([3]))
    assert list(evaluator.evaluate().values()) == [100.0, 0.0, 100.0, 100.0]


def test_agrees_with_scikit_learn(tmp_path):
    metrics = pytest.importorskip("sklearn.metrics")
    cfg = get_cfg_default()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.COMPUTE_CMAT = True
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 5, 300), rng.integers(1, 7, 300)
    evaluator = build_evaluator(cfg, lab2cname=NAMES)
    evaluator.process(scores_for(guess.tolist()), torch.from_numpy(truth))
    results = evaluator.evaluate()
    assert results["accuracy"] == pytest.approx(100 * metrics.accuracy_score(truth, guess))
    f1 = metrics.f1_score(truth, guess, average="macro", labels=np.unique(truth))
    assert results["macro_f1"] == pytest.approx(100 * f1)
    saved = torch.load(tmp_path / "cmat.pt", weights_only=False)
    assert np.asarray(saved) == pytest.approx(metrics.confusion_matrix(truth, guess, normalize="true"))


def test_large_counts_have_commas(capsys):
    evaluator = build_evaluator(get_cfg_default(), lab2cname=NAMES)
    evaluator.process(scores_for([1] * 1234), torch.ones(1234, dtype=torch.long))
    evaluator.evaluate()
    assert "* total: 1,234\n* correct: 1,234\n* accuracy: 100.0%\n" in capsys.readouterr().out


def test_errors():
    cfg = get_cfg_default()
    cfg.TEST.PER_CLASS_RESULT = True
    with pytest.raises((ValueError, AssertionError)):
        build_evaluator(cfg)
    cfg.TEST.EVALUATOR = "Clasification"
    with pytest.raises(ValueError, match=r"do you mean \[Classification\]"):
        build_evaluator(cfg)
    assert "Classification" in EVALUATOR_REGISTRY.registered_names()


def test_compute_accuracy_by_counting():
    torch.manual_seed(0)
    scores, target = torch.randn(40, 9), torch.randint(0, 9, (40,))
    ranks = [sum(float(s) > float(row[t]) for s in row) for row, t in zip(scores, target)]
    results = compute_accuracy(scores, target, topk=(1,))
    assert results[0].shape == (1,) and results[0].item() == pytest.approx(100 * sum(r < 1 for r in ranks) / 40)
    assert compute_accuracy((scores, None), target)[0].item() == results[0].item()
