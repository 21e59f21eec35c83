"""SUN397 (Xiao et al. 2010), 397 scenes."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .base import SplitDataset
from .raw import Split, read_lines, reading, split_trainval
from .splits import Entry


@DATASET_REGISTRY.register()
class SUN397(SplitDataset):
    """``<root>/sun397/SUN397/a/abbey/sun_….jpg``, ``ClassName.txt``, ``{Training,Testing}_01.txt``."""

    dataset_dir = "sun397"
    image_dir = "SUN397"
    split_file = "split_zhou_SUN397.json"

    def make_split(self) -> Split:
        labels = {name.lstrip("/"): label for label, name in enumerate(read_lines(self.path("ClassName.txt")))}
        trainval = self._annotated("Training_01.txt", labels)
        test = self._annotated("Testing_01.txt", labels)
        train, val = split_trainval(trainval)
        return {"train": train, "val": val, "test": test}

    def _annotated(self, name: str, labels: dict[str, int]) -> list[Entry]:
        """Lines are ``/a/apartment_building/outdoor/sun_….jpg``, which shows an "outdoor apartment_building"."""
        path = self.path(name)
        entries = []
        with reading(path):
            for line in read_lines(path):
                image = line.lstrip("/")
                scene = image.rpartition("/")[0]
                entries.append(Entry(image, labels[scene], " ".join(reversed(scene.split("/")[1:]))))
        return entries
