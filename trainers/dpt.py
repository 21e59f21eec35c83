"""DPT: Dual Modality Prompt Tuning for Vision-Language Pre-Trained Model (Xing et al., TMM 2023, arXiv 2208.08340).

CoOp's text prompts and visual tokens (VPT) are learned together. In the last blocks class-aware tokens (CAVPT) take the
place of visual tokens: they are made of the text features of the classes that zero-shot CLIP finds most probable for
the image, by cross-attention to the image's own tokens. Settings and details are those of the authors' code.
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
from .prompting.classifiers import COOP_KEYS, HandMadePrompts
from .prompting.config import Key, at_least, violations
from .prompting.errors import UserError
from .prompting.image_batch import ImageBatch
from .prompting.image_encoder import NOT_COMPILED, VisualTokens, encode_with_tokens, vision_blocks, vision_width
from .prompting.method import Step
from .prompting.prompts import PromptLearner
from .prompting.selection import top_classes
from .prompting.text_encoder import TextEncoder
from .prompting.trainer import PromptTrainer

KEYS = {
    **COOP_KEYS,  # of the text prompts: N_CTX, CTX_INIT, PREC, CSC, CLASS_TOKEN_POSITION
    "VISUAL_N_CTX": Key(10, at_least(1)),  # number of visual tokens in a block
    "CANDIDATES": Key(10, at_least(1)),  # K, number of class-aware tokens in a block
    "CLASS_AWARE_BLOCKS": Key(1, at_least(1)),  # number of the last blocks, which have class-aware tokens
    "GUIDED_EPOCHS": Key(30, at_least(0)),  # of the first phase, in which zero-shot CLIP guides both modalities
    "ALPHA": Key(0.3, at_least(0)),  # weight of the loss of the class-aware tokens
    "TEXT_LR": Key(0.002, at_least(0)),  # learning rate of the text context; OPTIM.LR is that of the visual side
    "TEXT_WARMUP_EPOCH": Key(1, at_least(-1)),  # warm-up of the text context; OPTIM.WARMUP_EPOCH is of the visual side
}
ATTENTION_WIDTH = 32  # of queries and keys
FREE_TOKENS = 10  # learned tokens that class-aware tokens attend to besides the image's
BOTH = 0.1  # weight of the full model's loss in the first phase


class TokenClassifier(nn.Linear):
    """(…, D) class-aware tokens -> (…, C), for the loss alone.

    Rows belong to class names. No prediction uses them, so classes that were not trained keep the initial ones.
    """

    per_class = ("weight",)


class ClassAwareTokens(nn.Module):
    """Class-aware tokens of a block, made of text features by cross-attention to the block's input. All float32."""

    def __init__(self, backbone: Backbone, n_cls: int) -> None:
        super().__init__()
        width = vision_width(backbone)
        self.project = nn.Linear(backbone.n_features, width)
        self.query = nn.Linear(width, ATTENTION_WIDTH, bias=False)
        self.key = nn.Linear(width, ATTENTION_WIDTH, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.norm_class, self.norm_token = nn.LayerNorm(width), nn.LayerNorm(width)
        self.classifier = TokenClassifier(width, n_cls, bias=False)
        self.free = VisualTokens(backbone, 1, FREE_TOKENS)

    def forward(self, text_features: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, K, E) features of the candidates, (B, 1 + N, D) [CLS] and patches -> (B, K, D) tokens, (B, K, C) logits.

        No gradient goes to ``x``.
        """
        dtype = self.project.weight.dtype
        projected = self.project(text_features.to(dtype))
        x = torch.cat([x.detach().to(dtype), self.free.ctx.expand(len(x), -1, -1)], dim=1)
        weights = self.query(projected) @ self.key(x).mT / ATTENTION_WIDTH**0.5
        attended = self.value(weights.softmax(dim=-1) @ x)
        return self.norm_token(attended + projected), self.classifier(self.norm_class(attended))


class CustomCLIP(HandMadePrompts):
    """CLIP with learned text prompts, visual tokens and class-aware tokens."""

    config_name, keys = "DPT", KEYS
    frozen_image_encoder = False
    scaled_precisions = ("amp", "fp16")  # gradients come through the whole encoder
    stage_keys = ("TRAINER.DPT.GUIDED_EPOCHS",)
    guided = True  # whether training is in its first phase

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        options, layers = self.options, len(vision_blocks(backbone, cfg.TRAINER.NAME))
        if (class_aware := options.CLASS_AWARE_BLOCKS) > layers:
            raise UserError(f"TRAINER.DPT.CLASS_AWARE_BLOCKS {class_aware}: {backbone.name} has {layers} blocks")
        context = options.N_CTX, options.CTX_INIT, options.CSC, options.CLASS_TOKEN_POSITION
        text = PromptLearner(backbone, classnames, *context)
        text.ctx.data = text.ctx.data.to(torch.promote_types(backbone.dtype, torch.float32))
        visual = VisualTokens(backbone, layers - class_aware, options.VISUAL_N_CTX)
        blocks = nn.ModuleList(ClassAwareTokens(backbone, len(classnames)) for _ in range(class_aware))
        self.learned = nn.ModuleDict({"text": text, "visual": visual, "class_aware": blocks})
        self.text_encoder = TextEncoder(backbone, cfg.TRAIN.TEXT_CHUNK, unit_length=False)

    @classmethod
    def config_errors(cls, cfg: CfgNode) -> list[str]:
        return [*super().config_errors(cfg), *violations(NOT_COMPILED, cfg)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The text prompts have their own learning rate and warm-up."""
        own = {"lr": self.options.TEXT_LR, "warmup_epoch": self.options.TEXT_WARMUP_EPOCH}
        return [{"params": list(self.learned["text"].parameters()), **own}]

    def before_epoch(self, epoch: int) -> None:
        self.guided = epoch < self.options.GUIDED_EPOCHS

    def text_features(self) -> torch.Tensor:
        """(C, E) features of the learned prompts, not of unit length: class-aware tokens are made of them."""
        return self.text_encoder(*self.learned["text"].encoder_inputs())

    def candidates(self, images: ImageBatch) -> torch.Tensor:
        """(B, K) the classes that zero-shot CLIP finds most probable, best first."""
        return top_classes(self.backbone.logits(images.features(), super().text_features()), self.options.CANDIDATES)

    def encode(
        self, images: ImageBatch, text_features: torch.Tensor, candidates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, E) image features of unit length, and (B, L, K, C) logits of the class-aware tokens of L blocks."""
        visual, logits = self.learned["visual"].ctx, []

        def tokens(i: int, x: torch.Tensor) -> torch.Tensor:
            if i < len(visual):
                return visual[i]
            class_aware, of_block = self.learned["class_aware"][i - len(visual)](text_features[candidates], x)
            logits.append(of_block)
            return class_aware

        features = encode_with_tokens(self.backbone, images.pixels, tokens)
        return F.normalize(features, dim=-1), torch.stack(logits, dim=1)

    def loss(self, images: ImageBatch, label: torch.Tensor) -> Step:
        """First phase: each modality with zero-shot CLIP's other one, and 0.1 of both learned; then both learned alone.

        In both phases plus alpha times the cross-entropy of the class-aware tokens of the images' own classes.
        """
        text_features, candidates = self.text_features(), self.candidates(images)
        image_features, token_logits = self.encode(images, text_features, candidates)
        text, logits_of = F.normalize(text_features, dim=-1), self.backbone.logits
        logits = logits_of(image_features, text)
        losses = {"both": (BOTH if self.guided else 1) * F.cross_entropy(logits, label)}
        if self.guided:
            losses["text"] = F.cross_entropy(logits_of(images.features(), text), label)
            losses["image"] = F.cross_entropy(logits_of(image_features, super().text_features()), label)
        losses["class_aware"] = self.options.ALPHA * class_aware_loss(token_logits, candidates, label)
        return Step(losses, logits, counts={"class_aware": (candidates == label.unsqueeze(1)).sum()})

    def score(self, images: ImageBatch, text_features: torch.Tensor) -> torch.Tensor:
        """(B, C) logits of the learned image features and the learned text features."""
        image_features, _ = self.encode(images, text_features, self.candidates(images))
        return self.backbone.logits(image_features, F.normalize(text_features, dim=-1))


def class_aware_loss(logits: torch.Tensor, candidates: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the tokens whose candidate is the image's label; 0 if there are none.

    Takes (B, L, K, C) logits of the tokens of L blocks, (B, K) candidates and (B,) labels.
    """
    own = (candidates == label.unsqueeze(1)).unsqueeze(1).expand(logits.shape[:-1])
    log_p = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    of_label = log_p[torch.arange(len(label), device=label.device), :, :, label]  # (B, L, K)
    return -torch.where(own, of_label, 0.0).sum() / own.sum().clamp(min=1)


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class DPT(PromptTrainer):
    """Dual modality prompt tuning."""

    method_class = CustomCLIP
