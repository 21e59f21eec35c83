"""What the train.py of a CoOp code base imports: the methods that were dropped into its ``trainers/``.

Where they cannot be loaded (an old Python or torch, a missing package), the other trainers keep working. This file must
be readable for Python 3.7.
"""

import importlib
import re
import sys
from pathlib import Path

PYTHON = (3, 9)
FOLDER = Path(__file__).resolve().parents[1]
_loaded = []


def _load(path: Path) -> None:
    """Import one method. If it fails, exit where the command line names its trainer, else warn."""
    trainers = re.findall(r"^@TRAINER_REGISTRY\.register\(\)\s+class (\w+)", path.read_text("utf-8"), re.M)
    wanted = set(trainers) & set(sys.argv)
    try:
        if sys.version_info < PYTHON:
            raise ImportError("Python {}.{} or newer is required, this is {}.{}".format(*PYTHON, *sys.version_info))
        _loaded.append(importlib.import_module("{}.{}".format(__package__.rpartition(".")[0], path.stem)))
    except Exception as error:  # noqa: BLE001 (old versions of other packages fail in many ways)
        fault = f"{', '.join(trainers)} cannot be used here: {' '.join(str(error).split()) or type(error).__name__}"
        if wanted:
            print(f"error: {fault}", file=sys.stderr)
            sys.exit(2)
        print(f"WARNING: {fault}; other trainers are not affected", file=sys.stderr)
    else:
        if wanted:
            sys.excepthook = _one_line


def _one_line(kind, error, traceback) -> None:
    """A user's mistake ends in lines without a traceback and status 2, as in our own train.py."""
    from .errors import messages

    lines = messages(error)
    if lines is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(*(f"error: {line}" for line in lines), sep="\n", file=sys.stderr)
        sys.exit(2)


def extend_cfg(cfg) -> None:
    """Add the config keys of the methods."""
    for module in _loaded:
        if hasattr(module, "extend_cfg"):
            module.extend_cfg(cfg)


for _path in sorted(FOLDER.glob("*.py")):
    if re.search(rb"^from \.prompting\b", _path.read_bytes(), re.M):
        _load(_path)
