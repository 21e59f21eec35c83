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

    def __setstate__(self, state: Any) -> None:
        pass


def is_torchscript(path: str) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI's weights are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("constants.pkl") for entry in archive.namelist())


def load_tensors(path: str) -> Any:
    """What a torch file holds, on the CPU; objects that are neither tensors nor plain types become placeholders.

    Raises ValueError for a TorchScript or tar archive (torch before 2.6 would execute or unpack them), or an old torch,
    and whatever torch, zip and pickle raise for a file that they cannot read.
    """
    if is_torchscript(path) or tarfile.is_tarfile(path):
        raise ValueError("a TorchScript or tar archive")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
            raise ValueError("it holds more than tensors, which needs torch 2.6 or newer to read safely") from error
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([_placeholder_for(name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)


class EmptyDict:
    """Stands for ``collections.defaultdict``, in which a pickled optimizer holds its state: torch fills only dicts."""

    def __new__(cls, *args: Any) -> dict:  # type: ignore[misc]
        return {}


def _placeholder_for(name: str) -> type:
    """A placeholder class under the full name that a pickle uses."""
    module, _, leaf = name.rpartition(".")
    base = EmptyDict if name == "collections.defaultdict" else Placeholder
    return type(leaf, (base,), {"__module__": module})


def load_init_weights(module: nn.Module, path: str) -> None:
    """Load whatever fits a module by name and shape, as Dassl does for ``MODEL.INIT_WEIGHTS``. Raises UserError."""
    own = module.state_dict()
    try:
        content = load_tensors(path)
        offered = {key.removeprefix("module."): value for key, value in content.get("state_dict", content).items()}
        fitting = {key: offered[key] for key in own.keys() & offered.keys() if offered[key].shape == own[key].shape}
    except Exception as error:  # noqa: BLE001 (zip, pickle and torch each raise their own errors)
        raise UserError(
            f"MODEL.INIT_WEIGHTS {path}: not weights that can be read ({type(error).__name__}); give a file of tensors"
        ) from error
    if not fitting:
        raise UserError(
            f"MODEL.INIT_WEIGHTS {path}: nothing in it fits, it holds {', '.join(offered) or 'nothing'}; "
            "give a checkpoint of the same method and backbone"
        )
    module.load_state_dict({**own, **fitting})
    print(f"Successfully loaded pretrained weights from {path}")
    if len(fitting) < len(offered):
        print(f"Layers discarded due to unmatched keys or size: {sorted(offered.keys() - fitting.keys())}")
