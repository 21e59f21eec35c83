"""ProDA against plain loops in float64 and against samples of its Gaussian; trains, evaluates and resumes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import check_shared_context
from helpers import method_config
from tiny import NAMES

from trainers.proda import CustomCLIP, diagonal_variance, margin_variance, semantic_orthogonality, upper_bound
from trainers.prompting.backbone import load_clip
from trainers.prompting.image_batch import ImageBatch
from trainers.prompting.text_encoder import TextEncoder, embed_tokens

CLASSES = [*NAMES[:3], "a name of many more tokens"]
LABELS = torch.tensor([3, 0, 2, 0])
ORDERS = {"equal": "emfem", "half_end": "emefe", "end": "eeeee"}  # of five prompts: end, middle, front


def build(backbone, chunk=0, **options):
    cfg = method_config("PRODA", chunk=chunk, **{"N_CTX": 3, "N_PROMPT": 5, "N_BATCH": 3, **options})
    torch.manual_seed(0)
    model = CustomCLIP(cfg, CLASSES, backbone).to(backbone.logit_scale.dtype)
    model.learned.ctx.data.normal_(std=0.3)
    return model


@pytest.fixture
def backbone(clip_file):
    """In float64, with a temperature at which no probability is close to 0 or 1."""
    found = load_clip(clip_file).double()
    found.logit_scale.data.fill_(2.0)
    return found


@pytest.fixture
def images(backbone):
    pixels = torch.randn(len(LABELS), 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ImageBatch(backbone, pixels)


def naive_feature(model, k, name, position):
    """E numbers: the text feature of context k around one class name, its tokens put in order one by one."""
    backbone, ctx = model.backbone, model.learned.ctx[k]
    tokens = backbone.tokenizer.encode(name.replace("_", " "))
    words = embed_tokens(backbone, [[*tokens, *backbone.tokenizer.encode("."), backbone.tokenizer.eot]])[0][0]
    before, end = {"e": len(ctx), "m": len(ctx) // 2, "f": 0}[position], 1 + len(tokens)
    prompt = torch.cat([words[:1], ctx[:before], words[1:end], ctx[before:], words[end:]])
    return TextEncoder(backbone)(prompt.unsqueeze(0), torch.tensor([len(prompt) - 1]))[0].tolist()


def dot(a, b):
    return sum(p * q for p, q in zip(a, b))


def naive_loss(model, z, label, prompts):
    """L_upper and lambda L_so of image features (rows of numbers), from means and covariances of the class weights."""
    options, scale, n = model.options, math.exp(model.backbone.logit_scale), len(prompts)
    w = [[naive_feature(model, k, name, ORDERS[options.POSITIONS][k]) for name in CLASSES] for k in prompts]
    classes, size = range(len(CLASSES)), range(len(w[0][0]))
    mu = [[sum(w[k][c][d] for k in range(n)) / n for d in size] for c in classes]

    def sigma(a, b, d, e):
        total = sum((w[k][a][d] - mu[a][d]) * (w[k][b][e] - mu[b][e]) for k in range(n))
        return total / (n - options.CORRECTION)

    upper, pairs = 0.0, [(d, e) for d in size for e in size if options.COVARIANCE == "full" or d == e]
    for x, y in zip(z, label):
        exponents = []
        for i in classes:
            terms = [(i, i, 1), (y, y, 1), (i, y, -1), (y, i, -1)]
            variance = sum(x[d] * x[e] * sum(s * sigma(a, b, d, e) for a, b, s in terms) for d, e in pairs)
            exponents.append(scale * dot(x, mu[i]) + scale**2 * variance / 2)
        upper -= math.log(math.exp(scale * dot(x, mu[y])) / sum(map(math.exp, exponents))) / len(z)
    g = [naive_feature(model, k, "", "e") for k in range(options.N_PROMPT)]
    cosines = [abs(dot(a, b)) for a, b in itertools.combinations(g, 2)]
    return upper, options.LAMBDA * sum(cosines) / len(cosines)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"COVARIANCE": "diagonal", "CORRECTION": -1, "POSITIONS": "half_end"},
        {"CORRECTION": 1, "chunk": 2},
        {"N_BATCH": 1, "LAMBDA": 2.0, "POSITIONS": "end"},
    ],
)
def test_losses_match_loops(backbone, images, options):
    model = build(backbone, **options)
    torch.manual_seed(5)
    prompts = torch.randperm(5)[: model.options.N_BATCH].tolist()
    with torch.no_grad():
        upper, orthogonality = naive_loss(model, images.features()[:2].tolist(), LABELS[:2].tolist(), prompts)
    torch.manual_seed(5)
    step = model.loss(ImageBatch(backbone, images.pixels[:2]), LABELS[:2])
    assert step.losses["upper_bound"].item() == pytest.approx(upper, rel=1e-8)
    assert step.losses["orthogonality"].item() == pytest.approx(orthogonality, rel=1e-8)
    step.total.backward()
    gradient = model.learned.ctx.grad.flatten(1).norm(dim=-1)
    assert (gradient > 0).all()  # L_so reaches every prompt of the collection
    assert all(p.grad is None for part in (backbone, model.frames) for p in part.parameters())


@torch.no_grad()
@pytest.mark.parametrize("positions", ORDERS)
def test_prediction_uses_the_mean_of_all_prompts(backbone, images, positions):
    model = build(backbone, POSITIONS=positions)
    w = [[naive_feature(model, k, name, ORDERS[positions][k]) for name in CLASSES] for k in range(5)]
    mu = torch.tensor(w, dtype=torch.float64).mean(dim=0)
    torch.testing.assert_close(model.text_features(), mu)
    random = torch.get_rng_state()
    scores = model.score(images, model.text_features())
    torch.testing.assert_close(scores, math.exp(2) * images.features() @ mu.T)
    assert torch.equal(torch.get_rng_state(), random)  # nothing is drawn in an evaluation


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_surrogate_is_an_upper_bound_and_tight_for_small_variances(covariance):
    """The expected cross-entropy is estimated from classifiers that are drawn from the Gaussian."""
    draw = torch.Generator().manual_seed(0)
    n, scale, draws = 4, 5.0, 20_000
    z = F.normalize(torch.randn(4, 6, generator=draw, dtype=torch.float64), dim=-1)
    centre = F.normalize(torch.randn(1, 5, 6, generator=draw, dtype=torch.float64), dim=-1)
    spread = 0.2 * torch.randn(n, 5, 6, generator=draw, dtype=torch.float64)
    gaps = []
    for size in (1.0, 0.3, 0.03):
        w = centre + size * spread
        mean, logits = w.mean(dim=0), scale * z @ w.mT
        full = covariance == "full"
        variance = margin_variance(logits, LABELS) if full else diagonal_variance(z, w, LABELS) * scale**2
        bound = upper_bound(logits.mean(dim=0), variance / n, LABELS)
        # sum_k eps_k (w_k - mu) / sqrt(n) has the covariance of the prompts; eps_kd makes dimensions independent
        epsilon = torch.randn(draws, n, 1, 1 if full else 6, generator=draw, dtype=torch.float64)
        sampled = mean + sum(epsilon[:, k] * (w[k] - mean) for k in range(n)) / n**0.5
        scores = (scale * z @ sampled.mT).flatten(0, 1)  # (draws * B, C)
        losses = F.cross_entropy(scores, LABELS.repeat(draws), reduction="none").view(draws, -1).mean(dim=1)
        noise = losses.std() / draws**0.5
        gaps.append((bound - losses.mean()).item())
        assert gaps[-1] > -4 * noise and bound > F.cross_entropy(logits.mean(dim=0), LABELS)
    assert gaps[0] > max(0.1, 10 * noise) and abs(gaps[2]) < 0.002


def test_orthogonality_of_one_or_orthogonal_features():
    assert semantic_orthogonality(torch.eye(3)) == 0 and semantic_orthogonality(torch.ones(1, 4)) == 0
    assert semantic_orthogonality(torch.tensor([[1.0, 0], [-1, 0], [0, 1]])).item() == pytest.approx(1 / 3)


def test_base_to_new_and_resume(run, tmp_path):
    check_shared_context(run, tmp_path, "ProDA", "TRAINER.PRODA.N_PROMPT", 6, "TRAINER.PRODA.N_CTX", 4)


@pytest.mark.parametrize(
    "options, line",
    [
        (("N_BATCH", 33), "N_BATCH 33: must be at most N_PROMPT, the size of the collection"),
        (("N_BATCH", 1, "CORRECTION", 1), "CORRECTION 1: needs an N_BATCH of at least 2"),
        (("POSITIONS", "back"), "POSITIONS back: choose one of equal, half_end, end"),
    ],
)
def test_config_mistakes_end_in_one_line(run, options, line):
    words = [f"TRAINER.PRODA.{word}" if str(word).isupper() else word for word in options]
    (found,) = run("ProDA", *words, status=2).error.splitlines()
    assert found == "error: TRAINER.PRODA." + line
