"""The registry of trainers."""

from __future__ import annotations

from typing import Any

from ..utils import Registry, check_availability

__all__ = ["TRAINER_REGISTRY", "build_trainer"]

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg: Any) -> Any:
    """Return the trainer cfg.TRAINER.NAME, built with ``cfg``; ValueError where none is registered by that name."""
    name = cfg.TRAINER.NAME
    check_availability(name, TRAINER_REGISTRY.registered_names())
    if cfg.VERBOSE:
        print(f"Loading trainer: {name}")
    trainer_class = TRAINER_REGISTRY.get(name)
    return trainer_class(cfg)
