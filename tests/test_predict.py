"""tools/predict.py and trainers/predictor.py: what the evaluation says, for any image, whatever is wrong with it."""

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
import report_examples
import report_tables
import torch
import trees
from conftest import ROOT
from PIL import Image, ImageDraw
from test_datasets import config
from tiny import NAMES, SIZE, arguments

import predict
import report
import train
from trainers.predictor import AHEAD, Predictor, find_images, survey
from trainers.prompting.data import read_image
from trainers.prompting.errors import UserError
from trainers.prompting.synthetic import fixed_places
from trainers.prompting.trainer import PromptTrainer

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
    """A run folder of each variant on the base classes, with {path: scores} of its last evaluation; made when asked."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(name, *opts, flags=(), folder=None):
        key = folder or name
        if key not in made:
            trainer, *own = VARIANTS[name]
            flags = ["--eval-only", *flags] if trainer.startswith("Zeroshot") else flags
            seen, original = {}, PromptTrainer.scored

            def scored(self, loader):
                for scores, label, paths in original(self, loader):
                    seen.update(zip(paths, scores.clone()))
                    yield scores, label, paths

            PromptTrainer.scored, stdout = scored, sys.stdout
            try:
                argv = arguments(trainer, data_root, rn_file, root / key, *own, *opts, flags=flags)
                assert train.main(argv) == 0
            finally:
                PromptTrainer.scored, sys.stdout = original, stdout
            made[key] = root / key, seen
        return made[key]

    return run


@pytest.fixture(scope="module")
def predictor(runs):
    return Predictor(runs("two-stage")[0])


def expected(scores, classnames, logits):
    """[(class, probability)] of an evaluation's scores, best first, in plain loops."""
    p = torch.softmax(scores, dim=0) if logits else scores.exp()
    considered = [i for i in range(len(p)) if scores[i] > -float("inf")]
    return sorted(((classnames[i], p[i].item()) for i in considered), key=lambda pair: -pair[1])


def same(result, scores, classnames, logits):
    wanted = expected(scores, classnames, logits)
    assert result.error == "" and result.classes[0] == classnames[int(scores.argmax())] == wanted[0][0]
    assert dict(zip(result.classes, result.scores)) == pytest.approx(dict(wanted), abs=1e-4)
    assert result.scores == sorted(result.scores, reverse=True)


# ------------------------------------------------------------------------------------------------- the evaluation


@pytest.mark.parametrize("name", VARIANTS)
def test_predictions_are_those_of_the_evaluation(runs, data_root, tmp_path, name):
    folder, seen = runs(name)
    assert len(seen) == 4 * 4  # test images of the base classes
    before = sorted(p for p in folder.rglob("*"))
    predictor = Predictor(folder)
    assert predictor.classnames == BASE
    paths = list(seen)
    with torch.no_grad():
        raw = [
            s for batch in predictor._batches([data_root / p for p in paths]) for s in predictor._predict(batch, 5)[2]
        ]
    assert all(torch.equal(score, seen[path]) for score, path in zip(raw, paths))  # to the last bit
    logits = VARIANTS[name][0] != "LoGoPrompt"
    for path, result in zip(paths, predictor([data_root / p for p in paths], top=99)):
        assert result.path == str(data_root / path)
        same(result, seen[path], BASE, logits)
    assert sorted(p for p in folder.rglob("*")) == before  # nothing is written


def test_the_place_of_a_block_is_a_matter_of_the_path_below_the_root(runs, data_root, tmp_path):
    folder, seen = runs("two-stage")
    paths = list(seen)
    elsewhere = tmp_path / "elsewhere"
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
            same(result, seen[path], BASE, False)
    sources = list(find_images([elsewhere, elsewhere / paths[0], data_root / paths[0]], [str(data_root)]))
    assert [s.relative for s in sources[-2:]] == [Path(paths[0]).name, paths[0]]
    assert sorted(s.relative for s in sources[:-2]) == sorted(paths)


