"""Install LoGoPrompt, or other methods of this repository, into a CoOp code base, or remove them.

    python tools/drop_in.py PATH_TO_COOP                      copies LoGoPrompt and adds two lines to train.py
    python tools/drop_in.py PATH_TO_COOP TipAdapter KgCoOp    copies these methods instead
    python tools/drop_in.py PATH_TO_COOP --check              lists what is missing; status 0: nothing, 1: something
    python tools/drop_in.py PATH_TO_COOP --remove             undoes the installation of all methods

Run it with CoOp's interpreter: it looks for packages there. Checks everything before it writes, train.py last; never
overwrites or removes what differs from ours. Standard library only, and readable for Python 3.7.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    print(
        f"error: Python 3.9 or newer is required, this is {sys.version.split()[0]}; nothing was done", file=sys.stderr
    )
    sys.exit(2)

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("trainers/prompting", "scripts/logo")
LINES = (b"import trainers.prompting.plugin", b"trainers.prompting.plugin.extend_cfg(cfg)")
# What they follow in train.py: the imports of trainers, and the head of extend_cfg with its docstring.
PLACES = (
    re.compile(rb"(?:^import trainers\.\w+[ \t]*(?:#[^\r\n]*)?(\r?\n))+()", re.M),
    re.compile(rb'^def extend_cfg\(cfg\):[ \t]*(?:\r?\n[ \t]+"""[^"]*"""[ \t]*)?(\r?\n)(?=([ \t]+)\S)', re.M),
)
PACKAGES = ("torch", "torchvision", "yacs", "numpy", "Pillow", "fonttools", "safetensors", "filelock", "tqdm")


class Refusal(Exception):
    """A user's mistake, in one line. Not ``UserError``: importing that needs the packages that may be missing."""


def methods() -> dict[str, str]:
    """Our trainers and their files below ``trainers/``."""
    found = {}
    for path in sorted((ROOT / "trainers").glob("*.py")):
        for name in re.findall(r"^@TRAINER_REGISTRY\.register\(\)\s+class (\w+)", path.read_text("utf-8"), re.M):
            found[name] = f"trainers/{path.name}"
    return found


def parts_of(names: Sequence[str]) -> list[str]:
    """What is copied for some trainers: their files and configs, and what all methods share."""
    known = methods()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise Refusal(f"no method {', '.join(unknown)}; there are {', '.join(known)}")
    configs = [f"configs/trainers/{name}" for name in names]
    return [*SHARED, *(c for c in configs if (ROOT / c).is_dir()), *dict.fromkeys(known[name] for name in names)]


def state(checkout: Path, part: str) -> str:
    """``same``, ``missing`` or ``differs (files)`` (also where a link is in the way)."""

    def content(path: Path) -> dict[str, bytes]:  # without compiled and hidden files
        found = {p.relative_to(path).as_posix(): p for p in (path, *path.rglob("*")) if p.is_file()}
        return {name: p.read_bytes() for name, p in found.items() if not re.search(r"__pycache__|(^|/)\.\w", name)}

    target, ours = checkout / part, content(ROOT / part)
    if not os.path.lexists(target):
        return "missing"
    theirs = content(target) if target.resolve() == target else {}
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return f"differs ({', '.join(differing)})" if differing else "same"


