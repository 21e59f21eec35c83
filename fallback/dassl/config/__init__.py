"""Configuration: ``get_cfg_default`` and ``clean_cfg``."""

from __future__ import annotations

from yacs.config import CfgNode

from .defaults import DEFAULTS

__all__ = ["clean_cfg", "get_cfg_default"]


def get_cfg_default() -> CfgNode:
    """Return a fresh, unfrozen configuration holding every default; callers may change it freely."""
    return CfgNode(DEFAULTS)


def clean_cfg(cfg: CfgNode, trainer: str) -> None:
    """Drop from ``cfg.TRAINER``, in place, the settings of every trainer except ``trainer`` (``NAME`` stays).

    The name is compared in upper case, as the nodes are named; the point is a shorter ``print(cfg)``.
    """
    keep = {"NAME", trainer.upper()}
    for unused in set(cfg.TRAINER) - keep:
        del cfg.TRAINER[unused]
