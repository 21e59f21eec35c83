"""The training loop."""

from __future__ import annotations

import os.path as osp
import time
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..data import DataManager
from ..evaluation import build_evaluator
from ..utils import (
    AverageMeter,
    MetricMeter,
    load_checkpoint,
    mkdir_if_missing,
    resume_from_checkpoint,
    save_checkpoint,
    tolist_if_not,
)

__all__ = ["SimpleTrainer", "TrainerBase", "TrainerX"]

_BEST = "model-best.pth.tar"


class TrainerBase:
    """The loop over epochs with its hooks, and the models with their optimisers and schedules.

    ``train`` calls ``before_train``; for each epoch ``before_epoch``, ``run_epoch``, ``after_epoch``; ``after_train``.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[str, nn.Module] = OrderedDict()
        self._optims: OrderedDict[str, Any] = OrderedDict()
        self._scheds: OrderedDict[str, Any] = OrderedDict()
        self._writer = None

    # Models

    def register_model(self, name: str = "model", model: Any = None, optim: Any = None, sched: Any = None) -> None:
        """Enter a model with its optimiser and schedule (each may be None) under ``name``, its folder's name on disk.

        Raises:
            AttributeError: called before ``TrainerBase.__init__``.
            ValueError: the name is taken.
        """
        if not {"_models", "_optims", "_scheds"} <= set(vars(self)):
            raise AttributeError("register_model() was called before super().__init__()")
        if name in self._models:
            raise ValueError(f"a model named {name} is already registered")
        self._models[name], self._optims[name], self._scheds[name] = model, optim, sched

    def get_model_names(self, names: str | Sequence[str] | None = None) -> list[str]:
        """Return ``names`` as a list, by default all; ValueError for one that is not registered."""
        if names is None:
            return list(self._models)
        names = tolist_if_not(names)
        unknown = [name for name in names if name not in self._models]
        if unknown:
            raise ValueError(f"no model is registered as {', '.join(map(str, unknown))}")
        return names

    def _present(self, table: dict[str, Any], names: str | Sequence[str] | None) -> list[Any]:
        """Return the entries of ``table`` for the models named that are not None."""
        entries = [table[name] for name in self.get_model_names(names)]
        return [entry for entry in entries if entry is not None]

    def set_model_mode(self, mode: str = "train", names: str | Sequence[str] | None = None) -> None:
        """Put the models in "train" or "eval" (also called "test") mode; KeyError for another."""
        training = {"train": True, "eval": False, "test": False}[mode]
        for model in self._present(self._models, names):
            model.train(training)

    def update_lr(self, names: str | Sequence[str] | None = None) -> None:
        """Step the schedules; due once an epoch, which is the trainer's business (see ``forward_backward``)."""
        for sched in self._present(self._scheds, names):
            sched.step()

    # Checkpoints

    def save_model(
        self,
        epoch: int,
        directory: str,
        is_best: bool = False,
        val_result: float | None = None,
        model_name: str = "",
    ) -> None:
        """Write a checkpoint of each model into ``directory/<name>``; ``epoch`` counts from 0, the file's from 1."""
        # a NumPy number, which evaluators may well return, could not be loaded with weights_only=True
        val_result = None if val_result is None else float(val_result)
        for name, model in self._models.items():
            optim, sched = self._optims[name], self._scheds[name]
            state = {
                "state_dict": model.state_dict(),
                "epoch": epoch + 1,
                "optimizer": None if optim is None else optim.state_dict(),
                "scheduler": None if sched is None else sched.state_dict(),
                "val_result": val_result,
            }
            save_checkpoint(state, osp.join(directory, name), is_best=is_best, model_name=model_name)

    def resume_model_if_exist(self, directory: str) -> int:
        """Load the newest checkpoint of every model from ``directory``; return the number of finished epochs.

        Where a model has none (nor a pointer to one, as after a run killed during its first save) nothing is loaded and
        0 is returned.

        Raises:
            RuntimeError: the models' newest checkpoints are of different epochs (killed between two saves).
        """
        folders = {name: osp.join(directory, name) for name in self.get_model_names()}
        if not all(osp.isfile(osp.join(folder, "checkpoint")) for folder in folders.values()):
            print("No checkpoint found, train from scratch")
            return 0

        print(f"Found checkpoint at {directory} (will resume training)")
        epochs = {
            name: resume_from_checkpoint(folder, self._models[name], self._optims[name], self._scheds[name])
            for name, folder in folders.items()
        }
        if len(set(epochs.values())) > 1:
            raise RuntimeError(f"the newest checkpoints in {directory} are of different epochs: {epochs}")
        return next(iter(epochs.values()), 0)

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load the weights of every model from ``directory``: the best ones, or those after ``epoch`` epochs.

        An empty ``directory`` skips it, with a note; a file that is not there is a FileNotFoundError.
        """
        if not directory:
            print(
                "Note that load_model() is skipped as no pretrained model is given "
                "(ignore this if it's done on purpose)"
            )
            return

        filename = _BEST if epoch is None else f"model.pth.tar-{epoch}"
        for name, model in self._models.items():
            path = osp.join(directory, name, filename)
            if not osp.isfile(path):
                raise FileNotFoundError(f"no weights of {name} at {path}")
            checkpoint = load_checkpoint(path)
            result = checkpoint["val_result"]
            shown = "None" if result is None else f"{result:.1f}"
            print(f"Load {path} to {name} (epoch={checkpoint['epoch']}, val_result={shown})")
            model.load_state_dict(checkpoint["state_dict"])

    # TensorBoard

    def init_writer(self, log_dir: str) -> None:
        """Open the TensorBoard writer unless it is open."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, and evaluation needs none

            print(f"Initialize tensorboard (log_dir={log_dir})")
            self._writer = SummaryWriter(log_dir=log_dir)

    def close_writer(self) -> None:
        """Close the TensorBoard writer if it is open."""
        if self._writer is not None:
            self._writer.close()

    def write_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        """Record a number; without a writer (evaluation alone) nothing is done."""
        if self._writer is not None:
            self._writer.add_scalar(tag, scalar_value, global_step)

    # Loop

    def train(self, start_epoch: int, max_epoch: int) -> None:
        """Run the epochs from ``start_epoch`` (``before_train`` may change it) up to ``max_epoch``, not included."""
        self.start_epoch, self.max_epoch = start_epoch, max_epoch
        self.before_train()
        epochs = range(self.start_epoch, self.max_epoch)
        for self.epoch in epochs:
            self.before_epoch()
            self.run_epoch()
            self.after_epoch()
        self.after_train()

    def before_train(self) -> None:
        """Hook; nothing by default."""

    def after_train(self) -> None:
        """Hook; nothing by default."""

    def before_epoch(self) -> None:
        """Hook; nothing by default."""

    def after_epoch(self) -> None:
        """Hook; nothing by default."""

    def run_epoch(self) -> None:
        """Train for one epoch."""
        raise NotImplementedError

    def test(self) -> float:
        """Evaluate the model."""
        raise NotImplementedError

    def parse_batch_train(self, batch: Any) -> Any:
        """Return what ``forward_backward`` needs of a training batch."""
        raise NotImplementedError

    def parse_batch_test(self, batch: Any) -> Any:
        """Return input and label of a test batch."""
        raise NotImplementedError

    def forward_backward(self, batch: Any) -> dict[str, float]:
        """Train on one batch; return the numbers to log. Calls ``update_lr`` after the last batch of an epoch."""
        raise NotImplementedError

    def model_inference(self, input: Any) -> Any:
        """Return the model's scores for an input."""
        raise NotImplementedError

    # One step of optimisation

    def detect_anomaly(self, loss: torch.Tensor) -> None:
        """Raise a FloatingPointError unless every value of ``loss`` is finite."""
        if not bool(torch.isfinite(loss).all()):
            raise FloatingPointError("the loss is infinite or NaN")

    def model_zero_grad(self, names: str | Sequence[str] | None = None) -> None:
        """Clear the gradients of the optimisers' parameters."""
        for optim in self._present(self._optims, names):
            optim.zero_grad()

    def model_backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a finite loss."""
        self.detect_anomaly(loss)
        loss.backward()

    def model_update(self, names: str | Sequence[str] | None = None) -> None:
        """Step the optimisers."""
        for optim in self._present(self._optims, names):
            optim.step()

    def model_backward_and_update(self, loss: torch.Tensor, names: str | Sequence[str] | None = None) -> None:
        """Clear the gradients, compute them and step, for the models named (by default all)."""
        self.model_zero_grad(names)
        self.model_backward(loss)
        self.model_update(names)


class SimpleTrainer(TrainerBase):
    """A trainer with loaders, evaluation, checkpoints, resuming and TensorBoard; the model is the subclass's business.

    The constructor calls ``check_cfg``, ``build_data_loader``, ``build_model``, in that order. ``build_model`` has to
    set ``self.model`` and call ``register_model``.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.check_cfg(cfg)
        self.cfg = cfg
        self.device = torch.device("cuda" if cfg.USE_CUDA and torch.cuda.is_available() else "cpu")
        self.start_epoch = self.epoch = 0
        self.max_epoch = cfg.OPTIM.MAX_EPOCH
        self.output_dir = cfg.OUTPUT_DIR
        self.best_result = float("-inf")

        self.build_data_loader()
        self.build_model()
        self.evaluator = build_evaluator(cfg, lab2cname=self.lab2cname)

    def check_cfg(self, cfg: Any) -> None:
        """Hook for raising an error where the configuration does not suit the trainer; nothing by default."""

    def build_data_loader(self) -> None:
        """Build the loaders; a replacement has to set the same attributes (``dm`` may be left out)."""
        self.dm = DataManager(self.cfg)
        for name in (
            "train_loader_x",
            "train_loader_u",
            "val_loader",
            "test_loader",
            "num_classes",
            "num_source_domains",
            "lab2cname",
        ):
            setattr(self, name, getattr(self.dm, name))

    def build_model(self) -> None:
        """Build ``self.model``, its optimiser and schedule, and register them. There is no default."""
        raise NotImplementedError(
            f"{type(self).__name__} must define build_model(): the fallback for Dassl has no backbones"
        )

    def train(self) -> None:
        """Train up to OPTIM.MAX_EPOCH, from where an earlier run into the same folder ended."""
        super().train(self.start_epoch, self.max_epoch)

    def before_train(self) -> None:
        """Resume, open the TensorBoard writer, start the clock."""
        self.start_epoch = self.resume_model_if_exist(self.cfg.RESUME or self.cfg.OUTPUT_DIR)
        if self.start_epoch > 0 and self.cfg.TEST.FINAL_MODEL == "best_val":
            self._restore_best_result()
        log_dir = osp.join(self.output_dir, "tensorboard")
        mkdir_if_missing(log_dir)
        self.init_writer(log_dir)
        self.time_start = time.time()

    def _restore_best_result(self) -> None:
        """Take the result to beat from the best model already in the output folder, which would be replaced else."""
        paths = [osp.join(self.output_dir, name, _BEST) for name in self.get_model_names()]
        if paths and all(map(osp.isfile, paths)):
            result = load_checkpoint(paths[0])["val_result"]
            if result is not None:
                self.best_result = result

    def after_train(self) -> None:
        """Evaluate the final model, tell the time taken, close the TensorBoard writer."""
        print("Finish training")
        if not self.cfg.TEST.NO_TEST:
            best = self.cfg.TEST.FINAL_MODEL == "best_val"
            print(f"Deploy the {'model with the best val performance' if best else 'last-epoch model'}")
            if best:
                self.load_model(self.output_dir)
            self.test()
        print(f"Elapsed: {timedelta(seconds=round(time.time() - self.time_start))}")
        self.close_writer()

    def after_epoch(self) -> None:
        """Keep the model if it is the best so far (TEST.FINAL_MODEL best_val); write a checkpoint when one is due."""
        if self.cfg.TEST.FINAL_MODEL == "best_val" and not self.cfg.TEST.NO_TEST:
            result = self.test(split="val")
            if result > self.best_result:
                self.best_result = result
                self.save_model(self.epoch, self.output_dir, val_result=result, model_name=_BEST)

        done = self.epoch + 1
        freq = self.cfg.TRAIN.CHECKPOINT_FREQ
        if done == self.max_epoch or (freq > 0 and done % freq == 0):
            self.save_model(self.epoch, self.output_dir)

    @torch.no_grad()
    def test(self, split: str | None = None) -> float:
        """Evaluate on ``split`` ("val" or "test", by default TEST.SPLIT; "test" where there is no val).

        Returns:
            The evaluator's first result, for Classification the accuracy in percent.
        """
        self.set_model_mode("eval")
        self.evaluator.reset()

        use_val = (split or self.cfg.TEST.SPLIT) == "val" and self.val_loader is not None
        split, loader = ("val", self.val_loader) if use_val else ("test", self.test_loader)
        print(f"Evaluate on the *{split}* set")
        for batch in tqdm(loader):
            input, label = self.parse_batch_test(batch)
            self.evaluator.process(self.model_inference(input), label)

        results = self.evaluator.evaluate()
        for key, value in results.items():
            self.write_scalar(f"{split}/{key}", value, self.epoch)
        return next(iter(results.values()))

    def model_inference(self, input: torch.Tensor) -> torch.Tensor:
        """Return the scores of ``self.model`` for a batch of images."""
        return self.model(input)

    def parse_batch_test(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels, on the trainer's device."""
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def get_current_lr(self, names: str | Sequence[str] | None = None) -> float:
        """Return the learning rate of the first parameter group of the first model named (by default of all)."""
        first = self.get_model_names(names)[0]
        return self._optims[first].param_groups[0]["lr"]


class TrainerX(SimpleTrainer):
    """A trainer on labelled images (``train_loader_x``); subclasses define ``forward_backward``."""

    def run_epoch(self) -> None:
        """Go once through the training images, logging every TRAIN.PRINT_FREQ batches (all, where there are fewer)."""
        self.set_model_mode("train")
        losses, batch_time, data_time = MetricMeter(), AverageMeter(), AverageMeter()
        self.num_batches = len(self.train_loader_x)
        freq = self.cfg.TRAIN.PRINT_FREQ
        loader = self.train_loader_x

        mark = time.time()
        for self.batch_idx, batch in enumerate(loader):
            data_time.update(time.time() - mark)
            losses.update(self.forward_backward(batch))
            batch_time.update(time.time() - mark)

            if self.num_batches < freq or (self.batch_idx + 1) % freq == 0:
                print(self._progress(losses, batch_time, data_time))
            step = self.epoch * self.num_batches + self.batch_idx
            for name, meter in losses.meters.items():
                self.write_scalar(f"train/{name}", meter.avg, step)
            self.write_scalar("train/lr", self.get_current_lr(), step)
            mark = time.time()

    def _progress(self, losses: MetricMeter, batch_time: AverageMeter, data_time: AverageMeter) -> str:
        """Return the log line: times in seconds, as latest (average) values, and the time expected to be left."""
        epochs_left = self.max_epoch - self.epoch - 1
        batches_left = self.num_batches - self.batch_idx - 1 + epochs_left * self.num_batches
        eta = timedelta(seconds=int(batch_time.avg * batches_left))
        return (
            f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{self.batch_idx + 1}/{self.num_batches}] "
            f"time {batch_time.val:.3f} ({batch_time.avg:.3f}) data {data_time.val:.3f} ({data_time.avg:.3f}) "
            f"{losses} lr {self.get_current_lr():.4e} eta {eta}"
        )

    def parse_batch_train(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return images, labels and domain labels, on the trainer's device."""
        return tuple(batch[key].to(self.device) for key in ("img", "label", "domain"))
