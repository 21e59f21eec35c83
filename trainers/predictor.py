"""Predictions of a run for any images, with what they are based on. The run's data set need not be present.

    from trainers.predictor import Predictor

    predictor = Predictor("output/…/seed1")
    for result in predictor(["cat.jpg", "holiday/"]):
        print(result.path, result.classes, result.scores)

The model is built from the run's ``config.yaml`` and checkpoint by the trainer that made them, and scores images as the
evaluation does. ``tools/predict.py`` is its command line.
"""

from __future__ import annotations

import io
import math
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, redirect_stdout, suppress
from itertools import islice, repeat
from threading import Lock
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from yacs.config import CfgNode

import trainers

from .prompting.backbone import Backbone
from .prompting.checkpoint import PROMPT_LEARNER, load_checkpoint
from .prompting.data import normalisation, open_image, read_image
from .prompting.errors import UserError
from .prompting.explanation import Candidate, Explanation, Prediction
from .prompting.image_batch import ImageBatch
from .prompting.image_files import PathLike, Source, find_images
from .prompting.method import Comparison
from .prompting.names import clean_name
from .prompting.paste import paste
from .prompting.results import read_results
from .prompting.selection import top_classes
from .prompting.trainer import PromptTrainer

THREADS = min(8, os.cpu_count() or 1)  # decode images while others are scored
LARGE = 2**24  # pixels; larger images are decoded one at a time
BATCHES_AHEAD = 2  # read before they are needed: decides how much memory is used, with the batch size
BUILD_WARNINGS = ("Not in ", "Visual prompts too small")  # lines of the model's construction that are passed on


def run_config(model_dir: str) -> CfgNode:
    """Every key of a run, not frozen. Raises UserError."""
    path = os.path.join(model_dir, "config.yaml")
    if not os.path.isfile(path):
        fault = "no such file" if os.path.isdir(model_dir) else "no such folder"
        raise UserError(f"{path}: {fault}; --model-dir must be a run folder, made by train.py")
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    cfg.set_new_allowed(True)  # keys of data sets, and of other versions
    try:
        with open(path, encoding="utf-8") as file:
            cfg.merge_from_other_cfg(CfgNode.load_cfg(file.read()))
    except Exception as error:  # noqa: BLE001 (yaml and yacs each raise their own errors)
        raise UserError(f"{path}: not the config of a run ({_on_one_line(error)})") from error
    return cfg


def survey(cfg: CfgNode) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names of a run's data set, and (path, label) of its test images; nothing is written or drawn at random."""
    import datasets  # noqa: F401 (registers the data sets; predictions do not need them)
    from datasets.splits import subsample_classes

    if cfg.DATASET.NAME not in DATASET_REGISTRY.registered_names():
        raise UserError(f'unknown data set "{cfg.DATASET.NAME}"')
    with redirect_stdout(io.StringIO()):
        images, parts = DATASET_REGISTRY.get(cfg.DATASET.NAME).survey(cfg)
        parts = subsample_classes(parts, cfg.DATASET.get("SUBSAMPLE_CLASSES", "all"))
    names = {item.label: item.classname for item in parts["train"]}
    return [names[label] for label in sorted(names)], [(os.path.join(images, i.path), i.label) for i in parts["test"]]


def _without_data(
    trainer: type[PromptTrainer], classnames: Sequence[str], backbones: MutableMapping[Any, Any]
) -> type[PromptTrainer]:
    """The trainer, with class names in place of a data set, and a backbone that is loaded unless it is there."""

    class Serving(trainer):
        def load_backbone(self) -> tuple[Backbone, str]:
            cfg, inputs = self.cfg, self.cfg.INPUT
            checked = inputs.SIZE, inputs.PIXEL_MEAN, inputs.PIXEL_STD, "normalize" in inputs.TRANSFORMS
            key = str((cfg.MODEL.BACKBONE, checked, self.method_class.precision(cfg), self.device))
            if key not in backbones:
                backbones[key] = super().load_backbone()
            return backbones[key]

        def build_data_loader(self) -> None:
            self.dm = SimpleNamespace(dataset=SimpleNamespace(classnames=classnames, train_x=[], val=[], test=[]))
            self.train_loader_x = self.train_loader_u = self.val_loader = self.test_loader = None
            self.num_classes, self.lab2cname = len(classnames), dict(enumerate(classnames))
            self.num_source_domains = 0

    return Serving


