"""What things cost: one run, one table, absolute figures with ratios beside them.

    python tools/benchmark.py                         # everything
    python tools/benchmark.py --only lists --json f   # see --help for the names

Each measurement is a process of its own, so that peak memory is its own too.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

from runner import arguments  # isort: skip (makes `import dassl` work)
import numpy as np
import open_clip
import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import build_dataset
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from tqdm import tqdm

import train
from trainers import cocoop, logoprompt
from trainers.prompting.backbone import Backbone
from trainers.prompting.features import ImageBatch
from trainers.prompting.results import write_text
from trainers.prompting.text import PromptLearner, TextEncoder

WAYS = ("77 tokens", "ours")
IN_CHUNKS = "ours, TEXT_CHUNK 100"
IMAGENET = (1000, 1281, 50)  # classes, training images of each (1,281,167 in all), validation images of each


class Row(NamedTuple):
    """One measurement; ``ratio`` says how many times the cost of the table's first row."""

    label: str
    seconds: float
    megabytes: float  # peak above what the process had when it began
    note: str = ""
    ratio: Optional[float] = None


# ------------------------------------------------------------------------------------------------- measuring


def _measure(function: Callable[..., Any], args: tuple, results: Any) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    before = _peak()
    start = time.perf_counter()
    try:
        note = function(*args)
        results.put((time.perf_counter() - start, _peak() - before, note))
    except BaseException as error:
        results.put(error)
        raise


def _peak() -> float:
    """Most memory that this process has had, in megabytes."""
    try:  # getrusage begins with the peak of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    except (OSError, StopIteration):
        pass
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(label: str, function: Callable[..., str], *args: Any) -> Row:
    """Time and peak memory of a call in a process of its own; what it returns is the note."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measure, args=(function, args, results))
    process.start()
    found = results.get()
    process.join()
    if isinstance(found, BaseException):
        raise found
    return Row(label, *found)


# ------------------------------------------------------------------------------------------------- ImageNet's lists


def make_imagenet(root: Path, classes: int, train_images: int, val_images: int) -> None:
    """Folders and names as ImageNet has them; the images are empty files."""
    for part, count in (("train", train_images), ("val", val_images)):
        for label in tqdm(range(classes), desc=f"making {part}", disable=None):
            folder = root / "imagenet" / "images" / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                os.close(os.open(folder / f"n{label:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
    lines = [f"n{label:08d} class number {label}\n" for label in range(classes)]
    (root / "imagenet" / "classnames.txt").write_text("".join(lines))


def read_imagenet(root: Path, shots: int, seed: int) -> str:
    argv = arguments("CoOp", "imagenet", "vit_b16_ep50_ctxv1", root, root / "out", seed, "all")
    cfg = train.setup_cfg(train.parse_args([*argv, "DATASET.NUM_SHOTS", str(shots)]))
    data = build_dataset(cfg)
    return f"{len(data.train_x):,} training and {len(data.test):,} test images"


def lists(quick: bool) -> list[Row]:
    classes, train_images, val_images = (100, 200, 10) if quick else IMAGENET
    with tempfile.TemporaryDirectory() as folder:
        make_imagenet(Path(folder), classes, train_images, val_images)
        return [
            measure("16 shots, seed 1: folders are listed", read_imagenet, Path(folder), 16, 1),
            measure("16 shots, seed 2: the listing is kept", read_imagenet, Path(folder), 16, 2),
            measure("16 shots, seed 2: the sample is kept", read_imagenet, Path(folder), 16, 2),
            measure("all images", read_imagenet, Path(folder), 0, 1),
        ]


# ------------------------------------------------------------------------------------------------- text


def random_clip(arch: str = "RN50") -> torch.nn.Module:
    """A CLIP of real size with random weights: what it costs does not depend on them."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that the weights are random
    model = open_clip.create_model(arch, pretrained=None, precision="fp32")
    logging.disable(logging.NOTSET)
    return model


def backbone(arch: str = "RN50") -> Backbone:
    return Backbone(random_clip(arch), open_clip.tokenizer.SimpleTokenizer(), arch)


def names(n: int) -> list[str]:
    """ImageNet's class names: as long as names are."""
    return [IMAGENET_CLASSNAMES[i % len(IMAGENET_CLASSNAMES)] for i in range(n)]


