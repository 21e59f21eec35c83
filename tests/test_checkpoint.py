"""Checkpoints: what they hold, which run may resume from them, and how they meet other classes."""

import json
import random

import pytest
import torch
import torch.nn as nn
from conftest import differences, interrupt, linked_caltech
from tiny import NAMES

from trainers.prompting.checkpoint import remap_state_to_classes
from trainers.prompting.errors import UserError

CSC = ("TRAINER.COOP.CSC", True)
PER_CLASS = [("CoOp", "ctx", CSC), ("LinearProbe", "weight", ()), ("LoGoPrompt", "ctx", ())]


# ------------------------------------------------------------------------------------------------- other classes


@pytest.fixture
def reversed_root(data_root, tmp_path):
    """The miniature Caltech101 with its classes in the opposite order: its new classes are the base ones."""
    root = linked_caltech(tmp_path / "reversed", data_root)
    path = root / "caltech-101" / "split_zhou_Caltech101.json"
    split = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({part: [[p, 7 - y, name] for p, y, name in rows] for part, rows in split.items()}))
    return root


@pytest.mark.parametrize("trainer, entry, opts", PER_CLASS)
def test_classes_in_another_order_keep_their_rows(run, reversed_root, trainer, entry, opts):
    first = run(trainer, *opts, out="trained")
    flags = ["--eval-only", "--model-dir", first.folder]
    found = run(trainer, *opts, "DATASET.SUBSAMPLE_CLASSES", "new", root=reversed_root, flags=flags)
    assert found.trainer.classnames == NAMES[3::-1]
    state, other = (run.outcome["state"][entry] for run in (first, found))
    assert torch.equal(state.flip(0), other) and not torch.equal(state, other)
    assert found.results["metrics"] == first.results["metrics"]
    predictions = first.trainer.evaluation.predictions.items()
    assert {path: 3 - label for path, label in predictions} == found.trainer.evaluation.predictions


@pytest.mark.parametrize("trainer, entry, opts", PER_CLASS[:2])
def test_class_that_was_not_trained_is_refused(run, trainer, entry, opts):
    first = run(trainer, *opts, out="trained")
    flags = ["--eval-only", "--model-dir", first.folder]
    (line,) = run(trainer, *opts, "DATASET.SUBSAMPLE_CLASSES", "all", flags=flags, status=2).error.splitlines()
    assert line.startswith(f"error: {first.checkpoints}/model.pth.tar-")
    assert f'was not trained on "{NAMES[4]}" and 3 more of these classes' in line


class PerClass(nn.Module):
    """A row for each class, and one parameter that all share."""

    per_class = ("rows",)

    def __init__(self, n):
        super().__init__()
        self.rows, self.shared = nn.Parameter(torch.randn(n, 2)), nn.Parameter(torch.randn(3))


def test_rows_are_matched_by_name_as_in_a_loop():
    """Also names that occur twice, in any order; inside another module too."""
    draw = random.Random(0)
    for _ in range(30):
        known, current = (draw.choices(["a", "b", "b_c", "d"], k=draw.randint(1, 6)) for _ in range(2))
        saved, module = (nn.ModuleDict({"inner": PerClass(len(names))}) for names in (known, current))
        expected, left = module.inner.rows.detach().clone(), list(enumerate(known))
        for row, name in enumerate(current):
            match = next(((i, other) for i, other in left if other == name), None)
            if match:
                left.remove(match)
                expected[row] = saved.inner.rows[match[0]]
        current = [name.replace("_", " ") for name in current]
        remapped = remap_state_to_classes(module, saved.state_dict(), current, known, "path")
        assert torch.equal(remapped["inner.rows"], expected)
        assert torch.equal(remapped["inner.shared"], saved.inner.shared)
        if len(left) > len(known) - len(current):
            PerClass.serves_unseen_classes = False
            with pytest.raises(UserError, match="^path was not trained on "):
                remap_state_to_classes(module, saved.state_dict(), current, known, "path")
            del PerClass.serves_unseen_classes


# ------------------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize("trainer", ["CoOp", "LoGoPrompt", "LinearProbe"])
def test_checkpoints_hold_plain_types_alone(trained, trainer):
    def types(value):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return {type(value).__name__}.union(*map(types, inner))

    checkpoint = trained(trainer).checkpoint(1 if trainer == "LinearProbe" else 2)
    plain = {"dict", "list", "tuple", "str", "int", "float", "bool", "NoneType", "Tensor", "OrderedDict"}
    assert types(checkpoint) <= plain and set(checkpoint["random"]) == {"python", "numpy", "torch", "cuda"}