class Predictor:
    """A trained model that predicts image files.

    Args:
        model_dir: run folder; of an evaluation's folder, the run that it evaluated is used.
        classnames: classes to tell apart instead of the run's. Those of a trained name have what was learned for it,
            the others the method's default for unseen classes.
        epoch: of the checkpoint; default: the best model, else the last epoch.
        backbone: CLIP weights, if they are no longer where the run had them.
        root: data root, see :func:`find_images`; default: the run's (``DATASET.ROOT``).
        batch_size: images scored at a time; default: as in the run's evaluation (``DATALOADER.TEST.BATCH_SIZE``).
        options: KEY VALUE pairs that override the run's config.
        backbones: loaded backbones, which predictors share that are given the same dictionary.

    Attributes:
        classnames: C class names.
        warnings: what may make predictions worse than expected, a line each; also printed on stderr.
        trainer: the trainer with its model, on the device.
    """

    def __init__(
        self,
        model_dir: PathLike,
        classnames: Optional[Sequence[str]] = None,
        *,
        epoch: Optional[int] = None,
        backbone: str = "",
        root: str = "",
        batch_size: Optional[int] = None,
        options: Sequence[Any] = (),
        backbones: Optional[MutableMapping[Any, Any]] = None,
    ) -> None:
        cfg = self.cfg = run_config(model_dir := os.path.expanduser(model_dir))
        cfg.merge_from_list(list(options))
        if root and not os.path.isdir(os.path.expanduser(root)):
            raise UserError(f"{root}: no such folder (--root)")
        cfg.DATASET.ROOT = root or cfg.DATASET.ROOT
        self.batch_size = batch_size or cfg.DATALOADER.TEST.BATCH_SIZE
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1")
        name, names = cfg.TRAINER.NAME, sorted(TRAINER_REGISTRY.registered_names())
        known = {n: TRAINER_REGISTRY.get(n) for n in names if issubclass(TRAINER_REGISTRY.get(n), PromptTrainer)}
        if name not in known:
            raise UserError(f'{model_dir}: made by the trainer "{name}"; predictions need one of {", ".join(known)}')
        kind = known[name]
        folder, checkpoint = _find_model(model_dir, epoch) if kind.method_class.learns else (model_dir, {})
        self.classnames = self._choose_classes(classnames, model_dir, folder, checkpoint)
        if backbone:
            cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS = backbone, ""
        self._build(kind, lambda trainer: trainer.load_model(folder, epoch), backbones)

    @classmethod
    def untrained(
        cls, cfg: CfgNode, classnames: Sequence[str], backbones: Optional[MutableMapping[Any, Any]] = None
    ) -> Predictor:
        """A predictor of ``cfg.TRAINER.NAME`` as it is before training, from a config of ``train.py``.

        LoGoPrompt with generic text prompts and a context of words is then zero-shot CLIP with selection.
        """
        self = cls.__new__(cls)
        self.cfg, self.batch_size = cfg.clone(), cfg.DATALOADER.TEST.BATCH_SIZE
        self.cfg.defrost()
        self.classnames = self._choose_classes(classnames, "", "", {})
        self._build(TRAINER_REGISTRY.get(cfg.TRAINER.NAME), lambda trainer: None, backbones)
        return self

    def _build(
        self,
        kind: type[PromptTrainer],
        load: Callable[[PromptTrainer], None],
        backbones: Optional[MutableMapping[Any, Any]],
    ) -> None:
        """The trainer with its model; ``load`` loads what it learned."""
        cfg = self.cfg
        cfg.OUTPUT_DIR, cfg.MODEL.INIT_WEIGHTS, cfg.TRAINER.LOGOPROMPT.VIEWS = os.devnull, "", 0  # concern training
        cfg.TRAIN.COMPILE = False  # takes minutes
        cfg.freeze()
        output = io.StringIO()
        with redirect_stdout(output):
            self.trainer = _without_data(kind, self.classnames, {} if backbones is None else backbones)(cfg)
            if self.trainer.checkpointer is not None:
                load(self.trainer)
            self.trainer.set_model_mode("eval")
            self.transform = build_transform(cfg, is_train=False)
            with torch.no_grad(), self.trainer.autocast:
                self.text_features = self.trainer.model.text_features()
        self.warnings = [line for line in output.getvalue().splitlines() if line.startswith(BUILD_WARNINGS)]
        for line in self.warnings:
            print(line, file=sys.stderr)
        self._large = Lock()
        self._mean, self._std = normalisation(cfg)

    def _choose_classes(
        self, given: Optional[Sequence[str]], model_dir: str, folder: str, checkpoint: dict[str, Any]
    ) -> list[str]:
        if given is not None:
            seen = [clean_name(name) for name in given]
            if not seen or not all(name.strip() for name in given):
                raise UserError(f"--classnames: {'an empty name' if seen else 'no names'}; give at least one name")
            if again := [name for i, name in enumerate(seen) if name in seen[:i]]:
                raise UserError(f'--classnames: "{again[0]}" occurs twice; give every name once')
            return list(given)
        if checkpoint.get("classnames") and folder == model_dir:
            return list(checkpoint["classnames"])
        try:
            return survey(self.cfg)[0]
        except UserError as error:
            raise UserError(f"{model_dir} does not record its classes: give --classnames ({error})") from error

    def find(self, paths: Iterable[PathLike], skipped: Optional[Callable[[str], None]] = None) -> Iterator[Source]:
        """:func:`find_images` with this predictor's root."""
        return find_images(paths, list(filter(None, [self.cfg.DATASET.ROOT])), skipped)

    def __call__(self, images: Iterable[Union[PathLike, Source]], top: int = 5) -> Iterator[Prediction]:
        """Predict files, folders or results of :meth:`find`, in their order, with ``top`` classes for each image.

        Images are taken from the iterable and read a few at a time, so there may be any number of them. One that cannot
        be read has an ``error``.
        """
        for batch in self._batches(images):
            yield from (prediction for prediction, _, _ in self._predict(batch, top))

    def explain(self, images: Iterable[Union[PathLike, Source]], top: int = 5) -> Iterator[Explanation]:
        """Predict like a call, with what each prediction is based on."""
        for batch in self._batches(images):
            for prediction, pixels, found in self._predict(batch, top):
                explanation = Explanation(prediction, font=self.cfg.TRAINER.LOGOPROMPT.FONT)
                if not prediction.error:
                    explanation.image = self._picture(pixels)
                    explanation.candidates, explanation.selected = self._candidates(found, pixels, top)
                yield explanation

    def _batches(self, images: Iterable[Union[PathLike, Source]]) -> Iterator[list[tuple[Source, Any]]]:
        """(source, (3, H, H) pixels or why there are none) of ``batch_size`` images at a time."""
        sources = (source for item in images for source in ([item] if isinstance(item, Source) else self.find([item])))
        with closing(self._read_ahead(sources)) as read:
            while batch := list(islice(read, self.batch_size)):
                yield batch

    def _read_ahead(self, sources: Iterator[Source]) -> Iterator[tuple[Source, Any]]:
        pool, waiting = ThreadPoolExecutor(THREADS), deque()
        try:
            while True:
                for source in islice(sources, BATCHES_AHEAD * self.batch_size - len(waiting)):
                    waiting.append((source, pool.submit(self._read, source)))
                if not waiting:
                    return
                source, future = waiting.popleft()
                yield source, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, source: Source) -> Union[torch.Tensor, str]:
        """(3, H, H) pixels as the model takes them, or one line on why there are none."""
        name = _on_one_line(source.path)
        if source.problem:
            return f"{name}: {source.problem}"
        try:
            if not stat.S_ISREG(os.stat(source.path).st_mode):  # reading a pipe would block
                return f"{name}: not a file"
            with self._large if _pixels(source.path) > LARGE else nullcontext():
                return self.transform(read_image(source.path))
        except FileNotFoundError:
            return f"no image file at {name}"
        except OSError as error:
            return f"{name}: {error.strerror}" if error.strerror else str(error)
        except Exception as error:  # noqa: BLE001 (one image must not end the batch)
            return f"{name}: {type(error).__name__}: {_on_one_line(error)}"

    @torch.no_grad()
    def compare(self, images: ImageBatch) -> Comparison:
        """Scores exactly as the evaluation computes them, and what they are based on."""
        with self.trainer.autocast:
            return self.trainer.model.compare(images, self.text_features)

    def _predict(self, batch: list[tuple[Source, Any]], top: int) -> Iterator[tuple[Prediction, Any, Any]]:
        """Prediction, pixels and comparison of every image of a batch; unread images have no comparison."""
        readable = [(source, pixels) for source, pixels in batch if not isinstance(pixels, str)]
        if readable:
            pixels = torch.stack([pixels for _, pixels in readable]).to(self.trainer.device)
            images = ImageBatch(self.trainer.backbone, pixels, [source.relative for source, _ in readable])
            try:
                compared = vars(self.compare(images)).values()
            except torch.cuda.OutOfMemoryError as error:
                raise UserError(f"--batch-size {self.batch_size}: too many images for the GPU's memory") from error
            rows = map(Comparison, *(v.split(1) if isinstance(v, torch.Tensor) else repeat(v) for v in compared))
        for source, pixels in batch:
            prediction, found = Prediction(source.path, relative=source.relative), None
            if isinstance(pixels, str):
                prediction.error = pixels
            else:
                found = next(rows)
                order = top_classes(found.scores, top)  # of equals the lower label comes first, as in argmax
                log_p = found.log_p.gather(1, order)[0]
                if log_p.isnan().any():
                    prediction.error = f"{_on_one_line(source.path)}: the model's scores are not numbers"
                else:
                    n = int((log_p > -math.inf).sum())  # others were not considered
                    prediction.classes = [self.classnames[label] for label in order[0, :n].tolist()]
                    prediction.scores = log_p[:n].exp().tolist()
            yield prediction, pixels, found

    @torch.no_grad()
    def _candidates(self, found: Comparison, pixels: torch.Tensor, top: int) -> tuple[list[Candidate], int]:
        """The classes considered for the image of a comparison, and the index of the predicted one."""
        classes = (top_classes(found.original, top) if found.candidates is None else found.candidates)[0]
        selected = classes.tolist().index(int(top_classes(found.scores, 1)))  # by label: names may occur twice
        values = [[self.classnames[c] for c in classes.tolist()], found.original[0, classes].exp().tolist()]
        if found.candidates is not None:
            blocks = self.trainer.model.visual_prompts[classes]
            images = pixels.to(blocks.device).expand(len(classes), -1, -1, -1)
            pictures = map(self._picture, paste(images, blocks, found.places.expand(len(classes), 2)))
            values += [found.conditional[0].exp().tolist(), pictures]
        return [Candidate(*value) for value in zip(*values)], selected

    def _picture(self, pixels: torch.Tensor) -> Image.Image:
        """(3, H, H) normalised pixels -> RGB."""
        return to_pil_image((pixels.cpu().float() * self._std + self._mean).clamp(0, 1))


def _pixels(path: str) -> int:
    """Number of pixels from a file's header; 0 if it cannot be read, which read_image reports."""
    with suppress(Exception), open_image(path) as image:
        return image.width * image.height
    return 0


def _on_one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _find_model(model_dir: str, epoch: Optional[int]) -> tuple[str, dict[str, Any]]:
    """The run whose model is used, and its checkpoint."""
    folder = model_dir
    if not os.path.isdir(os.path.join(model_dir, PROMPT_LEARNER)):  # an evaluation records its run
        with suppress(OSError, ValueError, KeyError, TypeError):
            folder = read_results(model_dir)["run"]["model_dir"] or model_dir
    return folder, load_checkpoint(folder, epoch)[1]