def test_an_evaluation_folder_serves_the_model_and_the_classes_it_evaluated(runs, data_root, tmp_path):
    trained, _ = runs("two-stage")
    flags = ["--eval-only", "--model-dir", trained]
    folder, seen = runs("two-stage", "DATASET.SUBSAMPLE_CLASSES", "new", flags=flags, folder="evaluated")
    named = [data_root / path for path in seen]
    spelt = [name.replace("_", " ") for name in NEW]
    for predictor in (Predictor(folder), Predictor(trained, NEW), Predictor(trained, spelt)):
        assert [name.replace("_", " ") for name in predictor.classnames] == spelt
        for path, result in zip(seen, predictor(named, top=99)):
            same(result, seen[path], predictor.classnames, False)
    # the data set is gone, and with it what says the classes
    (tmp_path / "gone").mkdir()
    with pytest.raises(UserError, match="does not say its classes: give --classnames"):
        Predictor(folder, root=str(tmp_path / "gone"))
    assert Predictor(folder, NEW, root=str(tmp_path / "gone")).classnames == NEW
    with pytest.raises(UserError, match="--classnames"):
        Predictor(runs("ZeroshotCLIP")[0], root=str(tmp_path / "gone"))


@pytest.mark.parametrize("make", trees.ALL, ids=lambda make: make.__name__)
def test_the_classes_of_every_data_set(tmp_path, make):
    from dassl.data.datasets import build_dataset

    tree = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for subset in ("all",) if make in trees.VARIANTS else ("all", "new"):
        cfg = config(tmp_path, tree.name, 1, subset)
        classnames, test = survey(cfg)
        assert sorted(tmp_path.rglob("*")) == before  # nothing is written
        dataset = build_dataset(cfg)
        assert classnames == dataset.classnames
        assert test == [(item.impath, item.label) for item in dataset.test]
        before = sorted(tmp_path.rglob("*"))


def test_new_class_names(runs, data_root):
    folder, seen = runs("two-stage")
    image = data_root / next(iter(seen))
    mixed = Predictor(folder, ["zebra", BASE[1], "traffic light"])
    assert mixed.trainer.prompt_learner.trained.tolist() == [False, True, False]
    own = Predictor(folder)
    assert torch.equal(mixed.trainer.prompt_text[1], own.trainer.prompt_text[1]) or torch.allclose(
        mixed.trainer.prompt_text[1], own.trainer.prompt_text[1], atol=1e-5
    )
    assert set(next(mixed([image])).classes) == {"zebra", BASE[1], "traffic light"}
    assert next(Predictor(folder, ["one alone"])([image])).scores == [1.0]
    assert len(next(own([image], top=2)).classes) == 2
    for name, names, said in (
        ("two-stage", ["cup", "cup"], '"cup" is there twice'),
        ("two-stage", [" "], "an empty name"),
        ("class-specific", ["cup", "saw"], "class-specific contexts"),
        ("class-specific", BASE[::-1], "class-specific contexts"),
        ("LinearProbe", ["cup", "saw"], "a linear probe recognises no other classes"),
    ):
        with pytest.raises(UserError, match=said):
            Predictor(runs(name)[0], names)
    assert next(Predictor(runs("LinearProbe")[0], BASE[:2])([image])).error == ""


# ------------------------------------------------------------------------------------------------- odd images


def drawing(mode="RGB", size=(90, 70)):
    image = Image.new("RGB", size, "#336699")
    ImageDraw.Draw(image).rectangle((10, 10, 50, 40), fill="#ffcc33")
    return image.convert(mode)


def animated(path, **options):
    frames = [drawing(), Image.new("RGB", (90, 70), "black")]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing(size=(90, 50)).save(path, exif=exif, quality=95)


def grey16():
    return Image.fromarray(np.linspace(0, 65535, 90 * 70).reshape(70, 90).astype(np.uint16))


