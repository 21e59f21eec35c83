"""CoCoOp against one image, one class at a time."""

import pytest
import torch
from tiny import NAMES, SIZE
from yacs.config import CfgNode as CN

from trainers import cocoop
from trainers.prompting.backbone import load_clip
from trainers.prompting.text import TextEncoder

B = 5
CLASSES = [*NAMES, "the hard to see inside of a very long name", "cup"]


@pytest.fixture(scope="module")
def images():
    return torch.randn(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def build(clip_file):
    def call(chunk=8, n_ctx=4):
        torch.manual_seed(1)
        cfg = CN({"TRAINER": CN(), "TRAIN": CN(), "TEST": CN()})
        cocoop.extend_cfg(cfg)
        cfg.TRAINER.COCOOP.merge_from_list(["N_CTX", n_ctx, "CHUNK", chunk])
        model = cocoop.CustomCLIP(cfg, CLASSES, load_clip(clip_file)).double()
        for parameter in model.prompt_learner.parameters():  # large enough for images to differ
            torch.nn.init.normal_(parameter, std=0.5)
        torch.nn.init.ones_(model.prompt_learner.meta_net.linear1.bias)  # few hidden units; they must not all be dead
        return model

    return call


def naive_logits(model, images):
    """One image after the other, as the original does, with a context of its own copied to every class."""
    learner, backbone = model.prompt_learner, model.backbone
    logits = []
    for image in images:
        features = backbone.visual(image.unsqueeze(0))[0]
        features = features / features.norm()
        hidden = torch.relu(learner.meta_net.linear1.weight @ features + learner.meta_net.linear1.bias)
        shift = learner.meta_net.linear2.weight @ hidden + learner.meta_net.linear2.bias
        ctx = torch.stack([u + shift for u in learner.ctx])
        text_features = TextEncoder(backbone)(*learner.around(ctx.expand(learner.n_cls, -1, -1)))
        logits.append(backbone.logit_scale.exp() * features @ text_features.T)
    return torch.stack(logits)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_batches_and_chunks_change_nothing(build, images, chunk):
    model = build(chunk)
    expected = naive_logits(model, images)
    assert (expected[0] - expected[1]).abs().max() > 0.1  # the prompts do depend on the image
    weights = torch.randn(expected.shape, dtype=torch.float64)
    parameters = list(model.prompt_learner.parameters())
    naive = torch.autograd.grad((expected * weights).sum(), parameters)
    logits = model(images)
    ours = torch.autograd.grad((logits * weights).sum(), parameters)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    for gradient, other in zip(ours, naive):
        assert other.abs().max() > 0
        torch.testing.assert_close(gradient, other, atol=1e-9, rtol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected.detach(), atol=1e-9, rtol=1e-9)


def test_memory_is_bounded_by_the_chunk(build, images):
    """What is kept for the gradient does not grow with the batch, and nothing is computed twice without need."""

    def kept(chunk, n):
        model, sizes, passes = build(chunk), [], []
        model.text_encoder.register_forward_hook(lambda *args: passes.append(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            logits = model(images[:n])
        logits.sum().backward()
        return sum(sizes), len(passes)

    whole, one_pass = kept(B, B)
    single, _ = kept(B, 1)
    chunked, passes = kept(1, B)
    assert one_pass == 1 and passes == 2 * B
    assert chunked < single / 4 < whole / 8


def test_parameters_are_those_of_published_checkpoints(build):
    model = build(n_ctx=16)
    width, n_features = model.backbone.text_projection.shape
    hidden = max(1, n_features // 16)
    assert {name: tuple(value.shape) for name, value in model.prompt_learner.state_dict().items()} == {
        "ctx": (16, width),
        "meta_net.linear1.weight": (hidden, n_features),
        "meta_net.linear1.bias": (hidden,),
        "meta_net.linear2.weight": (width, hidden),
        "meta_net.linear2.bias": (width,),
    }
    assert list(dict(model.prompt_learner.named_parameters())) == list(model.prompt_learner.state_dict())


def test_under_autocast(build, images):
    model = build(chunk=2).float()
    exact = model(images.float())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images.float())
    assert rough.dtype == torch.float32  # logits are, whatever the encoders' precision
    rough.sum().backward()
    assert model.prompt_learner.ctx.grad.abs().max() > 0
    torch.testing.assert_close(rough, exact, atol=5, rtol=0)  # of cosines times 100
