"""CoOp: Learning to Prompt for Vision-Language Models (Zhou et al., IJCV 2022, arXiv 2109.01134)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.config import CONTEXT, Key, one_of
from .prompting.method import Method
from .prompting.prompts import POSITIONS, PromptLearner
from .prompting.text_encoder import TextEncoder
from .prompting.trainer import PromptTrainer

KEYS = {
    **CONTEXT,
    "CSC": Key(False),  # class-specific contexts
    "CLASS_TOKEN_POSITION": Key("end", one_of(POSITIONS)),
}


class CustomCLIP(Method):
    """CLIP whose text prompts have learned contexts, trained by cross-entropy."""

    config_name, keys = "COOP", KEYS

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        options = self.options
        self.learned = PromptLearner(
            backbone, classnames, options.N_CTX, options.CTX_INIT, options.CSC, options.CLASS_TOKEN_POSITION
        )
        self.text_encoder = TextEncoder(backbone, cfg.TRAIN.TEXT_CHUNK)

    def text_features(self) -> torch.Tensor:
        return self.text_encoder(*self.learned.encoder_inputs())


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class CoOp(PromptTrainer):
    """Context optimisation."""

    method_class = CustomCLIP
