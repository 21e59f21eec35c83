"""DPT: equal to the authors' code and to plain loops; trains, evaluates and resumes like every method."""

import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN, differences, interrupt
from helpers import method_config
from reference import Reference, check_parameters, runs_of
from test_vpt import naive_vit, norm, vit_file, vit_run  # noqa: F401 (fixtures)
from tiny import NAMES

from trainers.dpt import CustomCLIP, class_aware_loss
from trainers.prompting.backbone import load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.image_batch import ImageBatch

RUNS = [run for run in runs_of(GOLDEN, "relatives_*.npz") if run[2].startswith("dpt")]
OURS = {"meta_nets": "project", "lns": "norm_class", "lns2": "norm_token", "classfiers": "classifier"}
OURS |= {"qmlp": "query", "kmlp": "key", "vmlp": "value"}


def build(classnames, backbone, **options):
    torch.manual_seed(0)
    return CustomCLIP(method_config("DPT", **options), classnames, backbone)


def from_authors(state):
    """Our state dict from the authors' parameters."""
    found = {"text.ctx": state["prompt_learner.ctx"], "visual.ctx": state["ctx_learner.ctx"]}
    for i, free in enumerate(state["extractor.ctx"]):
        found[f"class_aware.{i}.free.ctx"] = free.unsqueeze(0)
    for name, value in state.items():
        _, *parts, leaf = name.split(".")  # extractor.attns.0.qmlp.weight
        if parts:
            found[f"class_aware.{parts[1]}.{OURS[(parts[2:] or parts)[0]]}.{leaf}"] = value
    return found


@pytest.mark.parametrize("stem, arch, run", [pytest.param(*run, id="-".join(run)) for run in RUNS])
def test_matches_original(tmp_path, stem, arch, run):
    """With the weight that the authors' ``train.py`` gives to the class-aware loss; their script has 0.3."""
    found = Reference(GOLDEN / f"{stem}.npz")
    backbone, prefix = found.clip(arch, tmp_path), f"{arch}/{run}/"
    initial, final = (from_authors(found.tensors(f"{prefix}{when}/")) for when in ("init", "final"))
    layer_logits, indices = found.tensor(f"{prefix}layer_logits"), found.tensor(f"{prefix}indices").long()
    sizes = {"N_CTX": len(initial["text.ctx"]), "VISUAL_N_CTX": initial["visual.ctx"].shape[1]}
    sizes |= {"CANDIDATES": indices.shape[1], "CLASS_AWARE_BLOCKS": len(layer_logits)}
    model = build(found.meta["classnames"], backbone, **sizes, ALPHA=1.0)
    model.learned.load_state_dict(initial)
    model.before_epoch(29 if "first" in run else 30)
    images = ImageBatch(backbone, found.tensor(f"{arch}/images"))

    with torch.no_grad():
        text, candidates = model.text_features(), model.candidates(images)
        features, token_logits = model.encode(images, text, candidates)
        scores = model.score(images, text)
    assert torch.equal(candidates, indices)
    for name, value in {"logits": scores, "layer_logits": token_logits.permute(1, 2, 0, 3)}.items():
        torch.testing.assert_close(value, found.tensor(f"{prefix}{name}"), rtol=1e-5, atol=1e-4)
    hand_made = backbone.logits(features, model.hand_made())
    torch.testing.assert_close(hand_made, found.tensor(f"{prefix}image_logits"), rtol=1e-5, atol=1e-4)

    lr = found.meta["lr"].get(run, found.meta["lr"]["dpt"])
    optim = torch.optim.SGD(model.learned.parameters(), lr=lr)
    found.check_steps(model, images, prefix, optim)
    check_parameters(model.learned.state_dict(), initial, final)


def unit(x):
    return x / x.norm()


