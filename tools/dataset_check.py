"""Checks a data set, offline, without writing: are its images there, do they decode, are they as many as published?"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Optional

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm
from yacs.config import CfgNode

import datasets
from dataset_sources import Source
from datasets.splits import check_labels
from trainers.prompting.data import FORMATS
from trainers.prompting.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "datasets"
CHUNK = 32  # images that a thread takes at a time


@dataclass
class Result:
    """What a check found."""

    images: int = 0
    classes: int = 0
    problems: list[str] = field(default_factory=list)  # one line each


def dataset_class(config: str, root: str) -> tuple[type, object]:
    """The class behind ``configs/datasets/<config>.yaml``, and a config to read it from a data root."""
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg((CONFIGS / f"{config}.yaml").read_text(encoding="utf-8")))
    cfg.DATASET.ROOT = root
    cfg.SEED = 1
    return DATASET_REGISTRY.get(cfg.DATASET.NAME), cfg


def check(config: str, root: str, source: Optional[Source], workers: int) -> Result:
    """Check a data set below a data root.

    Args:
        source: how many images and classes there should be; None: nobody knows.
        workers: threads that decode.
    """
    result = Result()
    cls, cfg = dataset_class(config, root)
    try:
        folder, parts = cls.survey(cfg)
        if cls.test_only:
            parts = {"train": parts["test"], "val": [], "test": parts["test"]}
        check_labels(parts, source=folder)
    except (UserError, OSError) as error:
        result.problems.append(str(error))
        return result
    paths = list(dict.fromkeys(entry.path for entries in parts.values() for entry in entries))
    result.images = len(paths)
    result.classes = len({entry.label for entry in parts["train"]})
    result.problems = [f"{path}: {reason}" for path, reason in bad_images(config, folder, paths, workers)]
    if source is not None:
        for part, count in source.counts.items():
            if len(parts[part]) != count:
                result.problems.append(f"{config}: {len(parts[part]):,} {part} images, {count:,} are published")
        if result.classes != source.classes:
            result.problems.append(f"{config}: {result.classes} classes, {source.classes} are published")
    return result


def bad_images(title: str, folder: str, paths: list[str], workers: int) -> Iterator[tuple[str, str]]:
    """Full path and reason of every image that cannot be trained on.

    Threads do, since Pillow lets go of Python's lock while it decodes.
    """
    bar = tqdm(total=len(paths), desc=title, unit=" images", leave=False, disable=None)
    with warnings.catch_warnings(), ThreadPool(workers) as pool, bar:
        warnings.simplefilter("ignore")  # of odd metadata, and of images large but not too large
        full = (os.path.join(folder, path) for path in paths)
        for path, reason in pool.imap(_why_bad, full, chunksize=CHUNK):
            bar.update()
            if reason:
                yield path, reason


def _why_bad(path: str) -> tuple[str, str]:
    """The path, and why the image there does not decode as in training, or nothing."""
    try:
        if os.path.getsize(path) == 0:
            return path, "empty file"
        with Image.open(path, formats=FORMATS) as image:
            image.convert("RGB")
        return path, ""
    except FileNotFoundError:
        return path, "missing"
    except UnidentifiedImageError:
        return path, "no image"
    except Image.DecompressionBombError:
        return path, f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which Pillow refuses"
    except Exception as error:  # noqa: BLE001 (damaged files raise OSError, SyntaxError, ValueError and others)
        return path, getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
