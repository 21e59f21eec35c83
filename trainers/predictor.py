"""Predictions of a run for any images, and what they rest on; the run's data set need not be there.

    from trainers.predictor import Predictor

    predictor = Predictor("output/…/seed1")
    for result in predictor(["cat.jpg", "holiday/"]):
        print(result.path, result.classes, result.scores)

The model is made from the run's ``config.yaml`` and checkpoint, by the trainer that made them, and scores an image as
the evaluation does. ``tools/predict.py`` is the same for the command line.
"""

from __future__ import annotations

import io
import math
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional, Union

import fallback  # noqa: F401 (makes `import dassl` work)

# isort: split
import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import to_pil_image
from yacs.config import CfgNode

import trainers

from .logoprompt import LoGoPrompt
from .prompting.checkpoints import PROMPT_LEARNER, load_checkpoint
from .prompting.errors import UserError
from .prompting.features import ImageBatch
from .prompting.images import FORMATS, read_image
from .prompting.names import clean_name, relative_path
from .prompting.results import read_results
from .prompting.selection import log_probabilities, top_classes
from .prompting.synthetic import paste
from .prompting.trainer import PromptTrainer
from .zsclip import ZeroshotCLIP

SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".apng")  # what is an image in a folder
THREADS = min(8, os.cpu_count() or 1)  # decode images while others are scored
LARGE = 2**24  # pixels; of images that have more one at a time is decoded
AHEAD = 2  # batches that are read before they are needed: what memory depends on, beside the batch size
NOTES = ("Not in ", "Visual prompts too small")  # of what is said while a model is made: worth passing on

Named = Union[str, "os.PathLike[str]"]


# ------------------------------------------------------------------------------------------------- images


class Source(NamedTuple):
    """An image file to predict."""

    path: str
    relative: str  # the path below the data root: decides where blocks go
    problem: str = ""  # why there is no image to be read


def find_images(
    named: Iterable[Named], roots: Sequence[str] = (), skipped: Optional[Callable[[str], None]] = None
) -> Iterator[Source]:
    """Files as they are named, and the images in folders and in folders below, by name; one at a time.

    In a folder an image is what has an image's suffix; hidden files are left out. Links are followed, unless to a
    folder that they are in.

    Args:
        named: files and folders.
        roots: data roots. An image's relative path is the one below the first of them that it lies in; below none of
            them, that below the folder named, and of a file named its name.
        skipped: called with the path of every file in a folder that is not an image.
    """
    for name in named:
        name = os.fspath(name)
        if not os.path.isdir(name):
            yield Source(name, _relative(name, [*roots, os.path.dirname(name)]))
            continue
        empty = True
        for path, problem in _walk(name, frozenset(), skipped):
            empty = False
            yield Source(path, _relative(path, [*roots, name]), problem)
        if empty:
            yield Source(name, "", "no images in this folder")


def _walk(
    folder: str, above: frozenset[tuple[int, int]], skipped: Optional[Callable[[str], None]]
) -> Iterator[tuple[str, str]]:
    """(path, problem) of the images below a folder."""
    try:
        found = os.stat(folder)
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        yield folder, error.strerror
        return
    above = above | {(found.st_dev, found.st_ino)}
    for path in (os.path.join(folder, name) for name in names):
        if os.path.isdir(path):
            below = os.stat(path)
            if (below.st_dev, below.st_ino) not in above:
                yield from _walk(path, above, skipped)
        elif path.lower().endswith(SUFFIXES):
            yield path, ""
        elif skipped is not None:
            skipped(path)


def _relative(path: str, roots: Sequence[str]) -> str:
    below = (relative_path(path, root) for root in roots)
    found = next((relative for relative in below if not relative.startswith("../")), os.path.basename(path))
    return found.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a name may be no text


# ------------------------------------------------------------------------------------------------- the run


