"""CoCoOp: conditional prompt learning for vision-language models (Zhou et al., CVPR 2022, arXiv 2203.05557).

A Meta-Net looks at the image and shifts CoOp's context, so every image has prompts of its own: B images and C classes
make B * C prompts. What those of an image share is encoded once (``prompting/text.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn as nn
from dassl.engine import TRAINER_REGISTRY
from torch.utils.checkpoint import checkpoint
from yacs.config import CfgNode as CN

from .coop import CoOp
from .prompting.backbone import Backbone
from .prompting.checks import CONTEXT, at_least
from .prompting.features import ImageBatch
from .prompting.text import PromptLearner, TextEncoder, meta_net
from .prompting.trainer import extend_cfg as extend_shared_cfg


def extend_cfg(cfg: CN) -> None:
    """Add CoCoOp's keys, with its names and defaults, and one of ours."""
    extend_shared_cfg(cfg)
    cfg.TRAINER.COCOOP = CN()
    cfg.TRAINER.COCOOP.N_CTX = 16  # number of context vectors
    cfg.TRAINER.COCOOP.CTX_INIT = ""  # initialisation words
    cfg.TRAINER.COCOOP.PREC = "fp16"  # fp16, fp32, amp, bf16
    cfg.TRAINER.COCOOP.CHUNK = 8  # images whose prompts are encoded at a time: bounds memory, changes no result


class ConditionalPromptLearner(PromptLearner):
    """A context that all classes share and a Meta-Net h that shifts it by what the image is: u_m(x) = u_m + h(f(x)).

    ``ctx`` (M, D) and ``meta_net`` are its parameters and its state dict, under CoCoOp's names.
    """

    def __init__(self, backbone: Backbone, classnames: Sequence[str], n_ctx: int = 16, ctx_init: str = "") -> None:
        super().__init__(backbone, classnames, n_ctx, ctx_init)
        width, n_features = backbone.text_projection.shape
        self.meta_net = meta_net(n_features, width).to(self.ctx.dtype)

    def forward(self, image_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, E) image features of unit length -> what :class:`TextEncoder` takes for B prompts of every class."""
        names, eot, _ = self.parts()
        shift = self.meta_net(image_features.to(self.ctx.dtype))  # (B, D)
        return names, eot, self.prefix(self.ctx + shift.unsqueeze(1))


class CustomCLIP(nn.Module):
    """CLIP whose text prompts depend on the image."""

    def __init__(self, cfg: CN, classnames: Sequence[str], clip_model: Backbone) -> None:
        super().__init__()
        method = cfg.TRAINER.COCOOP
        self.chunk = method.CHUNK
        self.prompt_learner = ConditionalPromptLearner(clip_model, classnames, method.N_CTX, method.CTX_INIT)
        self.backbone = clip_model
        self.text_encoder = TextEncoder(clip_model, cfg.TRAIN.TEXT_CHUNK)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, H) images -> (B, C) cosines divided by the temperature."""
        with torch.no_grad():  # nothing behind the image encoder is learned
            image_features = self.backbone.encode_image(image)
        return self.chunked_logits(image_features)

    def chunked_logits(self, image_features: torch.Tensor) -> torch.Tensor:
        """(B, E) image features of unit length -> (B, C).

        With several chunks activations are kept for one of them at a time and computed again in the backward pass.
        """
        chunks = image_features.split(self.chunk)
        recompute = len(chunks) > 1 and torch.is_grad_enabled()
        logits = partial(checkpoint, self.logits, use_reentrant=False) if recompute else self.logits
        return torch.cat([logits(chunk) for chunk in chunks])

    def logits(self, image_features: torch.Tensor) -> torch.Tensor:
        """(B, E) image features -> (B, C); all B * C prompts at once."""
        text_features = self.text_encoder(*self.prompt_learner(image_features))  # (B, C, E)
        return self.backbone.logits(image_features.unsqueeze(1), text_features).squeeze(1)


@TRAINER_REGISTRY.register()
class CoCoOp(CoOp):
    """CoOp's cross-entropy with prompts that depend on the image."""

    network = CustomCLIP
    rules = {**CONTEXT, "CHUNK": at_least(1)}

    def text_features(self) -> None:
        """Nothing for an evaluation to compute once: every image has text features of its own."""

    def score(self, images: ImageBatch) -> torch.Tensor:
        return self.model.chunked_logits(images.features())
