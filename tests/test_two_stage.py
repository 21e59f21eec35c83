"""Two-stage class-specific text prompts: the generator against loops, what is trained when, who gets what."""

import json
import math
import sys

import pytest
import torch
from tiny import NAMES, arguments

import train
from trainers.prompting.backbone import load_clip
from trainers.prompting.names import matching_names
from trainers.prompting.text import PromptLearner, TextEncoder, TwoStagePromptLearner, encode_texts
from trainers.prompting.trainer import per_class_state

WORDS = "a photo of a"
BASE, NEW = NAMES[:4], NAMES[4:]


@pytest.fixture(scope="module")
def backbone(clip_file):
    return load_clip(clip_file).double()


def learner(backbone, names=NAMES, scale=0.3, **options):
    """A learner whose MLP has moved away from its start."""
    torch.manual_seed(0)
    made = TwoStagePromptLearner(backbone, names, **options)
    with torch.no_grad():
        for parameter in made.meta_net.parameters():
            parameter += torch.randn_like(parameter) * scale
        made.meta_net.linear1.bias += 1  # no unit is dead: with few features there is only one
    return made


def test_at_initialisation_every_class_has_the_initial_context(backbone):
    for options in ({"ctx_init": WORDS}, {"n_ctx": 3}):
        torch.manual_seed(3)
        generic = PromptLearner(backbone, NAMES, **options)
        torch.manual_seed(3)
        ours = TwoStagePromptLearner(backbone, NAMES, **options)
        torch.testing.assert_close(ours.generate(), generic.ctx.expand(len(NAMES), -1, -1))
        encode = TextEncoder(backbone)
        torch.testing.assert_close(encode(*ours()), encode(*generic()))


