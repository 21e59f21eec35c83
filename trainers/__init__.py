"""Methods, one file each. Importing the package imports every module of the folder and so registers all methods."""

from importlib import import_module
from pkgutil import iter_modules

import fallback  # noqa: F401 (must come first: it makes `import dassl` work)

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__) if not module.ispkg]


def extend_cfg(cfg) -> None:
    """Add the config keys of all methods."""
    for module in _modules:
        if hasattr(module, "extend_cfg"):
            module.extend_cfg(cfg)
