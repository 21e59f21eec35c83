"""The one exception for a user's mistakes."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct; several arguments are several mistakes.

    Every argument is one line that names the file or key and the remedy. ``train.py`` and the tools print these lines
    on stderr and exit with status 2, without a traceback.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))
