"""Odd images, odd class names, odd numbers of classes and images: what happens is defined."""

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, features
from tiny import NAMES, arguments, caltech_tree, clip_state_dict

import preview
import train
from datasets.splits import Entry, check_labels, read_split
from trainers.prompting.backbone import load_clip
from trainers.prompting.data import DecodedImages, decoded_size, read_image
from trainers.prompting.errors import UserError
from trainers.prompting.names import clean_name, matching_names, printable
from trainers.prompting.synthetic import rasterise, render_blocks
from trainers.prompting.text import PromptLearner, TextEncoder, encode_tokens

TRAINED = ["CoOp", "CoCoOp", "LoGoPrompt"]

# ------------------------------------------------------------------------------------------------- images


def pixels(path):
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)


def coop_reads(path):
    """Dassl's and CoOp's own way."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(
    "mode, kind",
    [
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("L", "PNG"),
        ("L", "JPEG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("1", "PNG"),
        ("CMYK", "TIFF"),
        ("CMYK", "JPEG"),
        ("RGBA", "WEBP"),
        ("YCbCr", "JPEG"),
        ("LAB", "TIFF"),
        ("L", "BMP"),
        ("RGB", "PPM"),
    ],
)
def test_images_of_8_bits_are_read_as_coop_reads_them(mode, kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    image = Image.fromarray(COLOURS).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(RAMP))
    image.save(path, kind)
    assert (pixels(path) == coop_reads(path)).all()


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_transparency_of_a_palette_is_left_out_without_a_word(transparency, tmp_path, recwarn):
    path = tmp_path / "x.png"
    image = Image.fromarray(RAMP).convert("P")
    image.save(path, transparency=transparency)
    assert (pixels(path) == RAMP[..., None]).all()
    assert not recwarn.list


def test_transparency_shows_the_colour_below(tmp_path):
    image = Image.new("RGBA", (2, 1), (10, 200, 30, 0))
    image.save(tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").tolist() == [[[10, 200, 30]] * 2]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled(kind, tmp_path):
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x", kind)
    assert pixels(tmp_path / "x")[0, :, 0].tolist() == [0, 1, 4, 128, 255]
    assert coop_reads(tmp_path / "x")[0, :, 0].tolist() == [0, 255, 255, 255, 255]  # why it is not left to Pillow


def test_whole_numbers_and_floats(tmp_path):
    path = tmp_path / "x.tiff"
    for values, expected in (
        (np.array([[-5, 0, 257, 65535, 2**30]], dtype=np.int32), [0, 0, 1, 255, 255]),
        (np.array([[0, 0.5, 1, -1, np.nan]], dtype=np.float32), [0, 128, 255, 0, 0]),
        (np.array([[0, 0.6, 200, 255, 1e9]], dtype=np.float32), [0, 1, 200, 255, 255]),
        (np.array([[0, 1, np.inf, -np.inf, 254.4]], dtype=np.float32), [0, 1, 255, 0, 254]),
    ):
        Image.fromarray(values).save(path)
        assert pixels(path)[0, :, 0].tolist() == expected


def test_an_image_is_not_turned(tmp_path):
    """As in CoOp: a benchmark's images are what they are there. (Viewers would turn this one.)"""
    image = Image.fromarray(COLOURS[:8])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as found:
        assert found.getexif()[0x0112] == 6
    assert (pixels(tmp_path / "x.png") == COLOURS[:8]).all()
    assert decoded_size([str(tmp_path / "x.png")], 1e9) == 3 * 8 * 16


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_counts(kind, tmp_path):
    frames = [Image.new("L", (8, 8), value).convert("RGB") for value in (200, 0, 90)]
    frames[0].save(
        tmp_path / "x", kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    with Image.open(tmp_path / "x") as image:
        assert image.n_frames == 3
    assert abs(pixels(tmp_path / "x").astype(int) - 200).max() <= 1


def test_kept_decoded_they_are_the_same(tmp_path):
    paths = []
    for i, image in enumerate(
        [
            Image.fromarray(RAMP.astype(np.uint16) * 257),
            Image.fromarray(RAMP.astype(np.float32)),
            Image.fromarray(COLOURS).convert("CMYK"),
            Image.fromarray(RAMP).convert("1"),
        ]
    ):
        paths.append(str(tmp_path / f"{i}.tiff"))
        image.save(paths[-1])
    size = decoded_size(paths, 1e9)
    kept = DecodedImages(paths, size)
    assert size == 4 * 3 * 256
    for i, path in enumerate(paths):
        assert (np.asarray(kept[i]) == pixels(path)).all()


# ------------------------------------------------------------------------------------------------- class names

ODD = {
    "long": "x" * 200,
    "many words": "a " * 100,
    "right to left": "كلب",
    "mixed": "dog كلب cat",
    "CJK": "日本犬",
    "emoji": "🐕 dog",
    "accents": "cafe\u0301 Zoë",
    "combining only": "\u0301\u0308",
    "control": "a\x07b\x1b[31mc\x00",
    "newlines": "two\nlines\r\nand\tmore",
    "zero width": "\u200b\u200d",
    "override": "\u202egod",
    "spaces": "   ",
    "empty": "",
    "underscores": "___",
}
UNDRAWABLE = {
    "right to left",
    "CJK",
    "combining only",
    "zero width",
    "spaces",
    "empty",
    "underscores",
}  # in Pillow's font
ENGLISH = {"long", "many words", "mixed", "emoji", "accents", "control", "newlines", "override"}


def test_every_odd_name_is_one_or_the_other():
    assert ODD.keys() == UNDRAWABLE | ENGLISH and not UNDRAWABLE & ENGLISH


@pytest.mark.parametrize("kind", ODD)
def test_odd_names_are_drawn_or_refused(kind, capsys):
    name = ODD[kind]
    if kind in UNDRAWABLE:
        with pytest.raises(UserError, match="cannot be drawn with Pillow's built-in font") as caught:
            rasterise(["dog", name], 20, 64)
        assert printable(clean_name(name)) in str(caught.value) or "an empty class name" in str(caught.value)
        assert str(caught.value).isprintable()
        return
    masks = rasterise(["dog", name], 20, 64)
    assert masks.shape == (2, 1, 20, 64) and masks.max() > 0.4
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())
    assert ("Not in Pillow's built-in font" in said) == (kind in {"mixed", "emoji", "accents", "control", "override"})
    assert ("too small to read" in said) == (kind in {"long", "many words"})


