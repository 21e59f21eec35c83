"""LoGoPrompt models on small weights, the method written as loops, and runs of ``train.py``."""

import math
import sys

import pytest
import torch
from tiny import NAMES, arguments
from yacs.config import CfgNode as CN

import train
from trainers import extend_cfg, logoprompt
from trainers.prompting.backbone import load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.trainer import PromptTrainer

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def build(clip_file, classnames=NAMES, transforms=("normalize",), dtype=torch.float64, **options):
    """LoGoPrompt's model with class-specific contexts and probabilities far from 0 and 1."""
    inputs = CN({"TRANSFORMS": transforms, "PIXEL_MEAN": MEAN, "PIXEL_STD": STD})
    cfg = CN({"TRAINER": CN(), "TRAIN": CN(), "TEST": CN(), "INPUT": inputs})
    logoprompt.extend_cfg(cfg)
    cfg.TRAINER.LOGOPROMPT.merge_from_list([x for pair in {"N_CTX": 4, **options}.items() for x in pair])
    torch.manual_seed(0)
    model = logoprompt.CustomCLIP(cfg, classnames, load_clip(clip_file)).to(dtype)
    model.backbone.logit_scale.data.fill_(2.5)
    with torch.no_grad():
        for parameter in model.learned.parameters():
            if parameter.dim() != 4:  # not the pixels of visual prompts
                parameter += torch.randn_like(parameter) * 0.3
        if options.get("TEXT_PROMPT") != "generic":
            model.learned.meta_net.linear1.bias += 1  # its only unit is alive
    return model


def naive_paste(image, block, top, left):
    image = image.clone()
    for y in range(block.shape[1]):
        for x in range(block.shape[2]):
            image[:, top + y, left + x] = block[:, y, x]
    return image


def naive_text_features(model):
    """Rows of numbers, from prompts that share nothing."""
    features = model.text_encoder(*model.learned())
    return (features / features.norm(dim=-1, keepdim=True)).tolist()


def naive_logits(model, image, text_features):
    """C logits of one image: cosines times exp(logit_scale), plus the cache's addition."""
    feature = model.backbone.visual(image.unsqueeze(0))[0]
    feature = (feature / feature.norm()).tolist()
    scale = math.exp(model.backbone.logit_scale.item())
    logits = [scale * sum(a * b for a, b in zip(feature, row)) for row in text_features]
    if model.adapter is not None:
        logits = [a + b for a, b in zip(logits, naive_cache(model.adapter, feature, len(logits)))]
    return logits


def naive_probabilities(model, image, text_features):
    """p(c|x) of one image as C numbers, the softmax of its logits."""
    logits = naive_logits(model, image, text_features)
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def naive_cache(adapter, feature, classes):
    added = [0.0] * classes
    for key, label in zip(adapter.keys.tolist(), adapter.labels.tolist()):
        length = math.sqrt(sum(k * k for k in key))
        cosine = sum(f * k / length for f, k in zip(feature, key))
        if label >= 0:
            added[label] += adapter.alpha.item() * math.exp(-adapter.beta.item() * (1 - cosine))
    return added


def naive_ranking(row):
    """Labels from the most to the least probable; sorted() is stable, so the lower label wins a tie."""
    return sorted(range(len(row)), key=lambda c: -row[c])


def naive_min_max_loss(p, conditional, label, negatives, form):
    """Eq. 3 over probabilities. p: C numbers; conditional[c]: p(c|x_c)."""
    numerator = min(p[label], conditional[label])
    denominator = sum(max(p[c], conditional[c]) for c in negatives)
    return -math.log(numerator / (denominator + (numerator if form == "infonce" else 0)))


def one_line(call):
    """The message of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def method_config(node, dataset="Caltech101", chunk=0, **options):
    """A config with the keys of all methods, and some of one method's."""
    nodes = {"TRAIN": CN(), "TEST": CN(), "MODEL": {"BACKBONE": {}}, "OPTIM": {"MAX_EPOCH": 3, "LR": 0.1}}
    cfg = CN({**nodes, "TRAINER": {"NAME": node}, "DATASET": {"NAME": dataset}})
    extend_cfg(cfg)
    cfg.TRAIN.TEXT_CHUNK = chunk
    cfg.TRAINER[node].merge_from_list([x for pair in options.items() for x in pair])
    return cfg


class Runs:
    """Runs of ``train.py`` on the miniature Caltech101, in folders below ``folder``."""

    def __init__(self, data_root, backbone, folder, trainer="LoGoPrompt"):
        self.data_root, self.backbone, self.folder, self.trainer = data_root, backbone, folder, trainer

    def __call__(self, *opts, trainer="", flags=(), out="run", status=0, seed=1):
        """Run with KEY VALUE pairs; returns the trainer."""
        built, build = [], train.build_trainer
        argv = arguments(
            trainer or self.trainer, self.data_root, self.backbone, self.folder / out, *opts, flags=flags, seed=seed
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", sys.stdout)  # setup_logger replaces it
            patch.setattr(train, "build_trainer", lambda cfg: built.append(build(cfg)) or built[0])
            assert train.main(argv) == status
            sys.stdout.flush()  # of the log
        return built[0] if built else None

    def evaluation(self, out="run"):
        """Flags that evaluate a run's model."""
        return ["--eval-only", "--model-dir", self.folder / out]

    def states(self, out="run"):
        """The state dicts of a run's checkpoints by epoch."""
        return {
            int(path.name.rsplit("-", 1)[1]): torch.load(path, weights_only=True)["state_dict"]
            for path in (self.folder / out / "prompt_learner").glob("model.pth.tar-*")
        }

    def check_resume(self, done, *opts):
        """A run that is stopped after ``done`` epochs and started again ends as one that was not."""
        opts = (*opts, "TRAIN.CHECKPOINT_FREQ", 1)
        after_epoch = PromptTrainer.after_epoch

        def stop(trainer):
            after_epoch(trainer)
            if trainer.epoch + 1 == done:
                raise KeyboardInterrupt

        self(*opts, out="whole")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PromptTrainer, "after_epoch", stop)
            self(*opts, out="broken")
        self(*opts, out="broken")
        whole, broken = self.states("whole"), self.states("broken")
        last = max(whole)
        assert all(torch.equal(whole[last][key], broken[last][key]) for key in whole[last])
