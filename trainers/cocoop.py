"""CoCoOp: Conditional Prompt Learning for Vision-Language Models (Zhou et al., CVPR 2022, arXiv 2203.05557).

A Meta-Net shifts CoOp's context by a function of the image, so every image has its own prompts: B images and C classes
make B * C prompts. The tokens that an image's prompts share are encoded once (``prompting/text_encoder.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from dassl.engine import TRAINER_REGISTRY
from torch.utils.checkpoint import checkpoint
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.config import CONTEXT, Key, at_least
from .prompting.image_batch import ImageBatch
from .prompting.method import Method
from .prompting.prompts import PromptLearner, meta_net
from .prompting.text_encoder import TextEncoder
from .prompting.trainer import PromptTrainer

KEYS = {
    **CONTEXT,
    "CHUNK": Key(8, at_least(1)),  # images whose prompts are encoded at a time: bounds memory, changes no result
}


class ConditionalPromptLearner(PromptLearner):
    """A context shared by all classes and a Meta-Net h that shifts it: u_m(x) = u_m + h(f(x)).

    ``ctx`` (M, D) and ``meta_net`` are its parameters and its state dict, under CoCoOp's names.
    """

    def __init__(self, backbone: Backbone, classnames: Sequence[str], n_ctx: int = 16, ctx_init: str = "") -> None:
        super().__init__(backbone, classnames, n_ctx, ctx_init)
        self.meta_net = meta_net(backbone.n_features, backbone.text_width).to(self.ctx.dtype)

    def forward(self, image_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, E) image features of unit length -> arguments of :class:`TextEncoder` for B prompts of every class."""
        names, eot, _ = self.encoder_inputs()
        shift = self.meta_net(image_features.to(self.ctx.dtype))  # (B, D)
        return names, eot, self.prefix(self.ctx + shift.unsqueeze(1))


class CustomCLIP(Method):
    """CLIP whose text prompts depend on the image, trained by cross-entropy."""

    config_name, keys = "COCOOP", KEYS

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        self.learned = ConditionalPromptLearner(backbone, classnames, self.options.N_CTX, self.options.CTX_INIT)
        self.text_encoder = TextEncoder(backbone, cfg.TRAIN.TEXT_CHUNK)

    def score(self, images: ImageBatch, text_features: None) -> torch.Tensor:
        """(B, C) logits. With several chunks, activations are held for one and recomputed in the backward pass."""
        chunks = images.features().split(self.options.CHUNK)
        recompute = len(chunks) > 1 and torch.is_grad_enabled()
        logits = partial(checkpoint, self.logits, use_reentrant=False) if recompute else self.logits
        return torch.cat([logits(chunk) for chunk in chunks])

    def logits(self, image_features: torch.Tensor) -> torch.Tensor:
        """(B, E) image features of unit length -> (B, C); all B * C prompts at once."""
        text_features = self.text_encoder(*self.learned(image_features))  # (B, C, E)
        return self.backbone.logits(image_features.unsqueeze(1), text_features).squeeze(1)


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class CoCoOp(PromptTrainer):
    """Conditional context optimisation."""

    method_class = CustomCLIP
