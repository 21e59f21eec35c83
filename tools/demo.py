"""The method on the embedded world, in minutes, with nothing but the Python packages: ``make demo``.

Zero-shot CLIP, CoOp and LoGoPrompt are trained on the base classes of "Shapes" and tested on base and new classes. Into
``output/demo/`` go a table, a bar chart, a contact sheet of class-conditional images with what was selected, and the
run folders. KEY VALUE pairs overrule the configs.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Optional

from runner import ROOT, arguments, base_to_new, relative, training_bar  # isort: skip (makes `import dassl` work)
import matplotlib
import torch
from dassl.engine import build_trainer
from matplotlib.patches import Rectangle

import train
from trainers.prompting.errors import UserError
from trainers.prompting.results import harmonic_mean, write_text
from trainers.prompting.selection import top_classes
from trainers.prompting.synthetic import paste

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

METHODS = ("ZeroshotCLIP", "CoOp", "LoGoPrompt")
DATASET, CONFIG = "shapes", "tiny96_ep10_ctxv1"
COLOURS = {"ZeroshotCLIP": "#9aa5b1", "CoOp": "#4c86c6", "LoGoPrompt": "#d1495b"}


def table(rows: dict[str, tuple[float, float, float]]) -> str:
    """Base, New and H of each method, as Markdown that reads well in a terminal too."""
    lines = ["| Method       |  Base |   New |     H |", "|--------------|------:|------:|------:|"]
    lines += [f"| {name:12} | {base:5.2f} | {new:5.2f} | {h:5.2f} |" for name, (base, new, h) in rows.items()]
    return "\n".join(lines)


def bar_chart(rows: dict[str, tuple[float, float, float]], path: Path) -> None:
    """Base, New and H side by side."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    width = 0.8 / len(rows)
    for i, (name, values) in enumerate(rows.items()):
        places = [x + (i - (len(rows) - 1) / 2) * width for x in range(3)]
        bars = axes.bar(places, values, width * 0.94, label=name, color=COLOURS[name])
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes.set_xticks(range(3), ["Base", "New", "H"])
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 109)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def contact_sheet(trainer: Any, path: Path, n_rows: int = 6) -> None:
    """Test images, their candidates' class-conditional images, and what was selected.

    A row per image: the image with its most probable class, then x_c for the top-K classes c with p(c|x_c). The frame
    marks the class selected, max(p(c|x), p(c|x_c)) being largest: green where it is the true one. Half of the rows are
    images where the selection changed the prediction, as far as there are any.
    """
    network, classnames = trainer.model, trainer.classnames
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trainer.cfg.INPUT.PIXEL_MEAN, trainer.cfg.INPUT.PIXEL_STD))
    trainer.prompt_text = trainer.text_features()
    changed, kept = [], []
    for batch in trainer.test_loader:
        image, label = trainer.parse_batch_test(batch)
        paths = trainer.relative_paths(batch)
        selected = network.select(network.batch(image, paths), trainer.prompt_text).argmax(dim=1)
        log_p = network.log_p(network.backbone.encode_image(image), trainer.prompt_text)
        for i in range(len(image)):
            pile = kept if selected[i] == log_p[i].argmax() else changed
            pile.append((image[i : i + 1], paths[i], int(label[i]), log_p[i : i + 1], int(selected[i])))
    kept = kept[:: max(1, len(kept) // n_rows)]
    changed = changed[:: max(1, 2 * len(changed) // n_rows)]
    rows = (changed[: n_rows // 2] + kept)[:n_rows]

    k = min(network.k, len(classnames))
    figure, grid = plt.subplots(
        len(rows), 1 + k, figsize=(1.25 * (1 + k), 1.5 * len(rows) + 0.2), squeeze=False, layout="constrained"
    )
    for axes, (image, name, label, log_p, selected) in zip(grid, rows):
        candidates = top_classes(log_p, network.k)
        places = network.places([name])
        features = network.conditional_features(image, candidates, places)
        conditional = network.log_p(features, trainer.prompt_text)[0].exp()
        pictures = paste(image.expand(k, -1, -1, -1), network.visual_prompts[candidates[0]], places.expand(k, 2))
        best = int(candidates[0, 0])
        titles = [f"true: {classnames[label]}\nx: {classnames[best]} {log_p[0, best].exp():.2f}"]
        titles += [
            f"{classnames[c]}\n{log_p[0, c].exp():.2f} → {conditional[j, c]:.2f}" for j, c in enumerate(candidates[0])
        ]
        for j, (axis, picture, title) in enumerate(zip(axes, [image[0], *pictures], titles)):
            axis.imshow((picture.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set_title(title, fontsize=6.5)
            axis.axis("off")
            if j and candidates[0, j - 1] == selected:
                colour = "#2a9d3a" if selected == label else "#d62828"
                axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, lw=4, ec=colour))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def trained(root: Path, folder: Path, seed: int, opts: Sequence[str]) -> Any:
    """The LoGoPrompt trainer of a finished run, with its test set of base classes."""
    argv = arguments("LoGoPrompt", DATASET, CONFIG, root, folder / "sheet", seed, "base", ("--eval-only",))
    with redirect_stdout(io.StringIO()):
        trainer = build_trainer(train.setup_cfg(train.parse_args([*argv, *opts])))
        trainer.load_model(str(folder / "base"))
    trainer.set_model_mode("eval")
    return trainer


def empty_folder(folder: Path) -> None:
    """Make a folder for the runs, in place of an earlier demo's. Raises UserError where it is somebody else's."""
    mark = folder / ".demo"
    if folder.exists() and not mark.exists():
        raise UserError(f"{folder}: not made by a demo, so it is not replaced; choose another --output")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo", help="folder for everything")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that overrule the configs")
    args = parser.parse_args(argv)
    output, started = args.output.resolve(), time.time()
    rows = {}
    try:
        empty_folder(output / "runs")
        for i, method in enumerate(METHODS, start=1):
            print(f"[{i}/{len(METHODS)}] {method}: base-to-new on {DATASET}", flush=True)
            with training_bar(method):
                runs = base_to_new(
                    method, DATASET, CONFIG, output / "data", output / "runs" / method, args.seed, args.opts
                )
            base, new = (run["metrics"]["accuracy"] for run in runs)
            rows[method] = (base, new, harmonic_mean(base, new))
        text = table(rows)
        write_text(str(output / "table.md"), f"{text}\n")
        bar_chart(rows, output / "chart.png")
        contact_sheet(
            trained(output / "data", output / "runs" / "LoGoPrompt", args.seed, args.opts),
            output / "class_conditional.png",
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}\n\n{time.time() - started:.0f} s; seed {args.seed}, {DATASET}, embedded CLIP (tiny)")
    print('What to make of these numbers: README.md, "The embedded world"')
    for name in ("table.md", "chart.png", "class_conditional.png", "runs"):
        print(relative(output / name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
