"""tools/drop_in.py on a made-up CoOp code base: what it adds, leaves alone, refuses and takes back."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import drop_in

TRAIN = b'''\
import argparse
import json, os, sys

import trainers.coop
import trainers.zsclip  # no training


def extend_cfg(cfg):
    """
    Keys of methods.
    """
    from yacs.config import CfgNode as CN

    cfg.TRAINER.COOP = CN()


def main(folder):
    run = {"trainer": "x", "dataset": "y", "shots": 16, "seed": 1, "backbone": "z"}
    os.makedirs(folder, exist_ok=True)
    with open(folder + "/results.json", "w") as file:
        json.dump({"metrics": {"accuracy": 60.0 if "base" in sys.argv else 30.0}, "run": run}, file)


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--output-dir") + 1])
'''
INSTALLED = TRAIN.replace(b"# no training\n", b"# no training\nimport trainers.prompting.plugin\n").replace(
    b'    """\n    from', b'    """\n    trainers.prompting.plugin.extend_cfg(cfg)\n    from'
)


@pytest.fixture
def checkout(tmp_path):
    """A git repository with CoOp's layout and everything committed."""
    folder = tmp_path / "CoOp"
    for name in ("trainers/__init__.py", "trainers/coop.py", "trainers/zsclip.py", "scripts/coop/main.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "configs" / "datasets").mkdir(parents=True)
    (folder / "configs" / "datasets" / "caltech101.yaml").write_text("DATASET:\n  NAME: Caltech101\n")
    (folder / ".gitignore").write_text("__pycache__\n")
    (folder / "train.py").write_bytes(TRAIN)
    author = ("-c", "user.name=me", "-c", "user.email=me@home")
    for words in (("init", "-q"), ("add", "-A"), (*author, "commit", "-qm", "CoOp")):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def changes(checkout):
    """What git reports: changed files, and new ones."""
    words = ["git", "status", "--porcelain", "--untracked-files=all"]
    lines = subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line[3:] for line in lines}


def refusal(capsys, *words):
    """The one line of a refusal."""
    capsys.readouterr()
    assert drop_in.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def tracked(*names):
    """Our files according to git."""
    names = names or ["LoGoPrompt"]
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *drop_in.parts_of(names)]
    return set(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def test_install_check_and_remove(checkout, capsys):
    assert drop_in.main([str(checkout), "--check"]) == 1
    out = capsys.readouterr().out
    assert "missing: trainers/prompting\n" in out and "add to train.py: import trainers.prompting.plugin\n" in out
    (checkout / "train.py").chmod(0o750)
    for _ in range(2):  # a second time changes nothing
        assert drop_in.main([str(checkout)]) == 0
        assert changes(checkout) == tracked() | {"train.py"}
        assert (checkout / "train.py").read_bytes() == INSTALLED
    for name in tracked():
        assert (checkout / name).read_bytes() == (ROOT / name).read_bytes()
        assert (checkout / name).stat().st_mode == (ROOT / name).stat().st_mode
    assert (checkout / "train.py").stat().st_mode & 0o777 == 0o750
    capsys.readouterr()
    assert drop_in.main([str(checkout), "--check"]) == 0 and capsys.readouterr().out == f"{checkout}: complete\n"
    (checkout / "train.py").chmod(0o644)
    for _ in range(2):
        assert drop_in.main([str(checkout), "--remove"]) == 0 and changes(checkout) == set()
    assert not (checkout / "trainers" / "prompting").exists() and not (checkout / "configs" / "trainers").exists()


def test_copy_works_without_the_rest_of_this_repository(checkout, tmp_path):
    drop_in.main([str(checkout)])
    shutil.copytree(ROOT / "fallback" / "dassl", tmp_path / "dassl")
    code = (
        "import pkgutil, train, trainers.prompting as parts, trainers.logoprompt as ours, importlib\n"
        "for module in pkgutil.iter_modules(parts.__path__):\n"
        "    importlib.import_module('trainers.prompting.' + module.name)\n"
        "from dassl.config import get_cfg_default\n"
        "cfg = get_cfg_default()\n"
        "train.extend_cfg(cfg)\n"
        "print(cfg.TRAINER.LOGOPROMPT.K, ours.__file__)\n"
        "cfg.MODEL.BACKBONE.NAME = 'tiny'\n"
        "print(ours.LoGoPrompt.config_errors(cfg))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"5 {checkout / 'trainers' / 'logoprompt.py'}"
    assert "toy/tiny_clip.pt" in second and second.count("',") == 0  # weights do not travel
    assert drop_in.main([str(checkout), "--remove"]) == 0 and changes(checkout) == set()  # compiled files too


def test_scripts_work_in_the_checkout(checkout):
    drop_in.main([str(checkout)])
    paths = {"OUTPUT": str(checkout / "output"), "PYTHONPATH": str(ROOT / "fallback")}
    environment = {**os.environ, "PYTHON": sys.executable, "DATA": str(checkout), **paths}

    def script(*words):
        words = ["bash", str(checkout / "scripts" / "logo" / "base2new.sh"), *words]
        return subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True)

    done = script("caltech101", "1")
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()[-3:]] == [
        ["base", "60.00"],
        ["new", "30.00"],
        ["H", "40.00"],
    ]
    faults = (
        ("shapes", {}, "data set shapes: choose one of caltech101"),
        ("caltech101", {"BACKBONE": "tiny"}, "tiny_clip.pt: no such file"),
        ("caltech101", {"TRAINER": "CoOp"}, "TRAINER CoOp: the scripts run LoGoPrompt here"),  # CoOp's own
        ("caltech101", {"TRAINER": "LogoPrompt"}, "TRAINER LogoPrompt: the scripts run LoGoPrompt here"),
        ("caltech101", {"DATA": ""}, f"DATA is not set, and {checkout}/data: no such folder"),
        ("caltech101", {"DATA": "nowhere"}, "DATA nowhere: no such folder"),
    )
    for dataset, changed, fault in faults:
        before = environment.copy()
        environment.update(changed)
        done = script(dataset, "1")
        environment = before
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and fault in done.stderr, done.stderr


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_line_ends_and_the_rest_of_train_py_stay(checkout, end):
    before, after = (b"# \xe9\n" + text.replace(b"    ", b"\t") for text in (TRAIN, INSTALLED))
    (checkout / "train.py").write_bytes(before.replace(b"\n", end))
    assert drop_in.main([str(checkout)]) == 0
    assert (checkout / "train.py").read_bytes() == after.replace(b"\n", end)
    assert drop_in.main([str(checkout), "--remove"]) == 0
    assert (checkout / "train.py").read_bytes() == before.replace(b"\n", end)


