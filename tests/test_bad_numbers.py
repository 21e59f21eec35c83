"""Losses, gradients and parameters that are no numbers: training ends in one line, and what was good is kept."""

import sys

import pytest
import torch
from tiny import NAMES, arguments

import train
from trainers.prompting.trainer import MIN_SCALE, PromptTrainer

GENERIC = ("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic", "OPTIM.MAX_EPOCH", "4")


@pytest.fixture
def run(data_root, rn_file, tmp_path, monkeypatch):
    """Run ``train.py`` in this process, with ``change(trainer)`` before it starts; returns the trainer."""

    def call(*opts, trainer="LoGoPrompt", status=0, change=lambda built: None, out="run"):
        built = []

        def build(cfg):
            built.append(original(cfg))
            change(built[0])
            return built[0]

        monkeypatch.setattr(train, "build_trainer", build)
        assert train.main(arguments(trainer, data_root, rn_file, tmp_path / out, *GENERIC, *opts)) == status
        sys.stdout.flush()
        return built[0]

    original = train.build_trainer
    monkeypatch.setattr(train, "collect_env_info", str)  # takes seconds
    call.folder = tmp_path / "run" / "prompt_learner"
    return call


def spoil(epoch, batch, value, gradient=False):
    """A change of a trainer: the loss, or only its gradient, goes wrong in a batch (both counted from 1)."""

    def change(built):
        original = built.loss

        def loss(content):
            value_, logits, label = original(content)
            if (built.epoch + 1, built.batch_idx + 1) == (epoch, batch):
                built.spoilt = list(content["impath"])
                if gradient:
                    value_.register_hook(lambda g: g * value)
                else:
                    value_ = value_ * value
            return value_, logits, label

        built.loss = loss

    return change


@pytest.mark.parametrize(
    "trainer, value, gradient, freq",
    [
        ("CoOp", float("nan"), False, 0),
        ("LoGoPrompt", float("nan"), False, 2),
        ("LoGoPrompt", float("-inf"), False, 0),
        ("LoGoPrompt", float("nan"), True, 2),
    ],
)
def test_one_line_names_epoch_batch_images_and_the_last_good_checkpoint(run, capsys, trainer, value, gradient, freq):
    change = spoil(4, 2, value, gradient)
    built = run("TRAIN.CHECKPOINT_FREQ", freq, trainer=trainer, status=2, change=change)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    said = "the loss is finite, its gradients are not" if gradient else f"the loss is {value * 1.0}".replace("-", "")
    assert line.startswith("error: epoch [4/4] batch [2/2]: ") and said in line.replace("-inf", "inf")
    assert f"images of the batch: {', '.join(built.spoilt[:3])} and 5 more; " in line and NAMES[0] not in line[:40]
    path = run.folder / "model.pth.tar-3"  # written now where none was due
    assert f"the last good checkpoint is {path}, after epoch 3" in line and "OPTIM.LR" in line
    kept = torch.load(path, weights_only=True)
    assert kept["epoch"] == 3 and all(torch.isfinite(value).all() for value in kept["state_dict"].values())
    assert (run.folder / "checkpoint").read_text() == "model.pth.tar-3\n"
    assert not (run.folder.parent / "results.json").exists()
    assert torch.isfinite(built.prompt_learner.ctx).all()  # what went wrong was not stepped on


def test_without_a_whole_epoch_there_is_no_checkpoint(run, capsys):
    run(status=2, change=spoil(1, 1, float("nan")))
    assert "no epoch was finished before" in capsys.readouterr().err
    assert not list(run.folder.glob("model*"))


def test_training_goes_on_from_the_last_good_checkpoint(run):
    run("TRAIN.CHECKPOINT_FREQ", 0, out="unbroken")
    run("TRAIN.CHECKPOINT_FREQ", 0, status=2, change=spoil(3, 1, float("nan")))
    run("TRAIN.CHECKPOINT_FREQ", 0)
    states = [torch.load(f / "model.pth.tar-4", weights_only=True)["state_dict"]["ctx"] for f in (
        run.folder, run.folder.parents[1] / "unbroken" / "prompt_learner")]  # fmt: skip
    assert torch.equal(*states)


