"""Example predictions for the page of tools/report.py, made by a run that it reports on."""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from PIL import Image
from tqdm import tqdm

from report_tables import Run, shown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PIXELS = 160  # on the page
TRIED = 3  # images looked at for each that is shown
MODELS = 4  # runs tried before it is given up


@dataclass
class Example:
    """A test image and what became of it."""

    name: str
    truth: str
    image: str  # data URI of x
    winner: str  # of x_c of the class selected; empty where the method looks at x alone
    rows: list[tuple[str, str, str]]  # class, p(c|x), p(c|x_c) of the candidates
    selected: int

    @property
    def right(self) -> bool:
        return self.rows[self.selected][0] == self.truth


def uri(picture: Image.Image) -> str:
    """A small JPEG within the page."""
    buffer = io.BytesIO()
    picture.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def choose(runs: Sequence[Run]) -> list[Run]:
    """Runs whose predictions may be shown, the best to show first: LoGoPrompt's, with the first seed; one of a kind."""
    kinds: dict[Any, Run] = {}
    for run in sorted(runs, key=lambda run: (not run.method.startswith("LoGoPrompt"), run.seed)):
        kinds.setdefault((run.method, run.dataset, run.backbone), run)
    return list(kinds.values())[:MODELS]


def predictions(runs: Sequence[Run], n: int) -> tuple[list[Example], Optional[Run], str]:
    """``n`` test images of one run, half of them, if there are so many, where selection changed the prediction.

    Returns:
        The examples, their run, and where there is none why.
    """
    why = "no runs"
    for i, run in enumerate(choose(runs)):
        try:
            return _predict(run, n), run, ""
        except Exception as error:  # noqa: BLE001 (whatever is wrong with it, the report does without)
            why = f"{shown(run.folder)}: {' '.join(str(error).split())}" if i == 0 else why
    return [], None, why


def _predict(run: Run, n: int) -> list[Example]:
    from trainers.predictor import Predictor, run_config, survey  # takes seconds to import
    from trainers.prompting.backbone import CACHE, OPENAI_NAMES

    cfg = run_config(run.folder)
    classnames, test = survey(cfg)
    of_class: dict[int, list[str]] = {}
    for path, label in test:
        of_class.setdefault(label, []).append(path)
    labels, wanted = sorted(of_class), TRIED * n
    picked = {}
    for i in range(wanted):  # through all classes, and then once more
        label = labels[i * len(labels) // wanted] if wanted < len(labels) else labels[i % len(labels)]
        paths = of_class[label]
        if i // len(labels) < len(paths):
            picked[paths[i // len(labels)]] = classnames[label]
    missing = next((path for path in picked if not os.path.isfile(path)), None)
    if missing:  # before weights are read
        raise FileNotFoundError(f"{missing}: no such file")
    name = cfg.MODEL.BACKBONE.NAME
    if name in OPENAI_NAMES and not list(Path(CACHE).expanduser().glob(f"{OPENAI_NAMES[name]}*.pt")):
        raise FileNotFoundError(f"the weights of {name} are not in {CACHE}")  # a report downloads nothing
    predictor = Predictor(run.folder, classnames)
    found = [e for e in tqdm(predictor.explain(picked), total=len(picked), disable=None) if not e.prediction.error]
    if not found:
        raise ValueError("none of its test images can be read")
    changed = [e for e in found if e.selected != 0][: n // 2]
    chosen, rest = changed, [e for e in found if all(e is not c for c in changed)]
    while rest and len(chosen) < n:  # classes that are not shown yet go first
        there = {picked[e.prediction.path] for e in chosen}
        chosen.append(rest.pop(next((i for i, e in enumerate(rest) if picked[e.prediction.path] not in there), 0)))
    return [_example(e, picked[e.prediction.path]) for e in chosen]


def _example(explanation: Any, truth: str) -> Example:
    rows = []
    for c in explanation.candidates:
        rows.append((c.classname, f"{c.original:.3f}", "" if c.conditional is None else f"{c.conditional:.3f}"))
    picture = explanation.candidates[explanation.selected].picture
    name = "/".join(Path(explanation.prediction.path).parts[-2:])
    winner = uri(picture) if picture is not None else ""
    return Example(name, truth, uri(explanation.image), winner, rows, explanation.selected)
