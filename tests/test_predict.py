"""tools/predict.py and trainers/predictor.py: predictions equal the evaluation's, for any image and any fault in it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from tiny import NAMES, SIZE, arguments

import predict
import train
from trainers.predictor import BATCHES_AHEAD, Predictor, find_images, survey
from trainers.prompting import evaluation
from trainers.prompting.data import read_image
from trainers.prompting.errors import UserError
from trainers.prompting.paste import places_of, uniform_of_paths
from trainers.prompting.text_encoder import encode_texts

BASE, NEW = NAMES[:4], NAMES[4:]
METHOD = "TRAINER.LOGOPROMPT."
VARIANTS = {
    "two-stage": ("LoGoPrompt",),
    "generic": ("LoGoPrompt", METHOD + "TEXT_PROMPT", "generic", METHOD + "VIEWS", 2),
    "tuned, adapter": ("LoGoPrompt", METHOD + "TUNE_VISUAL", True, METHOD + "ADAPTER", True, "OPTIM.MAX_EPOCH", 3),
    "search": ("LoGoPrompt", METHOD + "ADAPTER", True, METHOD + "ADAPTER_SEARCH", True, "OPTIM.MAX_EPOCH", 3),
    "paired": ("LoGoPrompt", METHOD + "VISUAL_PROMPT", "paired"),
    "CoOp": ("CoOp",),
    "class-specific": ("CoOp", "TRAINER.COOP.CSC", True),
    "CoCoOp": ("CoCoOp",),
    "ZeroshotCLIP": ("ZeroshotCLIP",),
    "ZeroshotCLIP2": ("ZeroshotCLIP2",),
    "LinearProbe": ("LinearProbe",),
}


@pytest.fixture(scope="module")
def runs(data_root, rn_file, tmp_path_factory):
    """Trains a variant on the base classes on first use: its run folder, and the evaluation's scores by path."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(name, *opts, flags=(), folder=None):
        key = folder or name
        if key not in made:
            trainer, *own = VARIANTS[name]
            flags = ["--eval-only", *flags] if trainer.startswith("Zeroshot") else flags
            seen, check = {}, evaluation.check_scores

            def record(scores, paths, what="scores"):
                if what == "scores":
                    seen.update(zip(paths, scores.clone()))
                check(scores, paths, what)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(evaluation, "check_scores", record)
                patch.setattr(sys, "stdout", sys.stdout)  # train.main replaces it
                assert train.main(arguments(trainer, data_root, rn_file, root / key, *own, *opts, flags=flags)) == 0
            made[key] = root / key, seen
        return made[key]

    return run


@pytest.fixture(scope="module")
def predictor(runs):
    return Predictor(runs("two-stage")[0])


