"""Puts ``fallback/dassl`` at the *end* of ``sys.path``, so that an installed Dassl.pytorch takes precedence."""

import sys
from pathlib import Path

_folder = str(Path(__file__).resolve().parent)
if _folder not in sys.path:
    sys.path.append(_folder)
