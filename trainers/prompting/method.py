"""The contract between a method and the trainer: a method is a model, a loss and a score, and nothing else.

A method file in ``trainers/`` subclasses :class:`Method` and registers a trainer that names it:

    @TRAINER_REGISTRY.register()
    class CoOp(PromptTrainer):
        method_class = CoOpMethod

Images, labels and text features are handed to it; it neither reads files nor knows loaders, checkpoints or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from yacs.config import CfgNode

from . import distributed
from .backbone import Backbone
from .config import Key, add_keys, rules_of, violations
from .image_batch import ImageBatch


@dataclass
class Step:
    """A training step."""

    losses: dict[str, torch.Tensor]  # scalars by name; their sum is minimised
    logits: torch.Tensor  # (B, C) of the original images, for the training accuracy
    log: dict[str, torch.Tensor] = field(default_factory=dict)  # further scalars for TensorBoard, by name
    # Number of terms that a loss is the mean of, by its name, () each; all other losses are means over the images.
    counts: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def total(self) -> torch.Tensor:
        return sum(self.losses.values())

    def part(self, share: distributed.Share) -> Step:
        """What this process's share of a batch adds to the step of the whole batch, which is the sum over processes."""
        if distributed.processes() == 1:
            return self
        counts = {name: count * bool(share.weight) for name, count in self.counts.items()}
        totals = distributed.summed(counts)
        weights = {name: count / totals[name].clamp(min=1) for name, count in counts.items()}
        losses = {name: loss * weights.get(name, share.weight) for name, loss in self.losses.items()}
        return replace(self, losses=losses, log={name: value * share.weight for name, value in self.log.items()})


@dataclass
class Comparison:
    """Scores of a batch, and what they are based on."""

    scores: torch.Tensor  # (B, C), whose argmax is the prediction
    log_p: torch.Tensor  # (B, C) log-probabilities behind the scores; -inf for classes that were not considered
    original: torch.Tensor  # (B, C) log p(c|x) of the original images alone
    candidates: Optional[torch.Tensor] = None  # (B, K) classes compared; None: the original images decide alone
    conditional: Optional[torch.Tensor] = None  # (B, K) log p(c|x_c) of the candidates
    places: Optional[torch.Tensor] = None  # (B, 2) top and left of the blocks
    among_candidates: bool = False  # whether ``conditional`` is a softmax over the candidates, not over all classes


class TrainingData(Protocol):
    """What :meth:`Method.fit` and the stages of a method get to see of a data set."""

    def train_features(self, passes: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, E) features of the training images, float32, not of unit length; (N,) labels.

        Without augmentation, or the mean over a number of augmented passes.
        """

    def val_features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the validation images; needs :meth:`Method.validation`."""


@dataclass
class Stage:
    """A part of training with a learning-rate schedule of its own."""

    epochs: int  # 0 skips the stage
    lr: float  # initial learning rate
    begin: Callable[[TrainingData], None] = lambda data: None  # called before the first epoch
    end: Callable[[TrainingData], None] = lambda data: None  # called after the last epoch


