"""tools/predict.py and trainers/predictor.py: predictions equal the evaluation's, for any image and any fault in it."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from conftest import ROOT
from dassl.data.datasets import build_dataset
from PIL import Image, ImageDraw
from test_datasets import config
from tiny import NAMES, SIZE, arguments

import predict
import train
from trainers import predictor as module
from trainers.predictor import BATCHES_AHEAD, Predictor, find_images, survey
from trainers.prompting import evaluation
from trainers.prompting.data import read_image
from trainers.prompting.errors import UserError
from trainers.prompting.paste import places_of, uniform_of_paths

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

            def record(scores, paths):
                seen.update(zip(paths, scores.clone()))
                check(scores, paths)

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


# ------------------------------------------------------------------------------------------------- the evaluation


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
        (Predictor(folder, root=str(elsewhere)), [elsewhere / path for path in paths]),
        (Predictor(folder), [elsewhere]),  # a folder elsewhere: the paths below it
        (Predictor(folder, root=str(elsewhere), batch_size=3), [elsewhere / "caltech-101"]),
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
    for without_names in (folder, runs("ZeroshotCLIP")[0]):  # and without data
        with pytest.raises(UserError, match="does not record its classes: give --classnames"):
            Predictor(without_names, root=str(tmp_path))
    assert Predictor(folder, NEW, root=str(tmp_path)).classnames == NEW


@pytest.mark.parametrize("make", trees.ALL, ids=lambda make: make.__name__)
def test_survey_finds_the_classes_and_test_images_of_every_data_set(tmp_path, make):
    tree = make(tmp_path)
    for subset in ("all",) if make in trees.VARIANTS else ("all", "new"):
        files, cfg = sorted(tmp_path.rglob("*")), config(tmp_path, tree.name, 1, subset)
        classnames, test = survey(cfg)
        assert sorted(tmp_path.rglob("*")) == files  # nothing is written
        dataset = build_dataset(cfg)
        assert classnames == dataset.classnames
        assert test == [(item.impath, item.label) for item in dataset.test]


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
    for name in ("class-specific", "LinearProbe"):
        usual = next(Predictor(runs(name)[0])([image], top=99))
        other = next(Predictor(runs(name)[0], BASE[::-1])([image], top=99))
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


# ------------------------------------------------------------------------------------------------- odd images


def drawing(mode="RGB", size=(90, 70)):
    image = Image.new("RGB", size, "#336699")
    ImageDraw.Draw(image).rectangle((10, 10, 50, 40), fill="#ffcc33")
    return image.convert(mode)


def animated(path, **options):
    drawing().save(path, save_all=True, append_images=[Image.new("RGB", (90, 70))], duration=100, **options)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing(size=(90, 50)).save(path, exif=exif, quality=95)


def rgb16(path):
    """A PNG of three channels with 16 bits, which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in (np.asarray(drawing(), dtype=np.uint32) * 257).astype(">u2"))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 90, 70, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


