"""The trainers through ``train.py``: what is trained, stored and reported, and that runs repeat exactly."""

import json
import sys

import pytest
import torch
from tiny import NAMES, arguments
from yacs.config import CfgNode

import train
from trainers.prompting.trainer import CollapseWatch

TRAINED = ["CoOp", "CoCoOp", "LoGoPrompt"]
ZERO_SHOT = ["ZeroshotCLIP", "ZeroshotCLIP2"]
EVERY = [*ZERO_SHOT, *TRAINED]
BASE = NAMES[:4]


@pytest.fixture
def run(data_root, rn_file, tmp_path, monkeypatch):
    """Run ``train.py`` in this process; returns its results, and keeps the trainer as ``run.trainer``."""

    def call(trainer, *opts, flags=(), out="run", seed=1, status=0):
        built = []
        monkeypatch.setattr(train, "build_trainer", lambda cfg: built.append(original(cfg)) or built[0])
        if trainer == "LoGoPrompt":  # test_two_stage.py has the other prompts
            opts = ("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic", *opts)
        arguments_ = arguments(trainer, data_root, rn_file, tmp_path / out, *opts, flags=flags, seed=seed)
        assert train.main(arguments_) == status
        sys.stdout.flush()  # of the log
        call.trainer = built[0]
        for loader in (call.trainer.train_loader_x, call.trainer.test_loader):
            if loader.num_workers and loader._iterator is not None:
                # left to the garbage collector, workers of several runs in one process wait for each other
                loader._iterator._shutdown_workers()
                loader._iterator = None
        return json.loads((tmp_path / out / "results.json").read_text())

    original = train.build_trainer
    call.folder = tmp_path
    return call


@pytest.mark.parametrize("trainer", TRAINED)
def test_a_run_writes_what_is_promised(run, trainer):
    results = run(trainer)
    folder = run.folder / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "config.yaml",
        "log.txt",
        "prompt_learner",
        "results.json",
        "tensorboard",
    ]
    assert (folder / "prompt_learner" / "model.pth.tar-2").is_file()
    assert CfgNode.load_cfg((folder / "config.yaml").read_text()).OPTIM.MAX_EPOCH == 2
    assert any((folder / "tensorboard").iterdir())
    log = (folder / "log.txt").read_text()
    for line in ("Finish training", "=> result", "* accuracy: ", "epoch [2/2] batch [2/2]"):
        assert line in log
    assert results["images"] == 16 and results["classes"] == 4
    assert results["run"]["trained"] and results["run"]["epochs"] == 2 and results["run"]["seed"] == 1
    accuracy = sum(run.trainer.predictions[p] == NAMES.index(p.split("/")[2]) for p in run.trainer.predictions) / len(
        run.trainer.predictions
    )
    assert results["metrics"]["accuracy"] == pytest.approx(100 * accuracy)


@pytest.mark.parametrize("trainer", TRAINED)
def test_only_the_prompt_learner_is_registered_trained_and_stored(run, trainer):
    run(trainer)
    built = run.trainer
    assert built.get_model_names() == ["prompt_learner"]
    optimised = [p for group in built.optim.param_groups for p in group["params"]]
    assert [id(p) for p in optimised] == [id(p) for p in built.model.prompt_learner.parameters()]
    net = [f"meta_net.linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    path = run.folder / "run" / "prompt_learner" / "model.pth.tar-2"
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint["state_dict"]) == (["ctx", *net] if trainer == "CoCoOp" else ["ctx"])
    assert checkpoint["classnames"] == BASE and checkpoint["epoch"] == 2
    assert path.stat().st_size < 25_000


@pytest.mark.parametrize("trainer", TRAINED)
def test_clip_is_untouched_by_training(run, trainer, rn_file):
    from trainers.prompting.backbone import load_clip

    run(trainer)
    before, after = load_clip(rn_file).state_dict(), run.trainer.model.backbone.state_dict()
    assert any("running_mean" in key for key in before)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(m.training for m in run.trainer.model.backbone.modules())


@pytest.mark.parametrize("trainer", EVERY)
def test_same_seed_same_results(run, trainer):
    flags = ["--eval-only"] if trainer in ZERO_SHOT else []
    first, second = run(trainer, out="a", flags=flags), run(trainer, out="b", flags=flags)
    assert first == second
    if trainer not in ZERO_SHOT:
        states = [
            torch.load(run.folder / out / "prompt_learner" / "model.pth.tar-2", weights_only=True)["state_dict"]["ctx"]
            for out in "ab"
        ]
        assert torch.equal(*states)
        run(trainer, out="c", seed=2)
        other = torch.load(run.folder / "c" / "prompt_learner" / "model.pth.tar-2", weights_only=True)
        assert not torch.equal(other["state_dict"]["ctx"], states[0])


