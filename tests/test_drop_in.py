"""tools/drop_in.py on a made-up miniature of a CoOp code base: what it adds, leaves alone, refuses and takes back."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import drop_in

TRAIN = b'''\
import argparse

import trainers.coop
import trainers.zsclip  # no training

import os


def extend_cfg(cfg):
    """Keys of our own."""
    cfg.TRAINER.COOP = cfg.clone()
    cfg.SUBSET = "all"  # all, base or new


def main(args):
    print(args)
'''
INSTALLED = TRAIN.replace(b"# no training\n", b"# no training\nimport trainers.logoprompt\n").replace(
    b"base or new\n", b"base or new\n    trainers.logoprompt.extend_cfg(cfg)\n"
)


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "CoOp"
    for name in ("trainers/__init__.py", "trainers/coop.py", "trainers/zsclip.py", "scripts/coop/main.sh", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "train.py").write_bytes(TRAIN)
    return folder


def snapshot(folder, times=True):
    """Everything below a folder, the folder too: content, permissions and the time of change."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        state = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        name = path.relative_to(folder).as_posix()
        found[name] = (content, state.st_mode, state.st_mtime_ns if times else None)
    return found


def refusal(capsys, *words):
    """The one line that the tool refuses with."""
    capsys.readouterr()
    assert drop_in.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def tracked():
    """Our files, found in another way than the tool does."""
    names = ["trainers/logoprompt.py"]
    for part in ("trainers/prompting", "configs/trainers/LoGoPrompt", "scripts/logo"):
        for folder, _, files in os.walk(ROOT / part):
            if os.path.basename(folder) != "__pycache__":
                names += [os.path.relpath(os.path.join(folder, file), ROOT) for file in files]
    return names


def test_it_copies_exactly_our_files_and_adds_two_lines(checkout):
    before = snapshot(checkout, times=False)
    assert drop_in.main([str(checkout)]) == 0
    after = snapshot(checkout, times=False)
    new_files = {name for name in after.keys() - before.keys() if after[name][0] is not None}
    assert new_files == set(tracked()) and "trainers/prompting/tiny_clip.pt" in new_files
    for name in new_files:
        assert after[name][0] == (ROOT / name).read_bytes()
        assert after[name][1] == (ROOT / name).stat().st_mode  # scripts stay executable
    assert after["train.py"][0] == INSTALLED
    assert {name for name in before if before[name] != after[name]} == {"train.py"}


def test_what_python_compiled_is_not_copied(checkout, tmp_path, monkeypatch):
    ours = tmp_path / "ours"
    shutil.copytree(ROOT / "trainers", ours / "trainers")
    shutil.copy(ROOT / "requirements.txt", ours)
    (ours / "trainers" / "prompting" / "__pycache__").mkdir(exist_ok=True)
    (ours / "trainers" / "prompting" / "__pycache__" / "text.cpython-311.pyc").write_bytes(b"")
    monkeypatch.setattr(drop_in, "ROOT", ours)
    assert drop_in.main([str(checkout)]) == 0
    assert (checkout / "trainers" / "prompting" / "text.py").exists() and not list(checkout.rglob("*.pyc"))


def test_the_copy_works_without_the_rest_of_this_repository(checkout):
    drop_in.main([str(checkout)])
    code = (
        "import train, yacs.config, trainers.logoprompt as ours\n"
        "cfg = yacs.config.CfgNode({'TRAINER': {}, 'TRAIN': {}, 'TEST': {}})\n"
        "train.extend_cfg(cfg)\n"
        "print(cfg.TRAINER.LOGOPROMPT.K, ours.__file__, ours.PromptTrainer.__module__)\n"
        "from trainers.prompting.backbone import load_clip\n"
        "print(load_clip('tiny').input_resolution)"
    )
    paths = [str(ROOT / "fallback"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, reversed(paths)))}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("5", str(checkout / "trainers" / "logoprompt.py"), "trainers.prompting.trainer", "96")
    ]


