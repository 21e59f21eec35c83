"""Reading torch files from elsewhere as data: nothing in them is executed.

``torch.load(weights_only=True)`` reads tensors and plain types. Checkpoints of the original CoOp and CoCoOp also pickle
a learning-rate schedule; its classes are replaced by inert placeholders, for which torch >= 2.6 is needed. TorchScript
programs are refused here; ``backbone.py`` opens OpenAI's after verifying their checksum.
"""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from typing import Any

import torch
import torch.nn as nn

from .errors import UserError


class Placeholder:
    """Stands for an object of any class in a pickle: accepts whatever it is given and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    __setstate__ = __init__


class EmptyDict:
    """Stands for ``collections.defaultdict``, in which a pickled optimizer holds its state: torch fills only dicts."""

    def __new__(cls, *args: Any) -> dict:  # type: ignore[misc]
        return {}


def is_torchscript(path: str) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI's weights are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("constants.pkl") for entry in archive.namelist())


def refuse_programs(path: str) -> None:
    """Raise ValueError for a TorchScript or tar archive: torch before 2.6 would execute or unpack them."""
    if is_torchscript(path) or tarfile.is_tarfile(path):
        raise ValueError("a TorchScript or tar archive")


def load_tensors(path: str) -> Any:
    """What a torch file holds, on the CPU; objects that are neither tensors nor plain types become placeholders.

    Raises ValueError for a TorchScript or tar archive or an old torch, and what torch, zip and pickle raise for a file
    that they cannot read.
    """
    refuse_programs(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
            raise ValueError("it holds more than tensors, which needs torch 2.6 or newer to read safely") from error
        placeholders = []
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
            module, _, leaf = name.rpartition(".")  # the pickle finds the class by its full name
            base = EmptyDict if name == "collections.defaultdict" else Placeholder
            placeholders.append(type(leaf, (base,), {"__module__": module}))
        with torch.serialization.safe_globals(placeholders):
            return torch.load(path, map_location="cpu", weights_only=True)


def load_init_weights(module: nn.Module, path: str) -> None:
    """Load whatever fits a module by name and shape, as Dassl does for ``MODEL.INIT_WEIGHTS``. Raises UserError."""
    own = module.state_dict()
    try:
        content = load_tensors(path)
        offered = {key.removeprefix("module."): value for key, value in content.get("state_dict", content).items()}
        fitting = {key: offered[key] for key in own.keys() & offered.keys() if offered[key].shape == own[key].shape}
    except Exception as error:  # noqa: BLE001 (zip, pickle and torch each raise their own errors)
        fault = f"not weights that can be read ({type(error).__name__}); give a file of tensors"
        raise UserError(f"MODEL.INIT_WEIGHTS {path}: {fault}") from error
    if not fitting:
        fault = f"nothing in it fits, it holds {', '.join(offered) or 'nothing'}"
        raise UserError(f"MODEL.INIT_WEIGHTS {path}: {fault}; give a checkpoint of the same method and backbone")
    module.load_state_dict({**own, **fitting})
    print(f"Successfully loaded pretrained weights from {path}")
    if len(fitting) < len(offered):
        print(f"Layers discarded due to unmatched keys or size: {sorted(offered.keys() - fitting.keys())}")
