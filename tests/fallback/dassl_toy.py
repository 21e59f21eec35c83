"""A data set of a few generated images and a linear model, for the tests of the training loop."""

import os
from itertools import product

import numpy as np
import torch
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from PIL import Image
from torch.nn import functional as F

SIDE, CLASSES = 8, ("red", "green", "blue")
COUNTS = {"train": 4, "val": 2, "test": 3}  # images of each class


def write_images(root):
    """Write noise with one stronger colour channel to root/<split>/<label>_<number>.png."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        os.makedirs(os.path.join(root, split))
        for label, number in product(range(len(CLASSES)), range(count)):
            pixels = rng.integers(0, 150, (SIDE, SIDE, 3), dtype=np.uint8)
            pixels[..., label] += 60
            Image.fromarray(pixels).save(os.path.join(root, split, f"{label}_{number}.png"))


def read_split(root, split):
    """List the images of a split in the order of their names."""
    names = sorted(os.listdir(os.path.join(root, split)))
    return [Datum(os.path.join(root, split, name), int(name[0]), 0, CLASSES[int(name[0])]) for name in names]


@DATASET_REGISTRY.register(force=True)
class ToyImages(DatasetBase):
    """The images of ``write_images``; DATASET.VAL_PERCENT 0 leaves out the val split."""

    def __init__(self, cfg):
        root = cfg.DATASET.ROOT
        val = read_split(root, "val") if cfg.DATASET.VAL_PERCENT > 0 else None
        super().__init__(train_x=read_split(root, "train"), val=val, test=read_split(root, "test"))


@TRAINER_REGISTRY.register(force=True)
class ToyTrainer(TrainerX):
    """A linear classifier that starts from zero; ``lrs`` records the learning rate of every batch."""

    def build_model(self):
        self.lrs = []
        self.model = torch.nn.Linear(3 * SIDE * SIDE, self.num_classes).to(self.device)
        self.model.load_state_dict({key: torch.zeros_like(value) for key, value in self.model.state_dict().items()})
        self.optim = build_optimizer(self.model, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("linear", self.model, self.optim, self.sched)

    def model_inference(self, input):
        return self.model(input.flatten(1))

    def forward_backward(self, batch):
        image, label, _ = self.parse_batch_train(batch)
        self.lrs.append(self.get_current_lr())
        output = self.model_inference(image)
        loss = F.cross_entropy(output, label)
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), "acc": compute_accuracy(output, label)[0].item()}


def toy_cfg(folder, *options):
    """A configuration for ToyTrainer with images in folder/images, output in folder/out and the given options."""
    root = os.path.join(str(folder), "images")
    if not os.path.exists(root):
        write_images(root)
    cfg = get_cfg_default()
    cfg.USE_CUDA, cfg.OUTPUT_DIR, cfg.TRAINER.NAME = False, os.path.join(str(folder), "out"), "ToyTrainer"
    cfg.INPUT.SIZE, cfg.INPUT.TRANSFORMS = (SIDE, SIDE), ("normalize",)
    cfg.DATASET.ROOT, cfg.DATASET.NAME = root, "ToyImages"
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.TEST.BATCH_SIZE = 0, 4
    cfg.DATALOADER.TRAIN_X.SAMPLER, cfg.DATALOADER.TRAIN_X.BATCH_SIZE = "SequentialSampler", 5
    cfg.OPTIM.NAME, cfg.OPTIM.LR, cfg.OPTIM.LR_SCHEDULER, cfg.OPTIM.MAX_EPOCH = "sgd", 0.01, "cosine", 5
    cfg.TRAIN.CHECKPOINT_FREQ = 1
    cfg.merge_from_list(list(options))
    return cfg


def rates(optimizer, scheduler, epochs):
    """The learning rates that an optimizer under a schedule uses in the next epochs."""
    used = []
    for _ in range(epochs):
        used.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == [used[-1]]
        optimizer.step()
        scheduler.step()
    return used