def naive_tokens(part, features, x):
    """Tokens and logits of one image's candidates, one at a time."""
    x = torch.cat([x.detach(), part.free.ctx[0]])
    tokens, logits = [], []
    for feature in features:
        projected = part.project.weight @ feature + part.project.bias
        query = part.query.weight @ projected
        weights = [math.exp(float(query @ (part.key.weight @ row)) / 32**0.5) for row in x]
        mixed = sum(w * row for w, row in zip(weights, x)) / sum(weights)
        attended = part.value.weight @ mixed
        tokens.append(norm(attended + projected, part.norm_token))
        logits.append(part.classifier.weight @ norm(attended, part.norm_class))
    return torch.stack(tokens), torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("class_aware", [1, 2])
@pytest.mark.parametrize("guided", [True, False])
def test_scores_and_losses_match_loops(vit_file, class_aware, guided):  # noqa: F811
    backbone = load_clip(vit_file).double()
    backbone.logit_scale.fill_(2.5)
    options = {"N_CTX": 2, "VISUAL_N_CTX": 2, "CANDIDATES": 3, "CLASS_AWARE_BLOCKS": class_aware}
    model = build(NAMES[:5], backbone, **options, ALPHA=0.7).double()
    for parameter in model.learned.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    model.guided = guided
    learned, hand_made, text = model.learned, model.hand_made(), model.text_features()
    assert (text.norm(dim=1) - 1).abs().min() > 0.1
    pixels = torch.randn(4, 3, 64, 64).double()
    label = torch.tensor([0, 1, 2, 4])
    scale, rows, losses, own = math.exp(2.5), [], [], []
    for image, y in zip(pixels, label.tolist()):
        original = unit(naive_vit(backbone.visual, image, lambda i, x: x[:0]))
        ranked = sorted(range(5), key=lambda c: -float(original @ hand_made[c]))[:3]
        of_blocks = []

        def tokens(i, x, ranked=ranked, of_blocks=of_blocks):
            if i < 2 - class_aware:
                return learned["visual"].ctx[i]
            made, logits = naive_tokens(learned["class_aware"][i - 2 + class_aware], text[ranked], x)
            of_blocks.append(logits)
            return made

        prompted = unit(naive_vit(backbone.visual, image, tokens))
        both, of_text, of_image = [], [], []
        for c in range(5):
            both.append(scale * float(prompted @ unit(text[c])))
            of_text.append(scale * float(original @ unit(text[c])))
            of_image.append(scale * float(prompted @ hand_made[c]))
        rows.append(both)
        entropy = [math.log(sum(map(math.exp, v))) - v[y] for v in (both, of_text, of_image)]
        losses.append(0.1 * entropy[0] + entropy[1] + entropy[2] if guided else entropy[0])
        for logits in of_blocks:
            own += [float(row.logsumexp(0) - row[y]) for c, row in zip(ranked, logits) if c == y]
    assert 0 < len(own) < 4 * class_aware  # of some images, the label is no candidate
    images = ImageBatch(backbone, pixels)
    torch.testing.assert_close(model.score(images, text), torch.tensor(rows).double(), rtol=1e-6, atol=1e-6)
    step, expected = model.loss(images, label), sum(losses) / 4 + 0.7 * sum(own) / len(own)
    assert float(step.total) == pytest.approx(expected, rel=1e-6)


def test_class_aware_loss_of_one_image_and_of_none():
    """Without a label among the candidates the authors' code has the mean over no tokens, which is not a number."""
    logits, candidates = torch.randn(2, 1, 2, 4, requires_grad=True), torch.tensor([[0, 1], [1, 2]])
    loss = class_aware_loss(logits, candidates, torch.tensor([3, 3]))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
    own = logits[1, 0, 1]
    assert class_aware_loss(logits, candidates, torch.tensor([3, 2])).item() == pytest.approx(
        (own.logsumexp(0) - own[2]).item(), rel=1e-5
    )


@torch.no_grad()
def test_both_packages_agree(vit_file):  # noqa: F811
    pytest.importorskip("clip.model")
    pixels, scores = torch.randn(3, 3, 64, 64), []
    for provider in ("open_clip", "clip"):
        model = build(NAMES, load_clip(vit_file, provider), CANDIDATES=3)
        scores.append(model.score(ImageBatch(model.backbone, pixels), model.text_features()))
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-4)


