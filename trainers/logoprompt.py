"""LoGoPrompt: synthetic text images can be good visual prompts (Shi & Yang, ICCV 2023, arXiv 2309.01155).

The file follows the paper: text prompts (3.1), class-wise visual prompts and class-conditional images (3.2), the
min-max contrastive loss with hard negatives (3.3, Eq. 3), selection at test time (3.4). Symbols: image x, class y,
C classes, frozen encoders f (image) and g (text), visual prompt V_c, class-conditional image x_c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode as CN

from .prompting.backbone import Backbone
from .prompting.errors import UserError
from .prompting.selection import LOSSES, hard_negatives, log_probabilities, min_max_loss, select, top_classes
from .prompting.synthetic import (
    LOCATIONS,
    MAX_CONTRAST,
    block_size,
    fixed_places,
    paste,
    random_places,
    render_blocks,
)
from .prompting.text import PromptLearner, TextEncoder
from .prompting.trainer import PromptTrainer

# Table 4a: what the visual prompts are used for. Ours is "selection"; "none" is CoOp's loss and prediction.
VISUAL_PROMPTS = ("selection", "paired", "text_augmentation", "none")
CHUNK = 256  # class-conditional images pasted and encoded at a time


def extend_cfg(cfg: CN) -> None:
    """Add LoGoPrompt's keys (in a CoOp code base: one line in ``train.py``'s own ``extend_cfg``)."""
    cfg.TRAINER.LOGOPROMPT = CN()
    cfg.TRAINER.LOGOPROMPT.N_CTX = 16  # M, number of context vectors
    cfg.TRAINER.LOGOPROMPT.CTX_INIT = ""  # words the context starts from; empty: random
    cfg.TRAINER.LOGOPROMPT.PREC = "fp16"  # fp16, fp32, amp
    cfg.TRAINER.LOGOPROMPT.VISUAL_PROMPT = "selection"  # selection, paired, text_augmentation or none (Table 4a)
    cfg.TRAINER.LOGOPROMPT.K = 5  # hard negatives in training, candidates at test time
    cfg.TRAINER.LOGOPROMPT.LOSS = "infonce"  # paper (Eq. 3 as printed) or infonce (positive in the denominator too)
    cfg.TRAINER.LOGOPROMPT.BLOCK_HEIGHT = 1 / 7  # h / H
    cfg.TRAINER.LOGOPROMPT.BLOCK_WIDTH = 1.0  # w / W
    cfg.TRAINER.LOGOPROMPT.LOCATION = "random"  # random, top or bottom
    cfg.TRAINER.LOGOPROMPT.FONT = ""  # path of a .ttf/.otf file; empty: Pillow's own font
    cfg.TRAINER.LOGOPROMPT.MIN_CONTRAST = 4.5  # of text and background, WCAG's ratio
    # Colours, and places at test time. Apart from SEED, so that runs of several seeds see the same test images.
    cfg.TRAINER.LOGOPROMPT.VISUAL_SEED = 0


def draw_visual_prompts(method: CN, classnames: Sequence[str], image_size: int) -> torch.Tensor:
    """The class-wise visual prompts V_c (3.2) as ``cfg.TRAINER.LOGOPROMPT`` wants them: (C, 3, h, w), RGB in [0, 1]."""
    block = block_size(image_size, method.BLOCK_HEIGHT, method.BLOCK_WIDTH)
    return render_blocks(classnames, *block, method.VISUAL_SEED, method.MIN_CONTRAST, method.FONT)


class CustomCLIP(nn.Module):
    """CLIP with learnable text prompts p_c and a rendered visual prompt V_c for every class."""

    def __init__(self, cfg: CN, classnames: Sequence[str], clip_model: Backbone) -> None:
        super().__init__()
        method = cfg.TRAINER.LOGOPROMPT
        self.visual_prompt = method.VISUAL_PROMPT
        self.k, self.loss_form, self.location, self.seed = method.K, method.LOSS, method.LOCATION, method.VISUAL_SEED
        self.backbone = clip_model
        self.image_size = clip_model.input_resolution

        # 3.1 Text prompts p_c = [u_1 … u_M, e_c] with a context that all classes share.
        self.prompt_learner = PromptLearner(clip_model, classnames, method.N_CTX, method.CTX_INIT)
        self.text_encoder = TextEncoder(clip_model)

        # 3.2 Class-wise visual prompts V_c, (C, 3, h, w), normalised like the images they are pasted into.
        blocks = draw_visual_prompts(method, classnames, self.image_size)
        self.block = tuple(blocks.shape[-2:])  # (h, w)
        if "normalize" in cfg.INPUT.TRANSFORMS:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD))
            blocks = (blocks - mean) / std
        self.register_buffer("visual_prompts", blocks, persistent=False)

    def text_features(self) -> torch.Tensor:
        """g(p_c): (C, E), of unit length."""
        return self.text_encoder(*self.prompt_learner())

    def log_p(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """log p(c|x), the softmax over all C classes of cos(f(x), g(p_c)) / tau: (…, E), (C, E) -> (…, C)."""
        return log_probabilities(self.backbone.logits(image_features, text_features))

    @torch.no_grad()
    def conditional_features(self, image: torch.Tensor, classes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """f(x_c), x_c being the image with a block replaced by V_c (3.2).

        Args:
            image: (B, 3, H, W).
            classes: (B, N) classes c for each image.
            places: (B, 2) top and left of the block, the same for all classes of an image.

        Returns:
            (B, N, E), of unit length.
        """
        n = classes.shape[1]
        owner = torch.arange(len(image)).repeat_interleave(n)
        pieces = [
            self.backbone.encode_image(paste(image[i], self.visual_prompts[c], places[i]))
            for i, c in zip(owner.split(CHUNK), classes.flatten().split(CHUNK))
        ]
        return torch.cat(pieces).view(len(image), n, -1)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Training (3.3): images (B, 3, H, W) and labels (B,) -> losses (B,) and log p(c|x) (B, C).

        The ablations of Table 4a are trained by cross-entropy: on the original images (``none``), or on them and on
        the images with the block of their class (``text_augmentation``); ``paired`` is trained as ``selection`` is.
        """
        with torch.no_grad():  # the image encoder is frozen and so are the visual prompts: the graph is the text's
            image_features = self.backbone.encode_image(image)
        text_features = self.text_features()
        log_p = self.log_p(image_features, text_features)

        if self.visual_prompt == "none":
            return -log_p.gather(1, label.unsqueeze(1)).squeeze(1), log_p

        # The group of an image: real {(x, y), (x_y, y)}, negative {(x, c_k), (x_{c_k}, c_k)}.
        k = 0 if self.visual_prompt == "text_augmentation" else self.k
        negatives = hard_negatives(log_p.detach(), label, k)
        classes = torch.cat([label.unsqueeze(1), negatives], dim=1)  # y, c_1 … c_K
        places = random_places(len(image), self.image_size, self.block, self.location)
        conditional = self.conditional_features(image, classes, places)
        original_p = log_p.gather(1, classes)  # log p(y|x), log p(c_k|x)
        conditional_p = self.log_p(conditional, text_features).gather(2, classes.unsqueeze(2)).squeeze(2)

        if self.visual_prompt == "text_augmentation":
            return -(original_p[:, 0] + conditional_p[:, 0]) / 2, log_p

        # Eq. 3
        loss = min_max_loss(
            original_p[:, 0], conditional_p[:, 0], original_p[:, 1:], conditional_p[:, 1:], self.loss_form
        )
        return loss, log_p

    @torch.no_grad()
    def select(self, image: torch.Tensor, paths: Sequence[str], text_features: torch.Tensor) -> torch.Tensor:
        """Test (3.4): argmax_k max(p(c_k|x), p(c_k|x_{c_k})) over the top-K classes.

        Args:
            image: (B, 3, H, W).
            paths: B image paths relative to the data root; they decide where the blocks go.
            text_features: (C, E).

        Returns:
            (B, C) scores, -inf for classes that were not among the top K. Without selection (the ablations of
            Table 4a) log p(c|x).
        """
        log_p = self.log_p(self.backbone.encode_image(image), text_features)
        if self.visual_prompt != "selection":
            return log_p
        candidates = top_classes(log_p, self.k)
        places = fixed_places(paths, self.seed, self.image_size, self.block, self.location)
        conditional = self.conditional_features(image, candidates, places)
        conditional_p = self.log_p(conditional, text_features).gather(2, candidates.unsqueeze(2)).squeeze(2)
        return select(log_p, candidates, conditional_p)


