"""A table of named classes or functions."""

from __future__ import annotations

from typing import Any, Callable

__all__ = ["Registry"]


class Registry:
    """Maps the ``__name__`` of classes or functions to themselves, so that a configuration can choose by name.

    ``@REGISTRY.register()`` in front of a class, or ``REGISTRY.register(cls)``, enters it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._obj_map: dict[str, Any] = {}

    def register(self, obj: Any = None, force: bool = False) -> Any:
        """Enter ``obj`` (or return a decorator that does).

        Raises:
            KeyError: the name is taken and ``force`` is False.
        """
        if obj is None:
            return self._decorator(force)
        key = obj.__name__
        if not force and key in self._obj_map:
            raise KeyError(f"{key} is already in the {self._name} registry")
        self._obj_map[key] = obj
        return obj

    def _decorator(self, force: bool) -> Callable[[Any], Any]:
        return lambda obj: self.register(obj, force=force)

    def get(self, name: str) -> Any:
        """Return what was entered as ``name``; KeyError where nothing was."""
        try:
            return self._obj_map[name]
        except KeyError:
            raise KeyError(f"{name} is not in the {self._name} registry") from None

    def registered_names(self) -> list[str]:
        """Return the names in the order they were entered."""
        return list(self._obj_map)
