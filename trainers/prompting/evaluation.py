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
from itertools import chain
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

from . import distributed
from .backbone import Backbone
from .data import READER_VERSION, ordered_loader, read_image
from .errors import UserError
from .feature_store import FeatureStore, NotAStore, encoder_key, image_key
from .image_batch import ImageBatch, StoredBatch
from .method import Comparison, Method
from .names import relative_path

THREADS = min(8, os.cpu_count() or 1)  # decode images of which a store lacks something
CHUNK = 4096  # predictions
MIN_IMAGES = 20  # of fewer, an accuracy tells little
Batch = tuple[ImageBatch, torch.Tensor]  # images and their labels, (B,)


@dataclass
class Evaluation:
    """What an evaluation measured."""

    split: str  # test or val
    metrics: dict[str, float]  # of Dassl's evaluator, accuracy in percent first
    extra_metrics: dict[str, float] = field(default_factory=dict)  # of class-conditional images, by name
    predictions: dict[str, int] = field(default_factory=dict)  # label by path relative to the data root
    warnings: list[str] = field(default_factory=list)  # why the numbers mean little


def evaluate(method: Method, batches: Iterable[Batch], evaluator: Any, split: str, total: int) -> Evaluation:
    """Score all images with Dassl's evaluator. Raises UserError for scores that are not numbers."""
    evaluator.reset()
    text_features = method.text_features()
    paths: list[str] = []
    rows = [torch.empty(0, 3, dtype=torch.long)]  # label, prediction, and that of the original image alone, else -1
    rises = [torch.empty(0, 2)]
    with tqdm(total=total, unit="image", disable=None) as bar:
        for images, label in batches:
            found = method.compare(images, text_features)
            check_scores(found.scores, images.paths)
            predicted = found.scores.argmax(dim=1)
            alone = torch.full_like(predicted, -1) if found.candidates is None else found.original.argmax(dim=1)
            paths += images.paths
            rows.append(torch.stack([label, predicted, alone], dim=1).cpu())
            if not (found.candidates is None or found.among_candidates):
                rises.append(log_odds_rises(found, label).cpu())
            bar.update(len(images))
    every = zip(*distributed.gather((paths, torch.cat(rows), torch.cat(rises))))
    paths, rows, rises = list(chain.from_iterable(next(every))), *map(torch.cat, every)
    num_classes = len(method.classnames)
    for chunk in rows.split(CHUNK):  # Dassl's evaluator takes scores
        evaluator.process(F.one_hot(chunk[:, 1], num_classes), chunk[:, 0])
    label, predicted, alone = rows.unbind(dim=1)
    metrics = {key: float(value) for key, value in evaluator.evaluate().items()}
    evaluation = Evaluation(split, metrics, predictions=dict(zip(paths, predicted.tolist())))
    if (compared := alone >= 0).any():
        found = {"changed_by_selection": alone != predicted, "accuracy_without_selection": alone == label}
        evaluation.extra_metrics = {name: 100 * x[compared].double().mean().item() for name, x in found.items()}
    if len(rises):
        true, wrong = rises.mean(dim=0).tolist()
        evaluation.extra_metrics |= {"log_odds_rise_true": true, "log_odds_rise_wrong": wrong}
    warning, cause = "", "nothing was learned, or training collapsed"
    if num_classes == 1:
        warning = "there is one class to choose from, so every prediction is correct"
    elif len(label.unique()) > 1 and len(predicted.unique()) == 1:
        warning = f"every image is predicted to be of the same class: {cause}"
    elif at_chance(metrics.get("accuracy", 100.0), len(predicted), num_classes):
        warning = f"the accuracy is that of guessing (chance is {100 / num_classes:.1f} %): {cause}"
    if warning:
        print(f"WARNING: {warning}")
        evaluation.warnings.append(warning)
    return evaluation


def log_odds_rises(found: Comparison, label: torch.Tensor) -> torch.Tensor:
    """How much its own block raises the log-odds of the true class, and those of the most probable wrong class.

    (N, 2), a row for every image whose candidates contain both. Probabilities are kept within [1e-6, 1 - 1e-6].
    """
    pairs = (found.original.gather(1, found.candidates), found.conditional)
    before, after = (torch.logit(log_p.double().exp(), eps=1e-6) for log_p in pairs)
    right = found.candidates == label.unsqueeze(1)
    both = right.any(dim=1) & ~right.all(dim=1)
    first = [mask[both].long().argmax(dim=1, keepdim=True) for mask in (right, ~right)]  # most probable first
    return torch.cat([(after - before)[both].gather(1, column) for column in first], dim=1)


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
        """This process's part of the images of a loader, with labels. A store saves reading those that it knows."""
        if distributed.processes() > 1:
            if not (items := distributed.part(loader.dataset.data_source)):  # fewer images than processes
                torch.empty((), dtype=torch.int64).random_()  # what a loader draws
                return
            loader = ordered_loader(self.cfg, items, loader.dataset.transform)
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
