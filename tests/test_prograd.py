"""ProGrad: equal to the authors' code and to plain loops; trains, evaluates and resumes like every method."""

import math

import pytest
import torch
from conftest import GOLDEN, check_shared_context
from helpers import method_config
from reference import Reference, check_parameters, runs_of
from tiny import NAMES

from trainers.prograd import CustomCLIP, aligned, distillation
from trainers.prompting.backbone import load_clip
from trainers.prompting.image_batch import ImageBatch
from trainers.prompting.text_encoder import encode_texts

RUNS = [run for run in runs_of(GOLDEN, "relatives_*.npz") if run[2].startswith("prograd")]


def build(classnames, backbone, chunk=0, dataset="Caltech101", **options):
    return CustomCLIP(method_config("PROGRAD", dataset, chunk, **{"N_CTX": 4, **options}), classnames, backbone)


@pytest.mark.parametrize("stem, arch, run", [pytest.param(*run, id="-".join(run)) for run in RUNS])
def test_matches_original_prograd(tmp_path, stem, arch, run):
    found = Reference(GOLDEN / f"{stem}.npz")
    backbone = found.clip(arch, tmp_path)
    model = build(found.meta["classnames"], backbone, LAMBDA=float(run.partition("lambda")[2]))
    initial, final = found.tensors(f"{arch}/{run}/init/"), found.tensors(f"{arch}/{run}/final/")
    model.learned.load_state_dict(initial)
    images = ImageBatch(backbone, found.tensor(f"{arch}/images"))
    for text, name in ((model.text_features(), "logits"), (model.hand_made, "teacher_logits")):
        torch.testing.assert_close(
            model.score(images, text).detach(), found.tensor(f"{arch}/{run}/{name}"), rtol=1e-4, atol=1e-4
        )
    optim = torch.optim.SGD(model.learned.parameters(), lr=found.meta["lr"]["prograd"])
    found.check_steps(
        model, images, f"{arch}/{run}/", optim, lambda step: [step.total.item(), step.log["kl"].item()], 2e-5
    )
    check_parameters(model.learned.state_dict(), initial, final, rtol=1e-4, share=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_projection_matches_loops(strength, sign):
    draw = torch.Generator().manual_seed(1)
    k = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    g = 0.5 * sign * k + torch.randn(3, 5, generator=draw, dtype=torch.float64)
    length = math.sqrt(sum(float(v) ** 2 for v in k.flatten()))
    dot = sum(float(a) * float(b) for a, b in zip(g.flatten(), k.flatten())) / length
    assert dot * sign > 0.1
    found = aligned(g, k, strength)
    for i in range(3):
        for j in range(5):
            removed = strength * dot * float(k[i, j]) / length if dot < 0 else 0.0
            assert float(found[i, j]) == pytest.approx(float(g[i, j]) - removed, rel=1e-12)
    if strength == 1 and sign < 0:
        assert float((found * k).sum()) == pytest.approx(0, abs=1e-12)
    assert torch.equal(aligned(g, torch.zeros_like(k), strength), g)


def test_small_gradients_project_like_large_ones():
    """In half precision their squares vanish; and mixed precision recognises an overflow of the other gradient."""
    g, k = torch.tensor([3.0, 4.0]).half(), torch.tensor([-1.0, 0.0]).half()
    assert aligned(g * 1e-4, k * 1e-5, 1.0).tolist() == pytest.approx([0, 4e-4], rel=1e-2, abs=1e-7)
    assert not aligned(g, k * math.inf, 1.0).isfinite().any()


def test_distillation_matches_loops():
    draw = torch.Generator().manual_seed(2)
    logits, teacher = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64) * 3
    expected = 0.0
    for x, t in zip(logits.tolist(), teacher.tolist()):
        p, q = ([math.exp(v / 2.5) for v in row] for row in (t, x))
        expected -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q)) * 2.5**2 / 3
    assert distillation(logits, teacher, 2.5).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chunk, csc", [(0, False), (2, False), (0, True)])
def test_backward_projects_the_gradient_of_the_whole_context(clip_file, chunk, csc):
    """The gradients are those of the two losses, the projection is the loop above; a scale multiplies the result."""
    backbone = load_clip(clip_file).double()
    backbone.logit_scale.data.fill_(4.0)
    torch.manual_seed(3)
    model = build([*NAMES[:4], "a name of many more tokens"], backbone, chunk, CSC=csc).double()
    model.learned.ctx.data.normal_(std=0.1)
    pixels = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images, conflicts = ImageBatch(backbone, pixels), []
    prompts = [f"a photo of a {name.replace('_', ' ')}." for name in model.classnames]
    teacher = model.score(images, encode_texts(backbone, prompts))
    logits = model.score(images, model.text_features())
    for labels in (teacher.argmax(dim=-1), teacher.argmin(dim=-1), logits.argmax(dim=-1)):
        general = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        cross_entropy = -logits.log_softmax(-1)[torch.arange(5), labels].mean()
        g, k = (torch.autograd.grad(f, model.learned.ctx, retain_graph=True)[0] for f in (cross_entropy, general))
        model.learned.ctx.grad = None
        model.backward(model.loss(images, labels), lambda loss: 8 * loss)
        conflicts.append(bool((g * k).sum() < 0))
        expected = g - (g * k).sum() * k / (k * k).sum() if conflicts[-1] else g
        torch.testing.assert_close(model.learned.ctx.grad, 8 * expected, rtol=1e-7, atol=1e-9)
    assert set(conflicts) == {False, True}


def test_context_is_padded_with_zeros(clip_file):
    backbone = load_clip(clip_file)
    words = build(NAMES, backbone, CTX_INIT="a photo of a").learned.ctx
    model = build(NAMES, backbone, CTX_INIT="a photo of a", CTX_PAD=12)
    assert model.learned.ctx.shape == (16, words.shape[1]) and not model.learned.ctx[:12].any()
    assert torch.equal(model.learned.ctx[12:], words)
    assert model.text_features().shape == (len(NAMES), backbone.n_features)
    pets = build(NAMES, backbone, dataset="OxfordPets").hand_made
    prompts = [f"a photo of a {name.replace('_', ' ')}, a type of pet." for name in NAMES]
    torch.testing.assert_close(pets, encode_texts(backbone, prompts))


def test_base_to_new_and_resume(run, tmp_path):
    check_shared_context(run, tmp_path, "ProGrad")


@pytest.mark.parametrize(
    "options, line",
    [
        (("T", 0), "T 0: must be larger than 0"),
        (("LAMBDA", -1), "LAMBDA -1: must be at least 0"),
        (("CTX_PAD", 12, "CTX_INIT", ""), "CTX_PAD 12: needs words in CTX_INIT to pad"),
    ],
)
def test_config_mistakes_end_in_one_line(run, options, line):
    words = [f"TRAINER.PROGRAD.{word}" if str(word).isupper() else word for word in options]
    (found,) = run("ProGrad", *words, status=2).error.splitlines()
    assert found == "error: TRAINER.PROGRAD." + line
