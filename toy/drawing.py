"""Drawings of named things, the images of ``datasets/shapes.py``.

A kind of thing is a function that returns polygons in the unit square [-1, 1] x [-1, 1] (x to the right, y down), each
with the role that decides its colour. :func:`draw` turns a kind and a :class:`Style` into an image. All randomness
comes from the given ``RandomState``, whose numbers NumPy guarantees not to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import RandomState
from PIL import Image, ImageDraw, ImageFilter

MAIN, ACCENT, DETAIL, HOLE = 1, 2, 3, 0  # roles; a hole shows the background
OVERSAMPLING = 2  # drawn larger, then averaged for smooth edges
Shape = list[tuple[int, np.ndarray]]  # (role, (N, 2) corners), later ones on top

COLOURS = {
    "red": (214, 40, 40), "orange": (244, 130, 30), "yellow": (246, 210, 50), "green": (56, 150, 60),
    "blue": (40, 90, 200), "purple": (125, 55, 160), "pink": (240, 140, 180), "brown": (125, 78, 45),
    "white": (240, 240, 240), "gray": (130, 130, 130), "black": (28, 28, 28),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------- polygons


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> np.ndarray:
    """Corners of an ellipse, or of the part of it between two angles in degrees (0 is right, 90 is down)."""
    angle = np.radians(np.linspace(start, end, 33))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=float)


def _polygon(*corners: tuple[float, float]) -> np.ndarray:
    return np.array(corners, dtype=float)


def _line(x0: float, y0: float, x1: float, y1: float, width: float) -> np.ndarray:
    """A straight stroke as a polygon."""
    start, end = np.array([x0, y0]), np.array([x1, y1])
    along = (end - start) / np.linalg.norm(end - start)
    across = np.array([-along[1], along[0]]) * width / 2
    return np.stack([start + across, end + across, end - across, start - across])


def _star(points: int, inner: float, turn: float = -90) -> np.ndarray:
    angle = np.radians(turn + np.arange(2 * points) * 180 / points)
    radius = np.where(np.arange(2 * points) % 2 == 0, 0.95, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _arch(x: float, y: float, radius: float, width: float, start: float, end: float) -> np.ndarray:
    """A part of a ring."""
    outer, inner = (_ellipse(x, y, r, r, start, end) for r in (radius, radius - width))
    return np.concatenate([outer, inner[::-1]])


# ------------------------------------------------------------------------------------------------- the kinds


def _arrow(r: RandomState) -> Shape:
    shaft, head = r.uniform(0.12, 0.25), r.uniform(0.45, 0.75)
    return [(MAIN, _box(-0.95, -shaft, 0.3, shaft)), (MAIN, _polygon((0.2, -head), (0.95, 0), (0.2, head)))]


def _bottle(r: RandomState) -> Shape:
    width = r.uniform(0.32, 0.45)
    neck = width * 0.45
    return [
        (MAIN, _polygon((-neck, -0.5), (neck, -0.5), (width, -0.1), (width, 0.95), (-width, 0.95), (-width, -0.1))),
        (MAIN, _box(-neck, -0.85, neck, -0.4)),
        (DETAIL, _box(-neck * 1.25, -0.98, neck * 1.25, -0.8)),
        (ACCENT, _box(-width, 0.15, width, 0.6)),
    ]


def _butterfly(r: RandomState) -> Shape:
    wings = []
    for side in (-1, 1):
        wings += [
            (MAIN, _ellipse(side * 0.5, -0.35, 0.45, 0.48)),
            (MAIN, _ellipse(side * 0.42, 0.45, 0.36, 0.4)),
            (ACCENT, _ellipse(side * 0.52, -0.35, 0.2, 0.2)),
            (DETAIL, _line(0, -0.5, side * 0.28, -0.95, 0.06)),
        ]
    return [*wings, (DETAIL, _ellipse(0, 0.05, 0.1, 0.65))]


def _candle(r: RandomState) -> Shape:
    top = r.uniform(-0.35, -0.1)
    return [
        (MAIN, _box(-0.24, top, 0.24, 0.8)),
        (DETAIL, _line(0, top, 0, top - 0.16, 0.06)),
        (ACCENT, _polygon((0, top - 0.62), (0.17, top - 0.25), (0, top - 0.08), (-0.17, top - 0.25))),
        (DETAIL, _ellipse(0, 0.82, 0.62, 0.13)),
    ]


def _car(r: RandomState) -> Shape:
    roof = r.uniform(-0.6, -0.45)
    return [
        (MAIN, _polygon((-0.55, -0.05), (-0.3, roof), (0.35, roof), (0.62, -0.05))),
        (ACCENT, _polygon((-0.38, -0.08), (-0.22, roof + 0.12), (0.0, roof + 0.12), (0.0, -0.08))),
        (ACCENT, _polygon((0.08, -0.08), (0.08, roof + 0.12), (0.28, roof + 0.12), (0.46, -0.08))),
        (MAIN, _box(-0.95, -0.08, 0.95, 0.4)),
        (DETAIL, _ellipse(-0.52, 0.4, 0.24, 0.24)),
        (DETAIL, _ellipse(0.52, 0.4, 0.24, 0.24)),
        (HOLE, _ellipse(-0.52, 0.4, 0.09, 0.09)),
        (HOLE, _ellipse(0.52, 0.4, 0.09, 0.09)),
    ]


def _clock(r: RandomState) -> Shape:
    shape = [(MAIN, _ellipse(0, 0, 0.92, 0.92)), (ACCENT, _ellipse(0, 0, 0.74, 0.74))]
    for hand, length, width in ((r.uniform(0, 6.3), 0.6, 0.08), (r.uniform(0, 6.3), 0.38, 0.12)):
        shape.append((DETAIL, _line(0, 0, length * np.cos(hand), length * np.sin(hand), width)))
    for angle in np.arange(4) * np.pi / 2:
        x, y = np.cos(angle), np.sin(angle)
        shape.append((DETAIL, _line(0.56 * x, 0.56 * y, 0.7 * x, 0.7 * y, 0.1)))
    return shape


def _envelope(r: RandomState) -> Shape:
    fold = r.uniform(0.05, 0.25)
    return [
        (MAIN, _box(-0.95, -0.6, 0.95, 0.6)),
        (ACCENT, _polygon((-0.95, -0.6), (0.95, -0.6), (0, fold))),
        (DETAIL, _line(-0.95, -0.6, 0, fold, 0.07)),
        (DETAIL, _line(0.95, -0.6, 0, fold, 0.07)),
    ]


def _flag(r: RandomState) -> Shape:
    shape = [(DETAIL, _box(-0.75, -0.95, -0.62, 0.95))]
    if r.rand() < 0.5:
        return [*shape, (MAIN, _box(-0.62, -0.88, 0.85, 0.1)), (ACCENT, _box(-0.62, -0.55, 0.85, -0.22))]
    return [*shape, (MAIN, _polygon((-0.62, -0.9), (0.85, -0.4), (-0.62, 0.1)))]


def _flower(r: RandomState) -> Shape:
    petals = r.randint(5, 8)
    shape = [(DETAIL, _line(0, 0, 0, 0.95, 0.1)), (DETAIL, _ellipse(0.25, 0.62, 0.24, 0.1))]
    for angle in np.arange(petals) * 2 * np.pi / petals:
        shape.append((MAIN, _ellipse(0.38 * np.cos(angle), -0.35 + 0.38 * np.sin(angle), 0.24, 0.24)))
    return [*shape, (ACCENT, _ellipse(0, -0.35, 0.24, 0.24))]


def _heart(r: RandomState) -> Shape:
    angle = np.linspace(0, 2 * np.pi, 64)
    x = np.sin(angle) ** 3
    y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)) / 16
    return [(MAIN, np.stack([0.95 * x, 0.95 * y - 0.08], axis=1))]


def _ladder(r: RandomState) -> Shape:
    rungs = r.randint(4, 7)
    shape = [(MAIN, _box(-0.5, -0.95, -0.34, 0.95)), (MAIN, _box(0.34, -0.95, 0.5, 0.95))]
    return shape + [(ACCENT, _box(-0.34, y - 0.07, 0.34, y + 0.07)) for y in np.linspace(-0.75, 0.75, rungs)]


def _leaf(r: RandomState) -> Shape:
    along = np.linspace(0, np.pi, 33)
    half = r.uniform(0.4, 0.55) * np.sin(along) ** 0.8
    x = -0.75 * np.cos(along)
    blade = np.concatenate([np.stack([x, -half], axis=1), np.stack([x, half], axis=1)[::-1]])
    veins = [(DETAIL, _line(v, 0, v + 0.22, side * 0.26, 0.05)) for v in (-0.35, 0.0, 0.3) for side in (-1, 1)]
    return [(MAIN, blade), (DETAIL, _line(-0.98, 0, 0.7, 0, 0.08)), *veins]


def _moon(r: RandomState) -> Shape:
    thickness = r.uniform(0.35, 0.6)
    outer = _ellipse(0, 0, 0.9, 0.9, 50, 310)
    inner = _ellipse(thickness, 0, 0.72, 0.72, 68, 292)
    return [(MAIN, np.concatenate([outer, inner[::-1]]))]


def _mushroom(r: RandomState) -> Shape:
    spots = [(DETAIL, _ellipse(x, y, 0.12, 0.1)) for x, y in ((-0.4, -0.3), (0.05, -0.55), (0.45, -0.25))]
    return [
        (ACCENT, _polygon((-0.2, 0), (0.2, 0), (0.28, 0.9), (-0.28, 0.9))),
        (MAIN, _ellipse(0, 0.05, 0.9, 0.85, 180, 360)),
        *spots[: r.randint(1, 4)],
    ]


def _sun(r: RandomState) -> Shape:
    rays = r.randint(8, 13)
    shape = []
    for angle in np.arange(rays) * 2 * np.pi / rays:
        x, y = np.cos(angle), np.sin(angle)
        shape.append((ACCENT, _line(0.55 * x, 0.55 * y, 0.95 * x, 0.95 * y, 0.11)))
    return [*shape, (MAIN, _ellipse(0, 0, 0.48, 0.48))]


def _tree(r: RandomState) -> Shape:
    trunk = (DETAIL, _box(-0.13, 0.2, 0.13, 0.95))
    if r.rand() < 0.5:
        return [trunk, (MAIN, _ellipse(0, -0.3, 0.68, 0.62))]
    return [
        trunk,
        *((MAIN, _polygon((0, y - 0.6), (w, y), (-w, y))) for y, w in ((-0.3, 0.42), (0.1, 0.58), (0.5, 0.72))),
    ]


KINDS: dict[str, Callable[[RandomState], Shape]] = {
    "apple": lambda r: [
        (MAIN, _ellipse(-0.3, 0.2, 0.55, 0.68)),
        (MAIN, _ellipse(0.3, 0.2, 0.55, 0.68)),
        (DETAIL, _line(0, -0.4, r.uniform(-0.1, 0.2), -0.9, 0.12)),
        (ACCENT, _ellipse(0.3, -0.68, 0.28, 0.13)),
    ],
    "arrow": _arrow,
    "bell": lambda r: [
        (DETAIL, _ellipse(0, 0.72, 0.2, 0.2)),
        (MAIN, _ellipse(0, -0.25, 0.48, 0.55, 180, 360)),
        (MAIN, _polygon((-0.48, -0.25), (0.48, -0.25), (0.55, 0.35), (0.85, 0.65), (-0.85, 0.65), (-0.55, 0.35))),
        (ACCENT, _box(-0.8, 0.5, 0.8, 0.66)),
        (DETAIL, _ellipse(0, -0.84, 0.12, 0.12)),
    ],
    "boat": lambda r: [
        (MAIN, _polygon((-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.6, 0.85))),
        (DETAIL, _box(-0.06, -0.9, 0.04, 0.35)),
        (ACCENT, _polygon((0.1, -0.85), (0.1, 0.2), (0.8, 0.2))),
        *([(ACCENT, _polygon((-0.14, -0.6), (-0.14, 0.2), (-0.7, 0.2)))] if r.rand() < 0.5 else []),
    ],
    "bottle": _bottle,
    "butterfly": _butterfly,
    "candle": _candle,
    "car": _car,
    "clock": _clock,
    "cloud": lambda r: [
        (MAIN, _ellipse(-0.5, 0.15, 0.45, 0.36)),
        (MAIN, _ellipse(r.uniform(-0.2, 0.05), -0.15, 0.5, 0.46)),
        (MAIN, _ellipse(0.5, 0.1, 0.45, 0.4)),
        (MAIN, _box(-0.55, 0.1, 0.55, 0.5)),
    ],
    "crown": lambda r: [
        (MAIN, _polygon((-0.85, 0.6), (-0.9, -0.5), (-0.45, 0.05), (0, -0.7), (0.45, 0.05), (0.9, -0.5), (0.85, 0.6))),
        (DETAIL, _box(-0.85, 0.4, 0.85, 0.65)),
        *((ACCENT, _ellipse(x, y, 0.11, 0.11)) for x, y in ((-0.9, -0.55), (0, -0.75), (0.9, -0.55))),
    ],
    "cup": lambda r: [
        (MAIN, _arch(0.52, 0.05, 0.38, 0.14, -90, 90)),
        (MAIN, _polygon((-0.7, -0.55), (0.55, -0.55), (0.42, 0.65), (-0.55, 0.65))),
        (ACCENT, _ellipse(-0.07, -0.55, 0.62, 0.13)),
        *([(DETAIL, _ellipse(-0.07, 0.75, 0.75, 0.12))] if r.rand() < 0.5 else []),
    ],
    "diamond": lambda r: [
        (MAIN, _polygon((-0.55, -0.65), (0.55, -0.65), (0.95, -0.2), (0, 0.9), (-0.95, -0.2))),
        (ACCENT, _polygon((-0.3, -0.2), (0.3, -0.2), (0, 0.9))),
        (DETAIL, _line(-0.95, -0.2, 0.95, -0.2, 0.06)),
        (DETAIL, _line(-0.3, -0.2, 0, -0.65, 0.06)),
        (DETAIL, _line(0.3, -0.2, 0, -0.65, 0.06)),
    ],
    "envelope": _envelope,
    "fish": lambda r: [
        (ACCENT, _polygon((0.45, 0), (0.95, -0.5), (0.95, 0.5))),
        (ACCENT, _polygon((-0.2, -0.3), (0.1, -0.72), (0.3, -0.25))),
        (MAIN, _ellipse(-0.15, 0, 0.75, r.uniform(0.36, 0.5))),
        (DETAIL, _ellipse(-0.58, -0.1, 0.09, 0.09)),
    ],
    "flag": _flag,
    "flower": _flower,
    "hammer": lambda r: [
        (ACCENT, _box(-0.1, -0.5, 0.1, 0.95)),
        (MAIN, _box(-0.6, -0.85, 0.4, -0.4)),
        (MAIN, _polygon((0.4, -0.85), (0.85, -0.55), (0.4, -0.5))),
    ],
    "heart": _heart,
    "house": lambda r: [
        *([(DETAIL, _box(0.35, -0.8, 0.55, -0.2))] if r.rand() < 0.5 else []),
        (MAIN, _box(-0.7, -0.15, 0.7, 0.9)),
        (ACCENT, _polygon((-0.92, -0.12), (0, -0.92), (0.92, -0.12))),
        (DETAIL, _box(-0.15, 0.35, 0.2, 0.9)),
        (HOLE, _box(-0.52, 0.1, -0.25, 0.4)),
        (HOLE, _box(0.3, 0.1, 0.55, 0.4)),
    ],
    "ice cream": lambda r: [
        (ACCENT, _polygon((-0.42, 0.0), (0.42, 0.0), (0, 0.97))),
        (MAIN, _ellipse(0, -0.2, 0.48, 0.42)),
        (MAIN, _ellipse(0, -0.62, 0.34, 0.32)) if r.rand() < 0.5 else (DETAIL, _ellipse(0, -0.65, 0.12, 0.12)),
    ],
    "key": lambda r: [
        (MAIN, _ellipse(-0.55, 0, 0.4, 0.4)),
        (HOLE, _ellipse(-0.6, 0, 0.18, 0.18)),
        (MAIN, _box(-0.25, -0.11, 0.95, 0.11)),
        (MAIN, _box(0.7, 0, 0.85, 0.4)),
        (MAIN, _box(0.4, 0, 0.55, r.uniform(0.25, 0.4))),
    ],
    "ladder": _ladder,
    "lamp": lambda r: [
        (DETAIL, _box(-0.07, -0.2, 0.07, 0.85)),
        (DETAIL, _ellipse(0, 0.85, 0.45, 0.12)),
        (MAIN, _polygon((-0.35, -0.9), (0.35, -0.9), (0.72, -0.1), (-0.72, -0.1))),
    ],
    "leaf": _leaf,
    "moon": _moon,
    "mushroom": _mushroom,
    "star": lambda r: [(MAIN, _star(5, r.uniform(0.36, 0.48)))],
    "sun": _sun,
    "traffic light": lambda r: [
        (DETAIL, _box(-0.08, 0.6, 0.08, 0.98)),
        (MAIN, _box(-0.38, -0.95, 0.38, 0.72)),
        *((ACCENT, _ellipse(0, y, 0.19, 0.19)) for y in (-0.62, -0.1, 0.42)),
    ],
    "tree": _tree,
    "umbrella": lambda r: [
        (DETAIL, _box(-0.05, -0.85, 0.05, 0.7)),
        (DETAIL, _arch(0.15, 0.7, 0.2, 0.1, 0, 180)),
        (MAIN, _ellipse(0, 0.1, 0.92, 0.85, 180, 360)),
        (ACCENT, _polygon((-0.3, 0.1), (0.3, 0.1), (0, -0.75))),
    ],
}

# ------------------------------------------------------------------------------------------------- styles


@dataclass(frozen=True)
class Style:
    """How things are drawn. Ranges are (least, most); lengths are shares of the image's height."""

    fills: tuple[str, ...] = ("plain",)  # textures of the thing
    backgrounds: tuple[str, ...] = ("plain",)
    outline: float = 0.0  # probability of a contour line
    hollow: float = 0.0  # probability of a contour without a fill
    size: tuple[float, float] = (0.55, 0.95)  # from end to end
    turn: float = 15.0  # degrees, either way
    squeeze: float = 0.15  # change of the aspect ratio, either way
    wobble: float = 0.01  # how far contours deviate
    clutter: tuple[int, int] = (0, 0)  # small shapes behind the thing
    cover: tuple[int, int] = (0, 0)  # small shapes in front of it
    noise: tuple[float, float] = (0.0, 0.0)  # standard deviation of pixel noise, of the range of values
    blur: float = 0.0  # radius, in share of the height
    distance: float = 0.45  # minimum distance in RGB (0 to 1.73) of the thing's colour from the background's
    relief: float = 60  # difference of the background's two shades, of 255
    dark: bool = False  # backgrounds near black


