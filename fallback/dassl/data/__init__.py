"""Data sets, samplers, transforms and loaders."""

from .data_manager import DataManager, DatasetWrapper  # noqa: F401
