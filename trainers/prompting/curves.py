"""The curves of a training run: values of single steps for TensorBoard, and the same as a table, ``curves.csv``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, Optional

import torch
from dassl.data.transforms import build_transform
from torchvision.utils import make_grid
from yacs.config import CfgNode

from .data import read_image
from .image_batch import ImageBatch
from .method import Method
from .names import flat_config, relative_path
from .results import write_text

SHOWN = 4  # test images on the sheet of TensorBoard


class Curves:
    """``curves.csv``: a row for every step of training, with the values that TensorBoard has of it.

    Validation results are in the row of an epoch's last step. Rows are written at the end of every epoch.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "curves.csv")
        self._rows: dict[int, dict[str, Any]] = {}  # by step, counted from 0 as in TensorBoard
        self._step: dict[str, float] = {}

    def resume(self, epochs_done: int) -> None:
        """Continue the table of a run that has finished a number of epochs."""
        if epochs_done and os.path.isfile(self.path):
            with open(self.path, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if (row.get("epoch") or "").isdigit()]
            self._rows = {int(row["step"]): row for row in rows if int(row["epoch"]) <= epochs_done}

    def before_write(self, step: dict[str, float]) -> None:
        """Note the values of a step, of which Dassl writes the means over the epoch so far."""
        self._step = {f"train/{name}": value for name, value in step.items()}

    def add(self, tag: str, value: float, step: int, epoch: int) -> float:
        """Add what Dassl writes for TensorBoard, in an epoch counted from 1; returns the value to write."""
        value = self._step.pop(tag, value)
        kind, name = tag.split("/", 1)
        if kind == "train":
            self._rows.setdefault(step, {"epoch": epoch, "step": step})[name] = value
        elif self._rows and kind == "val":
            self._rows[max(self._rows)][tag] = value
        return value

    def after_epoch(self) -> None:
        """Write the table."""
        if not self._rows:
            return
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        table = csv.DictWriter(text := io.StringIO(), columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self._rows.values())
        write_text(self.path, text.getvalue())


def describe(writer: Any, cfg: CfgNode, method: Method, items: Sequence[Any]) -> None:
    """Hyperparameters and, if the method has pictures to show, a sheet of some test images for TensorBoard.

    Nothing is drawn from a random state.
    """
    from torch.utils.tensorboard.summary import hparams  # takes seconds

    values = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flat_config(cfg).items()}
    for summary in hparams(values, {"test/accuracy": 0}):  # the value is that of the curve of this name
        writer.file_writer.add_summary(summary)
    items = items[:: max(1, len(items) // SHOWN)][:SHOWN]
    if items and (sheet := sheet_of(cfg, method, items)) is not None:
        writer.add_image("class_conditional_images", sheet, 0)


@torch.no_grad()
def sheet_of(cfg: CfgNode, method: Method, items: Sequence[Any]) -> Optional[torch.Tensor]:
    """(3, H, W) in [0, 1]: a row for each image; None without pictures of the method."""
    with redirect_stdout(io.StringIO()):  # Dassl describes the transform
        transform = build_transform(cfg, is_train=False)
    device = next(method.backbone.parameters()).device
    pixels = torch.stack([transform(read_image(item.impath)) for item in items]).to(device)
    images = ImageBatch(method.backbone, pixels, [relative_path(item.impath, cfg.DATASET.ROOT) for item in items])
    pictures = method.pictures(images, torch.tensor([item.label for item in items], device=device))
    if pictures is None:
        return None
    return make_grid(pictures.flatten(0, 1).float().cpu().clamp(0, 1), nrow=pictures.shape[1], pad_value=1.0)