def test_checkpoint_of_the_original_coop_is_evaluated(trained, run, tmp_path):
    """It holds token buffers and no class names."""
    ctx = trained("CoOp").checkpoint(2)["state_dict"]["ctx"]
    buffers = {"token_prefix": torch.zeros(9, 1, 64), "token_suffix": torch.zeros(9, 72, 64)}
    (tmp_path / "theirs" / "prompt_learner").mkdir(parents=True)
    path = tmp_path / "theirs" / "prompt_learner" / "model.pth.tar-50"
    torch.save({"state_dict": {"ctx": ctx, **buffers}, "epoch": 50}, path)
    found = run("CoOp", flags=["--eval-only", "--model-dir", tmp_path / "theirs", "--load-epoch", 50])
    assert torch.equal(found.trainer.model.learned.ctx, ctx) and found.results["run"]["epochs"] == 50


def test_checkpoints_that_do_not_fit_are_refused(run, tmp_path):
    folder = tmp_path / "model" / "prompt_learner"
    folder.mkdir(parents=True)
    path = folder / "model.pth.tar-3"
    flags = ["--eval-only", "--model-dir", tmp_path / "model", "--load-epoch", 3]

    def error():
        opts = ("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic")
        (line,) = run("LoGoPrompt", *opts, flags=flags, status=2).error.splitlines()
        return line

    assert f"no checkpoint model.pth.tar-3 in {folder}" in error()
    path.write_bytes(b"rubbish")
    assert f"{path}: not a checkpoint that can be read" in error()
    torch.save({"state_dict": {"ctx": torch.zeros(4, 64, 64)}, "epoch": 3}, path)
    assert f"{path}: ctx is (4, 64, 64), here it must be (4, 64)" in error()
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "epoch": 3}, path)
    assert f"{path} holds weight, LoGoPrompt needs ctx" in error() and "another trainer" in error()


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("trainer", ["CoOp", "CoCoOp", "LoGoPrompt"])
def test_interrupted_run_ends_as_an_unbroken_one(run, trainer):
    opts = ("TRAIN.CHECKPOINT_FREQ", 1, "OPTIM.MAX_EPOCH", 4)
    unbroken = run(trainer, *opts, out="unbroken")
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(trainer, *opts, prepare=interrupt(epoch))
    resumed = run(trainer, *opts)
    assert resumed.trainer.start_epoch == 3 and resumed.timeless == unbroken.timeless
    states = [run.checkpoint(4) for run in (unbroken, resumed)]
    assert differences(*states) == ["/config"]  # which names the output folder
    assert states[0]["optimizer"]["state"][0]["momentum_buffer"].abs().max() > 0


def test_run_resumes_only_with_the_same_settings(run):
    first = run("CoOp")
    (first.folder / "results.json").unlink()
    for part, trainer, *opts in (
        ("OPTIM.LR 0.002, now it is 0.5", "CoOp", "OPTIM.LR", 0.5),
        ("OPTIM.MAX_EPOCH 2, now it is 3", "CoOp", "OPTIM.MAX_EPOCH", 3),
        ("TRAINER.NAME CoOp, now it is CoCoOp", "CoCoOp"),
        ("was trained on other classes", "CoOp", "DATASET.SUBSAMPLE_CLASSES", "new"),
    ):
        assert part in run(trainer, *opts, status=2).error.splitlines()[-1]
    assert run("CoOp", "TEST.PER_CLASS_RESULT", True, "TRAIN.PRINT_FREQ", 1).results  # these may change
    run("CoOp", "OPTIM.MAX_EPOCH", 3, out="longer", flags=["--resume", first.folder])  # here everything may
    stages = ("OPTIM.MAX_EPOCH", 4, "TRAIN.CHECKPOINT_FREQ", 1)
    other = run("LoGoPrompt", *stages, out="stages")
    opts, flags = (*stages, "TRAINER.LOGOPROMPT.STAGE1_EPOCHS", 1), ["--resume", other.folder]
    refused = run("LoGoPrompt", *opts, out="other", flags=flags, status=2)  # but not which epoch is of which stage
    assert "TRAINER.LOGOPROMPT.STAGE1_EPOCHS -1, now it is 1: train without --resume" in refused.error


def test_evaluation_does_not_replace_the_results_of_training(run):
    trained = run("CoOp")
    refused = run("CoOp", flags=["--eval-only", "--model-dir", trained.folder], status=2)
    assert "choose another --output-dir" in refused.error and refused.results["run"]["trained"]
