"""Class names -> class-wise visual prompts V_c (section 3.2.1).

A name is rasterised once, on the CPU, into a coverage mask. Colouring is a tensor operation, so a block can become a
parameter (section 3.2.3).
"""

from __future__ import annotations

import io
import itertools
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from yacs.config import CfgNode

from .errors import UserError
from .names import clean_name, printable
from .paste import block_size, uniform_numbers

MAX_LINES = 3
MIN_READABLE_SIZE = 7.0  # font size in pixels
MAX_CONTRAST = 10.0  # few pairs of colours exceed it
SIZE_STEP = 0.25  # of the font sizes tried, in pixels


def rasterise(classnames: Sequence[str], height: int, width: int, font: str = "") -> torch.Tensor:
    """Draw every class name as large as fits, on one to three lines, centred.

    Returns (C, 1, h, w) coverage in [0, 1]: 1 is text, 0 is background. ``font`` is the path of a TrueType/OpenType
    file; empty: the font that Pillow ships (Aileron). Raises UserError where it can draw no character of a name.
    """
    typeface = _Typeface(font)
    texts, incomplete, small, masks = [], {}, set(), {}
    for name in map(clean_name, classnames):
        text, missing = typeface.drawable(name)
        if text and text not in masks:
            masks[text], size = _draw(text, height, width, typeface)
            if size < MIN_READABLE_SIZE:
                small.add(text)
            elif not masks[text].any():  # glyphs without ink
                text = ""
        if not text:
            shown = f'"{printable(name)}"' if name.strip() else "an empty class name"
            remedy = "set TRAINER.LOGOPROMPT.FONT to another font"
            raise UserError(f"{shown} cannot be drawn with {typeface.name}: {remedy}")
        if missing:
            incomplete[name] = printable(f'"{name}" ({missing}) is drawn as "{text}"')
        texts.append(text)
    if incomplete:
        print(f"Not in {typeface.name} (see TRAINER.LOGOPROMPT.FONT): {'; '.join(incomplete.values())}")
    if small:
        print(f"Visual prompts too small to read in {height}x{width} pixels: {', '.join(sorted(small))}")
    return torch.stack([masks[text] for text in texts]).unsqueeze(1)


def check_font(path: str) -> None:
    """Raise UserError unless the font can be read; an empty path means Pillow's own font."""
    _Typeface(path)


class _Typeface:
    """A font at any size, and the characters that it can draw."""

    def __init__(self, path: str = "") -> None:
        self.name = path or "Pillow's built-in font"
        self._layout = ImageFont.Layout.BASIC if not path else None  # complex shaping for the user's own font
        try:
            self._bytes = Path(path).read_bytes() if path else ImageFont.load_default(12).font_bytes
            self._characters = _characters(self._bytes)
            self._sizes: dict[float, ImageFont.FreeTypeFont] = {}
            self.at(12)
        except Exception as error:  # noqa: BLE001 (files, FreeType and fontTools each raise their own errors)
            remedy = "give a .ttf or .otf file" if path else "install Pillow with FreeType support"
            if isinstance(error, ImportError) and "fontTools" in str(error):
                remedy = "pip install fonttools"
            raise UserError(f"TRAINER.LOGOPROMPT.FONT {path or '(Pillow)'}: cannot read this font; {remedy}") from error

    def drawable(self, name: str) -> tuple[str, str]:
        """The drawable part of a name, and the characters missing from the font (accents are dropped if that helps)."""
        text, missing = [], []
        for character in name:
            if character.isspace() or ord(character) in self._characters:
                text.append(character)
            else:
                plain = unicodedata.normalize("NFKD", character)
                text.extend(c for c in plain if ord(c) in self._characters)
                missing.append(character)
        return " ".join("".join(text).split()), " ".join(sorted(set(missing)))

    def at(self, size: float) -> ImageFont.FreeTypeFont:
        size = max(size, 0.5)  # FreeType refuses a size that rounds to zero pixels
        if size not in self._sizes:
            self._sizes[size] = ImageFont.truetype(io.BytesIO(self._bytes), size, layout_engine=self._layout)
        return self._sizes[size]


@lru_cache(maxsize=8)
def _characters(font_bytes: bytes) -> frozenset[int]:
    """Code points that a font has glyphs for; Pillow draws a box for others without a warning."""
    from fontTools.ttLib import TTFont

    with TTFont(io.BytesIO(font_bytes), fontNumber=0) as font:
        return frozenset(font.getBestCmap())


def _draw(text: str, height: int, width: int, typeface: _Typeface) -> tuple[torch.Tensor, float]:
    """(h, w) coverage of one text at the largest size that fits, and that size in pixels."""
    pad = 1 if min(height, width) > 4 else 0  # anti-aliased edges stay inside the block
    room = (height - 2 * pad, width - 2 * pad)
    words = text.split()
    size, lines = 0.0, [" ".join(words)]
    for n_lines in range(1, min(MAX_LINES, len(words)) + 1):
        broken = _break_lines(words, n_lines, typeface)
        largest = _largest_size(broken, room, typeface, at_least=size)
        if largest > size:
            size, lines = largest, broken
    size = size or SIZE_STEP
    boxes, offsets = _layout(lines, typeface.at(size))
    top, bottom = offsets[0] + boxes[0][1], offsets[-1] + boxes[-1][3]
    canvas = ImageDraw.Draw(image := Image.new("L", (width, height), 0))
    y = (height - (bottom - top)) / 2 - top
    for line, box, offset in zip(lines, boxes, offsets):
        x = (width - (box[2] - box[0])) / 2 - box[0]
        canvas.text((round(x), round(y + offset)), line, fill=255, font=typeface.at(size), anchor="ls")
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255), size


