"""CoOp: learning to prompt for vision-language models (Zhou et al., IJCV 2022, arXiv 2109.01134)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode as CN

from .prompting.backbone import Backbone
from .prompting.checks import CONTEXT, one_of
from .prompting.features import ImageBatch
from .prompting.text import POSITIONS, PromptLearner, TextEncoder
from .prompting.trainer import PromptTrainer
from .prompting.trainer import extend_cfg as extend_shared_cfg


def extend_cfg(cfg: CN) -> None:
    """Add CoOp's keys, with its names and defaults."""
    extend_shared_cfg(cfg)
    cfg.TRAINER.COOP = CN()
    cfg.TRAINER.COOP.N_CTX = 16  # number of context vectors
    cfg.TRAINER.COOP.CSC = False  # class-specific context
    cfg.TRAINER.COOP.CTX_INIT = ""  # initialisation words
    cfg.TRAINER.COOP.PREC = "fp16"  # fp16, fp32, amp, bf16
    cfg.TRAINER.COOP.CLASS_TOKEN_POSITION = "end"  # end, middle or front


class CustomCLIP(nn.Module):
    """CLIP whose text prompts have learnable contexts."""

    def __init__(self, cfg: CN, classnames: list[str], clip_model: Backbone) -> None:
        super().__init__()
        method = cfg.TRAINER.COOP
        self.prompt_learner = PromptLearner(
            clip_model, classnames, method.N_CTX, method.CTX_INIT, method.CSC, method.CLASS_TOKEN_POSITION
        )
        self.backbone = clip_model
        self.text_encoder = TextEncoder(clip_model, cfg.TRAIN.TEXT_CHUNK)

    def text_features(self) -> torch.Tensor:
        """(C, E) text features of unit length."""
        return self.text_encoder(*self.prompt_learner.parts())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, H) images -> (B, C) cosines with the text features, divided by the temperature."""
        with torch.no_grad():  # nothing behind the image encoder is learned
            image_features = self.backbone.encode_image(image)
        return self.backbone.logits(image_features, self.text_features())


@TRAINER_REGISTRY.register()
class CoOp(PromptTrainer):
    """Context optimisation by cross-entropy."""

    network = CustomCLIP
    rules = {**CONTEXT, "CLASS_TOKEN_POSITION": one_of(POSITIONS)}

    def loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        image, label = batch["img"].to(self.device, non_blocking=True), batch["label"].to(self.device)
        logits = self.model(image)
        return F.cross_entropy(logits, label), logits, label

    def score(self, images: ImageBatch) -> torch.Tensor:
        return self.backbone.logits(images.features(), self.prompt_text)
