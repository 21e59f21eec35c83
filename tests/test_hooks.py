"""Hooks of the training loop: schedules of stages, numbers that are not finite, collapse."""

import math
import re

import pytest
import torch
import torch.nn as nn
from conftest import differences
from dassl.config import get_cfg_default
from dassl.optim import build_lr_scheduler

from trainers.prompting.hooks import MIN_SCALE, CollapseMonitor, FiniteGuard, StageSchedule
from trainers.prompting.method import Stage

# ------------------------------------------------------------------------------------------------- StageSchedule

STAGES = ((4, 0.02), (0, 9.0), (6, 0.3))  # epochs, learning rate
OWN = 5.0  # rate of a parameter that has its own


def closed_form(epoch, own=None, warmup=1):
    """Dassl's constant warm-up, for an epoch, then the cosine over the stage's epochs."""
    first = 0
    for epochs, lr in STAGES:
        if epoch < first + epochs:
            n, lr = epoch - first, own or lr
            return 1e-5 if n < warmup else lr * (1 + math.cos(math.pi * (n - warmup) / epochs)) / 2
        first += epochs


@pytest.fixture
def schedule():
    """Builds a schedule of STAGES, its optimizer, and a list of the stages' beginnings and ends."""

    def build():
        cfg = get_cfg_default().OPTIM
        cfg.LR_SCHEDULER, cfg.WARMUP_EPOCH, cfg.WARMUP_TYPE, cfg.WARMUP_CONS_LR = "cosine", 1, "constant", 1e-5
        options = {}, {"own_lr": OWN}, {"own_lr": OWN, "warmup_epoch": 3}
        optim = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], **own} for own in options], lr=1.0)
        events, data = [], object()

        def note(*event):
            return lambda given: events.append((*event, given is data))

        stages = [Stage(n, lr, note("begin", i), note("end", i)) for i, (n, lr) in enumerate(STAGES)]
        return StageSchedule(stages, optim, cfg, build_lr_scheduler, data), optim, events

    return build


def expected_rates(epochs):
    """Learning rates of the three parameters in some epochs."""
    return [[closed_form(epoch), closed_form(epoch, OWN), closed_form(epoch, OWN, warmup=3)] for epoch in epochs]


def follow(sched, optim, epochs):
    """The same of a schedule."""
    rates = []
    for epoch in epochs:
        sched.before_epoch(epoch)
        optim.step()
        rates.append([group["lr"] for group in optim.param_groups])
        sched.step()
        sched.after_epoch(epoch)
    return rates


def test_every_stage_follows_its_own_cosine(schedule):
    sched, optim, events = schedule()
    rates = follow(sched, optim, range(10))
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected_rates(range(10))))
    assert events == [(event, i, True) for i in (0, 2) for event in ("begin", "end")]  # the empty stage is skipped


@pytest.mark.parametrize("epochs, warning", [
    ((1,), "all epochs are warm-up"), ((1, 1), "all epochs are warm-up"), ((1, 0), "all epochs are warm-up"),
    ((2, 1), "stage 2 is warm-up"), ((1, 2, 1), "stage 1 and 3 is warm-up"), ((2,), None), ((2, 0, 2), None),
])  # fmt: skip
def test_stages_of_warmup_alone_are_one_warning(epochs, warning):
    cfg = get_cfg_default().OPTIM
    cfg.WARMUP_EPOCH = 1
    found = StageSchedule([Stage(n, 0.1) for n in epochs], None, cfg, build_lr_scheduler, None).warnings
    assert (warning is None) == (found == []) and len(found) <= 1
    assert warning is None or (found[0].startswith(warning) and "raise OPTIM.MAX_EPOCH" in found[0])