def write(source: Path, target: Path, text: bytes = b"") -> None:
    """Copy a file or folder atomically; with a text, only the permissions."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".drop_in_", dir=target.parent) as folder:
        copy, ignore = Path(folder, target.name), shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(source, copy, ignore=ignore) if source.is_dir() else shutil.copy(source, copy)
        if text:
            copy.write_bytes(text)
        os.replace(copy, target)


def installed(checkout: Path) -> list[str]:
    """Our trainers whose file is in the checkout: a file of the same name that imports our parts."""
    paths = {name: checkout / file for name, file in methods().items()}
    return [name for name, path in paths.items() if path.is_file() and b"from .prompting" in path.read_bytes()]


def missing_lines(text: bytes) -> list[bytes]:
    """Those of our two lines that ``train.py`` lacks."""
    return [line for line in LINES if not re.search(rb"^[ \t]*%b[ \t]*\r?$" % re.escape(line), text, re.M)]


def edited(text: bytes, remove: bool) -> bytes:
    """``train.py`` with or without our two lines; a line for which it has no place is left out."""
    for line, place in zip(LINES, PLACES):
        if remove:
            text = re.sub(rb"^[ \t]*%b[ \t]*\r?\n" % re.escape(line), b"", text, flags=re.M)
        elif line in missing_lines(text):
            text = place.sub(rb"\g<0>\2%b\1" % line, text, count=1)  # with the indentation and line end found there
    if remove and b"trainers.prompting" in text:
        raise Refusal("our lines in train.py were changed; remove them by hand first")
    return text


def change(checkout: Path, names: Sequence[str], remove: bool) -> str:
    """Install or remove. Returns what was done. Raises Refusal, before anything is written."""
    train, states = checkout / "train.py", {part: state(checkout, part) for part in parts_of(names)}
    for part, found in states.items():
        if found.startswith("differs"):
            raise Refusal(f"{part} {found} from ours; move it away first")
    parts = [checkout / part for part, found in states.items() if found == ("same" if remove else "missing")]
    text = edited(train.read_bytes(), remove)
    for path in [train, *parts]:
        folder = next(parent for parent in path.parents if os.path.lexists(parent))
        if folder.resolve() != folder or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise Refusal(f"{folder} is not a folder that can be written")
    for path in () if remove else parts:
        write(ROOT / path.relative_to(checkout), path)
    if text != train.read_bytes():
        write(train, train, text)
    for path in (*parts, *(checkout / "trainers/__pycache__").glob("logoprompt.*.pyc")) if remove else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with suppress(OSError):
            path.parent.rmdir()  # where it is empty
            path.parent.parent.rmdir()
    return f"{checkout}: {len(parts)} parts {'removed' if remove else 'copied'}"


def clip_fault(checkout: Path) -> str:
    """What is wrong with the ``clip`` package of the checkout, tried with a small CLIP; empty: nothing, or no such."""
    load = "from trainers.prompting.backbone import load_clip; load_clip(sys.argv[1], 'clip')"
    if not (checkout / "clip").is_dir():
        return ""
    words = [sys.executable, "-c", f"import sys; {load}", str(ROOT / "toy/tiny_clip.pt")]
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True)
    found = re.search(r"UserError: (the clip package .*): pip install", done.stderr)
    return found[1] if found else ""


def missing_packages(more: Sequence[str] = ()) -> list[str]:
    """Requirements that this interpreter does not meet, as in ``requirements.txt``; ``more`` names further ones."""

    def numbers(version: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", version)[:2]]

    needed = dict(re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text("utf-8"), re.M))
    installed = {str(d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions()}
    least = {name: needed[name] for name in (*PACKAGES, *more)}
    return [f'"{n}>={v}"' for n, v in least.items() if numbers(installed.get(n.lower(), "0")) < numbers(v)]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0; 1 if ``--check`` finds something missing; 2 for a user's mistake."""
    title, examples, _ = __doc__.split("\n\n", 2)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=f"examples:\n{examples}", formatter_class=style)
    parser.add_argument("checkout", metavar="PATH_TO_COOP", help="folder with CoOp's train.py and trainers/")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="trainers to install (default: LoGoPrompt)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="list what is missing")
    what.add_argument("--remove", action="store_true", help="undo the installation")
    args = parser.parse_args(argv)
    checkout = Path(args.checkout).expanduser().resolve()
    train, fault = checkout / "train.py", ""
    try:
        if checkout == ROOT or not (checkout / "trainers").is_dir() or b"def extend_cfg" not in train.read_bytes():
            raise Refusal("no CoOp code base; give the folder with CoOp's train.py and trainers/")
        if args.remove and args.methods:
            raise Refusal("--remove removes all methods; leave out their names")
        names = args.methods or (installed(checkout) if args.check or args.remove else []) or ["LoGoPrompt"]
        lines = [] if args.check else [change(checkout, names, args.remove)]
        if args.check:
            found = {part: state(checkout, part) for part in parts_of(names)}
            lines = [f"{word}: {part}" for part, word in found.items() if word != "same"]
        if not args.remove:
            lines += [f"add to train.py: {line.decode()}" for line in missing_lines(train.read_bytes())]
            fault = clip_fault(checkout)
            packages = missing_packages(("open_clip_torch",) if fault else ())
            lines += [f"{sys.executable} -m pip install {' '.join(packages)}"] if packages else []
    except (Refusal, OSError) as error:
        print(f"error: {checkout}: {error}", file=sys.stderr)
        return 2
    status = 1 if args.check and lines else 0
    if fault:
        lines.append(f"open_clip will be used: {fault}")
    print("\n".join(lines) or f"{checkout}: complete")
    return status


if __name__ == "__main__":
    sys.exit(main())
