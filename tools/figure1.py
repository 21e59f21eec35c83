"""Draw Figure 1 of the paper for any data set and backbone: how zero-shot CLIP reads rendered class names.

    python tools/figure1.py --out figure1.png --root DATA --dataset-config-file configs/datasets/shapes.yaml \\
        --config-file configs/trainers/LoGoPrompt/tiny96_ep10_ctxv1.yaml

(a) The similarity of an image that shows only a class name to "a photo of a [class].", next to the test images'.
(b) The score p(y|x) of the test images, sorted, and with the block of their class; a table of this and other blocks is
printed. Further flags and KEY VALUE pairs are those of ``train.py``.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_flags  # isort: skip (needs the line above)


def parse_args(argv: Optional[Sequence[str]] = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this program, and the words for train.py."""
    title, examples = __doc__.split("\n\n")[:2]
    epilog = f"examples:\n{examples}\n\nand of train.py:\n\n{train_flags.listed()}"
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=epilog, formatter_class=style)
    parser.add_argument("--out", required=True, help="picture to write (.png, .svg, .pdf)")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and mistakes in the flags end here: the imports below take seconds

import train  # isort: skip (makes `import dassl` work)
import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from dassl.engine import build_trainer

from trainers.prompting.errors import UserError
from trainers.prompting.names import clean_name
from trainers.prompting.render import render_blocks
from trainers.prompting.selection import log_probabilities
from trainers.prompting.templates import DEFAULT_TEMPLATE
from trainers.prompting.text_encoder import encode_texts

plt.switch_backend("Agg")
BLOCKS = ("true", "hard", "other")  # of the true class, of the most probable wrong class, of any wrong class
GREY, RED, BLUE = "#9aa5b1", "#d1495b", "#2b3a4a"


@torch.no_grad()
def zero_shot(trainer: Any) -> dict[str, torch.Tensor]:
    """Zero-shot scores of the N test images, without a block and with one.

    Returns ``label`` (N,); ``cosine`` (N, C) of images and prompts; ``none`` (N, C) p(.|x); for each of ``BLOCKS``
    (N, C) p(.|x_c) and its class c (N,), ``class of …``; ``name`` (C,) cosines of drawn class names and their prompts.
    """
    model, backbone, names, found = trainer.model, trainer.backbone, trainer.classnames, defaultdict(list)
    prompts = encode_texts(backbone, [DEFAULT_TEMPLATE.format(clean_name(name)) for name in names])
    for images, label in trainer.source.batches(trainer.test_loader, use_store=False):
        p = log_probabilities(backbone.logits(images.features(), prompts)).exp()
        hard = p.scatter(1, label.unsqueeze(1), -1).argmax(dim=1)
        classes = torch.stack([label, hard, (label + max(1, len(names) // 2)) % len(names)], dim=1)
        features = images.pasted(model.visual_prompts, classes, model.places(images))
        conditional = log_probabilities(backbone.logits(features, prompts)).exp()
        values = {"label": label, "cosine": images.features().float() @ prompts.float().T, "none": p}
        values |= {f"class of {name}": c for name, c in zip(BLOCKS, classes.unbind(1))}
        for key, value in {**values, **dict(zip(BLOCKS, conditional.unbind(1)))}.items():
            found[key].append(value.cpu())
    options, size = model.options, backbone.input_resolution
    pictures = render_blocks(names, size, size, options.VISUAL_SEED, options.MIN_CONTRAST, options.FONT)
    pictures = (pictures.to(trainer.device) - model.mean) / model.std
    features = torch.cat([backbone.encode_image(part) for part in pictures.split(100)])
    name = F.cosine_similarity(features.float(), prompts.float()).cpu()
    return {"name": name, **{key: torch.cat(pieces) for key, pieces in found.items()}}


def reading_score(values: dict[str, torch.Tensor]) -> float:
    """Share in % of pairs of a test image and a class for which an image of the class name is closer to the prompt."""
    return 100 * (values["cosine"] <= values["name"]).float().mean().item()


def draw(values: dict[str, torch.Tensor], classnames: Sequence[str], path: str) -> None:
    """Both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    label, order, n = values["label"], values["name"].argsort(descending=True), len(classnames)
    own = [(i, values["cosine"][label == c, c]) for i, c in enumerate(order) if (label == c).any()]
    places, lows, highs = zip(*((i, cosine.min(), cosine.max()) for i, cosine in own))
    left.vlines(places, lows, highs, color=GREY, lw=max(0.5, min(4, 150 / n)), label="images of the class")
    left.plot(values["name"][order], "o", ms=max(2, min(5, 160 / n)), color=RED, label="its name")
    if n <= 40:
        left.set_xticks(range(n), [clean_name(classnames[c]) for c in order], rotation=90, fontsize=7)
    left.set(ylabel='cosine with "a photo of a [class]."', title="(a) images that show only the class name")
    plain, pasted = (values[key][range(len(label)), label] for key in ("none", "true"))
    by_score, size = plain.argsort(), max(1, min(8, 6000 / len(plain)))
    right.scatter(range(len(plain)), pasted[by_score], s=size, color=RED, label="with the block of their class", lw=0)
    right.plot(plain[by_score], color=BLUE, lw=1.5, label="test images")
    title = f"(b) higher with the block in {100 * (pasted > plain).float().mean():.0f} % of the images"
    right.set(xlabel="test images, sorted", ylabel="zero-shot score p(y|x)", title=title)
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a user's mistake."""
    ours, rest = parse_args(argv)
    try:
        with redirect_stdout(io.StringIO()):
            trainer = build_trainer(train.setup_cfg(train.parse_args(["--trainer", "LoGoPrompt", "--no-train", *rest])))
        values = zero_shot(trainer)
        draw(values, trainer.classnames, ours.out)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    label, closer = values["label"], (values["cosine"] > values["name"]).float()
    share, firsts = reading_score(values), int((closer.sum(dim=0) == 0).sum())
    print(f"(a) Images of class names are closer to their prompts than {share:.1f} % of the {len(label)} test images,")
    print(f"and the closest of all for {firsts} of {closer.shape[1]} classes.\n\n(b)")
    plain, rows = values["none"][range(len(label)), label], []
    for block in ("none", *BLOCKS):
        p, right = values[block][range(len(label)), label], values[block].argmax(dim=1) == label
        rows.append([block, p.mean().item(), *(100 * x.float().mean().item() for x in (p > plain, right))])
    print(pd.DataFrame(rows, columns=["block", "p(y|x)", "raised in %", "accuracy"]).to_markdown(index=False))
    print(ours.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
