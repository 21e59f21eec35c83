"""Configuration."""

from yacs.config import CfgNode

from .defaults import DEFAULTS


def get_cfg_default() -> CfgNode:
    """Return a new, unfrozen configuration."""
    return CfgNode(DEFAULTS)


def clean_cfg(cfg: CfgNode, trainer: str) -> None:
    """Remove the nodes of all other trainers from ``cfg.TRAINER``, in place."""
    for unused in set(cfg.TRAINER) - {"NAME", trainer.upper()}:
        del cfg.TRAINER[unused]
