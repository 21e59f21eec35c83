"""Draw a contact sheet of visual prompts and class-conditional images, before any training or of a run.

    python tools/preview.py --out sheet.jpg --root DATA --dataset-config-file configs/datasets/caltech101.yaml
    python tools/preview.py --out sheet.png --classnames "tabby cat" "fire truck"

With a data set, a row per test image: the original, then the image with the block of its own class and those of other
classes. With class names alone, their blocks. Blocks, colours and places are those of LoGoPrompt at test time; further
flags and KEY VALUE pairs are those of ``train.py``. With ``--model-dir RUN``, a run that tuned its visual prompts, the
images show the tuned ones; with class names, each block stands beside what became of it.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # isort: skip (needs the line above; makes `import dassl` work)
import torch
from dassl.data.datasets import build_dataset
from dassl.data.transforms import build_transform
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from trainers.logoprompt import draw_visual_prompts
from trainers.prompting.checkpoints import load_checkpoint
from trainers.prompting.data import read_image
from trainers.prompting.errors import UserError
from trainers.prompting.names import relative_path
from trainers.prompting.synthetic import VisualPrompts, fixed_places, paste
from trainers.prompting.trainer import per_class_state

GAP = 4  # pixels between pictures
CONFIG = Path(train.__file__).parent / "configs" / "trainers" / "LoGoPrompt" / "vit_b16_ctxv1.yaml"


def tuned(blocks: torch.Tensor, classnames: Sequence[str], model_dir: str) -> torch.Tensor:
    """What a run made of the rendered blocks (C, 3, h, w); blocks of classes that it did not train stay as they are.

    Raises:
        UserError: no checkpoint, or of a run without tunable visual prompts or with blocks of another size.
    """
    path, checkpoint = load_checkpoint(model_dir)
    pixels = checkpoint["state_dict"].get("visual_prompts.pixels")
    if pixels is None:
        raise UserError(f"{path}: its visual prompts were not tuned; train with TRAINER.LOGOPROMPT.TUNE_VISUAL True")
    if pixels.shape[1:] != blocks.shape[1:]:
        raise UserError(
            f"{path}: its blocks have {pixels.shape[2]}x{pixels.shape[3]} pixels, here they have "
            f"{blocks.shape[2]}x{blocks.shape[3]}; give the --config-file that it was trained with"
        )
    prompts = VisualPrompts(blocks)
    return per_class_state(prompts, {"pixels": pixels}, classnames, checkpoint["classnames"])["pixels"]


def contact_sheet(cfg: Any, n_images: int, n_others: int, seed: int, model_dir: str = "") -> torch.Tensor:
    """A row per image of the test set, each of another class: (3, height, width), RGB in [0, 1]."""
    dataset = build_dataset(cfg)
    draw = random.Random(seed)
    by_class = {item.label: item for item in draw.sample(dataset.test, len(dataset.test))}
    items = draw.sample(list(by_class.values()), min(n_images, len(by_class)))
    transform = build_transform(cfg, is_train=False, choices=())
    images = torch.stack([transform(read_image(item.impath)) for item in items])

    size, method = cfg.INPUT.SIZE[0], cfg.TRAINER.LOGOPROMPT
    blocks = draw_visual_prompts(method, dataset.classnames, size)
    if model_dir:
        blocks = tuned(blocks, dataset.classnames, model_dir)
    paths = [relative_path(item.impath, cfg.DATASET.ROOT) for item in items]
    places = fixed_places(paths, method.VISUAL_SEED, size, tuple(blocks.shape[-2:]), method.LOCATION)
    cells = []
    for image, place, item in zip(images, places, items):
        others = draw.sample([c for c in range(len(blocks)) if c != item.label], min(n_others, len(blocks) - 1))
        classes = [item.label, *others]
        conditional = paste(image.expand(len(classes), -1, -1, -1), blocks[classes], place.expand(len(classes), 2))
        cells += [image, *conditional]
    return make_grid(torch.stack(cells), nrow=len(cells) // len(items), padding=GAP, pad_value=1.0)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True, help="picture to write (.png, .jpg)")
    parser.add_argument("--images", type=int, default=4, help="test images, one a row")
    parser.add_argument("--others", type=int, default=2, help="blocks of other classes per image")
    parser.add_argument("--classnames", nargs="+", help="draw the blocks of these names instead of a data set's images")
    ours, rest = parser.parse_known_args(argv)
    if ours.images < 1 or ours.others < 0:
        parser.error("--images must be at least 1, --others at least 0")
    names = ours.classnames or []
    keys = [i for i, name in enumerate(names) if re.fullmatch(r"[A-Z_]+(\.[A-Z_]+)+", name)]
    if keys:  # KEY VALUE pairs that follow the names
        names, rest = names[: keys[0]], [*rest, *names[keys[0] :]]
    try:
        args = train.parse_args(["--config-file", str(CONFIG), "--trainer", "LoGoPrompt", *rest])
        args.backbone = "tiny"  # no weights are loaded; train.py wants a name of some that are there
        if names:
            args.opts = ["DATASET.NAME", "Caltech101", *args.opts]  # none is read; train.py wants a known name
        cfg = train.setup_cfg(args)
        if names:
            blocks = draw_visual_prompts(cfg.TRAINER.LOGOPROMPT, names, cfg.INPUT.SIZE[0])
            if args.model_dir:
                blocks = torch.stack([blocks, tuned(blocks, names, args.model_dir)], dim=1).flatten(0, 1)
            sheet = make_grid(blocks, nrow=2, padding=GAP, pad_value=1.0)
        else:
            sheet = contact_sheet(cfg, ours.images, ours.others, max(cfg.SEED, 0), args.model_dir)
        to_pil_image(sheet).save(ours.out, quality=90)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{ours.out}: {sheet.shape[2]}x{sheet.shape[1]} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
