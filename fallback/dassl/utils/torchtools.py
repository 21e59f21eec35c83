"""Checkpoints and weights."""

import os.path as osp
import warnings

import torch

from .tools import atomic_write, mkdir_if_missing


def _without_module(state_dict) -> dict:
    """Drop the prefix that nn.DataParallel adds to every key."""
    return {key[7:] if key.startswith("module.") else key: value for key, value in state_dict.items()}


def save_checkpoint(state: dict, save_dir: str, is_best=False, remove_module_from_keys=True, model_name="") -> None:
    """Write ``state`` to ``model_name`` (default: model.pth.tar-<epoch>), and last that name to ``checkpoint``."""
    mkdir_if_missing(save_dir)
    if remove_module_from_keys:
        state = {**state, "state_dict": _without_module(state["state_dict"])}
    name = model_name or f"model.pth.tar-{state['epoch']}"
    for file in [name, "model-best.pth.tar"] if is_best else [name]:
        with atomic_write(osp.join(save_dir, file)) as stream:
            torch.save(state, stream)
        print(f"Checkpoint saved to {osp.join(save_dir, file)}")
    with atomic_write(osp.join(save_dir, "checkpoint"), "w") as stream:
        stream.write(f"{name}\n")


def load_checkpoint(fpath: str):
    """Load tensors and plain data, never code; a damaged file is a RuntimeError that names it in one line."""
    if not osp.exists(fpath):
        raise FileNotFoundError(f"no checkpoint at {fpath}")
    try:
        return torch.load(fpath, map_location=None if torch.cuda.is_available() else "cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RuntimeError(f"cannot read checkpoint {fpath}: {reason}") from error


def resume_from_checkpoint(fdir: str, model, optimizer=None, scheduler=None) -> int:
    """Load the newest checkpoint of a folder; return the number of finished epochs."""
    with open(osp.join(fdir, "checkpoint"), encoding="utf-8") as stream:
        fpath = osp.join(fdir, stream.readline().rstrip("\n"))
    print(f'Loading checkpoint from "{fpath}"')
    checkpoint = load_checkpoint(fpath)
    model.load_state_dict(checkpoint["state_dict"])
    print("Loaded model weights")
    for key, target in (("optimizer", optimizer), ("scheduler", scheduler)):
        if target is not None and checkpoint.get(key) is not None:
            target.load_state_dict(checkpoint[key])
            print(f"Loaded {key}")
    print(f"Previous epoch: {checkpoint['epoch']}")
    return checkpoint["epoch"]


def count_num_param(model=None, params=None) -> int:
    """Count the values in the parameters of ``model``, else in ``params``: tensors or parameter groups."""
    params = params if model is None else model.parameters()
    groups = [entry["params"] if isinstance(entry, dict) else entry for entry in params]
    return sum(t.numel() for group in groups for t in ([group] if isinstance(group, torch.Tensor) else group))


def load_pretrained_weights(model, weight_path: str) -> None:
    """Load what fits by name and shape from a checkpoint or state dict; print the rest, warn where nothing fits."""
    content = load_checkpoint(weight_path)
    offered, own = _without_module(content.get("state_dict", content)), model.state_dict()
    fitting = {key: value for key, value in offered.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        warnings.warn(f"Cannot load {weight_path} (check the key names manually)", stacklevel=2)
        return
    model.load_state_dict({**own, **fitting})
    print(f"Successfully loaded pretrained weights from {weight_path}")
    if discarded := [key for key in offered if key not in fitting]:
        print(f"Layers discarded due to unmatched keys or size: {discarded}")
