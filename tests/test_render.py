"""render.py: class names fit their blocks, can be read, and look the same every time."""

import re
from functools import cache

import pytest
import torch
from helpers import one_line
from PIL import Image, ImageDraw, ImageFont, features
from yacs.config import CfgNode as CN

from trainers.logoprompt import KEYS
from trainers.prompting.errors import UserError
from trainers.prompting.render import (
    MAX_CONTRAST,
    VisualPrompts,
    _break_lines,
    _Typeface,
    blocks_of,
    check_font,
    contrast,
    draw_colours,
    rasterise,
    render_blocks,
)

LONG = "Chevrolet Silverado 1500 Hybrid Crew Cab Pickup 2012 L"  # 54 characters
NAMES = ["face", "inline_skate", "gyp", "a", "Saint Bernard", "2012 Tesla Model S", "electric guitar", LONG]


def ink(mask):
    rows, columns = (mask > 0).nonzero(as_tuple=True)
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


@cache
def font_at(quarters):
    return ImageFont.load_default(quarters / 4)


@pytest.fixture
def font_file(tmp_path):
    """Pillow's own font as a file of the user."""
    path = tmp_path / "font.ttf"
    path.write_bytes(ImageFont.load_default(12).font_bytes)
    return path


@pytest.mark.parametrize("size", [(32, 224), (16, 224), (64, 224), (9, 64), (20, 20), (7, 300)])
def test_names_fit_and_are_centred(size):
    masks = rasterise(NAMES, *size)
    assert masks.shape == (len(NAMES), 1, *size)
    assert masks.min() == 0 and masks.max() <= 1
    for name, mask in zip(NAMES, masks[:, 0]):
        top, bottom, left, right = ink(mask)
        # a margin of one pixel all around: nothing touches the border, so nothing was cut off
        assert top >= 1 and bottom <= size[0] - 2 and left >= 1 and right <= size[1] - 2, name
        assert abs(top - (size[0] - 1 - bottom)) <= 2 and abs(left - (size[1] - 1 - right)) <= 3, name


@pytest.mark.parametrize("size", [(32, 224), (32, 60), (60, 30), (3, 20), (4, 40), (5, 40), (6, 40)])
@pytest.mark.parametrize("name", ["cup", "j", "jigsaw"])
def test_one_line_equals_search_over_all_sizes(name, size):
    """Of all sizes in quarters of a pixel the last that fits; blocks above 4 pixels have a margin."""
    height, width = size
    margin = 1 if min(size) > 4 else 0
    fonts = [font_at(quarter) for quarter in range(2, 4 * 100)]
    boxes = [font.getbbox(name, anchor="ls") for font in fonts]
    font, (left, top, right, bottom) = [
        (f, b) for f, b in zip(fonts, boxes) if b[2] - b[0] <= width - 2 * margin and b[3] - b[1] <= height - 2 * margin
    ][-1]
    image = Image.new("L", (width, height))
    place = (round((width - right + left) / 2 - left), round((height - bottom + top) / 2 - top))
    ImageDraw.Draw(image).text(place, name, fill=255, font=font, anchor="ls")
    expected = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width) / 255
    torch.testing.assert_close(rasterise([name], height, width)[0, 0], expected)


def test_names_too_small_to_read_are_reported(capsys):
    rasterise([LONG], 9, 64)
    assert LONG in capsys.readouterr().out
    rasterise([LONG], 32, 224)
    assert capsys.readouterr().out == ""


def test_lines_break_where_the_longest_line_is_shortest():
    typeface = _Typeface()
    words = ["a", "bb", "ccc", "dddd", "eeeee", "ff"]
    font = typeface.at(64)
    for n in (1, 2, 3):
        best = _break_lines(words, n, typeface)
        assert " ".join(best).split() == words and len(best) == n
        longest = max(font.getlength(line) for line in best)
        for i in range(1, len(words)):
            for j in range(i, len(words)):
                lines = [" ".join(line) for line in (words[:i], words[i:j], words[j:]) if line]
                if len(lines) == n:
                    assert longest <= max(font.getlength(line) for line in lines)


def test_characters_missing_from_the_font_are_reported_and_never_drawn_as_boxes(capsys):
    accented, plain = rasterise(["crème brûlée", "creme brulee"], 32, 224)
    assert torch.equal(accented, plain) and torch.equal(*rasterise(["inline_skate", "inline skate"], 32, 224))
    reported = capsys.readouterr().out
    assert '"crème brûlée" (è é û) is drawn as "creme brulee"' in reported and "TRAINER.LOGOPROMPT.FONT" in reported
    mixed = rasterise(["panda 熊猫"], 32, 224)
    assert torch.equal(mixed, rasterise(["panda"], 32, 224))
    assert "熊" in capsys.readouterr().out
    rasterise(["panda"], 32, 224)
    assert capsys.readouterr().out == ""
    assert _Typeface().drawable("crème  brûlée 熊") == ("creme brulee", "è é û 熊")


@pytest.mark.parametrize("name, shown", [("熊猫", '"熊猫"'), ("_", "an empty class name"), ("", "an empty class name")])
def test_name_without_drawable_characters_is_refused(name, shown):
    message = one_line(lambda: rasterise(["panda", name], 32, 224))
    assert message.startswith(f"{shown} cannot be drawn with Pillow's built-in font: set TRAINER.LOGOPROMPT.FONT")


