"""Linear probe on CLIP's image features: logistic regression on the few-shot training images (CLIP, appendix A.3).

The features are those of the image encoder, not normalised, of images as they are at test time, without augmentation.
The strength of the regularisation is searched for on the validation images as CoOp's ``lpclip`` does.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any, Callable

import numpy as np
import torch
import torch.nn as nn
from dassl.engine import TRAINER_REGISTRY
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from yacs.config import CfgNode as CN

from .prompting.checks import PRECISIONS, Rule, at_least, one_of
from .prompting.errors import UserError
from .prompting.features import ImageBatch
from .prompting.names import matching_names
from .prompting.trainer import PromptTrainer

GRID = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)  # of C, the inverse of the regularisation's strength
STEPS = 8  # of bisection around the grid's best


def extend_cfg(cfg: CN) -> None:
    """Add the linear probe's keys."""
    cfg.TRAINER.LINEARPROBE = CN()
    cfg.TRAINER.LINEARPROBE.PREC = "fp16"  # fp16, fp32, amp
    cfg.TRAINER.LINEARPROBE.C = 0.0  # inverse of the regularisation's strength; 0: searched for on validation images


def search(accuracy: Callable[[float], float]) -> float:
    """The C that validation images like best: the first best of a grid, then bisection in log space.

    The interval from a tenth to ten times the grid's best is halved eight times, towards its better end (the left one
    where both are equally good); that end's C of the last step is the result.

    Args:
        accuracy: of a probe trained with this C, on validation images.
    """
    peak = max(GRID, key=accuracy)
    left, right = peak / 10, peak * 10
    for _ in range(STEPS):
        middle = (left * right) ** 0.5
        if accuracy(left) < accuracy(right):
            best, left = right, middle
        else:
            best, right = left, middle
    return best


def fit(features: np.ndarray, labels: np.ndarray, c: float) -> LogisticRegression:
    """L2-regularised multinomial logistic regression of features (N, E) and labels (N,)."""
    with warnings.catch_warnings():  # hardly any regularisation takes more steps than these; so be it, says the search
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=1000).fit(features, labels)


class LinearClassifier(nn.Linear):
    """(B, E) features -> (B, C) scores; a checkpoint's rows go by class name."""

    per_class = ("weight", "bias")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):  # found in double precision: float32 at least
            return super().forward(features)

    @torch.no_grad()
    def take(self, regression: LogisticRegression) -> None:
        """Become what scikit-learn has found; of two classes it keeps the difference only."""
        weight, bias = (torch.from_numpy(a).to(self.weight) for a in (regression.coef_, regression.intercept_))
        if len(weight) < self.out_features:
            weight, bias = (torch.cat([torch.zeros_like(difference), difference]) for difference in (weight, bias))
        self.weight.copy_(weight)
        self.bias.copy_(bias)


class CustomCLIP(nn.Module):
    """CLIP's image encoder and a linear classifier, under the name that what is learned has in every run folder."""

    def __init__(self, cfg: CN, classnames: list[str], clip_model: nn.Module) -> None:
        super().__init__()
        self.backbone = clip_model
        self.prompt_learner = LinearClassifier(clip_model.text_projection.shape[1], len(classnames))

    def features(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, H) images -> (B, E) image features as the encoder gives them, not of unit length."""
        return self.backbone.visual(image.to(self.backbone.dtype)).float()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.prompt_learner(self.features(image))


@TRAINER_REGISTRY.register()
class LinearProbe(PromptTrainer):
    """Logistic regression on image features. Its one epoch is the fit; ``OPTIM`` has no say in it."""

    network = CustomCLIP
    rules = {
        "PREC": one_of(PRECISIONS),
        "C": Rule("must be positive, or 0 to search", at_least(0).holds),
    }

    def build_model(self) -> None:
        super().build_model()
        self.max_epoch = 1
        if self.num_classes < 2:
            raise UserError(f"{self.cfg.DATASET.NAME} has one class: a linear probe needs two")

    def begin_stage(self, index: int) -> None:
        """No schedule: the regression has a solver of its own."""

    @torch.no_grad()
    def run_epoch(self) -> None:
        """Fit the classifier, once."""
        self.set_model_mode("eval")
        c, n_val = self.cfg.TRAINER.LINEARPROBE.C, 0
        if not c:
            self.check_validation("TRAINER.LINEARPROBE.C 0", "set C")
        features, labels = self.numpy_features(self.few_shot_loader())
        if not c:
            val_features, val_labels = self.numpy_features(self.val_loader)
            c = search(lru_cache(lambda c: fit(features, labels, c).score(val_features, val_labels)))
            n_val = len(val_labels)
        regression = fit(features, labels, c)
        self.prompt_learner.take(regression)
        accuracy = 100 * regression.score(features, labels)
        self.watch.update(accuracy, len(labels))
        chosen = f", chosen on {n_val} validation images" if n_val else ""
        print(f"Linear probe: C {c:g}{chosen}; {accuracy:.1f} % of {len(labels)} training images are recognised")

    def numpy_features(self, loader: Any) -> tuple[np.ndarray, np.ndarray]:
        """(N, E) features in double precision and (N,) labels of all images of a loader."""
        features, labels = self.features(loader, self.model.features)
        return features.double().cpu().numpy(), labels.cpu().numpy()

    def _load_prompt_learner(self, checkpoint: dict[str, Any], path: str) -> None:
        rows = matching_names(self.classnames, checkpoint.get("classnames", ()))
        unknown = [name for name, row in zip(self.classnames, rows) if row < 0]
        if unknown:
            more = f" and {len(unknown) - 1} more of these classes" if len(unknown) > 1 else ""
            raise UserError(
                f'{path} was not trained on "{unknown[0]}"{more}: a linear probe recognises no other classes than its '
                "own; see DATASET.SUBSAMPLE_CLASSES, --dataset-config-file"
            )
        super()._load_prompt_learner(checkpoint, path)

    def text_features(self) -> None:
        """A linear probe has none."""

    def open_store(self, loader: Any) -> None:
        """Kept features are of unit length; these are not."""

    def score(self, images: ImageBatch) -> torch.Tensor:
        return self.model(images.pixels)
