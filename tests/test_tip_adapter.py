"""Tip-Adapter and Tip-Adapter-F: equal to the authors' code and to plain loops; the search; other classes; resuming."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, differences, interrupt
from helpers import method_config
from reference import Reference, check_parameters, runs_of
from torch.nn.functional import normalize

from trainers.prompting.backbone import load_clip
from trainers.prompting.evaluation import FewShotFeatures
from trainers.prompting.image_batch import ImageBatch
from trainers.tip_adapter import FineTuned, TrainingFree, search_grid

BOTH = ("TipAdapter", "TipAdapterF")


def filled_caches(folder):
    """(file name without .npz, architecture) of every cache of the authors' code."""
    for path in sorted(folder.glob("relatives_*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            yield from ((path.stem, k.split("/")[0]) for k in arrays.files if k.endswith("/tip_adapter/keys"))


def read(stem, arch, folder):
    """Reference values and their CLIP with 1 / tau = 100 as in the authors' code; the file has log 100 in float16."""
    found = Reference(GOLDEN / f"{stem}.npz")
    backbone = found.clip(arch, folder)
    backbone.logit_scale.data.fill_(math.log(100))
    return found, backbone


class Data(SimpleNamespace):
    """Features of training and validation images, the same in every pass."""

    def train_features(self, passes=0):
        self.passes = passes
        return self.train

    def val_features(self):
        return self.val


def build(kind, classnames, backbone, **options):
    return kind(method_config(kind.config_name, **options), classnames, backbone)


@pytest.mark.parametrize("stem, arch", [pytest.param(*cache, id="-".join(cache)) for cache in filled_caches(GOLDEN)])
def test_matches_original_tip_adapter(tmp_path, stem, arch):
    found, backbone = read(stem, arch, tmp_path)
    golden = found.tensors(f"{arch}/tip_adapter/")
    model = build(TrainingFree, found.meta["classnames"], backbone, BETA_STEPS=20, ALPHA_STEPS=5)
    images = ImageBatch(backbone, found.tensor(f"{arch}/images"))
    cached = ImageBatch(backbone, found.tensor(f"{arch}/cache_images")).raw_features()
    data = Data(train=(cached, found.tensor("cache_labels").long()), val=(golden["val_features"], golden["val_labels"]))
    model.fit(data)
    assert data.passes == 10
    torch.testing.assert_close(model.learned.keys.detach(), golden["keys"], rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.nn.functional.one_hot(model.learned.labels).float(), golden["values"])
    beta, alpha = found.arrays[f"{arch}/tip_adapter/search_beta_alpha"]
    assert (model.learned.beta.item(), model.learned.alpha.item()) == pytest.approx((beta, alpha), rel=1e-6)
    settings = [match for match in (re.fullmatch(r"logits_beta(.+)_alpha(.+)", name) for name in golden) if match]
    assert settings
    for match in settings:
        model.learned.beta.fill_(float(match[1]))
        model.learned.alpha.fill_(float(match[2]))
        scores = model.score(images, model.text_features()).detach()
        torch.testing.assert_close(scores, golden[match[0]], rtol=1e-5, atol=1e-4)


F_RUNS = [run for run in runs_of(GOLDEN, "relatives_*.npz") if run[2] == "tip_adapter_f"]


@pytest.mark.parametrize("stem, arch, run", [pytest.param(*run, id="-".join(run)) for run in F_RUNS])
def test_matches_original_tip_adapter_f(tmp_path, stem, arch, run):
    found, backbone = read(stem, arch, tmp_path)
    model = build(FineTuned, found.meta["classnames"], backbone)
    initial, final = found.tensor(f"{arch}/{run}/init/keys"), found.tensor(f"{arch}/{run}/final/keys")
    (stage,) = model.stages()
    stage.begin(Data(train=(initial, found.tensor("cache_labels").long())))
    images = ImageBatch(backbone, found.tensor(f"{arch}/images"))
    logits = model.score(images, model.text_features()).detach()
    torch.testing.assert_close(logits, found.tensor(f"{arch}/{run}/logits"), rtol=1e-5, atol=1e-4)
    optim = torch.optim.AdamW(model.parameter_groups(), lr=found.meta["lr"][run])
    found.check_steps(model, images, f"{arch}/{run}/", optim)
    check_parameters({"keys": model.learned.keys}, {"keys": initial}, {"keys": final}, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("seed", [2, 4])
def test_scores_and_search_match_loops(clip_file, seed):
    """Keys of any length, as they are learned; a class without training images keeps its zero-shot score."""
    backbone = load_clip(clip_file).double()
    backbone.logit_scale.data.fill_(2.0)
    sizes = {"ALPHA_SCALE": 4.0, "ALPHA_STEPS": 3, "BETA_SCALE": 6.0, "BETA_STEPS": 4}
    model = build(FineTuned, ["cup", "wind_chime", "face"], backbone, **sizes).double()
    draw = torch.Generator().manual_seed(seed)
    train, val = (torch.randn(n, backbone.n_features, generator=draw).double() for n in (7, 30))
    label, val_label = torch.arange(7) % 2, torch.randint(3, (30,), generator=draw)
    (stage,) = model.stages()
    stage.begin(Data(train=(train, label)))
    model.learned.keys.mul_(torch.rand(7, 1, generator=draw).double() + 0.5)
    images = ImageBatch(backbone, torch.randn(4, 3, 64, 64, generator=draw).double())
    text, scale = model.text_features().tolist(), float(backbone.logit_scale.exp())

    def expected(feature, alpha, beta):
        scores = [scale * sum(a * b for a, b in zip(feature, row)) for row in text]
        for key, y in zip(model.learned.keys.tolist(), label.tolist()):
            scores[y] += alpha * math.exp(-beta * (1 - sum(a * b for a, b in zip(feature, key))))
        return scores

    alpha, beta = model.learned.alpha.item(), model.learned.beta.item()
    assert (alpha, beta) == pytest.approx((1.17, 1))
    for row, feature in zip(model.score(images, model.text_features()).tolist(), images.features().tolist()):
        assert row == pytest.approx(expected(feature, alpha, beta), rel=1e-9)

    stage.end(Data(val=(val, val_label)))
    correct = {}
    for i in range(4):
        for j in range(3):
            beta, alpha = 0.1 + i * 5.9 / 4, 0.1 + j * 3.9 / 3
            scores = [expected(feature, alpha, beta) for feature in normalize(val, dim=1).tolist()]
            correct[beta, alpha] = sum(row.index(max(row)) == y for row, y in zip(scores, val_label.tolist()))
    chosen = max(correct, key=correct.get)  # the first of equals
    assert (model.learned.beta.item(), model.learned.alpha.item()) == pytest.approx(chosen)
    assert len(set(correct.values())) > 2


def test_grid_of_the_search(rn_file):
    """The authors' for ImageNet, in their order."""
    grid = search_grid(build(TrainingFree, ["cup"], load_clip(rn_file)).options)
    assert grid[:2] == [(0.1, 0.1), (0.1 + 2.9 / 20, 0.1)] and grid[20] == (0.1, 0.1 + 6.9 / 200)
    assert len(grid) == 4000 and grid[-1] == pytest.approx((3 - 2.9 / 20, 7 - 6.9 / 200))


def test_keys_are_means_of_augmented_passes(run, monkeypatch):
    seen, features = [], FewShotFeatures._features

    def note(self, items, view=None):
        found = features(self, items, view)
        seen.append(([item.impath for item in items], view, found[0]))
        return found

    monkeypatch.setattr(FewShotFeatures, "_features", note)
    for passes, views in ((3, [0, 1, 2, None]), (0, [None, None])):
        seen.clear()
        trained = run("TipAdapter", "TRAINER.TIPADAPTER.AUGMENT_EPOCH", passes, out=str(passes)).trainer
        data = trained.dm.dataset
        paths = [[item.impath for item in items] for items in (data.train_x, data.val)]
        assert [found[0] for found in seen] == [paths[0]] * (len(views) - 1) + [paths[1]]  # no test images
        assert [view for _, view, _ in seen] == views
        mean = normalize(torch.stack([found for _, _, found in seen[:-1]]).mean(dim=0), dim=1)
        torch.testing.assert_close(trained.model.learned.keys.detach(), mean, rtol=1e-5, atol=1e-6)
        assert trained.model.learned.labels.tolist() == [item.label for item in data.train_x]


@pytest.mark.parametrize("trainer", BOTH)
def test_other_classes_are_matched_by_name(trainer, run, tmp_path):
    """New classes have no keys and are predicted as by zero-shot CLIP."""
    learned = run(trainer, out="base")
    flags = ["--eval-only", "--model-dir", tmp_path / "base"]
    for subset in ("base", "new"):
        run(trainer, "DATASET.SUBSAMPLE_CLASSES", subset, out=subset + "_test", flags=flags)
    everything = run(trainer, "DATASET.SUBSAMPLE_CLASSES", "all", out="all", flags=flags).trainer
    run("ZeroshotCLIP", "DATASET.SUBSAMPLE_CLASSES", "new", out="zero", flags=["--eval-only"])
    results = {f: json.loads((tmp_path / f / "results.json").read_text()) for f in ("base_test", "new_test", "zero")}
    assert results["base_test"]["metrics"] == learned.results["metrics"]
    assert results["new_test"]["metrics"] == results["zero"]["metrics"]
    names, all_names = learned.trainer.classnames, everything.classnames
    cached = [all_names[label] for label in everything.model.learned.labels.tolist()]
    assert cached == [names[label] for label in learned.trainer.model.learned.labels.tolist()]


@pytest.mark.parametrize("epoch", [1, 3])
def test_interrupted_run_ends_as_an_unbroken_one(epoch, run):
    opts = ("OPTIM.MAX_EPOCH", 4, "TRAIN.CHECKPOINT_FREQ", 1, "OPTIM.LR", 0.01)
    whole = run("TipAdapterF", *opts, out="whole")
    with pytest.raises(KeyboardInterrupt):
        run("TipAdapterF", *opts, out="broken", prepare=interrupt(epoch))
    broken = run("TipAdapterF", *opts, out="broken")
    assert "Resuming from" in broken.log and differences(whole.outcome, broken.outcome) == []
    states = [whole.checkpoint(n)["state_dict"] for n in (1, 2, 3, 4)]
    assert all(not torch.equal(a["keys"], b["keys"]) for a, b in zip(states, states[1:]))
    assert [state["alpha"].item() for state in states[:3]] == pytest.approx([1.17] * 3)  # the search comes last
    (group,) = whole.trainer.optim.param_groups
    assert type(whole.trainer.optim) is torch.optim.AdamW
    assert (group["eps"], group["weight_decay"], group["params"]) == (1e-4, 0.01, [whole.trainer.model.learned.keys])


@pytest.mark.parametrize("trainer", BOTH)
def test_search_needs_validation_images_of_its_own(trainer, run):
    def validate_on_test_images(trainer):
        data = trainer.data.dataset
        trainer.data.dataset = SimpleNamespace(train_x=data.train_x, val=data.test, test=data.test)

    node = f"TRAINER.{trainer.upper()}"
    error = run(trainer, status=2, prepare=validate_on_test_images).error
    assert f"{node}.SEARCH True: Caltech101 has no validation images of its own; set SEARCH False" in error
    given = (f"{node}.SEARCH", False, f"{node}.INIT_ALPHA", 2, f"{node}.INIT_BETA", 5.5)
    learned = run(trainer, *given, prepare=validate_on_test_images).trainer.model.learned
    assert (learned.alpha.item(), learned.beta.item()) == (2, 5.5)
