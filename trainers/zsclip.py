"""Zero-shot CLIP with hand-made prompts (Eq. 1; templates of CoOp)."""

from __future__ import annotations

import torch
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


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(PromptTrainer):
    """CLIP as it is: the class whose prompt is nearest."""

    def build_model(self) -> None:
        # CoOp runs it in CLIP's own precision: half on a GPU, float32 elsewhere.
        self.model = self.load_backbone("fp16" if self.device.type == "cuda" else "fp32")

    def text_features(self) -> torch.Tensor:
        template = CUSTOM_TEMPLATES.get(self.cfg.DATASET.NAME, DEFAULT_TEMPLATE)
        return encode_texts(self.model, [template.format(clean_name(name)) for name in self.classnames])

    def score(self, images: ImageBatch) -> torch.Tensor:
        return self.backbone.logits(images.features(), self.prompt_text)
