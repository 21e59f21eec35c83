"""Checkpoints of a run: writing, reading without executing anything, resuming, and meeting other classes by name."""

from __future__ import annotations

import copy
import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn as nn
from yacs.config import CfgNode

from . import distributed
from .errors import UserError
from .names import flat_config, matching_names
from .random_states import random_states, set_random_states
from .results import replacing, write_text
from .weights import load_tensors

PROMPT_LEARNER = "prompt_learner"  # folder of a run's checkpoints, as in CoOp
BEST = "model-best.pth.tar"
POINTER = "checkpoint"  # Dassl's file that names the newest checkpoint
NUMBERED = re.compile(r"model\.pth\.tar-(\d+)")
DERIVED = ("token_prefix", "token_suffix")  # in the original CoOp's checkpoints; they follow from the class names
IDENTITY = ("TRAINER.NAME", "MODEL.BACKBONE.NAME")  # a checkpoint has no meaning with other values
COMPARED = ("INPUT.SIZE", "INPUT.INTERPOLATION", "INPUT.PIXEL_", "MODEL.BACKBONE.QUICK_GELU")  # change predictions
# May change between a run and its continuation.
FREE_KEYS = ("OUTPUT_DIR", "RESUME", "VERBOSE", "USE_CUDA", "DATASET.ROOT", "DATALOADER.NUM_WORKERS", "TRAIN.", "TEST.")


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint, on the CPU, without executing anything in it. Raises UserError for any other file.

    Those of the original CoOp and CoCoOp hold no class names: class-specific contexts belong to the current ones,
    in their order.
    """
    try:
        checkpoint = load_tensors(path)
        state, epoch = checkpoint["state_dict"], checkpoint["epoch"]
        if "config" in checkpoint:  # one of ours
            CfgNode.load_cfg(checkpoint["config"])
            with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums that it writes
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
            return checkpoint
        if type(epoch) is not int or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("no state dict of tensors with an epoch")
        return {"state_dict": dict(state), "epoch": epoch}
    except Exception as error:  # noqa: BLE001 (zip, pickle and torch each raise their own errors)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{path}: not a checkpoint that can be read ({reason})") from error


def load_checkpoint(directory: str, epoch: Optional[int] = None) -> tuple[str, dict[str, Any]]:
    """Path and content of a run's checkpoint: of the given epoch, else the best model, else the newest.

    A damaged checkpoint is reported and the one before it used, unless an epoch was given. Raises UserError if none
    can be read.
    """
    folder = os.path.join(directory, PROMPT_LEARNER)
    names = [f"model.pth.tar-{epoch}"] if epoch is not None else [BEST, *checkpoint_names(folder)]
    names = [name for name in names if os.path.isfile(os.path.join(folder, name))]
    if not names:
        wanted = "" if epoch is None else f" model.pth.tar-{epoch}"
        raise UserError(f"no checkpoint{wanted} in {folder}: see --model-dir, --load-epoch")
    if epoch is None and (found := next(readable_checkpoints(folder, names), None)):
        return found
    path = os.path.join(folder, names[0])
    return path, read_checkpoint(path)


def readable_checkpoints(folder: str, names: Optional[list[str]] = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and content of a folder's checkpoints, newest first; damaged ones are reported and skipped."""
    for name in checkpoint_names(folder) if names is None else names:
        path = os.path.join(folder, name)
        try:
            yield path, read_checkpoint(path)
        except UserError as error:
            print(f"WARNING: {error}: the checkpoint before it is used, if there is one")


def checkpoint_names(folder: str) -> list[str]:
    """Names of the epochs' checkpoints, newest first: from the one that Dassl's pointer names, else all of them."""
    names = filter(NUMBERED.fullmatch, os.listdir(folder) if os.path.isdir(folder) else ())
    names = sorted(names, key=lambda name: int(name.rpartition("-")[2]), reverse=True)
    path = os.path.join(folder, POINTER)
    with suppress(FileNotFoundError, NotADirectoryError, ValueError), open(path, "rb") as file:
        return names[names.index(file.readline().decode().strip()) :]
    return names


