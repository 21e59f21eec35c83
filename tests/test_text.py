"""prompting/text.py against the encoder of the package that built the model, with all 77 tokens."""

import pytest
import torch
from tiny import NAMES

from trainers.prompting import text
from trainers.prompting.backbone import import_provider, load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.text import POSITIONS, PromptLearner, TextEncoder, embed_tokens, encode_texts, encode_tokens

LENGTHS = ["cup", "2012 Tesla Model S", "cup", "the hard to see inside of a very long name", "face", "wind chime"]


@pytest.fixture(scope="module")
def backbone(clip_file):
    return load_clip(clip_file).double()


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


def naive_prompt(backbone, ctx, name, position):
    """[SOS] + context and name in the order wanted + "." + [EOT] + padding to 77 tokens."""
    embed = backbone.token_embedding
    encode = backbone.tokenizer.encode
    name_ids = encode(name.replace("_", " "))
    rest = [*encode(name.replace("_", " ") + "."), backbone.eot_token][len(name_ids) :]
    words, tail = embed(torch.tensor(name_ids)), embed(torch.tensor(rest))
    half = len(ctx) // 2
    middle = {
        "end": [ctx, words],
        "middle": [ctx[:half], words, ctx[half:]],
        "front": [words, ctx],
    }[position]
    prompt = torch.cat([embed(torch.tensor([backbone.sot_token])), *middle, tail])
    padding = embed(torch.zeros(77 - len(prompt), dtype=torch.long))
    return torch.cat([prompt, padding]), len(prompt) - 1


def test_text_features_equal_the_package_s_own(clip_file):
    """encode_text of clip or open_clip, padded to 77 tokens, and ours, cut after the longest prompt."""
    package = import_provider()
    backbone = load_clip(clip_file)
    texts = ["a photo of a face.", "cup", "a photo of a 2012 Tesla Model S, a type of car, seen from far away."]
    ours = encode_texts(backbone, texts)
    state = torch.load(clip_file, weights_only=True)
    if package.__name__ == "open_clip":
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