@pytest.mark.parametrize("trainer", EVERY)
def test_predictions_do_not_depend_on_batches_order_or_workers(run, trainer):
    flags = ["--eval-only"]
    if trainer not in ZERO_SHOT:
        run(trainer, out="model")
        flags += ["--model-dir", run.folder / "model"]
    outcomes = []
    for i, (batch, workers, sampler) in enumerate(
        [
            (1, 0, "SequentialSampler"),
            (7, 2, "SequentialSampler"),
            (100, 0, "RandomSampler"),
            (7, 2, "RandomSampler"),
        ]
    ):
        results = run(
            trainer,
            *("DATALOADER.TEST.BATCH_SIZE", batch, "DATALOADER.NUM_WORKERS", workers),
            *("DATALOADER.TEST.SAMPLER", sampler, "DATASET.SUBSAMPLE_CLASSES", "all"),
            flags=flags,
            out=f"eval{i}",
            seed=1 + i,
        )
        assert len(run.trainer.predictions) == 4 * len(NAMES)
        outcomes.append((dict(sorted(run.trainer.predictions.items())), results["metrics"]["accuracy"]))
    assert all(outcome == outcomes[0] for outcome in outcomes[1:])


@pytest.mark.parametrize("trainer", TRAINED)
def test_evaluation_of_a_checkpoint_repeats_the_training_run_s_own(run, trainer):
    trained = run(trainer, out="a")
    tested = run(trainer, out="b", flags=["--eval-only", "--model-dir", run.folder / "a"])
    assert tested["metrics"] == trained["metrics"]
    assert tested["run"]["model_dir"] == str(run.folder / "a") and tested["run"]["epochs"] == 2


@pytest.mark.parametrize("trainer", TRAINED)
def test_a_base_model_serves_new_and_all_classes(run, trainer):
    run(trainer, out="a")
    flags = ["--eval-only", "--model-dir", run.folder / "a"]
    for subset, classes in (("new", 4), ("all", 8)):
        results = run(trainer, "DATASET.SUBSAMPLE_CLASSES", subset, flags=flags, out=subset)
        assert results["classes"] == classes and results["images"] == 4 * classes


@pytest.mark.parametrize("trainer", TRAINED)
def test_an_interrupted_run_goes_on_where_it_was(run, trainer, monkeypatch):
    options = ("TRAIN.CHECKPOINT_FREQ", 1, "OPTIM.MAX_EPOCH", 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.TRAINER_REGISTRY.get(trainer), "before_epoch", _stop_at_epoch(2))
        run(trainer, *options)
    assert not (run.folder / "run" / "results.json").exists()
    checkpoint = torch.load(run.folder / "run" / "prompt_learner" / "model.pth.tar-2", weights_only=True)
    seen = []
    monkeypatch.setattr(
        train.TRAINER_REGISTRY.get(trainer),
        "before_epoch",
        lambda self: seen.append((self.epoch, self.get_current_lr(), self.model.prompt_learner.ctx.detach().clone())),
    )
    results = run(trainer, *options)
    assert [epoch for epoch, _, _ in seen] == [2, 3]
    assert torch.equal(seen[0][2], checkpoint["state_dict"]["ctx"])
    assert [lr for _, lr, _ in seen] == pytest.approx([0.002 * (1 + 0.5**0.5) / 2, 0.001])  # cosine over 4 epochs
    assert results["run"]["epochs"] == 4


