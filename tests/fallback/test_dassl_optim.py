import math
import warnings

import pytest
import torch
from dassl.config import get_cfg_default
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl_toy import rates
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, StepLR


def optim_cfg(**values):
    cfg = get_cfg_default().OPTIM
    cfg.NAME, cfg.LR = "sgd", 0.002
    for key, value in values.items():
        setattr(cfg, key, value)
    return cfg


def build(cfg):
    optimizer = build_optimizer(nn.Linear(2, 2), cfg)
    return optimizer, build_lr_scheduler(optimizer, cfg)


def config_rates(cfg):
    return rates(*build(cfg), cfg.MAX_EPOCH)


SCHEDULES = [
    ("single_step", (-1,), lambda o: StepLR(o, 20, gamma=0.1)),
    ("single_step", (2, 3), lambda o: StepLR(o, 3, gamma=0.1)),
    ("multi_step", [3, 7, 7, 11], lambda o: MultiStepLR(o, [3, 7, 7, 11], gamma=0.1)),
    ("multi_step", (0, 4), lambda o: MultiStepLR(o, [0, 4], gamma=0.1)),
    ("cosine", (-1,), lambda o: CosineAnnealingLR(o, 20)),
]


@pytest.mark.parametrize("name,stepsize,make", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_schedule_follows_torch_after_the_warmup(name, stepsize, make, warmup):
    cfg = optim_cfg(LR_SCHEDULER=name, STEPSIZE=stepsize, MAX_EPOCH=20, WARMUP_EPOCH=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.002)
    after = rates(optimizer, make(optimizer), 20 - warmup)
    linear, constant = [1e-5, 0.002 / 3, 0.004 / 3][:warmup], [2e-5] * warmup
    assert config_rates(cfg) == pytest.approx(linear + after, abs=1e-9, rel=1e-9)
    cfg.WARMUP_TYPE, cfg.WARMUP_CONS_LR = "constant", 2e-5
    assert config_rates(cfg) == pytest.approx(constant + after, abs=1e-9, rel=1e-9)


def test_without_recount_only_the_count_moves_on():
    settings = {"WARMUP_EPOCH": 3, "WARMUP_RECOUNT": False, "MAX_EPOCH": 10}
    used = config_rates(optim_cfg(LR_SCHEDULER="multi_step", STEPSIZE=(2, 5), **settings))
    assert used == pytest.approx([1e-5, 0.002 / 3, 0.004 / 3] + [2e-3] * 2 + [2e-4] * 5)
    shares = [1 + math.cos(math.pi * epoch / 10) for epoch in range(3, 10)]
    used = config_rates(optim_cfg(LR_SCHEDULER="cosine", **settings))
    assert used[3:] == pytest.approx([0.002 * share / shares[0] for share in shares])


def test_schedule_never_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, scheduler = build(optim_cfg(WARMUP_EPOCH=1))
        scheduler.step()  # no optimizer.step() before: a gradient scaler skips the first ones
        scheduler.step(5)
    assert scheduler.last_epoch == 5


@pytest.mark.parametrize("key,value", [("LR_SCHEDULER", "x"), ("WARMUP_TYPE", "x"), ("NAME", "x"), ("STAGED_LR", True)])
def test_unknown_values_are_refused_by_their_key(key, value):
    with pytest.raises(ValueError, match=f"^OPTIM.{key} "):
        build(optim_cfg(**{key: value}))


ADAM = {"betas": (0.7, 0.99), "weight_decay": 0.02}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.1, "weight_decay": 0.02, "nesterov": False}),
    "adam": (torch.optim.Adam, {**ADAM, "amsgrad": False}),
    "amsgrad": (torch.optim.Adam, {**ADAM, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, ADAM),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.8, "alpha": 0.95, "weight_decay": 0.02}),
    "radam": (torch.optim.RAdam, {**ADAM, "decoupled_weight_decay": True}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_their_settings(name):
    cfg = optim_cfg(NAME=name, LR=0.3, WEIGHT_DECAY=0.02, MOMENTUM=0.8, SGD_DAMPNING=0.1, RMSPROP_ALPHA=0.95)
    cfg.ADAM_BETA1, cfg.ADAM_BETA2 = 0.7, 0.99
    optimizer, (kind, values) = build_optimizer(nn.Linear(2, 2), cfg), OPTIMIZERS[name]
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and group["lr"] == 0.3 and {key: group[key] for key in values} == values
    weight, bias = nn.Linear(2, 2).parameters()
    groups = build_optimizer(None, cfg, [{"params": [weight], "lr": 0.7}, {"params": [bias]}]).param_groups
    assert [group["lr"] for group in groups] == [0.7, 0.3]
    assert build_optimizer([weight, bias], cfg).param_groups[0]["params"] == [weight, bias]
