"""Class names -> class-wise visual prompts V_c (blocks); blocks -> class-conditional images x_c (section 3.2).

A name is rasterised once, on the CPU, into a coverage mask; colouring and pasting are tensor operations on the device
and differentiable, so a block may as well be a parameter.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont

from .errors import UserError
from .names import clean_name, printable

LOCATIONS = ("random", "top", "bottom")
MAX_LINES = 3
READABLE = 7.0  # font size in pixels under which nobody reads a name
MAX_CONTRAST = 10.0  # beyond it few pairs of colours are left
SIZES = 0.25  # step of the font sizes tried, in pixels


# ------------------------------------------------------------------------------------------------- names to masks


def rasterise(classnames: Sequence[str], height: int, width: int, font: str = "") -> torch.Tensor:
    """Draw every class name as large as it fits, on one to three lines, centred.

    Args:
        classnames: C names; underscores are spaces.
        height, width: h and w of the block, in pixels.
        font: path of a TrueType/OpenType file; empty: the font that comes with Pillow (Aileron).

    Returns:
        (C, 1, h, w) coverage in [0, 1]: 1 where text is, 0 where background is.

    Raises:
        UserError: a name has no character that the font can draw, or the font cannot be read.
    """
    typeface = _Typeface(font)
    texts, lacking, small, masks = [], {}, set(), {}
    for name in map(clean_name, classnames):
        text, absent = typeface.drawable(name)
        if text and text not in masks:
            masks[text], size = _draw(text, height, width, typeface)
            if size < READABLE:
                small.add(text)
            elif not masks[text].any():  # of glyphs without ink
                text = ""
        if not text:
            shown = f'"{printable(name)}"' if name.strip() else "an empty class name"
            raise UserError(
                f"{shown} cannot be drawn with {typeface.name}: set TRAINER.LOGOPROMPT.FONT to another font"
            )
        if absent:
            lacking[name] = printable(f'"{name}" ({absent}) is drawn as "{text}"')
        texts.append(text)
    if lacking:
        print(f"Not in {typeface.name} (see TRAINER.LOGOPROMPT.FONT): {'; '.join(lacking.values())}")
    if small:
        print(f"Visual prompts too small to read in {height}x{width} pixels: {', '.join(sorted(small))}")
    return torch.stack([masks[text] for text in texts]).unsqueeze(1)


def check_font(path: str) -> None:
    """Raises UserError where the font cannot be read; an empty path is Pillow's own font."""
    _Typeface(path)


class _Typeface:
    """A font at any size, and the characters it has."""

    def __init__(self, path: str = "") -> None:
        self.name = path or "Pillow's built-in font"
        self._layout = ImageFont.Layout.BASIC if not path else None  # shaping where the user's font may need it
        try:
            if path:
                with open(path, "rb") as file:
                    self._bytes = file.read()
            else:
                self._bytes = ImageFont.load_default(12).font_bytes
            self._characters = _characters(self._bytes)
            self._sizes: dict[float, ImageFont.FreeTypeFont] = {}
            self.at(12)
        except Exception as error:  # noqa: BLE001 (files, FreeType and fontTools each have errors of their own)
            remedy = "give a .ttf or .otf file" if path else "install Pillow with FreeType"
            raise UserError(f"TRAINER.LOGOPROMPT.FONT {path}: not a font that can be read; {remedy}") from error

    def drawable(self, name: str) -> tuple[str, str]:
        """What of a name can be drawn, and the characters the font lacks (accents are dropped where that helps)."""
        text, absent = [], []
        for character in name:
            if character.isspace() or ord(character) in self._characters:
                text.append(character)
            else:
                plain = unicodedata.normalize("NFKD", character)
                text.extend(c for c in plain if ord(c) in self._characters)
                absent.append(character)
        return " ".join("".join(text).split()), " ".join(sorted(set(absent)))

    def at(self, size: float) -> ImageFont.FreeTypeFont:
        size = max(size, 0.5)  # FreeType refuses a size that rounds to no pixel at all
        if size not in self._sizes:
            self._sizes[size] = ImageFont.truetype(io.BytesIO(self._bytes), size, layout_engine=self._layout)
        return self._sizes[size]


@lru_cache(maxsize=8)
def _characters(font_bytes: bytes) -> frozenset[int]:
    """Code points a font has glyphs for; Pillow draws a box for the others and does not tell."""
    from fontTools.ttLib import TTFont

    with TTFont(io.BytesIO(font_bytes), fontNumber=0) as font:
        return frozenset(font.getBestCmap())


