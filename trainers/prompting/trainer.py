"""What our Dassl trainers share: loading CLIP, precision, checkpoints, evaluation, ``results.json``.

A method subclasses :class:`PromptTrainer` and says what it learns (``build_model``), what it minimises (``loss``) and
how it scores images (``text_features`` once per evaluation, ``score`` per batch).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
import sqlite3
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any, Callable, Optional

import dassl.optim.lr_scheduler as dassl_schedules
import PIL
import torch
import torch.nn as nn
from dassl.data import DataManager, DatasetWrapper
from dassl.data.data_manager import build_data_loader
from dassl.data.transforms import build_transform
from dassl.engine import TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import get_worker_info
from tqdm import tqdm
from yacs.config import CfgNode

from .backbone import Backbone, check_name, load_clip
from .bank import seeded
from .checkpoints import (
    BEST,
    PROMPT_LEARNER,
    load_checkpoint,
    numbered,
    random_states,
    read_checkpoint,
    set_random_states,
    whole_checkpoints,
    write_checkpoint,
)
from .checks import SHARED, Rule, against, against_dassl, said
from .errors import UserError
from .features import FeatureStore, ImageBatch, NotAStore, encoder_key, image_key
from .images import READING, DecodedImages, decoded_size, read_image
from .inert import load_weights
from .names import flat_config, matching_names, relative_path
from .results import remove_leftovers, write_results, write_text
from .runs import Stopped, command, locked, quiet_threads, stoppable

IDENTITY = ("TRAINER.NAME", "MODEL.BACKBONE.NAME")  # without these the same a checkpoint means nothing
# What may change between a run and its continuation without making it another run.
FREE_KEYS = ("OUTPUT_DIR", "RESUME", "VERBOSE", "USE_CUDA", "DATASET.ROOT", "DATALOADER.NUM_WORKERS", "TRAIN.", "TEST.")
MEANINGFUL = 5.0  # percentage points above chance from which on losing half of them is no accident
MIN_SCALE = 2.0**-16  # of the loss in mixed precision: gradients that overflow even so do not come from its size
NAMED = 3  # images named where a batch goes wrong
DERIVED = ("token_prefix", "token_suffix")  # in checkpoints of the original CoOp; they belong to its class names


def extend_cfg(cfg: CfgNode) -> None:
    """Add the keys that all of our methods have."""
    cfg.TEST.FEATURES = ""  # file that keeps features of test images for further evaluations; empty: none are kept
    cfg.TEST.FEATURES_GB = 4.0  # gigabytes it may take
    cfg.TRAIN.TEXT_CHUNK = 0  # classes whose prompts are encoded at a time, to save memory for time; 0: all of them
    cfg.TRAIN.COMPILE = False  # torch.compile the image encoder: worth its minutes in long runs; changes last digits
    cfg.TRAIN.DECODED_GB = 1.0  # training images are kept decoded in memory where they take no more; 0: never


class ImageDataset(DatasetWrapper):
    """Dassl's, with images read by :func:`read_image`, which names one that cannot be read, and decoded once where they
    fit into memory."""

    decoded: Optional[DecodedImages] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epoch = torch.zeros((), dtype=torch.int64)
        if self.is_train and self.cfg.DATALOADER.NUM_WORKERS > 0:
            self.epoch.share_memory_()  # workers that live on are told of a new epoch by this

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The images of a batch. In a worker augmentation is a function of (seed, epoch, batch): the same however many
        workers there are and whether they are new, as in a run that goes on, or have drawn numbers before."""
        if get_worker_info() is None or not self.is_train:
            return [self[i] for i in indices]
        key = f"{max(self.cfg.SEED, 0)}/{int(self.epoch)}/{list(indices)}"
        with seeded(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")):
            return [self[i] for i in indices]

    def decode(self, limit: float, shared: bool = True) -> None:
        """Keep all images decoded unless they take more than ``limit`` bytes; due before workers, if any, are started.

        Args:
            shared: there will be worker processes.
        """
        paths = [item.impath for item in self.data_source]
        size = decoded_size(paths, limit)
        if size:
            try:
                self.decoded = DecodedImages(paths, size, shared)
            except RuntimeError as error:  # torch's, for too little shared memory
                print(f"Images are decoded every time they are used: {' '.join(str(error).split())}")

    def __getitem__(self, idx: int) -> dict[str, Any]:
        if callable(self.transform) and not self.return_img0:
            item = self.data_source[idx]
            image = read_image(item.impath) if self.decoded is None else self.decoded[idx]
            image = self._transform_image(self.transform, image)
            return {"label": item.label, "domain": item.domain, "impath": item.impath, "index": idx, "img": image}
        try:
            return super().__getitem__(idx)
        except Exception:
            read_image(self.data_source[idx].impath)  # says which and why, unless something else is at fault
            raise


class PromptTrainer(TrainerX):
    """A Dassl trainer that learns prompts for a frozen CLIP. Only ``prompt_learner`` is registered and checkpointed."""

    prompt_learner: Optional[nn.Module] = None
    prompt_text: Optional[torch.Tensor] = None  # text features while an evaluation runs
    scaler: Optional[torch.amp.GradScaler] = None
    watch: Optional[CollapseWatch] = None  # while and after training
    scaled = ("amp",)  # precisions whose loss is scaled up for the backward pass
    rules: Mapping[str, Rule] = {}  # of the method's own keys
    network: type[nn.Module]  # (cfg, classnames, backbone) -> module with prompt_learner and text_features()
    model_dir = ""
    _encoder_key: Optional[bytes] = None  # test and validation images have the same transform
    best_epoch: Optional[int] = None  # whose model is kept as the best
    _kept: Optional[dict[str, Any]] = None  # state after the last whole epoch, where no checkpoint holds it
    _good: tuple[str, int] = ("", 0)  # last checkpoint and its epoch
    _paths: Sequence[str] = ()  # images of the batch at work
    busy = 0.0  # seconds of an epoch that went into steps; the rest is waiting for images

    # ------------------------------------------------------------------------------------------------ building

    @classmethod
    def complaints(cls, cfg: CfgNode) -> list[str]:
        """A line for every value that nothing can be done with: key, value, and what is allowed."""
        method = f"TRAINER.{cfg.TRAINER.NAME.upper()}."
        shared = [*against(SHARED, cfg), *said(lambda: check_name(cfg.MODEL.BACKBONE.NAME))]
        mend_warmup()
        return [*(shared or against_dassl(cfg)), *against(cls.rules, cfg, method)]

    def check_cfg(self, cfg: CfgNode) -> None:
        """Refuse a config before data and weights are loaded. Raises UserError with all of :meth:`complaints`."""
        found = self.complaints(cfg)
        if found:
            raise UserError(*found)

    def build_data_loader(self) -> None:
        """As in Dassl, with images read by :class:`ImageDataset`."""
        self.dm = DataManager(self.cfg, dataset_wrapper=ImageDataset)
        self.train_loader_x, self.train_loader_u = self.dm.train_loader_x, self.dm.train_loader_u
        self.val_loader, self.test_loader = self.dm.val_loader, self.dm.test_loader
        self.num_classes, self.lab2cname = self.dm.num_classes, self.dm.lab2cname
        self.num_source_domains = self.dm.num_source_domains

    def method_cfg(self) -> Any:
        """The method's own config node, for example ``cfg.TRAINER.COOP``."""
        return self.cfg.TRAINER[self.cfg.TRAINER.NAME.upper()]

    def load_backbone(self, prec: str) -> Backbone:
        """CLIP on the device, frozen, in the precision asked for; checks ``INPUT.SIZE``."""
        cfg = self.cfg
        print(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.NAME})")
        backbone = load_clip(cfg.MODEL.BACKBONE.NAME)
        size = backbone.input_resolution
        if tuple(cfg.INPUT.SIZE) != (size, size):
            raise UserError(
                f"INPUT.SIZE {tuple(cfg.INPUT.SIZE)}: {cfg.MODEL.BACKBONE.NAME} takes images of ({size}, {size}) pixels"
            )
        if self.device.type == "cpu" and prec in ("fp16", "amp"):
            print(f"PREC {prec} needs a GPU: computing in float32 on the CPU")
            prec = "fp32"
        if prec == "fp16":
            backbone.half_weights()
        low = {"amp": torch.float16, "bf16": torch.bfloat16}.get(prec)
        self.autocast = nullcontext() if low is None else torch.autocast(self.device.type, low)
        self.scaler = _grad_scaler() if prec in self.scaled else None
        self.computes = f"{prec}, compiled" if cfg.TRAIN.get("COMPILE", False) else prec
        if cfg.TRAIN.get("COMPILE", False):
            backbone.visual.compile()
        return backbone.to(self.device)

    def build_model(self) -> None:
        clip_model = self.load_backbone(self.method_cfg().PREC)
        self.model = self.build_network(clip_model).to(self.device)
        self.register_prompt_learner(self.model.prompt_learner)

    def build_network(self, clip_model: Backbone) -> nn.Module:
        return self.network(self.cfg, self.classnames, clip_model)

    def register_prompt_learner(self, prompt_learner: nn.Module) -> None:
        """Give the prompt learner, and nothing else, to the optimiser and to the checkpoints."""
        cfg = self.cfg
        self.prompt_learner = prompt_learner.to(self.device)
        if cfg.MODEL.INIT_WEIGHTS:
            load_weights(prompt_learner, cfg.MODEL.INIT_WEIGHTS)
        self.optim = build_optimizer(prompt_learner, cfg.OPTIM, self.parameter_groups(prompt_learner))
        mend_warmup()
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model(PROMPT_LEARNER, prompt_learner, self.optim, self.sched)

    def parameter_groups(self, prompt_learner: nn.Module) -> Optional[list[dict[str, Any]]]:
        """Groups for the optimiser; one with ``own_lr`` does not learn at ``OPTIM.LR``. None: one group of all."""
        return None

    @property
    def classnames(self) -> list[str]:
        return list(self.dm.dataset.classnames)

    # ------------------------------------------------------------------------------------------------ training

    def stages(self) -> list[CfgNode]:
        """The ``OPTIM`` nodes of the stages that training goes through; their ``MAX_EPOCH`` add up to the run's."""
        return [self.cfg.OPTIM]

    def begin_stage(self, index: int) -> None:
        """Called before the first epoch of every stage: a schedule of its own begins."""
        stage = self.stages()[index]
        if stage.MAX_EPOCH <= stage.WARMUP_EPOCH:
            print(
                f"WARNING: stage {index + 1} has {stage.MAX_EPOCH} epoch(s), all of them warm-up: next to nothing is "
                "learned in it. Raise OPTIM.MAX_EPOCH or lower OPTIM.WARMUP_EPOCH."
            )
        self._schedule(stage)

    def timetable_keys(self) -> tuple[str, ...]:
        """Config keys that say which epoch belongs to which stage: a run goes on only with the same ones."""
        return ()

    def before_epoch(self) -> None:
        super().before_epoch()
        data = self.train_loader_x.dataset
        if isinstance(data, ImageDataset):
            data.epoch.fill_(self.epoch)
        for index, (first, stage) in enumerate(self._timetable()):
            if first == self.epoch and stage.MAX_EPOCH > 0:
                self.begin_stage(index)

    def _timetable(self) -> list[tuple[int, CfgNode]]:
        """(number of the first epoch, ``OPTIM`` node) of every stage."""
        stages = self.stages()
        return [(sum(s.MAX_EPOCH for s in stages[:i]), stage) for i, stage in enumerate(stages)]

    def _schedule(self, optim_cfg: CfgNode, epochs_done: int = 0) -> None:
        """A fresh schedule, wound forward by the epochs of its stage that are done."""
        for group in self.optim.param_groups:
            group["lr"] = group["initial_lr"] = group.get("own_lr", optim_cfg.LR)
        self.sched = self._scheds[PROMPT_LEARNER] = build_lr_scheduler(self.optim, optim_cfg)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # no optimiser step belongs to these
            for _ in range(epochs_done):
                self.sched.step()

    def loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss of a batch (a scalar), the (B, C) logits of the original images and the (B,) labels."""
        raise NotImplementedError

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
        start = time.perf_counter()
        self._paths = batch.get("impath", ())
        with self.autocast:
            loss, logits, label = self.loss(batch)
        if self.scaler is None:
            self.model_backward_and_update(loss)
        else:
            self._scaled_update(loss)
        self.after_step()
        accuracy = compute_accuracy(logits, label)[0].item()
        self.watch.update(accuracy, len(label))
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        summary = {"loss": loss.item(), "acc": accuracy}
        if self._writer is not None:
            step = self.epoch * self.num_batches + self.batch_idx  # Dassl's count
            for name, value in self.curves().items():
                self.write_scalar(f"train/{name}", float(value), step)
        self.busy += time.perf_counter() - start
        return summary

    def _scaled_update(self, loss: torch.Tensor) -> None:
        """A step in mixed precision. Gradients may overflow: the scaler then skips the step and halves the scale."""
        self.detect_anomaly(loss)
        self.optim.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optim)
        self.scaler.update()
        if self.scaler.get_scale() < MIN_SCALE:
            raise FloatingPointError(self._what_went_wrong("the gradients overflow, however small the loss is scaled"))

    def detect_anomaly(self, loss: torch.Tensor) -> None:
        """Dassl's hook before the backward pass. Raises FloatingPointError, with epoch, batch and images."""
        if not torch.isfinite(loss).all():
            raise FloatingPointError(self._what_went_wrong(f"the loss is {loss.detach().float().mean().item()}"))

    def model_update(self, names: Any = None) -> None:
        """Dassl's step of the optimiser, unless it would make parameters NaN. Raises FloatingPointError then."""
        gradients = [p.grad for p in self.prompt_learner.parameters() if p.grad is not None]
        if gradients and not torch.stack([torch.isfinite(g).all() for g in gradients]).all():
            raise FloatingPointError(self._what_went_wrong("the loss is finite, its gradients are not"))
        super().model_update(names)

    def _what_went_wrong(self, what: str) -> str:
        """One line: epoch, batch, and images of the batch."""
        paths = list(self._paths)
        more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
        where = f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{self.batch_idx + 1}/{self.num_batches}]"
        return f"{where}: {what}; images of the batch: {', '.join(paths[:NAMED])}{more}"

    def curves(self) -> dict[str, torch.Tensor]:
        """What TensorBoard shows of a training step beside loss, accuracy and learning rate: scalars by name."""
        return {}

    def after_step(self) -> None:
        """Called after every step of the optimiser; nothing by default."""

    def few_shot_loader(self) -> Iterable[dict[str, Any]]:
        """The training images in their order, as they are at test time: without augmentation."""
        return self.loader_of(self.dm.dataset.train_x, build_transform(self.cfg, is_train=False))

    def features(
        self, loader: Iterable[dict[str, Any]], encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, E) image features in float32, ``encode`` of (B, 3, H, H), and (N,) labels of all images of a loader."""
        bar = tqdm(loader, desc="features", disable=None, leave=False)
        with self.autocast:
            pairs = [(encode(batch["img"].to(self.device)), batch["label"].to(self.device)) for batch in bar]
        features, labels = zip(*pairs)
        return torch.cat(features).float(), torch.cat(labels)

    def check_validation(self, setting: str, remedy: str) -> None:
        """Refuse to choose anything on test images. Raises UserError where there are no validation images."""
        dataset = self.dm.dataset
        test = {item.impath for item in dataset.test}
        if not dataset.val or any(item.impath in test for item in dataset.val):  # CoOp's ImageNet validates on test
            raise UserError(
                f"{setting}: {self.cfg.DATASET.NAME} has no validation images of its own to choose on; {remedy} instead"
            )

    def train(self) -> None:
        if self.prompt_learner is None:
            raise UserError(f"{self.cfg.TRAINER.NAME} has nothing to train: add --eval-only")
        self.watch = CollapseWatch(self.num_classes)
        with locked(self.cfg.OUTPUT_DIR), stoppable(), quiet_threads():
            for folder in (self.cfg.OUTPUT_DIR, os.path.join(self.cfg.OUTPUT_DIR, PROMPT_LEARNER)):
                remove_leftovers(folder)
            try:
                super().train()
            except Stopped as stop:
                said = f"stopped by {stop.signal}: {self._keep_last_epoch()}"
                print(f"{said}; to go on, in {os.getcwd()}: {command()}", file=sys.stderr)
                raise
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {self._keep_last_epoch()}") from error
            except OSError as error:
                if error.errno and error.filename is None:  # TensorBoard and Dassl's log do not say where it happened
                    raise type(error)(error.errno, error.strerror, self.cfg.OUTPUT_DIR) from error
                raise

    def _keep_last_epoch(self) -> str:
        """Write the checkpoint of the last whole epoch unless there is one. Returns where it is, in words."""
        if self._kept is not None:
            state, self._kept = self._kept, None
            self._write_checkpoint(state, self.cfg.OUTPUT_DIR)
        path, epoch = self._good
        return f"the last good checkpoint is {path}, after epoch {epoch}" if path else "no epoch was finished before"

    def before_train(self) -> None:
        super().before_train()
        self._write_config()
        data = self.train_loader_x.dataset
        if isinstance(data, ImageDataset):
            data.decode(self.cfg.TRAIN.get("DECODED_GB", 0) * 2**30, self.cfg.DATALOADER.NUM_WORKERS > 0)

    def run_epoch(self) -> None:
        start, self.busy = time.perf_counter(), 0.0
        super().run_epoch()
        passed = time.perf_counter() - start
        waiting = 100 * (1 - self.busy / passed)
        print(
            f"epoch [{self.epoch + 1}/{self.max_epoch}] took {passed:.1f} s, {waiting:.0f} % of it waiting for images"
        )

    def after_epoch(self) -> None:
        self._check_parameters()
        self.watch.epoch_ends(self.epoch + 1)
        super().after_epoch()
        # What a signal or a number gone wrong in the next epoch finds.
        self._kept = copy.deepcopy(self._state(self.epoch)) if self._good[1] != self.epoch + 1 else None

    def _check_parameters(self) -> None:
        """No checkpoint holds parameters that are not finite. Raises FloatingPointError."""
        for name, parameter in self.prompt_learner.named_parameters():
            if not torch.isfinite(parameter).all():
                raise FloatingPointError(f"epoch [{self.epoch + 1}/{self.max_epoch}]: {name} is not finite any more")

    def after_train(self) -> None:
        super().after_train()
        self._write_results(trained=True)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save_model(
        self, epoch: int, directory: str, is_best: bool = False, val_result: Any = None, model_name: str = ""
    ) -> None:
        """Write ``prompt_learner/model.pth.tar-<epoch>``: tensors and plain types only, with the class names.

        The schedule is a function of the epoch, so the scheduler's state is not stored.
        """
        model_name = model_name or (BEST if is_best else "")
        if model_name == BEST:
            self.best_epoch = epoch + 1
        self._write_checkpoint(self._state(epoch, val_result), directory, model_name)

    def _state(self, epoch: int, val_result: Any = None) -> dict[str, Any]:
        """All that decides how training goes on after an epoch (counted from 0). Tensors are not copied."""
        return {
            "state_dict": self.prompt_learner.state_dict(),
            "epoch": epoch + 1,
            "optimizer": self.optim.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "val_result": None if val_result is None else float(val_result),
            "best_result": float(self.best_result),
            "best_epoch": self.best_epoch,
            "watch": {"best": self.watch.best, "collapsed": self.watch.collapsed} if self.watch else {},
            "random": random_states(),  # order of the images, augmentation and places hang on them
            "method": self.method_state(),
            "config": self.cfg.dump(),
            "classnames": self.classnames,
        }

    def method_state(self) -> dict[str, Any]:
        """What else of a method decides how training goes on: tensors and plain types. Nothing by default."""
        return {}

    def set_method_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`method_state` of the run that goes on has said."""

    def _write_checkpoint(self, state: dict[str, Any], directory: str, model_name: str = "") -> None:
        path = os.path.join(directory, PROMPT_LEARNER, model_name or f"model.pth.tar-{state['epoch']}")
        write_checkpoint(path, state)
        if model_name != BEST:
            self._good = path, state["epoch"]

    def load_model(self, directory: str, epoch: Optional[int] = None) -> None:
        """Load ``prompt_learner`` from a run folder: the epoch asked for, else the best model, else the newest one.

        Raises:
            UserError: no folder given, no such checkpoint, or one that does not fit the classes at hand. Of several a
                damaged one is named, and the one before it taken.
        """
        if self.prompt_learner is None:  # nothing is trained, nothing is loaded
            return
        if not directory:
            raise UserError("--eval-only without a model: add --model-dir, the output folder of a training run")
        if self.watch is None and os.path.realpath(directory) == os.path.realpath(self.cfg.OUTPUT_DIR):
            raise UserError(
                f"--output-dir {directory} is also --model-dir: its results would be lost; choose another --output-dir"
            )
        self.model_dir = directory
        path, checkpoint = load_checkpoint(directory, epoch)
        self._load_prompt_learner(checkpoint, path)
        self.epoch = int(checkpoint["epoch"]) - 1
        print(f'Loading weights to {PROMPT_LEARNER} from "{path}" (epoch = {checkpoint["epoch"]})')

    def resume_model_if_exist(self, directory: str) -> int:
        """Go on from the newest whole checkpoint of a run folder. Returns the number of epochs done (0: from scratch).

        A run that ``RESUME`` started from another folder goes on from its own, once there is a checkpoint in it.
        """
        home = self.cfg.OUTPUT_DIR
        if self.cfg.RESUME and os.path.realpath(directory) != os.path.realpath(home):
            own = next(whole_checkpoints(os.path.join(home, PROMPT_LEARNER)), None)
            if own and "config" in own[1] and CfgNode.load_cfg(own[1]["config"]).RESUME == self.cfg.RESUME:
                directory = home
        here = os.path.realpath(directory) == os.path.realpath(home)
        folder = os.path.join(directory, PROMPT_LEARNER)
        found = next((f for f in whole_checkpoints(folder) if not here or self._keep_best(*f, folder)), None)
        if found is None:
            if self.cfg.RESUME and not here:
                raise UserError(f"no checkpoint that can be read in {folder}: see --resume")
            damaged = " that can be read" if numbered(folder) else ""
            print(f"No checkpoint found{damaged}, train from scratch")
            return 0
        path, checkpoint = found
        same = self._check_same_run(checkpoint, path, every_key=here)
        self._load_prompt_learner(checkpoint, path)
        epoch = int(checkpoint["epoch"])
        if checkpoint.get("optimizer"):
            self.optim.load_state_dict(checkpoint["optimizer"])
        if self.scaler and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        if here:  # the best model so far lies in this folder
            self.best_result = checkpoint.get("best_result", self.best_result)
            self.best_epoch = checkpoint.get("best_epoch")
        if checkpoint.get("watch"):
            self.watch.best, self.watch.collapsed = (checkpoint["watch"][key] for key in ("best", "collapsed"))
        # The optimiser's state brought its learning rate along; instead, a fresh schedule is wound forward to here.
        first, stage = [(first, s) for first, s in self._timetable() if first <= epoch and s.MAX_EPOCH > 0][-1]
        self._schedule(stage, epoch - first)
        self.epoch = epoch - 1
        self._good = path, epoch
        if same:
            self.set_method_state(checkpoint.get("method", {}))
        if "random" in checkpoint:
            set_random_states(checkpoint["random"])
        print(f'Resuming from "{path}" after epoch {epoch}')
        return epoch

    def _restore_best_result(self) -> None:
        """The stand-in for Dassl reads it from the best model; checkpoints of ours say it themselves."""

    def _keep_best(self, path: str, checkpoint: dict[str, Any], folder: str) -> bool:
        """Whether the best model up to a checkpoint is there still; a damaged one is made again from its epoch's."""
        epoch = checkpoint.get("best_epoch")
        if self.cfg.TEST.FINAL_MODEL != "best_val" or epoch is None:
            return True
        best = os.path.join(folder, BEST)
        try:
            read_checkpoint(best)
            return True
        except UserError as error:
            print(f"WARNING: {error}")
        try:
            again = read_checkpoint(os.path.join(folder, f"model.pth.tar-{epoch}"))
        except UserError:
            print(
                f"{path} comes after the best model (epoch {epoch}): the checkpoint before it is used if there is one"
            )
            return False
        write_checkpoint(best, {**again, "val_result": checkpoint["best_result"]})
        return True

    def _check_same_run(self, checkpoint: dict[str, Any], path: str, every_key: bool) -> bool:
        """A run goes on only as what it was: same method, weights, classes, and in its own folder the same settings.

        Returns whether it is the same in everything.
        """
        remedy = "choose another --output-dir, or delete that folder"
        if checkpoint.get("classnames", self.classnames) != self.classnames:
            raise UserError(f"{path} was trained on other classes: {remedy}")
        if "config" not in checkpoint:
            return False
        before, now = (flat_config(CfgNode.load_cfg(text)) for text in (checkpoint["config"], self.cfg.dump()))
        keys = [*IDENTITY, *(key for key in sorted(before.keys() | now.keys()) if not key.startswith(FREE_KEYS))]
        for key in keys if every_key else (*IDENTITY, *self.timetable_keys()):
            if before.get(key) != now.get(key):
                raise UserError(f"{path} was trained with {key} {before.get(key)}, now it is {now.get(key)}: {remedy}")
        return all(before.get(key) == now.get(key) for key in keys)

    def _load_prompt_learner(self, checkpoint: dict[str, Any], path: str) -> None:
        found = {key: value for key, value in checkpoint["state_dict"].items() if key not in DERIVED}
        wanted = self.prompt_learner.state_dict()
        if found.keys() != wanted.keys():
            raise UserError(
                f"{path} holds {', '.join(found) or 'nothing'}, {self.cfg.TRAINER.NAME} needs {', '.join(wanted)}: "
                "it was trained with another trainer or other options"
            )
        found = per_class_state(
            self.prompt_learner, found, self.classnames, checkpoint.get("classnames", self.classnames)
        )
        wanted = self.prompt_learner.state_dict()
        for key, value in found.items():
            if value.shape != wanted[key].shape:
                raise UserError(
                    f"{path}: {key} is {tuple(value.shape)}, here it must be {tuple(wanted[key].shape)}; "
                    "it was trained with another backbone, another context or class-specific contexts of other classes"
                )
        self.prompt_learner.load_state_dict(found)

    # ------------------------------------------------------------------------------------------------ evaluation

    def text_features(self) -> torch.Tensor:
        """(C, E) text features of unit length of the classes at hand."""
        return self.model.text_features()

    @torch.no_grad()
    def test(self, split: Optional[str] = None) -> float:
        """Evaluate, with text features computed once. Returns the accuracy in percent.

        ``self.predictions`` holds the predicted label of every image, by its path relative to the data root.
        """
        self.set_model_mode("eval")
        self.evaluator.reset()
        split = split or self.cfg.TEST.SPLIT
        if split != "val" or self.val_loader is None:
            split = "test"
        loader = self.val_loader if split == "val" else self.test_loader
        print(f"Evaluate on the *{split}* set")
        self.predictions: dict[str, int] = {}
        labels: dict[str, int] = {}
        with self.autocast:
            self.prompt_text = self.text_features()
            with tqdm(total=len(loader.dataset), unit="image", disable=None) as bar:
                for scores, label, paths in self.scored(loader):
                    self.evaluator.process(scores, label)
                    self.predictions.update(zip(paths, scores.argmax(dim=1).tolist()))
                    labels.update(zip(paths, label.tolist()))
                    bar.update(len(paths))
        self.prompt_text = None
        self.metrics = {key: float(value) for key, value in self.evaluator.evaluate().items()}
        self.observed = self.observe(labels)
        self.tested_split = split
        for key, value in (self.metrics | self.observed).items():
            self.write_scalar(f"{split}/{key}", value, self.epoch)
        if self.watch is None:  # --eval-only; a training run writes its results when it ends
            with locked(self.cfg.OUTPUT_DIR):
                self._write_config()
                self._write_results(trained=False)
        return next(iter(self.metrics.values()))

    def observe(self, labels: dict[str, int]) -> dict[str, float]:
        """What ``results.json`` and TensorBoard say of an evaluation beside its metrics: percentages by name.

        Args:
            labels: of the images by path, like ``self.predictions``.
        """
        return {}

    def score(self, images: ImageBatch) -> torch.Tensor:
        """(B, C) scores, whose argmax is the prediction. ``self.prompt_text`` holds the text features."""
        raise NotImplementedError

    def model_inference(self, image: torch.Tensor) -> torch.Tensor:
        """Dassl's word for it: (B, 3, H, W) images alone -> (B, C) scores."""
        return self.score(ImageBatch(self.backbone, [""] * len(image), image))

    @property
    def backbone(self) -> Backbone:
        """The frozen CLIP within the model."""
        return self.model if isinstance(self.model, Backbone) else self.model.backbone

    def scored(self, loader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
        """Scores (B, C), labels (B,) and paths of all images of a loader, in any order.

        What a store of features can answer comes from there, without an image being read; the other images are read
        and encoded, and their features kept.
        """
        store, items = self.open_store(loader), loader.dataset.data_source
        if store is not None:
            with closing(store):
                left = []
                size = self.cfg.DATALOADER.TEST.BATCH_SIZE
                for chunk in (items[i : i + size] for i in range(0, len(items), size)):
                    known = self._kept_batch(chunk, store)
                    known.features()
                    left += [item for item, complete in zip(chunk, known.complete) if not complete]
                    chunk = [item for item, complete in zip(chunk, known.complete) if complete]
                    if not chunk:  # nothing is scored whose own features are missing
                        continue
                    known = self._kept_batch(chunk, store)
                    scores = self.score(known)
                    rows = [i for i, complete in enumerate(known.complete) if complete]
                    if rows:
                        label = torch.tensor([chunk[i].label for i in rows], device=scores.device)
                        yield scores[rows], label, [known.paths[i] for i in rows]
                    left += [item for item, complete in zip(chunk, known.complete) if not complete]
                print(f"Features of {len(items) - len(left)} of {len(items)} images were kept in {store.path}")
                if left:
                    yield from self._scored_pixels(self.loader_of(left, loader.dataset.transform), store)
                else:  # as that loader would: what training draws next must not hang on what was kept
                    torch.empty((), dtype=torch.int64).random_()
        else:
            yield from self._scored_pixels(loader, None)

    def _scored_pixels(
        self, loader: Any, store: Optional[FeatureStore]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
        for batch in loader:
            paths = self.relative_paths(batch)
            keys = [] if store is None else [image_key(*pair) for pair in zip(batch["impath"], paths)]
            images = ImageBatch(
                self.backbone, paths, batch["img"].to(self.device, non_blocking=True), store, keys, self.model
            )
            yield self.score(images), batch["label"].to(self.device), paths

    def _kept_batch(self, items: Sequence[Any], store: FeatureStore) -> ImageBatch:
        """Images as far as the store has them."""
        paths = [relative_path(item.impath, self.cfg.DATASET.ROOT) for item in items]
        keys = [image_key(item.impath, path) for item, path in zip(items, paths)]
        return ImageBatch(self.backbone, paths, None, store, keys, self.model)

    def loader_of(self, items: Sequence[Any], tfm: Any) -> Any:
        """Images in their order, as they are at test time."""
        return build_data_loader(
            self.cfg,
            data_source=items,
            batch_size=self.cfg.DATALOADER.TEST.BATCH_SIZE,
            tfm=tfm,
            is_train=False,
            dataset_wrapper=ImageDataset,
        )

    def open_store(self, loader: Any) -> Optional[FeatureStore]:
        """The store that ``TEST.FEATURES`` names, for this encoder and what happens to images before it."""
        path = self.cfg.TEST.get("FEATURES", "")
        if not path:
            return None
        backbone, kind = self.backbone, self.device.type
        if kind == "cuda":
            kind = torch.cuda.get_device_name(self.device)
        if self._encoder_key is None:  # of all weights: once a run, not once an evaluation
            self._encoder_key = encoder_key(
                backbone.visual, loader.dataset.transform, f"{self.computes} {READING}", kind
            )
        name = f"{backbone.name}, {backbone.input_resolution} pixels, {self.computes}, {kind}"
        try:
            return FeatureStore(
                os.path.expanduser(path), self._encoder_key, name, int(self.cfg.TEST.FEATURES_GB * 2**30)
            )
        except NotAStore as error:
            raise UserError(f"TEST.FEATURES: {error}; name another file") from error
        except (OSError, sqlite3.Error) as error:
            print(f"{path}: {error}; features are not kept")
            return None

    def relative_paths(self, batch: dict[str, Any]) -> list[str]:
        """Paths of a batch's images relative to the data root, with forward slashes."""
        return [relative_path(path, self.cfg.DATASET.ROOT) for path in batch["impath"]]

    def _write_config(self) -> None:
        """``config.yaml``: every key of this run, to be read by people and by ``--config-file``."""
        write_text(os.path.join(self.cfg.OUTPUT_DIR, "config.yaml"), self.cfg.dump())

    def _write_results(self, trained: bool) -> None:
        cfg = self.cfg
        results = {
            "metrics": getattr(self, "metrics", {}),
            "observed": getattr(self, "observed", {}),
            "split": getattr(self, "tested_split", None),
            "images": len(self.predictions) if hasattr(self, "metrics") else 0,
            "classes": self.num_classes,
            "run": {
                "trainer": cfg.TRAINER.NAME,
                "dataset": cfg.DATASET.NAME,
                "subsample_classes": cfg.DATASET.get("SUBSAMPLE_CLASSES", "all"),
                "shots": cfg.DATASET.NUM_SHOTS,
                "seed": cfg.SEED,
                "backbone": cfg.MODEL.BACKBONE.NAME,
                "trained": trained,
                "epochs": self.epoch + 1 if self.prompt_learner is not None else 0,
                "model_dir": self.model_dir,
                "collapsed": self.watch.collapsed if trained else None,
            },
            "torch": torch.__version__,
            "pillow": PIL.__version__,  # it draws the names, and not to the pixel alike in all versions
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
        }
        path, run = write_results(cfg.OUTPUT_DIR, results), results["run"]
        tested = (
            f"accuracy {results['metrics']['accuracy']:.2f} %" if "accuracy" in results["metrics"] else "not tested"
        )
        print(
            f"{run['trainer']} on {run['dataset']}, {run['subsample_classes']} classes, {run['shots']} shots, "
            f"seed {run['seed']}: {tested} ({results['images']:,} images). Results: {path}"
        )


def per_class_state(
    module: nn.Module, state: dict[str, torch.Tensor], classnames: Sequence[str], known: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Make a state dict of other classes one of the classes at hand.

    Entries that hold a row per class (``per_class`` of the modules) are handed to the classes of the same name; where a
    name occurs several times, the first gets the first one's, the second the second one's, and so on. Classes that are
    not in the state dict keep the row that ``module`` was initialised with. A module with ``of_classes(state, rows)``
    does this itself: it is given its own entries, and for each class at hand its number among the known ones or -1.

    Args:
        module: built for the classes ``classnames``.
        state: of the classes ``known``, with all of its keys.
    """
    matches = matching_names(classnames, known)
    rows = torch.tensor(matches, dtype=torch.long)
    here = rows >= 0
    adapted = dict(state)
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        if hasattr(part, "of_classes"):
            own = {name: state[prefix + name] for name in part.state_dict()}
            adapted.update({prefix + name: value for name, value in part.of_classes(own, matches).items()})
        for name in getattr(part, "per_class", ()):
            key = prefix + name
            own = getattr(part, name).detach().cpu().clone()
            if state[key].shape[1:] == own.shape[1:]:
                own[here] = state[key][rows[here]].to(own.dtype)
                adapted[key] = own
    return adapted


class CollapseWatch:
    """Notices, and says, when training drives the predictions to chance.

    With a weak backbone the min-max loss can be lowered by predicting the same for every class. An epoch whose accuracy
    on the training images (without selection) has lost more than half of what the best epoch had above chance is called
    a collapse; the first epoch, of warm-up, shows what the prompts could do before training.
    """

    def __init__(self, num_classes: int) -> None:
        self.chance = 100.0 / max(num_classes, 1)
        self.best = 0.0
        self.collapsed = False
        self._sum, self._count = 0.0, 0

    def update(self, accuracy: float, n: int) -> None:
        """Accuracy of one batch of n images, in percent."""
        self._sum, self._count = self._sum + accuracy * n, self._count + n

    def epoch_ends(self, epoch: int) -> None:
        accuracy = self._sum / max(self._count, 1)
        self._sum, self._count = 0.0, 0
        self.best = max(self.best, accuracy)
        gained = self.best - self.chance
        collapsed = gained > MEANINGFUL and accuracy - self.chance < gained / 2
        if collapsed and not self.collapsed:
            print(
                f"WARNING: training collapses: {accuracy:.1f} % of training images are recognised in epoch {epoch}, "
                f"{self.best:.1f} % were before (chance is {self.chance:.1f} %). Lower OPTIM.LR, or with "
                "LoGoPrompt choose another LOSS; its method does not help a backbone that cannot read class names."
            )
        self.collapsed = collapsed


def mend_warmup() -> None:
    """Let Dassl.pytorch (2022) build its warm-up on torch >= 2.7, whose schedulers take no ``verbose`` any more."""
    warmup = getattr(dassl_schedules, "_BaseWarmupScheduler", None)
    if warmup is None or "verbose" in inspect.signature(LRScheduler.__init__).parameters:
        return

    def init(self, optimizer, successor, warmup_epoch, last_epoch=-1, verbose=False):  # noqa: ANN001 (Dassl's)
        self.successor, self.warmup_epoch = successor, warmup_epoch
        LRScheduler.__init__(self, optimizer, last_epoch)

    warmup.__init__ = init


def _grad_scaler() -> Any:
    """torch moved it in 2.3."""
    return torch.amp.GradScaler("cuda") if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler()
