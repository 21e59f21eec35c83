"""text_encoder.py against the encoder of the package that built the model, and against loops over all 77 tokens."""

import pytest
import torch
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
            x = x + getattr(block, "ls_1", torch.nn.Identity())(block.attn.out_proj(torch.cat(heads, dim=-1)))
            x = x + getattr(block, "ls_2", torch.nn.Identity())(block.mlp(naive_norm(block.ln_2, x)))
        y = naive_norm(backbone.ln_final, x[last]) @ backbone.text_projection
        features.append(y / y.norm())
    return torch.stack(features)


def naive_prompt(backbone, ctx, name, position="end"):
    """[SOS], context and name, full stop, [EOT] and padding up to 77 tokens; the position of [EOT]."""
    embed, encode, name = backbone.token_embedding, backbone.tokenizer.encode, name.replace("_", " ")
    name_ids = encode(name)
    rest = [*encode(name + "."), backbone.tokenizer.eot][len(name_ids) :]
    words, tail, half = embed(torch.tensor(name_ids)), embed(torch.tensor(rest)), len(ctx) // 2
    orders = {"end": [ctx, words], "middle": [ctx[:half], words, ctx[half:]], "front": [words, ctx]}
    prompt = torch.cat([embed(torch.tensor(backbone.tokenizer.head)), *orders[position], tail])
    padding = embed(torch.zeros(77 - len(prompt), dtype=torch.long))
    return torch.cat([prompt, padding]), len(prompt) - 1


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
    backbone = load_clip(rn_file)
    with torch.no_grad():
        raw = TextEncoder(backbone, unit_length=False)(*embed_tokens(backbone, encode_tokens(backbone, texts)))
    torch.testing.assert_close(raw, theirs, atol=1e-5, rtol=1e-5)


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


def test_several_heads_and_contexts_equal_loop(rn_file, monkeypatch):
    """One context per image (CoCoOp), the heads of larger models, and open_clip's LayerScale; gradients too."""
    from open_clip.transformer import LayerScale

    backbone = load_clip(rn_file).double()
    backbone.n_head = 4
    backbone.blocks[0].ls_1, backbone.blocks[0].ls_2 = LayerScale(64, 0.5).double(), LayerScale(64, 3.0).double()
    for name in ("ls_1", "ls_2"):  # OpenAI's blocks have none
        if hasattr(backbone.blocks[1], name):
            delattr(backbone.blocks[1], name)
    learner = learner_of(backbone, LENGTHS, 3)
    contexts = torch.randn(2, *learner.ctx.shape, dtype=torch.float64).mul(0.3).requires_grad_()
    weights = torch.randn(2, len(LENGTHS), 24, dtype=torch.float64)
    full = [[naive_prompt(backbone, ctx, name) for name in LENGTHS] for ctx in contexts]
    expected = torch.stack([naive_encode(backbone, *zip(*prompts)) for prompts in full])
    (gradient,) = torch.autograd.grad((expected * weights).sum(), contexts)
    suffixes, eot, prefix = learner.encoder_inputs()
    assert prefix.shape == (1 + 3, learner.ctx.shape[1])
    for padding in (0, 10, 64):
        monkeypatch.setattr(text_encoder, "MAX_PADDING_TOKENS", padding)
        features = TextEncoder(backbone)(suffixes, eot, learner.prefix(contexts))
        torch.testing.assert_close(features, expected, atol=1e-10, rtol=1e-8)
        (found,) = torch.autograd.grad((features * weights).sum(), contexts)
        torch.testing.assert_close(found, gradient, atol=1e-10, rtol=1e-8)


def test_shared_context_is_not_copied_for_every_class(backbone, encoded):
    """The prefix is encoded once, and no tensor with a prefix per class is held for the gradient."""
    n_ctx, held = 60, []
    learner = PromptLearner(backbone, LENGTHS, n_ctx)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        TextEncoder(backbone)(*learner.encoder_inputs())
    tokens = [shape.numel() for shape in encoded]
    assert tokens[0] == 1 + n_ctx and sum(tokens[1:]) == len(LENGTHS) * learner.token_suffix.shape[1]
    assert max(held) < len(LENGTHS) * n_ctx * learner.ctx.shape[1]
    del encoded[:]
    longer = torch.cat([learner()[0], torch.randn(len(LENGTHS), 9, 64, dtype=torch.float64)], dim=1)
    found = TextEncoder(backbone)(longer, learner.eot)
    torch.testing.assert_close(found, TextEncoder(backbone)(*learner.encoder_inputs()))
    assert encoded[0] == (len(LENGTHS), int(learner.eot.max()) + 1)  # nothing behind [EOT]


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


@pytest.mark.parametrize(
    "allowed, buckets",
    [(0, [[3], [0], [2], [1, 4]]), (2, [[3, 0], [2], [1, 4]]), (3, [[3, 0, 2], [1, 4]]), (10, [[3, 0, 2, 1], [4]]),
     (17, [[3, 0, 2, 1, 4]])],
)  # fmt: skip
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


def test_half_precision_differs_by_rounding_only(rn_file):
    full, half = load_clip(rn_file), load_clip(rn_file).cast_weights(torch.float16)
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
