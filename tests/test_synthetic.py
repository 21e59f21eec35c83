"""prompting/synthetic.py: what is drawn can be read, what is pasted is where it should be, and nothing else moved."""

import re
from functools import cache

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, features

from trainers.prompting import synthetic
from trainers.prompting.errors import UserError
from trainers.prompting.synthetic import (
    MAX_CONTRAST,
    VisualPrompts,
    _break_lines,
    _Typeface,
    block_size,
    check_font,
    contrast,
    draw_colours,
    fixed_places,
    paste,
    random_places,
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


@pytest.mark.parametrize("size", [(32, 224), (16, 224), (64, 224), (9, 64), (20, 20), (7, 300)])
def test_masks_are_whole_and_centred(size):
    masks = rasterise(NAMES, *size)
    assert masks.shape == (len(NAMES), 1, *size)
    assert masks.min() == 0 and masks.max() <= 1
    for name, mask in zip(NAMES, masks[:, 0]):
        top, bottom, left, right = ink(mask)
        # a margin of one pixel all around: nothing touches the border, so nothing was cut off
        assert top >= 1 and bottom <= size[0] - 2 and left >= 1 and right <= size[1] - 2, name
        assert abs(top - (size[0] - 1 - bottom)) <= 2 and abs(left - (size[1] - 1 - right)) <= 3, name


@pytest.mark.parametrize("name", [n for n in NAMES if n != LONG])
def test_one_line_is_drawn_as_pillow_draws_it_and_as_large_as_fits(name):
    mask = rasterise([name], 32, 224)[0, 0]
    top, bottom, left, right = ink(mask)
    text = name.replace("_", " ")
    matches = []
    for quarter in range(8, 4 * 60):
        font = font_at(quarter)
        image = Image.new("L", (400, 120))
        ImageDraw.Draw(image).text((60, 80), text, fill=255, font=font, anchor="ls")
        drawn = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(120, 400)
        y0, y1, x0, x1 = ink(drawn)
        matches.append((quarter, (y1 - y0, x1 - x0), drawn[y0 : y1 + 1, x0 : x1 + 1]))
    mine = mask[top : bottom + 1, left : right + 1]
    same = [q for q, shape, crop in matches if crop.shape == mine.shape and torch.allclose(crop / 255, mine)]
    assert same, "not the ink that Pillow draws at any size: something is clipped or squeezed"
    next_sizes = [shape for q, shape, _ in matches if q == max(same) + 4]  # one pixel of font size larger
    assert next_sizes[0][0] + 1 > 30 or next_sizes[0][1] + 1 > 222, "a larger font would have fitted"


@pytest.mark.parametrize("size", [(32, 60), (60, 30), (3, 20), (4, 40), (5, 40), (6, 40)])
@pytest.mark.parametrize("name", ["cup", "j", "jigsaw"])
def test_one_line_equals_trying_all_sizes(name, size):
    """Quarters of a pixel one by one, the last that fits, put into the middle; blocks above 4 pixels have a margin."""
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


def test_a_block_without_room_for_any_letter_is_drawn_all_the_same(capsys):
    longer = f"{LONG} {LONG}"
    for size in ((5, 5), (1, 2)):
        assert rasterise([longer, "wind chime"], *size).shape == (2, 1, *size)
        said = capsys.readouterr().out
        assert longer in said and "wind chime" in said


def test_long_names_use_more_lines_and_stay_readable():
    mask = rasterise([LONG], 32, 224)[0, 0]
    blank = (mask == 0).all(dim=1)
    top, bottom, _, _ = ink(mask)
    lines = 1 + sum(bool(blank[i]) and not bool(blank[i - 1]) for i in range(top + 1, bottom))
    assert 2 <= lines <= 3
    letters = int((~blank).sum()) / lines
    assert letters >= 8  # 54 characters at 224 pixels: letters of eight pixels and more
    assert (int(blank[top:bottom].sum()) / (lines - 1)) <= 2  # and no more than a thin gap between the lines


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
                parts = [" ".join(p) for p in (words[:i], words[i:j], words[j:]) if p]
                if len(parts) == n:
                    assert longest <= max(font.getlength(p) for p in parts)


def test_underscores_are_spaces_and_equal_names_get_equal_masks():
    masks = rasterise(["inline_skate", "inline skate", "missile", "missile"], 32, 224)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_characters_the_font_lacks_are_reported_and_never_boxes(capsys):
    accented, plain = rasterise(["crème brûlée", "creme brulee"], 32, 224)
    assert torch.equal(accented, plain)
    said = capsys.readouterr().out
    assert '"crème brûlée"' in said and "è" in said and "FONT" in said
    mixed = rasterise(["panda 熊猫"], 32, 224)
    assert torch.equal(mixed, rasterise(["panda"], 32, 224))
    assert "熊" in capsys.readouterr().out
    rasterise(["panda"], 32, 224)
    assert capsys.readouterr().out == ""


def test_what_of_a_name_can_be_drawn_and_what_cannot():
    assert _Typeface().drawable("crème  brûlée 熊") == ("creme brulee", "è é û 熊")
    assert _Typeface().drawable("plain") == ("plain", "")


@pytest.mark.parametrize(
    "name, shown",
    [
        ("熊猫", '"熊猫"'),
        ("", "empty class name"),
        ("  ", "empty class name"),
        ("_", "empty class name"),
        ("🐼", '"🐼"'),
    ],
)
def test_a_name_without_a_character_that_can_be_drawn_is_an_error(name, shown):
    with pytest.raises(UserError, match=f"{shown} cannot be drawn.*TRAINER.LOGOPROMPT.FONT"):
        rasterise(["panda", name], 32, 224)


def test_names_too_small_to_read_are_reported(capsys):
    rasterise([LONG], 9, 64)
    assert LONG in capsys.readouterr().out
    rasterise([LONG], 32, 224)
    assert capsys.readouterr().out == ""


def test_another_font_is_used_and_a_bad_one_is_an_error(tmp_path):
    path = tmp_path / "font.ttf"
    path.write_bytes(ImageFont.load_default(12).font_bytes)
    assert rasterise(["face"], 32, 224, str(path)).max() > 0.9
    with pytest.raises(UserError, match=f"cannot be drawn with {re.escape(str(path))}: set TRAINER.LOGOPROMPT.FONT"):
        rasterise(["熊猫"], 32, 224, str(path))
    text = tmp_path / "text.ttf"
    text.write_text("no font")
    for bad in (tmp_path / "none.ttf", tmp_path, text):
        remedy = f"TRAINER.LOGOPROMPT.FONT {re.escape(str(bad))}: .*give a .ttf or .otf"
        with pytest.raises(UserError, match=remedy):
            rasterise(["face"], 32, 224, str(bad))
        with pytest.raises(UserError, match=remedy):
            render_blocks(["face"], 32, 224, font=str(bad))
        with pytest.raises(UserError, match=remedy):
            check_font(str(bad))
    check_font("")


def test_a_glyph_without_ink_is_no_name(tmp_path):
    """Pillow's font with an empty glyph for the letter X."""
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from fontTools.ttLib import TTFont

    path = tmp_path / "font.ttf"
    path.write_bytes(ImageFont.load_default(12).font_bytes)
    font = TTFont(path)
    font["glyf"][font.getBestCmap()[ord("X")]] = TTGlyphPen(None).glyph()
    font.save(path)
    assert rasterise(["Xa"], 32, 224, str(path)).max() > 0.9
    with pytest.raises(UserError, match='"X" cannot be drawn'):
        rasterise(["cup", "X"], 32, 224, str(path))


def test_a_pillow_without_freetype_is_an_error_that_says_so(monkeypatch):
    def load_default(size):
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    with pytest.raises(UserError, match="install Pillow with FreeType"):
        rasterise(["face"], 32, 224)


def test_only_the_user_s_font_is_shaped(tmp_path):
    """Scripts that need shaping get it where Pillow can; the built-in font looks the same with any build of Pillow."""
    path = tmp_path / "font.ttf"
    path.write_bytes(ImageFont.load_default(12).font_bytes)
    best = ImageFont.Layout.RAQM if features.check("raqm") else ImageFont.Layout.BASIC
    assert _Typeface(str(path)).at(20).layout_engine == best
    assert _Typeface().at(20).layout_engine == ImageFont.Layout.BASIC


def test_colours_depend_on_seed_and_name_only_and_keep_the_contrast():
    names = [f"class {i}" for i in range(60)]
    text, background = draw_colours(names, seed=3, min_contrast=4.5)
    again = draw_colours(names[::-1], seed=3, min_contrast=4.5)
    assert torch.equal(text, again[0].flip(0)) and torch.equal(background, again[1].flip(0))
    assert not torch.equal(text, draw_colours(names, seed=4, min_contrast=4.5)[0])
    assert len({tuple(row) for row in text.tolist()}) == len(names)
    assert min(contrast(t, b) for t, b in zip(text.tolist(), background.tolist())) >= 4.499
    loose = draw_colours(names, seed=3, min_contrast=1)
    assert min(contrast(t, b) for t, b in zip(loose[0].tolist(), loose[1].tolist())) < 2
    draw_colours(names, seed=3, min_contrast=MAX_CONTRAST)  # ends


def test_contrast_is_that_of_wcag():
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert contrast((1, 1, 1), (0x77 / 255,) * 3) == pytest.approx(4.48, abs=0.005)  # the textbook grey that just fails
    assert contrast((0.3, 0.6, 0.1), (0.3, 0.6, 0.1)) == 1
    for primary, ratio in (((1, 0, 0), 3.998), ((0, 1, 0), 1.372), ((0, 0, 1), 8.592)):  # on white, by any checker
        assert contrast(primary, (1, 1, 1)) == pytest.approx(ratio, abs=0.001)
    assert contrast((0.03, 0.03, 0.03), (1, 1, 1)) == pytest.approx(1.05 / (0.03 / 12.92 + 0.05))  # the linear part


def test_blocks_mix_text_and_background_by_coverage():
    names = ["face", "cup"]
    blocks = render_blocks(names, 32, 224, seed=5)
    mask = rasterise(names, 32, 224)
    text, background = draw_colours(names, 5, 4.5)
    for c in range(2):
        for channel in range(3):
            for y, x in ((0, 0), (16, 112), (15, 100), (12, 90)):
                m = mask[c, 0, y, x]
                expected = m * text[c, channel] + (1 - m) * background[c, channel]
                assert blocks[c, channel, y, x] == pytest.approx(expected.item(), abs=1e-6)
    assert blocks.min() >= 0 and blocks.max() <= 1
    assert torch.equal(render_blocks(names, 32, 224), render_blocks(names, 32, 224, seed=0, min_contrast=4.5, font=""))


def test_block_size_and_its_limits():
    assert block_size(224, 1 / 7, 1.0) == (32, 224)
    assert block_size(224, 1 / 14, 1.0) == (16, 224)
    assert block_size(224, 2 / 7, 0.5) == (64, 112)
    assert block_size(224, 0.001, 1.0) == (1, 224) and block_size(224, 1.0, 0.001) == (224, 1)
    for height, width, wrong in (
        (1.01, 1.0, "BLOCK_HEIGHT 1.01"),
        (0.0, 1.0, "BLOCK_HEIGHT 0"),
        (-1, 1, "BLOCK_HEIGHT -1"),
        (0.5, 1.5, "BLOCK_WIDTH 1.5"),
        (0.5, 0, "BLOCK_WIDTH 0"),
    ):
        with pytest.raises(UserError, match=f"TRAINER.LOGOPROMPT.{wrong}: .* larger than 0 and no larger than"):
            block_size(224, height, width)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("block", [(3, 8), (8, 8), (1, 1), (5, 2)])
def test_paste_equals_the_loop(block, dtype):
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 8, 8, generator=draw).to(dtype)
    blocks = torch.rand(6, 3, *block, generator=draw).to(dtype)
    places = random_places(6, 8, block, "random")
    before = images.clone()
    pasted = paste(images, blocks, places)
    assert torch.equal(images, before)
    for i, (top, left) in enumerate(places.tolist()):
        for y in range(8):
            for x in range(8):
                inside = top <= y < top + block[0] and left <= x < left + block[1]
                expected = blocks[i, :, y - top, x - left] if inside else images[i, :, y, x]
                assert torch.equal(pasted[i, :, y, x], expected)