VARIANTS = {
    "line ends of Windows": (TRAIN.replace(b"\n", b"\r\n"), INSTALLED.replace(b"\n", b"\r\n")),
    "byte order mark": (b"\xef\xbb\xbf" + TRAIN, b"\xef\xbb\xbf" + INSTALLED),
    "another encoding": (b"# coding: latin-1\n# \xe9\n" + TRAIN, b"# coding: latin-1\n# \xe9\n" + INSTALLED),
    "tabs": (TRAIN.replace(b"    ", b"\t"), INSTALLED.replace(b"    ", b"\t")),
    "mixed line ends": (b"#\r\n" + TRAIN, b"#\r\n" + INSTALLED),
    "no end of the last line": (
        b"import trainers.maple\ndef extend_cfg(c):\n  c.X = 1",
        b"import trainers.maple\nimport trainers.logoprompt\n"
        b"def extend_cfg(c):\n  c.X = 1\n  trainers.logoprompt.extend_cfg(c)",
    ),
    "a return and comments at the end, imports over several lines": (
        b"from trainers import (\n    coop,\n    maple,\n)\n\ndef extend_cfg(cfg):\n    if cfg:\n        cfg.X = 1\n"
        b"    # the end\n    return cfg\n    # really\n\ndef setup_cfg(cfg): extend_cfg(cfg)\n",
        b"from trainers import (\n    coop,\n    maple,\n)\nimport trainers.logoprompt\n\ndef extend_cfg(cfg):\n"
        b"    if cfg:\n        cfg.X = 1\n    # the end\n    trainers.logoprompt.extend_cfg(cfg)\n    return cfg\n"
        b"    # really\n\ndef setup_cfg(cfg): extend_cfg(cfg)\n",
    ),
    "one of the lines is there": (
        b"import trainers.logoprompt\nimport trainers.coop\ndef extend_cfg(cfg):\n    cfg.X = (\n        1\n    )\n",
        b"import trainers.logoprompt\nimport trainers.coop\ndef extend_cfg(cfg):\n    cfg.X = (\n        1\n    )\n"
        b"    trainers.logoprompt.extend_cfg(cfg)\n",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_py_of_many_kinds(checkout, variant):
    before, after = VARIANTS[variant]
    path = checkout / "train.py"
    path.write_bytes(before)
    path.chmod(0o750)
    assert drop_in.main([str(checkout)]) == 0
    assert path.read_bytes() == after and path.stat().st_mode & 0o777 == 0o750
    assert drop_in.main([str(checkout), "--check"]) == 0
    assert drop_in.main([str(checkout), "--remove"]) == 0
    if variant != "one of the lines is there":
        assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o750


def test_a_second_time_changes_nothing(checkout, capsys):
    drop_in.main([str(checkout)])
    before = snapshot(checkout)
    assert drop_in.main([str(checkout)]) == 0
    assert "there already" in capsys.readouterr().out
    assert snapshot(checkout) == before


def test_what_differs_is_not_overwritten(checkout, capsys, tmp_path):
    (checkout / "trainers" / "logoprompt.py").write_text("# mine\n")
    (checkout / "scripts" / "logo").write_text("a file where a folder must be\n")
    prompting = tmp_path / "prompting"
    shutil.copytree(ROOT / "trainers" / "prompting", prompting)
    (checkout / "trainers" / "prompting").symlink_to(prompting)  # the same content, but not in the checkout
    before, elsewhere = snapshot(checkout), snapshot(prompting)
    line = refusal(capsys, checkout)
    for name in ("trainers/logoprompt.py", "scripts/logo/base2new.sh", "trainers/prompting/text.py"):
        assert name in line
    assert "configs/" not in line and snapshot(checkout) == before
    assert "trainers/logoprompt.py" in refusal(capsys, checkout, "--remove")
    assert snapshot(checkout) == before and snapshot(prompting) == elsewhere


@pytest.mark.parametrize("do", [(), ("--check",), ("--remove",)])
@pytest.mark.parametrize(
    "break_it, said",
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "not a folder"),
        (lambda folder: (folder / "train.py").unlink(), "no train.py"),
        (lambda folder: shutil.rmtree(folder / "trainers"), "no trainers/"),
        (lambda folder: (folder / "train.py").write_text("import trainers.coop\n"), "no extend_cfg"),
        (lambda folder: (folder / "train.py").write_text("def extend_cfg(cfg:\n"), "train.py"),
        (lambda folder: (folder / "train.py").write_bytes(b"\xff\0"), "train.py"),
        (lambda folder: ((folder / "tools").mkdir(), (folder / "tools" / "drop_in.py").touch()), "own repository"),
    ],
)
def test_what_is_no_coop_code_base(checkout, capsys, break_it, said, do):
    break_it(checkout)
    before = snapshot(checkout.parent)
    assert said in refusal(capsys, checkout, *do)
    assert snapshot(checkout.parent) == before


def test_this_repository_is_none(capsys):
    assert "own repository" in refusal(capsys, ROOT)


@pytest.mark.parametrize(
    "source",
    [
        "def extend_cfg(cfg):\n    cfg.X = 1\n",
        "import trainers.coop\ndef extend_cfg(cfg): cfg.X = 1\n",
        "import trainers.coop; x = (\n    1\n)\ndef extend_cfg(cfg):\n    cfg.X = 1\n",
    ],
    ids=["no trainer imported", "on one line", "no place between two lines"],
)
def test_a_train_py_that_has_no_place_for_the_lines(checkout, capsys, source):
    (checkout / "train.py").write_text(source)
    before = snapshot(checkout)
    assert "train.py" in refusal(capsys, checkout)
    assert snapshot(checkout) == before


