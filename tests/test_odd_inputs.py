"""Odd class names, and data sets with few classes or images: what happens is defined."""

import json
from pathlib import Path

import pytest
import torch
from helpers import Runs, one_line
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import NAMES, caltech_tree, clip_state_dict

import train
from trainers.prompting.backbone import load_clip
from trainers.prompting.errors import UserError
from trainers.prompting.names import clean_name, matching_names, printable
from trainers.prompting.prompts import PromptLearner
from trainers.prompting.render import rasterise, render_blocks

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
UNDRAWABLE = {"right to left", "CJK", "combining only", "zero width", "spaces", "empty", "underscores"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "rn.pt"
    torch.save(clip_state_dict("rn", layers=1), path)
    return load_clip(str(path))


@pytest.fixture(scope="module")
def font():
    matplotlib = pytest.importorskip("matplotlib")
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@pytest.mark.parametrize("kind", ODD)
def test_odd_names_are_drawn_or_refused(kind, capsys):
    name = ODD[kind]
    if kind in UNDRAWABLE:
        message = one_line(lambda: rasterise(["dog", name], 20, 64))
        assert "cannot be drawn with Pillow's built-in font" in message and message.isprintable()
        assert printable(clean_name(name)) in message or "an empty class name" in message
        return
    masks = rasterise(["dog", name], 20, 64)
    assert masks.shape == (2, 1, 20, 64) and masks.max() > 0.4
    reported = capsys.readouterr().out
    assert all(line.isprintable() for line in reported.splitlines())
    incomplete = kind in {"mixed", "emoji", "accents", "control", "override"}
    assert ("Not in Pillow's built-in font" in reported) == incomplete
    assert ("too small to read" in reported) == (kind in {"long", "many words"})


def test_invisible_name_is_refused(font):
    assert '"\\u200b" cannot be drawn' in one_line(lambda: rasterise(["\u200b"], 20, 64, font))


def test_errors_escape_control_characters(capsys):
    assert train.main(["--output-dir", "o", "--trainer", "a\x1b[2Jb\nc\u202ee"]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith('error: unknown trainer (--trainer) "a\\x1b[2Jb c\\u202ee": choose one of ')


ANY_NAME = st.text(st.characters(exclude_categories=()), max_size=200)
SHORT = st.lists(st.text("ab_ ", max_size=3), max_size=6)


@given(
    names=st.lists(ANY_NAME | st.text("abc klm_-.'A", max_size=200), min_size=1, max_size=5),
    height=st.integers(1, 40),
    width=st.integers(1, 120),
    seed=st.integers(0, 9),
)
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


@given(names=SHORT, known=SHORT)
@example(names=["crane", "crane", "crane", "in_line"], known=["in line", "crane", "x", "crane"])
def test_names_are_matched_as_in_the_loop(names, known):
    """The n-th occurrence of a name matches its n-th occurrence among the known ones; underscores are spaces."""
    free, expected = list(map(clean_name, known)), []
    for name in map(clean_name, names):
        expected.append(free.index(name) if name in free else -1)
        if name in free:
            free[free.index(name)] = None
    assert matching_names(names, known) == expected


@given(names=st.lists(st.text(max_size=200), min_size=1, max_size=4), n_ctx=st.integers(1, 60))
def test_any_prompts_fit_or_are_refused(backbone, names, n_ctx):
    try:
        learner = PromptLearner(backbone, names, n_ctx)
    except UserError as error:
        assert "tokens" in str(error)
        return
    prompts, eot = learner()
    assert prompts.shape[:2] == (len(names), int(eot.max()) + 1) and prompts.shape[1] <= backbone.context_length
    assert int(eot.min()) >= 2 + n_ctx  # [SOS], the context, a full stop


@pytest.fixture
def small(tmp_path, rn_file):
    """Runs on a data set with the given class names and numbers of images."""

    def make(trainer, names, train, test):
        root = caltech_tree(tmp_path / "data", [f"c{i}" for i in range(len(names))], train=train, val=1, test=test)
        path = root / "caltech-101" / "split_zhou_Caltech101.json"
        rows = json.loads(path.read_text())
        path.write_text(json.dumps({part: [[p, i, names[i]] for p, i, _ in some] for part, some in rows.items()}))
        runs = Runs(root, rn_file, tmp_path, trainer)

        def run(*opts, **more):
            runs("DATASET.SUBSAMPLE_CLASSES", "all", *opts, **more)
            path = tmp_path / more.get("out", "run") / "results.json"
            return json.loads(path.read_text()) if path.exists() else None

        return run, runs

    return make


@pytest.mark.parametrize("trainer", ["CoOp", "CoCoOp", "LoGoPrompt", "ZeroshotCLIP"])
def test_one_class(trainer, small, tmp_path):
    """There is nothing to contrast with: the loss is 0, every prediction correct."""
    run, _ = small(trainer, NAMES[:1], train=4, test=2)
    results = run(flags=["--eval-only"] if trainer == "ZeroshotCLIP" else [])
    assert results["classes"] == 1 and results["metrics"]["accuracy"] == 100.0
    if trainer != "ZeroshotCLIP":
        assert "loss 0.0000" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("trainer", ["CoCoOp", "LoGoPrompt", "LinearProbe"])
def test_one_image_per_class(trainer, small):
    run, _ = small(trainer, NAMES[:3], train=1, test=1)
    results = run("DATASET.NUM_SHOTS", 1)
    assert results["images"] == results["classes"] == 3


@pytest.mark.parametrize("trainer, opts", [("LoGoPrompt", ()), ("CoOp", ("TRAINER.COOP.CSC", True))])
@pytest.mark.parametrize(
    "names", [["crane", "cup", "crane"], [ODD["mixed"], ODD["emoji"], ODD["accents"], "a/b:c*?", "dog"]]
)
def test_odd_and_repeated_names_in_a_run(trainer, opts, names, small, tmp_path):
    """Every class keeps its own row and its name, in training and when the checkpoint is loaded again."""
    run, runs = small(trainer, names, train=2, test=2)
    trained = run(*opts)
    stored = torch.load(tmp_path / "run" / "prompt_learner" / "model.pth.tar-2", weights_only=True)
    assert stored["classnames"] == names and trained["classes"] == len(names)
    assert run(*opts, flags=runs.evaluation(), out="eval")["metrics"] == trained["metrics"]