def test_paste_keeps_the_dtype_and_the_device_of_the_images():
    places = torch.tensor([[0, 0], [4, 2]])
    images, blocks = torch.zeros(2, 3, 6, 6, dtype=torch.float16), torch.ones(2, 3, 2, 4)
    assert paste(images, blocks, places).dtype == torch.float16
    elsewhere = paste(images.to("meta"), blocks.to("meta"), places)  # places are drawn on the CPU
    assert elsewhere.device.type == "meta" and elsewhere.shape == images.shape


def test_paste_passes_gradients_to_the_block_alone_where_it_covers():
    images = torch.rand(2, 3, 6, 6, requires_grad=True)
    blocks = torch.rand(2, 3, 2, 4, requires_grad=True)
    paste(images, blocks, torch.tensor([[1, 2], [4, 0]])).sum().backward()
    assert torch.equal(blocks.grad, torch.ones_like(blocks))
    assert images.grad.sum() == 2 * 3 * (36 - 8)


@pytest.mark.parametrize("place", [(5, 0), (-1, 0), (0, 3), (0, -2)])
def test_paste_refuses_blocks_that_stick_out(place):
    with pytest.raises(ValueError, match="sticks out"):
        paste(torch.zeros(1, 3, 6, 6), torch.zeros(1, 3, 2, 4), torch.tensor([place]))