def test_check_says_what_is_missing_and_what_differs(checkout, capsys):
    before = snapshot(checkout)
    assert drop_in.main([str(checkout), "--check"]) == 1
    out = capsys.readouterr().out
    assert {line for line in out.splitlines() if line.startswith("missing")} == {f"missing: {n}" for n in tracked()}
    assert "train.py lacks: import trainers.logoprompt\n" in out
    assert "train.py lacks: trainers.logoprompt.extend_cfg(cfg)\n" in out
    assert snapshot(checkout) == before

    drop_in.main([str(checkout)])
    capsys.readouterr()
    assert drop_in.main([str(checkout), "--check"]) == 0
    assert capsys.readouterr().out == f"{checkout}: LoGoPrompt is whole\n"
    (checkout / "trainers" / "prompting" / "text.py").write_text("# mine\n")
    (checkout / "scripts" / "logo" / "common.sh").unlink()
    (checkout / "train.py").write_bytes(INSTALLED.replace(b"import trainers.logoprompt\n", b""))
    assert drop_in.main([str(checkout), "--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "missing: scripts/logo/common.sh",
        "differs: trainers/prompting/text.py",
        "train.py lacks: import trainers.logoprompt",
        f"{checkout}: LoGoPrompt is not whole",
    ]


def test_check_names_packages(checkout, capsys, monkeypatch):
    drop_in.main([str(checkout)])
    capsys.readouterr()
    find, version = drop_in.importlib.util.find_spec, drop_in.importlib.metadata.version
    monkeypatch.setattr(drop_in.importlib.util, "find_spec", lambda name: None if name == "fontTools" else find(name))
    monkeypatch.setattr(
        drop_in.importlib.metadata, "version", lambda name: "10.0.1" if name == "Pillow" else version(name)
    )
    assert drop_in.main([str(checkout), "--check"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert '"Pillow>=10.1" "fonttools>=4.40"' in first and first.count(">=") == 2 and sys.executable in first
    assert last.endswith("not whole")
    assert drop_in.main([str(checkout)]) == 0 and "fonttools" in capsys.readouterr().out


@pytest.mark.parametrize(
    "version, whole", [("10.1", True), ("10.10.0", True), ("11", True), ("10", False), ("9.9", False)]
)
def test_versions_are_compared_as_numbers(monkeypatch, version, whole):
    original = drop_in.importlib.metadata.version
    monkeypatch.setattr(
        drop_in.importlib.metadata, "version", lambda name: version if name == "Pillow" else original(name)
    )
    assert drop_in.lacking_packages() == ([] if whole else ["Pillow>=10.1"])


def test_the_packages_are_those_that_the_copied_files_import():
    modules = set()
    for name in tracked():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / name).read_bytes())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    modules.add(node.module)
    modules = {module.partition(".")[0] for module in modules}
    own = {"dassl", "open_clip"}  # Dassl is CoOp's; CoOp's clip makes open_clip needless
    standard = {module for module in modules if _is_standard(module)}
    assert modules - own - standard == set(drop_in.PACKAGES)
    listed = re.findall(r"^([\w-]+)>=", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert set(drop_in.PACKAGES.values()) <= set(listed)


def _is_standard(module):
    spec = drop_in.importlib.util.find_spec(module)
    return (
        spec.origin in ("built-in", "frozen")
        or Path(spec.origin).is_relative_to(Path(os.__file__).parent)
        and ("site-packages" not in spec.origin)
    )


def test_remove_undoes_it_exactly(checkout, capsys):
    before = snapshot(checkout, times=False)
    drop_in.main([str(checkout)])
    for folder, name in (
        ("trainers", "logoprompt"),
        ("trainers/prompting", "text"),
        ("trainers/prompting", "__init__"),
    ):
        (checkout / folder / "__pycache__").mkdir(exist_ok=True)
        (checkout / folder / "__pycache__" / f"{name}.cpython-311.pyc").write_bytes(b"")
    assert drop_in.main([str(checkout), "--remove"]) == 0
    assert snapshot(checkout, times=False) == before
    here = snapshot(checkout)
    assert drop_in.main([str(checkout), "--remove"]) == 0  # nothing is left to remove
    assert snapshot(checkout) == here


def test_remove_leaves_what_is_not_ours(checkout):
    theirs = [checkout / "trainers" / "__pycache__" / "coop.cpython-311.pyc", checkout / "scripts" / "logo" / "my.sh"]
    drop_in.main([str(checkout)])
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    edited = INSTALLED.replace(b"import os\n", b"import trainers.maple\nimport os\n").replace(
        b"(cfg)\n\n", b"(cfg)\n    cfg.MINE = 1\n\n"
    )
    (checkout / "train.py").write_bytes(edited)
    assert drop_in.main([str(checkout), "--remove"]) == 0
    assert all(path.read_bytes() == b"mine" for path in theirs)
    left = (checkout / "train.py").read_bytes()
    assert left == edited.replace(b"import trainers.logoprompt\n", b"").replace(
        b"    trainers.logoprompt.extend_cfg(cfg)\n", b""
    )
    assert not (checkout / "trainers" / "prompting").exists() and not (checkout / "configs").exists()


def test_remove_refuses_what_was_changed(checkout, capsys):
    drop_in.main([str(checkout)])
    changed = [checkout / "trainers" / "prompting" / "text.py", checkout / "configs/trainers/LoGoPrompt/rn50.yaml"]
    for path in changed:
        path.write_bytes(path.read_bytes() + b"# mine\n")
    before = snapshot(checkout)
    line = refusal(capsys, checkout, "--remove")
    assert "trainers/prompting/text.py" in line and "configs/trainers/LoGoPrompt/rn50.yaml" in line
    assert "selection.py" not in line and snapshot(checkout) == before

    for path in changed:
        path.write_bytes((ROOT / path.relative_to(checkout)).read_bytes())
    for ours in (b"import trainers.logoprompt", b"trainers.logoprompt.extend_cfg(cfg)"):
        (checkout / "train.py").write_bytes(INSTALLED.replace(ours, ours + b"  # mine"))
        before = snapshot(checkout)
        assert "train.py: line" in refusal(capsys, checkout, "--remove")
        assert snapshot(checkout) == before


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_a_second_run_completes_what_a_first_one_left(checkout, monkeypatch, capsys, error):
    reference = checkout.with_name("whole")
    shutil.copytree(checkout, reference)
    drop_in.main([str(reference)])
    steps, replace = len(tracked()) + 1, os.replace
    for fail_at in (0, 1, steps // 2, steps - 1):
        done = []

        def fragile(source, target, done=done, fail_at=fail_at):
            if len(done) == fail_at:
                raise error
            done.append(target)
            replace(source, target)

        target = checkout.with_name(f"stopped_at_{fail_at}")
        shutil.copytree(checkout, target)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fragile)
            if isinstance(error, OSError):
                assert "No space" in refusal(capsys, target)
            else:
                with pytest.raises(KeyboardInterrupt):
                    drop_in.main([str(target)])
        assert len(done) == fail_at and (target / "train.py").read_bytes() == TRAIN  # it is the last
        assert drop_in.main([str(target), "--check"]) == 1
        assert drop_in.main([str(target)]) == 0
        assert snapshot(target, times=False) == snapshot(reference, times=False)


def test_a_killed_run(checkout):
    """Killed in the middle of a file: nothing could be tidied up."""
    before = snapshot(checkout, times=False)
    (checkout / "trainers" / "prompting").mkdir()
    (checkout / "trainers" / "prompting" / ".adapter.py.drop_in").write_text("half of")
    (checkout / ".train.py.drop_in").write_text("half of")
    killed = checkout.with_name("removed")
    shutil.copytree(checkout, killed)
    assert drop_in.main([str(checkout)]) == 0
    assert not list(checkout.rglob(".*.drop_in"))
    assert drop_in.main([str(killed), "--remove"]) == 0
    assert snapshot(killed, times=False) == before


def test_a_stopped_removal(checkout, monkeypatch):
    before = snapshot(checkout, times=False)
    drop_in.main([str(checkout)])
    unlink, left = Path.unlink, [3]

    def fragile(self, *args, **kwargs):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fragile)
        with pytest.raises(KeyboardInterrupt):
            drop_in.main([str(checkout), "--remove"])
    assert (checkout / "train.py").read_bytes() == TRAIN  # it is the first, so that CoOp works in between
    assert drop_in.main([str(checkout), "--remove"]) == 0
    assert snapshot(checkout, times=False) == before


@pytest.mark.parametrize("folder", ["trainers", "scripts", "."])
def test_a_folder_that_may_not_be_written(checkout, capsys, monkeypatch, folder):
    """The question to the system is answered for it: the superuser may write everywhere."""
    access, closed = os.access, (checkout / folder).resolve()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    before = snapshot(checkout)
    assert f"{closed}: may not be written" in refusal(capsys, checkout)
    assert snapshot(checkout) == before
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", access)
        drop_in.main([str(checkout)])
    before = snapshot(checkout)
    assert f"{closed}: may not be written" in refusal(capsys, checkout, "--remove")
    assert snapshot(checkout) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_is_read_only(checkout, capsys):
    (checkout / "trainers").chmod(0o555)
    try:
        before = snapshot(checkout)
        assert str(checkout / "trainers") in refusal(capsys, checkout)
        assert snapshot(checkout) == before
    finally:
        (checkout / "trainers").chmod(0o755)
