"""Files, images, seeds, logging, averages and registries."""

import json
import os
import random
import sys
import time
import warnings
import weakref
from collections import defaultdict
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import cache

import numpy as np
import PIL
import torch
from PIL import Image


def mkdir_if_missing(dirname: str) -> None:
    os.makedirs(dirname or ".", exist_ok=True)


def check_isfile(fpath: str) -> bool:
    """Return whether ``fpath`` is a file; warn where it is not."""
    if not (found := os.path.isfile(fpath)):
        warnings.warn(f'No file found at "{fpath}"', stacklevel=2)
    return found


def listdir_nohidden(path: str, sort: bool = False) -> list:
    return [name for name in (sorted if sort else list)(os.listdir(path)) if name[0] != "."]


@contextmanager
def atomic_write(fpath: str, mode: str = "wb"):
    """Open a temporary file that replaces ``fpath`` when it is complete and on the disk; errors change nothing."""
    partial = f"{fpath}.{os.getpid()}.tmp"  # not mkstemp, which ignores the umask
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, fpath)
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial)


def read_json(fpath: str):
    with open(fpath, encoding="utf-8") as stream:
        return json.load(stream)


def write_json(obj, fpath: str) -> None:
    """Write a JSON file, atomically, and the folders above it."""
    mkdir_if_missing(os.path.dirname(fpath))
    with atomic_write(fpath, "w") as stream:
        json.dump(obj, stream, indent=4, separators=(",", ": "))


def read_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def set_random_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (CPU and GPUs)."""
    for seeder in (random.seed, np.random.seed, torch.manual_seed, torch.cuda.manual_seed_all):
        seeder(seed)


@cache  # takes a second
def collect_env_info() -> str:
    """Return PyTorch's report on the system, and Pillow's version."""
    from torch.utils.collect_env import get_pretty_env_info  # slow to import

    return f"{get_pretty_env_info()}\n        Pillow ({PIL.__version__})"


def check_availability(requested, available) -> None:
    """Raise a ValueError with the most similar name unless ``requested`` is in ``available``."""
    if requested not in available:
        nearest = "".join(get_close_matches(requested, available, n=1, cutoff=0))
        raise ValueError(f"[{requested}] is not one of {list(available)} (do you mean [{nearest}]?)")


class Registry:
    """Maps names to classes or functions; ``@REGISTRY.register()`` adds one."""

    def __init__(self, name: str) -> None:
        self._name, self._obj_map = name, {}

    def register(self, obj=None, force: bool = False):
        """Add ``obj``, or return a decorator that does. KeyError where the name is taken, unless ``force``."""
        if obj is None:
            return lambda decorated: self.register(decorated, force)
        if obj.__name__ in self._obj_map and not force:
            raise KeyError(f"{obj.__name__} is already in the {self._name} registry")
        self._obj_map[obj.__name__] = obj
        return obj

    def get(self, name: str):
        return self._obj_map[name]

    def registered_names(self) -> list:
        return list(self._obj_map)

    def build(self, name: str, cfg, **kwargs):
        """Call the object registered as ``name`` with ``cfg``; ValueError for an unknown name."""
        check_availability(name, self.registered_names())
        if cfg.VERBOSE:
            print(f"Loading {self._name.lower()}: {name}")
        return self.get(name)(cfg, **kwargs)


class AverageMeter:
    """The latest value ``val``, weighted ``sum``, ``count`` and average ``avg``."""

    def __init__(self) -> None:
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val, n: int = 1) -> None:
        self.val = float(val)
        self.sum += n * self.val
        self.count += n
        self.avg = self.sum / self.count


class MetricMeter:
    """An AverageMeter for each name; ``str()`` gives ``name val (avg)`` for all."""

    def __init__(self, delimiter: str = " ") -> None:
        self.delimiter, self.meters = delimiter, defaultdict(AverageMeter)

    def update(self, input_dict) -> None:
        for key, value in (input_dict or {}).items():
            self.meters[key].update(value)

    def __str__(self) -> str:
        return self.delimiter.join(f"{key} {meter.val:.4f} ({meter.avg:.4f})" for key, meter in self.meters.items())


class Logger:
    """Replaces ``sys.stdout`` and also writes to the file ``fpath``; everything else is up to the real stdout."""

    def __init__(self, fpath: str) -> None:
        mkdir_if_missing(os.path.dirname(fpath))
        self.console, self.fpath = sys.stdout, fpath
        self.file = open(fpath, "wb", buffering=0)  # noqa: SIM115 (unbuffered: the log of a killed run is complete)
        weakref.finalize(self, self.file.close)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["console"], name)

    def write(self, msg: str) -> int:
        """Write to both; an OSError (disk full) names the log file and ends it."""
        if not self.file.closed:
            try:
                self.file.write(msg.encode("utf-8", "backslashreplace"))
            except OSError as error:
                self.close()
                raise type(error)(error.errno, error.strerror, self.fpath) from error
        return self.console.write(msg)

    def close(self) -> None:
        self.file.close()


def setup_logger(output=None) -> None:
    """Copy stdout to a .txt or .log file, or to log.txt in a folder; an existing log is not overwritten."""
    if output is not None:
        fpath = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
        sys.stdout = Logger(fpath + time.strftime("-%Y-%m-%d-%H-%M-%S") if os.path.exists(fpath) else fpath)
