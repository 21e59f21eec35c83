import torch
from torch import nn

AVAI_OPTIMS = ["adam", "adamw", "amsgrad", "radam", "rmsprop", "sgd"]


def build_optimizer(model, optim_cfg, param_groups=None) -> torch.optim.Optimizer:
    """Build the optimizer of the OPTIM node for ``param_groups``, else for ``model``, a module or its parameters."""
    cfg, name = optim_cfg, optim_cfg.NAME
    if name not in AVAI_OPTIMS:
        raise ValueError(f"OPTIM.NAME must be one of {AVAI_OPTIMS}, not {name}")
    if cfg.STAGED_LR:
        raise ValueError("OPTIM.STAGED_LR True needs Dassl.pytorch; pass param_groups with their own lr instead")
    params = model.parameters() if isinstance(model, nn.Module) else model
    params = params if param_groups is None else param_groups
    common = {"lr": cfg.LR, "weight_decay": cfg.WEIGHT_DECAY}
    if name == "sgd":
        extra = {"momentum": cfg.MOMENTUM, "dampening": cfg.SGD_DAMPNING, "nesterov": cfg.SGD_NESTEROV}
        return torch.optim.SGD(params, **extra, **common)
    if name == "rmsprop":
        return torch.optim.RMSprop(params, momentum=cfg.MOMENTUM, alpha=cfg.RMSPROP_ALPHA, **common)
    common["betas"] = (cfg.ADAM_BETA1, cfg.ADAM_BETA2)
    if name == "radam":  # Dassl's decays the weights directly, torch's on request (torch >= 2.1)
        return torch.optim.RAdam(params, decoupled_weight_decay=True, **common)
    if name == "adamw":
        return torch.optim.AdamW(params, **common)
    return torch.optim.Adam(params, amsgrad=name == "amsgrad", **common)
