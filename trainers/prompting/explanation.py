"""Predictions, and pictures of what they are based on."""

from __future__ import annotations

import io
import textwrap
import warnings
from dataclasses import dataclass, field
from typing import Optional

from PIL import Image

from .names import clean_name, printable

CELL, LINE = 2.2, 0.17  # inches: width of an image, height of a line
CHARACTERS, PATH = 16, 50  # of a line below an image, and of a path; so many W fit
INK, RIGHT, WRONG = "#1f2933", "#1a7f37", "#b42318"  # colours of names: neutral, right, wrong


@dataclass
class Prediction:
    """The most probable classes of an image.

    ``scores`` are p(c|x); for LoGoPrompt max(p(c|x), p(c|x_c)) of its K candidates only.
    """

    path: str
    classes: list[str] = field(default_factory=list)  # at most ``top`` class names, best first
    scores: list[float] = field(default_factory=list)  # of each, in [0, 1]
    error: str = ""  # one line on why there is no prediction
    relative: str = ""  # path below the data root, see find_images


@dataclass
class Candidate:
    """A class that was considered."""

    classname: str
    original: float  # p(c|x)
    conditional: Optional[float] = None  # p(c|x_c); None: the method looks at the original image alone
    picture: Optional[Image.Image] = None  # x_c, the image with the class's block


@dataclass
class Explanation:
    """What a prediction is based on."""

    prediction: Prediction  # with its error set, the rest is empty
    image: Optional[Image.Image] = None  # x, as the model sees it: resized and cropped to (H, H)
    candidates: list[Candidate] = field(default_factory=list)  # most probable classes of x, most probable first
    selected: int = 0  # index of the predicted class among them
    font: str = ""  # of the captions; empty: DejaVu Sans
    truth: str = ""  # the true class, if it is known

    def draw(self) -> Image.Image:
        """One picture: the image, and the candidates with their class-conditional images and probabilities.

        The predicted class is framed. If the truth is known, its name is green, and that of a wrong prediction red.
        """
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties

        font = FontProperties(fname=self.font) if self.font else FontProperties(family="DejaVu Sans")
        text = {"fontproperties": font, "fontsize": 9, "color": INK, "parse_math": False}
        compared = self.candidates[0].conditional is not None
        ratios = [1] * (1 + len(self.candidates)) if compared else [1, 2]
        lines, names = 3 if compared else 2, [printable(clean_name(c.classname)) for c in self.candidates]
        names = ["\n".join(textwrap.wrap(name, CHARACTERS, max_lines=lines, placeholder="…")) for name in names]
        captions = (4 + max(name.count("\n") for name in names)) * LINE
        height = CELL + 2 * LINE + captions if compared else max(CELL, 0.4 * len(names)) + 2 * LINE
        figure = Figure(figsize=(sum(ratios) * CELL, height), layout="constrained")
        axes = figure.subplots(1, len(ratios), gridspec_kw={"width_ratios": ratios})
        path = printable(self.prediction.path)
        path = path if len(path) <= PATH else f"…{path[1 - PATH :]}"
        path += f"    true class: {printable(clean_name(self.truth))}" * bool(self.truth)
        figure.suptitle(path, x=0.01, ha="left", **text)
        axes[0].imshow(self.image, interpolation="bicubic")
        for axis in axes:
            axis.set(xticks=[], yticks=[], anchor="N")
            axis.spines[:].set(visible=False, color=INK, linewidth=4)
        if compared:
            alone = f"x: {names[0]} {self.candidates[0].original:.2f}"
            axes[0].set_xlabel(f"{alone}\nx_c: with the name of c", loc="left", **text)
        else:
            axes[1].set(xlim=(0, 1), ylim=(len(self.candidates) - 0.5, -0.9))
        for i, (candidate, name) in enumerate(zip(self.candidates, names)):
            right, wrong = candidate.classname == self.truth, bool(self.truth) and i == self.selected
            p, style = candidate.original, {**text, "color": RIGHT if right else WRONG if wrong else INK}
            if compared:
                axes[i + 1].imshow(candidate.picture, interpolation="bicubic")
                axes[i + 1].spines[:].set_visible(i == self.selected)
                caption = f"{name}\n{p:.3f}  p(c|x)\n{candidate.conditional:.3f}  p(c|x_c)"
                axes[i + 1].set_xlabel(caption + "\npredicted" * (i == self.selected), loc="left", **style)
            else:
                axes[1].barh(i, [1, p], 0.25, color=["#e3e8ec", style["color"]], ec=INK, lw=2 * (i == self.selected))
                axes[1].text(0, i - 0.2, f"{p:.3f}  {' '.join(name.splitlines())}", va="bottom", **style)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # of names that the font cannot show
            figure.savefig(buffer, format="png", dpi=100)
        return Image.open(buffer).convert("RGB")
