"""The training loop."""

import os.path as osp
import time
from datetime import timedelta

import torch
from tqdm import tqdm

from ..data import DataManager
from ..evaluation import build_evaluator
from ..utils import AverageMeter, MetricMeter, load_checkpoint, resume_from_checkpoint, save_checkpoint

_BEST = "model-best.pth.tar"


class TrainerX:
    """Subclasses define build_model, and forward_backward, which returns what to log and calls update_lr at the end."""

    def __init__(self, cfg) -> None:
        self._models, self._optims, self._scheds, self._writer = {}, {}, {}, None
        self.check_cfg(cfg)
        self.cfg = cfg
        self.device = torch.device("cuda" if cfg.USE_CUDA and torch.cuda.is_available() else "cpu")
        self.start_epoch = self.epoch = 0
        self.max_epoch, self.output_dir, self.best_result = cfg.OPTIM.MAX_EPOCH, cfg.OUTPUT_DIR, float("-inf")
        self.build_data_loader()
        self.build_model()
        self.evaluator = build_evaluator(cfg, lab2cname=self.lab2cname)

    def check_cfg(self, cfg) -> None:
        """Raise an error where the configuration does not suit the trainer; for subclasses."""

    def build_data_loader(self) -> None:
        """Build the loaders; an override must set the same attributes (except ``dm``)."""
        self.dm = DataManager(self.cfg)
        loaders = ("train_loader_x", "train_loader_u", "val_loader", "test_loader")
        for name in (*loaders, "num_classes", "num_source_domains", "lab2cname"):
            setattr(self, name, getattr(self.dm, name))

    def register_model(self, name="model", model=None, optim=None, sched=None) -> None:
        """Add a model, its optimizer and its schedule under ``name``, which is also its checkpoint folder."""
        if name in self._models:
            raise ValueError(f"a model named {name} is already registered")
        self._models[name], self._optims[name], self._scheds[name] = model, optim, sched

    def get_model_names(self, names=None) -> list:
        """Return ``names`` (a name or several) as a list, by default those of all models."""
        return list(self._models if names is None else [names] if isinstance(names, str) else names)

    def _each(self, table, names) -> list:
        return [table[name] for name in self.get_model_names(names) if table[name] is not None]

    def set_model_mode(self, mode="train", names=None) -> None:
        """Set "train" or "eval" (or "test") mode; KeyError for another."""
        for model in self._each(self._models, names):
            model.train({"train": True, "eval": False, "test": False}[mode])

    def update_lr(self, names=None) -> None:
        for sched in self._each(self._scheds, names):
            sched.step()

    def get_current_lr(self, names=None) -> float:
        """Return the learning rate of the first parameter group of the first model named."""
        return self._optims[self.get_model_names(names)[0]].param_groups[0]["lr"]

    def save_model(self, epoch: int, directory: str, is_best=False, val_result=None, model_name="") -> None:
        """Write a checkpoint of each model to ``directory/<name>``; ``epoch`` counts from 0."""
        for name, model in self._models.items():
            state = {"state_dict": model.state_dict(), "epoch": epoch + 1}
            for key, part in (("optimizer", self._optims[name]), ("scheduler", self._scheds[name])):
                state[key] = None if part is None else part.state_dict()
            state["val_result"] = None if val_result is None else float(val_result)  # weights_only refuses NumPy's
            save_checkpoint(state, osp.join(directory, name), is_best=is_best, model_name=model_name)

    def resume_model_if_exist(self, directory: str) -> int:
        """Load the newest checkpoints; return the number of finished epochs, 0 where a model has no checkpoint."""
        if not self._models or not all(osp.isfile(osp.join(directory, name, "checkpoint")) for name in self._models):
            print("No checkpoint found, train from scratch")
            return 0
        print(f"Found checkpoint at {directory} (will resume training)")
        tables = self._models, self._optims, self._scheds
        epochs = {resume_from_checkpoint(osp.join(directory, n), *(table[n] for table in tables)) for n in self._models}
        if len(epochs) > 1:  # killed between two saves
            raise RuntimeError(f"the newest checkpoints in {directory} are of different epochs: {sorted(epochs)}")
        return epochs.pop()

    def load_model(self, directory: str, epoch=None) -> None:
        """Load the best weights from ``directory``, or those of an epoch; "" skips it."""
        if not directory:
            print("Note that load_model() is skipped as no pretrained model is given", end=" ")
            return print("(ignore this if it's done on purpose)")
        for name, model in self._models.items():
            path = osp.join(directory, name, _BEST if epoch is None else f"model.pth.tar-{epoch}")
            result = (checkpoint := load_checkpoint(path))["val_result"]
            model.load_state_dict(checkpoint["state_dict"])
            print(f"Load {path} to {name} (epoch={checkpoint['epoch']}, val_result={result and round(result, 1)})")

    def init_writer(self, log_dir: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        print(f"Initialize tensorboard (log_dir={log_dir})")
        self._writer = SummaryWriter(log_dir=log_dir)

    def close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def write_scalar(self, tag: str, scalar_value: float, global_step=None) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, scalar_value, global_step)

    def train(self) -> None:
        self.before_train()
        for epoch in range(self.start_epoch, self.max_epoch):
            self.epoch = epoch
            self.before_epoch()
            self.run_epoch()
            self.after_epoch()
        self.after_train()

    def before_train(self) -> None:
        """Resume, open the TensorBoard writer, start the clock."""
        self.start_epoch = self.resume_model_if_exist(self.cfg.RESUME or self.cfg.OUTPUT_DIR)
        self.init_writer(osp.join(self.output_dir, "tensorboard"))
        self.time_start = time.time()

    def before_epoch(self) -> None:
        """Do nothing; for subclasses."""

    def run_epoch(self) -> None:
        """Go through the training images once; log every TRAIN.PRINT_FREQ batches, or all where there are fewer."""
        self.set_model_mode("train")
        losses, batch_time, data_time = MetricMeter(), AverageMeter(), AverageMeter()
        self.num_batches, freq, end = len(self.train_loader_x), self.cfg.TRAIN.PRINT_FREQ, time.time()
        for index, batch in enumerate(self.train_loader_x):
            self.batch_idx, done = index, index + 1
            data_time.update(time.time() - end)
            losses.update(self.forward_backward(batch))
            batch_time.update(time.time() - end)
            if self.num_batches < freq or done % freq == 0:
                left = (self.max_epoch - self.epoch) * self.num_batches - done
                print(
                    f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{done}/{self.num_batches}] "
                    f"time {batch_time.val:.3f} ({batch_time.avg:.3f}) data {data_time.val:.3f} ({data_time.avg:.3f}) "
                    f"{losses} lr {self.get_current_lr():.4e} eta {timedelta(seconds=int(batch_time.avg * left))}"
                )
            values = {**{name: meter.avg for name, meter in losses.meters.items()}, "lr": self.get_current_lr()}
            for name, value in values.items():
                self.write_scalar(f"train/{name}", value, self.epoch * self.num_batches + index)
            end = time.time()

    def after_epoch(self) -> None:
        """Save the model if it is the best so far (FINAL_MODEL best_val) and if a checkpoint is due."""
        validate = self.cfg.TEST.FINAL_MODEL == "best_val" and not self.cfg.TEST.NO_TEST
        if validate and (result := self.test(split="val")) > self.best_result:
            self.best_result = result
            self.save_model(self.epoch, self.output_dir, val_result=result, model_name=_BEST)
        done, freq = self.epoch + 1, self.cfg.TRAIN.CHECKPOINT_FREQ
        if done == self.max_epoch or (freq > 0 and done % freq == 0):
            self.save_model(self.epoch, self.output_dir)

    def after_train(self) -> None:
        """Evaluate the final model, print the time, close the TensorBoard writer."""
        print("Finish training")
        if not self.cfg.TEST.NO_TEST:
            best = self.cfg.TEST.FINAL_MODEL == "best_val"
            print(f"Deploy the {'model with the best val performance' if best else 'last-epoch model'}")
            if best:
                self.load_model(self.output_dir)
            self.test()
        print(f"Elapsed: {timedelta(seconds=round(time.time() - self.time_start))}")
        self.close_writer()

    def detect_anomaly(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss).all():
            raise FloatingPointError("the loss is infinite or NaN")

    def model_zero_grad(self, names=None) -> None:
        for optim in self._each(self._optims, names):
            optim.zero_grad()

    def model_backward(self, loss: torch.Tensor) -> None:
        self.detect_anomaly(loss)
        loss.backward()

    def model_update(self, names=None) -> None:
        for optim in self._each(self._optims, names):
            optim.step()

    def model_backward_and_update(self, loss: torch.Tensor, names=None) -> None:
        """Make an optimization step; FloatingPointError for a loss that is not finite."""
        self.model_zero_grad(names)
        self.model_backward(loss)
        self.model_update(names)

    @torch.no_grad()
    def test(self, split=None) -> float:
        """Evaluate on "val" or "test" (default: TEST.SPLIT; test where there is no val); return the first result."""
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
        return self.model(input)

    def parse_batch_train(self, batch: dict) -> tuple:
        return tuple(batch[key].to(self.device) for key in ("img", "label", "domain"))

    def parse_batch_test(self, batch: dict) -> tuple:
        return batch["img"].to(self.device), batch["label"].to(self.device)


SimpleTrainer = TrainerBase = TrainerX  # separate classes in Dassl