@pytest.mark.parametrize("trainer", TRAINED)
def test_an_interrupted_run_ends_as_an_unbroken_one(run, trainer, monkeypatch):
    options = ("TRAIN.CHECKPOINT_FREQ", 1, "OPTIM.MAX_EPOCH", 4)
    unbroken = run(trainer, *options, out="unbroken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.TRAINER_REGISTRY.get(trainer), "before_epoch", _stop_at_epoch(3))
        run(trainer, *options, out="broken")
    assert run(trainer, *options, out="broken") == unbroken
    states = [
        torch.load(run.folder / out / "prompt_learner" / "model.pth.tar-4", weights_only=True)
        for out in ("unbroken", "broken")
    ]
    assert torch.equal(states[0]["state_dict"]["ctx"], states[1]["state_dict"]["ctx"])
    momentum = [state["optimizer"]["state"][0]["momentum_buffer"] for state in states]
    assert torch.equal(*momentum) and momentum[0].abs().max() > 0


def test_a_run_goes_on_only_as_what_it_was(run, capsys):
    run("CoOp")
    (run.folder / "run" / "results.json").unlink()

    def refused(trainer, *opts):
        with pytest.raises(FileNotFoundError):  # of results.json: nothing was run
            run(trainer, *opts, status=2)
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "OPTIM.LR 0.002, now it is 0.5" in refused("CoOp", "OPTIM.LR", 0.5)
    assert "OPTIM.MAX_EPOCH 2, now it is 3" in refused("CoOp", "OPTIM.MAX_EPOCH", 3)
    assert "TRAINER.NAME CoOp, now it is LoGoPrompt" in refused("LoGoPrompt")
    assert "other classes" in refused("CoOp", "DATASET.SUBSAMPLE_CLASSES", "new")
    run("CoOp", "TEST.PER_CLASS_RESULT", True, "TRAIN.PRINT_FREQ", 1)  # these may change
    assert (run.folder / "run" / "results.json").exists()
    run("CoOp", "OPTIM.MAX_EPOCH", 3, out="further", flags=["--resume", run.folder / "run"])  # here all may, when asked
    assert (run.folder / "further" / "prompt_learner" / "model.pth.tar-3").exists()


def test_evaluation_does_not_replace_a_training_run_s_results(run, capsys):
    before = run("CoOp")
    assert run("CoOp", flags=["--eval-only", "--model-dir", run.folder / "run"], status=2) == before
    assert "--output-dir" in capsys.readouterr().err


def test_a_checkpoint_with_coop_s_token_buffers_loads(run):
    run("CoOp", out="a")
    path = run.folder / "a" / "prompt_learner" / "model.pth.tar-2"
    ctx = torch.load(path, weights_only=True)["state_dict"]["ctx"]
    buffers = {"token_prefix": torch.zeros(9, 1, 64), "token_suffix": torch.zeros(9, 72, 64)}
    torch.save({"state_dict": {"ctx": ctx, **buffers}, "epoch": 2}, path)
    run("CoOp", out="b", flags=["--eval-only", "--model-dir", run.folder / "a"])
    assert torch.equal(run.trainer.model.prompt_learner.ctx, ctx)


def test_a_collapse_is_remembered_by_the_run_that_goes_on(run, monkeypatch):
    options = ("TRAIN.CHECKPOINT_FREQ", 1, "OPTIM.MAX_EPOCH", 4)
    accuracies = iter([90.0, 26.0, 26.0, 26.0])
    monkeypatch.setattr(CollapseWatch, "update", lambda self, accuracy, n: None)
    original = CollapseWatch.epoch_ends

    def epoch_ends(self, epoch):
        self._sum, self._count = next(accuracies), 1
        original(self, epoch)

    monkeypatch.setattr(CollapseWatch, "epoch_ends", epoch_ends)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.TRAINER_REGISTRY.get("CoOp"), "before_epoch", _stop_at_epoch(3))
        run("CoOp", *options)
    assert run("CoOp", *options)["run"]["collapsed"] is True


def _stop_at_epoch(epoch):
    def before_epoch(self):
        if self.epoch == epoch:
            raise KeyboardInterrupt

    return before_epoch


