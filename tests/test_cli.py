"""A user's mistake ends in one line that names the file or key and the remedy, with exit status 2 and no traceback."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, linked_caltech, start
from tiny import NAMES, arguments, clip_state_dict


@pytest.fixture
def fails(data_root, rn_file, tmp_path):
    """Run ``train.py`` in this process and return the one line it ends with."""

    def call(*opts, trainer="LoGoPrompt", root=data_root, flags=(), replace=()):
        argv = arguments(trainer, root, rn_file, tmp_path / "out", *opts, flags=flags)
        for flag, value in dict(replace).items():
            argv[argv.index(flag) + 1] = str(value)
        done = start(argv)
        assert done.status == 2 and not (tmp_path / "out" / "results.json").exists()
        (line,) = done.error.splitlines()
        assert line.startswith("error: ")
        return line[len("error: ") :]

    return call


def test_config_files(fails, tmp_path):
    path = tmp_path / "my.yaml"
    assert fails(replace={"--config-file": path}) == f"{path}: no such file (--config-file)"
    for text, part in (
        (
            "TRAINER:\n  LOGOPROMPT:\n    LOS: paper\n",
            "unknown key TRAINER.LOGOPROMPT.LOS, perhaps TRAINER.LOGOPROMPT.LOSS",
        ),
        ("OPTIM:\n  LR: [1, 2]\n", "OPTIM.LR [1, 2]: must be a number"),
        ("a: [b\n", "while parsing"),
        ("just words", "not a mapping"),
        ("OPTIM: !!python/object/apply:os.system ['echo owned']\n", "could not determine a constructor"),
    ):
        path.write_text(text)
        assert fails(replace={"--config-file": path}).startswith(f"{path}: {part}")


@pytest.mark.parametrize("key, value, requirement", [
    ("TRAINER.LOGOPROMPT.CTX_INIT", "' '", "1 to 60 words"),
    ("OPTIM.NAME", "foo", "foo"),
    ("INPUT.TRANSFORMS", "('foo',)", "foo"),
    ("INPUT.INTERPOLATION", "foo", "foo"),
    ("INPUT.SIZE", "(224, 224)", "(64, 64)"),  # of the backbone
    ("TEST.EVALUATOR", "foo", "no such evaluator"),
    ("DATALOADER.TRAIN_X.SAMPLER", "foo", "foo"),
    ("DATASET.NAME", "Caltech102", "perhaps Caltech101"),
    ("TRAINER.NAME", "LogoPrompts", "perhaps LoGoPrompt"),
])  # fmt: skip
def test_values_that_do_not_exist_are_refused_by_key(fails, key, value, requirement):
    line = fails(key, value)
    assert requirement in line and (key in line or str(value) in line)


def test_data_that_is_missing_is_named(fails, tmp_path, data_root):
    assert str(tmp_path / "nowhere") in fails(root=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty" / "caltech-101") in fails(root=tmp_path / "empty")
    root = linked_caltech(tmp_path / "data", data_root)
    path = root / "caltech-101" / "split_zhou_Caltech101.json"
    split = json.loads(path.read_text())
    path.unlink()

    def write(**parts):
        path.write_text(json.dumps({**split, **parts}))
        shutil.rmtree(root / "caltech-101" / "split_fewshot", ignore_errors=True)
        return fails(root=root)

    missing = [["face/missing.jpg", *split["test"][0][1:]]]
    assert "face/missing.jpg" in write(test=[*missing, *split["test"][1:]])
    line = write(train=[row for row in split["train"] if row[2] != NAMES[2]])
    assert str(path) in line and f'"{NAMES[2]}"' in line


@pytest.fixture
def tree(data_root, tmp_path):
    """A copy of the data root whose images may be changed."""
    return shutil.copytree(data_root, tmp_path / "data")


@pytest.mark.parametrize("workers, kind", [(0, "text"), (0, "empty"), (2, "cut")])
def test_image_that_does_not_decode_is_named(fails, tree, workers, kind):
    victim = tree / "caltech-101" / "101_ObjectCategories" / NAMES[0] / "image_0009.jpg"  # a test image
    content = victim.read_bytes()
    victim.write_bytes({"text": b"no image", "cut": content[: len(content) // 2], "empty": b""}[kind])
    line = fails("DATALOADER.NUM_WORKERS", workers, root=tree, trainer="ZeroshotCLIP", flags=["--eval-only"])
    assert str(victim) in line and "decode" in line


def test_evaluation_without_a_model_and_training_of_nothing(fails, tmp_path):
    for trainer in ("CoOp", "LinearProbe"):
        assert "--model-dir" in fails(trainer=trainer, flags=["--eval-only"])
    assert str(tmp_path / "none") in fails(flags=["--eval-only", "--model-dir", tmp_path / "none"])
    for trainer in ("ZeroshotCLIP", "ZeroshotCLIP2"):
        assert fails(trainer=trainer) == f"{trainer} has nothing to train: add --eval-only"


def test_weights_that_are_none(fails, tmp_path):
    assert fails(replace={"--backbone": tmp_path / "x.pt"}).startswith(f"MODEL.BACKBONE.NAME {tmp_path / 'x.pt'}")
    torch.save({k: v for k, v in clip_state_dict("rn").items() if "attnpool" not in k}, tmp_path / "y.pt")
    assert "OpenAI's layout" in fails(replace={"--backbone": tmp_path / "y.pt"})


def test_output_folder_that_is_a_file(fails, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert str(tmp_path / "out") in fails()


def test_real_process_ends_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--trainer", "Nonsense", "--output-dir", "x"]
    command += ["DATASET.NAME", "Shapes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith('error: unknown trainer (--trainer) "Nonsense"') and done.stderr.count("\n") == 1
