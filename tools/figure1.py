"""Draw Figure 1 of the paper for any data set and backbone: what zero-shot CLIP makes of pictures of class names.

    python tools/figure1.py --out figure1.png --root DATA --dataset-config-file configs/datasets/shapes.yaml \\
        --config-file configs/trainers/LoGoPrompt/tiny96_ep10_ctxv1.yaml

(a) Where the picture of nothing but a class name ranks among all test images, by similarity to "a photo of a [class].".
(b) The score p(y|x) of test images as they are, sorted, and with the block of their class pasted in. The numbers are
printed. Further flags and KEY VALUE pairs are those of ``train.py``.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # isort: skip (needs the line above; makes `import dassl` work)
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from dassl.engine import build_trainer
from tqdm import tqdm

from trainers.prompting.errors import UserError
from trainers.prompting.names import clean_name
from trainers.prompting.selection import log_probabilities
from trainers.prompting.synthetic import render_blocks
from trainers.prompting.text import HAND_MADE, encode_texts

BLOCKS = ("true", "hard", "other")  # of the true class, of the most probable wrong class, of any wrong class


def build(args: argparse.Namespace) -> Any:
    """A LoGoPrompt trainer, of which nothing is trained. Its banners are not shown."""
    with redirect_stdout(io.StringIO()):
        trainer = build_trainer(train.setup_cfg(args))
    trainer.set_model_mode("eval")
    return trainer


@torch.no_grad()
def zero_shot(trainer: Any, title: str = "figure 1") -> dict[str, torch.Tensor]:
    """What zero-shot CLIP says of the N test images, as they are and with a block.

    Returns:
        ``label`` (N,) y; ``cosine`` (N, C) of the images as they are with the classes' prompts; ``none`` (N, C)
        p(.|x); for each of ``BLOCKS``, whose class is c: ``true``, ``hard``, ``other`` (N, C) p(.|x_c), and
        ``class of true`` … (N,) that class c.
    """
    network = trainer.model
    backbone = network.backbone
    text_features = encode_texts(backbone, [HAND_MADE.format(clean_name(name)) for name in trainer.classnames])
    n_classes = len(text_features)
    found: dict[str, list[torch.Tensor]] = {}
    for batch in tqdm(trainer.test_loader, desc=title, disable=None, leave=False):
        image, label = trainer.parse_batch_test(batch)
        features = backbone.encode_image(image)
        p = log_probabilities(backbone.logits(features, text_features)).exp()
        hard = p.scatter(1, label.unsqueeze(1), -1).argmax(dim=1)
        other = (label + max(1, n_classes // 2)) % n_classes
        classes = torch.stack([label, hard, other], dim=1)
        conditional = network.conditional_features(image, classes, network.places(trainer.relative_paths(batch)))
        pasted = log_probabilities(backbone.logits(conditional, text_features)).exp()
        values = {"label": label, "cosine": features.float() @ text_features.float().t(), "none": p}
        for i, name in enumerate(BLOCKS):
            values[name], values[f"class of {name}"] = pasted[:, i], classes[:, i]
        for key, value in values.items():
            found.setdefault(key, []).append(value.cpu())
    return {key: torch.cat(pieces) for key, pieces in found.items()}


@torch.no_grad()
def text_images(trainer: Any) -> torch.Tensor:
    """(C,) cosines of the picture of nothing but a class name, as large as an image, with the prompt of that class."""
    network, method = trainer.model, trainer.cfg.TRAINER.LOGOPROMPT
    size, names = network.image_size, trainer.classnames
    pictures = render_blocks(names, size, size, method.VISUAL_SEED, method.MIN_CONTRAST, method.FONT)
    pictures = network.normalise(pictures.to(trainer.device))
    features = torch.cat([network.backbone.encode_image(part) for part in pictures.split(100)])
    texts = encode_texts(network.backbone, [HAND_MADE.format(clean_name(name)) for name in names])
    return (features.float() * texts.float()).sum(dim=1).cpu()


def of(scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """(N, C) scores -> (N,) those of one class each."""
    return scores.gather(1, classes.unsqueeze(1)).squeeze(1)


def ranks(cosine: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """(N, C) cosines of images, (C,) of the text image of each class -> (C,) how many images are nearer, plus one."""
    return (cosine > text).sum(dim=0) + 1


def draw(values: dict[str, torch.Tensor], text: torch.Tensor, classnames: Sequence[str], path: str) -> None:
    """Both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    cosine, label = values["cosine"], values["label"]
    own = [cosine[label == c, c] for c in range(len(text))]
    order = text.argsort(descending=True).tolist()
    for place, c in enumerate(order):
        if not len(own[c]):
            continue  # a class without test images
        left.plot([place, place], [own[c].min(), own[c].max()], color="#9aa5b1", lw=max(0.5, min(4, 150 / len(text))))
    left.plot([], [], color="#9aa5b1", lw=4, label="images of the class")
    left.plot(range(len(text)), text[order], "o", ms=max(2, min(5, 160 / len(text))), color="#d1495b", label="its name")
    if len(order) <= 40:
        left.set_xticks(range(len(order)), [clean_name(classnames[c]) for c in order], rotation=90, fontsize=7)
    else:
        left.set_xlabel("classes")
    left.set_ylabel('cosine with "a photo of a [class]."')
    left.set_title("(a) pictures of nothing but the class name", fontsize=10)
    left.legend(frameon=False, fontsize=8)

    plain, pasted = of(values["none"], label), of(values["true"], label)
    order = plain.argsort()
    size = max(1, min(8, 6000 / len(plain)))
    right.scatter(
        range(len(plain)), pasted[order], s=size, color="#d1495b", label="with the block of their class", lw=0
    )
    right.plot(plain[order], color="#2b3a4a", lw=1.5, label="test images as they are")
    right.set_xlabel("test images, sorted")
    right.set_ylabel("zero-shot score p(y|x)")
    right.set_title(f"(b) raised in {100 * (pasted > plain).float().mean():.0f} % of the images", fontsize=10)
    right.legend(frameon=False, fontsize=8, markerscale=2.5)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", required=True, help="picture to write (.png, .svg, .pdf)")
    ours, rest = parser.parse_known_args(argv)
    try:
        trainer = build(train.parse_args(["--trainer", "LoGoPrompt", "--no-train", *rest]))
        values, text = zero_shot(trainer), text_images(trainer)
        draw(values, text, trainer.classnames, ours.out)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    label, n = values["label"], len(values["label"])
    rank = ranks(values["cosine"], text).float()
    print(
        f"(a) The picture of a class name is nearer to its prompt than {100 * (1 - (rank - 1) / n).mean():.1f} % "
        f"of the {n} test images; it ranks first for {int((rank == 1).sum())} of {len(rank)} classes."
    )
    plain, pasted = of(values["none"], label), of(values["true"], label)
    print(
        f"(b) The block of its class raises the score of {100 * (pasted > plain).float().mean():.1f} % of the images, "
        f"on average from {plain.mean():.3f} to {pasted.mean():.3f}."
    )
    print(ours.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
