"""The one exception for mistakes of the user: lines that each name the file or key and the remedy."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; with several arguments several things.

    ``train.py`` and the tools print its message as one line each on stderr and end with exit status 2, without a
    traceback.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))