def assert_same(result, scores, classnames, log_p):
    """A prediction is what the evaluation's scores (C,) say, recomputed with plain numbers."""
    p = scores.exp() if log_p else torch.softmax(scores, dim=0)
    expected = {classnames[i]: p[i].item() for i in range(len(p)) if scores[i] > -float("inf")}
    assert result.error == "" and result.classes[0] == classnames[int(scores.argmax())]
    assert dict(zip(result.classes, result.scores)) == pytest.approx(expected, abs=1e-4)
    assert result.scores == sorted(result.scores, reverse=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_predictions_equal_the_evaluation_to_the_bit(runs, data_root, name):
    folder, seen = runs(name)
    files = sorted(folder.rglob("*"))
    predictor, named = Predictor(folder), [data_root / path for path in seen]
    assert predictor.classnames == BASE and len(seen) == 4 * 4
    found = [row[2].scores[0] for batch in predictor._batches(named) for row in predictor._predict(batch, 5)]
    assert all(map(torch.equal, found, seen.values()))
    for path, result in zip(seen, predictor(named, top=99)):
        assert result.path == str(data_root / path)
        assert_same(result, seen[path], BASE, VARIANTS[name][0] == "LoGoPrompt")
    assert sorted(folder.rglob("*")) == files  # nothing is written


def test_place_of_a_block_depends_on_the_path_below_the_root(runs, data_root, tmp_path):
    folder, seen = runs("two-stage")
    elsewhere, paths = tmp_path / "elsewhere", list(seen)
    for path in paths:
        (elsewhere / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data_root / path, elsewhere / path)
    for predictor, named in (
        (Predictor(folder, root=str(elsewhere), batch_size=3), [elsewhere / "caltech-101"]),
        (Predictor(folder), [elsewhere]),  # a folder elsewhere: the paths below it
    ):
        results = {os.path.relpath(r.path, elsewhere): r for r in predictor(named, top=99)}
        assert results.keys() == seen.keys()
        for path, result in results.items():
            assert_same(result, seen[path], BASE, True)
    sources = list(find_images([elsewhere, elsewhere / paths[0], data_root / paths[0]], [str(data_root)]))
    assert [s.relative for s in sources[-2:]] == [Path(paths[0]).name, paths[0]]
    assert sorted(s.relative for s in sources[:-2]) == sorted(paths)


def test_evaluation_folder_has_the_classes_that_it_evaluated(runs, data_root, tmp_path):
    trained, _ = runs("two-stage")
    flags = ["--eval-only", "--model-dir", trained]
    folder, seen = runs("two-stage", "DATASET.SUBSAMPLE_CLASSES", "new", flags=flags, folder="evaluated")
    spaces = [name.replace("_", " ") for name in NEW]
    for predictor in (Predictor(folder), Predictor(trained, NEW), Predictor(trained, spaces)):
        assert [name.replace("_", " ") for name in predictor.classnames] == spaces
        for path, result in zip(seen, predictor([data_root / path for path in seen], top=99)):
            assert_same(result, seen[path], predictor.classnames, True)
    labels = {str(data_root / path): NAMES.index(Path(path).parent.name) - 4 for path in seen}
    assert survey(Predictor(folder).cfg)[0] == NEW and dict(survey(Predictor(folder).cfg)[1]) == labels
    for without_names in (folder, runs("ZeroshotCLIP")[0]):  # and without data
        with pytest.raises(UserError, match="does not record its classes: give --classnames"):
            Predictor(without_names, root=str(tmp_path))
    assert Predictor(folder, NEW, root=str(tmp_path)).classnames == NEW


def test_other_class_names(runs, data_root, predictor):
    folder, seen = runs("two-stage")
    image = data_root / next(iter(seen))
    mixed = Predictor(folder, ["zebra", BASE[1], "traffic light"])
    assert mixed.trainer.model.learned.trained.tolist() == [False, True, False]
    torch.testing.assert_close(mixed.text_features[1], predictor.text_features[1], atol=1e-5, rtol=0)
    assert set(next(mixed([image])).classes) == {"zebra", BASE[1], "traffic light"}
    assert next(Predictor(folder, ["one alone"])([image])).scores == [1.0]
    assert len(next(predictor([image], top=2)).classes) == 2
    for name, names, fault in (
        ("two-stage", ["cup", "cup"], '"cup" occurs twice'),
        ("two-stage", [" "], "an empty name"),
        ("two-stage", [], "no names"),
        ("class-specific", ["cup", "saw"], 'not trained on "cup" and 1 more'),
        ("LinearProbe", [BASE[0], "saw"], 'not trained on "saw"'),
    ):
        with pytest.raises(UserError, match=fault):
            Predictor(runs(name)[0], names)
    for name in ("class-specific", "LinearProbe"):  # in another order
        usual, other = (next(Predictor(runs(name)[0], names)([image], top=99)) for names in (None, BASE[::-1]))
        assert dict(zip(other.classes, other.scores)) == pytest.approx(dict(zip(usual.classes, usual.scores)), abs=1e-5)


def test_moved_weights(runs, rn_file, odd, tmp_path):
    folder = shutil.copytree(runs("CoOp")[0], tmp_path / "run")
    moved = shutil.copy(rn_file, tmp_path / "moved.pt")
    old = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(old.replace(str(rn_file), str(tmp_path / "old.pt")))
    with pytest.raises(UserError, match="no such file"):
        Predictor(folder)
    expected = list(Predictor(runs("CoOp")[0])([odd / "grey.png"]))
    assert list(Predictor(folder, backbone=str(moved))([odd / "grey.png"])) == expected
    assert list(Predictor(folder, backbone=str(moved), epoch=2)([odd / "grey.png"])) == expected


def test_scores_that_are_not_numbers_are_an_error_of_the_image(runs, odd):
    predictor = Predictor(runs("CoOp")[0])
    predictor.text_features[0, 0] = float("nan")
    (result,) = predictor([odd / "grey.png"])
    assert result.error == f"{odd / 'grey.png'}: the model's scores are not numbers" and result.classes == []


def drawing(mode="RGB", size=(90, 70)):
    image = Image.new("RGB", size, "#336699")
    ImageDraw.Draw(image).rectangle((10, 10, 50, 40), fill="#ffcc33")
    return image.convert(mode)


ODD = {
    "cmyk.jpg": lambda path: drawing("CMYK").save(path, quality=95),
    "grey16.png": lambda path: Image.fromarray(np.linspace(0, 65535, 6300).reshape(70, 90).astype("u2")).save(path),
    "grey.png": lambda path: drawing("L").save(path),
    "alpha.png": lambda path: drawing("RGBA").save(path),
    "two frames.gif": lambda path: drawing().save(path, save_all=True, append_images=[drawing("L")]),
    "wide.png": lambda path: drawing(size=(20_000, 40)).save(path),
    "one pixel.png": lambda path: drawing(size=(1, 1)).save(path),
    "a [bold]name\nof two lines.png": lambda path: drawing().save(path),
}
BROKEN = {
    "empty.jpg": (lambda path: path.touch(), "decode"),
    "cut.jpg": (lambda path: (drawing().save(path), path.write_bytes(path.read_bytes()[:400])), "decode"),
    "text.jpg": (lambda path: path.write_text("no image"), "not an image of a known format"),
    "thin.png": (lambda path: Image.new("L", (200_000, 1)).save(path), "200000x1 pixels are too long and thin"),
    "loop.jpg": (lambda path: path.symlink_to(path), "loop.jpg: "),
    "gone.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "no image file at"),
    "pipe.jpg": (os.mkfifo, "not a file"),
}


@pytest.fixture
def odd(tmp_path):
    folder = tmp_path / "odd"
    (folder / "below" / "deeper").mkdir(parents=True)
    for name, make in {**ODD, **{name: make for name, (make, _) in BROKEN.items()}}.items():
        make(folder / name)
    drawing().save(folder / "below" / "deeper" / "plain.PNG")
    (folder / "below" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "notes.txt").write_text("not an image")
    (folder / "below" / "data.json").write_text("{}")
    (folder / ".hidden.jpg").write_text("hidden")
    return folder


def test_odd_images_are_predicted_and_broken_ones_reported(predictor, odd):
    skipped = []
    results = {os.path.relpath(r.path, odd): r for r in predictor(predictor.find([odd], skipped.append))}
    assert sorted(results) == sorted([*ODD, *BROKEN, "below/deeper/plain.PNG"])
    assert sorted(os.path.relpath(path, odd) for path in skipped) == ["below/data.json", "notes.txt"]
    for name, result in results.items():
        if name in BROKEN:
            assert not result.classes and str(odd / name) in result.error and "\n" not in result.error
            assert BROKEN[name][1] in result.error
        else:
            assert result.error == "" and set(result.classes) == set(BASE) and result.scores[0] > 0
    for name in ODD:
        expected = predictor.transform(read_image(str(odd / name)))
        assert torch.equal(predictor._read(next(find_images([odd / name]))), expected), name


def test_damaged_images_do_not_change_the_others(predictor, odd, tmp_path):
    good = [odd / "cmyk.jpg", odd / "grey.png", odd / "alpha.png"]
    among = list(predictor([good[0], odd / "cut.jpg", tmp_path / "nowhere.jpg", good[1], odd / "empty.jpg", good[2]]))
    assert [bool(r.error) for r in among] == [False, True, True, False, True, False]
    assert [r for r in among if not r.error] == list(predictor(good))
    explained = list(predictor.explain([odd / "cut.jpg", *good]))
    assert explained[0].candidates == [] and [e.prediction for e in explained[1:]] == list(predictor(good))
    (tmp_path / "void").mkdir()
    assert [r.error for r in predictor([tmp_path / "void"])] == [f"{tmp_path / 'void'}: no images in this folder"]
    assert [r.error for r in predictor([""])] == ['"": the name of an image is empty']
    assert list(predictor([])) == []


def test_images_are_taken_as_they_are_needed(predictor, odd, monkeypatch):
    monkeypatch.setattr(predictor, "batch_size", 4)
    taken = []
    results = predictor(taken.append(1) or odd / "grey.png" for _ in range(10**9))
    for done in range(1, 41):
        assert next(results).error == "" and len(taken) <= done + (1 + BATCHES_AHEAD) * 4
    results.close()


@pytest.fixture
def command(capsys):
    """Calls the command: its status, JSON lines and lines on stderr."""

    def call(*words):
        capsys.readouterr()
        status = predict.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()], err.splitlines()

    return call