def _draw(text: str, height: int, width: int, typeface: _Typeface) -> tuple[torch.Tensor, float]:
    """(h, w) coverage of one text at the largest size that fits, and that size in pixels."""
    pad = 1 if min(height, width) > 4 else 0  # anti-aliased edges stay inside the block
    room = (height - 2 * pad, width - 2 * pad)
    words = text.split()
    best: tuple[float, list[str]] = (0.0, [" ".join(words)])
    for n_lines in range(1, min(MAX_LINES, len(words)) + 1):
        lines = _break_lines(words, n_lines, typeface)
        size = _largest_size(lines, room, typeface, at_least=best[0])
        if size > best[0]:
            best = (size, lines)
    size, lines = best
    size = size or SIZES
    boxes, offsets = _layout(lines, typeface.at(size))
    top, bottom = offsets[0] + boxes[0][1], offsets[-1] + boxes[-1][3]
    image = Image.new("L", (width, height), 0)
    canvas = ImageDraw.Draw(image)
    y = (height - (bottom - top)) / 2 - top
    for line, box, offset in zip(lines, boxes, offsets):
        x = (width - (box[2] - box[0])) / 2 - box[0]
        canvas.text((round(x), round(y + offset)), line, fill=255, font=typeface.at(size), anchor="ls")
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255), size


def _break_lines(words: list[str], n_lines: int, typeface: _Typeface) -> list[str]:
    """The break into ``n_lines`` lines whose longest line is shortest."""
    font = typeface.at(64)
    length = lru_cache(maxsize=None)(lambda first, end: font.getlength(" ".join(words[first:end])))
    candidates = []
    for breaks in itertools.combinations(range(1, len(words)), n_lines - 1):
        edges = (0, *breaks, len(words))
        candidates.append((max(map(length, edges, edges[1:])), edges))
    edges = min(candidates, key=lambda candidate: candidate[0])[1]
    return [" ".join(words[a:b]) for a, b in zip(edges, edges[1:])]


def _layout(lines: list[str], font: ImageFont.FreeTypeFont) -> tuple[list[tuple], list[float]]:
    """Ink box of each line relative to its baseline, and the baselines, evenly spaced and never touching."""
    boxes = [font.getbbox(line, anchor="ls") for line in lines]
    gap = max(1.0, font.size * 0.08)
    pitch = max((upper[3] - lower[1] + gap for upper, lower in zip(boxes, boxes[1:])), default=0.0)
    return boxes, [i * pitch for i in range(len(lines))]


def _largest_size(lines: list[str], room: tuple[int, int], typeface: _Typeface, at_least: float) -> float:
    """Largest font size, a multiple of SIZES, at which the ink of all lines stays within ``room``; 0 if none does."""

    def fits(steps: int) -> bool:
        boxes, offsets = _layout(lines, typeface.at(steps * SIZES))
        tall = offsets[-1] + boxes[-1][3] - boxes[0][1]
        wide = max(box[2] - box[0] for box in boxes)
        return tall <= room[0] and wide <= room[1]

    low, high = int(at_least / SIZES), int(2 * max(room) / SIZES) + 1
    if low and not fits(low):
        return 0.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * SIZES


# ------------------------------------------------------------------------------------------------- masks to blocks