def text_pass(way: str, classes: int, n_ctx: int, csc: bool) -> Callable[[], None]:
    """A forward and backward pass of the text encoder: all 77 tokens as CLIP does it, or as this repository does.

    77 tokens of more than 100 classes do not fit into the memory of an ordinary machine: they go in chunks of 100, in
    the same time and a fraction of the memory.
    """
    clip = backbone()
    learner = PromptLearner(clip, names(classes), n_ctx, csc=csc)
    encoder = TextEncoder(clip, 100 if way == IN_CHUNKS else 0)

    def ours() -> None:
        learner.zero_grad()
        encoder(*learner.parts()).sum().backward()

    def padded() -> None:
        learner.zero_grad()
        for rows in torch.arange(classes).split(100):
            prompts = learner()[0][rows]
            rest = prompts.new_zeros(len(rows), clip.context_length - prompts.shape[1], prompts.shape[2])
            last = torch.full((len(rows),), clip.context_length - 1)
            encoder(torch.cat([prompts, rest], dim=1), last).sum().backward()

    return padded if way == "77 tokens" else ours


def once(make: Callable[..., Callable[[], Any]], *args: Any) -> str:
    """Prepare, then call; for :func:`measure`, whose peak then holds what was prepared too (the model: 0.4 GB)."""
    make(*args)()
    return ""


def compare(title: str, ways: dict[str, Callable[[], Any]], repeats: int, memory: dict[str, Row]) -> list[Row]:
    """Medians of alternating runs after one to warm up; ratios are to the first way."""
    seconds: dict[str, list[float]] = {label: [] for label in ways}
    for i in range(repeats + 1):
        for label, call in ways.items():
            start = time.perf_counter()
            call()
            if i:
                seconds[label].append(time.perf_counter() - start)
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    first = medians[next(iter(ways))]
    peak = {label: memory[label].megabytes if label in memory else float("nan") for label in ways}
    return [Row(f"{title}: {label}", medians[label], peak[label], "", medians[label] / first) for label in ways]


def text(quick: bool) -> list[Row]:
    rows = []
    cases = [(100, 16, False)] if quick else [(100, 4, False), (100, 16, False), (1000, 16, False)]
    for classes, n_ctx, csc in (*cases, (100 if quick else 1000, 4, True)):
        title = f"C = {classes}, M = {n_ctx}, {'class-specific' if csc else 'generic'}"
        case = (classes, n_ctx, csc)
        labels = (*WAYS, IN_CHUNKS) if classes > 100 else WAYS
        memory = {way: measure(way, once, text_pass, way, *case) for way in labels}
        ways = {way: text_pass(way, *case) for way in labels}
        rows += compare(title, ways, 2 if quick or classes > 100 else 5, memory)
    return rows


# ------------------------------------------------------------------------------------------------- CoCoOp


def cocoop_step(way: str, classes: int, batch: int) -> Callable[[], None]:
    """A step of CoCoOp: the prompts of an image share what is the same in them, or each is encoded by itself."""
    cfg = get_cfg_default()
    cocoop.extend_cfg(cfg)
    cfg.TRAINER.COCOOP.CTX_INIT = "a photo of a"
    clip = backbone()
    model = cocoop.CustomCLIP(cfg, names(classes), clip)
    image, label = torch.randn(batch, 3, 224, 224), torch.arange(batch) % classes

    def logits_of_each() -> torch.Tensor:
        with torch.no_grad():
            features = clip.encode_image(image)
        found = []
        for feature in features:
            ctx = model.prompt_learner.ctx + model.prompt_learner.meta_net(feature)
            prompts, _ = model.prompt_learner.around(ctx.expand(classes, -1, -1))
            rest = prompts.new_zeros(classes, clip.context_length - prompts.shape[1], prompts.shape[2])
            last = torch.full((classes,), clip.context_length - 1)
            found.append(clip.logits(feature, model.text_encoder(torch.cat([prompts, rest], dim=1), last)))
        return torch.stack(found)

    def step() -> None:
        model.prompt_learner.zero_grad()
        logits = model(image) if way == "ours" else logits_of_each()
        torch.nn.functional.cross_entropy(logits, label).backward()

    return step


def cocoop_table(quick: bool) -> list[Row]:
    rows = []
    for batch in (1,) if quick else (1, 4):
        memory = {way: measure(way, once, cocoop_step, way, 50, batch) for way in WAYS}
        ways = {way: cocoop_step(way, 50, batch) for way in WAYS}
        rows += compare(f"CoCoOp, C = 50, batch {batch}", ways, 2 if quick else 5, memory)
    return rows


