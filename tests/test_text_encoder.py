"""text_encoder.py against the encoder of the package that built the model, and against loops over all 77 tokens."""

import pytest
import torch
from helpers import one_line
from tiny import NAMES

from trainers.prompting import text_encoder
from trainers.prompting.backbone import import_provider, load_clip
from trainers.prompting.prompts import PromptLearner
from trainers.prompting.text_encoder import TextEncoder, embed_tokens, encode_texts, encode_tokens, length_buckets

LENGTHS = ["cup", "2012 Tesla Model S", "cup", "the hard to see inside of a very long name", "face", "wind chime"]
EXACT = {"atol": 1e-12, "rtol": 1e-10}


@pytest.fixture(scope="module")
def backbone(rn_file):
    return load_clip(rn_file).double()


@pytest.fixture
def encoded(backbone):
    """Shapes (prompts, positions) that go through the first layer."""
    shapes = []
    hook = backbone.blocks[0].mlp.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:-1]))
    yield shapes
    hook.remove()


def learner_of(backbone, names, n_ctx, **options):
    torch.manual_seed(n_ctx)
    learner = PromptLearner(backbone, names, n_ctx, **options)
    learner.ctx.data = torch.randn_like(learner.ctx) * 0.3
    return learner


def naive_norm(norm, x):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / ((centred**2).mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def naive_encode(backbone, prompts, eot):
    """CLIP's text encoder on full-length prompts, one prompt, head and position at a time."""
    features = []
    for prompt, last in zip(prompts, eot):
        x = prompt + backbone.positional_embedding[: len(prompt)]
        for block in backbone.blocks:
            h = naive_norm(block.ln_1, x)
            q, k, v = (h @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
            heads = []
            for qh, kh, vh in zip(*(t.chunk(backbone.n_head, dim=-1) for t in (q, k, v))):
                rows = []
                for i in range(len(x)):
                    weights = torch.softmax(qh[i] @ kh[: i + 1].T / qh.shape[-1] ** 0.5, dim=-1)
                    rows.append(weights @ vh[: i + 1])
                heads.append(torch.stack(rows))
            x = x + block.attn.out_proj(torch.cat(heads, dim=-1))
            x = x + block.mlp(naive_norm(block.ln_2, x))
        y = naive_norm(backbone.ln_final, x[last]) @ backbone.text_projection
        features.append(y / y.norm())
    return torch.stack(features)


def naive_prompt(backbone, ctx, name, position="end"):
    """[SOS], context and name, full stop, [EOT] and padding up to 77 tokens; the position of [EOT]."""
    embed, encode, name = backbone.token_embedding, backbone.tokenizer.encode, name.replace("_", " ")
    name_ids = encode(name)
    rest = [*encode(name + "."), backbone.eot_token][len(name_ids) :]
    words, tail, half = embed(torch.tensor(name_ids)), embed(torch.tensor(rest)), len(ctx) // 2
    orders = {"end": [ctx, words], "middle": [ctx[:half], words, ctx[half:]], "front": [words, ctx]}
    prompt = torch.cat([embed(torch.tensor([backbone.sot_token])), *orders[position], tail])
    padding = embed(torch.zeros(77 - len(prompt), dtype=torch.long))
    return torch.cat([prompt, padding]), len(prompt) - 1


def plain_features(backbone, learner, ctx):
    """g of every class with its own copy of the context, all padded to the longest, nothing shared."""
    prompts, eot = learner.assemble(ctx.expand(learner.n_cls, -1, -1))
    x = prompts + backbone.positional_embedding[: prompts.shape[1]]
    for block in backbone.blocks:
        x, _, _ = TextEncoder(backbone)._block(block, x)
    x = backbone.ln_final(x[torch.arange(len(x)), eot]) @ backbone.text_projection
    return x / x.norm(dim=-1, keepdim=True)


def test_features_equal_encode_text_of_the_package(rn_file):
    texts = ["a photo of a face.", "cup", "a photo of a 2012 Tesla Model S, a type of car, seen from far away."]
    ours = encode_texts(load_clip(rn_file), texts)
    state = torch.load(rn_file, weights_only=True)
    if import_provider().__name__ == "open_clip":
        from open_clip.model import build_model_from_openai_state_dict as build
        from open_clip.tokenizer import tokenize
    else:
        from clip import tokenize
        from clip.model import build_model as build
    model = build(dict(state)).float()
    model.load_state_dict(state)
    with torch.no_grad():
        theirs = model.encode_text(tokenize(texts))
    torch.testing.assert_close(ours, theirs / theirs.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position, csc", [("end", False), ("end", True), ("middle", False), ("front", True)])
@pytest.mark.parametrize("n_ctx", [1, 5])
def test_learned_prompts_equal_loop(backbone, n_ctx, position, csc):
    """Values and gradients are those of 77 tokens, one prompt at a time."""
    learner = learner_of(backbone, NAMES, n_ctx, csc=csc, class_token_position=position)
    weights = torch.randn(len(NAMES), 24, dtype=torch.float64)
    prompts, eot = learner()
    assert prompts.shape[1] == int(eot.max()) + 1  # nothing after the longest prompt
    contexts = learner.ctx if csc else [learner.ctx] * len(NAMES)
    full = [naive_prompt(backbone, ctx, name, position) for ctx, name in zip(contexts, NAMES)]
    assert [last for _, last in full] == eot.tolist()
    expected = naive_encode(backbone, *zip(*full))
    (gradient,) = torch.autograd.grad((expected * weights).sum(), learner.ctx)
    assert gradient.abs().max() > 0
    for inputs in ((prompts, eot), learner.encoder_inputs()):
        features = TextEncoder(backbone)(*inputs)
        torch.testing.assert_close(features, expected, atol=1e-10, rtol=1e-8)
        (found,) = torch.autograd.grad((features * weights).sum(), learner.ctx)
        torch.testing.assert_close(found, gradient, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("padding", [0, 10, text_encoder.MAX_PADDING_TOKENS])
@pytest.mark.parametrize("names, n_ctx", [(LENGTHS, 1), (LENGTHS, 16), (["cup"], 4), (["cup"] * 3, 4)])
def test_shared_context_changes_nothing(backbone, monkeypatch, names, n_ctx, padding):
    """Values and gradients, of one context for all classes and of three (CoCoOp's, one per image)."""
    monkeypatch.setattr(text_encoder, "MAX_PADDING_TOKENS", padding)
    learner, encode = learner_of(backbone, names, n_ctx), TextEncoder(backbone)
    contexts = torch.randn(3, *learner.ctx.shape, dtype=torch.float64).requires_grad_()
    weights = torch.randn(3, len(names), backbone.text_projection.shape[1], dtype=torch.float64)
    suffixes, eot, prefix = learner.encoder_inputs()
    assert prefix.shape == (1 + n_ctx, learner.ctx.shape[1])

    shared, plain = encode(suffixes, eot, prefix), plain_features(backbone, learner, learner.ctx)
    torch.testing.assert_close(shared, plain, **EXACT)
    torch.testing.assert_close(encode(*learner()), plain, **EXACT)
    gradient, expected = (torch.autograd.grad((f * weights[0]).sum(), learner.ctx)[0] for f in (shared, plain))
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert expected.abs().max() > 0

    shared = encode(suffixes, eot, learner.prefix(contexts))
    plain = torch.stack([plain_features(backbone, learner, ctx) for ctx in contexts])
    torch.testing.assert_close(shared, plain, **EXACT)
    gradient, expected = (torch.autograd.grad((f * weights).sum(), contexts)[0] for f in (shared, plain))
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_several_attention_heads_equal_loop(rn_file):
    """The small model's width allows for one head of the usual size; CLIP has eight and more."""
    backbone = load_clip(rn_file).double()
    backbone.n_head = 4
    learner = learner_of(backbone, LENGTHS, 3)
    contexts = torch.stack([learner.ctx.detach(), torch.randn_like(learner.ctx) * 0.3])
    full = [[naive_prompt(backbone, ctx, name) for name in LENGTHS] for ctx in contexts]
    expected = torch.stack([naive_encode(backbone, *zip(*prompts)) for prompts in full])
    suffixes, eot, _ = learner.encoder_inputs()
    with torch.no_grad():
        found = TextEncoder(backbone)(suffixes, eot, learner.prefix(contexts))
        torch.testing.assert_close(TextEncoder(backbone)(*learner()), expected[0], atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


def test_positions_behind_the_end_of_text_are_not_encoded(backbone, encoded):
    prompts, eot = PromptLearner(backbone, ["cup", "face"], 4)()
    longer = torch.cat([prompts, torch.randn(2, 20, prompts.shape[2], dtype=prompts.dtype)], dim=1)
    torch.testing.assert_close(TextEncoder(backbone)(longer, eot), TextEncoder(backbone)(prompts, eot))
    assert encoded == [(2, int(eot.max()) + 1)] * 2


def test_shared_context_is_not_copied_for_every_class(backbone, encoded):
    """The prefix is encoded once, and no tensor with a prefix per class is held for the gradient."""
    n_ctx, held = 60, []
    learner = PromptLearner(backbone, LENGTHS, n_ctx)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        TextEncoder(backbone)(*learner.encoder_inputs())
    tokens = [shape.numel() for shape in encoded]
    assert tokens[0] == 1 + n_ctx and sum(tokens[1:]) == len(LENGTHS) * learner.token_suffix.shape[1]
    assert max(held) < len(LENGTHS) * n_ctx * learner.ctx.shape[1]


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
@pytest.mark.parametrize("csc", [False, True])
def test_chunks_change_nothing_but_memory(backbone, monkeypatch, chunk, csc):
    monkeypatch.setattr(text_encoder, "MAX_PADDING_TOKENS", 10)  # some chunks are buckets of one length
    learner = PromptLearner(backbone, LENGTHS, 4, csc=csc)
    weights = torch.randn(len(LENGTHS), backbone.text_projection.shape[1], dtype=torch.float64)
    found = {}
    for size in (0, chunk):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.numel()) or t, lambda t: t):
            features = TextEncoder(backbone, size)(*learner.encoder_inputs())
        (gradient,) = torch.autograd.grad((features * weights).sum(), learner.ctx)
        found[size] = features, gradient, sum(held)
    torch.testing.assert_close(found[chunk][0], found[0][0], **EXACT)
    torch.testing.assert_close(found[chunk][1], found[0][1], **EXACT)
    assert found[0][1].abs().max() > 0
    if chunk <= 2:
        assert found[chunk][2] < found[0][2] / 2
    with torch.no_grad():
        torch.testing.assert_close(TextEncoder(backbone, chunk)(*learner.encoder_inputs()), found[0][0])


def test_chunks_limit_the_classes_of_a_pass(backbone, encoded):
    inputs = PromptLearner(backbone, LENGTHS, 4, csc=True).encoder_inputs()
    TextEncoder(backbone, 4)(*inputs).sum().backward(retain_graph=True)
    assert sorted(shape[0] for shape in encoded) == [2, 2, 4, 4]  # forward, and again in the backward pass
    del encoded[:]
    TextEncoder(backbone, len(LENGTHS))(*inputs).sum().backward()
    assert [shape[0] for shape in encoded] == [len(LENGTHS)]  # one chunk needs no second pass


@pytest.mark.parametrize(
    "allowed, buckets",
    [
        (0, [[3], [0], [2], [1, 4]]),
        (2, [[3, 0], [2], [1, 4]]),  # 1 token of padding, 3 with the next
        (3, [[3, 0, 2], [1, 4]]),
        (10, [[3, 0, 2, 1], [4]]),
        (17, [[3, 0, 2, 1, 4]]),
    ],
)
def test_length_buckets(monkeypatch, allowed, buckets):
    monkeypatch.setattr(text_encoder, "MAX_PADDING_TOKENS", allowed)
    assert length_buckets([9, 3, 8, 10, 3]) == buckets


def test_tokens_are_those_of_clip(backbone):
    (ids,) = encode_tokens(backbone, ["a photo of a cat."])
    assert ids == [320, 1125, 539, 320, 2368, 269, 49407]
    embeddings, last = embed_tokens(backbone, [ids, [5, 49407]])
    assert last.tolist() == [7, 2] and embeddings.shape[:2] == (2, 8)
    assert torch.equal(embeddings[0, 0], backbone.token_embedding.weight[49406])
    assert torch.equal(embeddings[1, 3], backbone.token_embedding.weight[0])


def test_text_too_long_is_refused(backbone):
    message = one_line(lambda: encode_texts(backbone, ["cup", "cup " * 80]))
    assert message.startswith(f'the prompt for "{("cup " * 15)[:60]}" needs 82 tokens, {backbone.name} takes 77: ')
    assert len(encode_tokens(backbone, ["cup " * 75])[0]) == 76  # fits exactly, with [SOS]


def test_layer_scales_of_open_clip(rn_file):
    """Each scales the output of its half of the block; OpenAI's blocks have none."""
    prompts, eot = embed_tokens(load_clip(rn_file), encode_tokens(load_clip(rn_file), ["a photo of a cup."]))
    features = []
    for scaled in ("weights", "layers", "nothing"):
        backbone = load_clip(rn_file).double()
        for block in backbone.blocks:
            for name, linear, scale in (("ls_1", block.attn.out_proj, 0.5), ("ls_2", block.mlp[-1], 3.0)):
                delattr(block, name) if hasattr(block, name) else None
                if scaled == "weights":
                    linear.weight.mul_(scale), linear.bias.mul_(scale)
                elif scaled == "layers":
                    setattr(block, name, Scale(scale))
        features.append(TextEncoder(backbone)(prompts.double(), eot))
    torch.testing.assert_close(features[0], features[1])
    assert not torch.allclose(features[1], features[2])


class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_half_precision_differs_by_rounding_only(rn_file):
    full, half = load_clip(rn_file), load_clip(rn_file).half_weights()
    expected, found = (encode_texts(backbone, LENGTHS) for backbone in (full, half))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0)
    for csc in (False, True):
        learners = [PromptLearner(backbone, LENGTHS, 4, "a photo of a", csc) for backbone in (full, half)]
        assert learners[1].ctx.dtype == torch.float16
        expected = TextEncoder(full)(*learners[0].encoder_inputs())
        for dtype in (torch.float16, torch.float32):  # of the learned context
            learners[1].ctx.data = learners[1].ctx.data.to(dtype)
            found = TextEncoder(half)(*learners[1].encoder_inputs())
            assert found.dtype == torch.float16
            torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0)