def test_printed_learning_rate_is_that_of_the_batch(run):
    done = run("CoOp", "OPTIM.MAX_EPOCH", 3, "OPTIM.WARMUP_EPOCH", 1, "TRAIN.PRINT_FREQ", 1)
    lines = re.findall(r"^epoch \[(\d)/3\] batch .* lr (\S+) ", done.log, re.M)
    rates = {int(epoch): {float(rate) for e, rate in lines if e == epoch} for epoch, _ in lines}
    lr = done.trainer.cfg.OPTIM.LR
    cosine = [lr * (1 + math.cos(math.pi * n / 3)) / 2 for n in (0, 1)]
    expected = [done.trainer.cfg.OPTIM.WARMUP_CONS_LR, *cosine]
    assert [len(rates[epoch]) for epoch in (1, 2, 3)] == [1, 1, 1]  # also in the last batch of an epoch
    assert [rates[epoch].pop() for epoch in (1, 2, 3)] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("done, remaining", [(1, 3), (3, 3), (4, 2), (7, 1), (9, 1)])
def test_resumed_schedule_continues_the_closed_form(schedule, done, remaining):
    """Also at the border of two stages. What a stage did at its beginning is in the checkpoint, not repeated."""
    sched, optim, events = schedule()
    sched.resume(done)
    rates = follow(sched, optim, range(done, 10))
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected_rates(range(done, 10))))
    every = [(event, i, True) for i in (0, 2) for event in ("begin", "end")]
    assert events == every[-remaining:]


# ------------------------------------------------------------------------------------------------- FiniteGuard

FOUR_EPOCHS = ("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic", "OPTIM.MAX_EPOCH", "4")


def spoil(epoch, batch, factor, gradient=False):
    """Prepare a trainer whose loss, or only its gradient, is multiplied in a batch (both counted from 1)."""

    def prepare(trainer):
        loss = trainer.model.loss

        def spoilt(images, label):
            step = loss(images, label)
            if (trainer.epoch + 1, trainer.batch_idx + 1) == (epoch, batch):
                if gradient:
                    step.losses["loss"].register_hook(lambda g: g * factor)
                else:
                    step.losses["loss"] = step.losses["loss"] * factor
            return step

        trainer.model.loss = spoilt

    return prepare


@pytest.mark.parametrize("trainer, factor, gradient, freq", [
    ("CoOp", math.nan, False, 0),
    ("LoGoPrompt", -math.inf, False, 2),
    ("LoGoPrompt", math.nan, True, 0),
])  # fmt: skip
def test_error_names_epoch_batch_images_and_last_checkpoint(run, trainer, factor, gradient, freq):
    prepare = spoil(4, 2, factor, gradient)
    done = run(trainer, *FOUR_EPOCHS, "TRAIN.CHECKPOINT_FREQ", freq, status=2, prepare=prepare)
    (line,) = done.error.splitlines()
    fault = "the loss is finite, its gradients are not" if gradient else f"the loss is {factor}"
    assert line.startswith(f"error: epoch [4/4] batch [2/2]: {fault}; ")
    assert (
        f"images of the batch: {', '.join(done.trainer.guard._paths[:3])} and 5 more; " in line and "OPTIM.LR" in line
    )
    path = done.checkpoints / "model.pth.tar-3"  # written now, where none was due
    assert f"the last good checkpoint is {path}, after epoch 3" in line
    assert all(torch.isfinite(value).all() for value in done.checkpoint(3)["state_dict"].values())
    assert (done.checkpoints / "checkpoint").read_text() == "model.pth.tar-3\n"
    assert not (done.folder / "results.json").exists()
    assert torch.isfinite(done.trainer.model.learned.ctx).all()  # no step was made


def test_training_resumes_after_a_number_that_is_not_finite(run):
    opts = (*FOUR_EPOCHS, "TRAIN.CHECKPOINT_FREQ", 0)
    unbroken = run("LoGoPrompt", *opts, out="unbroken")
    assert "no epoch was finished" in run("LoGoPrompt", *opts, status=2, prepare=spoil(1, 1, math.nan)).error
    run("LoGoPrompt", *opts, status=2, prepare=spoil(3, 1, math.nan))
    assert differences(unbroken.outcome, run("LoGoPrompt", *opts).outcome) == []


