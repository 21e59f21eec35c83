"""What things cost: seconds, peak memory, and ratios of alternating runs.

    python tools/benchmark.py                        # everything
    python tools/benchmark.py --only text --json f   # see --help for the names

Networks have real sizes and random weights, on which their cost does not depend.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional

from runner import arguments  # isort: skip (makes `import dassl` work)
import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from dassl.config import get_cfg_default
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image
from torch.utils.benchmark import Measurement, Timer

import train
from trainers import cocoop, coop, logoprompt
from trainers.prompting.backbone import Backbone
from trainers.prompting.image_batch import CHUNK, ImageBatch
from trainers.prompting.method import Method
from trainers.prompting.results import write_text

Ways = dict[str, Callable[[], Any]]  # calls to compare, by name; the first one is the reference


# ------------------------------------------------------------------------------------------------- measuring


def compare(title: str, ways: Ways, rounds: int, memory: Optional[Callable[[str], float]] = None) -> list[dict]:
    """Medians of alternating runs, each after one to warm up; ratios are to the first way."""
    threads = torch.get_num_threads()
    timers = {way: Timer("call()", globals={"call": call}, num_threads=threads) for way, call in ways.items()}
    runs = [{way: timer.blocked_autorange(min_run_time=1e-9) for way, timer in timers.items()} for _ in range(rounds)]
    medians = {way: Measurement.merge([run[way] for run in runs])[0].median for way in ways}
    first = next(iter(medians.values()))
    return [
        {"label": f"{title}: {way}", "seconds": t, "ratio": t / first, "megabytes": memory and memory(way)}
        for way, t in medians.items()
    ]


def peak_memory(make: Callable[..., Ways], *args: Any) -> Callable[[str], float]:
    """Function that measures, for one of the ways that ``make`` makes, the peak in a process of its own in megabytes."""

    def measure(way: str) -> float:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak, make, args, way).result()

    return measure


def _peak(make: Callable[..., Ways], args: tuple, way: str) -> float:
    before = _highest()
    make(*args)[way]()
    return _highest() - before


def _highest() -> float:
    """Most memory that this process has used, in megabytes."""
    status = Path("/proc/self/status")  # getrusage starts from the peak of the process that started this one
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------------------------------------------- text prompts


def random_clip(arch: str = "RN50") -> torch.nn.Module:
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that the weights are random
    model = open_clip.create_model(arch, pretrained=None, precision="fp32")
    logging.disable(logging.NOTSET)
    return model


def method(module: Any, classes: int, arch: str = "RN50", **options: Any) -> Method:
    """The model of a method file for ImageNet's class names, with some of its keys."""
    cfg, kind = get_cfg_default(), module.CustomCLIP
    module.extend_cfg(cfg)
    cfg.INPUT.SIZE = (224, 224)
    for key, value in options.items():
        (cfg.TRAIN if key == "TEXT_CHUNK" else cfg.TRAINER[kind.config_name])[key] = value
    names = [IMAGENET_CLASSNAMES[i % len(IMAGENET_CLASSNAMES)] for i in range(classes)]
    return kind(cfg, names, Backbone(random_clip(arch), open_clip.tokenizer.SimpleTokenizer(), arch))


def padded(model: Method, prompts: torch.Tensor) -> torch.Tensor:
    """Text features of prompts (C, L, D), encoded like the original CLIP: all 77 tokens of each."""
    length = model.backbone.context_length
    prompts = F.pad(prompts, (0, 0, 0, length - prompts.shape[1]))
    return model.text_encoder(prompts, torch.full((len(prompts),), length - 1))


def text_ways(classes: int, n_ctx: int, csc: bool) -> Ways:
    """A forward and backward pass of the text encoder. More than 100 classes at 77 tokens need chunks to fit."""
    model = method(coop, classes, N_CTX=n_ctx, CSC=csc)
    chunked = method(coop, classes, N_CTX=n_ctx, CSC=csc, TEXT_CHUNK=100)

    def reference() -> None:
        for rows in torch.arange(classes).split(100):
            padded(model, model.learned()[0][rows]).sum().backward()

    ways = {"77 tokens": reference, "ours": lambda: model.text_features().sum().backward()}
    return ways if classes <= 100 else {**ways, "TEXT_CHUNK 100": lambda: chunked.text_features().sum().backward()}