def run_config(model_dir: str) -> CfgNode:
    """Every key of a run, not frozen. Raises UserError."""
    path = os.path.join(model_dir, "config.yaml")
    if not os.path.isfile(path):
        what = "no such file" if os.path.isdir(model_dir) else "no such folder"
        raise UserError(f"{path}: {what}; --model-dir must be a run folder, made by train.py")
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    cfg.set_new_allowed(True)  # keys of data sets, and of other versions
    try:
        with open(path, encoding="utf-8") as file:
            cfg.merge_from_other_cfg(CfgNode.load_cfg(file.read()))
    except Exception as error:  # noqa: BLE001 (yaml and yacs each have errors of their own)
        raise UserError(f"{path}: not the config of a run ({' '.join(str(error).split())})") from error
    return cfg


def survey(cfg: CfgNode) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names of a run's data set, and paths and labels of its test images; nothing is written or drawn.

    Raises:
        UserError: the data set is not there.
    """
    import datasets  # noqa: F401 (registers them; not needed to predict)
    from datasets.splits import subsample_classes

    if cfg.DATASET.NAME not in DATASET_REGISTRY.registered_names():
        raise UserError(f'unknown data set "{cfg.DATASET.NAME}"')
    with redirect_stdout(io.StringIO()):
        images, parts = DATASET_REGISTRY.get(cfg.DATASET.NAME).survey(cfg)
        parts = subsample_classes(parts, cfg.DATASET.get("SUBSAMPLE_CLASSES", "all"))
    names = {item.label: item.classname for item in parts["train"]}
    return [names[label] for label in sorted(names)], [(os.path.join(images, i.path), i.label) for i in parts["test"]]


def _without_data(trainer: type[PromptTrainer], classnames: Sequence[str]) -> type[PromptTrainer]:
    """The trainer, knowing class names in place of a data set."""

    class Serving(trainer):
        def build_data_loader(self) -> None:
            self.dm = SimpleNamespace(dataset=SimpleNamespace(classnames=classnames, train_x=[], val=[], test=[]))
            self.train_loader_x = self.train_loader_u = self.val_loader = self.test_loader = None
            self.num_classes, self.lab2cname = len(classnames), dict(enumerate(classnames))
            self.num_source_domains = 0

    return Serving


# ------------------------------------------------------------------------------------------------- results


@dataclass
class Prediction:
    """The most probable classes of an image.

    Attributes:
        path: of the image.
        classes: at most ``top`` class names, the best first.
        scores: of each, in [0, 1]: p(c|x); for LoGoPrompt max(p(c|x), p(c|x_c)), and its K candidates only.
        error: why there is no prediction, one line; empty where there is one.
        relative: path below the data root, see :func:`find_images`.
    """

    path: str
    classes: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    error: str = ""
    relative: str = ""


@dataclass
class Candidate:
    """A class that was considered."""

    classname: str
    original: float  # p(c|x)
    conditional: Optional[float] = None  # p(c|x_c); None: the method looks at the original image alone
    picture: Optional[Image.Image] = None  # x_c, the image with the class's block


@dataclass
class Explanation:
    """What a prediction rests on.

    Attributes:
        prediction: with its ``error`` set there is nothing more.
        image: x, as the model sees it: resized and cropped to (H, H).
        candidates: the most probable classes of the original image, the most probable first.
        selected: which of them is predicted.
        font: of the captions; empty: DejaVu Sans.
    """

    prediction: Prediction
    image: Optional[Image.Image] = None
    candidates: list[Candidate] = field(default_factory=list)
    selected: int = 0
    font: str = ""

    def draw(self) -> Image.Image:
        """One picture: the image, and the candidates with their class-conditional images and probabilities."""
        return _draw(self)


# ------------------------------------------------------------------------------------------------- predicting


class Predictor:
    """A trained model that predicts image files.

    Args:
        model_dir: run folder; of an evaluation's, the model is that of the run it evaluated.
        classnames: classes to tell apart, in place of those of the run. A class that was trained, by its name, has
            what was learned for it; others have what the method has for unseen classes.
        epoch: of the checkpoint; default: the best one, else the last.
        backbone: CLIP weights, where they are no longer where the run had them.
        root: data root, see :func:`find_images`; default: the run's own (``DATASET.ROOT``).
        batch_size: images scored at a time; default: as in the run's evaluation (``DATALOADER.TEST.BATCH_SIZE``).

    Attributes:
        classnames: C class names.
        trainer: the trainer with its model, on the device.

    Raises:
        UserError: no run folder, no checkpoint, weights that are not there, classes that the model cannot tell apart.
    """

    def __init__(
        self,
        model_dir: Named,
        classnames: Optional[Sequence[str]] = None,
        *,
        epoch: Optional[int] = None,
        backbone: str = "",
        root: str = "",
        batch_size: Optional[int] = None,
    ) -> None:
        model_dir = os.path.expanduser(os.fspath(model_dir))
        cfg = self.cfg = run_config(model_dir)
        if root and not os.path.isdir(os.path.expanduser(root)):
            raise UserError(f"{root}: no such folder (--root)")
        cfg.DATASET.ROOT = root or cfg.DATASET.ROOT
        self.roots = [cfg.DATASET.ROOT] if cfg.DATASET.ROOT else []
        self.batch_size = batch_size or cfg.DATALOADER.TEST.BATCH_SIZE
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1")
        kind = self._kind(model_dir)
        folder, checkpoint = (model_dir, None) if issubclass(kind, ZeroshotCLIP) else self._find(model_dir, epoch)
        self.classnames = self._choose_classes(classnames, model_dir, folder, checkpoint)
        self._adapt(backbone)

        said = io.StringIO()
        with redirect_stdout(said):
            self.trainer = _without_data(kind, self.classnames)(cfg)
            if checkpoint is not None:
                self.trainer.load_model(folder, epoch)
            self.trainer.set_model_mode("eval")
            self.transform = build_transform(cfg, is_train=False)
            with torch.no_grad(), self.trainer.autocast:
                self.trainer.prompt_text = self.trainer.text_features()
        for line in said.getvalue().splitlines():
            if line.startswith(NOTES):
                print(line, file=sys.stderr)
        self._large = Lock()
        # Pixels of a prepared image -> RGB in [0, 1]; as in the model itself.
        mean, std = torch.zeros(3), torch.ones(3)
        if "normalize" in cfg.INPUT.TRANSFORMS:
            mean, std = torch.tensor(cfg.INPUT.PIXEL_MEAN), torch.tensor(cfg.INPUT.PIXEL_STD)
        self._mean, self._std = mean.view(3, 1, 1), std.view(3, 1, 1)

    def _kind(self, model_dir: str) -> type[PromptTrainer]:
        name = self.cfg.TRAINER.NAME
        known = [n for n in TRAINER_REGISTRY.registered_names() if issubclass(TRAINER_REGISTRY.get(n), PromptTrainer)]
        if name not in known:
            raise UserError(f'{model_dir}: made by the trainer "{name}"; those of {", ".join(sorted(known))} predict')
        return TRAINER_REGISTRY.get(name)

    @staticmethod
    def _find(model_dir: str, epoch: Optional[int]) -> tuple[str, dict[str, Any]]:
        """The run whose model it is, and its checkpoint."""
        folder = model_dir
        if not os.path.isdir(os.path.join(model_dir, PROMPT_LEARNER)):  # an evaluation: it says of which run
            try:
                folder = read_results(model_dir)["run"]["model_dir"] or model_dir
            except (OSError, ValueError, KeyError):
                folder = model_dir
        return folder, load_checkpoint(folder, epoch)[1]

    def _choose_classes(
        self, given: Optional[Sequence[str]], model_dir: str, folder: str, checkpoint: Optional[dict[str, Any]]
    ) -> list[str]:
        trained = (checkpoint or {}).get("classnames")
        if given is not None:
            names = list(given)
            seen = [clean_name(name) for name in names]
            again = [name for i, name in enumerate(seen) if name in seen[:i]]
            if not names or not all(name.strip() for name in names):
                raise UserError("--classnames: an empty name" if names else "--classnames: no names")
            if again:
                raise UserError(f'--classnames: "{again[0]}" is there twice')
        elif trained and folder == model_dir:
            names = list(trained)
        else:
            try:
                names, _ = survey(self.cfg)
            except UserError as error:
                raise UserError(f"{model_dir} does not say its classes: give --classnames ({error})") from error
        specific = self.cfg.TRAINER.NAME == "CoOp" and self.cfg.TRAINER.COOP.CSC
        if specific and trained and list(map(clean_name, names)) != list(map(clean_name, trained)):
            raise UserError(f"{folder}: its class-specific contexts (TRAINER.COOP.CSC) serve no other classes")
        return names

    def _adapt(self, backbone: str) -> None:
        """Leave out of the config what is for training."""
        cfg = self.cfg
        cfg.OUTPUT_DIR = os.devnull  # nothing is written
        cfg.MODEL.INIT_WEIGHTS = ""
        cfg.TRAIN.COMPILE = False  # would take minutes
        cfg.TRAINER.LOGOPROMPT.VIEWS, cfg.TRAINER.LOGOPROMPT.ADAPTER_SEARCH = 0, False
        if backbone:
            cfg.MODEL.BACKBONE.NAME = backbone
        cfg.freeze()

    def find(self, named: Iterable[Named], skipped: Optional[Callable[[str], None]] = None) -> Iterator[Source]:
        """:func:`find_images` with this predictor's root."""
        return find_images(named, self.roots, skipped)

    def __call__(self, images: Iterable[Union[Named, Source]], top: int = 5) -> Iterator[Prediction]:
        """Predict files and folders of images, in their order.

        Images are taken from the iterable and read a few at a time, so there may be any number of them. One that
        cannot be read has an ``error``.

        Args:
            images: paths, or what :meth:`find` found.
            top: classes to name for each image, C at most.
        """
        for batch in self._batches(images):
            yield from self._predict(batch, top)[0]

    def explain(self, images: Iterable[Union[Named, Source]], top: int = 5) -> Iterator[Explanation]:
        """As a call, with what each prediction rests on; it takes about twice as long."""
        for batch in self._batches(images):
            predictions, encoded, scores = self._predict(batch, top)
            rows = iter(range(len(scores)))
            considered = self._considered(encoded, scores, top) if len(scores) else None
            for prediction, (_, pixels) in zip(predictions, batch):
                row = None if isinstance(pixels, str) else next(rows)
                if prediction.error:
                    yield Explanation(prediction)
                    continue
                best = int(top_classes(scores[row : row + 1], 1))  # by its label: two classes may have one name
                selected = considered[0][row].tolist().index(best)
                candidates = self._candidates(row, encoded, *considered)
                font = self.cfg.TRAINER.LOGOPROMPT.FONT
                yield Explanation(prediction, self._picture(pixels), candidates, selected, font)

    # -------------------------------------------------------------------------------------------- reading

    def _batches(self, images: Iterable[Union[Named, Source]]) -> Iterator[list[tuple[Source, Any]]]:
        """(source, (3, H, H) pixels or why there are none) of ``batch_size`` images at a time."""
        sources = (source for item in images for source in ([item] if isinstance(item, Source) else self.find([item])))
        read = self._read_ahead(sources)
        try:
            while batch := list(islice(read, self.batch_size)):
                yield batch
        finally:
            read.close()

    def _read_ahead(self, sources: Iterable[Source]) -> Iterator[tuple[Source, Any]]:
        pool = ThreadPoolExecutor(THREADS)
        waiting: deque = deque()
        try:
            for source in sources:
                waiting.append((source, pool.submit(self._read, source)))
                if len(waiting) >= AHEAD * self.batch_size:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, source: Source) -> Union[torch.Tensor, str]:
        """(3, H, H) pixels as the model takes them, or in one line why there are none."""
        if source.problem:
            return f"{_one_line(source.path)}: {source.problem}"
        try:
            kind = os.stat(source.path).st_mode
            if not stat.S_ISREG(kind):  # a pipe would be waited for
                return f"{_one_line(source.path)}: not a file"
        except OSError:
            pass  # read_image says why
        try:
            width, height = _size(source.path)
            # The transform brings the shorter side to the model's size before it crops.
            if max(width, height) / min(width, height) * max(self.cfg.INPUT.SIZE) ** 2 > Image.MAX_IMAGE_PIXELS:
                return f"{_one_line(source.path)}: {width}x{height} pixels are too long and thin to be resized"
            with self._large if width * height > LARGE else nullcontext():
                return self.transform(read_image(source.path))
        except OSError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 (one image must not end the batch)
            return f"{_one_line(source.path)}: {type(error).__name__}: {_one_line(str(error))}"

    # -------------------------------------------------------------------------------------------- scoring

    @torch.no_grad()
    def scores(self, images: ImageBatch) -> torch.Tensor:
        """(B, C) scores exactly as the evaluation computes them."""
        with self.trainer.autocast:
            return self.trainer.score(images)

    def _predict(self, batch: list[tuple[Source, Any]], top: int) -> tuple[list[Prediction], Any, torch.Tensor]:
        """Predictions of a batch; its images that could be read, and their (B, C) scores."""
        good = [(source, pixels) for source, pixels in batch if not isinstance(pixels, str)]
        encoded, scores = None, torch.empty(0, len(self.classnames))
        if good:
            pixels = torch.stack([pixels for _, pixels in good]).to(self.trainer.device)
            paths = [source.relative for source, _ in good]
            encoded = ImageBatch(self.trainer.backbone, paths, pixels, network=self.trainer.model)
            try:
                scores = self.scores(encoded).cpu()
            except torch.cuda.OutOfMemoryError as error:
                raise UserError(f"--batch-size {self.batch_size}: too many images for the GPU's memory") from error
        rows = iter(self._ranked(scores, top))
        predictions = []
        for source, pixels in batch:
            if isinstance(pixels, str):
                predictions.append(Prediction(source.path, error=pixels, relative=source.relative))
                continue
            labels, values = next(rows)
            if any(map(math.isnan, values)):
                why = f"{_one_line(source.path)}: the model's scores are not numbers"
                predictions.append(Prediction(source.path, error=why, relative=source.relative))
            else:
                names = [self.classnames[i] for i in labels]
                predictions.append(Prediction(source.path, names, values, relative=source.relative))
        return predictions, encoded, scores

    def _ranked(self, scores: torch.Tensor, top: int) -> list[tuple[list[int], list[float]]]:
        """(B, C) scores -> labels and probabilities of each image, the best first; what was not considered is out."""
        order = top_classes(scores, top)  # among equals the lower label comes first, as in argmax
        considered = (scores.gather(1, order) != float("-inf")).sum(dim=1).tolist()
        values = self._log_p(scores).gather(1, order).exp().tolist()
        return [(labels[:n], p[:n]) for labels, p, n in zip(order.tolist(), values, considered)]

    def _log_p(self, scores: torch.Tensor) -> torch.Tensor:
        """LoGoPrompt's scores are log-probabilities of two images, others' are logits."""
        return scores if isinstance(self.trainer, LoGoPrompt) else log_probabilities(scores)

    # -------------------------------------------------------------------------------------------- explaining

    @torch.no_grad()
    def _considered(
        self, images: ImageBatch, scores: torch.Tensor, top: int
    ) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        """(B, K) candidates, p(c|x), and where blocks have a say p(c|x_c) and (B, 2) places."""
        network, text_features = self.trainer.model, self.trainer.prompt_text
        if not isinstance(self.trainer, LoGoPrompt) or network.visual_prompt != "selection":
            classes = top_classes(scores, top)
            return classes, self._log_p(scores).gather(1, classes).exp(), None, None
        with self.trainer.autocast:
            log_p = network.log_p(images.features(), text_features)
            classes = top_classes(log_p, network.k)
            conditional = network.log_p(images.conditional(classes), text_features)
        conditional_p = conditional.gather(2, classes.unsqueeze(2)).squeeze(2).exp()
        return classes, log_p.gather(1, classes).exp(), conditional_p, network.places(images.paths)

    @torch.no_grad()
    def _candidates(
        self,
        row: int,
        images: ImageBatch,
        classes: torch.Tensor,
        original: torch.Tensor,
        conditional: Optional[torch.Tensor],
        places: Optional[torch.Tensor],
    ) -> list[Candidate]:
        """Of the image in one row of :meth:`_considered`."""
        names = [self.classnames[c] for c in classes[row].tolist()]
        if conditional is None:
            return [Candidate(*pair) for pair in zip(names, original[row].tolist())]
        n, blocks = len(names), self.trainer.model.visual_prompts[classes[row]]
        pasted = paste(images.pixels[row].expand(n, -1, -1, -1), blocks, places[row].expand(n, 2))
        return [
            Candidate(name, p, p_c, self._picture(pixels))
            for name, p, p_c, pixels in zip(names, original[row].tolist(), conditional[row].tolist(), pasted)
        ]

    def _picture(self, pixels: torch.Tensor) -> Image.Image:
        """(3, H, H) prepared pixels -> RGB."""
        return to_pil_image((pixels.cpu().float() * self._std + self._mean).clamp(0, 1))


