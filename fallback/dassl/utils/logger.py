"""Copying standard output into a log file."""

from __future__ import annotations

import os.path as osp
import sys
import time
from contextlib import suppress
from typing import Any

from .tools import mkdir_if_missing

__all__ = ["Logger", "setup_logger"]


class Logger:
    """A stand-in for ``sys.stdout`` that also writes to the file ``fpath`` (None: to no file).

    Closing it closes the file only: the real standard output belongs to the process, not to the log. Whatever is not
    defined here (``isatty``, ``encoding``, ``fileno``, ...) is answered by the real one.
    """

    def __init__(self, fpath: str | None = None) -> None:
        self.file = None
        self.console = sys.stdout
        if fpath is not None:
            mkdir_if_missing(osp.dirname(fpath))
            # line-buffered, so that the log of a killed run is complete up to its last line
            self.file = open(fpath, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 (closed by close())

    def __getattr__(self, name: str) -> Any:
        if name == "console":  # asked for before __init__ ran (copy, pickle): no endless recursion
            raise AttributeError(name)
        return getattr(self.console, name)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def write(self, msg: str) -> int:
        """Write ``msg`` to both; return its length."""
        if self.console is not None:
            self.console.write(msg)
        self._log("write", msg)
        return len(msg)

    def flush(self) -> None:
        """Flush both."""
        if self.console is not None:
            self.console.flush()
        self._log("flush")

    def _log(self, method: str, *args: str) -> None:
        """Do something with the log file; where the disk is full it is named, and closed."""
        if self.file is None:
            return
        try:
            getattr(self.file, method)(*args)
        except OSError as error:
            name = self.file.name
            self.close()
            raise type(error)(error.errno, error.strerror, name) from error

    def isatty(self) -> bool:
        """Tell whether the real standard output is a terminal."""
        return self.console.isatty()

    def close(self) -> None:
        """Close the log file; later writes go to the real standard output alone."""
        log, self.file = self.__dict__.get("file"), None
        if log is not None:
            with suppress(OSError):  # what a full disk did not take is lost
                log.close()


def setup_logger(output: str | None = None) -> None:
    """Make ``sys.stdout`` a :class:`Logger`.

    Args:
        output: a file (a name that ends in .txt or .log) or a folder, in which the file is ``log.txt``. An existing
            file is left alone: the new one gets date and time as a suffix. None: nothing is done.
    """
    if output is None:
        return
    fpath = output if output.endswith((".txt", ".log")) else osp.join(output, "log.txt")
    if osp.exists(fpath):
        fpath = fpath + time.strftime("-%Y-%m-%d-%H-%M-%S")
    sys.stdout = Logger(fpath)
