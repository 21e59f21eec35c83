"""LoGoPrompt + adapter: the cache against loops, what is trained, what other classes see of it, how alpha is chosen."""

import json
import math

import pytest
import torch
from test_logoprompt import build, naive_paste, naive_probabilities, naive_text_features
from test_two_stage import check_that_it_goes_on, run, states  # noqa: F401 (run is a fixture)
from tiny import NAMES, SIZE
from torch.nn.functional import normalize

from trainers.prompting.adapter import ALPHAS, BETAS, CacheAdapter
from trainers.prompting.synthetic import fixed_places, random_places
from trainers.prompting.trainer import per_class_state

BASE = NAMES[:4]
ON = ("TRAINER.LOGOPROMPT.ADAPTER", "True")


def filled(n=7, e=6, classes=3, alpha=0.7, beta=2.0):
    torch.manual_seed(0)
    adapter = CacheAdapter(n, e, classes, alpha, beta).double()
    adapter.fill(normalize(torch.randn(n, e).double(), dim=1), torch.arange(n) % classes)
    return adapter


def naive_additions(adapter, feature, classes):
    added = [0.0] * classes
    for key, label in zip(adapter.keys.tolist(), adapter.labels.tolist()):
        length = math.sqrt(sum(k * k for k in key))
        cosine = sum(f * k / length for f, k in zip(feature, key))
        if label >= 0:
            added[label] += adapter.alpha.item() * math.exp(-adapter.beta.item() * (1 - cosine))
    return added


def test_the_cache_equals_the_loop():
    adapter = filled()
    with torch.no_grad():
        adapter.keys.mul_(torch.rand(7, 1).double() + 0.5)  # learned keys need not be of unit length
    features = normalize(torch.randn(2, 4, 6).double(), dim=-1)
    added = adapter(features)
    assert added.shape == (2, 4, 3)
    for i in range(2):
        for j in range(4):
            expected = naive_additions(adapter, features[i, j].tolist(), 3)
            assert added[i, j].tolist() == pytest.approx(expected, rel=1e-9)


def test_an_empty_cache_is_no_cache(clip_file):
    model = build(clip_file)
    before = model.log_p(torch.ones(1, 24) / 24**0.5, model.text_features())
    model.add_adapter(build_method(), 5)
    assert model.adapter is None
    torch.testing.assert_close(model.log_p(torch.ones(1, 24) / 24**0.5, model.text_features()), before)


def build_method():
    from yacs.config import CfgNode as CN

    from trainers import logoprompt

    cfg = CN({"TRAINER": CN(), "TRAIN": CN(), "TEST": CN()})
    logoprompt.extend_cfg(cfg)
    return cfg.TRAINER.LOGOPROMPT


