"""prompts.py: contexts of CoOp and of the two stages against loops, and checkpoints that meet other classes by name."""

import pytest
import torch
from helpers import one_line
from tiny import NAMES

from trainers.prompting.backbone import load_clip
from trainers.prompting.checkpoint import remap_state_to_classes
from trainers.prompting.errors import UserError
from trainers.prompting.prompts import POSITIONS, PromptLearner, TwoStagePromptLearner
from trainers.prompting.text_encoder import TextEncoder, encode_texts

WORDS = "a photo of a"
BASE, NEW = NAMES[:4], NAMES[4:]


@pytest.fixture(scope="module")
def backbone(rn_file):
    return load_clip(rn_file).double()


def learner(backbone, names=NAMES, scale=0.3, **options):
    """A two-stage learner whose MLP has moved away from its start."""
    torch.manual_seed(0)
    made = TwoStagePromptLearner(backbone, names, **options)
    with torch.no_grad():
        for parameter in made.meta_net.parameters():
            parameter += torch.randn_like(parameter) * scale
        made.meta_net.linear1.bias += 1  # no unit is dead: with few features there is only one
    return made


def hand_made(name):
    return f"a photo of a {name.replace('_', ' ')}."


def test_context_starts_from_words(backbone):
    made = PromptLearner(backbone, NAMES, n_ctx=16, ctx_init="a_photo_of_a")
    ids = backbone.tokenizer.encode(WORDS)
    assert made.n_ctx == 4 and torch.equal(made.ctx, backbone.token_embedding(torch.tensor(ids)))
    torch.testing.assert_close(TextEncoder(backbone)(*made()), encode_texts(backbone, list(map(hand_made, NAMES))))
    specific = PromptLearner(backbone, NAMES, ctx_init=WORDS, csc=True)
    assert torch.equal(specific.ctx, made.ctx.expand(len(NAMES), -1, -1))


def test_defaults_are_16_random_vectors_before_the_name(backbone):
    torch.manual_seed(0)
    default = PromptLearner(backbone, NAMES)
    torch.manual_seed(0)
    explicit = PromptLearner(backbone, NAMES, 16, "", False, "end")
    assert default.n_ctx == 16 and default.n_cls == len(NAMES)
    assert torch.equal(default()[0], explicit()[0])
    assert 0.018 < default.ctx.std() < 0.022 and default.ctx.mean().abs() < 0.003  # CoOp's N(0, 0.02²)


def test_only_the_context_is_learned_and_stored(backbone):
    for position in POSITIONS:
        made = PromptLearner(backbone, NAMES, 16, class_token_position=position)
        assert [name for name, _ in made.named_parameters()] == ["ctx"] == list(made.state_dict())


def test_impossible_prompts_are_refused(backbone):
    message = one_line(lambda: PromptLearner(backbone, ["cup"], n_ctx=75))
    assert message.startswith(f'the prompt for "cup." needs 79 tokens, {backbone.name} takes 77: ')
    assert "shorten the class name or the context" in message
    PromptLearner(backbone, ["cup"], n_ctx=73)  # 73 + [SOS] cup . [EOT] fit exactly
    assert PromptLearner(backbone, ["cup"], 1).ctx.shape[0] == 1
    assert PromptLearner(backbone, ["cup"], ctx_init="photo").ctx.shape[0] == 1
    for n_ctx in (0, -1):
        assert f"N_CTX {n_ctx}: at least one" in one_line(lambda n=n_ctx: PromptLearner(backbone, ["cup"], n))
    assert 'CTX_INIT "_": ' in one_line(lambda: PromptLearner(backbone, ["cup"], ctx_init="_"))
    message = one_line(lambda: PromptLearner(backbone, ["cup"], 4, class_token_position="left"))
    assert message.startswith("CLASS_TOKEN_POSITION left: choose one of end, middle, front")


def test_every_class_starts_with_the_initial_context(backbone):
    for options in ({"ctx_init": WORDS}, {"n_ctx": 3}, {}):
        torch.manual_seed(3)
        generic = PromptLearner(backbone, NAMES, **options)
        torch.manual_seed(3)
        ours = TwoStagePromptLearner(backbone, NAMES, **options)
        torch.testing.assert_close(ours.generate(), generic.ctx.expand(len(NAMES), -1, -1))
        torch.testing.assert_close(TextEncoder(backbone)(*ours()), TextEncoder(backbone)(*generic()))
    assert ours.ctx.shape[:2] == (len(NAMES), 16)