def test_base_to_new_by_name(vit_run):  # noqa: F811
    """Classes of the same name have their rows of the classifier, others initial ones, which no prediction uses."""
    trained = vit_run("DPT", "DATASET.SUBSAMPLE_CLASSES", "new", out="first")
    flags = ["--eval-only", "--model-dir", trained.folder]
    others = "DATALOADER.TEST.BATCH_SIZE", 3, "DATALOADER.TEST.SAMPLER", "RandomSampler", "DATALOADER.NUM_WORKERS", 1
    again = vit_run("DPT", "DATASET.SUBSAMPLE_CLASSES", "new", *others, out="again", flags=flags)
    assert again.trainer.evaluation.predictions == trained.trainer.evaluation.predictions
    everything = vit_run("DPT", "DATASET.SUBSAMPLE_CLASSES", "all", out="all", flags=flags)
    rows = [run.trainer.model.learned["class_aware"][0].classifier.weight for run in (trained, everything)]
    assert torch.equal(rows[0], rows[1][4:]) and rows[1].shape[0] == len(NAMES)
    other = vit_run("DPT", "DATASET.SUBSAMPLE_CLASSES", "base", out="other", flags=flags)
    batch = next(iter(other.trainer.test_loader))["img"]
    before = other.trainer.model_inference(batch)
    other.trainer.model.learned["class_aware"][0].classifier.weight.data.normal_()
    assert torch.equal(other.trainer.model_inference(batch), before)


def test_parts_have_their_own_rates_and_the_phases_follow_the_epoch(vit_run):  # noqa: F811
    seen = []

    def prepare(trainer):
        trainer.model.after_step = lambda: seen.append(
            (trainer.epoch, trainer.model.guided, *(group["lr"] for group in trainer.optim.param_groups))
        )

    opts = "OPTIM.MAX_EPOCH", 4, "OPTIM.WARMUP_EPOCH", 3, "TRAINER.DPT.GUIDED_EPOCHS", 2, "OPTIM.LR", 0.01
    vit_run("DPT", *opts, prepare=prepare)
    text = [1e-5, *(0.001 * (1 + math.cos(math.pi * n / 4)) for n in range(3))]
    expected = [(n, n < 2, lr, text[n]) for n, lr in enumerate([1e-5] * 3 + [0.01]) for _ in range(2)]
    assert [row[:2] for row in seen] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2:] for row in seen], [row[2:] for row in expected])


@pytest.mark.parametrize("epoch", [1, 2])
def test_interrupted_run_ends_as_an_unbroken_one(vit_run, epoch):  # noqa: F811
    """Interrupted in either phase."""
    opts = "OPTIM.MAX_EPOCH", 4, "TRAIN.CHECKPOINT_FREQ", 1, "TRAINER.DPT.GUIDED_EPOCHS", 2
    unbroken = vit_run("DPT", *opts, out="unbroken")
    with pytest.raises(KeyboardInterrupt):
        vit_run("DPT", *opts, prepare=interrupt(epoch))
    assert differences(unbroken.outcome, vit_run("DPT", *opts).outcome) == []


def test_mistakes_are_one_line(vit_run, rn_file):  # noqa: F811
    (line,) = vit_run("DPT", "TRAINER.DPT.CANDIDATES", 0, status=2).error.splitlines()
    assert line == "error: TRAINER.DPT.CANDIDATES 0: must be at least 1"
    (line,) = vit_run("DPT", "TRAINER.DPT.CLASS_AWARE_BLOCKS", 3, status=2).error.splitlines()
    assert line.startswith("error: TRAINER.DPT.CLASS_AWARE_BLOCKS 3: ") and line.endswith("has 2 blocks")
    (line,) = vit_run("DPT", "TRAIN.COMPILE", True, status=2).error.splitlines()
    assert line.startswith("error: TRAIN.COMPILE True: must be False: ")
    with pytest.raises(UserError, match="DPT adds tokens to a vision transformer.* choose ViT-B/16"):
        build(NAMES, load_clip(rn_file))