STYLES = {
    # For pre-training the embedded CLIP.
    "flat": Style(),
    "outlined": Style(outline=1.0, backgrounds=("plain", "gradient"), wobble=0.02),
    "sketch": Style(hollow=1.0, outline=1.0, wobble=0.04, noise=(0.0, 0.04)),
    "striped": Style(fills=("stripes",), backgrounds=("plain", "gradient"), turn=25),
    "shaded": Style(fills=("gradient",), backgrounds=("gradient", "blobs"), size=(0.4, 0.9), clutter=(0, 4), blur=0.01),
    # Styles of the data set and of its shifted version.
    "scene": Style(
        fills=("checks", "dots", "blobs"), backgrounds=("plain", "blobs"), size=(0.5, 0.85), turn=20, squeeze=0.2,
        wobble=0.02, clutter=(0, 3), cover=(0, 1), noise=(0.0, 0.03), distance=0.4,
    ),
    "chalk": Style(
        hollow=0.7, outline=1.0, fills=("speckle",), backgrounds=("speckle",), size=(0.4, 0.8), turn=30, squeeze=0.25,
        wobble=0.04, clutter=(0, 2), noise=(0.0, 0.05), blur=0.012, relief=25, dark=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """An image and the facts for its caption."""

    image: Image.Image
    kind: str
    colour: str
    fill: str
    size: str  # small, large or empty


def draw(kind: str, style: Style, random: RandomState, pixels: int) -> Drawing:
    """Draw one thing.

    Args:
        kind: a key of KINDS.
        style: how to draw it.
        random: source of every choice; the same state gives the same image.
        pixels: height and width.
    """
    canvas = pixels * OVERSAMPLING
    fill, background = (str(options[random.randint(len(options))]) for options in (style.fills, style.backgrounds))
    far, near, colour = _colours(style, random)
    picture = _texture(background, far, random, canvas)

    for _ in range(random.randint(style.clutter[0], style.clutter[1] + 1)):
        _scatter(picture, random, canvas)
    extent = random.uniform(*style.size)
    roles = _place(KINDS[kind](random), style, extent, random, canvas)
    hollow = random.rand() < style.hollow
    if not hollow:
        for role, base in zip((MAIN, ACCENT, DETAIL), near):
            here = roles == role
            if here.any():
                picture[here] = _texture(fill if role == MAIN else "plain", base, random, canvas)[here]
    if hollow or random.rand() < style.outline:
        width = max(1, round(random.uniform(0.008, 0.022) * canvas))
        picture[_contour(roles, width)] = near[0][0] if hollow else _clash(near[0][0])
    for _ in range(random.randint(style.cover[0], style.cover[1] + 1)):
        _scatter(picture, random, canvas, near_middle=True)

    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).resize((pixels, pixels), Image.BOX)
    if style.blur:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, style.blur) * pixels))
    if style.noise[1]:
        noisy = np.asarray(image, dtype=np.float32) + 255 * random.uniform(*style.noise) * random.standard_normal(
            (pixels, pixels, 3)
        ).astype(np.float32)
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    low, high = style.size
    size = "small" if extent < low + 0.3 * (high - low) else "large" if extent > low + 0.7 * (high - low) else ""
    return Drawing(image, kind, colour, "outlined" if hollow else fill, size)