def test_font_of_the_user(font_file):
    assert rasterise(["face"], 32, 224, str(font_file)).max() > 0.9
    with pytest.raises(UserError, match=f"cannot be drawn with {re.escape(str(font_file))}: set TRAINER.LOGOPROMPT.F"):
        rasterise(["熊猫"], 32, 224, str(font_file))
    check_font("")


def test_unreadable_font_is_refused(tmp_path):
    text = tmp_path / "text.ttf"
    text.write_text("no font")
    for bad in (tmp_path / "none.ttf", tmp_path, text):
        for call in (
            lambda b: rasterise(["face"], 32, 224, b),
            lambda b: render_blocks(["a"], 9, 9, font=b),
            check_font,
        ):
            message = one_line(lambda c=call, b=str(bad): c(b))
            assert message.startswith(f"TRAINER.LOGOPROMPT.FONT {bad}: ") and "give a .ttf or .otf file" in message


def test_only_fonts_of_the_user_are_shaped(font_file):
    """Scripts that need shaping get it where Pillow can; the built-in font looks the same with any build of Pillow."""
    best = ImageFont.Layout.RAQM if features.check("raqm") else ImageFont.Layout.BASIC
    assert _Typeface(str(font_file)).at(20).layout_engine == best
    assert _Typeface().at(20).layout_engine == ImageFont.Layout.BASIC


def test_colours_are_a_function_of_seed_and_name_with_enough_contrast():
    names = [f"class_{i}" for i in range(60)]
    text, background = draw_colours(names, seed=3, min_contrast=4.5)
    again = draw_colours([name.replace("_", " ") for name in reversed(names)], seed=3, min_contrast=4.5)
    assert torch.equal(text, again[0].flip(0)) and torch.equal(background, again[1].flip(0))
    assert not torch.equal(text, draw_colours(names, seed=4, min_contrast=4.5)[0])
    assert len({tuple(row) for row in text.tolist()}) == len(names)
    assert min(contrast(t, b) for t, b in zip(text.tolist(), background.tolist())) >= 4.499
    loose = draw_colours(names, seed=3, min_contrast=1)
    assert min(contrast(t, b) for t, b in zip(loose[0].tolist(), loose[1].tolist())) < 2
    strict = draw_colours(names, seed=3, min_contrast=MAX_CONTRAST)
    assert min(contrast(t, b) for t, b in zip(strict[0].tolist(), strict[1].tolist())) >= MAX_CONTRAST - 1e-3


def test_contrast_follows_wcag():
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert contrast((1, 1, 1), (0x77 / 255,) * 3) == pytest.approx(4.48, abs=0.005)  # the textbook grey that just fails
    assert contrast((0.3, 0.6, 0.1), (0.3, 0.6, 0.1)) == 1
    for primary, ratio in (((1, 0, 0), 3.998), ((0, 1, 0), 1.372), ((0, 0, 1), 8.592)):  # on white, by any checker
        assert contrast(primary, (1, 1, 1)) == pytest.approx(ratio, abs=0.001)
    assert contrast((0.03, 0.03, 0.03), (1, 1, 1)) == pytest.approx(1.05 / (0.03 / 12.92 + 0.05))  # the linear part


def test_blocks_mix_text_and_background_by_coverage():
    names = ["face", "cup"]
    blocks = render_blocks(names, 12, 40, seed=5)
    mask, (text, background) = rasterise(names, 12, 40), draw_colours(names, 5, 4.5)
    for c in range(2):
        for channel in range(3):
            for y in range(12):
                for x in range(40):
                    m = mask[c, 0, y, x].item()
                    expected = m * text[c, channel].item() + (1 - m) * background[c, channel].item()
                    assert blocks[c, channel, y, x].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(render_blocks(names, 32, 224), render_blocks(names, 32, 224, seed=0, min_contrast=4.5, font=""))


def test_blocks_of_a_config(font_file):
    changed = {"BLOCK_HEIGHT": 0.5, "BLOCK_WIDTH": 0.25, "VISUAL_SEED": 3, "MIN_CONTRAST": 2.0, "FONT": str(font_file)}
    options = CN({key: key_with_rule.default for key, key_with_rule in KEYS.items()})
    assert torch.equal(blocks_of(options, NAMES, 63), render_blocks(NAMES, 9, 63))
    options.update(changed)
    assert torch.equal(blocks_of(options, NAMES, 64), render_blocks(NAMES, 32, 16, 3, 2.0, str(font_file)))


def test_tunable_blocks_start_as_given_and_stay_in_range():
    blocks = torch.rand(2, 3, 4, 5)
    before, prompts = blocks.clone(), VisualPrompts(blocks)
    assert torch.equal(prompts(), before) and [n for n, _ in prompts.named_parameters()] == ["pixels"]
    with torch.no_grad():
        prompts.pixels += torch.randn_like(blocks)
    expected = [min(1.0, max(0.0, value)) for value in prompts.pixels.flatten().tolist()]
    prompts.project()
    assert prompts().flatten().tolist() == expected
    assert torch.equal(blocks, before)
