"""VP: Exploring Visual Prompts for Adapting Large-Scale Models (Bahng et al., 2022, arXiv 2203.17274).

Learned pixels are added to every normalised image: a frame around it, or a patch. Both encoders are frozen; gradients
reach the pixels through the image encoder. Text prompts are hand-made, or learned together with the pixels ("VP+TP" in
Table 2 of LoGoPrompt).

The authors' code draws one place of a random patch for a whole batch, at test time too; here every image has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.classifiers import HandMadePrompts
from .prompting.config import CONTEXT, Key, at_least, one_of
from .prompting.errors import UserError
from .prompting.image_batch import ImageBatch
from .prompting.paste import paste, places_of
from .prompting.prompts import PromptLearner
from .prompting.text_encoder import TextEncoder
from .prompting.trainer import PromptTrainer

KEYS = {
    **CONTEXT,  # N_CTX, CTX_INIT of a learned TEXT_PROMPT; PREC
    "VISUAL_PROMPT": Key("padding", one_of(("padding", "fixed_patch", "random_patch"))),
    "PROMPT_SIZE": Key(0, at_least(0)),  # pixels, width of the frame or side of the patch; 0: 30/224 of the image
    "PLACE_SEED": Key(0, at_least(0)),  # of the places of a random patch at test time; independent of SEED
    "TEXT_PROMPT": Key("hand_made", one_of(("hand_made", "learned"))),  # learned: CoOp's shared context
    "TEXT_LR": Key(0.002, at_least(0)),  # its learning rate, CoOp's; OPTIM.LR is that of the pixels
}


class Frame(nn.Module):
    """Pixels at the edges: ``pad_up``, ``pad_down`` (1, 3, p, H), ``pad_left``, ``pad_right`` (1, 3, H - 2p, p)."""

    def __init__(self, width: int, image_size: int) -> None:
        super().__init__()
        self.inside = image_size - 2 * width
        self.pad_up = nn.Parameter(torch.randn(1, 3, width, image_size))
        self.pad_down = nn.Parameter(torch.randn(1, 3, width, image_size))
        self.pad_left = nn.Parameter(torch.randn(1, 3, self.inside, width))
        self.pad_right = nn.Parameter(torch.randn(1, 3, self.inside, width))

    def forward(self, images: ImageBatch, seed: int) -> torch.Tensor:
        """(B, 3, H, H) images with the frame added; it does not depend on the seed."""
        inside = self.pad_left.new_zeros(1, 3, self.inside, self.inside)
        middle = torch.cat([self.pad_left, inside, self.pad_right], dim=3)
        return images.pixels + torch.cat([self.pad_up, middle, self.pad_down], dim=2)


class Patch(nn.Module):
    """A square of pixels, ``patch`` (1, 3, p, p), in the top left corner or at a random place of every image."""

    def __init__(self, side: int, image_size: int, random: bool) -> None:
        super().__init__()
        self.image_size, self.random = image_size, random
        self.patch = nn.Parameter(torch.randn(1, 3, side, side))

    def forward(self, images: ImageBatch, seed: int) -> torch.Tensor:
        """(B, 3, H, H) images with the patch added, at test time at a place that depends on (seed, path) only."""
        places = torch.zeros(len(images), 2, dtype=torch.long)
        if self.random:
            places = places_of(images.uniform(seed), self.image_size, self.patch.shape[-2:], "random")
        patches = self.patch.expand(len(images), -1, -1, -1)
        return images.pixels + paste(torch.zeros_like(images.pixels), patches, places)


class CustomCLIP(HandMadePrompts):
    """CLIP whose images get learned pixels, trained by cross-entropy."""

    config_name, keys = "VP", KEYS
    frozen_image_encoder = False  # its input is learned
    scaled_precisions = ("amp", "fp16")  # gradients of pixels are small

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        options, image_size = self.options, backbone.input_resolution
        frame = options.VISUAL_PROMPT == "padding"
        size = options.PROMPT_SIZE or max(1, round(image_size * 30 / 224))
        if size > (most := (image_size - 1) // 2 if frame else image_size):
            raise UserError(f"TRAINER.VP.PROMPT_SIZE {size}: must be at most {most} for images of {image_size} pixels")
        self.learned = Frame(size, image_size) if frame else Patch(size, image_size, "random" in options.VISUAL_PROMPT)
        if options.TEXT_PROMPT == "learned":
            self.learned.text = PromptLearner(backbone, classnames, options.N_CTX, options.CTX_INIT)
            context = self.learned.text.ctx  # its gradients are scaled, which half precision does not allow
            context.data = context.data.to(torch.promote_types(backbone.dtype, torch.float32))
            self.text_encoder = TextEncoder(backbone, cfg.TRAIN.TEXT_CHUNK)

    def templates(self) -> list[str]:
        return ["This is a photo of a {}"]

    def text_features(self) -> torch.Tensor:
        if self.options.TEXT_PROMPT == "hand_made":
            return super().text_features()
        return self.text_encoder(*self.learned.text.encoder_inputs())

    def score(self, images: ImageBatch, text_features: torch.Tensor) -> torch.Tensor:
        features = self.backbone.encode_image(self.learned(images, self.options.PLACE_SEED))
        return self.backbone.logits(F.normalize(features, dim=-1), text_features)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The context learns as in CoOp, while ``OPTIM`` is for the pixels."""
        if self.options.TEXT_PROMPT == "hand_made":
            return []
        return [{"params": [self.learned.text.ctx], "lr": self.options.TEXT_LR, "weight_decay": 5e-4}]


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class VP(PromptTrainer):
    """Visual prompts of pixels."""

    method_class = CustomCLIP
