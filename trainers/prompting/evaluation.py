"""The test loop: batches of images in, an :class:`Evaluation` out."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

from .backbone import Backbone
from .data import READER_VERSION, ordered_loader, read_image
from .errors import UserError
from .feature_store import FeatureStore, NotAStore, encoder_key, image_key
from .image_batch import ImageBatch, StoredBatch
from .method import Method
from .names import relative_path

THREADS = min(8, os.cpu_count() or 1)  # decode images of which a store lacks something
MIN_IMAGES = 20  # of fewer, an accuracy tells little
Batch = tuple[ImageBatch, torch.Tensor]  # images and their labels, (B,)


@dataclass
class Evaluation:
    """What an evaluation measured."""

    split: str  # test or val
    metrics: dict[str, float]  # of Dassl's evaluator, accuracy in percent first
    extra_metrics: dict[str, float] = field(default_factory=dict)  # of class-conditional images: percentages by name
    predictions: dict[str, int] = field(default_factory=dict)  # label by path relative to the data root
    warnings: list[str] = field(default_factory=list)  # why the numbers mean little


def evaluate(method: Method, batches: Iterable[Batch], evaluator: Any, split: str, total: int) -> Evaluation:
    """Score all images with Dassl's evaluator. Raises UserError for scores that are not numbers."""
    evaluator.reset()
    predictions: dict[str, int] = {}
    labels: set[int] = set()
    num_classes = compared = changed = correct_alone = 0
    text_features = method.text_features()
    with tqdm(total=total, unit="image", disable=None) as bar:
        for images, label in batches:
            found = method.compare(images, text_features)
            check_scores(found.scores, images.paths)
            evaluator.process(found.scores, label)
            num_classes = found.scores.shape[1]
            labels.update(label.tolist())
            predicted = found.scores.argmax(dim=1)
            predictions.update(zip(images.paths, predicted.tolist()))
            if found.candidates is not None:
                alone = found.original.argmax(dim=1)
                compared += len(images)
                changed += int((alone != predicted).sum())
                correct_alone += int((alone == label).sum())
            bar.update(len(images))
    metrics = {key: float(value) for key, value in evaluator.evaluate().items()}
    evaluation = Evaluation(split, metrics, predictions=predictions)
    if compared:
        evaluation.extra_metrics["changed_by_selection"] = 100 * changed / compared
        evaluation.extra_metrics["accuracy_without_selection"] = 100 * correct_alone / compared
    warning, cause = "", "nothing was learned, or training collapsed"
    if num_classes == 1:
        warning = "there is one class to choose from, so every prediction is correct"
    elif len(labels) > 1 and len(set(predictions.values())) == 1:
        warning = f"every image is predicted to be of the same class: {cause}"
    elif at_chance(metrics.get("accuracy", 100.0), len(predictions), num_classes):
        warning = f"the accuracy is that of guessing (chance is {100 / num_classes:.1f} %): {cause}"
    if warning:
        print(f"WARNING: {warning}")
        evaluation.warnings.append(warning)
    return evaluation


def at_chance(accuracy: float, images: int, num_classes: int) -> bool:
    """Whether an accuracy, in percent, is at most one standard error above chance, on more than 20 images."""
    chance = 1 / num_classes
    error = math.sqrt(chance * (1 - chance) / max(images, 1))
    return images > MIN_IMAGES and accuracy / 100 <= chance + error


def check_scores(scores: torch.Tensor, paths: Sequence[str], what: str = "scores") -> None:
    """Raise UserError unless every row of (B, C) has a finite maximum; -inf is allowed elsewhere."""
    bad = ~torch.isfinite(scores.amax(dim=1))
    if bad.any():
        path = paths[int(bad.int().argmax())]
        raise UserError(f"{path}: its {what} are not numbers; check the weights (MODEL.BACKBONE.NAME, --model-dir)")


