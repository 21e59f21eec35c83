"""The method on the toy world, in minutes, with nothing but the Python packages: ``make demo``.

Trains CoOp and LoGoPrompt on the base classes of "Shapes" and tests them and zero-shot CLIP on base and new classes.
Writes a table, a bar chart, a contact sheet of class-conditional images and the run folders into ``output/demo/``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from runner import ROOT, arguments, relative, run  # isort: skip (makes `import dassl` work)
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

from trainers.predictor import Predictor, survey
from trainers.prompting.errors import UserError
from trainers.prompting.results import harmonic_mean, write_text

plt.switch_backend("Agg")
DATASET = "shapes"
COLOURS = {"ZeroshotCLIP": "#9aa5b1", "CoOp": "#4c86c6", "LoGoPrompt": "#d1495b"}
ROWS, EXPLAINED = 6, 200  # of the contact sheet, and images that it chooses from


def base_to_new(method: str, root: Path, folder: Path, seed: int, opts: Sequence[str]) -> list[float]:
    """Train on the base classes and test on base and new: their accuracies in percent, and H."""
    accuracies, test = [], ("--eval-only", "--model-dir", str(folder / "base"))
    for subset, flags in (("base", ()), ("new", test)):
        flags = ("--eval-only",) if method == "ZeroshotCLIP" else flags
        argv = arguments(method, DATASET, "tiny96_ep10_ctxv1", root, folder / subset, seed, subset, flags)
        accuracies.append(run([*argv, *opts], progress=True)["metrics"]["accuracy"])
    return [*accuracies, harmonic_mean(*accuracies)]


def bar_chart(table: pd.DataFrame, path: Path) -> None:
    """Base, New and H (columns) of each method (rows), next to each other."""
    axes = table.T.plot.bar(rot=0, width=0.8, figsize=(6, 3.4), ylim=(0, 109), ylabel="accuracy (%)", color=COLOURS)
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(axes.figure)


def contact_sheet(run_folder: Path, path: Path) -> None:
    """Test images with their candidates' class-conditional images; the selection changed up to half of them."""
    predictor = Predictor(run_folder)
    classnames, images = survey(predictor.cfg)
    images = images[:: max(1, len(images) // EXPLAINED)]
    changed, same = [], []
    for explanation, (_, label) in zip(predictor.explain([image for image, _ in images]), images):
        verdict = "right" if explanation.prediction.classes[0] == classnames[label] else "wrong"
        explanation.prediction.path = f"true class: {classnames[label]}, prediction: {verdict}"
        (changed if explanation.selected else same).append(explanation)
    rows = changed[:: max(1, 2 * len(changed) // ROWS)][: ROWS // 2]
    rows += same[:: max(1, len(same) // ROWS)][: ROWS - len(rows)]
    Image.fromarray(np.vstack([row.draw() for row in rows])).save(path)


def empty_folder(folder: Path) -> None:
    """Make a folder for the runs, in place of an earlier demo's. Raises UserError for any other folder."""
    mark = folder / ".demo"
    if folder.exists() and not mark.exists():
        raise UserError(f"{folder}: not made by a demo, so it is not replaced; choose another --output")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo", help="folder for everything")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that overrule the configs")
    args = parser.parse_args(argv)
    output, started, rows = args.output.resolve(), time.time(), {}
    try:
        empty_folder(output / "runs")
        for i, method in enumerate(COLOURS, start=1):
            print(f"[{i}/{len(COLOURS)}] {method}: base-to-new on {DATASET}", flush=True)
            rows[method] = base_to_new(method, output / "data", output / "runs" / method, args.seed, args.opts)
        table = pd.DataFrame.from_dict(rows, orient="index", columns=["Base", "New", "H"])
        text = table.to_markdown(floatfmt=".2f")
        write_text(str(output / "table.md"), f"{text}\n")
        bar_chart(table, output / "chart.png")
        contact_sheet(output / "runs" / "LoGoPrompt" / "base", output / "class_conditional.png")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}\n\n{time.time() - started:.0f} s; seed {args.seed}, {DATASET}, embedded CLIP (tiny)")
    print("What these numbers mean: docs/toy.md")
    print(*(relative(output / name) for name in ("table.md", "chart.png", "class_conditional.png", "runs")), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
