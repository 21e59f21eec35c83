"""The order of the images in an epoch."""

import random

import numpy as np
from torch.utils.data import RandomSampler, Sampler, SequentialSampler


class RandomClassSampler(Sampler):
    """Batches of ``batch_size // n_ins`` classes with ``n_ins`` images each, until too few classes have images left.

    Draws from Python's ``random``; a class with fewer images is filled up with NumPy's generator. As in Dassl, one
    epoch is drawn at construction, for the length.
    """

    def __init__(self, data_source, batch_size: int, n_ins: int) -> None:
        if n_ins > batch_size:
            raise ValueError(f"{n_ins} images of a class (N_INS) do not fit into a batch of {batch_size}")
        self.n_ins, self.ncls_per_batch = n_ins, batch_size // n_ins
        self.index_dic = {}
        for index, item in enumerate(data_source):
            self.index_dic.setdefault(item.label, []).append(index)
        self.length = sum(1 for _ in self)

    def __iter__(self):
        chunks = {}
        for label, indices in self.index_dic.items():
            if len(indices) < self.n_ins:
                indices = np.random.choice(indices, size=self.n_ins, replace=True)
            indices = [int(index) for index in indices]
            random.shuffle(indices)
            ends = range(self.n_ins, len(indices) + 1, self.n_ins)
            chunks[label] = [indices[end - self.n_ins : end] for end in ends]
        available, epoch = list(chunks), []
        while len(available) >= self.ncls_per_batch:
            for label in random.sample(available, self.ncls_per_batch):
                epoch += chunks[label].pop(0)
                if not chunks[label]:
                    available.remove(label)
        return iter(epoch)

    def __len__(self) -> int:
        return self.length


def build_sampler(sampler_type: str, cfg=None, data_source=None, batch_size=32, n_domain=0, n_ins=16) -> Sampler:
    """Build the sampler named; ``n_domain`` is for Dassl's domain samplers, which are not included."""
    if sampler_type == "RandomClassSampler":
        return RandomClassSampler(data_source, batch_size, n_ins)
    plain = {"RandomSampler": RandomSampler, "SequentialSampler": SequentialSampler}
    if sampler_type not in plain:
        raise ValueError(f"unknown sampler {sampler_type}: choose one of {', '.join(plain)}, RandomClassSampler")
    return plain[sampler_type](data_source)
