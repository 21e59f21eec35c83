"""The backbone that a config names, in the precision that it asks for, and the preprocessing that goes with it."""

from __future__ import annotations

import re
from contextlib import suppress

import torch
from dassl.config import get_cfg_default
from yacs.config import CfgNode

from .backbone import Backbone, load_clip, preprocessing
from .errors import UserError


def adopt_preprocessing(cfg: CfgNode) -> None:
    """Set those of ``INPUT.SIZE``, ``PIXEL_MEAN`` and ``PIXEL_STD`` that have Dassl's defaults to the backbone's."""
    default, backbone, frozen = get_cfg_default().INPUT, cfg.MODEL.BACKBONE, cfg.is_frozen()
    cfg.defrost()
    for key, value in preprocessing(backbone.NAME, backbone.WEIGHTS).items():
        if tuple(cfg.INPUT[key]) == tuple(default[key]) != value:
            cfg.INPUT[key] = type(default[key])(value)
            print(f"INPUT.{key}: {value}, as {backbone.NAME} needs")
    if frozen:
        cfg.freeze()


def load_backbone(cfg: CfgNode, prec: str, device: torch.device) -> tuple[Backbone, str]:
    """CLIP on the device, frozen, and the precision that it computes in; "clip" is fp16 on a GPU, fp32 on a CPU.

    Raises UserError where images would have another size or normalisation than in the backbone's pre-training.
    """
    name = cfg.MODEL.BACKBONE.NAME
    print(f"Loading CLIP (backbone: {name})")
    backbone = load_clip(name, quick_gelu=cfg.MODEL.BACKBONE.QUICK_GELU, weights=cfg.MODEL.BACKBONE.WEIGHTS)
    size = backbone.input_resolution
    if tuple(cfg.INPUT.SIZE) != (size, size):
        raise UserError(f"INPUT.SIZE {tuple(cfg.INPUT.SIZE)}: {name} takes images of ({size}, {size}) pixels")
    if "normalize" not in cfg.INPUT.TRANSFORMS:
        raise UserError("INPUT.TRANSFORMS lacks normalize, which the backbone was trained with: add it")
    for key, needed in (("PIXEL_MEAN", backbone.pixel_mean), ("PIXEL_STD", backbone.pixel_std)):
        if any(abs(a - b) > 1e-3 for a, b in zip(cfg.INPUT[key], needed)):
            raise UserError(f"INPUT.{key} {tuple(cfg.INPUT[key])}: {backbone.name} needs {needed}")
    if prec == "clip":
        prec = "fp16" if device.type == "cuda" else "fp32"
    if device.type == "cpu" and (prec in ("fp16", "amp") or (prec == "bf16" and not cpu_has_bfloat16())):
        needed = "a CPU with bfloat16 instructions" if prec == "bf16" else "a GPU"
        print(f"PREC {prec} needs {needed}: computing in float32 on the CPU")
        prec = "fp32"
    if prec in ("fp16", "bf16"):
        backbone.cast_weights(torch.float16 if prec == "fp16" else torch.bfloat16)
    if cfg.TRAIN.COMPILE:
        backbone.visual.compile()
    return backbone.to(device), prec


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them bfloat16 is slower than float32."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", file.read()) is not None
    return False
