"""Configuration."""

from yacs.config import CfgNode

from .defaults import DEFAULTS


def get_cfg_default() -> CfgNode:
    """Return a new, unfrozen configuration."""
    return CfgNode(DEFAULTS)