def test_parameters_that_overflow_in_the_last_step_are_not_saved(run):
    def prepare(trainer):
        def after_step():
            if (trainer.epoch, trainer.batch_idx) == (2, 1):
                trainer.model.learned.ctx.data[0, 0] = math.inf

        trainer.model.after_step = after_step

    done = run("LoGoPrompt", *FOUR_EPOCHS, "TRAIN.CHECKPOINT_FREQ", 1, status=2, prepare=prepare)
    assert done.error.startswith("error: epoch [3/4]: ctx is no longer finite; ") and "model.pth.tar-2" in done.error
    assert sorted(path.name for path in done.checkpoints.glob("model*")) == ["model.pth.tar-1", "model.pth.tar-2"]


@pytest.fixture
def scaled():
    """Prepare a trainer that scales its loss as on a GPU; ``overflow(step)`` tells which steps overflow."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("this torch scales on a GPU only")

    def make(overflow):
        def prepare(trainer):
            trainer.scaler = trainer.checkpointer.scaler = torch.amp.GradScaler("cpu")
            model, trainer.seen = trainer.model, []
            loss = model.loss

            def overflowing(images, label):
                step = loss(images, label)
                trainer.before = model.learned.ctx.detach().clone()
                if overflow(len(trainer.seen)):
                    step.losses["loss"].register_hook(lambda g: g * math.inf)
                return step

            def after_step():
                moved = not torch.equal(trainer.before, model.learned.ctx)
                trainer.seen.append((moved, trainer.scaler.get_scale()))

            model.loss, model.after_step = overflowing, after_step

        return prepare

    return make


def test_steps_that_overflow_are_skipped_and_the_scale_is_saved(run, scaled):
    scale, opts = 2.0**16, (*FOUR_EPOCHS, "TRAIN.CHECKPOINT_FREQ", 1)
    whole = run("LoGoPrompt", *opts, prepare=scaled(lambda step: step in (2, 3)), out="whole")
    halved = [(True, scale)] * 2 + [(False, scale / 2), (False, scale / 4)] + [(True, scale / 4)] * 4
    assert whole.trainer.seen == halved and whole.checkpoint(4)["scaler"]["scale"] == scale / 4

    def stop(trainer):
        scaled(lambda step: step in (2, 3))(trainer)
        spoil(4, 1, math.nan)(trainer)

    assert "the loss is nan" in run("LoGoPrompt", *opts, prepare=stop, status=2).error  # no overflow
    again = run("LoGoPrompt", *opts, prepare=scaled(lambda step: False))
    assert again.trainer.seen == halved[-2:] and differences(whole.outcome, again.outcome) == []


def test_scale_that_only_falls_ends_training():
    FiniteGuard().check_scale(MIN_SCALE)
    with pytest.raises(FloatingPointError, match="however small the loss is scaled"):
        FiniteGuard().check_scale(MIN_SCALE / 2)


# ------------------------------------------------------------------------------------------------- CollapseMonitor


@pytest.mark.parametrize("accuracies, collapsed_from", [
    ([45, 48, 40, 3, 2], 4),
    ([10, 30, 60, 90], None),
    ([2, 1, 2.5, 0.5], None),  # chance is 2 %
    ([90, 60, 55], None),
])  # fmt: skip
def test_collapse_is_reported_once(accuracies, collapsed_from, capsys):
    monitor = CollapseMonitor(num_classes=50)
    for epoch, accuracy in enumerate(accuracies, 1):
        monitor.after_step(accuracy + 3, 20)
        monitor.after_step(accuracy - 5, 12)
        monitor.after_epoch(epoch)
        assert monitor.collapsed == (collapsed_from is not None and epoch >= collapsed_from)
    output = capsys.readouterr().out
    assert output.count("WARNING") == (collapsed_from is not None)
    assert collapsed_from is None or ("epoch 4" in output and "48.0" in output and "3.0" in output)
