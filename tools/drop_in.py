"""Install LoGoPrompt into a CoOp code base, or take it out again.

    python tools/drop_in.py PATH_TO_COOP             copies the method and adds two lines to train.py
    python tools/drop_in.py PATH_TO_COOP --check     says what is missing; exit status 0: nothing, 1: something
    python tools/drop_in.py PATH_TO_COOP --remove    undoes it

Call it with the interpreter that CoOp runs with: packages are looked for there. A file that is there and differs is
neither overwritten nor removed: everything is checked before anything is written, train.py is written last and
atomically, and what an interrupted run left undone the next one does. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trainers/prompting", "configs/trainers/LoGoPrompt", "scripts/logo")
PARTS = ("trainers/logoprompt.py", *FOLDERS)
IMPORT = "import trainers.logoprompt"
CALL = "trainers.logoprompt.extend_cfg({})"
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")  # what Python takes for a line
# What the copied files import and where it comes from; Dassl and clip are CoOp's own affair.
PACKAGES = {
    "torch": "torch",
    "yacs": "yacs",
    "numpy": "numpy",
    "PIL": "Pillow",
    "fontTools": "fonttools",
    "safetensors": "safetensors",
    "filelock": "filelock",
    "tqdm": "tqdm",
}


class Refusal(Exception):
    """A mistake of the user's, in one line. Not ``UserError``: to import that takes the packages looked for here."""


# ------------------------------------------------------------------------------------------------ files


def our_files() -> list[str]:
    """What is copied: paths relative to this repository and to the checkout, with forward slashes."""
    paths = [path for part in PARTS for path in [ROOT / part, *(ROOT / part).rglob("*")] if path.is_file()]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return sorted(name for name in names if "__pycache__" not in name and not Path(name).name.startswith("."))


def survey(checkout: Path) -> dict[str, str]:
    """For each of our files ``missing``, ``same`` or ``differs`` (also where a link or a folder is in its place)."""
    return {name: _state(checkout, name) for name in our_files()}


def _state(checkout: Path, name: str) -> str:
    path = checkout
    for part in Path(name).parts:
        if path.is_symlink() or not path.is_dir():  # through a link we would write into, or remove from, elsewhere
            return "differs"
        path = path / part
        if not os.path.lexists(path):
            return "missing"
    whole = path.is_file() and not path.is_symlink() and path.read_bytes() == (ROOT / name).read_bytes()
    return "same" if whole else "differs"


def in_state(states: dict[str, str], state: str) -> list[str]:
    return [name for name, found in states.items() if found == state]


def check_writable(paths: Iterable[Path]) -> None:
    """Each path must be such that it can be made, replaced or removed. Raises Refusal."""
    for path in sorted(set(paths)):
        folder = next(parent for parent in path.parents if parent.exists())
        for needed in (folder, path):
            if needed.exists() and not os.access(needed, os.W_OK):
                raise Refusal(f"{needed}: may not be written; nothing was changed")


def temporary(path: Path) -> Path:
    """Always the same name, so that what a killed run left is overwritten by the next one."""
    return path.with_name(f".{path.name}.drop_in")


