"""The registry of evaluators."""

from __future__ import annotations

from typing import Any

from ..utils import Registry, check_availability

__all__ = ["EVALUATOR_REGISTRY", "build_evaluator"]

EVALUATOR_REGISTRY = Registry("EVALUATOR")


def build_evaluator(cfg: Any, **kwargs: Any) -> Any:
    """Return the evaluator cfg.TEST.EVALUATOR, built with ``cfg`` and ``kwargs``; ValueError for an unknown name."""
    name = cfg.TEST.EVALUATOR
    check_availability(name, EVALUATOR_REGISTRY.registered_names())
    if cfg.VERBOSE:
        print(f"Loading evaluator: {name}")
    evaluator_class = EVALUATOR_REGISTRY.get(name)
    return evaluator_class(cfg, **kwargs)