def test_lines_without_a_place_are_printed(checkout, capsys):
    text = "from trainers import coop\ndef extend_cfg(cfg): cfg.X = 1\n"
    (checkout / "train.py").write_text(text)
    assert drop_in.main([str(checkout)]) == 0
    assert capsys.readouterr().out.count("add to train.py: ") == 2 and (checkout / "train.py").read_text() == text
    (checkout / "train.py").write_bytes(INSTALLED.replace(b"plugin\n", b"plugin  # mine\n"))
    assert "remove them by hand" in refusal(capsys, checkout, "--remove")
    assert (checkout / "trainers" / "logoprompt.py").exists()


def test_what_differs_is_neither_overwritten_nor_removed(checkout, capsys, tmp_path):
    def link():
        shutil.copytree(ROOT / "trainers" / "prompting", tmp_path / "prompting")
        (checkout / "trainers" / "prompting").symlink_to(tmp_path / "prompting")

    for part, make in (
        ("trainers/logoprompt.py", lambda: (checkout / "trainers" / "logoprompt.py").write_text("# mine\n")),
        ("scripts/logo", lambda: (checkout / "scripts" / "logo").write_text("a file in place of a folder\n")),
        ("trainers/prompting", link),  # the same content, but elsewhere
    ):
        make()
        before = changes(checkout)
        for words in ((), ("--remove",)):
            assert part in refusal(capsys, checkout, *words)
        assert changes(checkout) == before and (checkout / "train.py").read_bytes() == TRAIN
        (checkout / part).unlink()
    drop_in.main([str(checkout)])
    (checkout / "scripts" / "logo" / "my.sh").write_text("mine\n")
    assert "scripts/logo differs (my.sh)" in refusal(capsys, checkout, "--remove")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_interrupted_installation_is_completed_by_the_next(checkout, monkeypatch, capsys, error):
    replace = os.replace
    for fail_at in range(len(drop_in.parts_of(["LoGoPrompt"])) + 1):
        done = []

        def fragile(source, target, done=done, fail_at=fail_at):
            if len(done) == fail_at:
                raise error
            done.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fragile)
            if isinstance(error, OSError):
                assert "No space" in refusal(capsys, checkout)
            else:
                with pytest.raises(KeyboardInterrupt):
                    drop_in.main([str(checkout)])
        assert (checkout / "train.py").read_bytes() == TRAIN and not list(checkout.rglob(".drop_in*"))
        assert drop_in.main([str(checkout)]) == 0 and changes(checkout) == tracked() | {"train.py"}
        assert drop_in.main([str(checkout), "--remove"]) == 0 and changes(checkout) == set()


def test_folder_without_write_permission(checkout, capsys, monkeypatch):
    access, closed = os.access, checkout / "scripts"  # the superuser may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    assert f"{closed} is not a folder that can be written" in refusal(capsys, checkout) and changes(checkout) == set()


def test_missing_packages_are_named(checkout, capsys, monkeypatch):
    drop_in.main([str(checkout)])
    found = [d for d in drop_in.importlib.metadata.distributions() if d.metadata["Name"].lower() != "fonttools"]
    monkeypatch.setattr(drop_in.importlib.metadata, "distributions", lambda: found)
    capsys.readouterr()
    assert drop_in.main([str(checkout), "--check"]) == 1
    assert capsys.readouterr().out == f'{sys.executable} -m pip install "fonttools>=4.40"\n'