def write(path: Path, content: bytes, mode_of: Path) -> None:
    """Write a file atomically, with the permissions of another one."""
    try:
        with open(temporary(path), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(mode_of, temporary(path))
        os.replace(temporary(path), path)
    except BaseException:
        with suppress(OSError):
            temporary(path).unlink()
        raise


# ------------------------------------------------------------------------------------------------ train.py


class TrainFile:
    """CoOp's ``train.py``, as bytes: all but our two lines stays as it is, line ends and encoding too.

    Raises:
        Refusal: it cannot be read as Python or has no ``extend_cfg``.
    """

    def __init__(self, path: Path, source: Optional[bytes] = None) -> None:
        self.path = path
        if path.is_symlink() or not path.is_file():
            raise Refusal(f"{path.parent}: no CoOp code base (no train.py in it)")
        self.source = path.read_bytes() if source is None else source
        self.lines = LINE.findall(self.source)
        try:
            self.body = ast.parse(self.source, str(path)).body
        except (SyntaxError, ValueError) as error:
            raise Refusal(f"{path}: not Python that can be read ({' '.join(str(error).split())})") from error
        functions = [node for node in self.body if isinstance(node, ast.FunctionDef) and node.name == "extend_cfg"]
        if not functions or not functions[-1].args.args:
            raise Refusal(f"{path.parent}: no CoOp code base (no extend_cfg(cfg) in its train.py)")
        self.function = functions[-1]
        self.call = CALL.format(self.function.args.args[0].arg)

    def ours(self) -> list[tuple[str, Optional[ast.stmt]]]:
        """Our two lines, each with the statement that it is here, if it is."""
        imports = (
            node
            for node in self.body
            if isinstance(node, ast.Import) and any(_names(alias) == "trainers.logoprompt" for alias in node.names)
        )
        calls = (
            node for node in self.function.body if isinstance(node, ast.Expr) and ast.unparse(node.value) == self.call
        )
        return [(IMPORT, next(imports, None)), (self.call, next(calls, None))]

    def lacks(self) -> list[str]:
        """Those of our two lines that are not in it."""
        return [line for line, found in self.ours() if found is None]

    def with_lines(self) -> bytes:
        """The import goes below the last import of a trainer, the call to the end of ``extend_cfg``. Raises Refusal."""
        places = {IMPORT: self._import_place, self.call: self._call_place}
        lines = list(self.lines)
        for after, text in sorted((places[line]() for line in self.lacks()), reverse=True):
            # Set in before that line's end, which then ends ours: it works for a last line without an end too.
            content = lines[after - 1].rstrip(b"\r\n")
            end = lines[after - 1][len(content) :]
            lines[after - 1] = content + (end or self._line_end()) + text.encode() + end
        return self._checked(lines, lacks=0)

    def without_lines(self) -> bytes:
        """Raises Refusal where one of our lines was changed by hand."""
        lines = list(self.lines)
        found = [(node.lineno, line) for line, node in self.ours() if node is not None]
        for number, line in sorted(found, reverse=True):
            if lines[number - 1].strip() != line.encode():
                raise Refusal(f"{self.path}: line {number} is not as it was written; remove it by hand first")
            removed = lines.pop(number - 1)
            if not removed.endswith((b"\r", b"\n")):
                lines[number - 2] = lines[number - 2].rstrip(b"\r\n")
        return self._checked(lines, lacks=2)

    def _checked(self, lines: Sequence[bytes], lacks: int) -> bytes:
        changed = TrainFile(self.path, b"".join(lines))
        if len(changed.lacks()) != lacks:
            raise Refusal(f"{self.path}: cannot be edited safely; see the README for the two lines")
        return changed.source

    def _import_place(self) -> tuple[int, str]:
        """(number of the line to follow, what to write)."""
        ends = [node.end_lineno for node in self.body if any(name.startswith("trainers.") for name in _imported(node))]
        if not ends:
            raise Refusal(f"{self.path}: imports no trainer (import trainers.…), so there is no place for ours")
        return max(ends), IMPORT

    def _call_place(self) -> tuple[int, str]:
        first, last = self.function.body[0], self.function.body[-1]
        indent = re.match(rb"[ \t]*", self.lines[first.lineno - 1])[0].decode()
        if len(indent) != first.col_offset:
            raise Refusal(f"{self.path}: extend_cfg is on one line; break it first")
        after = last.lineno - 1 if isinstance(last, ast.Return) else last.end_lineno
        return after, indent + self.call

    def _line_end(self) -> bytes:
        return self.lines[0][len(self.lines[0].rstrip(b"\r\n")) :]


def _names(alias: ast.alias) -> str:
    return "" if alias.asname else alias.name


def _imported(node: ast.stmt) -> Iterator[str]:
    """Names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


# ------------------------------------------------------------------------------------------------ packages


def lacking_packages() -> list[str]:
    """What this interpreter has not, or too old, as in ``requirements.txt``."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    minimum = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", text, re.MULTILINE))
    lacking = []
    for module, name in PACKAGES.items():
        try:
            version = importlib.metadata.version(name) if importlib.util.find_spec(module) else "0"
        except importlib.metadata.PackageNotFoundError:  # importable, but not installed by pip: nothing to compare
            continue
        if _numbers(version) < _numbers(minimum[name]):
            lacking.append(f"{name}>={minimum[name]}")
    return lacking


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def say_packages() -> bool:
    """Print what is lacking, with the remedy. Returns whether nothing is."""
    lacking = lacking_packages()
    if lacking:
        needed = " ".join(f'"{requirement}"' for requirement in lacking)
        print(f"packages missing or too old: {sys.executable} -m pip install {needed}")
    return not lacking


