"""Zero-shot CLIP with hand-made prompts (Eq. 1; templates of CoOp), one of them or an ensemble."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY

from .prompting.features import ImageBatch
from .prompting.names import clean_name
from .prompting.text import encode_texts
from .prompting.trainer import PromptTrainer

DEFAULT_TEMPLATE = "a photo of a {}."
CUSTOM_TEMPLATES = {
    "OxfordPets": "a photo of a {}, a type of pet.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "FGVCAircraft": "a photo of a {}, a type of aircraft.",
    "DescribableTextures": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "Food101": "a photo of {}, a type of food.",
    "UCF101": "a photo of a person doing {}.",
}

# The seven of CLIP's 80 ImageNet templates that its authors found to do nearly as well together as all of them.
SELECTED_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(PromptTrainer):
    """CLIP as it is: the class whose prompt is nearest."""

    def build_model(self) -> None:
        # CoOp runs it in CLIP's own precision: half on a GPU, float32 elsewhere.
        self.model = self.load_backbone("fp16" if self.device.type == "cuda" else "fp32")

    def templates(self) -> list[str]:
        """The sentences that a class name is put into."""
        return [CUSTOM_TEMPLATES.get(self.cfg.DATASET.NAME, DEFAULT_TEMPLATE)]

    def text_features(self) -> torch.Tensor:
        """(C, E): the mean of a class's features over the templates, of unit length."""
        names = [clean_name(name) for name in self.classnames]
        features = [encode_texts(self.model, [t.format(name) for name in names]) for t in self.templates()]
        return F.normalize(torch.stack(features).mean(dim=0), dim=-1)

    def score(self, images: ImageBatch) -> torch.Tensor:
        return self.backbone.logits(images.features(), self.prompt_text)


@TRAINER_REGISTRY.register()
class ZeroshotCLIP2(ZeroshotCLIP):
    """Prompt ensembling: seven templates, and the data set's own one where it is not ImageNet."""

    def templates(self) -> list[str]:
        own = [] if self.cfg.DATASET.NAME == "ImageNet" else super().templates()
        return [*SELECTED_TEMPLATES, *own]