def draw_colours(classnames: Sequence[str], seed: int, min_contrast: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Random text and background colours, fixed per class: a function of (seed, class name) only.

    A class keeps its colours among any other classes (base, new, all) and on any machine.

    Args:
        min_contrast: least contrast ratio between text and background as WCAG 2 defines it, from 1 (any colours) to
            MAX_CONTRAST; 4.5 is WCAG's limit for text that can be read.

    Returns:
        (C, 3) text colours and (C, 3) background colours, RGB in [0, 1].
    """
    pairs = []
    for name in classnames:
        tries = (_uniform(f"{seed}/{attempt}/{clean_name(name)}", 6) for attempt in itertools.count())
        pairs.append(next(p for p in tries if contrast(p[:3], p[3:]) >= min_contrast))
    colours = torch.tensor(pairs, dtype=torch.float32)
    return colours[:, :3], colours[:, 3:]


def contrast(first: Sequence[float], second: Sequence[float]) -> float:
    """Contrast ratio of two sRGB colours in [0, 1], from 1 (equal) to 21 (black on white), after WCAG 2."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _uniform(key: str, n: int) -> list[float]:
    """n numbers in [0, 1) that depend on ``key`` alone: not on a random state, the process or the Python version."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4 * n).digest()
    return [int.from_bytes(digest[4 * i : 4 * i + 4], "little") / 2**32 for i in range(n)]


def render_blocks(
    classnames: Sequence[str], height: int, width: int, seed: int = 0, min_contrast: float = 4.5, font: str = ""
) -> torch.Tensor:
    """The class-wise visual prompts V_c: class names in random colours.

    Returns:
        (C, 3, h, w) blocks, RGB in [0, 1], not normalised.
    """
    mask = rasterise(classnames, height, width, font)
    text, background = (colour[:, :, None, None] for colour in draw_colours(classnames, seed, min_contrast))
    return background + mask * (text - background)


# ------------------------------------------------------------------------------------------------- blocks to images


def block_size(image_size: int, height_ratio: float, width_ratio: float) -> tuple[int, int]:
    """(h, w) in pixels of a block that covers the given shares of an image's height and width.

    Raises:
        UserError: the block would be empty or larger than the image.
    """
    for key, ratio in (("BLOCK_HEIGHT", height_ratio), ("BLOCK_WIDTH", width_ratio)):
        if not 0 < ratio <= 1:
            raise UserError(
                f"TRAINER.LOGOPROMPT.{key} {ratio:g}: the block must be larger than 0 and no larger than the image (1)"
            )
    return max(1, round(image_size * height_ratio)), max(1, round(image_size * width_ratio))


def random_places(n: int, image_size: int, block: tuple[int, int], location: str) -> torch.Tensor:
    """Places of n blocks for training, from torch's random state. Returns (n, 2) rows of (top, left) in pixels."""
    return places_at(torch.rand(n, 2, dtype=torch.float64), image_size, block, location)


def fixed_places(
    paths: Sequence[str], seed: int, image_size: int, block: tuple[int, int], location: str
) -> torch.Tensor:
    """Places of blocks at test time: functions of (seed, image path) only.

    So a prediction depends neither on batch size or order nor on worker processes.

    Args:
        paths: image paths relative to the data root, so that moving the data changes nothing.

    Returns:
        (n, 2) rows of (top, left) in pixels.
    """
    uniform = [_uniform(f"{seed}/{path}", 2) for path in paths]
    return places_at(torch.tensor(uniform, dtype=torch.float64).view(-1, 2), image_size, block, location)


def places_at(uniform: torch.Tensor, image_size: int, block: tuple[int, int], location: str) -> torch.Tensor:
    """Places of blocks from (n, 2) numbers in [0, 1). Returns (n, 2) rows of (top, left) in pixels."""
    free = torch.tensor([image_size - block[0], image_size - block[1]])
    if location == "random":
        return (uniform * (free + 1)).long()  # every place that keeps the block inside is as likely
    top = {"top": 0, "bottom": int(free[0])}[location]
    return torch.tensor([top, int(free[1]) // 2]).expand(len(uniform), 2)


class VisualPrompts(nn.Module):
    """Tunable visual prompts: the pixels of the blocks as parameters (section 3.2).

    ``pixels`` (C, 3, h, w), RGB in [0, 1], belong to class names: with other classes at hand a checkpoint's are handed
    to those of the same name, and the others keep their rendered blocks.

    Args:
        blocks: (C, 3, h, w) rendered blocks to start from.
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
        """Bring the pixels back into the valid range; due after every step."""
        self.pixels.clamp_(0, 1)


def paste(images: torch.Tensor, blocks: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Replace a block of every image by its visual prompt: x, V_c -> x_c (section 3.2).

    Args:
        images: (B, 3, H, W).
        blocks: (B, 3, h, w) in the same range and normalisation as the images; may require gradients.
        places: (B, 2) rows of (top, left).

    Returns:
        (B, 3, H, W); the images given are left as they are.

    Raises:
        ValueError: a block would stick out of its image.
    """
    (height, width), (h, w) = images.shape[-2:], blocks.shape[-2:]
    if len(places) and not (
        int(places.min()) >= 0 and int(places[:, 0].max()) + h <= height and int(places[:, 1].max()) + w <= width
    ):
        raise ValueError(f"a block of {h}x{w} pixels sticks out of an image of {height}x{width}")
    places = places.to(images.device)
    rows = torch.arange(height, device=images.device) - places[:, :1]  # (B, H): row within the block, if any
    columns = torch.arange(width, device=images.device) - places[:, 1:]
    inside = ((rows >= 0) & (rows < h)).unsqueeze(2) & ((columns >= 0) & (columns < w)).unsqueeze(1)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices around the channel slice put the channel last: (B, H, W, 3).
    spread = blocks[sample, :, rows.clamp(0, h - 1).unsqueeze(2), columns.clamp(0, w - 1).unsqueeze(1)]
    return torch.where(inside.unsqueeze(1), spread.movedim(-1, 1).to(images.dtype), images)
