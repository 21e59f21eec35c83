"""The method on the toy world, in minutes, with nothing but the Python packages: ``make demo``.

    python toy/demo.py
    python toy/demo.py --output /tmp/demo --seed 2 OPTIM.MAX_EPOCH 5

Trains CoOp and LoGoPrompt on the base classes of "Shapes" and tests them and zero-shot CLIP on base and new classes.
Writes a table, a bar chart, a contact sheet of class-conditional images and the run folders into ``output/demo/``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
OUTPUT = Path(__file__).resolve().parents[1] / "output" / "demo"


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    title, examples, _ = __doc__.split("\n\n", 2)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=f"examples:\n{examples}", formatter_class=style)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for everything (default: output/demo)")
    parser.add_argument("--seed", type=int, default=1, help="of few-shot samples and training (default: 1)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the configs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and mistakes in the flags end here: the imports below take seconds
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is tiny: more threads would wait for each other

from runner import arguments, relative, run  # isort: skip (makes `import dassl` work)
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from trainers.predictor import Predictor, survey
from trainers.prompting.errors import UserError
from trainers.prompting.explanation import Explanation
from trainers.prompting.names import clean_name
from trainers.prompting.results import harmonic_mean, write_text

plt.switch_backend("Agg")
DATASET = "shapes"
COLOURS = {"ZeroshotCLIP": "#9aa5b1", "CoOp": "#4c86c6", "LoGoPrompt": "#d1495b"}
INK, RIGHT, WRONG = "#1f2933", "#1a7f37", "#c62828"  # the frame of what is selected is INK
KINDS = ("put right", "spoiled", "left as it was")  # by the selection; a row of the contact sheet each


def base_to_new(method: str, root: Path, folder: Path, seed: int, opts: Sequence[str]) -> list[float]:
    """Train on the base classes and test on base and new: their accuracies in percent, and H."""
    accuracies, test = [], ("--eval-only", "--model-dir", str(folder / "base"))
    for subset, flags in (("base", ()), ("new", test)):
        flags = ("--eval-only",) if method == "ZeroshotCLIP" else flags
        argv = arguments(method, DATASET, "tiny96_ep10_ctxv1", root, folder / subset, seed, subset, flags)
        accuracies.append(run([*argv, *opts], progress=True)["metrics"]["accuracy"])
        print(f"  {subset} classes: {accuracies[-1]:.2f} %", flush=True)
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


def kind_of(explanation: Explanation, true: str) -> Optional[str]:
    """What the selection did to a prediction; None where both are wrong."""
    alone, selected = (explanation.candidates[i].classname for i in (0, explanation.selected))
    if alone == true:
        return "left as it was" if selected == true else "spoiled"
    return "put right" if selected == true else None


def examples(run_folder: Path) -> dict[str, tuple[Explanation, str]]:
    """The first test image of each of the KINDS, with its true class, as far as there are any."""
    predictor, found = Predictor(run_folder), {}
    classnames, images = survey(predictor.cfg)
    images.sort(key=lambda row: os.path.basename(row[0]))  # the first image of every class first
    labels = iter([classnames[label] for _, label in images])
    for explanation in predictor.explain(image for image, _ in images):
        true = next(labels)
        if explanation.candidates[0].picture is None:  # without selection
            break
        if kind := kind_of(explanation, true):
            found.setdefault(kind, (explanation, true))
        if len(found) == len(KINDS):
            break
    return {kind: found[kind] for kind in KINDS if kind in found}


def contact_sheet(rows: dict[str, tuple[Explanation, str]]) -> Figure:
    """A row per example: the image, and its candidates' class-conditional images with their probabilities in words."""
    columns = 1 + max(len(explanation.candidates) for explanation, _ in rows.values())
    figure = Figure(figsize=(1.9 * columns, 2.75 * len(rows)), layout="constrained")
    for part, (kind, (explanation, true)) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows.items()):
        part.suptitle(f"{clean_name(true)}, {kind} by the selection", x=0.01, ha="left", fontsize=10, color=INK)
        axes = part.subplots(1, columns)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=False, color=INK, linewidth=4)
        alone = explanation.candidates[0]
        axes[0].imshow(explanation.image)
        axes[0].set_xlabel(words("x", alone.classname, alone.original), color=colour(alone.classname, true))
        for i, (axis, candidate) in enumerate(zip(axes[1:], explanation.candidates)):
            axis.imshow(candidate.picture)
            best = max(candidate.original, candidate.conditional)
            text = f"{words('x', candidate.classname, candidate.original)}\n"
            text += words("with its block", candidate.classname, candidate.conditional)
            chosen = i == explanation.selected
            axis.spines[:].set_visible(chosen)
            text += f"\nselected: {best:.2f}" if chosen else ""
            axis.set_xlabel(text, fontsize=8, color=colour(candidate.classname, true) if chosen else INK)
        for axis in axes[1 + len(explanation.candidates) :]:
            axis.set_axis_off()
    return figure


def words(image: str, classname: str, p: float) -> str:
    """For example "x: car 0.23"."""
    return f"{image}: {clean_name(classname)} {p:.2f}"


def colour(classname: str, true: str) -> str:
    return RIGHT if classname == true else WRONG


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
    args = parse_args(argv)
    output, started, rows = args.output.resolve(), time.time(), {}
    try:
        empty_folder(output / "runs")
        for i, method in enumerate(COLOURS, start=1):
            print(f"[{i}/{len(COLOURS)}] {method}: base-to-new on {DATASET}, {time.time() - started:.0f} s", flush=True)
            rows[method] = base_to_new(method, output / "data", output / "runs" / method, args.seed, args.opts)
        table = pd.DataFrame.from_dict(rows, orient="index", columns=["Base", "New", "H"])
        text = table.to_markdown(floatfmt=".2f")
        write_text(str(output / "table.md"), f"{text}\n")
        bar_chart(table, output / "chart.png")
        found = examples(output / "runs" / "LoGoPrompt" / "base")
        if found:
            contact_sheet(found).savefig(output / "class_conditional.png", dpi=110)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command starts again.", file=sys.stderr)
        return 130
    print(f"\n{text}\n\n{time.time() - started:.0f} s; seed {args.seed}, {DATASET}, embedded CLIP (tiny)")
    if absent := [kind for kind in KINDS if kind not in found]:
        print(f"No test image of the base classes was {' or '.join(absent)} by the selection.")
    print("What these numbers mean: docs/toy.md")
    names = "table.md", "chart.png", *["class_conditional.png"] * bool(found), "runs"
    print(*(relative(output / name) for name in names), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
