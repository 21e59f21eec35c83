"""What things cost: seconds, peak memory, and ratios of alternating runs.

    python tools/benchmark.py                        # everything
    python tools/benchmark.py --only text --json f   # see --help for the names

Networks have real sizes and random weights, on which their cost does not depend. On a GPU batches have 32 images (parts
text, cocoop, step, precision and methods).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Optional

from runner import arguments  # isort: skip (makes `import dassl` work)
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch.utils.benchmark import Measurement, Timer

import train
import trainers
from trainers import cocoop, coop, logoprompt
from trainers.prompting.backbone import Backbone
from trainers.prompting.image_batch import CHUNK, ImageBatch
from trainers.prompting.method import Method
from trainers.prompting.results import write_text

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 32 if DEVICE.type == "cuda" else 8
Ways = dict[str, Callable[[], Any]]  # calls to compare, by name; the first one is the reference
Row = dict[str, Any]  # label, seconds, ratio, megabytes


def compare(title: str, ways: Ways, rounds: int, memory: Sequence[float] = ()) -> list[Row]:
    """Medians of alternating runs, each after one to warm up; ratios are to the first way."""
    threads = torch.get_num_threads()
    timers = {way: Timer("call()", globals={"call": call}, num_threads=threads) for way, call in ways.items()}
    runs = [{way: timer.blocked_autorange(min_run_time=1) for way, timer in timers.items()} for _ in range(rounds)]
    return rows_of({f"{title}: {w}": Measurement.merge([run[w] for run in runs])[0].median for w in ways}, memory)


def rows_of(seconds: dict[str, float], memory: Sequence[float] = ()) -> list[Row]:
    first, pairs = next(iter(seconds.values())), zip_longest(seconds.items(), memory)
    return [{"label": name, "seconds": t, "ratio": t / first, "megabytes": peak} for (name, t), peak in pairs]


def peaks(make: Callable[..., Ways], *args: Any) -> list[float]:
    """Peak memory in megabytes of each of the ways that ``make`` makes, in a process of its own (on Linux)."""
    found = []
    for way in make(*args) if sys.platform == "linux" else ():
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found.append(pool.submit(_peak, make, args, way).result())
    return found


def _peak(make: Callable[..., Ways], args: tuple, way: str) -> float:
    def highest() -> float:  # not from getrusage, which starts from the parent's
        if DEVICE.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10

    before = highest()
    make(*args)[way]()
    return highest() - before


def random_clip(arch: str = "RN50") -> torch.nn.Module:
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that the weights are random
    model = open_clip.create_model(arch, pretrained=None, precision="fp32")
    logging.disable(logging.NOTSET)
    return model


def method(
    kind: type[Method], classes: int, arch: str = "RN50", dtype: torch.dtype = torch.float32, **options: Any
) -> Method:
    """The model of a method for ImageNet's class names, with some of its keys, on the device and in a precision."""
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    cfg.INPUT.SIZE = (224, 224)
    if options:
        cfg.TRAINER[kind.config_name].update(options)
    names = [IMAGENET_CLASSNAMES[i % len(IMAGENET_CLASSNAMES)] for i in range(classes)]
    backbone = Backbone(random_clip(arch), open_clip.tokenizer.SimpleTokenizer(), arch)
    if dtype != torch.float32:
        backbone.cast_weights(dtype)
    return kind(cfg, names, backbone.to(DEVICE)).to(DEVICE)


