"""Predictions, explanations and Figure 1 as sentences, HTML and files, for ``tools/app.py``."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import tempfile
import traceback
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
import torch
from PIL import Image

from trainers.prompting.errors import messages
from trainers.prompting.explanation import Explanation
from trainers.prompting.names import clean_name
from trainers.prompting.results import write_text

READS = 2 / 3  # of the images in which a name must raise its class before a backbone is said to read


def short(text: str) -> str:
    """Paths in our temporary folders as the names that the user knows."""
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/(uploads/\w+/|\w+/)?", "", text)


def paragraph(text: str, kind: str = "note") -> str:
    """A sentence; an ``alert`` is read aloud at once, an ``answer`` is large."""
    return f'<p class="lp-{kind}"{" role=alert" * (kind == "alert")}>{escape(short(text))}</p>'


def failure(error: Exception) -> str:
    """An error as sentences on the page; one of the code is also reported on the terminal."""
    if (lines := messages(error)) is None:
        traceback.print_exception(type(error), error, error.__traceback__)
        lines = [f"This did not work ({type(error).__name__}); the terminal shows why."]
    return "".join(paragraph(line.removeprefix("--classnames: "), "alert") for line in lines)


def picture(image: Image.Image, alt: str) -> str:
    image.save(buffer := io.BytesIO(), "JPEG", quality=92)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}">'


def bar(label: str, p: float) -> str:
    return f'<span class="lp-bar" style="--p:{p:.4f}"><span>{label}</span> <b>{p:.4f}</b></span>'


def progress(text: str, done: int, total: int) -> str:
    value = f' value="{done}" max="{total}"' if total else ""
    return f'{paragraph(text)}<progress class="lp-progress"{value} aria-label="{escape(text)}"></progress>'


def selection(found: Explanation) -> str:
    """An image x and its candidates: p(c|x), p(c|x_c), and which of them is selected."""

    def figure(image: Image.Image, alt: str, caption: str, selected: bool = False) -> str:
        badge, kind = '<span class="lp-badge">selected</span>' * selected, " lp-selected" * selected
        image = f"{picture(image, alt)}<figcaption>{caption}{badge}</figcaption>"
        return f'<figure class="lp-figure{kind}">{image}</figure>'

    name = found.prediction.relative
    figures = [figure(found.image, f"the image {name}", f"<b>{escape(name)}</b>the image x")]
    for i, c in enumerate(found.candidates):
        alt = f'{name} with the block "{c.classname}"' if c.picture else f"{name}, for {c.classname}"
        bars = bar("p(c|x)", c.original) + (bar("p(c|x<sub>c</sub>)", c.conditional) if c.picture else "")
        caption = f"<b>{escape(clean_name(c.classname))}</b>{bars}"
        figures.append(figure(c.picture or found.image, alt, caption, i == found.selected))
    return f'<section class="lp-grid" aria-label="{escape(name)}">{"".join(figures)}</section>'


def prediction_row(found: Explanation) -> str:
    """A thumbnail, the most probable classes, and the class without selection where the method selects."""
    prediction = found.prediction
    name = f'<th scope="row">{escape(prediction.relative)}</th>'
    if prediction.error:
        return f"<tr><td></td>{name}<td colspan=2>{paragraph(prediction.error)}</td></tr>"
    bars, alone = "".join(bar(escape(clean_name(c)), p) for c, p in zip(prediction.classes, prediction.scores)), ""
    if found.candidates[0].conditional is not None:
        change = "same" if found.selected == 0 else f"<b>{escape(clean_name(found.candidates[0].classname))}</b>"
        alone = f'<td data-label="without selection: ">{change}</td>'
    return f"<tr><td>{picture(found.image, prediction.relative)}</td>{name}<td>{bars}</td>{alone}</tr>"


def summary(results: list[dict[str, Any]], same: list[bool], shown: int) -> str:
    """How many images were classified, and how many of those that were compared have the same class both times."""
    failed = sum("error" in result for result in results)
    n = len(results) - failed
    text = f"{n} image{'s' * (n != 1)} classified" + f", {failed} could not be read" * (failed > 0)
    if same:
        share = f"{sum(same)} of {len(same)} ({100 * sum(same) / len(same):.1f} %)"
        text += f"; with and without selection the same class in {share}"
    return paragraph(f"{text}." + f" The table shows the first {shown}." * (len(results) > shown), "answer")


def table(rows: Iterable[str], selects: bool) -> str:
    head = "<th></th><th>image</th><th>most probable classes</th>" + "<th>without selection</th>" * selects
    return f'<table class="lp-table"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def chart(values: dict[str, torch.Tensor]) -> str:
    """p(y|x) of N images, sorted, with their own block and with a wrong one, from ``figure1.zero_shot``: an SVG."""
    rows = range(len(values["label"]))
    plain, own, wrong = (values[key][rows, values["label"]].tolist() for key in ("none", "true", "hard"))
    order = sorted(rows, key=plain.__getitem__)
    x, y = (lambda i: 40 + 370 * (i + 0.5) / len(order)), (lambda p: 210 - 195 * p)
    line = " ".join(f"{x(i):.1f},{y(plain[n]):.1f}" for i, n in enumerate(order))
    marks = "".join(
        f'<path class="lp-wrong" d="M{x(i) - 4:.1f},{y(wrong[n]) - 4:.1f}l8,8m0,-8l-8,8"/>'
        f'<circle class="lp-own" cx="{x(i):.1f}" cy="{y(own[n]):.1f}" r="4"/>'
        for i, n in enumerate(order)
    )
    axis = (f'<path class="lp-axis" d="M40,{y(p)}h370"/><text x="0" y="{y(p) + 5}">{p}</text>' for p in (0, 0.5, 1))
    label = "Scores of the true class, sorted: without a block, with its own block, with the block of a wrong class"
    drawn = f'{"".join(axis)}<polyline points="{line}"/>{marks}'
    return (
        f'<svg class="lp-chart" viewBox="0 0 412 220" role="img" aria-label="{label}">{drawn}</svg>'
        '<p class="lp-legend">p(y|x) of each image, sorted: <b>―</b> without a block, <b class="lp-own">●</b> with the '
        'block of its class, <b class="lp-wrong">✕</b> with that of the most probable wrong class</p>'
    )


def verdict(values: dict[str, torch.Tensor], share_below: float, prospect: str) -> list[str]:
    """Whether a backbone reads, from ``figure1.zero_shot``, and whether LoGoPrompt can be expected to help.

    ``share_below`` is ``figure1.reading_score``, ``prospect`` what ``figure1.prospect`` says.
    """
    label, n = values["label"], len(values["label"])
    odds = [torch.logit(values[block][range(n), label].double(), eps=1e-6) for block in ("true", "hard")]
    reading = odds[0] - odds[1]  # both blocks hide the same pixels, only their texts differ
    reads = (reading > 0).double().mean() > READS and reading.mean() > 0
    return [
        f"{'Yes, this backbone reads' if reads else 'No, this backbone does not read'} these names: in "
        f"{int((reading > 0).sum())} of {n} images the name of its own class raises a class more than another name at "
        f"the same place does, by {reading.mean():+.2f} log-odds on average.",
        prospect,
        f"An image of the class name alone is closer to its prompt than {share_below:.0f} % of these images.",
    ]


def save_predictions(folder: str, results: list[dict[str, Any]]) -> list[str]:
    """Write results as ``predictions.csv`` and ``.json``, in full precision; returns their paths."""
    rows, last = [], ("without_selection", "error")
    for result in results:
        pairs = enumerate(zip(result.get("classes", ()), result.get("scores", ())), 1)
        columns = {f"{key}_{i}": value for i, pair in pairs for key, value in zip(("class", "score"), pair)}
        rows.append({"image": result["path"], **columns, **{key: result[key] for key in last if key in result}})
    paths = [os.path.join(folder, f"predictions.{end}") for end in ("csv", "json")]
    pd.DataFrame(rows).to_csv(paths[0], index=False, encoding="utf-8-sig")
    write_text(paths[1], json.dumps(results, indent=1))
    return paths


def theme() -> gr.themes.Base:
    """Gradio's plainest theme in readable colours, with fonts of the user's machine."""
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # not from the network
    made = gr.themes.Base(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="md", **fonts)
    dark = ("button_primary_background_fill", "checkbox_label_background_fill_selected")
    grey = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "block_title_text_color")
    colours = {**dict.fromkeys(dark, ("*primary_700",) * 2), **dict.fromkeys(grey, ("*neutral_600", "*neutral_300"))}
    colours |= {"checkbox_label_text_color_selected": ("white",) * 2, "button_primary_text_color": ("white",) * 2}
    colours |= {"button_primary_background_fill_hover": ("*primary_800",) * 2}
    made.set(**{f"{key}{mode}": colour for key, pair in colours.items() for mode, colour in zip(("", "_dark"), pair)})
    return made


def fonts() -> list[tuple[str, str]]:
    """Names and paths of fonts that are certainly installed: Pillow's, which needs no path, and matplotlib's."""
    folder = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
    files = sorted(folder.glob("DejaVuSans*.ttf")) + sorted(folder.glob("DejaVuSerif*.ttf"))
    return [("Pillow's own", ""), *((path.stem, str(path)) for path in files if "Display" not in path.stem)]
