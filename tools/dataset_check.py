"""Check a data set offline, without writing: do its images exist and decode, are they as many as published?"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Optional

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from tqdm import tqdm
from yacs.config import CfgNode

import datasets
from dataset_fetch import Source
from datasets.splits import check_labels
from trainers.prompting.data import read_image
from trainers.prompting.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "datasets"


@dataclass
class Result:
    """What a check found."""

    images: int = 0
    classes: int = 0
    problems: list[str] = field(default_factory=list)  # one line each


def dataset_class(config: str, root: str) -> tuple[type, CfgNode]:
    """Return the class of ``configs/datasets/<config>.yaml`` and a config to read it from a data root."""
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg((CONFIGS / f"{config}.yaml").read_text(encoding="utf-8")))
    cfg.DATASET.ROOT, cfg.SEED = root, 1
    return DATASET_REGISTRY.get(cfg.DATASET.NAME), cfg


def check(config: str, root: str, source: Optional[Source], workers: int) -> Result:
    """Check a data set below a data root.

    Args:
        source: how many images and classes there should be, if known.
        workers: threads that decode; Pillow releases Python's lock meanwhile.
    """
    cls, cfg = dataset_class(config, root)
    try:
        folder, parts = cls.survey(cfg)
        check_labels({**parts, "train": parts["test"]} if cls.test_only else parts, source=folder)
    except (UserError, OSError) as error:
        return Result(problems=[str(error)])
    paths = dict.fromkeys(os.path.join(folder, entry.path) for entries in parts.values() for entry in entries)
    result = Result(len(paths), len({entry.label for entry in parts["test"] + parts["train"]}))
    with warnings.catch_warnings(), ThreadPool(workers) as pool:
        warnings.simplefilter("ignore")  # of odd metadata
        reasons = pool.imap(_problem, paths, chunksize=32)
        result.problems += filter(None, tqdm(reasons, config, len(paths), leave=False, unit=" images", disable=None))
    if source is not None:
        for part, count in source.counts.items():
            if len(parts[part]) != count:
                result.problems.append(f"{config}: {len(parts[part]):,} {part} images, but {count:,} are published")
        if result.classes != source.classes:
            result.problems.append(f"{config}: {result.classes} classes, but {source.classes} are published")
    return result


def _problem(path: str) -> str:
    """Return why an image cannot be read for training, or nothing."""
    try:
        read_image(path)
        return ""
    except OSError as error:
        return str(error)
