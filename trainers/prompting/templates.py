"""Hand-made prompts: CoOp's template for each data set, and its ensemble of seven."""

from __future__ import annotations

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

# The seven of CLIP's 80 ImageNet templates that together do nearly as well as all of them, according to its authors.
SELECTED_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def template_of(dataset: str) -> str:
    """CoOp's template for a data set (``DATASET.NAME``)."""
    return CUSTOM_TEMPLATES.get(dataset, DEFAULT_TEMPLATE)