# ------------------------------------------------------------------------------------------------- a step, a test


def network(arch: str, classes: int, k: int = 5) -> logoprompt.CustomCLIP:
    cfg = get_cfg_default()
    logoprompt.extend_cfg(cfg)
    cfg.INPUT.SIZE = (224, 224)
    cfg.TRAINER.LOGOPROMPT.CTX_INIT, cfg.TRAINER.LOGOPROMPT.K = "a photo of a", k
    return logoprompt.CustomCLIP(cfg, names(classes), backbone(arch))


def step_ways(arch: str, batch: int, classes: int, k: int = 5) -> dict[str, Callable[[], Any]]:
    """The floor of a step, (2 + K) * B image encodings and the text pass, on the same tensors; and the step."""
    model = network(arch, classes, k)
    image, label = torch.randn(batch, 3, 224, 224), torch.arange(batch) % classes
    pasted = torch.randn(batch * (1 + k), 3, 224, 224)

    def floor() -> None:
        model.zero_grad()
        with torch.no_grad():
            model.backbone.encode_image(image)
            for part in pasted.split(logoprompt.CHUNK):
                model.backbone.encode_image(part)
        model.text_features().sum().backward()

    def step() -> None:
        model.zero_grad()
        model(image, label)[0].mean().backward()

    return {"floor": floor, "step": step}


def test_ways(arch: str, batch: int, classes: int, k: int = 5) -> dict[str, Callable[[], Any]]:
    """(1 + K) * B image encodings; and the selection, text features being there."""
    model = network(arch, classes, k)
    image = torch.randn(batch, 3, 224, 224)
    pasted = torch.randn(batch * k, 3, 224, 224)
    paths = [f"images/{i}.jpg" for i in range(batch)]
    with torch.no_grad():
        text_features = model.text_features()

    def floor() -> None:
        with torch.no_grad():
            model.backbone.encode_image(image)
            for part in pasted.split(logoprompt.CHUNK):
                model.backbone.encode_image(part)

    def evaluate() -> None:
        model.select(ImageBatch(model.backbone, paths, image, network=model), text_features)

    return {"floor": floor, "evaluation": evaluate}


def step(quick: bool) -> list[Row]:
    rows = []
    for arch in ("RN50",) if quick else ("RN50", "ViT-B-16"):
        ways = partial(compare, repeats=3 if quick else 5, memory={})
        rows += ways(f"{arch}, B = 8, C = 50, K = 5, training", step_ways(arch, 8, 50))
        rows += ways(f"{arch}, B = 8, C = 50, K = 5, test", test_ways(arch, 8, 50))
    return rows


def growth(quick: bool) -> list[Row]:
    """What a training step costs as C, K and B grow, RN50."""
    rows = []
    for classes, k, batch in ((50, 5, 8), (500, 5, 8), (50, 1, 8), (50, 10, 8), (50, 5, 2), (50, 5, 16)):
        if quick and (classes, k, batch) not in ((50, 5, 8), (50, 1, 8)):
            continue
        title = f"C = {classes}, K = {k}, B = {batch}"
        rows += compare(title, step_ways("RN50", batch, classes, k), 2 if quick else 3, {})[1:]
    return [row._replace(ratio=row.seconds / rows[0].seconds) for row in rows]


# ------------------------------------------------------------------------------------------------- whole runs


def trainer_of(config: str, dataset: str, root: Path, folder: Path, seed: int, *opts: Any) -> Any:
    """A LoGoPrompt trainer ready to train or to test; silent."""
    argv = arguments("LoGoPrompt", dataset, config, root, folder, seed, "all")
    cfg = train.setup_cfg(train.parse_args([*argv, *map(str, ("TRAIN.PRINT_FREQ", 10**6, *opts))]))
    train.set_random_seed(seed)
    with redirect_stdout(io.StringIO()):
        return train.build_trainer(cfg)


def seconds(call: Callable[[], Any]) -> float:
    with redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def make_photos(root: Path, classes: int, images: int) -> None:
    """A data set of noise in the size of photographs: an image of each class to train on, ``images`` to test on."""
    for label in range(classes):
        for part, count in (("train", 1), ("test", images)):
            folder = root / part / f"{label:04d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([label, i]).integers(0, 256, (47, 63, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((500, 375)).save(folder / f"{i}.jpg")
    lines = [f"{label:04d} {name}\n" for label, name in enumerate(names(classes))]
    (root / "classnames.txt").write_text("".join(lines), encoding="utf-8")


