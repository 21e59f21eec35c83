"""Checkpoints, weights and trainable layers."""

from __future__ import annotations

import os.path as osp
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .tools import atomic_write, mkdir_if_missing

__all__ = [
    "count_num_param",
    "load_checkpoint",
    "load_pretrained_weights",
    "open_all_layers",
    "open_specified_layers",
    "resume_from_checkpoint",
    "save_checkpoint",
]

_PARALLEL_PREFIX = "module."  # what nn.DataParallel puts in front of every key
_POINTER = "checkpoint"  # the file that names the newest checkpoint of its folder


def _without_prefix(key: str) -> str:
    return key[len(_PARALLEL_PREFIX) :] if key.startswith(_PARALLEL_PREFIX) else key


def save_checkpoint(
    state: dict[str, Any],
    save_dir: str,
    is_best: bool = False,
    remove_module_from_keys: bool = True,
    model_name: str = "",
) -> None:
    """Write ``state`` into ``save_dir`` and make the file ``checkpoint`` there name it.

    Each file is written in one step and the pointer last, so that it never names a file that is not whole.

    Args:
        state: has "state_dict" and "epoch" (the number of finished epochs); it is not changed.
        is_best: also keep a copy as ``model-best.pth.tar``.
        remove_module_from_keys: drop a leading "module." from the keys of "state_dict".
        model_name: file name; by default ``model.pth.tar-<epoch>``.
    """
    mkdir_if_missing(save_dir)
    if remove_module_from_keys:
        renamed = OrderedDict((_without_prefix(key), value) for key, value in state["state_dict"].items())
        state = {**state, "state_dict": renamed}

    fpath = osp.join(save_dir, model_name or f"model.pth.tar-{state['epoch']}")
    with atomic_write(fpath) as stream:
        torch.save(state, stream)
    print(f"Checkpoint saved to {fpath}")

    with atomic_write(osp.join(save_dir, _POINTER), "w") as stream:
        stream.write(osp.basename(fpath) + "\n")

    if is_best:
        best = osp.join(save_dir, "model-best.pth.tar")
        with open(fpath, "rb") as source, atomic_write(best) as stream:
            shutil.copyfileobj(source, stream)
        print(f'Best checkpoint saved to "{best}"')


def load_checkpoint(fpath: str) -> Any:
    """Return what the file holds, with tensors where they were saved from (on the CPU where CUDA is absent).

    Only plain data and tensors are read (``weights_only=True``): a checkpoint cannot run code.

    Raises:
        ValueError: ``fpath`` is None.
        FileNotFoundError: there is no such file.
        RuntimeError: it cannot be read; one line that names it.
    """
    if fpath is None:
        raise ValueError("no checkpoint file was named (None)")
    if not osp.exists(fpath):
        raise FileNotFoundError(f"no checkpoint file at {fpath}")
    device = None if torch.cuda.is_available() else "cpu"
    try:
        return torch.load(fpath, map_location=device, weights_only=True)
    # damaged files surface as nearly anything: UnpicklingError, EOFError, RuntimeError, KeyError, UnicodeDecodeError
    except Exception as exc:
        reason = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise RuntimeError(f"cannot read checkpoint {fpath}: {reason}") from exc


def resume_from_checkpoint(fdir: str, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> int:
    """Load the newest checkpoint of folder ``fdir`` into the objects given; return its number of finished epochs."""
    with open(osp.join(fdir, _POINTER), encoding="utf-8") as stream:
        fpath = osp.join(fdir, stream.readline().rstrip("\n"))

    print(f'Loading checkpoint from "{fpath}"')
    checkpoint = load_checkpoint(fpath)
    model.load_state_dict(checkpoint["state_dict"])
    print("Loaded model weights")
    for key, target in (("optimizer", optimizer), ("scheduler", scheduler)):
        if target is not None and checkpoint.get(key) is not None:
            target.load_state_dict(checkpoint[key])
            print(f"Loaded {key}")
    epoch = checkpoint["epoch"]
    print(f"Previous epoch: {epoch}")
    return epoch


def _set_trainable(module: nn.Module, trainable: bool) -> None:
    module.train(trainable)
    for param in module.parameters():
        param.requires_grad = trainable


def open_all_layers(model: nn.Module) -> None:
    """Put the model in training mode with gradients for every parameter."""
    _set_trainable(model, True)


def open_specified_layers(model: nn.Module, open_layers: str | Iterable[str]) -> None:
    """Train the named children of the model; freeze the others, in evaluation mode.

    Raises:
        AttributeError: the model has no attribute of that name.
    """
    if isinstance(model, nn.DataParallel):
        model = model.module
    chosen = {open_layers} if isinstance(open_layers, str) else set(open_layers)
    absent = sorted(name for name in chosen if not hasattr(model, name))
    if absent:
        raise AttributeError(f"{type(model).__name__} has no layer named {', '.join(absent)}")
    for name, child in model.named_children():
        _set_trainable(child, name in chosen)


def count_num_param(model: nn.Module | None = None, params: Iterable[Any] | None = None) -> int:
    """Return the number of values in the parameters of ``model`` or, without one, in ``params``.

    Args:
        params: tensors, or parameter groups (dictionaries whose "params" is a tensor or several).
    """
    if model is not None:
        params = model.parameters()
    if params is None:
        raise ValueError("count_num_param() needs a model or params")
    total = 0
    for entry in params:
        tensors = entry["params"] if isinstance(entry, dict) else entry
        total += sum(t.numel() for t in ([tensors] if isinstance(tensors, torch.Tensor) else tensors))
    return total


def load_pretrained_weights(model: nn.Module, weight_path: str) -> None:
    """Load into ``model`` whatever fits by name and shape; a leading "module." in names is ignored.

    The file is a state_dict or a checkpoint with one under "state_dict". What does not fit is printed; a warning is
    given where nothing does.
    """
    content = load_checkpoint(weight_path)
    offered = content.get("state_dict", content)
    own = model.state_dict()
    fitting, discarded = OrderedDict(), []
    for raw_key, value in offered.items():
        key = _without_prefix(raw_key)
        if key in own and own[key].shape == value.shape:
            fitting[key] = value
        else:
            discarded.append(key)
    if not fitting:
        warnings.warn(f"Cannot load {weight_path} (check the key names manually)", stacklevel=2)
        return
    model.load_state_dict({**own, **fitting})
    print(f"Successfully loaded pretrained weights from {weight_path}")
    if discarded:
        print(f"Layers discarded due to unmatched keys or size: {discarded}")
