"""CoOp: Learning to Prompt for Vision-Language Models (Zhou et al., IJCV 2022, arXiv 2109.01134)."""

from __future__ import annotations

from dassl.engine import TRAINER_REGISTRY

from .prompting.classifiers import COOP_KEYS, LearnedContext
from .prompting.trainer import PromptTrainer


class CustomCLIP(LearnedContext):
    """CLIP whose text prompts have learned contexts, trained by cross-entropy."""

    config_name, keys = "COOP", COOP_KEYS


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class CoOp(PromptTrainer):
    """Context optimisation."""

    method_class = CustomCLIP
