"""Runs a method inside Dassl: builds, steps, and delegates everything else to the parts of this folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Optional

import PIL
import torch
from dassl.data import DataManager
from dassl.data.transforms import build_transform
from dassl.engine import TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler
from yacs.config import CfgNode

from . import distributed
from .backbone import Backbone, check_name
from .checkpoint import BEST, PROMPT_LEARNER, Checkpointer
from .config import DASSL_RULES, SHARED_KEYS, lost_overrides, rules_of, user_error_messages, violations
from .curves import Curves, describe
from .dassl_compat import build_optimizer, dassl_errors, grad_scaler, patch_dassl_warmup
from .data import ImageDataset, drawn_items, few_shot_loader, handle_last_batch, index_loader, training_loader
from .distributed import ProcessLost
from .errors import UserError
from .evaluation import Evaluation, FewShotFeatures, ImageSource, evaluate
from .hooks import CollapseMonitor, EpochTimer, FiniteGuard, StageSchedule
from .image_batch import ImageBatch, ViewCache, training_images
from .loading import adopt_preprocessing, load_backbone
from .method import Method, Step
from .names import command_settings
from .results import code_version, described, remove_leftovers, write_results, write_text
from .run_folder import Stopped, command, locked, quiet_threads, stoppable
from .weights import load_init_weights


class PromptTrainer(TrainerX):
    """A Dassl trainer for one :class:`Method`. Only what the method learns is registered and saved."""

    method_class: type[Method]
    model: Method
    view_cache: Optional[ViewCache] = None
    checkpointer: Optional[Checkpointer] = None  # None: the method learns nothing
    fits = False  # the method learns by fit(), without epochs
    evaluation: Optional[Evaluation] = None  # the last one
    training = False  # during and after train()
    model_dir = ""  # run folder whose model was loaded
    words: Sequence[str] = sys.argv  # the command: --config-file and KEY VALUE pairs are recorded

    @classmethod
    def config_errors(cls, cfg: CfgNode) -> list[str]:
        """A line for every value that is not allowed: key, value, and what is."""
        shared = list(violations({**rules_of(SHARED_KEYS), **DASSL_RULES}, cfg))
        shared += user_error_messages(lambda: check_name(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS))
        return [*(shared or dassl_errors(cfg)), *cls.method_class.config_errors(cfg)]

    def check_cfg(self, cfg: CfgNode) -> None:
        """Dassl's hook before data and weights are loaded. Raises UserError with all of :meth:`config_errors`."""
        distributed.start(cfg.USE_CUDA)
        if errors := [*lost_overrides(sys.argv, cfg), *self.config_errors(cfg)]:
            raise UserError(*errors)
        adopt_preprocessing(cfg)

    def build_data_loader(self) -> None:
        """As in Dassl, with images read by :class:`ImageDataset`; with cached views the loader reads none."""
        with distributed.main_first():
            self.dm = DataManager(self.cfg, dataset_wrapper=ImageDataset)
        distributed.share_random_states()  # the first process may have drawn the samples that the others read
        loaders = ("train_loader_x", "train_loader_u", "val_loader", "test_loader")
        for name in (*loaders, "num_classes", "num_source_domains", "lab2cname"):
            setattr(self, name, getattr(self.dm, name))
        drawn = drawn_items(self.method_class.drawn_images(self.cfg, self.classnames), self.classnames)
        self.train_items = [*self.dm.dataset.train_x, *drawn]
        if self.method_class.views(self.cfg):
            self.train_loader_x = index_loader(self.train_items, self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE)
        elif drawn:
            self.train_loader_x = training_loader(self.cfg, self.train_items)
        self.train_loader_x = handle_last_batch(self.train_loader_x, self.cfg.TRAIN.DROP_LAST)

    def build_model(self) -> None:
        cfg, self.started = self.cfg, time.monotonic()
        self.backbone, prec = self.load_backbone()
        self.autocast = torch.autocast(self.device.type, torch.float16) if prec == "amp" else nullcontext()
        self.scaler = grad_scaler() if prec in self.method_class.scaled_precisions else None
        self.model = self.method_class(cfg, self.classnames, self.backbone).to(self.device)
        self.source = ImageSource(cfg, self.backbone, self.device, f"{prec}{', compiled' * cfg.TRAIN.COMPILE}")
        self.data = FewShotFeatures(self.dm.dataset, cfg.DATASET.NAME, partial(few_shot_loader, cfg), self._encode)
        self.curves = Curves(cfg.OUTPUT_DIR)
        self.guard, self.timer, self.monitor = FiniteGuard(), EpochTimer(), CollapseMonitor(self.num_classes)
        if views := self.method_class.views(cfg):
            transform, room = build_transform(cfg, is_train=True), cfg.TRAIN.DECODED_GB * 2**30
            self.view_cache = ViewCache(self.backbone, self.train_items, transform, views, max(cfg.SEED, 0), room)
        learned = self.model.learned
        if learned is None:
            return
        if cfg.MODEL.INIT_WEIGHTS:
            load_init_weights(learned, cfg.MODEL.INIT_WEIGHTS)
        patch_dassl_warmup()
        self.optim = build_optimizer(learned, cfg.OPTIM, self.model.parameter_groups())
        self.fits = type(self.model).fit is not Method.fit
        self.max_epoch = 1 if self.fits else self.max_epoch
        stages, stage_keys = [] if self.fits else self.model.stages(), self.model.stage_keys
        if len(stages) > 1:
            stage_keys = (*stage_keys, "OPTIM.MAX_EPOCH", "DATASET.NUM_SHOTS")
        self.sched = StageSchedule(stages, self.optim, cfg.OPTIM, build_lr_scheduler, self.data)
        self.register_model(PROMPT_LEARNER, learned, self.optim, self.sched)
        parts = {"collapse": self.monitor, **({} if self.view_cache is None else {"views": self.view_cache})}
        state = learned, self.optim, self.scaler, parts
        self.checkpointer = Checkpointer(cfg, self.classnames, *state, stage_keys, self.backbone.fingerprint)

    def load_backbone(self) -> tuple[Backbone, str]:
        """CLIP for this config, and the precision that it computes in."""
        return load_backbone(self.cfg, self.method_class.precision(self.cfg), self.device)

    @property
    def classnames(self) -> list[str]:
        return list(self.dm.dataset.classnames)

    def train(self) -> None:
        """Train and test."""
        if self.checkpointer is None:
            raise UserError(f"{self.cfg.TRAINER.NAME} has nothing to train: add --eval-only")
        if self.cfg.TEST.FINAL_MODEL == "best_val" and not self.cfg.TEST.NO_TEST:
            self.data.check_validation("TEST.FINAL_MODEL best_val", "set it to last_step")
        if setting := self.method_class.validation(self.cfg):
            self.data.check_validation(*setting)
        self.training = True
        code_version()  # before the code changes while this trains
        with training_session(self.cfg.OUTPUT_DIR, self.checkpointer):
            super().train()

    def init_writer(self, log_dir: str) -> None:
        if distributed.is_main():
            super().init_writer(log_dir)

    def before_train(self) -> None:
        super().before_train()
        self._write_config()
        self.curves.resume(self.start_epoch)
        if self._writer is not None and not self.fits and self.start_epoch == 0:
            describe(self._writer, self.cfg, self.model, self.dm.dataset.test)
        if isinstance(data := self.train_loader_x.dataset, ImageDataset):
            data.decode(self.cfg.TRAIN.DECODED_GB * 2**30 / distributed.processes())

    def before_epoch(self) -> None:
        super().before_epoch()
        if isinstance(data := self.train_loader_x.dataset, ImageDataset):
            data.epoch.fill_(self.epoch)
        self.sched.before_epoch(self.epoch)
        self.model.before_epoch(self.epoch)
        self.timer.before_epoch()

    def run_epoch(self) -> None:
        if self.fits:
            self.set_model_mode("eval")
            self.monitor.after_step(self.model.fit(self.data), len(self.dm.dataset.train_x))
        else:
            super().run_epoch()
            self.update_lr()  # not in the last step, where CoOp has it: Dassl prints the learning rate after the step
        self.timer.after_epoch(self._position())

    def after_epoch(self) -> None:
        self.guard.check_parameters(self.model.learned, self._position())
        self.monitor.after_epoch(self.epoch + 1)
        with self.autocast:
            self.sched.after_epoch(self.epoch)
        distributed.copy_from_main(self.model.learned)
        super().after_epoch()
        if distributed.is_main():
            self.curves.after_epoch()
        self.checkpointer.after_epoch(self.epoch, self.best_result)

    def after_train(self) -> None:
        super().after_train()
        write_run_results(self)

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
        """A step; returns the loss and the accuracy on the batch's original images."""
        with self.timer.step():
            position = f"{self._position()} batch [{self.batch_idx + 1}/{self.num_batches}]"
            self.guard.before_step(position, batch.get("impath", ()))
            with self.autocast:
                images, label, share = training_images(batch, self.backbone, self.view_cache, self.epoch)
                step = self.model.loss(images, label)
            accuracy = {"accuracy": compute_accuracy(step.logits, label)[0]}
            step = replace(step, log={**step.log, **accuracy}).part(share)
            losses, log = distributed.summed(step.losses), distributed.summed(step.log)
            self._update(step, sum(losses.values()))
            self.model.after_step()
            accuracy = log.pop("accuracy").item()
            self.monitor.after_step(accuracy, share.total)
            for name, value in {**(losses if len(losses) > 1 else {}), **log}.items():
                self.write_scalar(f"train/{name}", value.item(), self.epoch * self.num_batches + self.batch_idx)
            summary = {"loss": sum(losses.values()).item(), "acc": accuracy}
            self.curves.before_write(summary)
            return summary

    def _update(self, step: Step, loss: torch.Tensor) -> None:
        """Gradients and a step of the optimizer. Raises FloatingPointError instead of making parameters NaN."""
        self.guard.check_loss(loss)
        self.optim.zero_grad()
        self.model.backward(step, self.scaler.scale if self.scaler else lambda loss: loss)
        if self.scaler is None:
            self.guard.check_gradients(self.model.learned.parameters())
            self.optim.step()
        else:
            self.scaler.step(self.optim)  # skipped when gradients overflow; then the scale is halved
            self.scaler.update()
            self.guard.check_scale(self.scaler.get_scale())

    def write_scalar(self, tag: str, scalar_value: float, global_step: Optional[int] = None) -> None:
        """Dassl's hook; of a step's loss and accuracy, the step's own values instead of Dassl's running means."""
        if self._writer is not None:
            value = self.curves.add(tag, scalar_value, global_step, self.epoch + 1)
            super().write_scalar(tag, value, global_step)

    def _position(self) -> str:
        return f"epoch [{self.epoch + 1}/{self.max_epoch}]"

    def save_model(
        self, epoch: int, directory: str, is_best: bool = False, val_result: Any = None, model_name: str = ""
    ) -> None:
        """Dassl's hook: write ``prompt_learner/model.pth.tar-<epoch>``, or the best model."""
        name = model_name or (BEST if is_best else "")
        self.checkpointer.save(epoch, directory, name, val_result, self.best_result)
        distributed.barrier()

    def load_model(self, directory: str, epoch: Optional[int] = None) -> None:
        """Load what was learned from a run folder, see :meth:`Checkpointer.load`. Raises UserError."""
        if self.checkpointer is None:  # nothing is learned
            return
        if not directory:
            raise UserError("--eval-only without a model: add --model-dir, the output folder of a training run")
        if not self.training and os.path.realpath(directory) == os.path.realpath(self.cfg.OUTPUT_DIR):
            raise UserError(
                f"--output-dir {directory} is also --model-dir: its results would be lost; choose another --output-dir"
            )
        self.model_dir = directory
        self.epoch = self.checkpointer.load(directory, epoch) - 1

    def resume_model_if_exist(self, directory: str) -> int:
        """Resume from the newest readable checkpoint of a run folder. Returns the number of epochs done (0: none)."""
        if (checkpoint := self.checkpointer.resume(directory)) is None:
            return 0
        if checkpoint.get("best_result") is not None:
            self.best_result = checkpoint["best_result"]
        self.epoch = int(checkpoint["epoch"]) - 1
        self.sched.resume(self.epoch + 1)
        return self.epoch + 1

    @torch.no_grad()
    def test(self, split: Optional[str] = None) -> float:
        """Evaluate; returns the accuracy in percent, and leaves everything else in :attr:`evaluation`."""
        self.set_model_mode("eval")
        split = split or self.cfg.TEST.SPLIT
        if split == "val":
            self.data.check_validation("TEST.SPLIT val", "set TEST.SPLIT test")
        loader = self.val_loader if split == "val" else self.test_loader
        print(f"Evaluate on the *{split}* set")
        batches = self.source.batches(loader, self.model.frozen_image_encoder)
        with self.autocast:
            total = len(distributed.part(loader.dataset.data_source))
            self.evaluation = evaluate(self.model, batches, self.evaluator, split, total)
        for key, value in {**self.evaluation.metrics, **self.evaluation.extra_metrics}.items():
            self.write_scalar(f"{split}/{key}", value, self.epoch)
        if not self.training:  # --eval-only; a training run writes its results when it ends
            with locked(self.cfg.OUTPUT_DIR):
                self._write_config()
                write_run_results(self)
        return next(iter(self.evaluation.metrics.values()))

    @torch.no_grad()
    def model_inference(self, image: torch.Tensor) -> torch.Tensor:
        """Dassl's hook: (B, 3, H, W) images -> (B, C) scores."""
        with self.autocast:
            return self.model.score(ImageBatch(self.backbone, image, [""] * len(image)), self.model.text_features())

    def _encode(self, image: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            return self.backbone.encode_image(image.to(self.device))

    def _write_config(self) -> None:
        """``config.yaml``: every key of this run, readable by people and by ``--config-file``."""
        if distributed.is_main():
            write_text(os.path.join(self.cfg.OUTPUT_DIR, "config.yaml"), self.cfg.dump())


@contextmanager
def training_session(folder: str, checkpointer: Checkpointer) -> Iterator[None]:
    """Lock a run folder; a signal or a number that is not finite leaves a checkpoint of the last complete epoch."""
    with locked(folder), stoppable() as ignore_signals, quiet_threads():
        for path in (folder, os.path.join(folder, PROMPT_LEARNER)) if distributed.is_main() else ():
            remove_leftovers(path)
        try:
            try:
                yield
            except ProcessLost:
                ignore_signals()  # torchrun sends one to the others
                raise
        except (Stopped, ProcessLost) as stop:
            if distributed.claim("last epoch"):
                message = f"{stop.reason}: {checkpointer.write_last_epoch()}"
                if distributed.claim("message"):
                    print(f"{message}; to continue, in {os.getcwd()}: {command()}", file=sys.stderr)
            raise
        except FloatingPointError as error:
            if not distributed.claim("last epoch"):
                raise ProcessLost from error
            raise FloatingPointError(f"{error}; {checkpointer.write_last_epoch()}") from error
        except OSError as error:
            if error.errno and error.filename is None:  # TensorBoard and Dassl's log do not name the file
                raise type(error)(error.errno, error.strerror, folder) from error
            raise


def write_run_results(trainer: PromptTrainer) -> None:
    """Write ``results.json`` and print the line that ends a run."""
    if not distributed.is_main():
        return
    cfg, evaluation, saved = trainer.cfg, trainer.evaluation or Evaluation("", {}), trainer.checkpointer
    warnings = [*(saved.warnings if saved else []), *(trainer.sched.warnings if trainer.training else [])]
    trained_with = saved.trained_with if saved else {}  # of a loaded model: its shots and seed, not the command's
    run = {
        "trainer": cfg.TRAINER.NAME,
        "dataset": cfg.DATASET.NAME,
        "subsample_classes": cfg.DATASET.get("SUBSAMPLE_CLASSES", "all"),
        "shots": trained_with.get("DATASET.NUM_SHOTS", cfg.DATASET.NUM_SHOTS),
        "seed": trained_with.get("SEED", cfg.SEED),
        "backbone": " ".join(filter(None, (cfg.MODEL.BACKBONE.NAME, os.path.basename(cfg.MODEL.BACKBONE.WEIGHTS)))),
        "trained": trainer.training,
        "epochs": trainer.epoch + 1 if saved else 0,
        "model_dir": trainer.model_dir,
        "collapsed": trainer.monitor.collapsed if trainer.training else None,
        "processes": distributed.processes(),
        **command_settings(trainer.words, cfg),
        "seconds": round(time.monotonic() - trainer.started, 1),
        "commit": code_version(),
    }
    results = {
        "metrics": evaluation.metrics,
        "observed": evaluation.extra_metrics,
        "split": evaluation.split or None,
        "images": len(evaluation.predictions),
        "classes": trainer.num_classes,
        "classnames": trainer.classnames,
        "warnings": [*warnings, *evaluation.warnings],  # why the numbers may not mean what they seem to
        "run": run,
        "torch": torch.__version__,
        "pillow": PIL.__version__,  # versions differ in the pixels of the drawn names
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu",
    }
    path, accuracy = write_results(cfg.OUTPUT_DIR, results), evaluation.metrics.get("accuracy")
    print(
        f"{run['trainer']} on {run['dataset']}, {run['subsample_classes']} classes, {described(run)}: "
        f"{'not tested' if accuracy is None else f'accuracy {accuracy:.2f} %'} "
        f"({results['images']:,} images). Results: {path}"
        f"{''.join(f'. WARNING: {line}' for line in results['warnings'])}"
    )
