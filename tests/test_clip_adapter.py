"""CLIP-Adapter: equal to the authors' code and to plain loops; trains, evaluates and resumes like every method."""

import json

import pytest
import torch
from conftest import GOLDEN
from helpers import method_config
from reference import Reference, check_parameters, runs_of

from trainers.clip_adapter import CustomCLIP
from trainers.prompting.backbone import load_clip
from trainers.prompting.image_batch import ImageBatch

RUNS = [run for run in runs_of(GOLDEN, "relatives_*.npz") if run[2] == "clip_adapter"]


def build(classnames, backbone, **options):
    return CustomCLIP(method_config("CLIPADAPTER", **options), classnames, backbone)


@pytest.mark.parametrize("stem, arch, run", [pytest.param(*run, id="-".join(run)) for run in RUNS])
def test_matches_original_clip_adapter(tmp_path, stem, arch, run):
    found = Reference(GOLDEN / f"{stem}.npz")
    backbone = found.clip(arch, tmp_path)
    model = build(found.meta["classnames"], backbone)
    initial, final = found.tensors(f"{arch}/{run}/init/"), found.tensors(f"{arch}/{run}/final/")
    model.learned.load_state_dict(initial)
    images = ImageBatch(backbone, found.tensor(f"{arch}/images"))
    torch.testing.assert_close(
        model.score(images, model.text_features()).detach(), found.tensor(f"{arch}/{run}/logits"), rtol=1e-4, atol=1e-4
    )
    optim = torch.optim.SGD(model.learned.parameters(), lr=found.meta["lr"][run])
    found.check_steps(model, images, f"{arch}/{run}/", optim)
    check_parameters(model.learned.state_dict(), initial, final)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_scores_match_loops(clip_file, ratio):
    backbone = load_clip(clip_file).double()
    model = build(["cup", "wind_chime", "face"], backbone, RATIO=ratio, REDUCTION=3).double()
    images = ImageBatch(backbone, torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double())
    scores, text = model.score(images, model.text_features()), model.text_features()
    first, second = model.learned["fc"][0].weight, model.learned["fc"][2].weight
    for i, x in enumerate(images.raw_features()):
        hidden = [max(0.0, sum(float(w * v) for w, v in zip(row, x))) for row in first]
        adapted = [max(0.0, sum(float(w) * h for w, h in zip(row, hidden))) for row in second]
        mixed = [ratio * a + (1 - ratio) * float(v) for a, v in zip(adapted, x)]
        norm = sum(m * m for m in mixed) ** 0.5
        for c, t in enumerate(text):
            cosine = sum(m * float(v) for m, v in zip(mixed, t)) / norm
            assert float(scores[i, c]) == pytest.approx(float(backbone.logit_scale.exp()) * cosine, rel=1e-9)


def test_base_to_new(run, data_root, tmp_path):
    """Trained on base classes; the adapter serves new ones, since nothing in it belongs to a class."""
    trained = run("CLIPAdapter", "OPTIM.LR", 0.02, out="base")
    flags = ["--eval-only", "--model-dir", tmp_path / "base"]
    for subset in ("base", "new"):
        run("CLIPAdapter", "DATASET.SUBSAMPLE_CLASSES", subset, out=subset + "_test", flags=flags)
    results = json.loads((tmp_path / "base_test" / "results.json").read_text())
    assert results["metrics"] == trained.results["metrics"]
