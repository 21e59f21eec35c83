"""The one exception for a user's mistakes, and the lines that are printed for an exception."""

from __future__ import annotations

from typing import Optional

from .names import printable


class UserError(Exception):
    """A mistake that the user can correct; several arguments are several mistakes.

    Every argument is one line that names the file or key and the remedy. ``train.py`` and the tools print these lines
    on stderr and exit with status 2, without a traceback.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def messages(error: BaseException) -> Optional[list[str]]:
    """The lines to print where the user can do something about an exception; None where it is a fault of the code."""
    if isinstance(error, UserError):
        found = [str(arg) for arg in error.args]
    elif isinstance(error, FloatingPointError):
        found = [f"{error}; training cannot continue: lower OPTIM.LR"]
    elif isinstance(error, OSError):  # an unreadable or unwritable file; raised in a worker, it has many lines
        last = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        found = [f"{error.filename}: {error.strerror}" if error.filename and error.strerror else last]
    else:
        return None
    return [printable(" ".join(message.splitlines())) for message in found]


def on_one_line(error: BaseException) -> str:
    """An exception of another library on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