def random_images(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, 224, 224) images and (B,) labels, on the device."""
    return torch.randn(batch, 3, 224, 224, device=DEVICE), torch.arange(batch, device=DEVICE)


def training_step(model: Method, batch: int) -> Callable[[], None]:
    """Loss and gradients of a batch of random images, without the optimizer."""
    image, label = random_images(batch)
    return lambda: model.backward(model.loss(ImageBatch(model.backbone, image), label), lambda loss: loss)


def padded(model: Method, prompts: torch.Tensor) -> torch.Tensor:
    """Text features of prompts (C, L, D), encoded like the original CLIP: all 77 tokens of each."""
    prompts = F.pad(prompts, (0, 0, 0, model.backbone.context_length - prompts.shape[1]))
    return model.text_encoder(prompts, torch.full((len(prompts),), prompts.shape[1] - 1).to(DEVICE))


def text_ways(classes: int, n_ctx: int, csc: bool) -> Ways:
    """A forward and backward pass of the text encoder. More than 100 classes at 77 tokens need chunks to fit."""
    model = method(coop.CustomCLIP, classes, N_CTX=n_ctx, CSC=csc)

    def reference() -> None:
        for rows in torch.arange(classes).split(100):
            padded(model, model.learned()[0][rows]).sum().backward()

    def ours(chunk: int = 0) -> None:
        model.text_encoder.chunk = chunk
        model.text_features().sum().backward()

    chunked = {"TEXT_CHUNK 100": lambda: ours(100)} if classes > 100 else {}
    return {"77 tokens": reference, "ours": ours, **chunked}


def text(quick: bool) -> Iterator[Row]:
    cases = [(100, 16, False), (100, 4, True)] if quick else [(100, 16, False), (1000, 16, False), (1000, 4, True)]
    for case in cases:
        title = f"C = {case[0]}, M = {case[1]}, {'class-specific' if case[2] else 'shared'} context"
        yield from compare(title, text_ways(*case), 1 if quick or case[0] > 100 else 3, peaks(text_ways, *case))


def cocoop_ways(classes: int, batch: int) -> Ways:
    """A training step of CoCoOp; the reference encodes the prompts of every image by themselves."""
    model = method(cocoop.CustomCLIP, classes, CTX_INIT="a photo of a")
    image, label = random_images(batch)

    def reference() -> None:
        logits, learned = [], model.learned
        for feature in ImageBatch(model.backbone, image).features():
            prompts, _ = learned.assemble((learned.ctx + learned.meta_net(feature)).expand(classes, -1, -1))
            logits.append(model.backbone.logits(feature, padded(model, prompts)))
        F.cross_entropy(torch.stack(logits), label).backward()

    ours = lambda: model.loss(ImageBatch(model.backbone, image), label).total.backward()  # noqa: E731
    return {"77 tokens": reference, "ours": ours}


def cocoop_step(quick: bool) -> Iterator[Row]:
    for batch in (1,) if quick else (1, 4):
        title, rounds = f"C = 50, batch {batch}", 2 if quick else 5
        yield from compare(title, cocoop_ways(50, batch), rounds, peaks(cocoop_ways, 50, batch))


def step_ways(arch: str, batch: int, classes: int, k: int) -> tuple[Ways, Ways]:
    """Training and test; the floor is the encoders alone, on the same tensors: (2 + K) * B images and the text pass."""
    model = method(logoprompt.CustomCLIP, classes, arch, CTX_INIT="a photo of a", K=k)
    (image, label), paths = random_images(batch), [f"{i}.jpg" for i in range(batch)]
    (copies, _), text_features = random_images(batch * (1 + k)), model.text_features().detach()

    @torch.no_grad()
    def encode(n: int) -> None:
        for part in (image, *copies[: batch * n].split(CHUNK)):
            model.backbone.encode_image(part)

    def floor() -> None:
        encode(1 + k)
        model.text_features().sum().backward()

    step = lambda: model.loss(ImageBatch(model.backbone, image), label).total.backward()  # noqa: E731
    test = torch.no_grad()(lambda: model.score(ImageBatch(model.backbone, image, paths), text_features))
    return {"floor": floor, "step": step}, {"floor": lambda: encode(k), "evaluation": test}


def step(quick: bool) -> Iterator[Row]:
    for arch in ("RN50",) if quick else ("RN50", "ViT-B-16"):
        for title, ways in zip(("training", "test"), step_ways(arch, BATCH, classes=50, k=5)):
            yield from compare(f"{arch}, B = {BATCH}, C = 50, K = 5, {title}", ways, 2 if quick else 5)


def precision(quick: bool) -> Iterator[Row]:
    """A training step of LoGoPrompt with the image encoder in float32 and in half precision (``PREC``)."""
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if DEVICE.type == "cuda":
        precisions["fp16"] = torch.float16
    for arch in ("RN50", "ViT-B-16"):
        ways = {}
        for name, dtype in precisions.items():
            ways[name] = training_step(method(logoprompt.CustomCLIP, 50, arch, dtype, CTX_INIT="a photo of a"), BATCH)
        yield from compare(f"{arch}, B = {BATCH}, C = 50, K = 5", ways, 2 if quick else 5)


class RandomFeatures:
    """16 training images per class, and no validation images."""

    def __init__(self, model: Method) -> None:
        n = 16 * len(model.classnames)
        features = torch.randn(n, model.backbone.n_features, device=DEVICE)
        self.found = features, torch.arange(n, device=DEVICE) % len(model.classnames)

    def train_features(self, passes: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return self.found


def methods(quick: bool) -> Iterator[Row]:
    """A training step of every method that has steps, relative to CoOp's; on a GPU in CLIP's own precision, fp16."""
    known = {name: TRAINER_REGISTRY.get(name).method_class for name in TRAINER_REGISTRY.registered_names()}
    ways = {}
    for name, kind in sorted(known.items(), key=lambda item: item[0] != "CoOp"):
        if kind.learns and kind.fit is Method.fit:
            model = method(kind, 50, "ViT-B-16", torch.float16 if DEVICE.type == "cuda" else torch.float32)
            model.stages()[0].begin(RandomFeatures(model))
            ways[name] = training_step(model, BATCH)
    yield from compare(f"ViT-B-16, B = {BATCH}, C = 50", ways, 1 if quick else 3)


def run(work: str, config: str, root: Path, output: Path, seed: int, *opts: Any) -> tuple[float, Any]:
    """Seconds that a LoGoPrompt trainer takes to ``train`` or ``test`` on Shapes, and the trainer."""
    argv = arguments("LoGoPrompt", "shapes", config, root, output, seed, "all")
    argv += ["DATALOADER.NUM_WORKERS", "0", "TRAIN.PRINT_FREQ", "1000000", *map(str, opts)]
    with redirect_stdout(io.StringIO()):
        train.set_random_seed(seed)
        trainer = train.build_trainer(train.setup_cfg(train.parse_args(argv)))
        start = time.perf_counter()
        getattr(trainer, work)()
        return time.perf_counter() - start, trainer


def sweep(quick: bool) -> Iterator[Row]:
    """Evaluations of untrained prompts; after the first, image features come from the store."""
    with tempfile.TemporaryDirectory() as folder:
        weights, store = Path(folder, "rn50.pt"), Path(folder, "features.sqlite")
        torch.save(random_clip().state_dict(), weights)
        few = ("DATASET.SUBSAMPLE_CLASSES", "base", "DATASET.NUM_SHOTS", 1) if quick else ("DATASET.NUM_SHOTS", 4)
        opts = (*few, "TEST.SPLIT", "val", "MODEL.BACKBONE.NAME", weights, "TEST.FEATURES")
        names = {"no store": 1, "empty store": 1, "full store": 1, "another seed": 2, "the same again": 2}
        seconds, predictions = {}, {}
        for (name, seed), used in zip(names.items(), ("", *[store] * 4)):
            seconds[name], trainer = run("test", "rn50", Path(folder), Path(folder, name), seed, *opts, used)
            found = trainer.evaluation.predictions
            if predictions.setdefault(seed, found) != found:
                raise SystemExit(f"error: {name}: other predictions than without a store")
    yield from rows_of({f"{len(found)} images, {name}": value for name, value in seconds.items()})


def runs(quick: bool) -> Iterator[Row]:
    """Training with the embedded CLIP: one epoch as shots grow; cached views instead of fresh ones."""
    with tempfile.TemporaryDirectory() as folder:

        def learn(epochs: int, shots: int, views: int = 0) -> float:
            opts = ("OPTIM.MAX_EPOCH", epochs, "DATASET.NUM_SHOTS", shots, "TRAINER.LOGOPROMPT.VIEWS", views)
            output = Path(tempfile.mkdtemp(dir=folder))
            return run("train", "tiny96_ep10_ctxv1", Path(folder), output, 1, *opts, "TEST.NO_TEST", True)[0]

        learn(1, 1)  # draws the images, imports TensorBoard
        yield from rows_of({f"1 epoch, {n} shots": learn(1, n) for n in ((4, 16) if quick else (1, 2, 4, 8, 16))})
        e, n, views = (8, 4, 2) if quick else (50, 16, 4)
        yield from rows_of({f"{e} epochs, {n} shots, {v or 'fresh'} views": learn(e, n, v) for v in (0, views)})


BENCHMARKS: dict[str, tuple[str, Callable[[bool], Iterator[Row]]]] = {
    "text": ("Text encoder, forward and backward (12 layers, width 512)", text),
    "cocoop": ("A training step of CoCoOp, RN50", cocoop_step),
    "step": ("LoGoPrompt and the encoders alone, on the same tensors", step),
    "precision": ("A training step of LoGoPrompt in two precisions of the image encoder", precision),
    "methods": ("A training step of every method, relative to CoOp", methods),
    "sweep": ("Evaluations of a sweep on Shapes, RN50, 224 pixels, K = 5", sweep),
    "runs": ("Training runs on Shapes with the embedded CLIP, 32 classes, K = 5", runs),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smaller, for a first look")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    gpu = f"{torch.cuda.get_device_name()}, " if DEVICE.type == "cuda" else ""
    print(f"{gpu}{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}\n")
    found = {}
    for name in args.only:
        title, benchmark = BENCHMARKS[name]
        found[name] = list(benchmark(args.quick))
        frame = pd.DataFrame(found[name]).fillna({"megabytes": ""})
        table = frame.to_markdown(index=False, floatfmt=("", ".2f", ".3f", ",.0f"))
        print(f"## {title}{', quick: smaller' if args.quick else ''}\n\n{table}\n", flush=True)
    if args.json:
        write_text(str(args.json), json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
