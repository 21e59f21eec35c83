import math

import pytest
import torch
from dassl.config import get_cfg_default
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl_toy import rates
from torch import nn


def optim_cfg(**values):
    cfg = get_cfg_default().OPTIM
    cfg.NAME = "sgd"
    cfg.LR = 0.002
    for key, value in values.items():
        setattr(cfg, key, value)
    return cfg


def build(cfg, model=None):
    optimizer = build_optimizer(model or nn.Linear(2, 2), cfg)
    return optimizer, build_lr_scheduler(optimizer, cfg)


def config_rates(cfg, epochs=None):
    """The learning rate used in each epoch."""
    return rates(*build(cfg), epochs or cfg.MAX_EPOCH)


def test_coop_schedule():
    used = config_rates(optim_cfg(LR_SCHEDULER="cosine", WARMUP_EPOCH=1, WARMUP_TYPE="constant", MAX_EPOCH=50))
    assert used[:4] == pytest.approx([1e-5, 2e-3, 1.998027e-3, 1.992115e-3], rel=1e-6)
    assert used[-2:] == pytest.approx([1.771275e-5, 7.885299e-6], rel=1e-6)
    assert len(used) == 50


def torch_rates(make, epochs):
    """The learning rates of one of torch's own schedulers, which multiplies its way from epoch to epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.002)
    return rates(optimizer, make(optimizer), epochs)


SCHEDULES = [
    ("single_step", (-1,), lambda o: torch.optim.lr_scheduler.StepLR(o, 20, gamma=0.1)),
    ("single_step", (2, 3), lambda o: torch.optim.lr_scheduler.StepLR(o, 3, gamma=0.1)),
    ("multi_step", [3, 7, 7, 11], lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 7, 7, 11], gamma=0.1)),
    ("multi_step", (0, 4), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [0, 4], gamma=0.1)),
    ("cosine", (-1,), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)),
]


@pytest.mark.parametrize("name,stepsize,make", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_schedule_follows_torch_after_a_linear_warmup(name, stepsize, make, warmup):
    cfg = optim_cfg(LR_SCHEDULER=name, STEPSIZE=stepsize, MAX_EPOCH=20, WARMUP_EPOCH=warmup)
    expected = [1e-5, 0.002 / 3, 0.004 / 3][:warmup] if warmup == 3 else [1e-5][:warmup]
    expected += torch_rates(make, 20 - warmup)
    assert config_rates(cfg) == pytest.approx(expected, abs=1e-9, rel=1e-9)


def test_without_recount_only_the_count_moves_on():
    settings = {"WARMUP_EPOCH": 3, "WARMUP_RECOUNT": False, "MAX_EPOCH": 10}
    assert config_rates(optim_cfg(LR_SCHEDULER="multi_step", STEPSIZE=(2, 5), **settings)) == pytest.approx(
        [1e-5, 0.002 / 3, 0.004 / 3] + [2e-3] * 2 + [2e-4] * 5
    )
    cosine = config_rates(optim_cfg(LR_SCHEDULER="cosine", **settings))[3:]
    shares = [1 + math.cos(math.pi * epoch / 10) for epoch in range(3, 10)]
    assert cosine == pytest.approx([0.002 * share / shares[0] for share in shares])


def test_schedule_errors():
    with pytest.raises(ValueError):
        build(optim_cfg(LR_SCHEDULER="exponential"))
    with pytest.raises(ValueError):
        build(optim_cfg(WARMUP_EPOCH=1, WARMUP_TYPE="square"))
    with pytest.raises(TypeError):
        build(optim_cfg(LR_SCHEDULER="single_step", STEPSIZE=(2.5,)))
    with pytest.raises(TypeError):
        build(optim_cfg(LR_SCHEDULER="multi_step", STEPSIZE=3))


@pytest.mark.parametrize(
    "name,kind,values",
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "dampening": 0.1, "weight_decay": 0.02}),
        ("adam", torch.optim.Adam, {"betas": (0.7, 0.99), "amsgrad": False}),
        ("amsgrad", torch.optim.Adam, {"betas": (0.7, 0.99), "amsgrad": True}),
        ("adamw", torch.optim.AdamW, {"betas": (0.7, 0.99), "weight_decay": 0.02}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.8, "alpha": 0.95}),
        ("radam", None, {"betas": (0.7, 0.99), "weight_decay": 0.02}),
    ],
)
def test_optimizers_take_their_settings(name, kind, values):
    cfg = optim_cfg(NAME=name, LR=0.3, WEIGHT_DECAY=0.02, MOMENTUM=0.8, SGD_DAMPNING=0.1, RMSPROP_ALPHA=0.95)
    cfg.ADAM_BETA1, cfg.ADAM_BETA2 = 0.7, 0.99
    optimizer = build_optimizer(nn.Linear(2, 2), cfg)
    (group,) = optimizer.param_groups
    assert kind is None or type(optimizer) is kind
    assert group["lr"] == 0.3 and len(group["params"]) == 2
    assert {key: group[key] for key in values} == values


def test_one_sgd_step_by_hand():
    model = nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    optimizer = build_optimizer(model, optim_cfg(LR=0.5, WEIGHT_DECAY=0.1, MOMENTUM=0.9))
    x = torch.tensor([[1.0, 2.0]])
    velocity, expected = torch.zeros_like(start), start
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        velocity = 0.9 * velocity + x + 0.1 * expected
        expected = expected - 0.5 * velocity
    assert torch.allclose(model.weight, expected)


def test_staged_lr():
    model = nn.Sequential()
    model.add_module("base", nn.Linear(2, 3))
    model.add_module("new", nn.Linear(3, 4))
    for new_layers in ("new", ["new"]):
        cfg = optim_cfg(STAGED_LR=True, NEW_LAYERS=new_layers, BASE_LR_MULT=0.25)
        optimizer, scheduler = build(cfg, model)
        sizes = [[p.numel() for p in group["params"]] for group in optimizer.param_groups]
        assert sizes == [[6, 3], [12, 4]]
        assert [group["lr"] for group in optimizer.param_groups] == [0.0005, 0.002]
        for _ in range(10):
            optimizer.step()
            scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.00005, 0.0002])
    with pytest.raises(TypeError):
        build_optimizer(model.parameters(), optim_cfg(STAGED_LR=True, NEW_LAYERS="new"))


def test_parameters_and_groups_in_place_of_a_model():
    model = nn.Linear(2, 2)
    assert len(build_optimizer(model.parameters(), optim_cfg()).param_groups[0]["params"]) == 2
    groups = [{"params": [model.weight], "lr": 0.7}, {"params": [model.bias]}]
    assert [g["lr"] for g in build_optimizer(None, optim_cfg(), groups).param_groups] == [0.7, 0.002]
    groups = [{"params": [model.weight], "lr": 0.7}]
    with pytest.warns(UserWarning):
        optimizer = build_optimizer(model, optim_cfg(STAGED_LR=True), groups)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError):
        build_optimizer(model, optim_cfg(NAME="lion"))
