"""The toy world: drawings of 32 kinds of things, made below the data root on first use, without a download.

``Shapes`` is the data set. ``ShapesShifted`` is a target domain: the same kinds in another style, on other backgrounds
and with more noise. The embedded CLIP was pre-trained on neither style.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from dassl.data.datasets import DATASET_REGISTRY
from numpy.random import RandomState
from tqdm import tqdm

from toy.drawing import KINDS, STYLES, draw
from trainers.prompting.errors import UserError

from .base import SplitDataset, data_root
from .splits import read_json

VERSION = 1  # of the drawings; increases when they change
MARK = "drawn.json"  # describes what the folder holds; written last
PIXELS = 128
COUNTS = {"train": 32, "val": 20, "test": 50}  # images of each kind


class DrawnDataset(SplitDataset):
    """A data set that is drawn where it is missing. An image depends on its style, split, kind and number alone."""

    style: str

    def __init__(self, cfg: Any) -> None:
        if cfg.DATASET.ROOT:
            os.makedirs(os.path.expanduser(cfg.DATASET.ROOT), exist_ok=True)
        draw_dataset(os.path.join(data_root(cfg), self.dataset_dir), self.style, self.split_file)
        super().__init__(cfg)


@DATASET_REGISTRY.register()
class Shapes(DrawnDataset):
    """``<root>/shapes/images/<kind>/<split>_01.png``."""

    dataset_dir, style = "shapes", "scene"


@DATASET_REGISTRY.register()
class ShapesShifted(DrawnDataset):
    """``<root>/shapes_shifted/images/<kind>/<split>_01.png``."""

    dataset_dir, style = "shapes_shifted", "chalk"


def draw_dataset(folder: str, style: str, split_file: str) -> None:
    """Draw a data set with its split file unless it exists; several processes may do so at once. Raises UserError."""
    expected = {"version": VERSION, "style": style, "pixels": PIXELS, "counts": COUNTS, "kinds": sorted(KINDS)}
    if _is_drawn(folder, expected):
        return
    temporary = tempfile.mkdtemp(dir=os.path.dirname(folder), prefix=f".{os.path.basename(folder)}-")
    try:
        split: dict[str, list] = {part: [] for part in COUNTS}
        numbers = [(part, i) for part, count in COUNTS.items() for i in range(count)]
        jobs = [(*job, *number) for job in enumerate(sorted(KINDS)) for number in numbers]
        print(f"Drawing {len(jobs)} images into {folder}")
        for label, kind, part, i in tqdm(jobs, desc=os.path.basename(folder), disable=None):
            path = f"{kind.replace(' ', '_')}/{part}_{i + 1:02d}.png"
            random = RandomState([VERSION, *(zlib.crc32(word.encode()) for word in (style, part, kind)), i])
            os.makedirs(os.path.join(temporary, "images", os.path.dirname(path)), exist_ok=True)
            draw(kind, STYLES[style], random, PIXELS).image.save(os.path.join(temporary, "images", path))
            split[part].append([path, label, kind])
        for name, content in ((split_file, split), (MARK, expected)):
            Path(temporary, name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.chmod(temporary, 0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not _is_drawn(folder, expected):  # not because another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_drawn(folder: str, expected: dict[str, Any]) -> bool:
    if not os.path.isdir(folder):
        return False
    with suppress(OSError, ValueError):
        if read_json(os.path.join(folder, MARK)) == expected:
            return True
    raise UserError(f"{folder}: not drawn by this version; delete the folder to have it drawn again")