def rgb16(path):
    """A PNG of three channels with 16 bits, which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = (np.asarray(drawing(), dtype=np.uint32) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 90, 70, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def palette(path):
    image = drawing().quantize(8)
    image.info["transparency"] = 0
    image.save(path, transparency=0)


ODD = {
    "cmyk.jpg": lambda path: drawing("CMYK").save(path, quality=95),
    "grey16.png": lambda path: grey16().save(path),
    "rgb16.png": rgb16,
    "grey.png": lambda path: drawing("L").save(path),
    "alpha.png": lambda path: drawing("RGBA").save(path),
    "palette.png": palette,
    "animated.gif": animated,
    "animated.webp": lambda path: animated(path, lossless=True),
    "animated.png": animated,
    "rotated.jpg": rotated,
    "wide.png": lambda path: drawing(size=(20_000, 40)).save(path),
    "one pixel.png": lambda path: drawing(size=(1, 1)).save(path),
    "a [bold]name\nof two lines.png": lambda path: drawing().save(path),
}
BROKEN = {
    "empty.jpg": lambda path: path.touch(),
    "cut.jpg": lambda path: (drawing().save(path), path.write_bytes(path.read_bytes()[:400])),
    "text.jpg": lambda path: path.write_text("no image"),
    "thin.png": lambda path: Image.new("L", (200_000, 1)).save(path),
    "loop.jpg": lambda path: path.symlink_to(path),
    "gone.jpg": lambda path: path.symlink_to("nowhere.jpg"),
    "pipe.jpg": os.mkfifo,
}
REASONS = {
    "thin.png": "200000x1 pixels are too long and thin",
    "gone.jpg": "no image file at",
    "pipe.jpg": "not a file",
}


@pytest.fixture
def odd(tmp_path):
    folder = tmp_path / "odd"
    (folder / "below" / "deeper").mkdir(parents=True)
    for name, make in {**ODD, **BROKEN}.items():
        make(folder / name)
    drawing().save(folder / "below" / "deeper" / "plain.PNG")
    (folder / "below" / "up").symlink_to(folder, target_is_directory=True)  # a loop
    (folder / "notes.txt").write_text("not an image, and skipped quietly")
    (folder / "below" / "data.json").write_text("{}")
    (folder / ".hidden.jpg").write_text("hidden")
    return folder


def test_odd_images_of_a_folder(predictor, odd):
    skipped = []
    results = {os.path.relpath(r.path, odd): r for r in predictor(predictor.find([odd], skipped.append))}
    assert sorted(results) == sorted([*ODD, *BROKEN, "below/deeper/plain.PNG"])
    assert sorted(os.path.relpath(path, odd) for path in skipped) == ["below/data.json", "notes.txt"]
    for name, result in results.items():
        if name in BROKEN:
            assert not result.classes and str(odd / name) in result.error and "\n" not in result.error
            assert REASONS.get(name, "decode") in result.error
        else:
            assert result.error == "" and set(result.classes) == set(BASE) and result.scores[0] > 0
    # what is predicted is what read_image says the image is
    for name in ODD:
        clean = odd / "clean.png"
        read_image(str(odd / name)).save(clean)
        pixels = predictor.transform(read_image(str(clean)))
        assert torch.equal(predictor._read(next(find_images([odd / name]))), pixels), name
    first = np.asarray(read_image(str(odd / "animated.gif")), dtype=float)
    assert np.abs(first - np.asarray(drawing(), dtype=float)).mean() < 3  # the first frame
    assert np.array_equal(np.asarray(read_image(str(odd / "rgb16.png"))), np.asarray(drawing()))


def test_a_damaged_image_does_not_change_the_others(predictor, odd, tmp_path):
    good = [odd / "cmyk.jpg", odd / "grey.png", odd / "alpha.png"]
    alone = list(predictor(good))
    among = list(predictor([good[0], odd / "cut.jpg", tmp_path / "nowhere.jpg", good[1], odd / "empty.jpg", good[2]]))
    assert [bool(r.error) for r in among] == [False, True, True, False, True, False]
    assert [r for r in among if not r.error] == alone
    assert [r.error for r in predictor([odd / "text.jpg"])] == [
        f"cannot decode image {odd / 'text.jpg'}: not an image of a known format"
    ]
    (tmp_path / "void").mkdir()
    assert [r.error for r in predictor([tmp_path / "void"])] == [f"{tmp_path / 'void'}: no images in this folder"]
    assert list(predictor([])) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(predictor, odd):
    for path in (odd / "cmyk.jpg", odd / "below"):
        path.chmod(0)
        try:
            (result,) = predictor([path])
            assert "Permission denied" in result.error and str(path) in result.error
        finally:
            path.chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text(command, runs, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "why"
    folder.mkdir()
    drawing().save(folder / "plain.png")
    path = os.path.join(os.fsencode(folder), b"caf\xe9.png")
    os.rename(folder / "plain.png", path)
    named = [folder, os.fsdecode(path)]
    status, lines, errors = command(*named, "--model-dir", runs("two-stage")[0], "--explain", out)
    assert status == 0 and errors == [] and [os.fsencode(line["path"]) for line in lines] == [path, path]
    assert len(list(out.iterdir())) == 2


def test_one_large_image_at_a_time(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.predictor.LARGE", 100 * 70)
    monkeypatch.setattr("trainers.predictor.THREADS", 4)
    drawing().save(tmp_path / "small.png")
    drawing(size=(200, 100)).save(tmp_path / "large.png")
    at_once, most = [], {"small.png": 0, "large.png": 0}

    def slowly(path):
        at_once.append(os.path.basename(path))
        time.sleep(0.02)
        for name in most:
            most[name] = max(most[name], at_once.count(name))
        image = read_image(path)
        at_once.remove(os.path.basename(path))
        return image

    monkeypatch.setattr("trainers.predictor.read_image", slowly)
    results = list(predictor([tmp_path / "small.png"] * 8 + [tmp_path / "large.png"] * 8))
    assert len(results) == 16 and not any(r.error for r in results)
    assert most["large.png"] == 1 and most["small.png"] > 1


# ------------------------------------------------------------------------------------------------- streaming


def test_images_are_taken_as_they_are_needed(predictor, odd, monkeypatch):
    monkeypatch.setattr(predictor, "batch_size", 4)
    taken, read, decode = [], [], Predictor._read

    def count(self, source):
        read.append(source)
        return decode(self, source)

    monkeypatch.setattr(Predictor, "_read", count)

    def endless():
        while True:
            taken.append(1)
            yield odd / "grey.png"

    results = predictor(endless())
    for done in range(1, 41):
        assert next(results).error == ""
        assert len(taken) <= done + (1 + AHEAD) * 4 and len(read) <= len(taken)
    results.close()
    n = len(read)
    time.sleep(0.05)
    assert len(read) == n and n <= 40 + (1 + AHEAD) * 4  # nothing goes on behind one's back


def test_ctrl_c_leaves_whole_lines(runs, odd, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    drawing().save(many / "0.png")
    for i in range(1, 2000):
        os.link(many / "0.png", many / f"{i}.png")
    command = [sys.executable, str(ROOT / "tools" / "predict.py"), "--model-dir", str(runs("CoOp")[0]), str(many)]
    out = tmp_path / "out.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--batch-size", "2", "--out", str(out)], stderr=subprocess.PIPE, text=True, env=environment
    )
    while not (out.exists() and out.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    text = out.read_text()
    assert text.endswith("\n") and 0 < text.count("\n") < 2000
    assert [Path(json.loads(line)["path"]).name for line in text.splitlines()] == sorted(
        f"{i}.png" for i in range(2000)
    )[: text.count("\n")]


def test_a_reader_that_has_had_enough(runs, odd):
    command = [
        sys.executable,
        str(ROOT / "tools" / "predict.py"),
        "--model-dir",
        str(runs("CoOp")[0]),
        "--batch-size",
        "1",
    ]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    process = subprocess.Popen(
        [*command, *[str(odd / "grey.png")] * 500], stdout=pipe, stderr=pipe, text=True, env=environment
    )
    assert json.loads(process.stdout.readline())["classes"]
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 141
    process.stderr.close()


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(capsys):
    """Status, parsed JSON lines and lines on stderr of one call."""

    def call(*words):
        capsys.readouterr()
        status = predict.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()], err.splitlines()

    return call


def test_json_lines(command, predictor, runs, odd, tmp_path):
    folder = runs("two-stage")[0]
    status, lines, errors = command(odd, "--model-dir", folder)
    assert status == 1 and len(lines) == len(ODD) + len(BROKEN) + 1
    wanted = list(predictor([odd]))
    assert [line["path"] for line in lines] == [r.path for r in wanted]
    for line, result in zip(lines, wanted):
        if result.error:
            assert line == {"path": result.path, "error": result.error}
        else:
            assert line == {"path": result.path, "classes": result.classes, "scores": result.scores}
    assert sum(line.startswith("error: ") for line in errors) == len(BROKEN)
    assert errors[-2:] == [
        f"{len(BROKEN)} of {len(lines)} failed",
        "2 files in folders were skipped: not the suffix of an image",
    ]
    # into a file, with fewer classes
    out = tmp_path / "out.jsonl"
    status, lines, errors = command(odd / "grey.png", odd / "cmyk.jpg", "--model-dir", folder, "--out", out, "--top", 2)
    assert (status, lines, errors) == (0, [], [])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(Path(r["path"]).name, len(r["classes"])) for r in found] == [("grey.png", 2), ("cmyk.jpg", 2)]
    # an old file is not lost to a mistake
    assert command(odd / "grey.png", "--model-dir", tmp_path / "nowhere", "--out", out)[0] == 2
    assert len(out.read_text().splitlines()) == 2


def test_new_names_on_the_command_line(command, runs, odd, tmp_path):
    folder, image = runs("two-stage")[0], odd / "grey.png"
    names = ["zebra", "traffic light", BASE[0]]
    (tmp_path / "names.txt").write_text("\ufeff" + "\n\n".join(names) + "\n", encoding="utf-8")
    both = [
        command(image, "--model-dir", folder, "--classnames", *words)[1] for words in (names, [tmp_path / "names.txt"])
    ]
    assert both[0] == both[1] and set(both[0][0]["classes"]) == set(names)


def test_a_table_on_a_terminal(runs, odd, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    words = [str(odd / "a [bold]name\nof two lines.png"), str(odd / "cut.jpg"), str(odd / "grey.png")]
    words += ["--model-dir", str(runs("two-stage")[0])]
    capsys.readouterr()
    assert predict.main(words) == 1
    out, err = capsys.readouterr()
    lines = re.sub("\x1b\\[[0-9;]*m", "", out).splitlines()
    assert lines[0].split() == ["image", "class", "score"] and out.count("score") == 1
    assert max(map(len, lines)) <= 70 and "[bold]name?of" in "".join(line[:40].strip() for line in lines)
    assert sum(name.replace("_", " ") in line for line in lines for name in BASE) == 2 * len(BASE)
    assert err.count("error: cannot decode image") == 1


def test_mistakes_end_in_one_line(command, runs, odd, data_root, tmp_path):
    folder, image = runs("two-stage")[0], odd / "grey.png"
    old = shutil.copytree(folder, tmp_path / "old")
    config = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text(config.replace("NAME: LoGoPrompt", "NAME: MaPLe"))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.yaml", bare)
    rubbish = tmp_path / "rubbish"
    rubbish.mkdir()
    (rubbish / "config.yaml").write_text("a: [b")
    for words, said in (
        (("--model-dir", folder, "--root", tmp_path / "away"), f"{tmp_path / 'away'}: no such folder (--root)"),
        (("--model-dir", tmp_path / "nowhere"), f"{tmp_path / 'nowhere' / 'config.yaml'}: no such folder"),
        (("--model-dir", tmp_path), f"{tmp_path / 'config.yaml'}: no such file"),
        (("--model-dir", rubbish), f"{rubbish / 'config.yaml'}: not the config of a run"),
        (("--model-dir", old), 'made by the trainer "MaPLe"'),
        (("--model-dir", bare), f"in {bare / 'prompt_learner'}"),
        (("--model-dir", folder, "--load-epoch", 77), "model.pth.tar-77"),
        (("--model-dir", folder, "--backbone", tmp_path / "x.pt"), f"{tmp_path / 'x.pt'}: no such file"),
        (("--model-dir", folder, "--classnames", "nowhere.txt"), "--classnames nowhere.txt"),
        (("--model-dir", folder, "--classnames", "a", "熊猫"), "FONT"),
        (("--model-dir", folder, "--out", tmp_path / "no" / "folder"), str(tmp_path / "no" / "folder")),
        (("--model-dir", folder, "--explain", image / "below"), str(image)),
        (("--model-dir", folder, "--explain", odd / "why"), f"lies in {odd}"),
    ):
        status, lines, errors = command(image, odd if "lies in" in said else image, *words)
        assert status == 2 and lines == [] and len(errors) == 1, errors
        assert errors[0].startswith("error: ") and said in errors[0], errors
    for words in (("--top", "0"), ("--batch-size", "0")):
        with pytest.raises(SystemExit) as end:
            command(image, "--model-dir", folder, *words)
        assert end.value.code == 2


def test_weights_that_have_moved(runs, rn_file, odd, tmp_path):
    folder = shutil.copytree(runs("CoOp")[0], tmp_path / "run")
    moved = shutil.copy(rn_file, tmp_path / "moved.pt")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(rn_file), str(tmp_path / "old.pt")))
    with pytest.raises(UserError, match="no such file"):
        Predictor(folder)
    wanted = list(Predictor(runs("CoOp")[0])([odd / "grey.png"]))
    assert list(Predictor(folder, backbone=str(moved))([odd / "grey.png"])) == wanted
    assert list(Predictor(folder, backbone=str(moved), epoch=2)([odd / "grey.png"])) == wanted


# ------------------------------------------------------------------------------------------------- explaining


def array(picture):
    return np.asarray(picture.convert("RGB"), dtype=float) / 255


def test_an_explanation_holds_what_was_compared(runs, data_root):
    folder, seen = runs("tuned, adapter")
    predictor = Predictor(folder)
    network = predictor.trainer.model
    for path, found in zip(seen, predictor.explain([data_root / path for path in seen])):
        winner = found.candidates[found.selected]
        assert winner.classname == found.prediction.classes[0] == BASE[int(seen[path].argmax())]
        best = [max(c.original, c.conditional) for c in found.candidates]
        assert sorted(best, reverse=True) == pytest.approx(found.prediction.scores, rel=1e-5)
        assert [c.original for c in found.candidates] == sorted((c.original for c in found.candidates), reverse=True)
        top, left = fixed_places([path], 0, SIZE, network.block, "random")[0].tolist()
        h, w = network.block
        for candidate in found.candidates:
            pasted, image = array(candidate.picture), array(found.image)
            block = network.prompt_learner.visual_prompts.pixels[BASE.index(candidate.classname)].detach()
            np.testing.assert_allclose(pasted[top : top + h, left : left + w], block.permute(1, 2, 0), atol=1.01 / 255)
            pasted[top : top + h, left : left + w] = image[top : top + h, left : left + w]
            assert np.array_equal(pasted, image)
    assert found.image.size == (SIZE, SIZE)


@pytest.mark.parametrize("name", ["paired", "CoOp", "CoCoOp", "ZeroshotCLIP", "LinearProbe"])
def test_methods_that_look_at_the_image_alone(runs, data_root, name):
    folder, seen = runs(name)
    found = next(Predictor(folder).explain([data_root / next(iter(seen))], top=3))
    assert [c.classname for c in found.candidates] == found.prediction.classes and found.selected == 0
    assert [c.original for c in found.candidates] == pytest.approx(found.prediction.scores)
    assert all(c.conditional is None and c.picture is None for c in found.candidates)
    assert found.draw().width > found.draw().height > SIZE


def test_two_classes_of_one_name(runs, data_root, monkeypatch):
    folder, seen = runs("two-stage")
    predictor = Predictor(folder)
    predictor.classnames = ["same"] * 4  # as ImageNet has two cranes
    labels = [int(seen[path].argmax()) for path in seen]
    plain = Predictor(folder).explain([data_root / path for path in seen])
    for found, named, label in zip(predictor.explain([data_root / path for path in seen]), plain, labels):
        assert found.selected == named.selected
        assert named.candidates[found.selected].classname == BASE[label]


def test_pictures(command, runs, odd, tmp_path):
    folder = runs("two-stage")[0]
    images = [odd / "grey.png", odd / "cut.jpg", odd / "below", odd / "cmyk.jpg"]
    shutil.copy(odd / "grey.png", odd / "below")
    plain = command(*images, "--model-dir", folder)
    out = tmp_path / "why"
    status, lines, errors = command(*images, "--model-dir", folder, "--explain", out)
    assert (status, lines, errors) == plain and status == 1  # the same predictions
    names = sorted(path.name for path in out.iterdir())
    good = [line for line in lines if "error" not in line]
    assert len(names) == len(good) and {"grey.png.jpg", "cmyk.jpg.jpg", "deeper_plain.PNG.jpg"} <= set(names)
    assert "grey.png-2.jpg" in names  # of the same name
    # the picture: the image, then the candidates, the winner in a frame
    predictor = Predictor(folder)
    found = next(predictor.explain([odd / "cmyk.jpg"]))
    drawn, green = array(found.draw()), np.array([0x1A, 0x7F, 0x37]) / 255
    framed = (np.abs(drawn - green).max(axis=2) < 1e-6).sum(axis=0) > 100  # columns with much of the frame's colour
    left, right = framed.nonzero()[0][[0, -1]]
    cell = drawn.shape[1] / (1 + len(found.candidates))
    assert int((left + right) / 2 // cell) == found.selected + 1 and right - left == pytest.approx(cell, abs=8)
    saved = array(Image.open(out / "cmyk.jpg.jpg"))
    assert saved.shape == drawn.shape and np.abs(saved - drawn).mean() < 0.02
    # one sheet
    sheet = tmp_path / "sheets" / "why.png"
    command(*images, "--model-dir", folder, "--explain", sheet)
    assert Image.open(sheet).height == sum(Image.open(out / name).height for name in names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "ROWS", 2)
        status, _, errors = command(*images, "--model-dir", folder, "--explain", sheet)
    assert Image.open(sheet).height == 2 * drawn.shape[0] and any("the first 2 images" in line for line in errors)


def test_long_names_stay_within_their_cells(runs, odd):
    names = ["a" * 80, "a very long name of a class that goes on and on and on and will not end", "ox"]
    found = next(Predictor(runs("two-stage")[0], names).explain([odd / "grey.png"]))
    picture = array(found.draw())
    assert np.allclose(picture[:, -8:], 1)  # nothing reaches the margin
    found.candidates = [c.__class__(c.classname, c.original) for c in found.candidates]
    assert np.allclose(array(found.draw())[:, -8:], 1)


def test_the_api_as_the_readme_has_it(runs, odd, tmp_path):
    """The five lines, in a process of their own, from the repository's folder."""
    readme = (ROOT / "README.md").read_text()
    code = readme.split("from trainers.predictor import Predictor", 1)[1].split("```", 1)[0]
    code = "from trainers.predictor import Predictor" + code
    assert 3 <= len(code.strip().splitlines()) <= 6
    code = code.replace("output/mine", str(runs("two-stage")[0])).replace("holiday/", str(odd))
    for name in ("cat.jpg", "why.jpg"):
        code = code.replace(name, str(odd / "grey.png" if name == "cat.jpg" else tmp_path / name))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(odd / "grey.png") in done.stdout and BASE[0] in done.stdout
    assert Image.open(tmp_path / "why.jpg").width > SIZE


