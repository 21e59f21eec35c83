"""VPT: Visual Prompt Tuning (Jia et al., ECCV 2022, arXiv 2203.12119), on CLIP with hand-made text prompts.

n learned tokens join the input of the vision transformer's blocks, behind the patches and without a position. On CLIP
it is the baseline of DPT (Xing et al., TMM 2023), whose code the settings are taken from; there only ``deep`` exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.classifiers import HandMadePrompts
from .prompting.config import PREC, Key, at_least, one_of, violations
from .prompting.image_batch import ImageBatch
from .prompting.image_encoder import NOT_COMPILED, VisualTokens, encode_with_tokens, vision_blocks
from .prompting.trainer import PromptTrainer

KEYS = {
    "PREC": PREC,
    "DEPTH": Key("deep", one_of(("deep", "shallow"))),  # new tokens in every block, or in the first one alone
    "N_CTX": Key(10, at_least(1)),  # n, number of visual tokens in a block
}


class CustomCLIP(HandMadePrompts):
    """CLIP whose frozen vision transformer reads learned tokens too, trained by cross-entropy.

    Deep (Eq. 6): block i reads [CLS], patches and P_i, and what becomes of P_i is dropped. Shallow (Eq. 4, 5): the
    first block reads P_0, and all others read what became of it. The order of tokens behind [CLS] makes no difference.
    """

    config_name, keys = "VPT", KEYS
    frozen_image_encoder = False
    scaled_precisions = ("amp", "fp16")  # gradients come through the whole encoder

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        layers = len(vision_blocks(backbone, cfg.TRAINER.NAME))
        self.deep = self.options.DEPTH == "deep"
        self.learned = VisualTokens(backbone, layers if self.deep else 1, self.options.N_CTX)

    @classmethod
    def config_errors(cls, cfg: CfgNode) -> list[str]:
        return [*super().config_errors(cfg), *violations(NOT_COMPILED, cfg)]

    def score(self, images: ImageBatch, text_features: torch.Tensor) -> torch.Tensor:
        """(B, C) logits of the prompted image features."""
        ctx = self.learned.ctx
        tokens = (lambda i, x: ctx[i]) if self.deep else (lambda i, x: ctx[0] if i == 0 else None)
        features = encode_with_tokens(self.backbone, images.pixels, tokens, keep=not self.deep)
        return self.backbone.logits(F.normalize(features, dim=-1), text_features)


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class VPT(PromptTrainer):
    """Visual prompt tuning."""

    method_class = CustomCLIP