def test_random_places_cover_every_place_and_nothing_else():
    torch.manual_seed(0)
    places = random_places(4000, 8, (3, 7), "random")
    seen = {tuple(p) for p in places.tolist()}
    assert seen == {(top, left) for top in range(6) for left in range(2)}
    counts = torch.bincount(places[:, 0], minlength=6)
    assert counts.min() > 4000 / 6 * 0.8
    torch.manual_seed(0)
    assert torch.equal(places, random_places(4000, 8, (3, 7), "random"))
    assert {tuple(p) for p in random_places(9, 8, (3, 8), "top").tolist()} == {(0, 0)}
    assert {tuple(p) for p in random_places(9, 8, (3, 8), "bottom").tolist()} == {(5, 0)}
    # narrower than the image: in the middle, the odd pixel to the right
    assert random_places(2, 9, (3, 4), "top").tolist() == [[0, 2]] * 2
    assert random_places(2, 9, (3, 4), "bottom").tolist() == [[6, 2]] * 2


def test_the_largest_number_drawn_still_keeps_the_block_inside(monkeypatch):
    """In float32 1 - 2**-32 would be 1, and the block would stick out by a pixel."""
    monkeypatch.setattr(synthetic, "_uniform", lambda key, n: [1 - 2**-32] * n)
    assert fixed_places(["a.jpg"], 0, 64, (9, 32), "random").tolist() == [[55, 32]]


