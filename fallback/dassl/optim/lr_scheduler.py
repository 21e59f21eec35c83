"""Learning-rate schedules counted in epochs, with an optional warm-up."""

import math

from torch.optim.lr_scheduler import LRScheduler

AVAI_SCHEDS = ["cosine", "multi_step", "single_step"]


class EpochScheduler(LRScheduler):
    """Sets each learning rate to ``rate(epoch, base learning rate)``; unlike torch's schedules it never warns."""

    def __init__(self, optimizer, rate) -> None:
        self._rate = rate
        super().__init__(optimizer)  # calls step(), which sets the learning rates of epoch 0

    def step(self, epoch=None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._last_lr = [self._rate(self.last_epoch, base) for base in self.base_lrs]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr):
            group["lr"] = lr

    def state_dict(self) -> dict:
        """Return plain numbers and lists: checkpoints must load with ``weights_only=True``."""
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs), "_last_lr": list(self._last_lr)}


def build_lr_scheduler(optimizer, optim_cfg) -> EpochScheduler:
    """Build the schedule of the OPTIM node; call ``step()`` after each epoch."""
    cfg, name, kind = optim_cfg, optim_cfg.LR_SCHEDULER, optim_cfg.WARMUP_TYPE
    if name not in AVAI_SCHEDS:
        raise ValueError(f"OPTIM.LR_SCHEDULER must be one of {AVAI_SCHEDS}, not {name}")
    if kind not in ("constant", "linear"):
        raise ValueError(f"OPTIM.WARMUP_TYPE must be constant or linear, not {kind}")

    def factor(count: int) -> float:
        if name == "cosine":
            return (1.0 + math.cos(math.pi * count / cfg.MAX_EPOCH)) / 2.0
        if name == "multi_step":
            return cfg.GAMMA ** sum(0 <= epoch <= count for epoch in cfg.STEPSIZE)
        period = cfg.STEPSIZE[-1] if cfg.STEPSIZE[-1] > 0 else cfg.MAX_EPOCH
        return cfg.GAMMA ** (count // period)

    warmup = max(cfg.WARMUP_EPOCH, 0)
    start = 0 if cfg.WARMUP_RECOUNT else warmup
    # Without RECOUNT Dassl only moves the count: the first epoch after the warm-up still has the rate of count 0.
    scale = factor(0) / factor(start) if factor(start) else 0.0  # a cosine moved to its very end has no epochs left

    def rate(epoch: int, base: float) -> float:
        if epoch >= warmup:
            return base * scale * factor(start + epoch - warmup)
        if kind == "constant":
            return cfg.WARMUP_CONS_LR
        return cfg.WARMUP_MIN_LR if epoch == 0 else base * epoch / warmup

    return EpochScheduler(optimizer, rate)
