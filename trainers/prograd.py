"""ProGrad: Prompt-aligned Gradient for Prompt Tuning (Zhu et al., ICCV 2023, arXiv 2205.14865).

CoOp's context u (``prompting/classifiers.py``), whose gradient must not point away from what zero-shot CLIP knows. With
g the gradient of the cross-entropy and k that of the KL divergence from the zero-shot prediction, a step goes along
g where the angle between both is at most 90 degrees, and elsewhere along g - lambda (g . k/|k|) k/|k| (section 3.2).

As in the authors' code, angle and projection are those of a whole parameter tensor. There is one, ``ctx``: the contexts
of all classes are projected together, also class-specific ones.

Differences from the authors' code. The teacher's prompts are CoOp's for the data set; theirs move the class name to the
end ("a type of pet, a photo of a {}."), also on Flowers102, FGVCAircraft, Food101 ("…, a photo of {}.") and DTD
("a texture of {}."). They start the context from the words of that prompt, here ``CTX_INIT``; its 16 vectors are those
of the words with zeros in front (``CTX_PAD``). Their run with mixed precision ends in an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.classifiers import COOP_KEYS, LearnedContext, hand_made_features
from .prompting.config import MAX_CONTEXT, Key, above, at_least, unmet, within
from .prompting.image_batch import ImageBatch
from .prompting.method import Step
from .prompting.prompts import PromptLearner
from .prompting.templates import template_of
from .prompting.trainer import PromptTrainer

KEYS = {
    **COOP_KEYS,
    "CTX_PAD": Key(0, within(0, MAX_CONTEXT)),  # vectors of zeros in front of those of CTX_INIT; the authors' runs: 12
    "T": Key(1.0, above(0)),  # temperature of both predictions in the KL divergence
    "LAMBDA": Key(1.0, at_least(0)),  # share of the conflicting part that is removed; 0: CoOp
}


class CustomCLIP(LearnedContext):
    """CLIP whose text prompts have learned contexts, trained by cross-entropy along prompt-aligned gradients."""

    config_name, keys = "PROGRAD", KEYS

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        options = self.options
        if options.CTX_PAD:
            words = self.learned.ctx.data
            zeros = words.new_zeros(*words.shape[:-2], options.CTX_PAD, words.shape[-1])
            padded = torch.cat([zeros, words], dim=-2)
            shape = padded.shape[-2], "", options.CSC, options.CLASS_TOKEN_POSITION
            self.learned = PromptLearner(backbone, classnames, *shape)
            self.learned.ctx.data = padded
        hand_made = hand_made_features(backbone, classnames, [template_of(cfg.DATASET.NAME)])
        self.register_buffer("hand_made", hand_made, persistent=False)  # (C, E)

    @classmethod
    def config_errors(cls, cfg: CfgNode) -> list[str]:
        options = cfg.TRAINER.PROGRAD
        padded = [("CTX_PAD", not options.CTX_PAD or bool(options.CTX_INIT), "needs words in CTX_INIT to pad")]
        return super().config_errors(cfg) or unmet("TRAINER.PROGRAD.", options, padded)

    def loss(self, images: ImageBatch, label: torch.Tensor) -> Step:
        """Cross-entropy; the KL term is logged, and :meth:`combine` gets its gradient."""
        logits = self.score(images, self.text_features())
        teacher = self.backbone.logits(images.features(), self.hand_made)
        kl = distillation(logits, teacher, self.options.T)
        return Step({"loss": F.cross_entropy(logits, label)}, logits, {"kl": kl})

    def objectives(self, step: Step) -> list[torch.Tensor]:
        return [step.total, step.log["kl"]]

    def combine(self, gradients: list[list[Optional[torch.Tensor]]]) -> list[Optional[torch.Tensor]]:
        """Project gradients, per parameter. The scale of mixed precision leaves the projection as it is."""
        return [aligned(g, k, self.options.LAMBDA) for g, k in zip(*gradients)]


def distillation(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² times the cross-entropy with the teacher's softmax at temperature T, a mean over (B, C) logits.

    It is the KL divergence up to the teacher's entropy, which has no gradient.
    """
    p = (teacher / temperature).softmax(dim=-1)
    return -(temperature**2) * (p * (logits / temperature).log_softmax(dim=-1)).sum(dim=-1).mean()


def aligned(g: torch.Tensor, k: torch.Tensor, strength: float) -> torch.Tensor:
    """g - lambda min(0, g . k/|k|) k/|k|, of the shape of both; g itself where k is zero. Computed in float32 at least.

    A k that is not finite makes the result so: mixed precision then skips the step.
    """
    dtype = torch.promote_types(g.dtype, torch.float32)
    direction = F.normalize(k.to(dtype).flatten(), dim=0, eps=torch.finfo(dtype).tiny)
    along = torch.dot(g.to(dtype).flatten(), direction).clamp(max=0)
    return (g.to(dtype) - strength * along * direction.view_as(g)).to(g.dtype)


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class ProGrad(PromptTrainer):
    """Context optimisation along prompt-aligned gradients."""

    method_class = CustomCLIP
