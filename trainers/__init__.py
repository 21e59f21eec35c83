"""Methods, one file each. Importing the package registers all of them with Dassl."""

import fallback  # noqa: F401 (must come first: it makes `import dassl` work)

from . import cocoop, coop, linear_probe, logoprompt, zsclip

METHODS = (coop, cocoop, linear_probe, logoprompt)  # those with config keys of their own


def extend_cfg(cfg) -> None:
    """Add the config keys of all methods."""
    for method in METHODS:
        method.extend_cfg(cfg)


__all__ = ["METHODS", "cocoop", "coop", "extend_cfg", "linear_probe", "logoprompt", "zsclip"]