def text(quick: bool) -> Iterator[dict]:
    cases = [(100, 16, False), (100, 4, True)] if quick else [(100, 16, False), (1000, 16, False), (1000, 4, True)]
    for case in cases:
        title = f"C = {case[0]}, M = {case[1]}, {'class-specific' if case[2] else 'shared'} context"
        rounds, memory = (1 if quick else 2 if case[0] > 100 else 5), peak_memory(text_ways, *case)
        yield from compare(title, text_ways(*case), rounds, None if quick and case[2] else memory)


def cocoop_ways(classes: int, batch: int) -> Ways:
    """A training step of CoCoOp; the reference encodes the prompts of every image by themselves."""
    model = method(cocoop, classes, CTX_INIT="a photo of a")
    image, label = torch.randn(batch, 3, 224, 224), torch.arange(batch) % classes

    def reference() -> None:
        logits = []
        for feature in ImageBatch(model.backbone, image).features():
            ctx = model.learned.ctx + model.learned.meta_net(feature)
            prompts, _ = model.learned.assemble(ctx.expand(classes, -1, -1))
            logits.append(model.backbone.logits(feature, padded(model, prompts)))
        F.cross_entropy(torch.stack(logits), label).backward()

    return {
        "77 tokens": reference,
        "ours": lambda: model.loss(ImageBatch(model.backbone, image), label).total.backward(),
    }


def cocoop_step(quick: bool) -> Iterator[dict]:
    for batch in (1,) if quick else (1, 4):
        title, rounds = f"C = 50, batch {batch}", 2 if quick else 5
        yield from compare(title, cocoop_ways(50, batch), rounds, peak_memory(cocoop_ways, 50, batch))


# ------------------------------------------------------------------------------------------------- LoGoPrompt


def step(quick: bool) -> Iterator[dict]:
    """The floor is the encoders alone on the same tensors: (2 + K) * B images and the text pass, (1 + K) * B images."""
    batch, classes, k = 8, 50, 5
    image, label = torch.randn(batch, 3, 224, 224), torch.arange(batch)
    copies = torch.randn(batch * (1 + k), 3, 224, 224)
    for arch in ("RN50",) if quick else ("RN50", "ViT-B-16"):
        model, rounds = method(logoprompt, classes, arch, CTX_INIT="a photo of a", K=k), 2 if quick else 5
        encode, text_features = torch.no_grad()(model.backbone.encode_image), model.text_features().detach()

        def encode_all(n: int, encode: Callable = encode) -> None:
            for part in (image, *copies[:n].split(CHUNK)):
                encode(part)

        def floor(model: Method = model, encode_all: Callable = encode_all) -> None:
            encode_all(len(copies))
            model.text_features().sum().backward()

        def train_step(model: Method = model) -> None:
            model.loss(ImageBatch(model.backbone, image), label).total.backward()

        def test(model: Method = model, text_features: torch.Tensor = text_features) -> None:
            with torch.no_grad():
                paths = [f"images/{i}.jpg" for i in range(batch)]
                model.score(ImageBatch(model.backbone, image, paths), text_features)

        title = f"{arch}, B = {batch}, C = {classes}, K = {k}"
        yield from compare(f"{title}, training", {"floor": floor, "step": train_step}, rounds)
        yield from compare(f"{title}, test", {"floor": lambda: encode_all(batch * k), "evaluation": test}, rounds)  # noqa: B023


# ------------------------------------------------------------------------------------------------- whole runs


def run(work: str, config: str, dataset: str, root: Path, folder: Path, seed: int, *opts: Any) -> tuple[float, Any]:
    """Seconds that a LoGoPrompt trainer takes to ``train`` or ``test``, and the trainer."""
    argv = [*arguments("LoGoPrompt", dataset, config, root, folder, seed, "all"), "DATALOADER.NUM_WORKERS", "0"]
    with redirect_stdout(io.StringIO()):
        cfg = train.setup_cfg(train.parse_args([*argv, *map(str, opts)]))
        train.set_random_seed(seed)
        trainer = train.build_trainer(cfg)
        start = time.perf_counter()
        getattr(trainer, work)()
        return time.perf_counter() - start, trainer


