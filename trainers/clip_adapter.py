"""CLIP-Adapter: Better Vision-Language Models with Feature Adapters (Gao et al., IJCV 2024, arXiv 2110.04544).

A small MLP adapts the image feature, a residual connection mixes it with the original; text prompts are hand-made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.classifiers import HandMadePrompts
from .prompting.config import PREC, Key, at_least, within
from .prompting.image_batch import ImageBatch
from .prompting.trainer import PromptTrainer

KEYS = {
    "PREC": PREC,
    "RATIO": Key(0.2, within(0, 1)),  # alpha, the weight of the adapted feature
    "REDUCTION": Key(4, at_least(1)),  # E / bottleneck
}


class CustomCLIP(HandMadePrompts):
    """Zero-shot CLIP with an adapter, (B, E) -> (B, E), behind the image encoder, trained by cross-entropy."""

    config_name, keys = "CLIPADAPTER", KEYS

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        size = backbone.n_features
        bottleneck = max(1, size // self.options.REDUCTION)
        down, up = nn.Linear(size, bottleneck, bias=False), nn.Linear(bottleneck, size, bias=False)
        self.learned = nn.ModuleDict({"fc": nn.Sequential(down, nn.ReLU(), up, nn.ReLU())})

    def score(self, images: ImageBatch, text_features: torch.Tensor) -> torch.Tensor:
        """The adapter sees the feature before it is scaled to unit length."""
        adapter, ratio = self.learned["fc"], self.options.RATIO
        features = images.raw_features().to(adapter[0].weight.dtype)
        adapted = ratio * adapter(features) + (1 - ratio) * features
        return self.backbone.logits(F.normalize(adapted, dim=-1), text_features)


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class CLIPAdapter(PromptTrainer):
    """An adapter on image features."""

    method_class = CustomCLIP
