"""Optimisers chosen by the configuration."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["AVAI_OPTIMS", "build_optimizer"]

AVAI_OPTIMS = ["adam", "adamw", "amsgrad", "radam", "rmsprop", "sgd"]


def _staged_groups(model: Any, optim_cfg: Any) -> list[dict[str, Any]]:
    """Split the children of ``model`` into those that learn at LR * BASE_LR_MULT and the NEW_LAYERS, at LR."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"OPTIM.STAGED_LR needs an nn.Module, not {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        model = model.module
    named = optim_cfg.NEW_LAYERS
    new_layers = {named} - {""} if isinstance(named, str) else set(named)
    if not new_layers:
        warnings.warn("OPTIM.NEW_LAYERS is empty, so OPTIM.STAGED_LR only scales the learning rate", stacklevel=3)
    base: list[nn.Parameter] = []
    new: list[nn.Parameter] = []
    for name, child in model.named_children():
        (new if name in new_layers else base).extend(child.parameters())
    return [{"params": base, "lr": optim_cfg.LR * optim_cfg.BASE_LR_MULT}, {"params": new}]


def _radam(params: Any, **settings: Any) -> torch.optim.Optimizer:
    # Dassl's own RAdam shrinks the weights directly; torch's does so on request since 2.1 (2.0 adds to the gradient)
    if "decoupled_weight_decay" in inspect.signature(torch.optim.RAdam).parameters:
        settings["decoupled_weight_decay"] = True
    return torch.optim.RAdam(params, **settings)


def build_optimizer(
    model: nn.Module | Iterable[Any], optim_cfg: Any, param_groups: Iterable[Any] | None = None
) -> torch.optim.Optimizer:
    """Build the optimiser ``optim_cfg`` (the OPTIM node) describes.

    Args:
        model: a module, or an iterable of parameters or parameter groups.
        param_groups: optimise these and ignore ``model``; then STAGED_LR has no effect, which gives a warning.

    Raises:
        ValueError: OPTIM.NAME is not one of AVAI_OPTIMS.
        TypeError: OPTIM.STAGED_LR with a ``model`` that is not a module.
    """
    name = optim_cfg.NAME
    if name not in AVAI_OPTIMS:
        raise ValueError(f"OPTIM.NAME must be one of {AVAI_OPTIMS}, not {name}")

    if param_groups is not None:
        params = param_groups
        if optim_cfg.STAGED_LR:
            warnings.warn("OPTIM.STAGED_LR has no effect on explicit param_groups; set their lr yourself", stacklevel=2)
    elif optim_cfg.STAGED_LR:
        params = _staged_groups(model, optim_cfg)
    else:
        params = model.parameters() if isinstance(model, nn.Module) else model

    common = {"lr": optim_cfg.LR, "weight_decay": optim_cfg.WEIGHT_DECAY}
    if name == "sgd":
        return torch.optim.SGD(
            params,
            momentum=optim_cfg.MOMENTUM,
            dampening=optim_cfg.SGD_DAMPNING,
            nesterov=optim_cfg.SGD_NESTEROV,
            **common,
        )
    if name == "rmsprop":
        return torch.optim.RMSprop(params, momentum=optim_cfg.MOMENTUM, alpha=optim_cfg.RMSPROP_ALPHA, **common)
    common["betas"] = (optim_cfg.ADAM_BETA1, optim_cfg.ADAM_BETA2)
    if name == "radam":
        return _radam(params, **common)
    if name == "adamw":
        return torch.optim.AdamW(params, **common)
    return torch.optim.Adam(params, amsgrad=name == "amsgrad", **common)
