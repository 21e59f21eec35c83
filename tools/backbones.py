"""List the architectures of open_clip with what they are here: image size, text tower, path, parameters.

    python tools/backbones.py
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import open_clip
import torch
from torch.overrides import TorchFunctionMode

NEEDS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


class Uninitialised(TorchFunctionMode):
    """Skips the initialisation of weights, which takes most of the time on the meta device."""

    names = ("uniform_", "normal_", "trunc_normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def built(arch: str) -> Optional[torch.nn.Module]:
    """An architecture on the meta device; None where it needs transformers."""
    logging.disable(logging.WARNING)  # that it has no weights
    try:
        with torch.device("meta"), Uninitialised():
            return open_clip.create_model(arch, device="meta")
    except RuntimeError:
        return None
    finally:
        logging.disable(logging.NOTSET)


def stand_in(arch: str) -> Any:
    return open_clip.SimpleTokenizer()