def _size(path: str) -> tuple[int, int]:
    """Width and height by a file's header; 1 and 1 where that cannot be read, which read_image tells better."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception:  # noqa: BLE001 (of any kind, as Pillow's errors are)
        return 1, 1


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------- pictures

CELL, GAP, MARGIN, SMALL, LINE = 208, 12, 14, 15, 20  # pixels
INK, SOFT, LINES, GROUND, CHOSEN = "#1f2933", "#586573", "#d7dde3", "#ffffff", "#1a7f37"


class _Fonts:
    """Text that can be read at the picture's size."""

    def __init__(self, path: str) -> None:
        if path:
            self.plain = self.bold = ImageFont.truetype(path, SMALL)
        else:
            from matplotlib.font_manager import FontProperties, findfont  # brings fonts of wide coverage along

            self.plain, self.bold = (
                ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight=weight)), SMALL)
                for weight in ("normal", "bold")
            )

    def wrapped(self, text: str, width: float, lines: int = 2) -> list[str]:
        """Words on at most so many lines; what is too long ends in an ellipsis."""
        found, rest = [], text.split()
        while rest and len(found) < lines - 1:
            n = len(rest)
            while n > 1 and self.bold.getlength(" ".join(rest[:n])) > width:
                n -= 1
            found.append(self.cut(" ".join(rest[:n]), width))
            rest = rest[n:]
        return [*found, self.cut(" ".join(rest), width)] if rest else found

    def cut(self, text: str, width: float) -> str:
        whole = text
        while text and self.bold.getlength(text if text == whole else f"{text}…") > width:
            text = text[:-1]
        return text if text == whole else f"{text}…"

    def cut_left(self, text: str, width: float) -> str:
        whole = text
        while text and self.plain.getlength(text if text == whole else f"…{text}") > width:
            text = text[1:]
        return text if text == whole else f"…{text}"


