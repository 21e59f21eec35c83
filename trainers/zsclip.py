"""Zero-shot CLIP with hand-made prompts (Eq. 1), one template or CoOp's ensemble."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY

from .prompting.method import Method
from .prompting.names import clean_name
from .prompting.templates import SELECTED_TEMPLATES, template_of
from .prompting.text_encoder import encode_texts
from .prompting.trainer import PromptTrainer


class ZeroshotMethod(Method):
    """CLIP as it is: the class of the nearest prompt."""

    learns = False

    def templates(self) -> list[str]:
        """The sentences that class names are inserted into."""
        return [template_of(self.cfg.DATASET.NAME)]

    def text_features(self) -> torch.Tensor:
        """(C, E): the mean of a class's features over the templates, of unit length."""
        names = [clean_name(name) for name in self.classnames]
        features = [encode_texts(self.backbone, [t.format(name) for name in names]) for t in self.templates()]
        return F.normalize(torch.stack(features).mean(dim=0), dim=-1)


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