def test_what_the_font_lacks_is_dropped():
    assert torch.equal(rasterise([ODD["mixed"]], 20, 64), rasterise(["dog cat"], 20, 64))
    assert torch.equal(rasterise([ODD["accents"]], 20, 64), rasterise(["cafe Zoe"], 20, 64))
    assert torch.equal(rasterise([ODD["newlines"]], 20, 64), rasterise(["two lines and more"], 20, 64))
    assert torch.equal(rasterise([ODD["override"]], 20, 64), rasterise(["god"], 20, 64))  # letters as they are stored


def test_right_to_left_with_a_font_that_has_it():
    """Shaped and turned round where Pillow has libraqm, else letter by letter as they are stored: drawn anyhow."""
    matplotlib = pytest.importorskip("matplotlib")
    font = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    masks = rasterise(["שלום", "םולש", "كلب"], 32, 96, font)
    assert masks.flatten(1).max(dim=1).values.min() > 0.9
    assert torch.equal(masks, rasterise(["שלום", "םולש", "كلب"], 32, 96, font))
    if not features.check("raqm"):
        pytest.skip("Pillow has no libraqm here")
    ink = masks[:, 0].sum(dim=1) > 0.1  # columns with ink
    lengths = [row.nonzero() for row in ink]
    assert not torch.equal(masks[0], masks[1]) and all(len(x) > 10 for x in lengths)


def test_blank_glyphs_are_no_name():
    matplotlib = pytest.importorskip("matplotlib")
    font = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    with pytest.raises(UserError, match=r'"\\u200b" cannot be drawn'):
        rasterise(["\u200b"], 20, 64, font)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "rn.pt"
    torch.save(clip_state_dict("rn", layers=1), path)
    return load_clip(str(path))


@pytest.mark.parametrize("kind", ODD)
def test_odd_names_as_text(kind, backbone):
    """Text prompts take any name that fits; one that does not is refused by its beginning."""
    name = ODD[kind]
    try:
        learner = PromptLearner(backbone, ["dog", name], 16)
    except UserError as error:
        assert kind in ("long", "many words")
        assert "tokens" in str(error) and name[:20] in str(error)
        return
    assert kind != "many words"
    encoded = TextEncoder(backbone)(*learner.parts())
    assert encoded.shape == (2, 24) and encoded.isfinite().all()


def test_white_space_is_white_space_in_a_prompt(backbone):
    assert encode_tokens(backbone, ["two\nlines\r\nand\tmore"]) == encode_tokens(backbone, ["two lines and more"])


@pytest.mark.parametrize("kind", ["empty", "spaces", "underscores"])
def test_a_data_set_has_no_empty_names(kind, tmp_path):
    rows = [("a.jpg", 0, "dog"), ("b.jpg", 1, ODD[kind])]
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": rows, "val": [], "test": []}))
    with pytest.raises(UserError, match="split.json: label 1 has an empty class name; give it one"):
        check_labels(read_split(str(path)), str(path))


