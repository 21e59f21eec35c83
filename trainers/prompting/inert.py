"""Reading checkpoints that hold more than tensors, without executing anything in them.

Those of the original CoOp and CoCoOp hold a pickled learning-rate schedule, so ``torch.load(weights_only=True)``
refuses them as a whole. Here tensors and plain containers are read, and whatever else a pickle names becomes an inert
placeholder: nothing is imported, no function of its choice is called.
"""

from __future__ import annotations

import pickle
import tarfile
from collections import OrderedDict
from typing import Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from .backbone import is_jit_archive


class Placeholder:
    """Stands for an object of a class that is not known here: takes whatever a pickle gives it and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> None:
        pass

    __setitem__ = append = extend = add = _ignore


class Unpickler(pickle.Unpickler):
    """Knows tensors and plain containers; storages are torch's own affair."""

    def find_class(self, module: str, name: str) -> Any:
        # New functions every time: a pickle can set attributes of what it has named.
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": lambda *args: _rebuild_tensor_v2(*args),
            "torch._utils._rebuild_parameter": lambda *args: _rebuild_parameter(*args),
        }
        return known.get(f"{module}.{name}") or type("Placeholder", (Placeholder,), {})


class InertPickle:
    """What ``torch.load`` wants of a pickle module."""

    __name__ = "inert"
    Unpickler = Unpickler

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return Unpickler(file, **kwargs).load()


def load_inert(path: str) -> dict[str, Any]:
    """A checkpoint's ``state_dict`` and ``epoch``, on the CPU; the rest is left out.

    Raises:
        ValueError: a program (TorchScript), an archive of files, or no state dict of tensors with an epoch.
        Exception: whatever torch, zip and pickle say of a file that they cannot read.
    """
    if is_jit_archive(path) or tarfile.is_tarfile(path):
        raise ValueError("a TorchScript or tar archive")
    found = torch.load(path, map_location="cpu", pickle_module=InertPickle(), weights_only=False)
    state, epoch = found["state_dict"], found["epoch"]
    tensors = all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())
    if not tensors or not isinstance(epoch, int):
        raise ValueError("no state dict of tensors with an epoch")
    return {"state_dict": dict(state), "epoch": epoch}
