"""Orders in which a loader goes through the images of an epoch.

The samplers of this module draw from Python's ``random`` (and, where a class has too few images, NumPy's global
generator), and draw one whole epoch when they are made, to know their length. Both are part of what a fixed seed
reproduces.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

__all__ = [
    "RandomClassSampler",
    "RandomDomainSampler",
    "RandomSampler",
    "SeqDomainSampler",
    "SequentialSampler",
    "build_sampler",
]


def _positions(data_source: Sequence[Any], attribute: str) -> dict[Any, list[int]]:
    """Return the indices of the items with each value of ``attribute``, values in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for index, item in enumerate(data_source):
        groups.setdefault(getattr(item, attribute), []).append(index)
    return groups


class _ListSampler(Sampler):
    """A sampler whose epoch is one list, drawn by ``draw_epoch()``."""

    def draw_epoch(self) -> list[int]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw_epoch())

    def __len__(self) -> int:
        return self.length


class _DomainSampler(_ListSampler):
    """Batches with the same number of images from each of ``n_domain`` domains.

    An epoch ends after the first round that leaves one of its domains with too few images for another.
    """

    def __init__(self, data_source: Sequence[Any], batch_size: int, n_domain: int, domains: list, groups: dict) -> None:
        if batch_size % n_domain:
            raise ValueError(f"the batch size {batch_size} is not a multiple of the {n_domain} domains in a batch")
        self.data_source = data_source
        self.batch_size = batch_size
        self.domain_dict = groups
        self.domains = domains
        self.n_domain = n_domain
        self.n_img_per_domain = batch_size // n_domain
        self.length = len(self.draw_epoch())

    def domains_of_batch(self) -> list:
        raise NotImplementedError

    def draw_epoch(self) -> list[int]:
        left = dict(self.domain_dict)
        epoch: list[int] = []
        exhausted = False
        while not exhausted:
            for domain in self.domains_of_batch():
                drawn = random.sample(left[domain], self.n_img_per_domain)
                epoch += drawn
                used = set(drawn)
                # what is left keeps its order, on which the next draw depends
                left[domain] = [index for index in left[domain] if index not in used]
                exhausted = exhausted or len(left[domain]) < self.n_img_per_domain
        return epoch


class RandomDomainSampler(_DomainSampler):
    """Batches from ``n_domain`` domains chosen at random for each (None or below 1: all of them, in random order)."""

    def __init__(self, data_source: Sequence[Any], batch_size: int, n_domain: int | None) -> None:
        groups = _positions(data_source, "domain")
        if n_domain is None or n_domain < 1:
            n_domain = len(groups)
        super().__init__(data_source, batch_size, n_domain, list(groups), groups)

    def domains_of_batch(self) -> list:
        return random.sample(self.domains, self.n_domain)


class SeqDomainSampler(_DomainSampler):
    """Batches from all domains, always in the order of their labels."""

    def __init__(self, data_source: Sequence[Any], batch_size: int) -> None:
        groups = _positions(data_source, "domain")
        super().__init__(data_source, batch_size, len(groups), sorted(groups), groups)

    def domains_of_batch(self) -> list:
        return self.domains


class RandomClassSampler(_ListSampler):
    """Batches of ``batch_size // n_ins`` classes with ``n_ins`` images of each.

    A class with fewer images is filled up by drawing with replacement. An epoch ends when too few classes with images
    are left for another batch.

    Raises:
        ValueError: ``n_ins`` is larger than the batch, or there are fewer classes than a batch needs.
    """

    def __init__(self, data_source: Sequence[Any], batch_size: int, n_ins: int) -> None:
        if n_ins > batch_size:
            raise ValueError(f"{n_ins} images of a class (N_INS) do not fit into a batch of {batch_size}")
        self.data_source = data_source
        self.batch_size = batch_size
        self.n_ins = n_ins
        self.ncls_per_batch = batch_size // n_ins
        self.index_dic = _positions(data_source, "label")
        self.labels = list(self.index_dic)
        if len(self.labels) < self.ncls_per_batch:
            raise ValueError(f"a batch needs {self.ncls_per_batch} classes, but there are {len(self.labels)}")
        self.length = len(self.draw_epoch())

    def _chunks(self, indices: list[int]) -> list[list[int]]:
        """Shuffle the indices of one class and cut them into full chunks of ``n_ins``."""
        if len(indices) < self.n_ins:
            indices = np.random.choice(indices, size=self.n_ins, replace=True).tolist()
        else:
            indices = list(indices)
        random.shuffle(indices)
        full = len(indices) - len(indices) % self.n_ins
        return [indices[at : at + self.n_ins] for at in range(0, full, self.n_ins)]

    def draw_epoch(self) -> list[int]:
        queues = {label: iter(self._chunks(indices)) for label, indices in self.index_dic.items()}
        ahead = {label: next(queue) for label, queue in queues.items()}  # the chunk each class gives next
        available = list(self.labels)
        epoch: list[int] = []
        while len(available) >= self.ncls_per_batch:
            for label in random.sample(available, self.ncls_per_batch):
                epoch += ahead[label]
                ahead[label] = next(queues[label], None)
                if ahead[label] is None:
                    available.remove(label)
        return epoch


def build_sampler(
    sampler_type: str,
    cfg: Any = None,
    data_source: Sequence[Any] | None = None,
    batch_size: int = 32,
    n_domain: int = 0,
    n_ins: int = 16,
) -> Sampler:
    """Return the sampler named ``sampler_type`` over ``data_source``; ValueError for an unknown name."""
    builders = {
        "RandomSampler": lambda: RandomSampler(data_source),
        "SequentialSampler": lambda: SequentialSampler(data_source),
        "RandomDomainSampler": lambda: RandomDomainSampler(data_source, batch_size, n_domain),
        "SeqDomainSampler": lambda: SeqDomainSampler(data_source, batch_size),
        "RandomClassSampler": lambda: RandomClassSampler(data_source, batch_size, n_ins),
    }
    if sampler_type not in builders:
        raise ValueError(f"unknown sampler {sampler_type}; there are {', '.join(builders)}")
    return builders[sampler_type]()