@TRAINER_REGISTRY.register()
class LoGoPrompt(PromptTrainer):
    """Text prompts learned by the min-max loss over class-conditional images; prediction by selection."""

    network = CustomCLIP

    def check_cfg(self, cfg: CN) -> None:
        super().check_cfg(cfg)
        method = cfg.TRAINER.LOGOPROMPT
        for key, allowed in (("VISUAL_PROMPT", VISUAL_PROMPTS), ("LOSS", LOSSES), ("LOCATION", LOCATIONS)):
            if method[key] not in allowed:
                raise UserError(f"TRAINER.LOGOPROMPT.{key} {method[key]}: choose one of {', '.join(allowed)}")
        if method.K < 1:
            raise UserError(f"TRAINER.LOGOPROMPT.K {method.K}: must be at least 1")
        if not 1 <= method.MIN_CONTRAST <= MAX_CONTRAST:
            raise UserError(f"TRAINER.LOGOPROMPT.MIN_CONTRAST {method.MIN_CONTRAST:g}: must be 1 to {MAX_CONTRAST:g}")
        block_size(min(cfg.INPUT.SIZE), method.BLOCK_HEIGHT, method.BLOCK_WIDTH)

    def loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        image, label = batch["img"].to(self.device), batch["label"].to(self.device)
        losses, log_p = self.model(image, label)
        return losses.mean(), log_p, label

    def parse_batch_test(self, batch: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        return (batch["img"].to(self.device), self.relative_paths(batch)), batch["label"].to(self.device)

    def model_inference(self, image: tuple[torch.Tensor, Sequence[str]]) -> torch.Tensor:
        return self.model.select(*image, self.prompt_text)