def sweep(quick: bool) -> list[Row]:
    """Evaluations of untrained prompts of two seeds; features of test images are kept from the first one on."""
    classes, images = (20, 1) if quick else (50, 2)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_photos(root / "photos", classes, images)
        torch.save(random_clip().state_dict(), root / "rn50.pt")
        rows, predictions = [], {}
        for label, seed, store in (
            ("nothing is kept", 1, ""),
            ("the first, features are kept", 1, root / "features.sqlite"),
            ("the second", 1, root / "features.sqlite"),
            ("another seed's first", 2, root / "features.sqlite"),
            ("another seed's second", 2, root / "features.sqlite"),
        ):
            words = ("DATASET.NUM_SHOTS", 1, "MODEL.BACKBONE.NAME", root / "rn50.pt", "DATALOADER.NUM_WORKERS", 0)
            trainer = trainer_of("rn50", "folder", root / "photos", root / label, seed, *words, "TEST.FEATURES", store)
            passed = seconds(trainer.test)
            same = predictions.setdefault(seed, trainer.predictions) == trainer.predictions
            note = f"{len(trainer.predictions)} images, {classes} classes, K = 5"
            rows.append(Row(label, passed, float("nan"), note if same else f"{note}: OTHER PREDICTIONS"))
    return rows


def learn(root: Path, epochs: int, shots: int, views: int) -> Row:
    """Train on Shapes with the embedded CLIP, without a test."""
    words = ("TRAINER.LOGOPROMPT.VIEWS", views, "DATASET.NUM_SHOTS", shots, "OPTIM.MAX_EPOCH", epochs)
    words = (*words, "TEST.NO_TEST", True, "TRAIN.CHECKPOINT_FREQ", 0, "DATALOADER.NUM_WORKERS", 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of("tiny96_ep10_ctxv1", "shapes", root, Path(folder), 1, *words)
        passed = seconds(trainer.train)
    label = f"{epochs} epoch{'s' if epochs > 1 else ''}, {shots} shots, "
    return Row(label + (f"{views} views, each encoded once" if views else "fresh views"), passed, float("nan"))


def runs(quick: bool) -> list[Row]:
    """Training runs as shots grow, and on kept views instead of fresh ones."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        learn(root, 1, 1, 0)  # draws the images, imports TensorBoard
        grown = [learn(root, 1, shots, 0) for shots in ((4, 16) if quick else (1, 2, 4, 8, 16))]
        epochs, shots, views = (8, 4, 2) if quick else (50, 16, 4)
        fresh, kept = (learn(root, epochs, shots, v) for v in (0, views))
    grown = [row._replace(ratio=row.seconds / grown[0].seconds) for row in grown]
    return [*grown, fresh._replace(ratio=1.0), kept._replace(ratio=kept.seconds / fresh.seconds)]


# ------------------------------------------------------------------------------------------------- command

BENCHMARKS: dict[str, tuple[str, Callable[[bool], list[Row]]]] = {
    "text": ("Text encoder, forward and backward (12 layers, width 512)", text),
    "cocoop": ("A step of CoCoOp, RN50", cocoop_table),
    "step": ("A step and a test of LoGoPrompt beside bare encoder calls on the same tensors", step),
    "growth": ("A training step as C, K and B grow, RN50", growth),
    "sweep": ("Evaluations of a sweep, RN50, 224 pixels", sweep),
    "runs": ("Training runs on Shapes with the embedded CLIP, 32 classes, K = 5", runs),
    "lists": ("Reading the lists of a data set of ImageNet's size (1,281,000 training images)", lists),
}


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| | seconds | ratio | peak memory, MB | |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = row.seconds / rows[0].seconds if row.ratio is None else row.ratio
        memory = "" if math.isnan(row.megabytes) else f"{row.megabytes:,.0f}"
        lines.append(f"| {row.label} | {row.seconds:.2f} | {ratio:.3f} | {memory} | {row.note} |")
    return "\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smaller, for a first look")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}\n")
    found = {}
    for name in args.only:
        title, run = BENCHMARKS[name]
        rows = run(args.quick)
        found[name] = [row._asdict() for row in rows]
        print(f"## {title}{', quick: smaller' if args.quick else ''}\n\n{table(rows)}\n")
    if args.json:
        write_text(str(args.json), json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