# ------------------------------------------------------------------------------------------------- in a report


def as_run(folder, method, seed=1):
    """What tools/report.py knows of a run."""
    about = ("kind", "scope", method, "rn", "cfg", "Caltech101", 4, seed, "base", 50.0, False, True)
    return report_tables.Run(str(folder), *about)


def test_a_report_shows_predictions_of_a_run(runs, data_root):
    folder, seen = runs("two-stage")
    others = [as_run(runs("CoOp")[0], "CoOp"), as_run(folder, "LoGoPrompt", seed=2), as_run(folder, "LoGoPrompt")]
    examples, run, why = report_examples.predictions(others, 3)
    assert len(examples) == 3 and why == "" and (run.method, run.seed) == ("LoGoPrompt", 1)
    assert len({example.truth for example in examples}) == 3
    by_name = {"/".join(Path(path).parts[-2:]): path for path in seen}
    predictor = Predictor(folder)
    for example in examples:
        path = by_name[example.name]
        assert example.truth == example.name.split("/")[0]
        found = next(predictor.explain([data_root / path]))
        assert example.rows == [(c.classname, f"{c.original:.3f}", f"{c.conditional:.3f}") for c in found.candidates]
        predicted = BASE[int(seen[path].argmax())]
        assert example.rows[example.selected][0] == predicted and example.right == (predicted == example.truth)
        assert example.image == report_examples.uri(found.image)
        assert example.winner == report_examples.uri(found.candidates[found.selected].picture)
    alone, _, _ = report_examples.predictions(others[:1], 2)
    assert [example.winner for example in alone] == ["", ""] and all(row[2] == "" for row in alone[0].rows)


