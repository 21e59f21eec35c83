import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.evaluation import build_evaluator
from dassl.metrics import compute_accuracy

NAMES = {label: f"n{label}" for label in range(7)}


def scores_for(predictions):
    return torch.eye(7)[torch.tensor(predictions)]


def test_known_answer(capsys):
    cfg = get_cfg_default()
    cfg.TEST.PER_CLASS_RESULT = True
    evaluator = build_evaluator(cfg, lab2cname=NAMES)
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
    evaluator.process(scores_for([3] * 1234), torch.full((1234,), 3))
    assert list(evaluator.evaluate().values()) == [100.0, 0.0, 100.0, 100.0]
    assert "* total: 1,234\n* correct: 1,234\n" in capsys.readouterr().out


def test_agrees_with_naive_counts(tmp_path):
    cfg = get_cfg_default()
    cfg.OUTPUT_DIR, cfg.TEST.COMPUTE_CMAT = str(tmp_path / "new"), True
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 5, 300).tolist(), rng.integers(1, 7, 300).tolist()
    evaluator = build_evaluator(cfg)
    evaluator.process(scores_for(guess), torch.tensor(truth))
    results = evaluator.evaluate()
    pairs = list(zip(truth, guess))
    assert results["accuracy"] == pytest.approx(100 * sum(t == g for t, g in pairs) / 300)
    f1 = [2 * pairs.count((c, c)) / (truth.count(c) + guess.count(c)) for c in range(5)]
    assert results["macro_f1"] == pytest.approx(100 * sum(f1) / 5)
    expected = [[pairs.count((t, g)) / max(truth.count(t), 1) for g in range(7)] for t in range(7)]
    assert torch.load(tmp_path / "new" / "cmat.pt", weights_only=True).tolist() == expected


def test_per_class_results_need_names():
    cfg = get_cfg_default()
    cfg.TEST.PER_CLASS_RESULT = True
    with pytest.raises(ValueError, match="lab2cname"):
        build_evaluator(cfg)


def test_compute_accuracy_by_counting():
    torch.manual_seed(0)
    scores, target = torch.randn(40, 9), torch.randint(0, 9, (40,))
    ranks = [sum(float(s) > float(row[t]) for s in row) for row, t in zip(scores, target)]
    results = compute_accuracy(scores, target, topk=(1, 2, 5))
    assert all(result.shape == (1,) for result in results)
    assert [r.item() for r in results] == pytest.approx([100 * sum(r < k for r in ranks) / 40 for k in (1, 2, 5)])
    assert compute_accuracy((scores, None), target)[0].item() == results[0].item()