def test_best_val_deploys_the_best_epoch(run):
    run("CoOp", "TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 3)
    folder = run.folder / "run" / "prompt_learner"
    best = torch.load(folder / "model-best.pth.tar", weights_only=True)
    assert torch.equal(run.trainer.model.prompt_learner.ctx, best["state_dict"]["ctx"])
    assert (folder / "checkpoint").read_text().strip() == "model.pth.tar-3"


def test_evaluation_on_the_validation_split(run):
    results = run("LoGoPrompt", "TEST.SPLIT", "val")
    assert results["split"] == "val" and results["images"] == 8


def test_text_features_are_computed_once_per_evaluation(run):
    run("LoGoPrompt", "DATALOADER.TEST.BATCH_SIZE", 3)
    calls = []
    run.trainer.model.text_encoder.register_forward_hook(lambda *args: calls.append(1))
    run.trainer.test()
    assert len(run.trainer.test_loader) == 6 and len(calls) == 1


def test_half_precision_on_the_cpu_is_float32_and_said(run):
    run("LoGoPrompt", "TRAINER.LOGOPROMPT.PREC", "fp16")
    assert run.trainer.model.backbone.dtype == torch.float32
    log = (run.folder / "run" / "log.txt").read_text()
    assert log.count("computing in float32 on the CPU") == 1


@pytest.fixture
def contexts(run):
    """Contexts after training with some options, and how far they have come from where they began."""

    def call(trainer, *opts):
        found = {}
        for name, words in (("start", ("OPTIM.LR", 0.0, "OPTIM.WARMUP_CONS_LR", 0.0)), ("plain", ()), ("other", opts)):
            run(trainer, *words, out=name)
            found[name] = run.trainer.prompt_learner.ctx.detach().clone()
        return found["plain"], found["other"], (found["plain"] - found["start"]).norm()

    return call


@pytest.mark.parametrize("trainer", TRAINED)
def test_bfloat16_trains_nearly_as_float32_does(run, contexts, trainer):
    """No scaled loss; the loss itself is in float32, and so is what is learned."""
    plain, rough, moved = contexts(trainer, f"TRAINER.{trainer.upper()}.PREC", "bf16")
    assert run.trainer.scaler is None and rough.dtype == torch.float32
    assert 0 < (rough - plain).norm() < 0.1 * moved


@pytest.mark.parametrize("trainer", TRAINED)
def test_classes_in_chunks_train_the_same(run, contexts, trainer):
    plain, chunked, moved = contexts(trainer, "TRAIN.TEXT_CHUNK", 3)
    assert run.trainer.model.text_encoder.chunk == 3
    assert moved > 0 and (chunked - plain).norm() < 1e-4 * moved


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("trainer", TRAINED)
def test_tensorboard_has_a_point_for_every_step_and_evaluation(run, trainer):
    results = run(trainer)
    found = curves(run.folder / "run")
    steps = list(range(4))  # two epochs of two batches
    for name in ("loss", "acc", "lr", *(["conditional_minimum"] if trainer == "LoGoPrompt" else [])):
        assert [step for step, _ in found[f"train/{name}"]] == steps
    assert found["test/accuracy"] == [(1, pytest.approx(results["metrics"]["accuracy"], rel=1e-6))]
    for name, value in results["observed"].items():
        assert found[f"test/{name}"] == [(1, pytest.approx(value, rel=1e-6))]


def test_what_the_selection_changes(run):
    """From the scores of every test image one by one; with a store of features as well."""
    store, large = run.folder / "features.sqlite", ("TRAINER.LOGOPROMPT.BLOCK_HEIGHT", 0.9)  # for something to change
    for _ in range(2):
        results = run("LoGoPrompt", "TEST.FEATURES", store, *large, out=str(len(list(run.folder.iterdir()))))
        trainer, changed, right, n = run.trainer, 0, 0, 0
        with torch.no_grad():
            text = trainer.model.text_features()
            for batch in trainer.test_loader:
                alone = trainer.model.log_p(trainer.model.backbone.encode_image(batch["img"]), text).argmax(dim=1)
                for path, label, found in zip(trainer.relative_paths(batch), batch["label"], alone):
                    changed += trainer.predictions[path] != found
                    right += int(found == label)
                    n += 1
        assert results["observed"] == {
            "changed_by_selection": pytest.approx(100 * int(changed) / n),
            "accuracy_without_selection": pytest.approx(100 * right / n),
        }
        assert results["observed"]["changed_by_selection"] > 0
    assert run("CoOp", out="coop")["observed"] == {}
    assert run("LoGoPrompt", "TRAINER.LOGOPROMPT.VISUAL_PROMPT", "paired", out="paired")["observed"] == {}


@pytest.mark.parametrize("trainer", ["CoOp", "LoGoPrompt"])
def test_a_run_ends_with_one_line_that_says_what_came_of_it_and_where_it_is(run, trainer):
    results = run(trainer)
    last = (run.folder / "run" / "log.txt").read_text().splitlines()[-1]
    assert f"{trainer} on Caltech101, base classes, 4 shots, seed 1" in last
    assert f"accuracy {results['metrics']['accuracy']:.2f} % (16 images)" in last
    assert last.endswith(str(run.folder / "run" / "results.json"))
    run(trainer, "TEST.NO_TEST", True, out="untested")
    assert "not tested" in (run.folder / "untested" / "log.txt").read_text().splitlines()[-1]


def test_collapse_is_said_once(capsys):
    watch = CollapseWatch(num_classes=50)
    for epoch, accuracy in enumerate([45.0, 48.0, 40.0, 3.0, 2.0], 1):
        watch.update(accuracy, 20)
        watch.update(accuracy, 12)
        watch.epoch_ends(epoch)
        assert watch.collapsed == (epoch >= 4)
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "epoch 4" in said and "48.0" in said and "3.0" in said


def test_learning_is_no_collapse_and_chance_is_no_collapse(capsys):
    for accuracies in ([10, 30, 60, 90], [2.0, 1.0, 2.5, 0.5], [90, 60, 55]):
        watch = CollapseWatch(num_classes=50)
        for epoch, accuracy in enumerate(accuracies):
            watch.update(accuracy, 32)
            watch.epoch_ends(epoch)
        assert not watch.collapsed
    assert capsys.readouterr().out == ""