def named_colour(random: RandomState, names: tuple[str, ...] = tuple(COLOURS)) -> tuple[str, np.ndarray]:
    """Return the name of a colour and an RGB value near it, 0 to 255."""
    name = str(names[random.randint(len(names))])
    return name, np.clip(np.array(COLOURS[name]) + random.uniform(-22, 22, 3), 0, 255)


def _colours(style: Style, random: RandomState) -> tuple[tuple, list[tuple], str]:
    """Two shades for the background; two for each role of the thing; the name of the thing's main colour."""
    if style.dark:
        back = random.uniform(5, 60, 3)
    else:
        _, back = named_colour(random)
    far = (back, np.clip(back + random.uniform(-style.relief, style.relief, 3), 0, 255))
    while True:
        colour, main = named_colour(random)
        if np.linalg.norm((main - back) / 255) >= style.distance:
            break
    near = []
    for base in (main, named_colour(random)[1], _clash(main)):
        near.append((base, np.clip(base + np.sign(127 - base.mean()) * random.uniform(50, 110), 0, 255)))
    return far, near, colour


def _clash(colour: np.ndarray) -> np.ndarray:
    """Return a dark shade for light colours and a light one for dark colours."""
    return np.clip(colour * 0.3 if colour.mean() > 110 else 255 - (255 - colour) * 0.35, 0, 255)