def _draw(explanation: Explanation) -> Image.Image:
    """See :meth:`Explanation.draw`."""
    fonts = _Fonts(explanation.font)
    candidates, selected = explanation.candidates, explanation.selected
    if candidates[0].conditional is None:
        return _draw_list(explanation, fonts)
    names = [fonts.wrapped(clean_name(c.classname), CELL) for c in candidates]
    n_lines = max(map(len, names))
    columns = 1 + len(candidates)
    width = 2 * MARGIN + columns * CELL + (columns - 1) * GAP
    top = MARGIN + LINE + 8
    height = top + CELL + 8 + (n_lines + 3) * LINE + MARGIN
    canvas, pen = _canvas(explanation, fonts, width, height)
    canvas.paste(explanation.image.resize((CELL, CELL), Image.Resampling.BICUBIC), (MARGIN, top))
    y = top + CELL + 8
    for i, line in enumerate(("the image x", "x_c: with the name of c")):
        pen.text((MARGIN, y + i * LINE), line, fill=INK if i == 0 else SOFT, font=fonts.plain)
    for i, (candidate, lines) in enumerate(zip(candidates, names)):
        x = MARGIN + (i + 1) * (CELL + GAP)
        if i == selected:
            pen.rectangle((x - 6, top - 6, x + CELL + 5, height - 5), outline=CHOSEN, width=4)
        canvas.paste(candidate.picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (x, top))
        for j, line in enumerate(lines):
            pen.text((x, y + j * LINE), line, fill=CHOSEN if i == selected else INK, font=fonts.bold)
        pairs = (("p(c|x)", candidate.original), ("p(c|x_c)", candidate.conditional))
        for j, (label, value) in enumerate(pairs):
            larger = value == max(candidate.original, candidate.conditional)
            font, colour = (fonts.bold, INK) if larger else (fonts.plain, SOFT)
            at = y + (n_lines + j) * LINE
            pen.text((x, at), label, fill=SOFT, font=fonts.plain)
            pen.text((x + 84, at), f"{value:.3f}", fill=colour, font=font)
        if i == selected:
            pen.text((x, y + (n_lines + 2) * LINE), "selected", fill=CHOSEN, font=fonts.bold)
    return canvas