def test_a_file_name_that_is_no_text(tmp_path, capsys):
    """Bytes that are no UTF-8 could be kept neither in JSON nor in a checkpoint."""
    if sys.platform != "linux":
        pytest.skip("file systems elsewhere refuse such names")
    for part in ("dog", "cat"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / part / f"{i}.png")
    bad = bytes(tmp_path / "data" / "cat") + b"/\xff.png"
    (tmp_path / "data" / "cat" / "0.png").rename(bad.decode(errors="surrogateescape"))
    config = str(Path(train.__file__).parent / "configs" / "datasets" / "folder.yaml")
    argv = ["--root", str(tmp_path / "data"), "--trainer", "ZeroshotCLIP", "--dataset-config-file", config]
    argv += ["--output-dir", str(tmp_path / "out"), "MODEL.BACKBONE.NAME", "tiny", "INPUT.SIZE", "(96, 96)"]
    assert train.main(argv) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert line == f"error: {tmp_path / 'data' / 'cat'}: a name that is not in UTF-8, \\udcff.png; rename it"


def test_an_error_shows_a_terminal_nothing_to_act_on(capsys):
    assert train._fail("a\x1b[2Jb\nc", "d\u202ee") == 2
    assert capsys.readouterr().err == "error: a\\x1b[2Jb c\nerror: d\\u202ee\n"


def test_odd_names_in_a_run(tmp_path, rn_file):
    """A whole run with what can be drawn; names come back as they are."""
    names = [ODD["mixed"], ODD["emoji"], ODD["accents"], "a/b:c*?", "dog"]
    caltech_tree(tmp_path / "data", names=[f"c{i}" for i in range(5)], train=2, val=1, test=2)
    path = tmp_path / "data" / "caltech-101" / "split_zhou_Caltech101.json"
    split = json.loads(path.read_text())
    split = {part: [[image, label, names[label]] for image, label, _ in rows] for part, rows in split.items()}
    path.write_text(json.dumps(split))
    opts = ("DATASET.SUBSAMPLE_CLASSES", "all", "OPTIM.MAX_EPOCH", 1)
    argv = arguments("LoGoPrompt", tmp_path / "data", rn_file, tmp_path / "out", *opts)
    assert train.main(argv) == 0
    stored = torch.load(tmp_path / "out" / "prompt_learner" / "model.pth.tar-1", weights_only=True)
    assert stored["classnames"] == names
    argv = arguments("LoGoPrompt", tmp_path / "data", rn_file, tmp_path / "eval", *opts)
    assert train.main([argv[0], argv[1], "--eval-only", "--model-dir", str(tmp_path / "out"), *argv[2:]]) == 0


