"""Images with labels, data sets made of them, and the registry of data sets."""

import random
from operator import attrgetter

from ...utils import Registry

DATASET_REGISTRY = Registry("DATASET")


def build_dataset(cfg):
    return DATASET_REGISTRY.build(cfg.DATASET.NAME, cfg)


class Datum:
    """One image, read-only; its file is not checked: for ImageNet that would take 1.28 million calls at every start."""

    def __init__(self, impath: str = "", label: int = 0, domain: int = 0, classname: str = "") -> None:
        self._impath, self._label, self._domain, self._classname = impath, label, domain, classname

    impath, label = property(attrgetter("_impath")), property(attrgetter("_label"))
    domain, classname = property(attrgetter("_domain")), property(attrgetter("_classname"))


class DatasetBase:
    """The splits of a data set, as lists of :class:`Datum` (or None); ``train_x`` also defines the classes."""

    def __init__(self, train_x=None, train_u=None, val=None, test=None) -> None:
        if not train_x:
            raise ValueError("the train_x split has no images")
        self.train_x, self.train_u, self.val, self.test = train_x, train_u, val, test
        self.num_classes = 1 + max(item.label for item in train_x)
        self.lab2cname = dict(sorted({(item.label, item.classname) for item in train_x}))
        self.classnames = list(self.lab2cname.values())

    def generate_fewshot_dataset(self, *data_sources, num_shots: int = -1, repeat: bool = False):
        """Draw from each class (all if ``num_shots`` < 1) with ``random``; ``repeat``: with replacement if too few."""
        if num_shots < 1:
            return data_sources[0] if len(data_sources) == 1 else data_sources
        print(f"Creating a {num_shots}-shot dataset")
        samples = []
        for source in data_sources:
            samples.append([])
            for items in self.split_dataset_by_label(source).values():
                if len(items) >= num_shots:
                    items = random.sample(items, num_shots)
                elif repeat:
                    items = random.choices(items, k=num_shots)
                samples[-1] += items
        return samples[0] if len(samples) == 1 else samples

    def split_dataset_by_label(self, data_source) -> dict:
        """Group the images by label, in order of first appearance, which decides what a seed draws."""
        groups = {}
        for item in data_source:
            groups.setdefault(item.label, []).append(item)
        return groups