def _texture(name: str, shades: tuple[np.ndarray, np.ndarray], random: RandomState, canvas: int) -> np.ndarray:
    """(canvas, canvas, 3) of two shades, 0 to 255."""
    first, second = shades
    if name == "plain":
        return np.tile(first.astype(np.float32), (canvas, canvas, 1))
    if name in ("blobs", "speckle"):
        cells = random.randint(4, 10) if name == "blobs" else canvas // 3
        coarse = Image.fromarray(random.rand(cells, cells).astype(np.float32))
        weight = np.clip(np.asarray(coarse.resize((canvas, canvas), Image.BILINEAR)), 0, 1)
    else:
        angle, period = random.uniform(0, np.pi), canvas * random.uniform(0.05, 0.14)
        axis = np.arange(canvas, dtype=np.float32)
        u = axis * np.cos(angle) + axis[:, None] * np.sin(angle)
        v = axis[:, None] * np.cos(angle) - axis * np.sin(angle)
        if name == "gradient":
            weight = (u - u.min()) / (u.max() - u.min())
        elif name == "stripes":
            weight = (u // period) % 2
        elif name == "checks":
            weight = (u // period + v // period) % 2
        elif name == "dots":
            weight = ((u % period / period - 0.5) ** 2 + (v % period / period - 0.5) ** 2 < 0.1).astype(np.float32)
        else:
            raise KeyError(f"no texture {name}")
    return first + weight[:, :, None].astype(np.float32) * (second - first).astype(np.float32)


def _place(shape: Shape, style: Style, extent: float, random: RandomState, canvas: int) -> np.ndarray:
    """Turn, squeeze, bend and place a shape. Returns (canvas, canvas) roles."""
    angle = np.radians(random.uniform(-style.turn, style.turn))
    squeeze = 1 + random.uniform(-style.squeeze, style.squeeze)
    flip = -1 if random.rand() < 0.5 else 1
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.diag([flip * squeeze, 1 / squeeze]) * extent * canvas / 2
    room = max(0.0, (1 - extent) / 2)
    centre = canvas * (0.5 + random.uniform(-room, room, 2))
    # The same sine waves bend all contours, so that parts stay together.
    waves = random.uniform(2, 7, (2, 2)), random.uniform(0, 2 * np.pi, (2, 2))
    image = Image.new("L", (canvas, canvas), 0)
    pen = ImageDraw.Draw(image)
    for role, corners in shape:
        points = _subdivide(corners)
        bent = np.sin(points @ waves[0] + waves[1][0]) * style.wobble * 2
        placed = (points + bent) @ matrix.T + centre
        pen.polygon([tuple(point) for point in placed], fill=role)
    return np.asarray(image)


def _subdivide(corners: np.ndarray, step: float = 0.25) -> np.ndarray:
    """Add corners to long edges, so that they can bend."""
    following = np.roll(corners, -1, axis=0)
    pieces = []
    for a, b in zip(corners, following):
        n = max(1, int(np.ceil(np.linalg.norm(b - a) / step)))
        pieces.append(a + (b - a) * (np.arange(n) / n)[:, None])
    return np.concatenate(pieces)


def _contour(roles: np.ndarray, width: int) -> np.ndarray:
    """Return a mask of where the role changes, ``width`` pixels wide."""
    edge = np.zeros(roles.shape, dtype=bool)
    edge[1:] |= roles[1:] != roles[:-1]
    edge[:, 1:] |= roles[:, 1:] != roles[:, :-1]
    if width > 1:
        grown = Image.fromarray(edge.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(width // 2 * 2 + 1))
        edge = np.asarray(grown) > 0
    return edge


def _scatter(picture: np.ndarray, random: RandomState, canvas: int, near_middle: bool = False) -> None:
    """Paint a small shape into the picture."""
    _, colour = named_colour(random)
    size = random.uniform(0.04, 0.13)
    middle = random.uniform(0.3, 0.7, 2) if near_middle else random.uniform(0, 1, 2)
    corners = (
        _ellipse(0, 0, 1, random.uniform(0.4, 1)),
        _box(-1, -1, 1, 1),
        _polygon((-1, 0.8), (0, -1), (1, 0.8)),
        _line(-1.5, 0, 1.5, 0, 0.4),
    )[random.randint(4)]
    angle = random.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = corners @ rotation.T * size * canvas / 2 * 1.5 + middle * canvas
    image = Image.new("L", (canvas, canvas), 0)
    ImageDraw.Draw(image).polygon([tuple(point) for point in points], fill=1)
    picture[np.asarray(image) > 0] = colour