ODD = {
    "cmyk.jpg": lambda path: drawing("CMYK").save(path, quality=95),
    "grey16.png": lambda path: Image.fromarray(np.linspace(0, 65535, 6300).reshape(70, 90).astype("u2")).save(path),
    "rgb16.png": rgb16,
    "grey.png": lambda path: drawing("L").save(path),
    "alpha.png": lambda path: drawing("RGBA").save(path),
    "palette.png": lambda path: drawing().quantize(8).save(path, transparency=0),
    "animated.gif": animated,
    "animated.webp": lambda path: animated(path, lossless=True),
    "animated.png": animated,
    "rotated.jpg": rotated,
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
    for name in ODD:  # the pixels are those of read_image
        read_image(str(odd / name)).save(odd / "clean.png")
        expected = predictor.transform(Image.open(odd / "clean.png").convert("RGB"))
        assert torch.equal(predictor._read(next(find_images([odd / name]))), expected), name
    first = np.asarray(read_image(str(odd / "animated.gif")), dtype=float)
    assert np.abs(first - np.asarray(drawing(), dtype=float)).mean() < 3  # the first frame
    assert np.array_equal(np.asarray(read_image(str(odd / "rgb16.png"))), np.asarray(drawing()))


def test_damaged_images_do_not_change_the_others(predictor, odd, tmp_path):
    good = [odd / "cmyk.jpg", odd / "grey.png", odd / "alpha.png"]
    among = list(predictor([good[0], odd / "cut.jpg", tmp_path / "nowhere.jpg", good[1], odd / "empty.jpg", good[2]]))
    assert [bool(r.error) for r in among] == [False, True, True, False, True, False]
    assert [r for r in among if not r.error] == list(predictor(good))
    explained = list(predictor.explain([odd / "cut.jpg", *good]))
    assert explained[0].candidates == [] and [e.prediction for e in explained[1:]] == list(predictor(good))
    (tmp_path / "void").mkdir()
    assert [r.error for r in predictor([tmp_path / "void"])] == [f"{tmp_path / 'void'}: no images in this folder"]
    assert list(predictor([])) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(predictor, odd):
    for path in (odd / "cmyk.jpg", odd / "below"):
        path.chmod(0)
        (result,) = predictor([path])
        path.chmod(0o755)
        assert "Permission denied" in result.error and str(path) in result.error


def test_one_large_image_is_decoded_at_a_time(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 100 * 70)
    monkeypatch.setattr(module, "THREADS", 4)
    drawing().save(tmp_path / "small.png")
    drawing(size=(200, 100)).save(tmp_path / "large.png")
    now, most = [], {"small.png": 0, "large.png": 0}

    def slow(path):
        now.append(os.path.basename(path))
        time.sleep(0.02)
        most.update({name: max(most[name], now.count(name)) for name in most})
        now.remove(os.path.basename(path))
        return read_image(path)

    monkeypatch.setattr(module, "read_image", slow)
    results = list(predictor([tmp_path / "small.png"] * 8 + [tmp_path / "large.png"] * 8))
    assert len(results) == 16 and not any(r.error for r in results)
    assert most["large.png"] == 1 and most["small.png"] > 1


def test_images_are_taken_as_they_are_needed(predictor, odd, monkeypatch):
    monkeypatch.setattr(predictor, "batch_size", 4)
    taken, read, decode = [], [], Predictor._read
    monkeypatch.setattr(Predictor, "_read", lambda self, source: read.append(1) or decode(self, source))

    def endless():
        while True:
            taken.append(1)
            yield odd / "grey.png"

    results = predictor(endless())
    for done in range(1, 41):
        assert next(results).error == "" and len(taken) <= done + (1 + BATCHES_AHEAD) * 4
    results.close()
    n = len(read)
    time.sleep(0.05)
    assert len(read) == n <= len(taken)  # nothing goes on in the background


# ------------------------------------------------------------------------------------------------- the command


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
    assert command(*words) == (0, [], [])
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
    assert max(map(len, lines)) <= 70 and "[bold]name\\nof" in "".join(line[:40].strip() for line in lines)
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
        (("--model-dir", tmp_path), f"{tmp_path / 'config.yaml'}: no such file"),
        (("--model-dir", tmp_path / "bad"), f"{tmp_path / 'bad' / 'config.yaml'}: not the config of a run"),
        (("--model-dir", tmp_path / "old"), 'made by the trainer "MaPLe"'),
        (("--model-dir", tmp_path / "bare"), f"in {tmp_path / 'bare' / 'prompt_learner'}"),
        (("--load-epoch", 77), "model.pth.tar-77"),
        (("--backbone", tmp_path / "x.pt"), f"{tmp_path / 'x.pt'}: no such file"),
        (("--classnames", "nowhere.txt"), "--classnames nowhere.txt"),
        (("--classnames", "a", "熊猫"), "FONT"),
        (("--out", tmp_path / "no" / "folder"), str(tmp_path / "no" / "folder")),
        (("--explain", image / "below"), str(image)),
        (("--explain", odd / "why"), f"is in {odd}"),
    ):
        status, lines, errors = command(odd if "is in" in fault else image, "--model-dir", folder, *words)
        assert (status, lines, len(errors)) == (2, [], 1) and errors[0].startswith("error: ") and fault in errors[0]
    for flag in ("--top", "--batch-size"):
        with pytest.raises(SystemExit) as end:
            command(image, "--model-dir", folder, flag, "0")
        assert end.value.code == 2


