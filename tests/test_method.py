"""The contract between a method and the trainer: a method made up here needs no other change."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import differences, interrupt, start
from dassl.engine import TRAINER_REGISTRY
from tiny import NAMES, arguments
from yacs.config import CfgNode

import train
from trainers.prompting.config import Key, at_least
from trainers.prompting.errors import UserError
from trainers.prompting.evaluation import check_scores
from trainers.prompting.method import Method, Stage, Step
from trainers.prompting.text_encoder import encode_texts
from trainers.prompting.trainer import PromptTrainer


class ShiftedMethod(Method):
    """Zero-shot CLIP with a learned shift of every class's score, in two stages, and a loss of two parts."""

    config_name, keys = "SHIFTED", {"DECAY": Key(0.1, at_least(0))}
    stage_keys = ("TRAINER.SHIFTED.DECAY",)

    def __init__(self, cfg, classnames, backbone):
        super().__init__(cfg, classnames, backbone)
        self.learned = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(len(classnames)))})
        self.learned.per_class = ("shift",)
        self.events, self.epochs = [], []

    def text_features(self):
        return encode_texts(self.backbone, self.classnames)

    def score(self, images, text_features):
        return self.backbone.logits(images.features(), text_features) + self.learned["shift"]

    def loss(self, images, label):
        logits = self.score(images, self.text_features())
        decay = self.options.DECAY * self.learned["shift"].square().sum()
        return Step({"entropy": F.cross_entropy(logits, label), "decay": decay}, logits, {"size": decay})

    def stages(self):
        def note(name):
            return lambda data: self.events.append((name, tuple(data.train_features()[0].shape)))

        return [Stage(1, 0.1, note("begin 1")), Stage(3, 0.2, note("begin 2"), note("end 2"))]

    def before_epoch(self, epoch):
        self.epochs.append(epoch)

    def after_step(self):
        self.events.append("step")


@pytest.fixture
def run(data_root, rn_file, tmp_path, monkeypatch):
    """A run of the made-up method, over four epochs of two batches."""
    monkeypatch.setattr(TRAINER_REGISTRY, "_obj_map", dict(TRAINER_REGISTRY._obj_map))
    TRAINER_REGISTRY.register()(type("Shifted", (PromptTrainer,), {"method_class": ShiftedMethod}))
    extend_cfg = train.extend_cfg
    monkeypatch.setattr(train, "extend_cfg", lambda cfg: (extend_cfg(cfg), ShiftedMethod.extend_cfg(cfg)))
    schedule = ("OPTIM.MAX_EPOCH", 4, "TRAIN.CHECKPOINT_FREQ", 1, "OPTIM.WARMUP_EPOCH", 0)

    def call(*opts, out="run", flags=(), status=0, prepare=lambda trainer: None):
        argv = arguments("CoOp", data_root, rn_file, tmp_path / out, *schedule, *opts, flags=flags)
        argv[argv.index("--trainer") + 1] = "Shifted"
        found = start(argv, prepare)
        assert found.status == status, found.error
        return found

    return call


def test_made_up_method_trains_and_evaluates(run):
    done = run()
    model, checkpoint = done.trainer.model, done.checkpoint(4)
    features = (16, 24)  # 4 shots of 4 classes
    steps = ["step"] * 2
    assert model.events == [("begin 1", features), *steps, ("begin 2", features), *steps * 3, ("end 2", features)]
    assert model.epochs == [0, 1, 2, 3]
    assert torch.equal(checkpoint["state_dict"]["shift"], model.learned["shift"].detach())
    assert model.learned["shift"].abs().min() > 0 and CfgNode.load_cfg(checkpoint["config"]).TRAINER.SHIFTED.DECAY
    assert done.results["metrics"]["accuracy"] >= 0 and done.results["observed"] == {}
    with torch.no_grad():
        for batch in done.trainer.test_loader:
            scores = done.trainer.model_inference(batch["img"])  # Dassl's hook
            features = F.normalize(model.backbone.encode_image(batch["img"]), dim=-1)
            alone = model.backbone.logits(features, model.text_features())
            torch.testing.assert_close(scores, alone + model.learned["shift"], atol=1e-4, rtol=1e-5)


def test_made_up_method_resumes_and_meets_other_classes(run):
    unbroken = run(out="unbroken")
    with pytest.raises(KeyboardInterrupt):
        run(prepare=interrupt(2))
    resumed = run()
    assert differences(unbroken.outcome, resumed.outcome) == [] and resumed.trainer.start_epoch == 2
    assert resumed.trainer.model.epochs == [2, 3]
    shift = resumed.checkpoint(4)["state_dict"]["shift"]
    evaluated = run("DATASET.SUBSAMPLE_CLASSES", "all", flags=["--eval-only", "--model-dir", resumed.folder], out="all")
    assert torch.equal(evaluated.trainer.model.learned["shift"], torch.cat([shift, torch.zeros(4)]))
    assert len(evaluated.trainer.evaluation.predictions) == 4 * len(NAMES)


def test_keys_and_stages_of_a_made_up_method_are_checked(run):
    assert "error: TRAINER.SHIFTED.DECAY -1: must be at least 0" in run("TRAINER.SHIFTED.DECAY", -1, status=2).error
    first = run(out="first")
    error = run("TRAINER.SHIFTED.DECAY", 0.5, flags=["--resume", first.folder], status=2, out="second").error
    assert "was trained with TRAINER.SHIFTED.DECAY 0.1, now it is 0.5" in error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_are_refused_by_the_name_of_the_image(run, value):
    def spoil(trainer):
        trainer.model.learned["shift"].data[1] = value
        trainer.load_model = lambda *args, **kwargs: None

    done = run(flags=["--eval-only"], prepare=spoil, status=2)
    (line,) = done.error.splitlines()
    assert line.startswith("error: caltech-101/") and "scores are not numbers" in line
    assert not (done.folder / "results.json").exists()
    lowest = torch.full((2, 3), float("-inf"))
    lowest[0, 1] = 1.0
    with pytest.raises(UserError, match="^b: "):  # a class may be out of the question, but not all of them
        check_scores(lowest, ["a", "b"])