def test_fixed_places_depend_on_seed_and_path_only():
    paths = [f"a/{i}.jpg" for i in range(400)]
    places = fixed_places(paths, 0, 64, (9, 64), "random")
    order = torch.randperm(400)
    assert torch.equal(places[order], fixed_places([paths[i] for i in order], 0, 64, (9, 64), "random"))
    torch.manual_seed(123)
    assert torch.equal(places, fixed_places(paths, 0, 64, (9, 64), "random"))
    assert not torch.equal(places, fixed_places(paths, 1, 64, (9, 64), "random"))
    assert set(places[:, 0].tolist()) == set(range(56)) and set(places[:, 1].tolist()) == {0}
    # known values: the same on every machine, in every version
    known = fixed_places(["caltech-101/x.jpg", "b.png"], 1, 224, (32, 112), "random")
    assert known.tolist() == KNOWN_PLACES
    # names that are no UTF-8, as Python reads them from a disk
    odd = fixed_places(["\udcff.jpg", "\udcfe.jpg"], 0, 64, (9, 32), "random").tolist()
    assert odd[0] != odd[1] and all(0 <= top <= 55 and 0 <= left <= 32 for top, left in odd)


KNOWN_PLACES = [[190, 30], [113, 23]]


def test_visual_prompts_are_parameters_of_their_own_within_the_valid_range():
    blocks = torch.rand(2, 3, 4, 5)
    before, prompts = blocks.clone(), VisualPrompts(blocks)
    assert torch.equal(prompts(), before) and [n for n, _ in prompts.named_parameters()] == ["pixels"]
    with torch.no_grad():
        prompts.pixels[0] += 2
        prompts.pixels[1] -= 2
    prompts.project()
    assert torch.equal(prompts()[0], torch.ones(3, 4, 5)) and torch.equal(prompts()[1], torch.zeros(3, 4, 5))
    assert torch.equal(blocks, before)  # what was rendered is left as it is