def _break_lines(words: list[str], n_lines: int, typeface: _Typeface) -> list[str]:
    """The break into ``n_lines`` lines whose longest line is shortest."""
    font = typeface.at(64)
    length = lru_cache(maxsize=None)(lambda first, end: font.getlength(" ".join(words[first:end])))
    candidates = ((0, *breaks, len(words)) for breaks in itertools.combinations(range(1, len(words)), n_lines - 1))
    edges = min(candidates, key=lambda edges: max(map(length, edges, edges[1:])))
    return [" ".join(words[a:b]) for a, b in zip(edges, edges[1:])]


def _layout(lines: list[str], font: ImageFont.FreeTypeFont) -> tuple[list[tuple], list[float]]:
    """Ink box of each line relative to its baseline, and the baselines: evenly spaced, lines never touch."""
    boxes = [font.getbbox(line, anchor="ls") for line in lines]
    gap = max(1.0, font.size * 0.08)
    pitch = max((upper[3] - lower[1] + gap for upper, lower in zip(boxes, boxes[1:])), default=0.0)
    return boxes, [i * pitch for i in range(len(lines))]


def _largest_size(lines: list[str], room: tuple[int, int], typeface: _Typeface, at_least: float) -> float:
    """Largest font size, a multiple of SIZE_STEP, at which the ink of all lines fits ``room``; 0 if none does."""

    def fits(steps: int) -> bool:
        boxes, offsets = _layout(lines, typeface.at(steps * SIZE_STEP))
        tall, wide = offsets[-1] + boxes[-1][3] - boxes[0][1], max(box[2] - box[0] for box in boxes)
        return tall <= room[0] and wide <= room[1]

    low, high = int(at_least / SIZE_STEP), int(2 * max(room) / SIZE_STEP) + 1
    if low and not fits(low):
        return 0.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * SIZE_STEP


def draw_colours(classnames: Sequence[str], seed: int, min_contrast: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Random text and background colours, fixed per class: a function of (seed, class name) only.

    So a class has the same colours among any other classes (base, new, all) and on any machine.

    ``min_contrast`` is the least contrast ratio between the two, from 1 (any colours) to MAX_CONTRAST; 4.5 is WCAG's
    limit for text that can be read. Returns (C, 3) text and (C, 3) background colours, RGB in [0, 1].
    """
    pairs = []
    for name in classnames:
        tries = (uniform_numbers(f"{seed}/{attempt}/{clean_name(name)}", 6) for attempt in itertools.count())
        pairs.append(next(p for p in tries if contrast(p[:3], p[3:]) >= min_contrast))
    colours = torch.tensor(pairs, dtype=torch.float32)
    return colours[:, :3], colours[:, 3:]


def contrast(first: Sequence[float], second: Sequence[float]) -> float:
    """Contrast ratio of two sRGB colours in [0, 1], from 1 (equal) to 21 (black on white), after WCAG 2."""
    dark, light = sorted(map(_luminance, (first, second)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def render_blocks(
    classnames: Sequence[str], height: int, width: int, seed: int = 0, min_contrast: float = 4.5, font: str = ""
) -> torch.Tensor:
    """The class-wise visual prompts V_c, class names in random colours: (C, 3, h, w), RGB in [0, 1]."""
    mask = rasterise(classnames, height, width, font)
    text, background = (colour[:, :, None, None] for colour in draw_colours(classnames, seed, min_contrast))
    return background + mask * (text - background)


def blocks_of(options: CfgNode, classnames: Sequence[str], image_size: int) -> torch.Tensor:
    """:func:`render_blocks` with the keys of ``cfg.TRAINER.LOGOPROMPT``, for images of ``image_size`` pixels."""
    height, width = block_size(image_size, options.BLOCK_HEIGHT, options.BLOCK_WIDTH)
    return render_blocks(classnames, height, width, options.VISUAL_SEED, options.MIN_CONTRAST, options.FONT)


class VisualPrompts(nn.Module):
    """Tunable visual prompts: the pixels of the blocks as parameters (section 3.2.3).

    ``pixels`` (C, 3, h, w), RGB in [0, 1], belong to class names. When a checkpoint meets other classes, classes of the
    same name take its blocks and the others keep their rendered ones.
    """

    per_class = ("pixels",)

    def __init__(self, blocks: torch.Tensor) -> None:
        super().__init__()
        self.pixels = nn.Parameter(blocks.clone())

    def forward(self) -> torch.Tensor:
        """(C, 3, h, w) blocks, RGB in [0, 1]."""
        return self.pixels

    @torch.no_grad()
    def project(self) -> None:
        """Clamp the pixels to [0, 1]; call after every step."""
        self.pixels.clamp_(0, 1)