def rows_of(seconds: dict[str, float]) -> Iterator[dict]:
    first = next(iter(seconds.values()))
    yield from ({"label": label, "seconds": t, "ratio": t / first, "megabytes": None} for label, t in seconds.items())


def make_photos(root: Path, classes: int, images: int) -> None:
    """A data set of noise as large as photographs: one training image and ``images`` test images per class."""
    for label in range(classes):
        for part, count in (("train", 1), ("test", images)):
            folder = root / part / f"{label:04d}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([label, i]).integers(0, 256, (47, 63, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((500, 375)).save(folder / f"{i}.jpg")
    lines = [f"{label:04d} {name}\n" for label, name in enumerate(IMAGENET_CLASSNAMES[:classes])]
    (root / "classnames.txt").write_text("".join(lines), encoding="utf-8")


def sweep(quick: bool) -> Iterator[dict]:
    """Evaluations of untrained prompts; after the first, features of test images come from the store."""
    classes, images = (10, 1) if quick else (50, 2)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_photos(root / "photos", classes, images)
        torch.save(random_clip().state_dict(), root / "rn50.pt")
        opts = ("DATASET.NUM_SHOTS", 1, "MODEL.BACKBONE.NAME", root / "rn50.pt", "TEST.FEATURES")
        seconds, predictions = {}, {}
        for label, seed, store in (("no store", 1, ""), ("empty store", 1, "store"), ("full store", 1, "store"),
                                   ("another seed", 2, "store"), ("the same again", 2, "store")):  # fmt: skip
            where = root / "photos", root / label, seed, *opts, store and root / store
            seconds[label], trainer = run("test", "rn50", "folder", *where)
            found = trainer.evaluation.predictions
            if predictions.setdefault(seed, found) != found:
                raise SystemExit(f"error: {label}: other predictions than without a store")
    yield from rows_of(seconds)


def runs(quick: bool) -> Iterator[dict]:
    """Training on Shapes with the embedded CLIP: one epoch as shots grow; cached views instead of fresh ones."""
    with tempfile.TemporaryDirectory() as folder:

        def learn(epochs: int, shots: int, views: int) -> float:
            opts = ("OPTIM.MAX_EPOCH", epochs, "DATASET.NUM_SHOTS", shots, "TRAINER.LOGOPROMPT.VIEWS", views)
            opts = (*opts, "TEST.NO_TEST", True, "TRAIN.CHECKPOINT_FREQ", 0, "TRAIN.PRINT_FREQ", 10**6)
            with tempfile.TemporaryDirectory() as output:
                return run("train", "tiny96_ep10_ctxv1", "shapes", Path(folder), Path(output), 1, *opts)[0]

        learn(1, 1, 0)  # draws the images, imports TensorBoard
        yield from rows_of({f"1 epoch, {n} shots": learn(1, n, 0) for n in ((4, 16) if quick else (1, 2, 4, 8, 16))})
        epochs, shots, views = (8, 4, 2) if quick else (50, 16, 4)
        title = f"{epochs} epochs, {shots} shots"
        yield from rows_of({f"{title}, {v or 'fresh'} views": learn(epochs, shots, v) for v in (0, views)})


# ------------------------------------------------------------------------------------------------- command

BENCHMARKS: dict[str, tuple[str, Callable[[bool], Iterator[dict]]]] = {
    "text": ("Text encoder, forward and backward (12 layers, width 512)", text),
    "cocoop": ("A training step of CoCoOp, RN50", cocoop_step),
    "step": ("LoGoPrompt and the encoders alone, on the same tensors", step),
    "sweep": ("Evaluations of a sweep, RN50, 224 pixels, K = 5", sweep),
    "runs": ("Training runs on Shapes with the embedded CLIP, 32 classes, K = 5", runs),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smaller, for a first look")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}\n")
    found = {}
    for name in args.only:
        title, benchmark = BENCHMARKS[name]
        found[name] = list(benchmark(args.quick))
        frame = pd.DataFrame(found[name], columns=["label", "seconds", "ratio", "megabytes"]).astype(
            {"megabytes": float}
        )
        table = frame.to_markdown(index=False, floatfmt=("", ".2f", ".3f", ",.0f"), missingval="")
        print(f"## {title}{', quick: smaller' if args.quick else ''}\n\n{table}\n", flush=True)
    if args.json:
        write_text(str(args.json), json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