def test_odd_names_in_a_preview(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert preview.main(["--out", str(out), "--classnames", ODD["emoji"], ODD["control"].replace("\0", "")]) == 0
    assert out.is_file() and sorted(p.name for p in tmp_path.iterdir()) == ["sheet.png"]
    assert preview.main(["--out", str(out), "--classnames", ODD["CJK"]]) == 2
    assert "cannot be drawn" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- names by chance

ANY_NAME = st.text(st.characters(exclude_categories=()), max_size=200)
WORDS = st.text("abcdefghij klmnopqrstuvwxyz_-.'ABC", max_size=200)
SOME_NAMES = st.lists(st.one_of(ANY_NAME, WORDS), min_size=1, max_size=5)


@given(names=SOME_NAMES, height=st.integers(1, 40), width=st.integers(1, 120), seed=st.integers(0, 9))
@example(names=["\ud800"], height=9, width=64, seed=0)
@example(names=["\ud800x"], height=9, width=64, seed=0)
@example(names=["a " * 100], height=9, width=64, seed=0)
def test_any_names_are_drawn_or_refused(names, height, width, seed):
    """Nothing but UserError; the right shape and range; the same every time, alone and among others."""
    try:
        blocks = render_blocks(names, height, width, seed)
    except UserError as error:
        assert all(line.isprintable() for line in str(error).splitlines())
        return
    assert blocks.shape == (len(names), 3, height, width) and blocks.dtype == torch.float32
    assert blocks.min() >= 0 and blocks.max() <= 1
    assert torch.equal(blocks, render_blocks(names, height, width, seed))
    assert torch.equal(blocks[-1:], render_blocks(names[-1:], height, width, seed))


@given(name=ANY_NAME)
def test_cleaning_and_showing_names(name):
    assert clean_name(clean_name(name)) == clean_name(name)
    assert "_" not in clean_name(name) and len(clean_name(name)) == len(name)
    assert printable(name).isprintable() and printable(printable(name)) == printable(name)
    printable(name).encode()


@given(names=st.lists(st.text("ab_ ", max_size=3), max_size=6), known=st.lists(st.text("ab_ ", max_size=3), max_size=6))
def test_names_are_matched_one_to_one(names, known):
    rows = matching_names(names, known)
    assert len(rows) == len(names)
    taken = [row for row in rows if row >= 0]
    assert len(set(taken)) == len(taken)
    for name, row in zip(names, rows):
        if row >= 0:
            assert clean_name(known[row]) == clean_name(name)
    assert matching_names(known, known) == list(range(len(known)))


@given(names=st.lists(st.text(max_size=200), min_size=1, max_size=4), n_ctx=st.integers(1, 60))
def test_prompts_fit_or_are_refused(backbone, names, n_ctx):
    try:
        learner = PromptLearner(backbone, names, n_ctx)
    except UserError as error:
        assert "tokens" in str(error)
        return
    prompts, eot = learner()
    assert prompts.shape[:2] == (len(names), int(eot.max()) + 1) and prompts.shape[1] <= backbone.context_length
    assert int(eot.min()) >= 2 + n_ctx  # [SOS], the context, a full stop


def test_normalised_forms_are_different_names():
    """A name is the code points it is made of; they look alike, and are drawn alike."""
    composed, decomposed = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    assert composed != decomposed and matching_names([composed], [decomposed]) == [-1]
    assert torch.equal(rasterise([composed], 20, 64), rasterise([decomposed], 20, 64))


# ------------------------------------------------------------------------------------------------- few of anything


def run(trainer, root, rn_file, out, *opts, flags=()):
    argv = arguments(trainer, root, rn_file, out, "DATASET.SUBSAMPLE_CLASSES", "all", *opts, flags=flags)
    assert train.main(argv) == 0
    sys.stdout.flush()
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("trainer", [*TRAINED, "ZeroshotCLIP"])
def test_one_class(trainer, rn_file, tmp_path):
    """There is nothing to contrast with: the loss is 0, every image is right."""
    caltech_tree(tmp_path / "data", names=NAMES[:1], train=4, val=1, test=2)
    flags = ["--eval-only"] if trainer == "ZeroshotCLIP" else []
    results = run(trainer, tmp_path / "data", rn_file, tmp_path / "out", flags=flags)
    assert results["classes"] == 1 and results["metrics"]["accuracy"] == 100.0
    if trainer != "ZeroshotCLIP":
        assert "loss 0.0000" in (tmp_path / "out" / "log.txt").read_text()


def test_one_class_is_too_few_for_a_probe(rn_file, tmp_path, capsys):
    caltech_tree(tmp_path / "data", names=NAMES[:1], train=4, val=1, test=2)
    argv = arguments("LinearProbe", tmp_path / "data", rn_file, tmp_path / "out", "DATASET.SUBSAMPLE_CLASSES", "all")
    assert train.main(argv) == 2
    assert "Caltech101 has one class: a linear probe needs two" in capsys.readouterr().err


@pytest.mark.parametrize("trainer", [*TRAINED, "LinearProbe"])
def test_one_image_per_class(trainer, rn_file, tmp_path):
    caltech_tree(tmp_path / "data", names=NAMES[:3], train=1, val=1, test=1)
    results = run(trainer, tmp_path / "data", rn_file, tmp_path / "out", "DATASET.NUM_SHOTS", 1)
    assert results["images"] == results["classes"] == 3


@pytest.mark.parametrize("trainer", TRAINED)
def test_a_name_that_occurs_twice(trainer, rn_file, tmp_path):
    """Two classes of one name stay two: each has its own row, in training and when the checkpoint is loaded again."""
    caltech_tree(tmp_path / "data", names=["c0", "c1", "c2"], train=2, val=1, test=2)
    path = tmp_path / "data" / "caltech-101" / "split_zhou_Caltech101.json"
    names = ["crane", "cup", "crane"]
    split = json.loads(path.read_text())
    split = {part: [[image, label, names[label]] for image, label, _ in rows] for part, rows in split.items()}
    path.write_text(json.dumps(split))
    trained = run(trainer, tmp_path / "data", rn_file, tmp_path / "out")
    stored = torch.load(tmp_path / "out" / "prompt_learner" / "model.pth.tar-2", weights_only=True)
    assert stored["classnames"] == names and trained["classes"] == 3
    again = run(
        trainer, tmp_path / "data", rn_file, tmp_path / "eval", flags=["--eval-only", "--model-dir", tmp_path / "out"]
    )
    assert again["metrics"] == trained["metrics"]


def test_two_names_for_one_label_are_refused():
    parts = {"train": [Entry("a.jpg", 0, "dog"), Entry("b.jpg", 0, "cat")], "val": [], "test": []}
    with pytest.raises(UserError, match='label 0 is both "dog" and "cat"'):
        check_labels(parts, "split.json")
