"""The trainers through ``train.py``: what a run leaves behind, and that nothing but the seed changes it."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, differences, interrupt, linked_caltech
from helpers import naive_paste
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import NAMES, arguments
from yacs.config import CfgNode

from trainers.prompting import distributed
from trainers.prompting.backbone import load_clip
from trainers.prompting.image_batch import ImageBatch
from trainers.prompting.names import relative_path

PROMPTS = ("CoOp", "CoCoOp", "LoGoPrompt")
TRAINED = (*PROMPTS, "LinearProbe")
ALL = (*TRAINED, "ZeroshotCLIP", "ZeroshotCLIP2")
META_NET = [f"meta_net.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
STATE = {"CoOp": ["ctx"], "CoCoOp": ["ctx", *META_NET], "LoGoPrompt": ["ctx", "trained", *META_NET]}
GENERIC = ("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic")
for_trained = pytest.mark.parametrize("trainer", TRAINED)
for_prompts = pytest.mark.parametrize("trainer", PROMPTS)


# ------------------------------------------------------------------------------------------------- what a run leaves


@for_prompts
def test_run_folder_holds_the_promised_files(trained, trainer):
    run = trained(trainer)
    files = [
        ".lock",
        "config.yaml",
        "curves.csv",
        "environment.txt",
        "log.txt",
        "prompt_learner",
        "results.json",
        "tensorboard",
    ]
    assert sorted(path.name for path in run.folder.iterdir()) == files
    assert run.checkpoint(2)["epoch"] == 2 and run.checkpoint(2)["classnames"] == NAMES[:4]
    assert CfgNode.load_cfg((run.folder / "config.yaml").read_text()).OPTIM.MAX_EPOCH == 2
    results = run.results
    correct = [label == NAMES.index(path.split("/")[2]) for path, label in run.trainer.evaluation.predictions.items()]
    assert results["metrics"]["accuracy"] == pytest.approx(100 * sum(correct) / len(correct))
    assert (results["images"], results["classes"]) == (len(correct), 4) and len(correct) == 16
    assert results["run"]["trained"] and results["run"]["epochs"] == 2 and results["run"]["seed"] == 1
    about = results["run"]
    assert about["overrides"]["OPTIM.MAX_EPOCH"] == 2
    assert ("OPTIM.LR" in about["overrides"]) == (trainer == "LoGoPrompt")  # else the file's
    assert Path(about["config_file"]).stem in ("photo64_ep50_ctxv1", "photo64_c4_ep10_batch1_ctxv1")
    assert 0 < about["seconds"] < 600 and results["classnames"] == NAMES[:4]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert (about["commit"] or "").removesuffix("-dirty") == head.strip()
    assert "epoch [2/2] batch [2/2]" in run.log
    summary = f"{trainer} on Caltech101, base classes, 4 shots, seed 1: "
    accuracy = f"accuracy {results['metrics']['accuracy']:.2f} % (16 images). Results: {run.folder / 'results.json'}"
    assert run.log.splitlines()[-1].startswith(summary + accuracy)


@for_prompts
def test_tensorboard_has_a_point_for_every_step_and_evaluation(trained, trainer):
    run = trained(trainer)
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    curves = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for name in ("loss", "acc", "lr", *(["conditional_minimum"] if trainer == "LoGoPrompt" else [])):
        assert [step for step, _ in curves[f"train/{name}"]] == [0, 1, 2, 3]  # two epochs of two batches
    for name, value in {**run.results["metrics"], **run.results["observed"]}.items():
        assert curves[f"test/{name}"] == [(1, pytest.approx(value, rel=1e-6))]
    printed = re.findall(r"loss (\S+) \(\S+\) acc (\S+) \(\S+\) lr (\S+) ", run.log)  # of single steps
    for name, values in zip(("loss", "acc", "lr"), zip(*printed)):
        assert [value for _, value in curves[f"train/{name}"]] == pytest.approx([*map(float, values)], abs=1e-4)
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert ("class_conditional_images" in events.Tags()["images"]) == (trainer == "LoGoPrompt")


@for_prompts
def test_curves_are_those_of_tensorboard(trained, trainer):
    run = trained(trainer)
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    with open(run.folder / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row.pop("epoch"), row.pop("step")) for row in rows] == [("1", "0"), ("1", "1"), ("2", "2"), ("2", "3")]
    for name in rows[0]:
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([float(row[name]) for row in rows], rel=1e-6)


def test_curves_of_a_resumed_run_have_every_step_once(run):
    opts = ("OPTIM.MAX_EPOCH", 4, "TRAIN.CHECKPOINT_FREQ", 1, "TEST.FINAL_MODEL", "best_val")
    whole = run("CoOp", *opts, out="whole")
    with pytest.raises(KeyboardInterrupt):
        run("CoOp", *opts, prepare=interrupt(2))
    curves = run("CoOp", *opts).folder / "curves.csv"
    assert curves.read_text() == (whole.folder / "curves.csv").read_text()
    assert "val/accuracy" in curves.read_text().splitlines()[0]


def test_sheet_shows_images_with_the_blocks_of_three_classes(trained):
    trainer = trained("LoGoPrompt").trainer
    images = ImageBatch(trainer.backbone, torch.zeros(2, 3, 64, 64), ["a.png", "b.png"])
    model, label = trainer.model, torch.tensor([3, 0])
    pictures = (model.pictures(images, label) - model.mean) / model.std
    for row, top_left, y in zip(pictures, model.places(images), label):
        assert torch.allclose(row[0], torch.zeros(()), atol=1e-5)
        for i in range(3):
            expected = naive_paste(torch.zeros(3, 64, 64), model.visual_prompts[(y + i) % 4], *top_left)
            torch.testing.assert_close(row[1 + i], expected, atol=1e-5, rtol=0)


@for_prompts
def test_only_the_learned_part_is_trained_and_saved(trained, trainer, rn_file):
    run = trained(trainer)
    model, optim = run.trainer.model, run.trainer.optim
    optimised = [id(p) for group in optim.param_groups for p in group["params"]]
    assert run.trainer.get_model_names() == ["prompt_learner"]
    assert optimised == [id(p) for p in model.learned.parameters()]
    assert sorted(run.checkpoint(2)["state_dict"]) == sorted(STATE[trainer])
    assert differences(load_clip(rn_file).state_dict(), model.backbone.state_dict()) == []
    assert not any(module.training for module in model.backbone.modules())


@for_trained
def test_evaluating_a_checkpoint_repeats_the_training_run(trained, run, trainer):
    before = trained(trainer)
    again = run(trainer, flags=["--eval-only", "--model-dir", before.folder])
    assert differences(before.outcome, again.outcome) == []
    assert again.results["run"]["model_dir"] == str(before.folder)


def test_the_best_epoch_is_deployed_and_the_last_one_resumed(run):
    done = run("CoOp", "TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 3)
    best = done.checkpoint("model-best.pth.tar")
    assert torch.equal(done.trainer.model.learned.ctx, best["state_dict"]["ctx"])
    assert (done.checkpoints / "checkpoint").read_text().strip() == "model.pth.tar-3"


def test_text_features_are_computed_once_per_evaluation(run, trained):
    calls = []
    flags = ["--eval-only", "--model-dir", trained("LoGoPrompt").folder]

    def count(trainer):
        trainer.model.text_encoder.register_forward_hook(lambda *args: calls.append(1))

    run("LoGoPrompt", "DATALOADER.TEST.BATCH_SIZE", 3, flags=flags, prepare=count)
    assert calls == [1]


def test_metrics_of_the_selection(run):
    """Recomputed from every image alone. The block is large, for something to change."""
    done = run("LoGoPrompt", *GENERIC, "TRAINER.LOGOPROMPT.BLOCK_HEIGHT", 0.9)
    trainer, changed, correct, n = done.trainer, 0, 0, 0
    rises = {"log_odds_rise_true": [], "log_odds_rise_wrong": []}
    with torch.no_grad():
        text = trainer.model.text_features()
        for images, label in trainer.source.batches(trainer.test_loader):
            found = trainer.model.compare(images, text)
            assert not found.among_candidates
            for row, y in enumerate(label.tolist()):
                candidates = found.candidates[row].tolist()  # all four classes
                wrong = max((c for c in candidates if c != y), key=lambda c: found.original[row, c])  # noqa: B023
                for name, c in zip(rises, (y, wrong)):
                    logs = found.original[row, c], found.conditional[row, candidates.index(c)]
                    p = [min(max(math.exp(log_p), 1e-6), 1 - 1e-6) for log_p in logs]
                    rises[name].append(math.log(p[1] / (1 - p[1])) - math.log(p[0] / (1 - p[0])))
        for batch in trainer.test_loader:
            alone = (trainer.model.backbone.encode_image(batch["img"]) @ text.T).argmax(dim=1).tolist()
            for path, label, found in zip(batch["impath"], batch["label"].tolist(), alone):
                path = relative_path(path, trainer.cfg.DATASET.ROOT)
                changed += trainer.evaluation.predictions[path] != found
                correct, n = correct + (label == found), n + 1
    assert changed > 0
    shares = {"changed_by_selection": 100 * changed / n, "accuracy_without_selection": 100 * correct / n}
    shares |= {name: sum(values) / len(values) for name, values in rises.items()}
    assert done.results["observed"] == pytest.approx(shares, rel=1e-4, abs=1e-4)


# ------------------------------------------------------------------------------------------------- precision


@for_prompts
def test_bfloat16_and_chunks_train_nearly_the_same(run, trainer):
    """Compared with how far training moves the context."""
    frozen, bf16 = ("OPTIM.LR", 0.0, "OPTIM.WARMUP_CONS_LR", 0.0), (f"TRAINER.{trainer.upper()}.PREC", "bf16")
    runs = [
        run(trainer, *GENERIC, *more, out=str(i)) for i, more in enumerate((frozen, (), bf16, ("TRAIN.TEXT_CHUNK", 3)))
    ]
    first, plain, rough, chunked = (done.trainer.model.learned.ctx.detach() for done in runs)
    moved = (plain - first).norm()
    assert runs[2].trainer.scaler is None and rough.dtype == torch.float32
    assert 0 < (rough - plain).norm() < 0.1 * moved and (chunked - plain).norm() < 1e-4 * moved


# ------------------------------------------------------------------------------------------------- one seed, one result


@pytest.mark.parametrize("trainer", ALL)
def test_same_seed_same_results(trained, run, trainer):
    first, flags = trained(trainer), [] if trainer in TRAINED else ["--eval-only"]
    again = run(trainer, flags=flags, out="again")
    results = [found.results for found in (first, again)]
    assert all(found["run"].pop("seconds") for found in results) and results[0] == results[1]
    assert differences(first.outcome, again.outcome) == []
    if trainer in PROMPTS:
        assert differences(first.outcome["state"], run(trainer, seed=2, out="other").outcome["state"]) != []


@pytest.mark.parametrize("trainer", ALL)
def test_predictions_do_not_depend_on_batches_order_workers_threads_or_store(trained, run, trainer, tmp_path):
    flags, subset = ["--eval-only"], "base" if trainer == "LinearProbe" else "all"
    if trainer in TRAINED:
        flags += ["--model-dir", trained(trainer).folder]
    store, threads, outcomes = ("TEST.FEATURES", tmp_path / "features.sqlite"), torch.get_num_threads(), []
    variants = [(1, 0, "Sequential", 1, ()), (7, 2, "Random", 1, ()), (100, 0, "Random", 2, store)]
    for batch, workers, sampler, n, more in [*variants, (5, 0, "Sequential", 1, store)]:
        torch.set_num_threads(n)
        opts = ("DATALOADER.TEST.BATCH_SIZE", batch, "DATALOADER.NUM_WORKERS", workers)
        opts += ("DATALOADER.TEST.SAMPLER", f"{sampler}Sampler", "DATASET.SUBSAMPLE_CLASSES", subset, *more)
        seed = len(outcomes) + 1
        outcomes.append(run(trainer, *opts, flags=flags, seed=seed, out=str(seed)).outcome)
    torch.set_num_threads(threads)
    assert len(outcomes[0]["predictions"]) == (16 if subset == "base" else 32)
    assert [differences(outcomes[0], other) for other in outcomes] == [[]] * 4


@for_prompts
def test_training_does_not_depend_on_evaluation_logs_or_caches(trained, run, trainer, tmp_path, data_root):
    """Neither on a feature store (cold, warm), decoded images nor on who drew the few-shot sample."""
    first = trained(trainer).outcome
    watched = ("DATALOADER.TEST.BATCH_SIZE", 3, "TRAIN.PRINT_FREQ", 1, "TRAIN.CHECKPOINT_FREQ", 1, "VERBOSE", False)
    cold = ("TEST.FEATURES", tmp_path / "features.sqlite")
    warm, elsewhere = (*cold, "TRAIN.DECODED_GB", 0.0), linked_caltech(tmp_path / "data", data_root)
    for i, opts in enumerate((watched, cold, warm)):
        done = run(trainer, *opts, out=str(i), root=elsewhere)
        assert differences(first, done.outcome) == []


def test_runs_with_workers_repeat_whatever_their_number(run):
    outcomes = [run("LoGoPrompt", "DATALOADER.NUM_WORKERS", n, out=f"run{n}").outcome for n in (2, 1)]
    assert differences(*outcomes) == []
    for name, *opts in (("plain", "INPUT.TRANSFORMS", "('normalize',)"), ("views", "TRAINER.LOGOPROMPT.VIEWS", 2)):
        without, with_two = (  # where no worker augments, their number changes nothing at all
            run("LoGoPrompt", *opts, "DATALOADER.NUM_WORKERS", n, out=f"{name}{n}").outcome for n in (0, 2)
        )
        assert differences(without, with_two) == []


def test_another_process_with_data_elsewhere_repeats_a_run(trained, data_root, rn_file, tmp_path):
    """PYTHONHASHSEED orders sets; images are written in another order, in another folder."""
    for path in sorted(data_root.rglob("*.*"), reverse=True):
        copy = tmp_path / "data" / path.relative_to(data_root)
        if path.is_file() and "split_fewshot" not in path.parts:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    command = [
        sys.executable,
        ROOT / "train.py",
        *arguments("LoGoPrompt", tmp_path / "data", rn_file, tmp_path / "run"),
    ]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, check=True)
    state = torch.load(tmp_path / "run" / "prompt_learner" / "model.pth.tar-2", weights_only=True)["state_dict"]
    first = trained("LoGoPrompt")
    assert differences(first.outcome["state"], dict(state)) == []
    assert first.results["metrics"] == json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]


def test_processes_without_test_images_draw_as_the_others(run, monkeypatch):
    trainer = run("ZeroshotCLIP", flags=["--eval-only"]).trainer
    images, states = [], set()
    monkeypatch.setattr(distributed, "processes", lambda: 99)
    for rank in range(99):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        images += [path for batch, _ in trainer.source.batches(trainer.test_loader) for path in batch.paths]
        states.add(torch.get_rng_state().numpy().tobytes())
    assert images == list(trainer.evaluation.predictions) and len(images) < 99
    assert len(states) == 1
