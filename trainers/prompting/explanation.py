"""Predictions, and pictures of what they are based on."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
from PIL import Image

from .names import clean_name, printable

DPI = 100
CELL = 2.1  # inches: width of an image
LINE = 0.19  # inches: height of a line of text
CHARACTERS = 24  # of a line of text as wide as an image
INK, SOFT, TRACK, SELECTED = "#1f2933", "#586573", "#d7dde3", "#1a7f37"


@dataclass
class Prediction:
    """The most probable classes of an image.

    Attributes:
        path: of the image.
        classes: at most ``top`` class names, best first.
        scores: of each, in [0, 1]: p(c|x); for LoGoPrompt max(p(c|x), p(c|x_c)) of its K candidates only.
        error: one line on why there is no prediction; empty if there is one.
        relative: path below the data root, see :func:`find_images`.
    """

    path: str
    classes: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    error: str = ""
    relative: str = ""


@dataclass
class Candidate:
    """A class that was considered."""

    classname: str
    original: float  # p(c|x)
    conditional: Optional[float] = None  # p(c|x_c); None: the method looks at the original image alone
    picture: Optional[Image.Image] = None  # x_c, the image with the class's block


@dataclass
class Explanation:
    """What a prediction is based on.

    Attributes:
        prediction: with its ``error`` set, the rest is empty.
        image: x, as the model sees it: resized and cropped to (H, H).
        candidates: the most probable classes of the original image, most probable first.
        selected: index of the predicted class among them.
        font: of the captions; empty: DejaVu Sans.
    """

    prediction: Prediction
    image: Optional[Image.Image] = None
    candidates: list[Candidate] = field(default_factory=list)
    selected: int = 0
    font: str = ""

    def draw(self) -> Image.Image:
        """One picture: the image, and the candidates with their class-conditional images and probabilities."""
        return _draw(self)


# ------------------------------------------------------------------------------------------------- pictures


def _draw(explanation: Explanation) -> Image.Image:
    """See :meth:`Explanation.draw`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    font = FontProperties(fname=explanation.font) if explanation.font else FontProperties(family="DejaVu Sans")
    compared = explanation.candidates[0].conditional is not None
    columns = 1 + len(explanation.candidates) if compared else 3
    names = [_wrapped(c.classname) for c in explanation.candidates]
    n_lines = max(name.count("\n") for name in names) + 4 if compared else 1
    width, height = columns * (CELL + 0.12) + 0.2, CELL + (n_lines + 2) * LINE
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def text(x: float, y: float, words: str, colour: str = INK, bold: bool = False) -> None:
        """Words at inches from the left and the top."""
        properties = font.copy()
        properties.set_weight("bold" if bold else "normal")
        style = {"ha": "left", "va": "top", "color": colour, "fontproperties": properties, "fontsize": 9}
        figure.text(x / width, 1 - y / height, words.replace("$", r"\$"), **style)

    def picture(x: float, image: Image.Image, frame: bool = False) -> None:
        axes = figure.add_axes([x / width, 1 - (top + CELL) / height, CELL / width, CELL / height])
        axes.imshow(np.asarray(image), interpolation="bicubic")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=frame, color=SELECTED, linewidth=4)

    top = 0.12 + LINE
    path = printable(explanation.prediction.path.encode("utf-8", "replace").decode())
    text(0.12, 0.08, textwrap.shorten(path[::-1], 2 * CHARACTERS, placeholder="…")[::-1], SOFT)
    picture(0.12, explanation.image)
    below = top + CELL + 0.06
    if not compared:
        _bars(explanation, text, figure, (0.12 + CELL + 0.2, top), (width, height))
    else:
        text(0.12, below, "the image x")
        text(0.12, below + LINE, "x_c: with the name of c", SOFT)
        for i, (candidate, name) in enumerate(zip(explanation.candidates, names)):
            x, selected = 0.12 + (i + 1) * (CELL + 0.12), i == explanation.selected
            picture(x, candidate.picture, frame=selected)
            text(x, below, name, SELECTED if selected else INK, bold=True)
            largest = max(candidate.original, candidate.conditional)
            for j, (label, value) in enumerate((("p(c|x)", candidate.original), ("p(c|x_c)", candidate.conditional))):
                y = below + (n_lines - 3 + j) * LINE
                text(x, y, label, SOFT)
                text(x + 0.85, y, f"{value:.3f}", INK if value == largest else SOFT, bold=value == largest)
            if selected:
                text(x, below + (n_lines - 1) * LINE, "selected", SELECTED, bold=True)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _bars(explanation: Explanation, text: Any, figure: Any, corner: tuple[float, float], size: tuple) -> None:
    """The probabilities of a method that looks at the image alone."""
    (x, y), (width, height) = corner, size
    for i, candidate in enumerate(explanation.candidates):
        selected = i == explanation.selected
        colour = SELECTED if selected else INK
        text(x, y, f"{candidate.original:.3f}  {_wrapped(candidate.classname, 1)}", colour, bold=selected)
        for share, paint in ((1.0, TRACK), (candidate.original, colour)):
            axes = figure.add_axes([x / width, 1 - (y + 0.28) / height, share * 2 * CELL / width, 0.07 / height])
            axes.set_facecolor(paint)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
        y += 0.4


def _wrapped(classname: str, lines: int = 2) -> str:
    """A class name on at most so many lines, cut with an ellipsis."""
    name = printable(clean_name(classname))
    return "\n".join(textwrap.wrap(name, CHARACTERS * (3 - lines), max_lines=lines, placeholder="…") or [""])