def remap_state_to_classes(
    module: nn.Module, state: Mapping[str, torch.Tensor], classnames: Sequence[str], known: Sequence[str], path: str
) -> dict[str, torch.Tensor]:
    """Express the state dict of a checkpoint, of the classes ``known``, in the classes that ``module`` was built for.

    Rows of entries that a part of the module lists in ``per_class`` go to the classes of the same name; of a name that
    occurs twice the n-th goes to the n-th. Unknown classes have the rows that the part was initialised with; where its
    ``serves_unseen_classes`` is False, UserError names the checkpoint, ``path``. A part with ``remap_classes(state,
    rows)`` converts its own entries, given for every current class its index among the known ones or -1.
    """
    rows = matching_names(classnames, known)
    index = torch.tensor(rows, dtype=torch.long)
    shared = index >= 0
    unseen = [classname for classname, row in zip(classnames, rows) if row < 0]
    remapped = dict(state)
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if hasattr(part, "remap_classes"):
            own = {key: state[prefix + key] for key in part.state_dict()}
            remapped.update({prefix + key: value for key, value in part.remap_classes(own, rows).items()})
        per_class = getattr(part, "per_class", ())
        if per_class and unseen and not getattr(part, "serves_unseen_classes", True):
            more = f" and {len(unseen) - 1} more of these classes" if len(unseen) > 1 else ""
            raise UserError(
                f'{path} was not trained on "{unseen[0]}"{more}, and has nothing for other classes than its own: '
                "evaluate it on those (DATASET.SUBSAMPLE_CLASSES, --dataset-config-file)"
            )
        for entry in per_class:
            key, own = prefix + entry, getattr(part, entry).detach().cpu().clone()
            if state[key].shape[1:] == own.shape[1:]:
                own[shared] = state[key][index[shared]].to(own.dtype)
                remapped[key] = own
    return remapped


