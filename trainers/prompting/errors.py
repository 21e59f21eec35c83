"""The one exception for mistakes of the user: a single line that names the file or key and the remedy."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right.

    ``train.py`` and the tools print its message as one line on stderr and end with exit status 2, without a traceback.
    """
