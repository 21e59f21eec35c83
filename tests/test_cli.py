"""A user's mistake ends in one line that names the file or key and the remedy, with exit status 2 and no traceback."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import NAMES, arguments, clip_state_dict

import train


@pytest.fixture
def fails(data_root, rn_file, tmp_path, capsys):
    """Run ``train.py`` in this process and return the one line it ends with."""

    def call(*opts, trainer="LoGoPrompt", root=data_root, backbone=rn_file, flags=(), replace=()):
        argv = arguments(trainer, root, backbone, tmp_path / "out", *opts, flags=flags)
        for old, new in replace:
            argv[argv.index(old) + 1] = str(new)
        status = train.main(argv)
        error = capsys.readouterr().err.strip()
        assert status == 2, error
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in error, error
        assert not (tmp_path / "out" / "results.json").exists()
        return lines[0]

    return call


def test_unknown_trainer(fails):
    line = fails(replace=[("--trainer", "LogoPrompts")])
    assert '"LogoPrompts"' in line and "perhaps LoGoPrompt" in line and "CoOp" in line


def test_unknown_data_set(fails):
    line = fails("DATASET.NAME", "Caltech102")
    assert '"Caltech102", perhaps Caltech101' in line


def test_config_files(fails, tmp_path):
    path = tmp_path / "my.yaml"
    replace = [("--config-file", path)]
    assert f"{path}: no such file (--config-file)" in fails(replace=replace)
    path.write_text("TRAINER:\n  LOGOPROMPT:\n    LOS: paper\n")
    assert f"{path}: unknown key TRAINER.LOGOPROMPT.LOS, perhaps TRAINER.LOGOPROMPT.LOSS" in fails(replace=replace)
    path.write_text("OPTIM:\n  LR: [1, 2]\n")
    line = fails(replace=replace)
    assert str(path) in line and "LR" in line
    path.write_text("a: [b\n")
    assert str(path) in fails(replace=replace)
    path.write_text("just words")
    assert str(path) in fails(replace=replace)
    path.write_text("OPTIM: !!python/object/apply:os.system ['echo owned']\n")
    assert str(path) in fails(replace=replace)


def test_command_line_overrides(fails):
    assert "unknown key OPTIM.LRR, perhaps OPTIM.LR" in fails("OPTIM.LRR", 1.0)
    assert "command line" in fails("OPTIM.LR")
    assert "LR" in fails("OPTIM.LR", "fast")


def test_missing_data_folder(fails, tmp_path):
    assert str(tmp_path / "nowhere") in fails(root=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty" / "caltech-101") in fails(root=tmp_path / "empty")


@pytest.fixture
def tree(data_root, tmp_path):
    return shutil.copytree(data_root, tmp_path / "data")


def test_missing_image_and_empty_class(fails, tree):
    folder = tree / "caltech-101" / "101_ObjectCategories"
    victim = folder / NAMES[1] / "image_0010.jpg"
    victim.rename(victim.with_suffix(".bak"))
    assert str(victim) in fails(root=tree)
    victim.with_suffix(".bak").rename(victim)
    path = tree / "caltech-101" / "split_zhou_Caltech101.json"
    split = json.loads(path.read_text())
    split["train"] = [row for row in split["train"] if row[2] != NAMES[2]]
    path.write_text(json.dumps(split))
    assert str(path) in fails(root=tree) and f'"{NAMES[2]}"' in fails(root=tree)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["text", "cut", "empty"])
def test_an_image_that_does_not_decode_is_named(fails, tree, workers, kind):
    victim = tree / "caltech-101" / "101_ObjectCategories" / NAMES[0] / "image_0009.jpg"  # a test image
    content = victim.read_bytes()
    victim.write_bytes({"text": b"no image", "cut": content[: len(content) // 2], "empty": b""}[kind])
    line = fails("DATALOADER.NUM_WORKERS", workers, root=tree, trainer="ZeroshotCLIP", flags=["--eval-only"])
    assert str(victim) in line and "decode" in line


def test_block_larger_than_the_image(fails):
    assert "TRAINER.LOGOPROMPT.BLOCK_HEIGHT 1.5" in fails("TRAINER.LOGOPROMPT.BLOCK_HEIGHT", 1.5)
    assert "TRAINER.LOGOPROMPT.BLOCK_WIDTH 0" in fails("TRAINER.LOGOPROMPT.BLOCK_WIDTH", 0.0)


def test_other_values_that_cannot_be(fails):
    assert "LOSS" in fails("TRAINER.LOGOPROMPT.LOSS", "mse") and "infonce, paper" in fails(
        "TRAINER.LOGOPROMPT.LOSS", "mse"
    )
    assert "random, top, bottom" in fails("TRAINER.LOGOPROMPT.LOCATION", "left")
    assert "TRAINER.LOGOPROMPT.K 0" in fails("TRAINER.LOGOPROMPT.K", 0)
    assert "MIN_CONTRAST" in fails("TRAINER.LOGOPROMPT.MIN_CONTRAST", 30.0)
    assert "fp16, fp32, amp, bf16" in fails("TRAINER.LOGOPROMPT.PREC", "fp8")
    assert "TRAINER.COCOOP.CHUNK 0" in fails("TRAINER.COCOOP.CHUNK", 0, trainer="CoCoOp")
    assert "N_CTX" in fails("TRAINER.LOGOPROMPT.N_CTX", 80, "TRAINER.LOGOPROMPT.CTX_INIT", "")


@pytest.mark.parametrize(
    "key, value",
    [
        ("OPTIM.NAME", "foo"),
        ("OPTIM.LR_SCHEDULER", "foo"),
        ("INPUT.TRANSFORMS", "('foo',)"),
        ("INPUT.INTERPOLATION", "foo"),
        ("TEST.EVALUATOR", "foo"),
        ("DATALOADER.TRAIN_X.SAMPLER", "foo"),
        ("INPUT.SIZE", "(64,)"),
        ("OPTIM.MAX_EPOCH", 0),
        ("OPTIM.MAX_EPOCH", -1),
        ("TRAIN.PRINT_FREQ", 0),
        ("DATALOADER.TRAIN_X.BATCH_SIZE", 0),
        ("TRAINER.LOGOPROMPT.CTX_INIT", "' '"),
    ],
)
def test_options_that_do_not_exist(fails, key, value):
    line = fails(key, value)
    assert key.rsplit(".", 1)[-1] in line or "foo" in line


def test_a_loss_that_is_not_finite(fails):
    assert "OPTIM.LR" in fails("OPTIM.LR", 1e30, "OPTIM.WARMUP_EPOCH", -1, "OPTIM.MAX_EPOCH", 3, trainer="CoOp")


def test_input_size_unlike_the_backbone_s(fails):
    line = fails("INPUT.SIZE", "(224, 224)")
    assert "INPUT.SIZE (224, 224)" in line and "(64, 64)" in line


def test_eval_only_without_a_model(fails, tmp_path):
    for trainer in ("CoOp", "LoGoPrompt"):
        assert "--model-dir" in fails(trainer=trainer, flags=["--eval-only"])
        line = fails(trainer=trainer, flags=["--eval-only", "--model-dir", tmp_path / "nothing"])
        assert str(tmp_path / "nothing") in line
    for trainer in ("ZeroshotCLIP", "ZeroshotCLIP2"):
        assert f"{trainer} has nothing to train: add --eval-only" in fails(trainer=trainer)


def test_checkpoints_that_do_not_fit(fails, tmp_path, rn_file):
    folder = tmp_path / "model" / "prompt_learner"
    folder.mkdir(parents=True)
    path = folder / "model.pth.tar-3"
    flags = ["--eval-only", "--model-dir", tmp_path / "model", "--load-epoch", 3]
    assert str(folder) in fails(flags=flags)
    path.write_bytes(b"rubbish")
    assert str(path) in fails(flags=flags)
    torch.save({"state_dict": {"ctx": torch.zeros(4, 64, 64)}, "epoch": 3}, path)
    line = fails("TRAINER.LOGOPROMPT.TEXT_PROMPT", "generic", flags=flags)
    assert str(path) in line and "(4, 64, 64)" in line and "(4, 64)" in line
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "epoch": 3}, path)
    assert "another trainer" in fails(flags=flags)


def test_missing_backbone(fails, tmp_path):
    assert f"{tmp_path / 'x.pt'}: no such file" in fails(backbone=tmp_path / "x.pt")
    torch.save({k: v for k, v in clip_state_dict("rn").items() if "attnpool" not in k}, tmp_path / "y.pt")
    assert "OpenAI's layout" in fails(backbone=tmp_path / "y.pt")


def test_output_folder_that_cannot_be_written(fails, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert str(tmp_path / "out") in fails()


def test_a_real_process_ends_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--trainer", "Nonsense", "DATASET.NAME", "Shapes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('error: unknown trainer (--trainer) "Nonsense"') and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was written


def test_images_of_every_mode_are_read(data_root, rn_file, tree, tmp_path):
    folder = tree / "caltech-101" / "101_ObjectCategories" / NAMES[0]
    for i, mode in enumerate(["L", "LA", "RGBA", "P", "CMYK", "1"]):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        Image.new("RGB", (70, 70), "red").convert(mode).save(folder / f"image_{i:04d}.jpg", kind)
    argv = arguments("ZeroshotCLIP", tree, rn_file, tmp_path / "out", "DATASET.NUM_SHOTS", -1, flags=["--eval-only"])
    assert train.main(argv) == 0
