"""Every command block of README.md and docs/ runs as written, in order, in a fresh copy of the repository.

A block that a comment before it marks as "not run" needs something that is not here, such as OpenAI's weights. The
environment makes the others short: SHOTS for the scripts, ARGS for the demo.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```bash\n(?P<code>.*?)^```$", re.M | re.S)
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("code"))
            name = f"{page.relative_to(ROOT)}:{line}"
            skip = pytest.mark.skip(reason=match["reason"]) if match["reason"] else ()
            yield pytest.param(match["code"], id=name, marks=skip)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files that git has or would take, with this Python in place of ``.venv``."""
    root = tmp_path_factory.mktemp("clone") / "LoGoPrompt"
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (root / ".venv" / ".installed").touch()  # newer than requirements.txt: make does not install
    return root


@pytest.mark.parametrize("code", list(blocks()))
def test_command_block_runs_as_written(clone, code):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("COV", "PYTEST"))}
    for key in ("CFG", "DATA", "OUTPUT", "BACKBONE", "TRAINER", "FEATURES", "PYTHON", "PYTHONPATH"):
        environment.pop(key, None)
    environment.update(SHOTS="1", OMP_NUM_THREADS="1", ARGS="OPTIM.MAX_EPOCH 1 DATASET.NUM_SHOTS 1")
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_editable_install_makes_trainers_importable_anywhere(clone, tmp_path):
    pytest.importorskip("setuptools")
    # Not into this environment: into a folder, whose .pth file is read from there.
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--prefix", tmp_path / "prefix"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--editable", clone], check=True)
    (site,) = {path.parent for path in tmp_path.rglob("*.pth")}
    program = f"import site; site.addsitedir({str(site)!r}); import trainers, train; print(trainers.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(clone / "trainers" / "__init__.py")
