"""Data sets, one file each. Importing the package registers all of them with Dassl; a new file needs no edit here."""

import importlib
import pkgutil

import fallback  # noqa: F401 (must come first: it makes `import dassl` work)

MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]


def extend_cfg(cfg) -> None:
    """Add the config keys of the data sets."""
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"  # all, base or new
    for module in MODULES:
        if hasattr(module, "extend_cfg"):
            module.extend_cfg(cfg)