def start(folder, *words):
    words = [sys.executable, ROOT / "tools" / "predict.py", "--model-dir", folder, *words]
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, words)], stdout=pipe, stderr=pipe, text=True, env=environment)


def test_ctrl_c_leaves_whole_lines(runs, tmp_path):
    (tmp_path / "many").mkdir()
    drawing().save(tmp_path / "many" / "0.png")
    for i in range(1, 2000):
        os.link(tmp_path / "many" / "0.png", tmp_path / "many" / f"{i}.png")
    out = tmp_path / "out.jsonl"
    process = start(runs("CoOp")[0], tmp_path / "many", "--batch-size", 2, "--out", out)
    while not (out.exists() and out.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 130
    text = out.read_text()
    names = [Path(json.loads(line)["path"]).name for line in text.splitlines()]
    assert text.endswith("\n") and 0 < len(names) < 2000
    assert names == sorted(f"{i}.png" for i in range(2000))[: len(names)]


def test_closed_pipe(runs, odd):
    with start(runs("CoOp")[0], "--batch-size", 1, *[odd / "grey.png"] * 500) as process:
        assert json.loads(process.stdout.readline())["classes"]
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=60) == 141


def test_json_lines(command, predictor, runs, odd, tmp_path):
    folder = runs("two-stage")[0]
    status, lines, errors = command(odd, "--model-dir", folder)
    assert status == 1 and len(lines) == len(ODD) + len(BROKEN) + 1
    for line, result in zip(lines, predictor([odd])):
        found = {"error": result.error} if result.error else {"classes": result.classes, "scores": result.scores}
        assert line == {"path": result.path, **found}
    assert sum(line.startswith("error: ") for line in errors) == len(BROKEN)
    assert errors[-2] == f"{len(BROKEN)} of {len(lines)} failed" and "2 files in folders were skipped" in errors[-1]
    out = tmp_path / "out.jsonl"
    words = (odd / "grey.png", odd / "cmyk.jpg", "--model-dir", folder, "--out", out, "--top", 2)
    assert command(*words) == (0, [], [f"{out}: 2 lines of JSON"])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(Path(r["path"]).name, len(r["classes"])) for r in found] == [("grey.png", 2), ("cmyk.jpg", 2)]
    assert command(odd / "grey.png", "--model-dir", tmp_path / "nowhere", "--out", out)[0] == 2
    assert len(out.read_text().splitlines()) == 2  # a mistake does not erase it