def test_other_folders_are_refused(checkout, capsys, tmp_path):
    (checkout / "train.py").write_text("import trainers.coop\n")
    for path in (ROOT, tmp_path, tmp_path / "nowhere", checkout):
        assert f"{path}: no CoOp code base" in refusal(capsys, path)


OLD_PYTHON = (
    "import sys, collections; V = collections.namedtuple('V', 'major minor micro'); sys.version_info = V(3, 8, 1)"
)
PLAIN = (
    "import train; from yacs.config import CfgNode; cfg = CfgNode({'TRAINER': {}}); train.extend_cfg(cfg); print(cfg)"
)


@pytest.mark.parametrize(
    ("before", "fault"),
    [
        (OLD_PYTHON, "Python 3.9 or newer is required, this is 3.8"),
        ("import sys; sys.modules['safetensors'] = sys.modules['fontTools'] = None", ""),
        ("import sys; sys.modules['filelock'] = None", "filelock"),
        ("import sys, torch; del torch.optim.lr_scheduler.LRScheduler", "LRScheduler"),  # torch 1
    ],
    ids=["python", "lazy", "package", "torch"],
)
def test_other_trainers_work_where_ours_cannot(checkout, before, fault):
    """Importing it costs them a line; only a run of ours is refused."""
    drop_in.main([str(checkout)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "fallback")}

    def run(trainer):
        words = [sys.executable, "-c", f"{before}; {PLAIN}", "--trainer", trainer]
        return subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)

    done = run("CoOp")
    assert done.returncode == 0 and "COOP" in done.stdout and ("LOGOPROMPT" in done.stdout) == (not fault), done.stderr
    if fault:
        assert done.stderr.startswith("WARNING: LoGoPrompt cannot be used here: ") and done.stderr.count("\n") == 1
        done = run("LoGoPrompt")
        assert done.returncode == 2 and fault in done.stderr and done.stderr.count("\n") == 1


def test_a_users_mistake_in_the_checkout_is_one_line(checkout):
    drop_in.main([str(checkout)])
    raises = "from trainers.prompting.errors import UserError; raise UserError('file: remedy', 'second')"
    for trainer, status, lines in (("LoGoPrompt", 2, ["error: file: remedy", "error: second"]), ("CoOp", 1, None)):
        words = [sys.executable, "-c", f"import train; {raises}", "--trainer", trainer]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "fallback")}
        done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr.splitlines() == lines if lines else "Traceback" in done.stderr


def test_old_pythons_are_refused_before_anything_is_written(checkout):
    code = f"{OLD_PYTHON}; import runpy; runpy.run_path({str(ROOT / 'tools' / 'drop_in.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(checkout)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: Python 3.9") and done.stderr.count("\n") == 1
    assert changes(checkout) == set()
    for name in ("tools/drop_in.py", "trainers/prompting/plugin.py", "trainers/prompting/__init__.py"):
        ast.parse((ROOT / name).read_text(), feature_version=(3, 7))


def test_a_changed_clip_is_reported(checkout, capsys):
    (checkout / "clip").mkdir()
    for name in ("__init__", "simple_tokenizer"):
        (checkout / "clip" / f"{name}.py").touch()
    (checkout / "clip" / "model.py").write_text("def build_model(state_dict, design_details): pass\n")
    assert drop_in.main([str(checkout)]) == 0
    out = capsys.readouterr().out
    assert f"open_clip will be used: the clip package in {checkout / 'clip'} builds no plain CLIP (TypeError" in out
    assert drop_in.main([str(checkout), "--check"]) == 0


def test_other_methods_are_installed_and_removed(checkout, capsys):
    """Every method but those whose file CoOp has; each can be imported without the others."""
    assert drop_in.main([str(checkout), "CLIPAdapter"]) == 0
    assert changes(checkout) == tracked("CLIPAdapter") | {"train.py"}
    assert drop_in.main([str(checkout), "LoGoPrompt"]) == 0
    assert drop_in.main([str(checkout), "--check"]) == 0
    assert drop_in.main([str(checkout), "--remove"]) == 0 and changes(checkout) == set()
    assert "no method Clip; there are CLIPAdapter" in refusal(capsys, checkout, "Clip")
    assert "trainers/coop.py differs" in refusal(capsys, checkout, "CoOp") and changes(checkout) == set()


@pytest.mark.parametrize("name", sorted(set(drop_in.methods()) - {"CoOp", "CoCoOp", "ZeroshotCLIP", "ZeroshotCLIP2"}))
def test_every_method_can_be_dropped_in_alone(checkout, name):
    assert drop_in.main([str(checkout), name]) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "fallback")}
    code = f"{PLAIN}; from dassl.engine import TRAINER_REGISTRY as R; print(R.get({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and f".{name}'" in done.stdout
