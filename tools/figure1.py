"""Draw Figure 1 of the paper for any data set and backbone: how zero-shot CLIP reads rendered class names.

    python tools/figure1.py --out figure1.png --root DATA --dataset-config-file configs/datasets/shapes.yaml \\
        --config-file configs/trainers/LoGoPrompt/tiny96_ep10_ctxv1.yaml

(a) The similarity of an image that shows only a class name to "a photo of a [class].", next to the test images'.
(b) The score p(y|x) of the test images, sorted, and with the block of their class; a table of this and other blocks is
printed, and whether they help the selection (docs/will_it_help.md). Further flags and KEY VALUE pairs are those of
``train.py``.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
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
from trainers.prompting.results import selection_prospect
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
    (N, C) p(.|x_c) and its class c (N,), ``class of …``; ``names`` (C, C) cosines of drawn class names and all prompts.
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
    names = (F.normalize(features.float(), dim=-1) @ prompts.float().T).cpu()
    return {"names": names, **{key: torch.cat(pieces) for key, pieces in found.items()}}


def reading_score(values: dict[str, torch.Tensor]) -> float:
    """Share in % of pairs of a test image and a class for which an image of the class name is closer to the prompt."""
    return 100 * (values["cosine"] <= values["names"].diag()).float().mean().item()


def log_odds_rises(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """(2, N): how much its own block raises the log-odds of the true class, and those of the hard one."""
    rows, found = range(len(values["label"])), []
    for block in ("true", "hard"):
        classes = values[f"class of {block}"]
        before, after = (torch.logit(values[key][rows, classes].double(), eps=1e-6) for key in ("none", block))
        found.append(after - before)
    return torch.stack(found)


def prospect(values: dict[str, torch.Tensor]) -> str:
    """Whether the blocks help the selection; differences within two standard errors do not count."""
    true, wrong = log_odds_rises(values)
    error = ((true - wrong).std() / len(true) ** 0.5).item()
    return selection_prospect(true.mean().item(), wrong.mean().item(), max(0.1, 2 * error))


def verdicts(values: dict[str, torch.Tensor]) -> list[str]:
    """Whether this backbone reads class names, and whether their blocks help the selection."""
    own = values["names"].argmax(dim=1) == torch.arange(len(values["names"]))
    read, chance = 100 * own.float().mean().item(), 100 / len(own)
    reads = "reads" if read > 50 else "hardly reads" if read > 3 * chance else "does not read"
    rows = range(len(values["label"]))
    y, c = (torch.maximum(values["none"], values[b])[rows, values[f"class of {b}"]] for b in ("true", "hard"))
    accuracies = (100 * x.float().mean() for x in (values["none"].argmax(dim=1) == values["label"], y > c))
    closest = f"{read:.0f} % of the drawn ones are closest to their own prompt (chance: {chance:.1f} %)"
    return [
        f"This backbone {reads} class names: {closest}.",
        prospect(values),
        "Zero-shot accuracy is {:.1f} % without selection, {:.1f} % with it between these two.".format(*accuracies),
    ]


def draw(values: dict[str, torch.Tensor], classnames: Sequence[str], path: str) -> None:
    """Both panels, and below them what they say."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    names = values["names"].diag()
    label, order, n = values["label"], names.argsort(descending=True), len(classnames)
    own = [(i, values["cosine"][label == c, c]) for i, c in enumerate(order) if (label == c).any()]
    places, lows, highs = zip(*((i, cosine.min(), cosine.max()) for i, cosine in own))
    left.vlines(
        places, lows, highs, color=GREY, lw=max(0.5, min(4, 150 / n)), label="its test images, lowest to highest"
    )
    left.plot(names[order], "o", ms=max(2, min(5, 160 / n)), color=RED, label="an image of the class name")
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
        axes.set_title(axes.get_title(), fontsize=10, pad=24)
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, markerscale=1.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("\n".join(textwrap.fill(line, 125) for line in verdicts(values)), fontsize=9)
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
    label, closer = values["label"], (values["cosine"] > values["names"].diag()).float()
    share, firsts = reading_score(values), int((closer.sum(dim=0) == 0).sum())
    print(f"(a) Images of class names are closer to their prompts than {share:.1f} % of the {len(label)} test images,")
    print(f"and the closest of all for {firsts} of {closer.shape[1]} classes.\n\n(b)")
    plain, rows = values["none"][range(len(label)), label], []
    for block in ("none", *BLOCKS):
        p, right = values[block][range(len(label)), label], values[block].argmax(dim=1) == label
        rows.append([block, p.mean().item(), *(100 * x.float().mean().item() for x in (p > plain, right))])
    print(pd.DataFrame(rows, columns=["block", "p(y|x)", "raised in %", "accuracy"]).to_markdown(index=False))
    print("", *verdicts(values), ours.out, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