def _draw_list(explanation: Explanation, fonts: _Fonts) -> Image.Image:
    """A method that looks at the image alone: the image, and bars."""
    candidates = explanation.candidates
    width, bar = 2 * MARGIN + 3 * CELL + GAP, CELL - 60
    top = MARGIN + LINE + 8
    height = top + max(CELL, len(candidates) * (LINE + 6)) + MARGIN
    canvas, pen = _canvas(explanation, fonts, width, height)
    canvas.paste(explanation.image.resize((CELL, CELL), Image.Resampling.BICUBIC), (MARGIN, top))
    x = MARGIN + CELL + GAP
    for i, candidate in enumerate(candidates):
        y, chosen = top + i * (LINE + 6), i == explanation.selected
        colour, font = (CHOSEN, fonts.bold) if chosen else (INK, fonts.plain)
        pen.text((x, y), f"{candidate.original:.3f}", fill=colour, font=font)
        pen.rectangle((x + 54, y + 2, x + 54 + bar, y + LINE - 3), fill=LINES)
        pen.rectangle((x + 54, y + 2, x + 54 + round(bar * candidate.original), y + LINE - 3), fill=colour)
        left = x + 54 + bar + GAP
        pen.text((left, y), fonts.cut(clean_name(candidate.classname), width - MARGIN - left), fill=colour, font=font)
    return canvas


def _canvas(explanation: Explanation, fonts: _Fonts, width: int, height: int) -> tuple[Image.Image, Any]:
    canvas = Image.new("RGB", (width, height), GROUND)
    pen = ImageDraw.Draw(canvas)
    path = explanation.prediction.path.encode("utf-8", "replace").decode()
    pen.text((MARGIN, MARGIN - 4), fonts.cut_left(_one_line(path), width - 2 * MARGIN), fill=SOFT, font=fonts.plain)
    return canvas, pen


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """One sheet of several pictures, each below the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), GROUND)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet
