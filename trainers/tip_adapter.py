"""Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification (Zhang et al., ECCV 2022, arXiv 2207.09519).

A cache of the training images adds to zero-shot CLIP's logits (3.1): f(x) W / tau + alpha exp(-beta (1 - f(x) F)) L
with keys F, the images' features, and values L, their one-hot labels. Tip-Adapter-F learns the keys (3.2).

The authors' code takes the epoch of Tip-Adapter-F that is best on the *test* images; here it is the last one. It
searches alpha and beta on all validation images; here on CoOp's sample of them, at most four per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.cache_adapter import CacheAdapter
from .prompting.classifiers import HandMadePrompts
from .prompting.config import PREC, Key, above, at_least
from .prompting.image_batch import ImageBatch
from .prompting.method import Stage, TrainingData
from .prompting.templates import SELECTED_TEMPLATES
from .prompting.trainer import PromptTrainer

KEYS = {
    "PREC": PREC,
    "AUGMENT_EPOCH": Key(10, at_least(0)),  # augmented passes whose mean feature is a key; 0: one without augmentation
    "INIT_ALPHA": Key(1.17, at_least(0)),  # weight of the cache while keys are learned, and without SEARCH
    "INIT_BETA": Key(1.0, at_least(0)),  # its sharpness, likewise
    "SEARCH": Key(True),  # choose both on validation images in the end
    "ALPHA_SCALE": Key(3.0, above(0.1)),  # end of the search; the authors' for ImageNet, elsewhere up to 50
    "ALPHA_STEPS": Key(20, at_least(1)),
    "BETA_SCALE": Key(7.0, above(0.1)),
    "BETA_STEPS": Key(200, at_least(1)),
}


def search_grid(options: CfgNode) -> list[tuple[float, float]]:
    """Pairs of alpha and beta in the authors' order, beta in the outer loop; both end one step before their scale."""
    axes = (options.BETA_SCALE, options.BETA_STEPS), (options.ALPHA_SCALE, options.ALPHA_STEPS)
    betas, alphas = ([i * (end - 0.1) / n + 0.1 for i in range(n)] for end, n in axes)
    return [(alpha, beta) for beta in betas for alpha in alphas]


class CachedCLIP(HandMadePrompts):
    """Zero-shot CLIP and a cache; classes without training images keep their zero-shot logits."""

    keys = KEYS

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        self.learned = CacheAdapter(backbone.n_features, len(classnames), alpha=0, beta=0, unit_length=False)

    def templates(self) -> list[str]:
        """The data set's template; on ImageNet and its variants CLIP's seven, as the authors."""
        return list(SELECTED_TEMPLATES) if self.cfg.DATASET.NAME.startswith("ImageNet") else super().templates()

    def score(self, images: ImageBatch, text_features: torch.Tensor) -> torch.Tensor:
        features = images.features()
        with torch.autocast(features.device.type, enabled=False):  # exponentials magnify what half precision loses
            return self.backbone.logits(features, text_features) + self.learned(features)

    def fill(self, data: TrainingData) -> None:
        """Fill the cache; alpha and beta start as in the config, also where loaded weights brought others."""
        self.learned.fill(*data.train_features(self.options.AUGMENT_EPOCH))
        self.learned.alpha.fill_(self.options.INIT_ALPHA)
        self.learned.beta.fill_(self.options.INIT_BETA)

    @torch.no_grad()
    def search(self, data: TrainingData) -> None:
        """Choose alpha and beta on validation images, never on test images; of equals the first."""
        if self.options.SEARCH:
            features, label = data.val_features()
            features = F.normalize(features, dim=-1)
            logits = self.backbone.logits(features, self.text_features())
            self.learned.search(features, logits, label, search_grid(self.options))

    @classmethod
    def validation(cls, cfg: CfgNode) -> Optional[tuple[str, str]]:
        setting = f"TRAINER.{cls.config_name}.SEARCH True", "set SEARCH False, INIT_ALPHA and INIT_BETA"
        return setting if cfg.TRAINER[cls.config_name].SEARCH else None


class TrainingFree(CachedCLIP):
    """Keys are the features themselves (3.1)."""

    config_name = "TIPADAPTER"

    @torch.no_grad()
    def fit(self, data: TrainingData) -> float:
        """Fill the cache and search, in one epoch that ignores ``OPTIM``."""
        self.fill(data)
        self.search(data)
        scores = self.backbone.logits(self.learned.keys, self.text_features()) + self.learned(self.learned.keys)
        return 100 * (scores.argmax(dim=1) == self.learned.labels).float().mean().item()


class FineTuned(CachedCLIP):
    """Keys start as the features and are learned by cross-entropy, not scaled to unit length again (3.2)."""

    config_name = "TIPADAPTERF"

    def stages(self) -> list[Stage]:
        return [Stage(self.cfg.OPTIM.MAX_EPOCH, self.cfg.OPTIM.LR, begin=self.fill, end=self.search)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.learned.keys], "eps": 1e-4}]  # AdamW's, as the authors; Dassl has no key for it


def extend_cfg(cfg: CfgNode) -> None:
    for method in (TrainingFree, FineTuned):
        method.extend_cfg(cfg)


@TRAINER_REGISTRY.register()
class TipAdapter(PromptTrainer):
    """A cache of training features."""

    method_class = TrainingFree


@TRAINER_REGISTRY.register()
class TipAdapterF(PromptTrainer):
    """A cache whose keys are learned."""

    method_class = FineTuned
