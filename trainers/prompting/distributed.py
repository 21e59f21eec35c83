"""One run on several processes, which ``torchrun`` starts: ``torchrun --standalone --nproc_per_node 4 train.py …``

Every process holds the whole model and the same random states, and works on its share of the same batches. Sums over
the processes then are those of one process. Without torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from .random_states import random_states, set_random_states

# Processes wait for each other, for example while one of them reads a large data set. NCCL gives up after ten minutes.
PATIENCE = timedelta(hours=12)

_joined = False


class ProcessLost(SystemExit):
    """Another process of the run ended, so this one cannot go on."""

    def __init__(self) -> None:
        super().__init__(1)
        self.reason = "another process of this run ended"


@dataclass(frozen=True)
class Share:
    """The rows of a batch that a process works on. One without rows takes a row of another process, with weight 0."""

    start: int
    stop: int
    total: int  # images in the batch
    weight: float  # fraction of the batch; over all processes these add up to 1

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def start(cuda: bool) -> None:
    """Join the other processes, on a GPU of its own each; silence stdout of all but the first. May be called again."""
    global _joined
    if _joined or not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return
    _joined = True
    cuda = cuda and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    shared = cuda and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()  # NCCL needs a GPU per process
    backend, (store, number, count) = "nccl" if cuda and not shared else "gloo", _rendezvous()
    store = dist.PrefixStore("run", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        shown = tqdm.__init__
        tqdm.__init__ = lambda self, *args, **options: shown(self, *args, **{**options, "disable": True})
    share_random_states()


@cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """torchrun's store, which outlives the processes; rank and number of processes."""
    return next(dist.rendezvous("env://"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def share(total: int, number: Optional[int] = None, count: Optional[int] = None) -> Share:
    """What process ``number`` of ``count`` (default: this one) does of a batch: contiguous rows, as equal as can be."""
    number, count = rank() if number is None else number, count or processes()
    first, last = total * number // count, total * (number + 1) // count
    if first == last:
        return Share(0, 1, total, 0.0)
    return Share(first, last, total, (last - first) / total)


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place."""
    if processes() > 1 and (tensors := list(tensors)):
        flat = torch.cat([t.detach().flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])
        with _others():
            dist.all_reduce(flat)
        for t, values in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.detach().copy_(values.view_as(t))


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    values = [value] * processes()
    if processes() > 1:
        with _others():
            dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all processes are here."""
    gather(None)


def summed(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars summed over all processes, by name."""
    copies = {name: value.detach().clone() for name, value in values.items()}
    sum_over_processes(copies.values())
    return copies


def share_random_states() -> None:
    """Continue with the first process's random states in all of them."""
    if processes() > 1:
        set_random_states(gather(random_states())[0])


def copy_from_main(module: nn.Module) -> None:
    """Give the module of every process the first one's parameters and buffers, so that they never drift apart."""
    if processes() > 1:
        for tensor in module.state_dict().values():
            if tensor.numel():
                with _others():
                    dist.broadcast(tensor, src=0)


def part(items: Sequence[Any]) -> Sequence[Any]:
    """This process's items, possibly none; those of all processes, in their order, are all items."""
    return items[len(items) * rank() // processes() : len(items) * (rank() + 1) // processes()]


@contextmanager
def main_first() -> Iterator[None]:
    """Let the first process do something before the others, such as drawing samples and writing them to a file."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def claim(what: str) -> bool:
    """Whether this is the first process of the run to ask; for what only one of them should do when the run ends."""
    if not dist.is_torchelastic_launched():
        return True
    try:
        return _rendezvous()[0].add(f"claimed/{what}", 1) == 1
    except RuntimeError:  # torchrun is gone too
        return is_main()


@contextmanager
def _others() -> Iterator[None]:
    """Raise ProcessLost where another process does not answer."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ProcessLost from error