class Method(nn.Module):
    """A model with its loss and its score, for C classes and a frozen CLIP."""

    config_name = ""  # its node below ``cfg.TRAINER``; empty without keys of its own
    keys: Mapping[str, Key] = {}  # its config keys
    learns = True  # False for methods without anything to train
    frozen_image_encoder = True  # False for methods that change the encoder or its input: pixels are always read
    scaled_precisions: tuple[str, ...] = ("amp",)  # values of ``PREC`` that need loss scaling
    # Config keys that decide which epoch belongs to which stage; a run resumes only with equal values.
    stage_keys: tuple[str, ...] = ()

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__()
        self.cfg, self.classnames, self.backbone = cfg, list(classnames), backbone
        self.learned: Optional[nn.Module] = None  # everything that is trained and saved

    @classmethod
    def extend_cfg(cls, cfg: CfgNode) -> None:
        """Add the method's keys, and those that all methods share, to a config."""
        add_keys(cfg, cls.keys, cls.config_name)

    @classmethod
    def config_errors(cls, cfg: CfgNode) -> list[str]:
        """A line for every value of the method's keys that is not allowed."""
        return list(violations(rules_of(cls.keys), cfg, f"TRAINER.{cls.config_name}."))

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        """The method's ``PREC``; without one CoOp's default: CLIP's own precision, float32 on a CPU."""
        return cfg.TRAINER[cls.config_name].PREC if "PREC" in cls.keys else "clip"

    @classmethod
    def views(cls, cfg: CfgNode) -> int:
        """Number of cached views of every training image; 0: images are augmented at every step."""
        return 0

    @classmethod
    def validation(cls, cfg: CfgNode) -> Optional[tuple[str, str]]:
        """The setting that needs validation images and the remedy where there are none; None: nothing needs them."""
        return None

    @classmethod
    def drawn_images(cls, cfg: CfgNode, classnames: Sequence[str]) -> torch.Tensor:
        """(C, 3, H, W), RGB in [0, 1]: one more training image per class, which no file holds; by default none."""
        return torch.empty(0)

    @property
    def options(self) -> CfgNode:
        """The method's own config node, for example ``cfg.TRAINER.COOP``."""
        return self.cfg.TRAINER[self.config_name]

    def loss(self, images: ImageBatch, label: torch.Tensor) -> Step:
        """Losses and logits of B images with labels (B,); by default the cross-entropy of the scores."""
        logits = self.score(images, self.text_features())
        return Step({"loss": F.cross_entropy(logits, label)}, logits)

    def backward(self, step: Step, scale: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Set the gradients of what is learned; ``scale`` multiplies a scalar by the scale of mixed precision."""
        parameters, gradients = list(self.learned.parameters()), []
        for objective in (objectives := self.objectives(step)):
            scale(objective).backward(retain_graph=objective is not objectives[-1])
            gradients.append([p.grad for p in parameters])
            self.learned.zero_grad(set_to_none=True)
        distributed.sum_over_processes(g for each in gradients for g in each if g is not None)
        for parameter, gradient in zip(parameters, self.combine(gradients)):
            parameter.grad = gradient

    def objectives(self, step: Step) -> list[torch.Tensor]:
        """The scalars whose gradients :meth:`combine` needs; by default the loss."""
        return [step.total]

    def combine(self, gradients: list[list[Optional[torch.Tensor]]]) -> list[Optional[torch.Tensor]]:
        """The gradient of every learned parameter from those of every objective; None where there is none."""
        return gradients[0]

    def before_epoch(self, epoch: int) -> None:
        """Called before every epoch, counted from 0, of a resumed run too."""

    def after_step(self) -> None:
        """Called after every step of the optimizer."""

    def stages(self) -> list[Stage]:
        """The stages of training; their epochs add up to ``OPTIM.MAX_EPOCH``."""
        return [Stage(self.cfg.OPTIM.MAX_EPOCH, self.cfg.OPTIM.LR)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters with optimizer options of their own, as torch's groups (``params``, ``lr``, ``weight_decay``, …).

        The schedule of ``OPTIM`` scales an ``lr`` too; ``warmup_epoch`` replaces its ``WARMUP_EPOCH``. All other
        parameters learn with the options of ``OPTIM``.
        """
        return []

    def fit(self, data: TrainingData) -> float:
        """Learn without gradients, in place of all epochs; returns the accuracy on training images in percent."""
        raise NotImplementedError

    def text_features(self) -> Optional[torch.Tensor]:
        """(C, E) text features of unit length, computed once per evaluation; None if they depend on the image."""
        return None

    def score(self, images: ImageBatch, text_features: Optional[torch.Tensor]) -> torch.Tensor:
        """(B, C) scores, whose argmax is the prediction; by default scaled cosine similarities (Eq. 1)."""
        return self.backbone.logits(images.features(), text_features)

    def compare(self, images: ImageBatch, text_features: Optional[torch.Tensor]) -> Comparison:
        """Scores with what they are based on, for metrics and explanations."""
        scores = self.score(images, text_features)
        log_p = torch.log_softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return Comparison(scores, log_p, log_p)