@dataclass
class ImageSource:
    """Turns Dassl's loaders into batches for a method, through the feature store of ``TEST.FEATURES`` if it is set."""

    cfg: CfgNode
    backbone: Backbone
    device: torch.device
    precision: str  # of the computation, part of the store's key
    _encoder_key: Optional[bytes] = None  # hashes all weights: once per run

    def batches(self, loader: DataLoader, use_store: bool = True) -> Iterator[Batch]:
        """All images of a loader with their labels. With a store, images are read only if it lacks something."""
        store = self._open_store(loader.dataset.transform) if use_store else None
        with nullcontext() if store is None else closing(store):
            if store is not None:
                unknown = yield from self._stored_batches(loader, store)
                if not unknown:  # draw what that loader would draw: training must not depend on the store
                    torch.empty((), dtype=torch.int64).random_()
                    return
                loader = ordered_loader(self.cfg, unknown, loader.dataset.transform)
            for batch in loader:
                pixels, paths = batch["img"].to(self.device, non_blocking=True), self._relative(batch["impath"])
                if store is None:
                    images = ImageBatch(self.backbone, pixels, paths)
                else:
                    images = StoredBatch(self.backbone, paths, store, self._keys(batch["impath"]), pixels.__getitem__)
                yield images, batch["label"].to(self.device)

    def _stored_batches(self, loader: DataLoader, store: FeatureStore) -> Generator[Batch, None, list[Any]]:
        """The images that the store knows; returns the others."""
        items, size, unknown = loader.dataset.data_source, self.cfg.DATALOADER.TEST.BATCH_SIZE, []
        with ThreadPoolExecutor(THREADS) as pool:
            for chunk in (items[i : i + size] for i in range(0, len(items), size)):
                keys = self._keys([item.impath for item in chunk])
                rows = list(zip(chunk, keys, store.get(keys)))
                unknown += [item for item, _, feature in rows if feature is None]
                if known := [(item, key) for item, key, feature in rows if feature is not None]:
                    paths = [item.impath for item, _ in known]
                    keys = [key for _, key in known]
                    label = torch.tensor([item.label for item, _ in known], device=self.device)
                    read = partial(self._read, pool, loader.dataset.transform, paths)
                    yield StoredBatch(self.backbone, self._relative(paths), store, keys, read), label
        print(f"Features of {len(items) - len(unknown)} of {len(items)} images were read from {store.path}")
        return unknown

    def _read(self, pool: ThreadPoolExecutor, transform: Callable, paths: list[str], rows: list[int]) -> torch.Tensor:
        images = pool.map(lambda row: transform(read_image(paths[row])), rows)
        return torch.stack(list(images)).to(self.device)

    def _relative(self, paths: Sequence[str]) -> list[str]:
        return [relative_path(path, self.cfg.DATASET.ROOT) for path in paths]

    def _keys(self, paths: Sequence[str]) -> list[bytes]:
        return [image_key(*pair) for pair in zip(paths, self._relative(paths))]

    def _open_store(self, transform: Any) -> Optional[FeatureStore]:
        """The store of ``TEST.FEATURES`` for this encoder and preprocessing; None without one."""
        path = self.cfg.TEST.get("FEATURES", "")
        if not path:
            return None
        backbone = self.backbone
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        if self._encoder_key is None:  # test and validation images have the same transform
            self._encoder_key = encoder_key(backbone.visual, transform, f"{self.precision} {READER_VERSION}", kind)
        name = f"{backbone.name}, {backbone.input_resolution} pixels, {self.precision}, {kind}"
        limit = int(self.cfg.TEST.FEATURES_GB * 2**30)
        try:
            return FeatureStore(os.path.expanduser(path), self._encoder_key, name, limit)
        except NotAStore as error:
            raise UserError(f"TEST.FEATURES: {error}; name another file") from error
        except (OSError, sqlite3.Error) as error:
            print(f"{path}: {error}; features are not stored")
            return None


@dataclass
class FewShotFeatures:
    """Features of a data set's training and validation images (:class:`~.method.TrainingData`)."""

    dataset: Any
    name: str
    loader: Callable[..., Iterable[dict[str, Any]]]  # of images, without augmentation or in an augmented ``view``
    encode: Callable[[torch.Tensor], torch.Tensor]  # (B, 3, H, H) pixels -> (B, E) features

    def train_features(self, passes: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        views = range(passes) if passes else [None]
        features, labels = zip(*(self._features(self.dataset.train_x, view) for view in views))
        return sum(features) / len(features), labels[0]

    def val_features(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._features(self.dataset.val)

    def check_validation(self, setting: str, remedy: str) -> None:
        """Raise UserError unless there are validation images that are not test images (CoOp's ImageNet has none)."""
        test = {item.impath for item in self.dataset.test}
        if not self.dataset.val or any(item.impath in test for item in self.dataset.val):
            raise UserError(f"{setting}: {self.name} has no validation images of its own; {remedy} instead")

    @torch.no_grad()
    def _features(self, items: Sequence[Any], view: Optional[int] = None) -> tuple[torch.Tensor, torch.Tensor]:
        features, labels = [], []
        for batch in tqdm(self.loader(items, view), desc="features", disable=None, leave=False):
            features.append(self.encode(batch["img"]).float())
            labels.append(batch["label"])
            check_scores(features[-1], batch["impath"], "features")
        features = torch.cat(features)
        return features, torch.cat(labels).to(features.device)
