"""Linear probe: logistic regression on the image features of the few-shot training images (CLIP, appendix A.3).

The features are the encoder's outputs, not of unit length, of images without augmentation. As in CoOp's ``lpclip``, the
strength of the regularisation is searched for on the validation images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Optional

import numpy as np
import torch
import torch.nn as nn
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.config import PREC, Key, Rule, is_number
from .prompting.errors import UserError
from .prompting.image_batch import ImageBatch
from .prompting.method import Method, TrainingData
from .prompting.trainer import PromptTrainer

GRID = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)  # of C, the inverse strength of the regularisation
BISECTIONS = 8  # around the best of the grid

KEYS = {
    "PREC": PREC,
    "C": Key(0.0, Rule("must be positive, or 0 to search", lambda c: is_number(c) and c >= 0)),
}


def search(accuracy: Callable[[float], float]) -> float:
    """The C that is most accurate on validation images: the first best of a grid, then bisection in log space.

    The interval from a tenth to ten times the grid's best is halved eight times towards its better end (the left one of
    equals); the result is the C of that end in the last step.
    """
    peak = max(GRID, key=accuracy)
    left, right = peak / 10, peak * 10
    for _ in range(BISECTIONS):
        middle = (left * right) ** 0.5
        if accuracy(left) < accuracy(right):
            best, left = right, middle
        else:
            best, right = left, middle
    return best


def fit(features: np.ndarray, labels: np.ndarray, c: float):  # noqa: ANN201 (scikit-learn is imported late)
    """L2-regularised multinomial logistic regression of features (N, E) and labels (N,)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():  # with hardly any regularisation it would take more steps; the search judges that
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=1000).fit(features, labels)


class LinearClassifier(nn.Linear):
    """(B, E) features -> (B, C) scores; rows belong to class names, and other classes have none."""

    per_class = ("weight", "bias")
    serves_unseen_classes = False

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):  # fitted in float64: float32 at least
            return super().forward(features)

    @torch.no_grad()
    def copy_from(self, regression) -> None:  # noqa: ANN001
        """Take the solution of scikit-learn, which for two classes is the difference of their rows only."""
        weight, bias = (torch.from_numpy(a).to(self.weight) for a in (regression.coef_, regression.intercept_))
        if len(weight) < self.out_features:
            weight, bias = (torch.cat([torch.zeros_like(difference), difference]) for difference in (weight, bias))
        self.weight.copy_(weight)
        self.bias.copy_(bias)


class LinearMethod(Method):
    """CLIP's image encoder and a linear classifier."""

    config_name, keys = "LINEARPROBE", KEYS

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        if len(classnames) < 2:
            raise UserError(f"{cfg.DATASET.NAME} has one class: a linear probe needs at least two")
        self.learned = LinearClassifier(backbone.text_projection.shape[1], len(classnames))

    @classmethod
    def validation(cls, cfg: CfgNode) -> Optional[tuple[str, str]]:
        return None if cfg.TRAINER.LINEARPROBE.C else ("TRAINER.LINEARPROBE.C 0", "set C")

    def fit(self, data: TrainingData) -> float:
        """Fit the classifier; its one epoch has nothing to do with ``OPTIM``."""
        c, chosen = self.options.C, ""
        features, labels = _arrays(*data.train_features())
        if not c:
            val_features, val_labels = _arrays(*data.val_features())
            c = search(lru_cache(lambda c: fit(features, labels, c).score(val_features, val_labels)))
            chosen = f", chosen on {len(val_labels)} validation images"
        regression = fit(features, labels, c)
        self.learned.copy_from(regression)
        accuracy = 100 * regression.score(features, labels)
        print(
            f"Linear probe: C {c:g}{chosen}; {accuracy:.1f} % of {len(labels)} training images are classified correctly"
        )
        return accuracy

    def score(self, images: ImageBatch, text_features: None) -> torch.Tensor:
        return self.learned(images.raw_features().float())


def _arrays(features: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return features.double().cpu().numpy(), labels.cpu().numpy()


extend_cfg = LinearMethod.extend_cfg


@TRAINER_REGISTRY.register()
class LinearProbe(PromptTrainer):
    """Logistic regression on image features."""

    method_class = LinearMethod
