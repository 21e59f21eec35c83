"""Names of classes, images and config keys, as all parts see them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from yacs.config import CfgNode


def clean_name(classname: str) -> str:
    """A class name as it is encoded and drawn: underscores become spaces (CoOp's convention)."""
    return classname.replace("_", " ")


def printable(text: str) -> str:
    """A text on one line, with control characters escaped (``\\n``, ``\\x1b``)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def matching_names(wanted: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each wanted name its position among the known ones, or -1.

    The n-th occurrence of a name matches its n-th occurrence among the known ones. Underscores count as spaces.
    """
    places: dict[str, list[int]] = {}
    for i, name in enumerate(known):
        places.setdefault(clean_name(name), []).append(i)
    seen: dict[str, int] = {}
    rows = []
    for name in map(clean_name, wanted):
        n = seen[name] = seen.get(name, -1) + 1
        there = places.get(name, [])
        rows.append(there[n] if n < len(there) else -1)
    return rows


def relative_path(path: str, root: str) -> str:
    """An image's path relative to the data root, with forward slashes."""
    return os.path.relpath(path, os.path.abspath(os.path.expanduser(root))).replace(os.sep, "/")


def flat_config(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """A config as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat.update(flat_config(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
    return flat


def command_settings(words: Sequence[str], cfg: CfgNode) -> dict[str, Any]:
    """``config_file`` of a command, and as ``overrides`` those of its KEY VALUE pairs that differ from that file."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config-file=") else [word])]
    pairs, values, written = dict(zip(words, words[1:])), flat_config(cfg), {}
    path = pairs.get("--config-file", "")
    with suppress(OSError), open(path, encoding="utf-8") as file:  # it may be gone by now
        written = {key: CfgNode._decode_cfg_value(value) for key, value in flat_config(CfgNode.load_cfg(file)).items()}
    missing = object()
    asked = {key: values[key] for key in pairs if key in values and values[key] != written.get(key, missing)}
    return {"config_file": path, "overrides": asked}
