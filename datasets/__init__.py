"""Data sets, one file each. Importing the package registers all of them with Dassl."""

import fallback  # noqa: F401 (must come first: it makes `import dassl` work)

from . import caltech101, shapes

__all__ = ["caltech101", "shapes"]
