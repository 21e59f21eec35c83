"""Seeds, and the states of all random number generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch


def seed_of(key: str) -> int:
    """A seed below 2**32 that depends on ``key`` alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")


def seeded_view(seed: int, index: int, view: int) -> AbstractContextManager[None]:
    """Seed the augmentation of a training image in one of its views or passes."""
    return seeded(seed_of(f"{max(seed, 0)}/{index}/{view}"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every random state that an augmentation may use, and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def random_states() -> dict[str, Any]:
    """The states of all random number generators, as plain types and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    numpy = {"kind": kind, "keys": _signed(keys), "position": int(position)}
    return {
        "python": {"version": version, "numbers": _signed(numbers), "gauss": gauss},
        "numpy": {**numpy, "has_gauss": int(has_gauss), "cached": float(cached)},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: Any) -> None:
    """Restore what :func:`random_states` returned; older checkpoints hold torch's state alone."""
    if isinstance(states, torch.Tensor):
        torch.set_rng_state(states)
        return
    python, numpy = states["python"], states["numpy"]
    numbers, keys = (t.numpy().view(np.uint32) for t in (python["numbers"], numpy["keys"]))
    random.setstate((python["version"], tuple(numbers.tolist()), python["gauss"]))
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _signed(numbers: Any) -> torch.Tensor:
    """Numbers below 2**32 as a tensor; torch 2.0 has no unsigned type of that size."""
    return torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.int32))
