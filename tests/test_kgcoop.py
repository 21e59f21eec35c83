"""KgCoOp: equal to the authors' code and to plain loops; trains, evaluates and resumes like every method."""

import math

import pytest
import torch
from conftest import GOLDEN, check_shared_context
from helpers import method_config
from reference import Reference, check_parameters, runs_of
from tiny import NAMES

from trainers.kgcoop import CustomCLIP
from trainers.prompting.backbone import load_clip
from trainers.prompting.image_batch import ImageBatch
from trainers.prompting.text_encoder import TextEncoder, encode_texts

RUNS = [run for run in runs_of(GOLDEN, "relatives_*.npz") if run[2].startswith("kgcoop")]


def build(classnames, backbone, chunk=0, dataset="Caltech101", **options):
    return CustomCLIP(method_config("KGCOOP", dataset, chunk, **options), classnames, backbone)


@pytest.mark.parametrize("stem, arch, run", [pytest.param(*run, id="-".join(run)) for run in RUNS])
def test_matches_original_kgcoop(tmp_path, stem, arch, run):
    found = Reference(GOLDEN / f"{stem}.npz")
    backbone = found.clip(arch, tmp_path)
    model = build(found.meta["classnames"], backbone, W=float(run.partition("_w")[2]))
    initial, final = found.tensors(f"{arch}/{run}/init/"), found.tensors(f"{arch}/{run}/final/")
    torch.testing.assert_close(model.learned.ctx.detach(), initial["ctx"])  # the words of CTX_INIT
    images = ImageBatch(backbone, found.tensor(f"{arch}/images"))
    torch.testing.assert_close(
        model.score(images, model.text_features()).detach(), found.tensor(f"{arch}/{run}/logits"), rtol=1e-4, atol=1e-4
    )
    optim = torch.optim.SGD(model.learned.parameters(), lr=found.meta["lr"][run])
    found.check_steps(model, images, f"{arch}/{run}/", optim)
    check_parameters(model.learned.state_dict(), initial, final, rtol=1e-4, share=1e-5)


@pytest.mark.parametrize("weight, chunk", [(0.0, 0), (8.0, 0), (8.0, 2)])
def test_loss_matches_loops(clip_file, weight, chunk):
    backbone = load_clip(clip_file).double()
    backbone.logit_scale.data.fill_(2.0)
    names = [*NAMES[:4], "a name of many more tokens"]
    model = build(names, backbone, chunk, dataset="OxfordPets", W=weight).double()
    model.learned.ctx.data += 0.3 * torch.randn(
        model.learned.ctx.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images, labels = ImageBatch(backbone, pixels), [4, 0, 2]
    prompts = [f"a photo of a {name.replace('_', ' ')}, a type of pet." for name in names]
    with torch.no_grad():
        old = encode_texts(backbone, prompts).tolist()
        new = TextEncoder(backbone)(*model.learned()).tolist()
        features = images.raw_features().tolist()

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    entropy = 0.0
    for feature, label in zip(features, labels):
        exponentials = [math.exp(math.exp(2) * cosine(feature, w)) for w in new]
        entropy -= math.log(exponentials[label] / sum(exponentials)) / 3
    distance = sum(1 - cosine(a, b) for a, b in zip(new, old)) / len(names)
    euclidean = sum((x - y) ** 2 for a, b in zip(new, old) for x, y in zip(a, b)) / len(names)
    assert distance > 0.01 and euclidean == pytest.approx(2 * distance)  # the paper's form has half the weight
    step = model.loss(images, torch.tensor(labels))
    assert step.losses["cross_entropy"].item() == pytest.approx(entropy, rel=1e-9)
    assert step.losses["knowledge"].item() == pytest.approx(weight * distance, rel=1e-9)
    step.total.backward()
    assert model.learned.ctx.grad.abs().max() > 0


def test_base_to_new_and_resume(run, tmp_path):
    check_shared_context(run, tmp_path, "KgCoOp")


def test_weight_holds_the_text_features(run):
    """The larger W, the closer the learned text features stay to those of the hand-made prompts."""

    def distance(weight):
        model = run("KgCoOp", "TRAINER.KGCOOP.W", weight, "OPTIM.LR", 0.02, out=f"w{weight}").trainer.model
        with torch.no_grad():
            return (1 - (model.text_features() * model.hand_made).sum(-1)).mean().item()

    assert 0 < distance(8) < distance(0)


def test_config_mistake_ends_in_one_line(run):
    (line,) = run("KgCoOp", "TRAINER.KGCOOP.W", -1, status=2).error.splitlines()
    assert line == "error: TRAINER.KGCOOP.W -1: must be at least 0"