@pytest.mark.parametrize("reduction", [16, 4])
def test_generated_contexts_equal_loop(backbone, reduction):
    ours = learner(backbone, n_ctx=3, reduction=reduction)
    features = encode_texts(backbone, list(map(hand_made, NAMES)))
    hidden, n_in = ours.meta_net.linear1.weight.shape
    assert n_in == features.shape[1] and hidden == n_in // reduction
    for c, feature in enumerate(features.tolist()):
        middle = []
        for row, bias in zip(ours.meta_net.linear1.weight.tolist(), ours.meta_net.linear1.bias.tolist()):
            middle.append(max(0.0, bias + sum(w * x for w, x in zip(row, feature))))
        outputs = [
            bias + sum(w * x for w, x in zip(row, middle))
            for row, bias in zip(ours.meta_net.linear2.weight.tolist(), ours.meta_net.linear2.bias.tolist())
        ]
        assert ours.generate()[c].flatten().tolist() == pytest.approx(outputs, rel=1e-9, abs=1e-12)
    assert not torch.allclose(ours.generate()[0], ours.generate()[1])  # class-specific
    assert TwoStagePromptLearner(backbone, NAMES).meta_net.linear1.out_features == n_in // 16


def test_gradients_reach_only_the_parameters_of_the_stage(backbone):
    ours = learner(backbone, n_ctx=2)
    for stage, trained in ((1, {n for n, _ in ours.named_parameters() if n.startswith("meta_net")}), (2, {"ctx"})):
        if stage == 2:
            generated = ours.generate().detach()
            ours.begin_stage_2()
            assert torch.equal(ours.ctx, generated)
        ours.zero_grad(set_to_none=True)
        TextEncoder(backbone)(*ours.encoder_inputs()).pow(3).sum().backward()
        assert {n for n, p in ours.named_parameters() if p.grad is not None} == trained
        assert all(p.grad.abs().sum() > 0 for p in ours.parameters() if p.grad is not None)
    assert all(p.grad is None for p in backbone.parameters())


def test_stage_1_discards_the_contexts_of_stage_2(backbone):
    ours = learner(backbone, n_ctx=2)
    before, eot = ours()
    ours.begin_stage_2()
    with torch.no_grad():
        ours.ctx += 1
    assert ours.trained.all() and not torch.allclose(ours()[0], before)
    ours.begin_stage_1()
    assert torch.equal(ours()[0], before) and torch.equal(ours()[1], eot)
    assert not ours.trained.any()


def remapped(module, other, names, known):
    """``module``, built for ``names``, with the state of ``other``, built for ``known``."""
    module.load_state_dict(remap_state_to_classes(module, other.state_dict(), names, known, "x"))
    return module


def test_class_specific_contexts_go_by_name_and_refuse_untrained_classes(backbone):
    base = PromptLearner(backbone, BASE, 3, csc=True)
    mixed = [BASE[3], BASE[1]]
    other = remapped(PromptLearner(backbone, mixed, 3, csc=True), base, mixed, BASE)
    assert torch.equal(other.ctx, base.ctx[[3, 1]])
    with pytest.raises(UserError, match=f'x was not trained on "{NEW[0]}" and 1 more of these classes'):
        remapped(PromptLearner(backbone, [BASE[0], *NEW[:2]], 3, csc=True), base, [BASE[0], *NEW[:2]], BASE)


def test_untrained_classes_use_stage_1_and_trained_ones_keep_stage_2(backbone):
    base, encode = learner(backbone, BASE, n_ctx=2), TextEncoder(backbone)
    base.begin_stage_2()
    with torch.no_grad():
        base.ctx += torch.randn_like(base.ctx)
    names = [*NEW, *BASE]
    alone, mixed = (remapped(TwoStagePromptLearner(backbone, some, n_ctx=2), base, some, BASE) for some in (NEW, names))
    untrained = TwoStagePromptLearner(backbone, NEW, n_ctx=2)
    untrained.meta_net.load_state_dict(base.meta_net.state_dict())
    stage_1 = encode(*untrained())
    torch.testing.assert_close(encode(*alone()), stage_1)
    torch.testing.assert_close(encode(*mixed())[: len(NEW)], stage_1)
    torch.testing.assert_close(encode(*mixed())[len(NEW) :], encode(*base()))
    assert mixed.trained.tolist() == [False] * len(NEW) + [True] * len(BASE)
    mixed.begin_stage_2()
    assert mixed.trained.all() and mixed.n_trained == len(names)