@dataclass
class Checkpointer:
    """Writes, reads and resumes the checkpoints of a run: tensors and plain types only, with the class names."""

    cfg: CfgNode
    classnames: list[str]
    learned: nn.Module  # what is saved
    optim: torch.optim.Optimizer
    scaler: Any  # gradient scaler, or None
    parts: Mapping[str, Any]  # further objects with state_dict and load_state_dict, by name
    stage_keys: Sequence[str]  # config keys that decide which epoch belongs to which stage
    fingerprint: str  # of the backbone's weights
    warnings: list[str] = field(default_factory=list)  # settings that differ between a loaded model's run and this one
    trained_with: dict[str, Any] = field(default_factory=dict)  # config keys of a loaded model's run
    last_checkpoint: tuple[str, int] = ("", 0)  # path and epoch
    _best: Optional[dict[str, Any]] = None  # state of the best epoch, so that every checkpoint restores it
    _last_epoch_state: Optional[dict[str, Any]] = None  # of the last epoch, if no checkpoint holds it

    def save(self, epoch: int, directory: str, name: str, val_result: Any, best_result: float) -> None:
        """Write ``prompt_learner/<name>`` (default: model.pth.tar-<epoch>) after an epoch, counted from 0."""
        state = self.state(epoch, val_result, best_result)
        if name == BEST:
            state["best"] = None
            self._best = copy.deepcopy(state)
        self._write(state, directory, name)

    def state(self, epoch: int, val_result: Any, best_result: float) -> dict[str, Any]:
        """Everything that decides how training continues after an epoch. Tensors are not copied."""
        return {
            "state_dict": self.learned.state_dict(),
            "epoch": epoch + 1,
            "optimizer": self.optim.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "val_result": None if val_result is None else float(val_result),
            "best_result": float(best_result),
            "best": self._best,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": random_states(),
            "config": self.cfg.dump(),
            "backbone": self.fingerprint,
            "classnames": self.classnames,
        }

    def after_epoch(self, epoch: int, best_result: float) -> None:
        """Hold the state of an epoch that has no checkpoint, for :meth:`write_last_epoch`."""
        saved = self.last_checkpoint[1] == epoch + 1
        self._last_epoch_state = None if saved else copy.deepcopy(self.state(epoch, None, best_result))

    def write_last_epoch(self) -> str:
        """Write the checkpoint of the last complete epoch unless it exists. Returns where it is, in words."""
        if self._last_epoch_state is not None:
            state, self._last_epoch_state = self._last_epoch_state, None
            self._write(state, self.cfg.OUTPUT_DIR, by_any=True)
        path, epoch = self.last_checkpoint
        return f"the last good checkpoint is {path}, after epoch {epoch}" if path else "no epoch was finished before"

    def _write(self, state: dict[str, Any], directory: str, name: str = "", by_any: bool = False) -> None:
        """Write a checkpoint atomically; one of an epoch becomes the newest, from which training resumes.

        Of several processes the first one writes, or ``by_any`` the one that calls.
        """
        folder, name = os.path.join(directory, PROMPT_LEARNER), name or f"model.pth.tar-{state['epoch']}"
        path, memory = os.path.join(folder, name), io.BytesIO()
        if by_any or distributed.is_main():
            torch.save(state, memory)  # torch's own writer hides the reason of an error, for example a full disk
            with replacing(path) as file:
                file.write(memory.getbuffer())
            print(f"Checkpoint saved to {path}")
            if name != BEST:
                write_text(os.path.join(folder, POINTER), f"{name}\n")
        if name != BEST:
            self.last_checkpoint = path, state["epoch"]

    def load(self, directory: str, epoch: Optional[int] = None) -> int:
        """Load what was learned, see :func:`load_checkpoint`. Returns the epoch, counted from 1.

        Raises UserError for another method, backbone or classes than the run's; warns of other settings that change
        predictions.
        """
        path, checkpoint = load_checkpoint(directory, epoch)
        before, now = self._settings(checkpoint, path)
        self.trained_with, name = before, self.cfg.TRAINER.NAME
        if before["TRAINER.NAME"] != name:
            raise UserError(
                f"{path} was trained with --trainer {before['TRAINER.NAME']}, not {name}: name that trainer"
            )
        for key in sorted(now):
            old = before.get(key, "of an older version")
            if key.startswith((f"TRAINER.{name.upper()}.", *COMPARED)) and old != now[key]:
                self.warnings.append(f"the model was trained with {key} {old}, now it is {now[key]}")
                print(f"WARNING: {path}: {self.warnings[-1]}")
        self._load_learned(checkpoint, path)
        print(f'Loading weights to {PROMPT_LEARNER} from "{path}" (epoch = {checkpoint["epoch"]})')
        return int(checkpoint["epoch"])

    def _settings(self, checkpoint: dict[str, Any], path: str) -> list[dict[str, Any]]:
        """All config keys of a checkpoint's run (of the original CoOp's: the current ones), and the current ones.

        Raises UserError for other weights of the backbone.
        """
        if checkpoint.get("backbone", self.fingerprint) != self.fingerprint:
            name = self.cfg.MODEL.BACKBONE.NAME
            raise UserError(f"{path} was trained with other CLIP weights than {name}: give the run's --backbone")
        now = self.cfg.dump()
        return [flat_config(CfgNode.load_cfg(text)) for text in (checkpoint.get("config", now), now)]

    def resume(self, directory: str) -> Optional[dict[str, Any]]:
        """Restore the newest readable checkpoint of a run folder, and return it; None: training starts from scratch.

        A run that ``RESUME`` started from another folder resumes from its own as soon as that has a checkpoint.
        """
        home = self.cfg.OUTPUT_DIR
        here = os.path.realpath(directory) == os.path.realpath(home)
        if not here:
            own = next(readable_checkpoints(os.path.join(home, PROMPT_LEARNER)), None)
            if own and "config" in own[1] and CfgNode.load_cfg(own[1]["config"]).RESUME == self.cfg.RESUME:
                directory, here = home, True
        folder = os.path.join(directory, PROMPT_LEARNER)
        found = next(readable_checkpoints(folder), None)
        if found is None:
            if not here:
                raise UserError(f"no checkpoint that can be read in {folder}: see --resume")
            damaged = " that can be read" if checkpoint_names(folder) else ""
            print(f"No checkpoint found{damaged}, train from scratch")
            return None
        path, checkpoint = found
        same = self._check_same_run(checkpoint, path, every_key=here)
        self._load_learned(checkpoint, path)
        if checkpoint.get("optimizer"):
            self.optim.load_state_dict(checkpoint["optimizer"])
        if self.scaler and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        if here and checkpoint.get("best"):
            self._best = checkpoint["best"]
            self._write(self._best, directory, BEST)
        elif not here:
            checkpoint = {**checkpoint, "best_result": None}
        states = checkpoint.get("parts") or {}
        for name, part in self.parts.items():
            if same and states.get(name):
                part.load_state_dict(states[name])
        if "random" in checkpoint:
            set_random_states(checkpoint["random"])
        self.last_checkpoint = path, int(checkpoint["epoch"])
        print(f'Resuming from "{path}" after epoch {checkpoint["epoch"]}')
        return checkpoint

    def _check_same_run(self, checkpoint: dict[str, Any], path: str, every_key: bool) -> bool:
        """Refuse to resume with another method, other weights or classes; in a run's own folder with any other setting.

        Returns whether all settings are the same.
        """
        before, now = self._settings(checkpoint, path)
        elsewhere = "train without --resume or with the settings of that run"
        remedy = "choose another --output-dir or delete that folder" if every_key else elsewhere
        if checkpoint.get("classnames", self.classnames) != self.classnames:
            raise UserError(f"{path} was trained on other classes: {remedy}")
        # Only in the method itself does a key that one of them lacks, of another version, make a difference.
        own = {key for key in before.keys() | now.keys() if key.startswith(f"TRAINER.{self.cfg.TRAINER.NAME.upper()}.")}
        shared = {key for key in before.keys() & now.keys() if not key.startswith(FREE_KEYS)}
        keys = [*IDENTITY, *sorted(own | shared)]
        for key in keys if every_key else (*IDENTITY, *self.stage_keys):
            if before.get(key) != now.get(key):
                raise UserError(f"{path} was trained with {key} {before.get(key)}, now it is {now.get(key)}: {remedy}")
        return all(before.get(key) == now.get(key) for key in keys)

    def _load_learned(self, checkpoint: dict[str, Any], path: str) -> None:
        """Load a checkpoint's parameters into the current classes. Raises UserError where they do not fit."""
        state = {key: value for key, value in checkpoint["state_dict"].items() if key not in DERIVED}
        expected = self.learned.state_dict()
        if state.keys() != expected.keys():
            raise UserError(
                f"{path} holds {', '.join(state) or 'nothing'}, {self.cfg.TRAINER.NAME} needs {', '.join(expected)}: "
                "it was trained with another trainer or other options"
            )
        known = checkpoint.get("classnames", self.classnames)
        state = remap_state_to_classes(self.learned, state, self.classnames, known, path)
        expected = self.learned.state_dict()
        for key, value in state.items():
            if value.shape != expected[key].shape:
                raise UserError(
                    f"{path}: {key} is {tuple(value.shape)}, here it must be {tuple(expected[key].shape)}; it was "
                    "trained with another backbone, another context or class-specific contexts of other classes"
                )
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise UserError(f"{path}: {key} is not finite; use another epoch (--load-epoch)")
        self.learned.load_state_dict(state)