@pytest.mark.parametrize("csc", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("n_ctx", [1, 4, 5])
def test_learned_prompts_equal_the_loop(backbone, n_ctx, position, csc):
    torch.manual_seed(n_ctx)
    learner = PromptLearner(backbone, NAMES, n_ctx, csc=csc, class_token_position=position)
    learner.ctx.data = torch.randn_like(learner.ctx) * 0.3
    prompts, eot = learner()
    assert prompts.shape[1] == int(eot.max()) + 1  # nothing behind the longest prompt
    features = TextEncoder(backbone)(prompts, eot)
    for i, name in enumerate(NAMES):
        ctx = learner.ctx[i] if csc else learner.ctx
        prompt, last = naive_prompt(backbone, ctx, name, position)
        assert last == eot[i]
        torch.testing.assert_close(prompts[i, : last + 1], prompt[: last + 1])
        expected = naive_encode(backbone, [prompt], [last])[0]
        torch.testing.assert_close(features[i], expected, atol=1e-10, rtol=1e-8)


def test_gradients_equal_those_of_77_tokens(backbone):
    torch.manual_seed(0)
    weights = torch.randn(len(NAMES), backbone.text_projection.shape[1], dtype=torch.float64)
    learner = PromptLearner(backbone, NAMES, 4)
    (TextEncoder(backbone)(*learner()) * weights).sum().backward()
    fast = learner.ctx.grad.clone()
    learner.ctx.grad = None
    full = [naive_prompt(backbone, learner.ctx, name, "end") for name in NAMES]
    (naive_encode(backbone, *zip(*full)) * weights).sum().backward()
    torch.testing.assert_close(fast, learner.ctx.grad, atol=1e-10, rtol=1e-8)
    assert fast.abs().max() > 0


def test_what_stands_behind_the_end_of_text_has_no_influence_and_is_not_encoded(backbone):
    learner = PromptLearner(backbone, ["cup", "face"], 4)
    prompts, eot = learner()
    longer = torch.cat([prompts, torch.randn(2, 20, prompts.shape[2], dtype=prompts.dtype)], dim=1)
    lengths = []
    hook = backbone.blocks[0].mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    torch.testing.assert_close(TextEncoder(backbone)(longer, eot), TextEncoder(backbone)(prompts, eot))
    hook.remove()
    assert lengths == [int(eot.max()) + 1] * 2


def plain_features(backbone, learner, ctx):
    """g of every class with its own copy of the context, all padded to the longest, nothing shared."""
    prompts, eot = learner.around(ctx.expand(learner.n_cls, -1, -1))
    x = prompts + backbone.positional_embedding[: prompts.shape[1]]
    for block in backbone.blocks:
        x, _, _ = TextEncoder(backbone)._block(block, x)
    x = backbone.ln_final(x[torch.arange(len(x)), eot]) @ backbone.text_projection
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("padding", [0, 10, text.WORTH_A_PASS])
@pytest.mark.parametrize("n_ctx", [1, 4, 16])
@pytest.mark.parametrize("names", [LENGTHS, ["cup"], ["cup"] * 3], ids=["lengths", "one", "same"])
def test_a_shared_context_is_encoded_once_and_nothing_changes(backbone, monkeypatch, names, n_ctx, padding):
    """Values and gradients, of one context for all classes and of three (CoCoOp's, one an image)."""
    monkeypatch.setattr(text, "WORTH_A_PASS", padding)
    torch.manual_seed(n_ctx)
    learner, encode = PromptLearner(backbone, names, n_ctx), TextEncoder(backbone)
    learner.ctx.data = torch.randn_like(learner.ctx) * 0.3
    contexts = torch.randn(3, *learner.ctx.shape, dtype=torch.float64).requires_grad_()
    weights = torch.randn(3, len(names), backbone.text_projection.shape[1], dtype=torch.float64)
    names_alone, eot, prefix = learner.parts()
    assert prefix.shape == (1 + n_ctx, learner.ctx.shape[1])

    shared = encode(names_alone, eot, prefix)
    (gradient,) = torch.autograd.grad((shared * weights[0]).sum(), learner.ctx)
    plain = plain_features(backbone, learner, learner.ctx)
    (expected,) = torch.autograd.grad((plain * weights[0]).sum(), learner.ctx)
    torch.testing.assert_close(shared, plain, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-10)
    assert expected.abs().max() > 0
    torch.testing.assert_close(encode(*learner()), plain, atol=1e-12, rtol=1e-10)

    shared = encode(names_alone, eot, learner.prefix(contexts))
    (gradient,) = torch.autograd.grad((shared * weights).sum(), contexts)
    plain = torch.stack([plain_features(backbone, learner, ctx) for ctx in contexts])
    (expected,) = torch.autograd.grad((plain * weights).sum(), contexts)
    torch.testing.assert_close(shared, plain, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-10)


def test_a_shared_context_is_not_copied_for_every_class(backbone):
    """Tokens encoded: the prefix once and the names. Nothing is kept for the gradient that has a prefix per class."""
    n_ctx, tokens, kept = 60, [], []
    learner = PromptLearner(backbone, LENGTHS, n_ctx)
    hook = backbone.blocks[0].mlp.register_forward_hook(
        lambda module, args, output: tokens.append(output[..., 0].numel())
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        TextEncoder(backbone)(*learner.parts())
    hook.remove()
    assert tokens[0] == 1 + n_ctx
    assert sum(tokens[1:]) == len(LENGTHS) * learner.token_suffix.shape[1]
    assert max(kept) < len(LENGTHS) * n_ctx * learner.ctx.shape[1]


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
@pytest.mark.parametrize("csc", [False, True])
def test_chunks_of_classes_change_nothing_but_what_is_kept(backbone, monkeypatch, chunk, csc):
    """Values and gradients in chunks equal those of all classes at once; less is kept for the gradient."""
    monkeypatch.setattr(text, "WORTH_A_PASS", 10)  # some chunks are buckets of one length
    learner = PromptLearner(backbone, LENGTHS, 4, csc=csc)
    weights = torch.randn(len(LENGTHS), backbone.text_projection.shape[1], dtype=torch.float64)
    found = {}
    for size in (0, chunk):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            features = TextEncoder(backbone, size)(*learner.parts())
        (gradient,) = torch.autograd.grad((features * weights).sum(), learner.ctx)
        found[size] = features, gradient, sum(kept)
    torch.testing.assert_close(found[chunk][0], found[0][0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found[chunk][1], found[0][1], atol=1e-12, rtol=1e-10)
    assert found[0][1].abs().max() > 0
    if chunk <= 2:
        assert found[chunk][2] < found[0][2] / 2
    with torch.no_grad():
        torch.testing.assert_close(TextEncoder(backbone, chunk)(*learner.parts()), found[0][0])


def test_no_more_than_a_chunk_is_encoded_at_a_time(backbone):
    classes = []
    hook = backbone.blocks[0].mlp.register_forward_hook(lambda module, args, output: classes.append(output.shape[0]))
    learner = PromptLearner(backbone, LENGTHS, 4, csc=True)
    TextEncoder(backbone, 4)(*learner.parts()).sum().backward()
    hook.remove()
    assert sorted(classes) == [2, 2, 4, 4]  # forward, and again in the backward pass


def test_what_fits_into_one_chunk_is_encoded_once(backbone):
    classes = []
    hook = backbone.blocks[0].mlp.register_forward_hook(lambda module, args, output: classes.append(output.shape[0]))
    learner = PromptLearner(backbone, LENGTHS, 4, csc=True)
    TextEncoder(backbone, len(LENGTHS))(*learner.parts()).sum().backward()
    hook.remove()
    assert classes == [len(LENGTHS)]


@pytest.mark.parametrize(
    "worth, passes",
    [
        (0, [[3], [0], [2], [1, 4]]),
        (2, [[3, 0], [2], [1, 4]]),  # 1 token of padding, 3 with the next
        (3, [[3, 0, 2], [1, 4]]),  # 1 + 2 are put up with, 7 more are not
        (10, [[3, 0, 2, 1], [4]]),
        (17, [[3, 0, 2, 1, 4]]),
    ],
)
def test_prompts_share_a_pass_until_their_padding_is_worth_another(monkeypatch, worth, passes):
    monkeypatch.setattr(text, "WORTH_A_PASS", worth)
    assert text._alike([9, 3, 8, 10, 3]) == passes


def test_chunks_keep_the_order():
    assert text._split([4, 2, 9, 1, 7], 2) == [[4, 2], [9, 1], [7]]
    assert text._split([4, 2, 9], 3) == text._split([4, 2, 9], 0) == [[4, 2, 9]]


def test_a_shared_context_under_autocast(backbone):
    learner, encode = PromptLearner(backbone.float(), LENGTHS, 4), TextEncoder(backbone)
    try:
        exact = encode(*learner.parts())
        with torch.autocast("cpu", torch.bfloat16):
            rough = encode(*learner.parts())
        assert rough.dtype == torch.bfloat16
        torch.testing.assert_close(rough.float(), exact, atol=2e-2, rtol=0)
    finally:
        backbone.double()


@pytest.mark.parametrize("position, csc", [("front", False), ("middle", False), ("end", True)])
def test_what_classes_do_not_share_is_not_shared(backbone, position, csc):
    learner = PromptLearner(backbone, LENGTHS, 4, csc=csc, class_token_position=position)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(learner.parts(), learner()))
    assert len(learner.parts()) == 2


def test_a_few_long_names_do_not_pad_all_others(backbone):
    short, long = ["cup"] * 400, ["the hard to see inside of a very long name"]
    tokens = []
    hook = backbone.blocks[0].mlp.register_forward_hook(lambda module, args, output: tokens.append(output.shape[:-1]))
    for learner in (PromptLearner(backbone, short + long, 4), PromptLearner(backbone, short + long, 4, csc=True)):
        del tokens[:]
        with torch.no_grad():
            features = TextEncoder(backbone)(*learner())
            alone = TextEncoder(backbone)(*(part[-1:] for part in learner()))
        assert sum(map(torch.Size.numel, tokens[:-1])) <= int((learner.eot + 1).sum()) + text.WORTH_A_PASS
        torch.testing.assert_close(features[-1:], alone, atol=1e-12, rtol=1e-10)
    hook.remove()
    assert text._alike([3, 3, 3]) == [[0, 1, 2]]
    assert text._alike([3, 9, 3, 8]) == [[1, 3, 0, 2]]  # too few to be worth a pass of their own


def test_context_starts_from_words(backbone):
    learner = PromptLearner(backbone, NAMES, n_ctx=16, ctx_init="a_photo_of_a")
    ids = backbone.tokenizer.encode("a photo of a")
    assert learner.n_ctx == 4
    assert torch.equal(learner.ctx, backbone.token_embedding(torch.tensor(ids)))
    hand_made = encode_texts(backbone, [f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    torch.testing.assert_close(TextEncoder(backbone)(*learner()), hand_made)
    assert PromptLearner(backbone, NAMES, ctx_init="a photo of a", csc=True).ctx.shape[:2] == (len(NAMES), 4)


def test_only_the_context_is_learned_and_stored(backbone):
    for position in POSITIONS:
        learner = PromptLearner(backbone, NAMES, 16, class_token_position=position)
        assert [name for name, _ in learner.named_parameters()] == ["ctx"]
        assert list(learner.state_dict()) == ["ctx"]
    assert 0.015 < learner.ctx.std() < 0.025  # CoOp's N(0, 0.02²)


def test_tokens_are_those_of_clip(backbone):
    (ids,) = encode_tokens(backbone, ["a photo of a cat."])
    assert ids == [320, 1125, 539, 320, 2368, 269, 49407]
    embeddings, last = embed_tokens(backbone, [ids, [5, 49407]])
    assert last.tolist() == [7, 2] and embeddings.shape[:2] == (2, 8)
    assert torch.equal(embeddings[0, 0], backbone.token_embedding.weight[49406])
    assert torch.equal(embeddings[1, 3], backbone.token_embedding.weight[0])


def test_names_that_end_in_punctuation_or_repeat(backbone):
    names = ["St. Bernard Jr.", "missile", "missile", "what?"]
    for position in POSITIONS:
        learner = PromptLearner(backbone, names, 4, class_token_position=position)
        features = TextEncoder(backbone)(*learner())
        torch.testing.assert_close(features[1], features[2])
        assert torch.isfinite(features).all()


def test_prompts_that_are_too_long_and_unknown_positions_are_errors(backbone):
    with pytest.raises(UserError, match='"word word .* needs .* tokens.*shorten the class name or the context'):
        PromptLearner(backbone, ["word " * 80], 4)
    with pytest.raises(UserError, match=f'"cup." needs 79 tokens, {backbone.name} takes 77: .*N_CTX, CTX_INIT'):
        PromptLearner(backbone, ["cup"], n_ctx=75)
    with pytest.raises(UserError, match=f"needs 82 tokens, {backbone.name} takes 77"):
        encode_texts(backbone, ["cup " * 80])
    PromptLearner(backbone, ["cup"], n_ctx=73)  # 73 + [SOS] cup . [EOT] fit exactly
    with pytest.raises(UserError, match="CLASS_TOKEN_POSITION left: choose one of end, middle, front"):
        PromptLearner(backbone, ["cup"], 4, class_token_position="left")


def test_a_context_without_vectors_is_an_error(backbone):
    assert PromptLearner(backbone, ["cup"], 1).ctx.shape[0] == 1
    for n_ctx in (0, -1):
        with pytest.raises(UserError, match=f"N_CTX {n_ctx}: at least one"):
            PromptLearner(backbone, ["cup"], n_ctx)
    assert PromptLearner(backbone, ["cup"], ctx_init="photo").ctx.shape[0] == 1
    with pytest.raises(UserError, match='CTX_INIT "_": .*leave it empty'):
        PromptLearner(backbone, ["cup"], ctx_init="_")


def test_the_defaults_are_a_random_context_of_16_before_the_name(backbone):
    torch.manual_seed(0)
    default = PromptLearner(backbone, NAMES)
    torch.manual_seed(0)
    explicit = PromptLearner(backbone, NAMES, 16, "", False, "end")
    assert default.n_ctx == 16 and default.n_cls == len(NAMES)
    assert torch.equal(default()[0], explicit()[0])


def test_layer_scales_of_open_clip_are_applied(clip_file):
    """Blocks without them (OpenAI's) and with them, where each scales what its half of the block adds."""
    backbone = load_clip(clip_file).double()
    (ids,) = encode_tokens(backbone, ["a photo of a cup."])
    prompts, eot = embed_tokens(backbone, [ids])
    plain = TextEncoder(backbone)(prompts, eot)
    for block in backbone.blocks:
        for name in ("ls_1", "ls_2"):
            if hasattr(block, name):
                delattr(block, name)
    torch.testing.assert_close(TextEncoder(backbone)(prompts, eot), plain)
    linears = [(linear, scale) for b in backbone.blocks for linear, scale in ((b.attn.out_proj, 0.5), (b.mlp[-1], 3.0))]
    with torch.no_grad():
        for linear, scale in linears:
            linear.weight.mul_(scale)
            linear.bias.mul_(scale)
        scaled = TextEncoder(backbone)(prompts, eot)
        for linear, scale in linears:
            linear.weight.div_(scale)
            linear.bias.div_(scale)
    for block in backbone.blocks:
        block.ls_1, block.ls_2 = Scale(0.5), Scale(3.0)
    torch.testing.assert_close(TextEncoder(backbone)(prompts, eot), scaled)
    assert not torch.allclose(scaled, plain)


class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_features_of_half_precision_encoders_are_those_of_float32_but_for_rounding(clip_file):
    """Whatever the learned context is kept in, the encoder computes in its own precision."""
    full, half = load_clip(clip_file), load_clip(clip_file).half_weights()
    (expected, found) = (encode_texts(backbone, LENGTHS) for backbone in (full, half))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0)
    for csc in (False, True):
        learners = [PromptLearner(backbone, LENGTHS, 4, "a photo of a", csc) for backbone in (full, half)]
        assert learners[1].ctx.dtype == torch.float16
        expected = TextEncoder(full)(*learners[0].parts())
        for learner in (learners[1], learners[1].float()):
            learner.token_prefix, learner.token_suffix = learner.token_prefix.half(), learner.token_suffix.half()
            found = TextEncoder(half)(*learner.parts())
            assert found.dtype == torch.float16
            torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0)


def test_attention_of_several_heads_equals_the_loop(clip_file):
    """The small model's width allows for one head of the usual size; CLIP has eight and more."""
    backbone = load_clip(clip_file).double()
    backbone.n_head = 4
    torch.manual_seed(0)
    learner = PromptLearner(backbone, LENGTHS, 3)
    learner.ctx.data = torch.randn_like(learner.ctx) * 0.3
    contexts = torch.stack([learner.ctx.detach(), torch.randn_like(learner.ctx) * 0.3])
    expected = [
        naive_encode(backbone, *zip(*(naive_prompt(backbone, ctx, name, "end") for name in LENGTHS)))
        for ctx in contexts
    ]
    names_alone, eot, _ = learner.parts()
    with torch.no_grad():
        torch.testing.assert_close(TextEncoder(backbone)(*learner()), expected[0], atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(TextEncoder(backbone)(*learner.parts()), expected[0], atol=1e-10, rtol=1e-8)
        found = TextEncoder(backbone)(names_alone, eot, learner.prefix(contexts))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("n_in, reduction, hidden", [(64, 16, 4), (64, 4, 16), (24, 16, 1), (8, 16, 1)])
def test_meta_net_is_cocoop_s(n_in, reduction, hidden):
    net = text.meta_net(n_in, 5, reduction)
    assert [name for name, _ in net.named_children()] == ["linear1", "relu", "linear2"]
    assert net.linear1.weight.shape == (hidden, n_in) and net.linear2.weight.shape == (5, hidden)
    x = torch.randn(3, n_in)
    expected = torch.relu(x @ net.linear1.weight.T + net.linear1.bias) @ net.linear2.weight.T + net.linear2.bias
    torch.testing.assert_close(net(x), expected)
    assert text.meta_net(64, 5).linear1.out_features == 4  # CoCoOp's 16
