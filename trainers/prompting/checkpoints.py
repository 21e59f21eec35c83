"""Checkpoints: where they lie, reading them without executing anything, and what of them is whole."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import zipfile
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np
import torch
from yacs.config import CfgNode

from .errors import UserError
from .inert import load_inert, load_plain
from .results import replacing, write_text

PROMPT_LEARNER = "prompt_learner"
BEST = "model-best.pth.tar"
POINTER = "checkpoint"  # Dassl's note of the newest checkpoint
NUMBERED = re.compile(r"model\.pth\.tar-(\d+)")


def write_checkpoint(path: str, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically; one of an epoch becomes the newest."""
    folder, name = os.path.split(path)
    memory = io.BytesIO()  # torch's own writer hides what is wrong with a file, for example that the disk is full
    torch.save(checkpoint, memory)
    with replacing(path) as file:
        file.write(memory.getbuffer())
    print(f"Checkpoint saved to {path}")
    if name != BEST:  # training goes on from the newest checkpoint, not from the best
        write_text(os.path.join(folder, POINTER), f"{name}\n")


def find_checkpoint(directory: str, epoch: Optional[int] = None) -> str:
    """Path of a run's checkpoint: of the epoch asked for, else the best model, else the newest. Raises UserError."""
    folder = os.path.join(directory, PROMPT_LEARNER)
    names = [f"model.pth.tar-{epoch}"] if epoch is not None else [BEST, *numbered(folder)]
    path = next((p for p in (os.path.join(folder, name) for name in names) if os.path.isfile(p)), None)
    if path is None:
        raise UserError(
            f"no checkpoint {names[0] if epoch is not None else ''} in {folder}: see --model-dir, --load-epoch"
        )
    return path


def load_checkpoint(directory: str, epoch: Optional[int] = None) -> tuple[str, dict[str, Any]]:
    """Path and content of what :func:`find_checkpoint` finds. A damaged one is named, and the one before it taken.

    Raises:
        UserError: there is none; the one of the epoch asked for is damaged, or all are.
    """
    path = find_checkpoint(directory, epoch)
    if epoch is not None:
        return path, read_checkpoint(path)
    folder = os.path.dirname(path)
    names = [BEST] * (os.path.basename(path) == BEST) + numbered(folder)
    found = next(whole_checkpoints(folder, names), None)
    return found or (path, read_checkpoint(path))


def whole_checkpoints(folder: str, names: Optional[list[str]] = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and content of the checkpoints of a folder, newest first; those that are damaged are named and left out."""
    for name in numbered(folder) if names is None else names:
        path = os.path.join(folder, name)
        try:
            yield path, read_checkpoint(path)
        except UserError as error:
            print(f"WARNING: {error}: the checkpoint before it is used, if there is one")


def numbered(folder: str) -> list[str]:
    """Names of the checkpoints of epochs, newest first: what the ``checkpoint`` note names and what is older.

    Without a note that can be used all that are there count.
    """
    try:
        there = {int(m[1]): m[0] for m in map(NUMBERED.fullmatch, os.listdir(folder)) if m}
    except (FileNotFoundError, NotADirectoryError):
        return []
    named = newest_checkpoint(folder)
    if not named:
        return [there[epoch] for epoch in sorted(there, reverse=True)]
    match = NUMBERED.fullmatch(named)
    older = [there[epoch] for epoch in sorted(there, reverse=True) if not match or epoch < int(match[1])]
    return [named, *older]


def newest_checkpoint(folder: str) -> str:
    """Name of the newest checkpoint in ``folder`` as its ``checkpoint`` note says, empty where there is none."""
    try:
        with open(os.path.join(folder, POINTER), encoding="utf-8", errors="replace") as file:
            name = file.readline().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    whole = name and os.path.basename(name) == name and "\0" not in name
    return name if whole and os.path.isfile(os.path.join(folder, name)) else ""


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint, on the CPU, without executing anything in it. Raises UserError where it is none.

    Those of the original CoOp and CoCoOp hold a pickled schedule: of them the state dict and the epoch are read. They
    do not say which classes they were trained on. A context that classes share serves any; class-specific contexts are
    taken to be those of the classes at hand, in their order.
    """
    try:
        try:
            checkpoint = load_plain(path)
        except pickle.UnpicklingError:
            checkpoint = load_inert(path)
        checkpoint["state_dict"], checkpoint["epoch"]  # noqa: B018 (a KeyError tells another kind of file)
        if "config" in checkpoint:  # one of ours: torch does not compare the checksums that it has written
            CfgNode.load_cfg(checkpoint["config"])
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
    except Exception as error:  # noqa: BLE001 (zip, pickle and torch each have errors of their own)
        raise UserError(f"{path}: not a checkpoint that can be read ({type(error).__name__})") from error
    return checkpoint


# ------------------------------------------------------------------------------------------------- random numbers


def random_states() -> dict[str, Any]:
    """Where all sources of random numbers stand, as plain types and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "numbers": _signed(numbers), "gauss": gauss},
        "numpy": {
            **{"kind": kind, "keys": _signed(keys), "position": int(position)},
            **{"has_gauss": int(has_gauss), "cached": float(cached)},
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: Any) -> None:
    """Go back to :func:`random_states`; to what of them there is in older checkpoints, torch's own alone."""
    if isinstance(states, torch.Tensor):
        torch.set_rng_state(states)
        return
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(_unsigned(python["numbers"]).tolist()), python["gauss"]))
    keys = _unsigned(numpy["keys"])
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _signed(numbers: Any) -> torch.Tensor:
    """Numbers below 2**32 as a tensor; torch 2.0 has no unsigned type of that size."""
    return torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.int32))


def _unsigned(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint32)
