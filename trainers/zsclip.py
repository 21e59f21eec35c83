"""Zero-shot CLIP with hand-made prompts (Eq. 1), one template or CoOp's ensemble."""

from __future__ import annotations

from dassl.engine import TRAINER_REGISTRY

from .prompting.classifiers import HandMadePrompts
from .prompting.templates import SELECTED_TEMPLATES
from .prompting.trainer import PromptTrainer


class ZeroshotMethod(HandMadePrompts):
    """CLIP as it is: the class of the nearest prompt."""

    learns = False


class EnsembleMethod(ZeroshotMethod):
    """Prompt ensembling: seven templates, and the data set's own except on ImageNet."""

    def templates(self) -> list[str]:
        own = [] if self.cfg.DATASET.NAME == "ImageNet" else super().templates()
        return [*SELECTED_TEMPLATES, *own]


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(PromptTrainer):
    """One template."""

    method_class = ZeroshotMethod


@TRAINER_REGISTRY.register()
class ZeroshotCLIP2(PromptTrainer):
    """CoOp's ensemble."""

    method_class = EnsembleMethod