def test_class_names_on_the_command_line_or_in_a_file(command, runs, odd, tmp_path):
    names = ["zebra", "traffic light", BASE[0]]
    (tmp_path / "names.txt").write_text("\ufeff" + "\n\n".join(names) + "\n", encoding="utf-8")
    words = odd / "grey.png", "--model-dir", runs("two-stage")[0], "--classnames"
    _, (line,), _ = command(*words, *names)
    assert set(line["classes"]) == set(names) and command(*words, tmp_path / "names.txt")[1] == [line]


def test_table_on_a_terminal(runs, odd, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    words = [str(odd / name) for name in ("a [bold]name\nof two lines.png", "cut.jpg", "grey.png")]
    capsys.readouterr()
    assert predict.main([*words, "--model-dir", str(runs("two-stage")[0])]) == 1
    out, err = capsys.readouterr()
    lines = re.sub("\x1b\\[[0-9;]*m", "", out).splitlines()
    assert lines[0].split() == ["image", "class", "score"] and out.count("score") == 1
    assert max(map(len, lines)) <= 70
    assert "[bold]name\\n" in "".join(line[:40].strip() for line in lines)
    assert sum(name.replace("_", " ") in line for line in lines for name in BASE) == 2 * len(BASE)
    assert err.count("error: cannot decode image") == 1


def test_mistakes_end_in_one_line(command, runs, odd, tmp_path):
    folder, image = runs("two-stage")[0], odd / "grey.png"
    text = (folder / "config.yaml").read_text()
    for name, content in {"old": text.replace("NAME: LoGoPrompt", "NAME: MaPLe"), "bare": text, "bad": "a: [b"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(content)
    for words, fault in (
        (("--root", tmp_path / "away"), f"{tmp_path / 'away'}: no such folder (--root)"),
        (("--model-dir", tmp_path / "nowhere"), f"{tmp_path / 'nowhere' / 'config.yaml'}: no such folder"),
        (("--model-dir", tmp_path / "bad"), f"{tmp_path / 'bad' / 'config.yaml'}: not the config of a run"),
        (("--model-dir", tmp_path / "old"), 'made by the trainer "MaPLe"'),
        (("--model-dir", tmp_path / "bare"), f"in {tmp_path / 'bare' / 'prompt_learner'}"),
        (("--load-epoch", 77), "model.pth.tar-77"),
        (("--classnames", "nowhere.txt"), "--classnames nowhere.txt"),
        (("--classnames", "a", "熊猫"), "FONT"),
        (("--out", tmp_path / "no" / "folder"), str(tmp_path / "no" / "folder")),
        (("--explain", odd / "why"), f"is in {odd}"),
    ):
        status, lines, errors = command(odd if "is in" in fault else image, "--model-dir", folder, *words)
        assert (status, lines, len(errors)) == (2, [], 1) and errors[0].startswith("error: ") and fault in errors[0]
    for flag in ("--top", "--batch-size"):
        with pytest.raises(SystemExit, match="2"):
            command(image, "--model-dir", folder, flag, "0")


def array(picture):
    return np.asarray(picture.convert("RGB"), dtype=float) / 255


def test_explanation_holds_what_was_compared(runs, data_root):
    folder, seen = runs("tuned, adapter")
    predictor = Predictor(folder)
    model, (h, w) = predictor.trainer.model, predictor.trainer.model.block
    for path, found in zip(seen, predictor.explain([data_root / path for path in seen])):
        best = [max(c.original, c.conditional) for c in found.candidates]
        assert found.candidates[found.selected].classname == found.prediction.classes[0]
        assert found.prediction.classes[0] == BASE[int(seen[path].argmax())]
        assert sorted(best, reverse=True) == pytest.approx(found.prediction.scores, rel=1e-5)
        assert [c.original for c in found.candidates] == sorted((c.original for c in found.candidates), reverse=True)
        top, left = places_of(uniform_of_paths([path], 0), SIZE, (h, w), "random")[0].tolist()
        for candidate in found.candidates:
            pasted, image = array(candidate.picture), array(found.image)
            block = model.learned.visual_prompts.pixels[BASE.index(candidate.classname)].detach()
            np.testing.assert_allclose(pasted[top : top + h, left : left + w], block.permute(1, 2, 0), atol=1.01 / 255)
            pasted[top : top + h, left : left + w] = image[top : top + h, left : left + w]
            assert np.array_equal(pasted, image) and found.image.size == (SIZE, SIZE)
    images = [data_root / path for path in seen]
    selected = [found.selected for found in predictor.explain(images)]
    predictor.classnames = ["same"] * 4  # two classes may share a name, as in ImageNet
    assert [found.selected for found in predictor.explain(images)] == selected


@pytest.mark.parametrize("name", ["CoOp", "CoCoOp", "ZeroshotCLIP", "LinearProbe"])
def test_explanation_of_methods_that_use_the_image_alone(runs, data_root, name):
    folder, seen = runs(name)
    found = next(Predictor(folder).explain([data_root / next(iter(seen))], top=3))
    assert [c.classname for c in found.candidates] == found.prediction.classes and found.selected == 0
    assert [c.original for c in found.candidates] == pytest.approx(found.prediction.scores)
    assert all(c.conditional is None and c.picture is None for c in found.candidates)
    assert found.draw().width > found.draw().height > SIZE


def test_pictures(command, runs, odd, tmp_path, monkeypatch):
    folder, out, sheet = runs("two-stage")[0], tmp_path / "why", tmp_path / "sheets" / "why.png"
    images = [odd / "grey.png", odd / "cut.jpg", odd / "below", odd / "cmyk.jpg"]
    shutil.copy(odd / "grey.png", odd / "below")
    (odd / "below" / "up").unlink()
    status, lines, errors = command(*images, "--model-dir", folder)
    told = [*errors, f"{out}: 4 pictures, one for each image"]
    assert command(*images, "--model-dir", folder, "--explain", out) == (status, lines, told)
    names = {"cmyk.jpg", "deeper_plain.jpg", "grey.jpg", "grey-2.jpg"}
    assert {path.name for path in out.iterdir()} == names
    found = next(Predictor(folder).explain([odd / "cmyk.jpg"]))
    drawn = array(found.draw())
    framed = (np.abs(drawn - np.array([31, 41, 51]) / 255).max(axis=2) < 0.02).sum(axis=0) > 100
    left, right = framed.nonzero()[0][[0, -1]]
    cell = drawn.shape[1] / (1 + len(found.candidates))
    assert (left + right) / 2 // cell == found.selected + 1 and right - left == pytest.approx(cell, abs=30)
    saved = array(Image.open(out / "cmyk.jpg"))
    assert saved.shape == drawn.shape and np.abs(saved - drawn).mean() < 0.02
    for truth, colour in ((found.prediction.classes[0], (26, 127, 55)), ("other", (180, 35, 24))):  # right, wrong
        pixels = array(replace(found, truth=truth).draw())
        assert (np.abs(pixels - np.array(colour) / 255).max(axis=2) < 0.02).sum() > 20
    command(*images, "--model-dir", folder, "--explain", sheet)
    assert Image.open(sheet).height == 4 * drawn.shape[0]
    monkeypatch.setattr(predict, "ROWS", 2)
    assert "2 of 4 images" in command(*images, "--model-dir", folder, "--explain", sheet)[2][-1]
    assert Image.open(sheet).height == 2 * drawn.shape[0]


def test_long_names_stay_within_the_picture(runs, odd):
    names = ["W" * 80, "a very long name of a class that goes on and on and will not end, with $math$", "ox"]
    found = next(Predictor(runs("two-stage")[0], names).explain([odd / "grey.png"]))
    for _ in range(2):
        picture = array(found.draw())
        assert all(np.allclose(edge, 1) for edge in (picture[:, -3:], picture[:, :3], picture[-3:]))
        found.candidates = [c.__class__(c.classname, c.original) for c in found.candidates]  # without pictures


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_name_that_is_not_text(command, runs, odd, tmp_path):
    (tmp_path / "images").mkdir()
    path = os.path.join(os.fsencode(tmp_path / "images"), b"caf\xe9.png")
    os.rename(odd / "grey.png", path)
    words = tmp_path / "images", os.fsdecode(path), "--model-dir", runs("two-stage")[0], "--explain", tmp_path / "why"
    status, lines, errors = command(*words)
    assert status == 0 and len(errors) == 1 and [os.fsencode(line["path"]) for line in lines] == [path, path]
    assert len(list((tmp_path / "why").iterdir())) == 2


def test_untrained_is_zero_shot_clip_with_selection(rn_file, odd, tmp_path):
    words = arguments("LoGoPrompt", tmp_path, rn_file, tmp_path / "run", METHOD + "TEXT_PROMPT", "generic")
    cfg, backbones = train.setup_cfg(train.parse_args(words)), {}
    predictors = [Predictor.untrained(cfg, names, backbones) for names in (NAMES, NAMES[:3])]
    assert len({id(predictor.trainer.backbone) for predictor in predictors}) == len(backbones) == 1
    (found,), backbone = list(predictors[0].explain([odd / "cmyk.jpg"])), predictors[0].trainer.backbone
    texts = encode_texts(backbone, [f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    image = predictors[0].transform(read_image(str(odd / "cmyk.jpg"))).unsqueeze(0)
    p = backbone.logits(torch.nn.functional.normalize(backbone.encode_image(image), dim=-1), texts)[0].softmax(0)
    assert [c.classname for c in found.candidates] == [NAMES[i] for i in p.argsort(descending=True)[:5]]
    best = p.sort(descending=True).values[:5].tolist()
    assert [c.original for c in found.candidates] == pytest.approx(best, abs=1e-4)
    assert all(c.conditional is not None for c in found.candidates)


def test_options_override_those_of_the_run(runs, odd, capsys):
    folder, _ = runs("generic")
    few = Predictor(folder, options=[METHOD + "K", 2, METHOD + "LOCATION", "top", METHOD + "BLOCK_HEIGHT", 0.02])
    (found,) = few.explain([odd / "cmyk.jpg"])
    assert len(found.candidates) == 2 and found.candidates[0].picture.size == (SIZE, SIZE)
    assert few.warnings and few.warnings[0].startswith("Visual prompts too small to read in 1x64 pixels")
    assert few.warnings[0] in capsys.readouterr().err
    changed = np.asarray(found.candidates[0].picture) != np.asarray(found.image)
    assert changed[0].any() and not changed[1:].any()
