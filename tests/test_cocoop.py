"""CoCoOp against one image, one class at a time."""

import pytest
import torch
from tiny import NAMES, SIZE
from yacs.config import CfgNode as CN

from trainers import cocoop
from trainers.prompting.backbone import load_clip
from trainers.prompting.image_batch import ImageBatch
from trainers.prompting.text_encoder import TextEncoder

B = 5
CLASSES = [*NAMES, "the hard to see inside of a very long name", "cup"]


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def build(clip_file):
    """Builds a CoCoOp model in float64 whose prompts depend clearly on the image."""

    def call(chunk):
        torch.manual_seed(1)
        cfg = CN({"TRAINER": CN(), "TRAIN": CN(), "TEST": CN()})
        cocoop.extend_cfg(cfg)
        cfg.TRAINER.COCOOP.merge_from_list(["N_CTX", 4, "CHUNK", chunk])
        model = cocoop.CustomCLIP(cfg, CLASSES, load_clip(clip_file)).double()
        for parameter in model.learned.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        torch.nn.init.ones_(model.learned.meta_net.linear1.bias)  # few hidden units, which must not all be dead
        return model

    return call


def scores(model, pixels):
    return model.score(ImageBatch(model.backbone, pixels), None)


def naive_scores(model, pixels):
    """One image after the other, as in the original, with its context copied to every class."""
    learner, backbone = model.learned, model.backbone
    net, logits = learner.meta_net, []
    for image in pixels:
        features = backbone.visual(image.unsqueeze(0))[0]
        features = features / features.norm()
        hidden = torch.relu(net.linear1.weight @ features + net.linear1.bias)
        shift = net.linear2.weight @ hidden + net.linear2.bias
        ctx = torch.stack([u + shift for u in learner.ctx])
        text_features = TextEncoder(backbone)(*learner.assemble(ctx.expand(learner.n_cls, -1, -1)))
        logits.append(backbone.logit_scale.exp() * features @ text_features.T)
    return torch.stack(logits)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_scores_and_gradients_equal_a_loop_over_images(build, pixels, chunk):
    model = build(chunk)
    expected = naive_scores(model, pixels)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    weights = torch.randn(expected.shape, dtype=torch.float64)
    parameters = list(model.learned.parameters())
    naive = torch.autograd.grad((expected * weights).sum(), parameters)
    found = scores(model, pixels)
    ours = torch.autograd.grad((found * weights).sum(), parameters)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    for gradient, other in zip(ours, naive):
        assert other.abs().max() > 0
        torch.testing.assert_close(gradient, other, atol=1e-9, rtol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(scores(model, pixels), expected.detach(), atol=1e-9, rtol=1e-9)


def test_memory_is_bounded_by_the_chunk(build, pixels):
    """Activations held for the gradient do not grow with the batch; nothing is computed twice without need."""

    def measure(chunk, n):
        model, sizes, passes = build(chunk), [], []
        model.text_encoder.register_forward_hook(lambda *args: passes.append(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            found = scores(model, pixels[:n])
        found.sum().backward()
        return sum(sizes), len(passes)

    whole, one_pass = measure(B, B)
    single, _ = measure(B, 1)
    chunked, passes = measure(1, B)
    assert one_pass == 1 and passes == 2 * B
    assert chunked < single / 4 < whole / 8