def test_a_report_without_data_or_weights_says_so(runs, data_root, rn_file, tmp_path, monkeypatch):
    for name, old in (("data", data_root), ("weights.pt", rn_file)):
        folder = shutil.copytree(runs("two-stage")[0], tmp_path / name.split(".")[0])
        config = (folder / "config.yaml").read_text()
        assert str(old) in config
        (folder / "config.yaml").write_text(config.replace(str(old), str(tmp_path / "gone" / name)))
        examples, run, why = report_examples.predictions([as_run(folder, "LoGoPrompt")], 3)
        assert not examples and run is None and str(tmp_path / "gone" / name) in why and "\n" not in why
    # nothing is downloaded
    monkeypatch.setattr("trainers.prompting.backbone.CACHE", str(tmp_path))
    folder = shutil.copytree(runs("two-stage")[0], tmp_path / "openai")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(rn_file), "ViT-B/16"))
    examples, run, why = report_examples.predictions([as_run(folder, "LoGoPrompt")], 3)
    assert not examples and f"the weights of ViT-B/16 are not in {tmp_path}" in why
    # then another run has to do
    usable = as_run(runs("CoOp")[0], "CoOp")
    assert report_examples.predictions([as_run(folder, "LoGoPrompt"), usable], 2)[1] == usable


def test_the_page_shows_predictions(runs, tmp_path, capsys):
    out, folder = tmp_path / "out", runs("two-stage")[0]
    assert report.main([str(folder), "--seeds", "1", "--partial", "--out", str(out), "--predictions", "4"]) == 0
    page = (out / "report.html").read_text()
    assert (
        page.count('<div class="pair"><img src="data:image/jpeg;base64,') == 4 == page.count("The same with the name")
    )
    assert "Example predictions" in page and "no example predictions" not in capsys.readouterr().err
    assert report.main([str(folder), "--seeds", "1", "--partial", "--out", str(out), "--predictions", "0"]) == 0
    assert "Example predictions" not in (out / "report.html").read_text()
