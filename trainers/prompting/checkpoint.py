"""Checkpoints of a run: writing, reading without executing anything, resuming, and meeting other classes by name."""

from __future__ import annotations

import copy
import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import torch
import torch.nn as nn
from yacs.config import CfgNode

from .data import random_states, set_random_states
from .errors import UserError
from .names import flat_config, matching_names
from .results import replacing, write_text
from .weights import load_tensors

PROMPT_LEARNER = "prompt_learner"  # folder of a run's checkpoints, as in CoOp
BEST = "model-best.pth.tar"
POINTER = "checkpoint"  # Dassl's file that names the newest checkpoint
NUMBERED = re.compile(r"model\.pth\.tar-(\d+)")
DERIVED = ("token_prefix", "token_suffix")  # in the original CoOp's checkpoints; they follow from the class names
IDENTITY = ("TRAINER.NAME", "MODEL.BACKBONE.NAME")  # a checkpoint has no meaning with other values
# May change between a run and its continuation.
FREE_KEYS = ("OUTPUT_DIR", "RESUME", "VERBOSE", "USE_CUDA", "DATASET.ROOT", "DATALOADER.NUM_WORKERS", "TRAIN.", "TEST.")


# ------------------------------------------------------------------------------------------------- files


def write_checkpoint(path: str, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically; one of an epoch becomes the newest."""
    folder, name = os.path.split(path)
    memory = io.BytesIO()  # torch's own writer hides the reason of an error, for example a full disk
    torch.save(checkpoint, memory)
    with replacing(path) as file:
        file.write(memory.getbuffer())
    print(f"Checkpoint saved to {path}")
    if name != BEST:  # training resumes from the newest checkpoint, not from the best
        write_text(os.path.join(folder, POINTER), f"{name}\n")


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint, on the CPU, without executing anything in it. Raises UserError for any other file.

    Those of the original CoOp and CoCoOp hold no class names: class-specific contexts belong to the current ones,
    in their order.
    """
    try:
        checkpoint = load_tensors(path)
        state, epoch = checkpoint["state_dict"], checkpoint["epoch"]
        if "config" in checkpoint:  # one of ours; torch does not verify the checksums that it writes
            CfgNode.load_cfg(checkpoint["config"])
            with zipfile.ZipFile(path) as archive:
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

    A damaged checkpoint is reported and the one before it used, unless an epoch was given.

    Raises:
        UserError: there is none, or none that can be read.
    """
    folder = os.path.join(directory, PROMPT_LEARNER)
    names = [f"model.pth.tar-{epoch}"] if epoch is not None else [BEST, *checkpoint_names(folder)]
    names = [name for name in names if os.path.isfile(os.path.join(folder, name))]
    if not names:
        wanted = "" if epoch is None else f" model.pth.tar-{epoch}"
        raise UserError(f"no checkpoint{wanted} in {folder}: see --model-dir, --load-epoch")
    first = os.path.join(folder, names[0])
    found = next(readable_checkpoints(folder, names), None) if epoch is None else None
    return found or (first, read_checkpoint(first))


def readable_checkpoints(folder: str, names: Optional[list[str]] = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and content of a folder's checkpoints, newest first; damaged ones are reported and skipped."""
    for name in checkpoint_names(folder) if names is None else names:
        path = os.path.join(folder, name)
        try:
            yield path, read_checkpoint(path)
        except UserError as error:
            print(f"WARNING: {error}: the checkpoint before it is used, if there is one")


def checkpoint_names(folder: str) -> list[str]:
    """File names of the epochs' checkpoints, newest first: the one that Dassl's pointer names, and older ones.

    Without a usable pointer all files count.
    """
    newest = ""
    try:
        present = {int(m[1]): m[0] for m in map(NUMBERED.fullmatch, os.listdir(folder)) if m}
        with open(os.path.join(folder, POINTER), encoding="utf-8", errors="replace") as file:
            newest = file.readline().strip()
    except NotADirectoryError:
        return []
    except FileNotFoundError:
        if not os.path.isdir(folder):
            return []
    ordered = [present[epoch] for epoch in sorted(present, reverse=True)]
    return ordered[ordered.index(newest) :] if newest in ordered else ordered


# ------------------------------------------------------------------------------------------------- other classes


def remap_state_to_classes(
    module: nn.Module, state: Mapping[str, torch.Tensor], classnames: Sequence[str], known: Sequence[str], path: str
) -> dict[str, torch.Tensor]:
    """Express the state dict of a checkpoint, of the classes ``known``, in the classes that ``module`` was built for.

    Rows of entries that a part of the module lists in ``per_class`` go to the classes of the same name; of a name that
    occurs twice the n-th goes to the n-th. Unknown classes have the rows that the part was initialised with, unless its
    ``serves_unseen_classes`` is False. A part with ``remap_classes(state, rows)`` converts its own entries, given for
    every current class its index among the known ones or -1.

    Raises:
        UserError: a class was not trained and has no default; ``path`` names the checkpoint.
    """
    rows = matching_names(classnames, known)
    index = torch.tensor(rows, dtype=torch.long)
    shared = index >= 0
    remapped = dict(state)
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if hasattr(part, "remap_classes"):
            own = {key: state[prefix + key] for key in part.state_dict()}
            remapped.update({prefix + key: value for key, value in part.remap_classes(own, rows).items()})
        per_class = getattr(part, "per_class", ())
        unseen = [classname for classname, row in zip(classnames, rows) if row < 0]
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


# ------------------------------------------------------------------------------------------------- a run


class Checkpointer:
    """Writes, reads and resumes the checkpoints of a run: tensors and plain types only, with the class names.

    Args:
        learned: the module that is saved.
        scaler: gradient scaler, or None.
        parts: further objects with ``state_dict`` and ``load_state_dict``, by name.
        stage_keys: config keys that decide which epoch belongs to which stage.
        fingerprint: of the backbone's weights.

    Attributes:
        warnings: settings that differ between a loaded model's run and this one.
    """

    def __init__(
        self,
        cfg: CfgNode,
        classnames: Sequence[str],
        learned: nn.Module,
        optim: torch.optim.Optimizer,
        scaler: Any,
        parts: Mapping[str, Any],
        stage_keys: Sequence[str],
        fingerprint: str,
    ) -> None:
        self.cfg, self.classnames, self.learned, self.optim, self.scaler = cfg, list(classnames), learned, optim, scaler
        self.parts, self.stage_keys, self.fingerprint = parts, stage_keys, fingerprint
        self.warnings: list[str] = []
        self._best: Optional[dict[str, Any]] = None  # state of the best epoch, so that every checkpoint restores it
        self.last_checkpoint: tuple[str, int] = ("", 0)  # path and epoch
        self._last_epoch_state: Optional[dict[str, Any]] = None  # of the last epoch, if no checkpoint holds it

    # Writing

    def save(self, epoch: int, directory: str, name: str, val_result: Any, best_result: float) -> None:
        """Write ``prompt_learner/<name>`` (default: model.pth.tar-<epoch>) after an epoch, counted from 0."""
        state = self.state(epoch, val_result, best_result)
        if name == BEST:
            self._best = copy.deepcopy({**state, "best": None})
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
        if self.last_checkpoint[1] == epoch + 1:
            self._last_epoch_state = None
        else:
            self._last_epoch_state = copy.deepcopy(self.state(epoch, None, best_result))

    def write_last_epoch(self) -> str:
        """Write the checkpoint of the last complete epoch unless it exists. Returns where it is, in words."""
        if self._last_epoch_state is not None:
            state, self._last_epoch_state = self._last_epoch_state, None
            self._write(state, self.cfg.OUTPUT_DIR)
        path, epoch = self.last_checkpoint
        return f"the last good checkpoint is {path}, after epoch {epoch}" if path else "no epoch was finished before"

    def _write(self, state: dict[str, Any], directory: str, name: str = "") -> None:
        path = os.path.join(directory, PROMPT_LEARNER, name or f"model.pth.tar-{state['epoch']}")
        write_checkpoint(path, state)
        if name != BEST:
            self.last_checkpoint = path, state["epoch"]

    # Reading

    def load(self, directory: str, epoch: Optional[int] = None) -> int:
        """Load what was learned, see :func:`load_checkpoint`. Returns the epoch, counted from 1. Raises UserError."""
        path, checkpoint = load_checkpoint(directory, epoch)
        self._compare_settings(checkpoint, path)
        self._load_learned(checkpoint, path)
        print(f'Loading weights to {PROMPT_LEARNER} from "{path}" (epoch = {checkpoint["epoch"]})')
        return int(checkpoint["epoch"])

    def _compare_settings(self, checkpoint: dict[str, Any], path: str) -> None:
        """Refuse another method or backbone than the run's; warn of other settings that change predictions."""
        self._check_backbone(checkpoint, path)
        if "config" not in checkpoint:
            return
        before, now = (flat_config(CfgNode.load_cfg(text)) for text in (checkpoint["config"], self.cfg.dump()))
        name = self.cfg.TRAINER.NAME
        if before["TRAINER.NAME"] != name:
            raise UserError(
                f"{path} was trained with --trainer {before['TRAINER.NAME']}, not {name}: name that trainer"
            )
        compared = (f"TRAINER.{name.upper()}.", "INPUT.SIZE", "INPUT.INTERPOLATION", "INPUT.PIXEL_")
        for key in sorted(before.keys() & now.keys()):
            if key.startswith(compared) and before[key] != now[key]:
                self.warnings.append(f"the model was trained with {key} {before[key]}, now it is {now[key]}")
                print(f"WARNING: {path}: {self.warnings[-1]}")

    def _check_backbone(self, checkpoint: dict[str, Any], path: str) -> None:
        if checkpoint.get("backbone", self.fingerprint) != self.fingerprint:
            name = self.cfg.MODEL.BACKBONE.NAME
            raise UserError(f"{path} was trained with other CLIP weights than {name}: give the run's --backbone")

    def resume(self, directory: str) -> Optional[dict[str, Any]]:
        """Restore the newest readable checkpoint of a run folder, and return it; None: training starts from scratch.

        A run that ``RESUME`` started from another folder resumes from its own as soon as that has a checkpoint.
        """
        home = self.cfg.OUTPUT_DIR
        if self.cfg.RESUME and os.path.realpath(directory) != os.path.realpath(home):
            own = next(readable_checkpoints(os.path.join(home, PROMPT_LEARNER)), None)
            if own and "config" in own[1] and CfgNode.load_cfg(own[1]["config"]).RESUME == self.cfg.RESUME:
                directory = home
        here = os.path.realpath(directory) == os.path.realpath(home)
        folder = os.path.join(directory, PROMPT_LEARNER)
        found = next(readable_checkpoints(folder), None)
        if found is None:
            if self.cfg.RESUME and not here:
                raise UserError(f"no checkpoint that can be read in {folder}: see --resume")
            damaged = " that can be read" if checkpoint_names(folder) else ""
            print(f"No checkpoint found{damaged}, train from scratch")
            return None
        path, checkpoint = found
        self._check_backbone(checkpoint, path)
        same = self._check_same_run(checkpoint, path, every_key=here)
        self._load_learned(checkpoint, path)
        if checkpoint.get("optimizer"):
            self.optim.load_state_dict(checkpoint["optimizer"])
        if self.scaler and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        if here and checkpoint.get("best"):
            self._best = checkpoint["best"]
            write_checkpoint(os.path.join(folder, BEST), self._best)
        elif not here:
            checkpoint = {**checkpoint, "best_result": None}
        states = checkpoint.get("parts") or {"collapse": checkpoint.get("watch")}  # "watch": of an earlier version
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

        Returns whether all settings are the same. Raises UserError.
        """
        remedy = "choose another --output-dir or delete that folder"
        if checkpoint.get("classnames", self.classnames) != self.classnames:
            raise UserError(f"{path} was trained on other classes: {remedy}")
        if "config" not in checkpoint:
            return False
        before, now = (flat_config(CfgNode.load_cfg(text)) for text in (checkpoint["config"], self.cfg.dump()))
        keys = [*IDENTITY, *(key for key in sorted(before.keys() | now.keys()) if not key.startswith(FREE_KEYS))]
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
