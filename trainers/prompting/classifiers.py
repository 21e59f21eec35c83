"""What several methods start from: CLIP with hand-made prompts, and with a learned context.

Method files build on these and not on each other, so that each can be dropped into a code base alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from yacs.config import CfgNode

from .backbone import Backbone
from .config import CONTEXT, Key, one_of
from .method import Method
from .names import clean_name
from .prompts import POSITIONS, PromptLearner
from .templates import template_of
from .text_encoder import TextEncoder, encode_texts

COOP_KEYS: Mapping[str, Key] = {
    **CONTEXT,
    "CSC": Key(False),  # class-specific contexts
    "CLASS_TOKEN_POSITION": Key("end", one_of(POSITIONS)),
}


def hand_made_features(backbone: Backbone, classnames: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """(C, E): the mean of a class's text features over some templates, of unit length."""
    names = [clean_name(name) for name in classnames]
    features = [encode_texts(backbone, [template.format(name) for name in names]) for template in templates]
    return F.normalize(torch.stack(features).mean(dim=0), dim=-1)


class HandMadePrompts(Method):
    """CLIP with hand-made prompts (Eq. 1); a subclass that learns changes the image side."""

    def templates(self) -> list[str]:
        """The sentences that class names are inserted into."""
        return [template_of(self.cfg.DATASET.NAME)]

    def hand_made(self) -> torch.Tensor:
        """(C, E): :func:`hand_made_features` of these templates."""
        return hand_made_features(self.backbone, self.classnames, self.templates())

    def text_features(self) -> torch.Tensor:
        """The same, computed once."""
        if not hasattr(self, "_hand_made"):
            self.register_buffer("_hand_made", self.hand_made(), persistent=False)
        return self._hand_made


class LearnedContext(Method):
    """CLIP whose text prompts have learned contexts (Eq. 2), trained by cross-entropy."""

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        options = self.options
        self.learned = PromptLearner(
            backbone,
            classnames,
            options.N_CTX,
            options.CTX_INIT,
            options.get("CSC", False),
            options.get("CLASS_TOKEN_POSITION", "end"),
        )
        self.text_encoder = TextEncoder(backbone, cfg.TRAIN.TEXT_CHUNK)

    def text_features(self) -> torch.Tensor:
        return self.text_encoder(*self.learned.encoder_inputs())
