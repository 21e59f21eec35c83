"""KgCoOp: Visual-Language Prompt Tuning with Knowledge-guided Context Optimization (Yao et al., CVPR 2023).

arXiv 2303.13283. CoOp's context (``prompting/classifiers.py``), whose text features must stay close to those of the
hand-made prompts: the loss is the cross-entropy plus W times the distance of the two (section 3.2).

The paper's distance is |w_c - w_c^clip|², a mean over the C classes; the authors' code has 1 - cos(w_c, w_c^clip), half
as much for features of unit length. W = 8 is the weight in both, and their results come from the code, so the cosine is
what W weighs here; W = 16 is the paper's form for features of unit length.

The hand-made prompts are CoOp's for the data set. The authors' are the same except on DTD ("a photo of a {}, a type of
texture."). In their code class-specific contexts and other positions of the class name have no effect: there are none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.classifiers import LearnedContext, hand_made_features
from .prompting.config import CONTEXT, Key, at_least
from .prompting.image_batch import ImageBatch
from .prompting.method import Step
from .prompting.templates import template_of
from .prompting.trainer import PromptTrainer

KEYS = {
    **CONTEXT,
    "CTX_INIT": CONTEXT["CTX_INIT"]._replace(default="a photo of a"),
    "W": Key(8.0, at_least(0)),  # lambda, weight of the distance to the hand-made prompts; 0: CoOp
}


class CustomCLIP(LearnedContext):
    """CLIP whose text prompts have a learned context that stays close to the hand-made prompts."""

    config_name, keys = "KGCOOP", KEYS

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        hand_made = hand_made_features(backbone, classnames, [template_of(cfg.DATASET.NAME)])
        self.register_buffer("hand_made", hand_made, persistent=False)  # (C, E)

    def loss(self, images: ImageBatch, label: torch.Tensor) -> Step:
        """Cross-entropy, and W times the mean distance of all C classes, those of the batch or not."""
        text_features = self.text_features()
        logits = self.score(images, text_features)
        distance = cosine_distance(text_features, self.hand_made)
        losses = {"cross_entropy": F.cross_entropy(logits, label), "knowledge": self.options.W * distance}
        return Step(losses, logits)


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - cos(a_c, b_c), a mean over rows of unit length (C, E), in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return 1 - (a.to(dtype) * b.to(dtype)).sum(dim=-1).mean()


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class KgCoOp(PromptTrainer):
    """Knowledge-guided context optimisation."""

    method_class = CustomCLIP