# ------------------------------------------------------------------------------------------------ what is asked for


def open_checkout(path: str) -> tuple[Path, TrainFile]:
    """Raises Refusal where it is no CoOp code base, or this one."""
    checkout = Path(os.path.expanduser(path)).resolve()
    if not checkout.is_dir():
        raise Refusal(f"{checkout}: {'not a folder' if checkout.exists() else 'no such folder'}; give CoOp's")
    if (checkout / "tools" / Path(__file__).name).exists():
        raise Refusal(f"{checkout}: this is LoGoPrompt's own repository; give the folder of a CoOp code base")
    if not (checkout / "trainers").is_dir():
        raise Refusal(f"{checkout}: no CoOp code base (no trainers/ in it)")
    return checkout, TrainFile(checkout / "train.py")


def refuse_differing(checkout: Path, states: dict[str, str]) -> None:
    differing = ", ".join(in_state(states, "differs"))
    if differing:
        raise Refusal(
            f"{differing}: in {checkout} and not as here; move them away, or --remove them with the version of this "
            "tool that copied them; nothing was changed"
        )


def install(checkout: Path, train_file: TrainFile) -> int:
    states = survey(checkout)
    refuse_differing(checkout, states)
    missing, source = in_state(states, "missing"), train_file.with_lines()
    changed = [train_file.path] if source != train_file.source else []
    check_writable([*(checkout / name for name in missing), *changed])

    for name in missing:
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, (ROOT / name).read_bytes(), mode_of=ROOT / name)
    if changed:
        write(train_file.path, source, mode_of=train_file.path)
    lines = len(train_file.lacks())
    done = f"{len(missing)} files copied, {lines} lines added to train.py"
    print(f"{checkout}: {done if missing or lines else 'LoGoPrompt is there already'}")
    say_packages()
    return 0


def check(checkout: Path, train_file: TrainFile) -> int:
    states, lacks = survey(checkout), train_file.lacks()
    for state in ("missing", "differs"):
        for name in in_state(states, state):
            print(f"{state}: {name}")
    for line in lacks:
        print(f"train.py lacks: {line}")
    packages = say_packages()
    whole = packages and not lacks and set(states.values()) == {"same"}
    print(f"{checkout}: LoGoPrompt is {'whole' if whole else 'not whole'}")
    return 0 if whole else 1


def remove(checkout: Path, train_file: TrainFile) -> int:
    states = survey(checkout)
    refuse_differing(checkout, states)
    present, source = in_state(states, "same"), train_file.without_lines()
    changed = [train_file.path] if source != train_file.source else []
    folders = [checkout / name for name in FOLDERS if (checkout / name).exists()]
    check_writable([*(checkout / name for name in present), *folders, *changed])

    if changed:  # first: without its import it is CoOp's again, whatever else is still there
        write(train_file.path, source, mode_of=train_file.path)
    for name in present:
        (checkout / name).unlink()
    _clean(checkout)
    lines = 2 - len(train_file.lacks())
    print(f"{checkout}: {len(present)} files removed, {lines} lines taken out of train.py")
    return 0


def _clean(checkout: Path) -> None:
    """Remove what Python compiled from our files, what a killed run left, and the folders that this leaves empty."""
    names = our_files()
    for path in (checkout / name for name in (*names, "train.py")):
        with suppress(FileNotFoundError):
            temporary(path).unlink()
    for path in (checkout / name for name in names):
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        _remove_empty(path.parent / "__pycache__")
    for name in FOLDERS:
        folder = checkout / name
        while folder not in (checkout, checkout / "trainers") and _remove_empty(folder):
            folder = folder.parent


def _remove_empty(folder: Path) -> bool:
    with suppress(OSError):
        folder.rmdir()
        return True
    return False


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 0; 1 where ``--check`` finds something missing; 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", metavar="PATH_TO_COOP", help="folder with CoOp's train.py and trainers/")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", dest="do", action="store_const", const=check, help="say what is missing")
    what.add_argument("--remove", dest="do", action="store_const", const=remove, help="undo the installation")
    parser.set_defaults(do=install)
    args = parser.parse_args(argv)
    try:
        return args.do(*open_checkout(args.checkout))
    except (Refusal, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