def test_contexts_are_generated_as_by_the_loop(backbone):
    ours = learner(backbone, n_ctx=3)
    features = encode_texts(backbone, [f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    hidden, n_in = ours.meta_net.linear1.weight.shape
    assert n_in == features.shape[1] and hidden == max(1, n_in // 16)
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


def test_gradients_reach_the_stage_that_is_trained_and_nothing_else(backbone):
    ours = learner(backbone, n_ctx=2)
    for stage, trained in ((1, {n for n, _ in ours.named_parameters() if n.startswith("meta_net")}), (2, {"ctx"})):
        if stage == 2:
            generated = ours.generate().detach()
            ours.begin_stage_2()
            assert torch.equal(ours.ctx, generated)
        ours.zero_grad(set_to_none=True)
        TextEncoder(backbone)(*ours()).pow(3).sum().backward()
        assert {n for n, p in ours.named_parameters() if p.grad is not None} == trained
        assert all(p.grad.abs().sum() > 0 for p in ours.parameters() if p.grad is not None)
    assert all(p.grad is None for p in backbone.parameters())


def test_starting_over_with_stage_1_forgets_the_contexts_of_stage_2(backbone):
    ours = learner(backbone, n_ctx=2)
    before, eot = ours()
    ours.begin_stage_2()
    with torch.no_grad():
        ours.ctx += 1
    assert not torch.allclose(ours()[0], before)
    ours.begin_stage_1()
    assert torch.equal(ours()[0], before) and torch.equal(ours()[1], eot)
    assert not ours.trained.any()


def test_parameters_are_float32_beside_a_half_precision_encoder(clip_file):
    full, half = (
        TwoStagePromptLearner(backbone, NAMES, ctx_init=WORDS)
        for backbone in (load_clip(clip_file), load_clip(clip_file).half_weights())
    )
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    for stage in (half.begin_stage_1, half.begin_stage_2):
        stage()
        assert half()[0].dtype == torch.float16
        torch.testing.assert_close(half()[0].float(), full()[0], atol=1e-3, rtol=1e-2)


def test_the_defaults_are_those_of_generic_prompts_and_of_the_meta_net(backbone):
    ours = TwoStagePromptLearner(backbone, NAMES)
    assert ours.ctx.shape[:2] == (len(NAMES), 16)
    n_in = ours.meta_net.linear1.in_features
    assert ours.meta_net.linear1.out_features == n_in // 16
    assert TwoStagePromptLearner(backbone, NAMES, reduction=4).meta_net.linear1.out_features == n_in // 4


@pytest.mark.parametrize(
    "wanted, known, rows",
    [
        (["a", "b"], ["b", "a", "c"], [1, 0]),
        (["d", "a"], ["a"], [-1, 0]),
        (["crane", "crane"], ["crane", "x", "crane"], [0, 2]),  # a bird and a machine
        (["crane", "crane", "crane"], ["crane", "crane"], [0, 1, -1]),
        (["inline_skate"], ["inline skate"], [0]),
        ([], ["a"], []),
    ],
)
def test_names_are_matched(wanted, known, rows):
    assert matching_names(wanted, known) == rows


def test_trained_prompts_of_base_classes_leave_new_classes_to_stage_1(backbone):
    """Whatever stage 2 made of the base contexts, scores of new classes are those of the generator."""
    base = learner(backbone, BASE, n_ctx=2)
    base.begin_stage_2()
    with torch.no_grad():
        base.ctx += torch.randn_like(base.ctx)
    encode = TextEncoder(backbone)
    alone, mixed, untrained = (TwoStagePromptLearner(backbone, n, n_ctx=2) for n in (NEW, [*NEW, *BASE], NEW))
    for ours, names in ((alone, NEW), (mixed, [*NEW, *BASE])):
        ours.load_state_dict(per_class_state(ours, base.state_dict(), names, BASE))
    untrained.meta_net.load_state_dict(base.meta_net.state_dict())
    stage_1 = encode(*untrained())
    torch.testing.assert_close(encode(*alone()), stage_1)
    torch.testing.assert_close(encode(*mixed())[: len(NEW)], stage_1)
    torch.testing.assert_close(encode(*mixed())[len(NEW) :], encode(*base()))
    assert mixed.trained.tolist() == [False] * len(NEW) + [True] * len(BASE)


def test_duplicates_of_a_name_keep_their_own_contexts(backbone):
    names = ["crane", "cup", "crane"]
    base = learner(backbone, names, n_ctx=2)
    base.begin_stage_2()
    with torch.no_grad():
        base.ctx += torch.randn_like(base.ctx)
    wanted = ["crane", "crane", "key"]
    other = TwoStagePromptLearner(backbone, wanted, n_ctx=2)
    other.load_state_dict(per_class_state(other, base.state_dict(), wanted, names))
    assert torch.equal(other.ctx[:2], base.ctx[[0, 2]]) and not torch.equal(other.ctx[0], other.ctx[1])
    assert other.trained.tolist() == [True, True, False]


# ------------------------------------------------------------------------------------------------- through train.py


@pytest.fixture
def run(data_root, rn_file, tmp_path, monkeypatch):
    def call(*opts, flags=(), out="run", status=0):
        built = []
        monkeypatch.setattr(train, "build_trainer", lambda cfg: built.append(original(cfg)) or built[0])
        opts = ("TRAINER.LOGOPROMPT.TEXT_PROMPT", "two_stage", "OPTIM.MAX_EPOCH", "5", *opts)
        assert train.main(arguments("LoGoPrompt", data_root, rn_file, tmp_path / out, *opts, flags=flags)) == status
        sys.stdout.flush()  # of the log
        return built[0] if built else None

    original = train.build_trainer
    call.folder = tmp_path
    return call


def states(run, out="run"):
    folder = run.folder / out / "prompt_learner"
    return {
        int(path.name.rsplit("-", 1)[1]): torch.load(path, weights_only=True)["state_dict"]
        for path in folder.glob("model.pth.tar-*")
    }


def test_each_stage_trains_its_own_parameters(run):
    run("TRAIN.CHECKPOINT_FREQ", "1")
    found = states(run)
    assert sorted(found) == [1, 2, 3, 4, 5]  # three of stage 1, two of stage 2
    mlp = [key for key in found[1] if key.startswith("meta_net")]
    for before, after in ((1, 2), (2, 3)):
        assert torch.equal(found[before]["ctx"], found[after]["ctx"])
        assert not all(torch.equal(found[before][key], found[after][key]) for key in mlp)
        assert not found[after]["trained"].any()
    for before, after in ((3, 4), (4, 5)):
        assert all(torch.equal(found[before][key], found[after][key]) for key in mlp)
        assert not torch.equal(found[before]["ctx"], found[after]["ctx"])
        assert found[after]["trained"].all()


@pytest.mark.parametrize("stage_1", [0, 2, 5])
def test_every_stage_has_a_schedule_of_its_own(run, monkeypatch, stage_1):
    from trainers.logoprompt import LoGoPrompt

    rates = []
    original = LoGoPrompt.run_epoch
    monkeypatch.setattr(LoGoPrompt, "run_epoch", lambda self: rates.append(self.get_current_lr()) or original(self))
    run("TRAINER.LOGOPROMPT.STAGE1_EPOCHS", stage_1, "TRAINER.LOGOPROMPT.STAGE2_LR", "0.01", "OPTIM.LR", "0.1")
    expected = []
    for lr, epochs in (
        (0.1, stage_1),
        (0.01, 5 - stage_1),
    ):  # one epoch of warm-up, then a cosine
        expected += [1e-5 if e == 0 else lr * (1 + math.cos(math.pi * (e - 1) / epochs)) / 2 for e in range(epochs)]
    assert rates == pytest.approx(expected, rel=1e-6)


def check_that_it_goes_on(run, monkeypatch, done, *options):
    """A run that is stopped after ``done`` epochs and started again ends as one that was not."""
    from trainers.logoprompt import LoGoPrompt

    options = (*options, "TRAIN.CHECKPOINT_FREQ", "1")
    run(*options, out="whole")
    original = LoGoPrompt.after_epoch

    def stop(self):
        original(self)
        if self.epoch + 1 == done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LoGoPrompt, "after_epoch", stop)
        run(*options, out="broken")
    run(*options, out="broken")
    whole, broken = states(run, "whole")[5], states(run, "broken")[5]
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


@pytest.mark.parametrize("done", [1, 3, 4])
def test_an_interrupted_run_goes_on_to_the_same_prompts(run, monkeypatch, done):
    check_that_it_goes_on(run, monkeypatch, done)


def test_one_checkpoint_serves_base_new_and_all(run):
    trained = run()
    flags = ["--eval-only", "--model-dir", run.folder / "run"]
    features = {}
    for subset, names in (("base", BASE), ("new", NEW), ("all", NAMES)):
        built = run("DATASET.SUBSAMPLE_CLASSES", subset, flags=flags, out=subset)
        assert built.classnames == names
        features[subset] = built.text_features().detach()
        results = json.loads((run.folder / subset / "results.json").read_text())
        assert results["classes"] == len(names) and results["images"] == 4 * len(names)
    torch.testing.assert_close(features["base"], trained.text_features().detach())
    torch.testing.assert_close(features["all"], torch.cat([features["base"], features["new"]]))


def test_a_checkpoint_of_generic_prompts_is_refused_in_one_line(run, capsys):
    run("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic")
    run(flags=["--eval-only", "--model-dir", run.folder / "run"], out="other", status=2)
    error = capsys.readouterr().err
    assert "trained with another trainer or other options" in error


@pytest.mark.parametrize(
    "key, value, message",
    [("TEXT_PROMPT", "three_stage", "choose one of"), ("STAGE1_EPOCHS", "6", "0 to 5, OPTIM.MAX_EPOCH"),
     ("STAGE1_EPOCHS", "-2", "0 to 5, OPTIM.MAX_EPOCH"), ("STAGE2_LR", "-0.1", "must be at least 0")],
)  # fmt: skip
def test_impossible_values(run, capsys, key, value, message):
    run(f"TRAINER.LOGOPROMPT.{key}", value, status=2)
    error = capsys.readouterr().err.splitlines()
    assert f"TRAINER.LOGOPROMPT.{key} {value}" in error[-1] and message in error[-1]
