"""Puts ``fallback/dassl`` at the *end* of ``sys.path``, so that an installed Dassl.pytorch takes precedence."""

import sys
from pathlib import Path

if (_folder := str(Path(__file__).resolve().parent)) not in sys.path:
    sys.path.append(_folder)
