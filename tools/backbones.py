"""List the architectures of open_clip that work here: image size, text tower, path, parameters, reading score.

    python tools/backbones.py RN50 local-dir:models/siglip ViTamin-S=models/mine.safetensors

``NAME`` is any ``MODEL.BACKBONE.NAME``; with ``arch=FILE``, the weights of an architecture. Only given names and `tiny`
have a reading score, see ``tools/figure1.py``: the share of the toy test images that are farther from the prompt of a
class than an image of its name is. Architectures are built without weights.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    title, example = __doc__.split("\n\n")[:2]
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=f"example:\n{example}", formatter_class=style)
    name = "weights to measure: MODEL.BACKBONE.NAME, or arch=FILE"
    parser.add_argument("names", nargs="*", metavar="NAME", help=name)
    parser.add_argument("--root", default=str(ROOT / "data"), help="folder of the toy data set, drawn if it is missing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and mistakes in the flags end here: the imports below take seconds

import figure1  # isort: skip (needs the line above; makes `import dassl` work)
import open_clip
import pandas as pd
import torch
from dassl.engine import build_trainer
from torch.overrides import TorchFunctionMode

import train
from trainers.prompting.backbone import TINY, load_clip
from trainers.prompting.clip_model import Backbone, is_causal
from trainers.prompting.errors import UserError, on_one_line
from trainers.prompting.open_clip_models import nearest

COLUMNS = ("backbone", "pixels", "text tower", "path", "M parameters", "tokenizer", "reads in %")


class Uninitialised(TorchFunctionMode):
    """Skips the initialisation of weights, which takes most of the time on the meta device."""

    names = ("uniform_", "normal_", "trunc_normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def built(arch: str) -> torch.nn.Module:
    """An architecture without weights, on the meta device. Raises RuntimeError where a package is missing."""
    logging.disable(logging.WARNING)  # that it has no weights
    try:
        with torch.device("meta"), Uninitialised():
            return open_clip.create_model(arch, device="meta")
    finally:
        logging.disable(logging.NOTSET)


def text_tower(model: torch.nn.Module) -> str:
    """How a text tower attends and where its feature is read."""
    tower = getattr(model, "text", model)
    if not hasattr(tower.transformer, "resblocks"):
        return type(tower.transformer).__name__
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax"))
    read = "class token" if getattr(tower, "cls_emb", None) is not None else {"last": "last token"}.get(pool, "[EOT]")
    return f"{'causal' if tower.attn_mask is not None else 'bidirectional'}, {read}"


def architecture(arch: str) -> list[Any]:
    """The row of an architecture."""
    model, text = built(arch), open_clip.get_model_config(arch)["text_cfg"]
    size, millions = model.visual.image_size, sum(p.numel() for p in model.parameters()) / 1e6
    path = "fast" if is_causal(getattr(model, "text", model)) else "plain"
    tokenizer = "transformers" if text.get("hf_tokenizer_name") else "included"
    return [
        arch,
        max(size) if isinstance(size, tuple) else size,
        text_tower(model),
        path,
        round(millions),
        tokenizer,
        "",
    ]


def reading_score(name: str, weights: str, backbone: Backbone, root: str) -> float:
    """Of zero-shot CLIP on the toy world, in %."""
    config = ROOT / "configs"
    words = [
        *("--trainer", "LoGoPrompt", "--no-train", "--root", root, "--backbone", name),
        *("--dataset-config-file", str(config / "datasets/shapes.yaml")),
        *("--config-file", str(config / "trainers/LoGoPrompt/tiny96_ep10_ctxv1.yaml")),
        *("MODEL.BACKBONE.WEIGHTS", weights, "INPUT.SIZE", str((backbone.input_resolution,) * 2)),
        *("INPUT.PIXEL_MEAN", str(list(backbone.pixel_mean)), "INPUT.PIXEL_STD", str(list(backbone.pixel_std))),
    ]
    values = figure1.zero_shot(build_trainer(train.setup_cfg(train.parse_args(words))))
    return figure1.reading_score(values)


def weights_row(given: str, root: str) -> list[Any]:
    """The row of a model with weights. Raises UserError."""
    name, weights = given.split("=", 1) if "=" in given else (given, "")
    with redirect_stdout(io.StringIO()):
        backbone = load_clip(name, weights=weights)
        read = reading_score(name, weights, backbone, root)
    tower = "causal, [EOT]" if backbone.causal_text else text_tower(backbone.text)
    path, millions = "fast" if backbone.causal_text else "plain", sum(p.numel() for p in backbone.parameters()) / 1e6
    return [given, backbone.input_resolution, tower, path, round(millions), "included", round(read, 1)]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a user's mistake."""
    args = parse_args(argv)
    rows, missing = [], []
    try:
        rows += [
            weights_row(name, args.root) for name in dict.fromkeys([*["tiny"] * os.path.isfile(TINY), *args.names])
        ]
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for arch in open_clip.list_models():
        try:
            rows.append(architecture(arch))
        except Exception as error:  # noqa: BLE001 (of open_clip, timm and transformers)
            near = nearest(arch, open_clip.get_model_config(arch)["vision_cfg"])
            missing.append(f"{arch}: {on_one_line(error)}; nearest that works: {near}")
    print(pd.DataFrame(rows, columns=COLUMNS).to_markdown(index=False))
    print(*(f"\n{len(missing)} cannot be built here:\n" * bool(missing)).splitlines(), *missing, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
