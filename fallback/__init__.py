"""The port to Dassl: the installed Dassl.pytorch wins, ``fallback/dassl`` stands in where there is none.

Importing this package puts its folder at the *end* of ``sys.path``. This is the only place where that happens.
"""

import sys
from pathlib import Path

_folder = str(Path(__file__).resolve().parent)
if _folder not in sys.path:
    sys.path.append(_folder)