def test_every_probability_of_the_method_has_it(clip_file):
    """The loss's and the selection's p(c|x) and p(c|x_c) are softmaxes of logits with the cache's additions."""
    model = build(clip_file, TEXT_PROMPT="generic", K=3)
    model.backbone.logit_scale.data.fill_(2.5)
    model.add_adapter(build_method(), 10)
    model.prompt_learner.adapter.fill(normalize(torch.randn(10, 24), dim=1), torch.arange(10) % len(NAMES))
    images, paths = torch.randn(3, 3, SIZE, SIZE), list("abc")

    def p(image):
        plain = naive_probabilities(model, image, text)
        feature = normalize(model.backbone.visual(image[None]), dim=-1)[0].tolist()
        odds = [v * math.exp(a) for v, a in zip(plain, naive_additions(model.adapter, feature, len(NAMES)))]
        return [o / sum(odds) for o in odds]

    with torch.no_grad():
        text = naive_text_features(model)
        torch.manual_seed(7)
        losses, log_p = model(images, torch.arange(3))
        torch.manual_seed(7)
        random, fixed = (
            random_places(3, SIZE, model.block, "random"),
            fixed_places(paths, 0, SIZE, model.block, "random"),
        )
        scores = model.select(model.batch(images, paths), model.text_features())
        for i, image in enumerate(images):
            original = p(image)
            assert log_p[i].exp().tolist() == pytest.approx(original, rel=1e-3, abs=1e-5)
            best = sorted(range(len(NAMES)), key=lambda c: -original[c])  # noqa: B023 (called at once)
            for c in best[:3]:
                conditional = p(naive_paste(image, model.visual_prompts[c], *fixed[i].tolist()))
                assert scores[i, c].exp().item() == pytest.approx(max(original[c], conditional[c]), rel=1e-3)
            pasted = {c: p(naive_paste(image, model.visual_prompts[c], *random[i].tolist())) for c in range(len(NAMES))}
            positive = min(original[i], pasted[i][i])
            negatives = sum(max(original[c], pasted[c][c]) for c in [c for c in best if c != i][:3])
            assert losses[i].item() == pytest.approx(-math.log(positive / (positive + negatives)), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("text", ["two_stage", "generic"])
def test_gradients_reach_the_keys_and_nothing_else(clip_file, text):
    model = build(clip_file, TEXT_PROMPT=text, TUNE_VISUAL=True)
    model.add_adapter(build_method(), 10)
    if text == "two_stage":
        model.prompt_learner.begin_stage_2()
    model.prompt_learner.adapter.fill(normalize(torch.randn(10, 24), dim=1), torch.arange(10) % len(NAMES))
    losses, _ = model(torch.randn(4, 3, SIZE, SIZE), torch.arange(4))
    losses.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["prompt_learner.adapter.keys"]
    assert model.prompt_learner.adapter.keys.grad.abs().max() > 0


def test_other_classes_keep_their_scores():
    base = filled(classes=3)
    names, mixed = ["a", "b", "c"], ["x", "c", "a", "y"]
    other, new = CacheAdapter(2, 6, 4, 1, 1).double(), CacheAdapter(0, 6, 2, 1, 1).double()
    other.load_state_dict(per_class_state(other, base.state_dict(), mixed, names))
    features = normalize(torch.randn(5, 6).double(), dim=1)
    added = base(features)
    torch.testing.assert_close(other(features)[:, [2, 1]], added[:, [0, 2]])
    assert (other(features)[:, [0, 3]] == 0).all()
    new.load_state_dict(per_class_state(new, base.state_dict(), ["x", "y"], names))
    assert not new.filled


def test_scalars_are_chosen_by_accuracy_and_the_least_wins():
    adapter = filled()
    features, label = normalize(torch.randn(30, 6).double(), dim=1), torch.randint(3, (30,))
    logits = torch.randn(30, 3).double()
    best = adapter.choose(features, logits, label)
    chosen = (adapter.alpha.item(), adapter.beta.item())
    accuracies = {}
    for alpha in ALPHAS:
        for beta in BETAS:
            adapter.alpha.fill_(alpha), adapter.beta.fill_(beta)
            right = 0
            for feature, row, y in zip(features, logits.tolist(), label.tolist()):
                scores = [a + b for a, b in zip(row, naive_additions(adapter, feature.tolist(), 3))]
                right += max(range(3), key=lambda c: scores[c]) == y  # noqa: B023 (called at once)
            accuracies[alpha, beta] = 100 * right / 30
    assert best == pytest.approx(max(accuracies.values()), abs=1e-3)
    assert chosen == pytest.approx(min(k for k, v in accuracies.items() if v == max(accuracies.values())))


# ------------------------------------------------------------------------------------------------- through train.py


def test_the_last_stage_fills_the_cache_and_trains_it_alone(run):  # noqa: F811
    trained = run(*ON, "TRAIN.CHECKPOINT_FREQ", "1", "TRAINER.LOGOPROMPT.ADAPTER_EPOCHS", "2")
    found = states(run)
    assert [int((found[epoch]["adapter.labels"] >= 0).sum()) for epoch in range(1, 6)] == [0, 0, 0, 16, 16]
    images = trained.dm.dataset.train_x
    assert found[4]["adapter.labels"].tolist() == [item.label for item in images]
    others = [key for key in found[3] if not key.startswith("adapter")]
    assert all(torch.equal(found[4][key], found[5][key]) for key in others)
    assert not torch.equal(found[4]["adapter.keys"], found[5]["adapter.keys"])


@pytest.mark.parametrize("done", [3, 4])
def test_an_interrupted_run_goes_on_to_the_same_keys(run, monkeypatch, done):  # noqa: F811
    check_that_it_goes_on(run, monkeypatch, done, *ON, "TRAINER.LOGOPROMPT.ADAPTER_EPOCHS", "2")


def test_one_checkpoint_serves_base_new_and_all(run):  # noqa: F811
    trained = run(*ON)
    flags = ["--eval-only", "--model-dir", run.folder / "run"]
    for subset, n in (("base", 4), ("new", 4), ("all", 8)):
        built = run(*ON, "DATASET.SUBSAMPLE_CLASSES", subset, flags=flags, out=subset)
        assert json.loads((run.folder / subset / "results.json").read_text())["classes"] == n
        adapter = built.model.adapter
        if subset == "new":
            assert adapter is None
        else:
            assert torch.equal(adapter.labels, trained.model.adapter.labels)
            feature = normalize(torch.ones(1, adapter.keys.shape[1]), dim=1)
            torch.testing.assert_close(adapter(feature)[:, :4], trained.model.adapter(feature))


def test_the_search_looks_at_validation_images_only(run, monkeypatch, capsys):  # noqa: F811
    from trainers.logoprompt import LoGoPrompt

    seen = []
    original = LoGoPrompt.features
    monkeypatch.setattr(LoGoPrompt, "features", lambda self, *args: seen.append(args[0]) or original(self, *args))
    trained = run(*ON, "TRAINER.LOGOPROMPT.ADAPTER_SEARCH", "True")
    paths = [[item.impath for item in loader.dataset.data_source] for loader in seen]
    assert paths == [[i.impath for i in items] for items in (trained.dm.dataset.train_x, trained.dm.dataset.val)]
    stored = states(run)[5]
    assert trained.model.adapter.alpha == stored["adapter.alpha"]
    assert stored["adapter.alpha"].item() in ALPHAS and stored["adapter.beta"].item() in BETAS
    assert "chosen on 8 validation images" in (run.folder / "run" / "log.txt").read_text()


def test_there_is_no_search_where_validation_images_are_test_images(run, monkeypatch, capsys):  # noqa: F811
    from datasets.base import SplitDataset

    original = SplitDataset.__init__

    def validate_on_test(self, cfg):  # as CoOp's ImageNet does
        original(self, cfg)
        self._val = self._test

    monkeypatch.setattr(SplitDataset, "__init__", validate_on_test)
    run(*ON, "TRAINER.LOGOPROMPT.ADAPTER_SEARCH", "True", status=2)
    assert "no validation images of its own" in capsys.readouterr().err.splitlines()[-1]
    run("TRAINER.LOGOPROMPT.ADAPTER_SEARCH", "True", status=2)
    assert "without ADAPTER True" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("key, value", [("OPTIM.MAX_EPOCH", 9), ("DATASET.NUM_SHOTS", 2)])
def test_a_run_of_another_timetable_is_not_taken_up_elsewhere(run, capsys, key, value):  # noqa: F811
    run(*ON)
    run(*ON, key, value, flags=["--resume", run.folder / "run"], out="further", status=2)
    assert f"{key} " in capsys.readouterr().err.splitlines()[-1]


def test_a_run_may_start_from_the_weights_of_a_finished_one(run):  # noqa: F811
    """Contexts of stage 2 and the cache do not pass for the beginning of stage 1."""
    run(*ON)
    weights = run.folder / "run" / "prompt_learner" / "model.pth.tar-5"
    run(*ON, "TRAIN.CHECKPOINT_FREQ", "1", "MODEL.INIT_WEIGHTS", weights, out="further")
    before, found = states(run)[5], states(run, "further")
    assert not found[1]["trained"].any() and (found[1]["adapter.labels"] < 0).all()
    assert not torch.equal(found[2]["meta_net.linear2.bias"], before["meta_net.linear2.bias"])
    assert found[5]["trained"].all() and (found[5]["adapter.labels"] >= 0).all()


@pytest.mark.parametrize(
    "key, value, message",
    [("ADAPTER_EPOCHS", "6", "1 to OPTIM.MAX_EPOCH"), ("ADAPTER_EPOCHS", "0", "1 to OPTIM.MAX_EPOCH"),
     ("STAGE1_EPOCHS", "5", "must be 0 to 4"), ("ADAPTER_BETA", "-1.0", "must be at least 0")],
)  # fmt: skip
def test_impossible_values(run, capsys, key, value, message):  # noqa: F811
    run(*ON, f"TRAINER.LOGOPROMPT.{key}", value, status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"TRAINER.LOGOPROMPT.{key}" in error and message in error