# ------------------------------------------------------------------------------------------------- explanations


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


@pytest.mark.parametrize("name", ["CoOp", "CoCoOp", "ZeroshotCLIP", "LinearProbe"])
def test_explanation_of_methods_that_use_the_image_alone(runs, data_root, name):
    folder, seen = runs(name)
    found = next(Predictor(folder).explain([data_root / next(iter(seen))], top=3))
    assert [c.classname for c in found.candidates] == found.prediction.classes and found.selected == 0
    assert [c.original for c in found.candidates] == pytest.approx(found.prediction.scores)
    assert all(c.conditional is None and c.picture is None for c in found.candidates)
    assert found.draw().width > found.draw().height > SIZE


def test_two_classes_of_one_name(runs, data_root):
    folder, seen = runs("two-stage")
    named, predictor = Predictor(folder), Predictor(folder)
    predictor.classnames = ["same"] * 4  # as ImageNet has two cranes
    images = [data_root / path for path in seen]
    assert [e.selected for e in predictor.explain(images)] == [e.selected for e in named.explain(images)]


def test_pictures(command, runs, odd, tmp_path, monkeypatch):
    folder, out, sheet = runs("two-stage")[0], tmp_path / "why", tmp_path / "sheets" / "why.png"
    images = [odd / "grey.png", odd / "cut.jpg", odd / "below", odd / "cmyk.jpg"]
    shutil.copy(odd / "grey.png", odd / "below")
    assert command(*images, "--model-dir", folder, "--explain", out) == command(*images, "--model-dir", folder)
    names = {"cmyk.jpg.jpg", "deeper_plain.PNG.jpg", "grey.png.jpg", "grey.png-2.jpg"}
    assert {path.name for path in out.iterdir()} >= names
    found = next(Predictor(folder).explain([odd / "cmyk.jpg"]))
    drawn = array(found.draw())
    framed = (np.abs(drawn - np.array([26, 127, 55]) / 255).max(axis=2) < 0.02).sum(axis=0) > 100
    left, right = framed.nonzero()[0][[0, -1]]
    cell = drawn.shape[1] / (1 + len(found.candidates))
    assert (left + right) / 2 // cell == found.selected + 1 and right - left == pytest.approx(cell, abs=30)
    saved = array(Image.open(out / "cmyk.jpg.jpg"))
    assert saved.shape == drawn.shape and np.abs(saved - drawn).mean() < 0.02
    command(*images, "--model-dir", folder, "--explain", sheet)
    assert Image.open(sheet).height == len(list(out.iterdir())) * drawn.shape[0]
    monkeypatch.setattr(predict, "ROWS", 2)
    assert "the first 2 images" in command(*images, "--model-dir", folder, "--explain", sheet)[2][-1]
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
    assert status == 0 and errors == [] and [os.fsencode(line["path"]) for line in lines] == [path, path]
    assert len(list((tmp_path / "why").iterdir())) == 2


def test_readme_example(runs, odd, tmp_path):
    code = (ROOT / "README.md").read_text().split("from trainers.predictor import Predictor", 1)[1].split("```", 1)[0]
    code = f"from trainers.predictor import Predictor{code}".replace("output/mine", str(runs("two-stage")[0]))
    code = code.replace("holiday/", str(odd)).replace("cat.jpg", str(odd / "grey.png"))
    code = code.replace("why.jpg", str(tmp_path / "why.jpg"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(odd / "grey.png") in done.stdout and BASE[0] in done.stdout
    assert Image.open(tmp_path / "why.jpg").width > SIZE
