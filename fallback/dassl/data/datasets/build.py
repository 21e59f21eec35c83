"""The registry of data sets."""

from __future__ import annotations

from typing import Any

from ...utils import Registry, check_availability

__all__ = ["DATASET_REGISTRY", "build_dataset"]

DATASET_REGISTRY = Registry("DATASET")


def build_dataset(cfg: Any) -> Any:
    """Return the data set cfg.DATASET.NAME, built with ``cfg``; ValueError where none is registered by that name."""
    name = cfg.DATASET.NAME
    check_availability(name, DATASET_REGISTRY.registered_names())
    if cfg.VERBOSE:
        print(f"Loading dataset: {name}")
    dataset_class = DATASET_REGISTRY.get(name)
    return dataset_class(cfg)