def test_parameters_that_overflow_in_the_last_step_are_not_saved(run, capsys):
    def change(built):
        def after_step():
            if (built.epoch, built.batch_idx) == (2, 1):
                built.prompt_learner.ctx.data[0, 0] = float("inf")

        built.after_step = after_step

    run("TRAIN.CHECKPOINT_FREQ", 1, status=2, change=change)
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: epoch [3/4]: ctx is not finite any more; ") and "model.pth.tar-2" in line
    assert sorted(path.name for path in run.folder.glob("model*")) == ["model.pth.tar-1", "model.pth.tar-2"]


# ------------------------------------------------------------------------------------------------- mixed precision


@pytest.fixture
def scaled():
    """A change of a trainer: its loss is scaled as on a GPU; ``overflow(step)`` says which steps overflow."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("this torch scales on a GPU only")

    def change(overflow):
        def apply(built):
            built.scaler = torch.amp.GradScaler("cpu")
            built.seen = []
            original, after = built.loss, built.after_step

            def loss(content):
                value, logits, label = original(content)
                built.before = built.prompt_learner.ctx.detach().clone()
                if overflow(len(built.seen)):
                    value.register_hook(lambda g: g * float("inf"))
                return value, logits, label

            def after_step():
                after()
                moved = not torch.equal(built.before, built.prompt_learner.ctx)
                built.seen.append((moved, built.scaler.get_scale()))

            built.loss, built.after_step = loss, after_step

        return apply

    return change


def test_a_step_that_overflows_is_skipped_and_training_goes_on(run, scaled):
    built = run(change=scaled(lambda step: step in (2, 3)))
    start = 2.0**16
    assert built.seen == [
        *((True, start), (True, start), (False, start / 2), (False, start / 4)),
        *[(True, start / 4)] * 4,
    ]
    kept = torch.load(run.folder / "model.pth.tar-4", weights_only=True)
    assert kept["scaler"]["scale"] == start / 4 and torch.isfinite(kept["state_dict"]["ctx"]).all()


def test_a_scaled_run_that_goes_on_keeps_the_scale(run, scaled):
    change = scaled(lambda step: step == 2)
    whole = run(change=change, out="whole")
    freq = ("TRAIN.CHECKPOINT_FREQ", 1)

    def stop(built):
        change(built)
        spoil(4, 1, float("nan"))(built)

    run(*freq, change=stop, status=2)
    again = run(*freq, change=scaled(lambda step: False))
    assert again.seen == whole.seen[-2:] and torch.equal(again.prompt_learner.ctx, whole.prompt_learner.ctx)


def test_endless_overflow_ends_training(run, scaled, capsys):
    built = run("OPTIM.MAX_EPOCH", 40, "TRAIN.CHECKPOINT_FREQ", 0, status=2, change=scaled(lambda step: step >= 4))
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: epoch [19/40] batch [1/2]: the gradients overflow, however small the loss is scaled")
    assert f"the last good checkpoint is {run.folder}/model.pth.tar-18" in line
    assert [moved for moved, _ in built.seen] == [True] * 4 + [False] * 32
    assert built.scaler.get_scale() < MIN_SCALE == built.seen[-1][1]
    assert torch.isfinite(built.prompt_learner.ctx).all()


def test_a_scaled_loss_that_is_no_number_is_not_taken_for_an_overflow(run, scaled, capsys):
    def change(built):
        scaled(lambda step: False)(built)
        spoil(2, 1, float("nan"))(built)

    run(status=2, change=change)
    assert "epoch [2/4] batch [1/2]: the loss is nan" in capsys.readouterr().err


def test_finite_gradients_are_stepped_on(run):
    """The check itself changes nothing: the same parameters as with Dassl's own step."""
    first = run(out="a").prompt_learner.ctx
    plain = run(out="b", change=lambda built: setattr(built, "model_update", super(PromptTrainer, built).model_update))
    assert torch.equal(first, plain.prompt_learner.ctx)
