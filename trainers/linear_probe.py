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

STRENGTH = Rule("must be positive, or 0 to search", lambda c: is_number(c) and c >= 0)


def search(accuracy: Callable[[float], float]) -> float:
    """The C that is most accurate on validation images: the first best of a grid, then bisection in log space.

    The interval from a tenth to ten times the grid's best is halved eight times towards its better end (the left one of
    equals), whose C in the last step is the result.
    """
    peak = max(GRID, key=accuracy)
    left, right = peak / 10, peak * 10
    for _ in range(BISECTIONS):
        best, middle = max((left, right), key=accuracy), (left * right) ** 0.5
        left, right = (left, middle) if best == left else (middle, right)
    return best


def fit(features: np.ndarray, labels: np.ndarray, c: float):  # noqa: ANN201 (scikit-learn is imported late)
    """L2-regularised multinomial logistic regression of features (N, E) and labels (N,)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():  # with hardly any regularisation it would take more steps; the search judges that
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # with one image per class
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
        for parameter, solution in ((self.weight, regression.coef_), (self.bias, regression.intercept_)):
            parameter.zero_()[-len(solution) :] = torch.from_numpy(solution)


class LinearMethod(Method):
    """CLIP's image encoder and a linear classifier."""

    config_name, keys = "LINEARPROBE", {"PREC": PREC, "C": Key(0.0, STRENGTH)}

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        if len(classnames) < 2:
            raise UserError(f"{cfg.DATASET.NAME} has one class: a linear probe needs at least two")
        self.learned = LinearClassifier(backbone.n_features, len(classnames))

    @classmethod
    def validation(cls, cfg: CfgNode) -> Optional[tuple[str, str]]:
        return None if cfg.TRAINER.LINEARPROBE.C else ("TRAINER.LINEARPROBE.C 0", "set C")

    def fit(self, data: TrainingData) -> float:
        """Fit the classifier in one epoch that ignores ``OPTIM``."""
        c, chosen = self.options.C, ""
        train = _arrays(*data.train_features())
        if not c:
            val = _arrays(*data.val_features())
            c = search(lru_cache(lambda c: fit(*train, c).score(*val)))
            chosen = f", chosen on {len(val[1])} validation images"
        regression = fit(*train, c)
        self.learned.copy_from(regression)
        accuracy = 100 * regression.score(*train)
        correct = f"{accuracy:.1f} % of {len(train[1])} training images are classified correctly"
        print(f"Linear probe: C {c:g}{chosen}; {correct}")
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
