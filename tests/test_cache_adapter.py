"""cache_adapter.py: the cache against loops, its last stage, other classes, and the search for alpha and beta."""

import json
import shutil

import pytest
import torch
from helpers import Runs, build, naive_cache
from tiny import NAMES
from torch.nn.functional import normalize

from trainers.prompting.cache_adapter import GRID, CacheAdapter
from trainers.prompting.checkpoint import remap_state_to_classes
from trainers.prompting.evaluation import FewShotFeatures

ON = ("OPTIM.MAX_EPOCH", 5, "TRAINER.LOGOPROMPT.ADAPTER", True)


def filled(n=7, e=6, classes=3, alpha=0.7, beta=2.0):
    torch.manual_seed(0)
    adapter = CacheAdapter(e, classes, alpha, beta).double()
    adapter.fill(torch.randn(n, e).double(), torch.arange(n) % classes)
    return adapter


def test_cache_equals_loop():
    adapter = filled()
    torch.testing.assert_close(adapter.keys.norm(dim=1), torch.ones(7, dtype=torch.float64))
    with torch.no_grad():
        adapter.keys.mul_(torch.rand(7, 1).double() + 0.5)  # learned keys need not be of unit length
    features = normalize(torch.randn(2, 4, 6).double(), dim=-1)
    added = adapter(features)
    assert added.shape == (2, 4, 3)
    for i in range(2):
        for j in range(4):
            assert added[i, j].tolist() == pytest.approx(naive_cache(adapter, features[i, j].tolist(), 3), rel=1e-9)


def test_mixed_precision_leaves_the_cache_in_its_own(capsys):
    adapter = filled().float()
    features, label = normalize(torch.randn(5, 6), dim=-1), torch.arange(5) % 3
    expected = adapter(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter(features), expected)
        adapter.search(features, torch.zeros(5, 3).bfloat16(), label)
    assert "Adapter: alpha" in capsys.readouterr().out


def test_empty_cache_adds_nothing(rn_file):
    model, plain = build(rn_file, ADAPTER=True), build(rn_file)
    features = normalize(torch.randn(5, 24).double(), dim=-1)
    text = plain.text_features()
    assert model.adapter is None
    assert torch.equal(model.log_p(features, text), plain.log_p(features, text))
    model.learned.adapter.fill(torch.randn(10, 24).double(), torch.arange(10) % len(NAMES))
    assert model.adapter is not None and not torch.equal(model.log_p(features, text), plain.log_p(features, text))
    model.learned.adapter.empty()
    assert model.adapter is None and (model.learned.adapter(features) == 0).all()


def test_keys_go_to_classes_by_name():
    base, names, mixed = filled(classes=3), ["a", "b", "c"], ["x", "c", "a", "y"]
    other, new = CacheAdapter(6, 4, 1, 1).double(), CacheAdapter(6, 2, 1, 1).double()
    other.load_state_dict(remap_state_to_classes(other, base.state_dict(), mixed, names, "x"))
    features = normalize(torch.randn(5, 6).double(), dim=1)
    added = base(features)
    torch.testing.assert_close(other(features)[:, [2, 1]], added[:, [0, 2]])
    assert (other(features)[:, [0, 3]] == 0).all()  # classes without keys are left alone
    new.load_state_dict(remap_state_to_classes(new, base.state_dict(), ["x", "y"], names, "x"))
    assert not new.filled


def test_search_equals_loop(capsys):
    """Of pairs with equal accuracy the smallest is chosen."""
    adapter = filled()
    features, label = normalize(torch.randn(30, 6).double(), dim=1), torch.randint(3, (30,))
    logits = torch.randn(30, 3).double()
    adapter.search(features, logits, label)
    chosen, accuracies = (adapter.alpha.item(), adapter.beta.item()), {}
    for alpha, beta in GRID:
        adapter.alpha.fill_(alpha), adapter.beta.fill_(beta)
        correct = 0
        for feature, row, y in zip(features, logits.tolist(), label.tolist()):
            scores = [a + b for a, b in zip(row, naive_cache(adapter, feature.tolist(), 3))]
            correct += scores.index(max(scores)) == y
        accuracies[alpha, beta] = correct
    best = max(accuracies.values())
    assert chosen == min(pair for pair, correct in accuracies.items() if correct == best)
    assert f"chosen on 30 validation images ({100 * best / 30:.1f} %)" in capsys.readouterr().out


@pytest.fixture
def run(data_root, rn_file, tmp_path):
    return Runs(data_root, rn_file, tmp_path)


def test_last_stage_fills_the_cache_and_trains_it_alone(run):
    trained = run(*ON, "TRAIN.CHECKPOINT_FREQ", 1, "TRAINER.LOGOPROMPT.ADAPTER_EPOCHS", 2)
    found = run.states()
    assert [int((found[epoch]["adapter.labels"] >= 0).sum()) for epoch in range(1, 6)] == [0, 0, 0, 16, 16]
    assert found[4]["adapter.labels"].tolist() == [item.label for item in trained.dm.dataset.train_x]
    for before, after in ((3, 4), (4, 5)):
        others = [key for key in found[3] if not key.startswith("adapter") and key not in ("ctx", "trained")]
        assert all(torch.equal(found[before][key], found[after][key]) for key in others)
    assert torch.equal(found[4]["ctx"], found[5]["ctx"])
    assert not torch.equal(found[4]["adapter.keys"], found[5]["adapter.keys"])


@pytest.mark.parametrize("done", [3, 4])
def test_interrupted_run_ends_with_the_same_keys(run, done):
    run.check_resume(done, *ON, "TRAINER.LOGOPROMPT.ADAPTER_EPOCHS", 2)


def test_one_checkpoint_serves_base_new_and_all_classes(run):
    trained = run(*ON).model.adapter
    feature = normalize(torch.ones(1, trained.keys.shape[1]), dim=1)
    for subset in ("base", "new", "all"):
        model = run(*ON, "DATASET.SUBSAMPLE_CLASSES", subset, flags=run.evaluation(), out=subset).model
        if subset == "new":
            assert model.adapter is None
        else:
            torch.testing.assert_close(model.adapter(feature)[:, :4], trained(feature))


def test_search_sees_validation_images_only(run, monkeypatch):
    seen, features = [], FewShotFeatures._features

    def note(self, items, view=None):
        seen.append([item.impath for item in items])
        return features(self, items, view)

    monkeypatch.setattr(FewShotFeatures, "_features", note)
    trained = run(*ON, "TRAINER.LOGOPROMPT.ADAPTER_SEARCH", True)
    assert seen == [[i.impath for i in items] for items in (trained.dm.dataset.train_x, trained.dm.dataset.val)]
    stored = run.states()[5]
    assert trained.model.adapter.alpha == stored["adapter.alpha"]
    assert (stored["adapter.alpha"].item(), stored["adapter.beta"].item()) in GRID
    assert "chosen on 8 validation images" in (run.folder / "run" / "log.txt").read_text()


def test_search_on_test_images_is_refused(run, tmp_path, capsys):
    run.data_root = shutil.copytree(run.data_root, tmp_path / "data")
    path = run.data_root / "caltech-101" / "split_zhou_Caltech101.json"
    split = json.loads(path.read_text())
    path.write_text(json.dumps({**split, "val": split["test"]}))  # as in CoOp's ImageNet
    run(*ON, "TRAINER.LOGOPROMPT.ADAPTER_SEARCH", True, status=2)
    assert "no validation images of its own" in capsys.readouterr().err.splitlines()[-1]
