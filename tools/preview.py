"""Draw a contact sheet of visual prompts and class-conditional images, before any training or of a run.

    python tools/preview.py --out sheet.jpg --root DATA --dataset-config-file configs/datasets/caltech101.yaml
    python tools/preview.py --out sheet.png --classnames "tabby cat" "fire truck"

A row per test image: the original, then the image with the block of its own class and those of others, as LoGoPrompt
sees them at test time; or the blocks of class names. Further flags and KEY VALUE pairs are those of ``train.py``. With
``--model-dir RUN`` the tuned blocks of a run are shown; with class names, each follows the rendered one.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # isort: skip (needs the line above; makes `import dassl` work)
import torch
from dassl.data.datasets import build_dataset
from dassl.data.transforms import build_transform
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from trainers.prompting.checkpoint import load_checkpoint, remap_state_to_classes
from trainers.prompting.data import read_image
from trainers.prompting.errors import UserError
from trainers.prompting.names import relative_path
from trainers.prompting.paste import paste, places_of, uniform_of_paths
from trainers.prompting.render import VisualPrompts, blocks_of

GAP = 4  # pixels between pictures
WIDTH = 192  # of a picture; smaller ones are enlarged by a whole number
CONFIG = Path(train.__file__).with_name("configs") / "trainers" / "LoGoPrompt" / "vit_b16_ctxv1.yaml"


def tuned(blocks: torch.Tensor, classnames: Sequence[str], model_dir: str) -> torch.Tensor:
    """Blocks (C, 3, h, w) as a run tuned them; classes that it did not train keep theirs. Raises UserError."""
    path, checkpoint = load_checkpoint(model_dir)
    pixels, (_, _, h, w) = checkpoint["state_dict"].get("visual_prompts.pixels", torch.empty(0)), blocks.shape
    if pixels.shape[1:] != blocks.shape[1:]:
        remedy = "train with TRAINER.LOGOPROMPT.TUNE_VISUAL True, and give the run's --config-file here"
        raise UserError(f"{path}: no tuned visual prompts of {h}x{w} pixels in it; {remedy}")
    saved = {"pixels": pixels}, classnames, checkpoint["classnames"], path
    return remap_state_to_classes(VisualPrompts(blocks), *saved)["pixels"]


def contact_sheet(cfg: Any, n_images: int, n_others: int, model_dir: str) -> list[torch.Tensor]:
    """A row (1 + n, 3, H, H) per image of the test set, each of another class; RGB in [0, 1]."""
    dataset, draw, options = build_dataset(cfg), random.Random(max(cfg.SEED, 0)), cfg.TRAINER.LOGOPROMPT
    by_class = {item.label: item for item in draw.sample(dataset.test, len(dataset.test))}
    items = draw.sample(list(by_class.values()), min(n_images, len(by_class)))
    transform, size, rows = build_transform(cfg, is_train=False, choices=()), cfg.INPUT.SIZE[0], []
    blocks = blocks_of(options, dataset.classnames, size)
    blocks = tuned(blocks, dataset.classnames, model_dir) if model_dir else blocks
    uniform = uniform_of_paths([relative_path(item.impath, cfg.DATASET.ROOT) for item in items], options.VISUAL_SEED)
    for item, place in zip(items, places_of(uniform, size, tuple(blocks.shape[-2:]), options.LOCATION)):
        others = draw.sample([c for c in range(len(blocks)) if c != item.label], min(n_others, len(blocks) - 1))
        images = transform(read_image(item.impath)).expand(1 + len(others), -1, -1, -1)
        rows.append(torch.cat([images[:1], paste(images, blocks[[item.label, *others]], place.expand(len(images), 2))]))
    return rows


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--out", required=True, help="picture to write (.png, .jpg)")
    add("--images", type=int, default=4, help="test images, one per row")
    add("--others", type=int, default=2, help="blocks of other classes per image")
    add("--classnames", nargs="+", default=[], help="draw the blocks of these names, without a data set")
    ours, rest = parser.parse_known_args(argv)
    if ours.images < 1 or ours.others < 0:
        parser.error("--images must be at least 1, --others at least 0")
    names = list(takewhile(lambda word: not re.fullmatch(r"[A-Z_]+(\.[A-Z_]+)+", word), ours.classnames))
    rest += ours.classnames[len(names) :]  # KEY VALUE pairs after the names
    try:
        args = train.parse_args(["--config-file", str(CONFIG), "--trainer", "LoGoPrompt", *rest])
        args.backbone = "tiny"  # train.py checks the name; no weights are loaded
        args.opts = [*(("DATASET.NAME", "Caltech101") if names else ()), *args.opts]  # likewise
        cfg = train.setup_cfg(args)
        if names:
            blocks = blocks_of(cfg.TRAINER.LOGOPROMPT, names, cfg.INPUT.SIZE[0])
            versions = [blocks, tuned(blocks, names, args.model_dir)] if args.model_dir else [blocks]
            rows = list(torch.stack(versions, dim=1).flatten(0, 1).split(2))
        else:
            rows = contact_sheet(cfg, ours.images, ours.others, args.model_dir)
        scale = max(1, WIDTH // rows[0].shape[-1])
        rows = [row.repeat_interleave(scale, 2).repeat_interleave(scale, 3) for row in rows]
        sheet = make_grid(torch.cat(rows), nrow=len(rows[0]), padding=GAP, pad_value=1.0)
        to_pil_image(sheet).save(ours.out, quality=90)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{ours.out}: {sheet.shape[2]}x{sheet.shape[1]} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
