"""FGVC-Aircraft (Maji et al. 2013), 100 variants. It has a split of its own, which CoOp takes."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .base import FewShotDataset
from .raw import read_lines, reading
from .splits import Entry


@DATASET_REGISTRY.register()
class FGVCAircraft(FewShotDataset):
    """``<root>/fgvc_aircraft/images/1025794.jpg``, ``variants.txt``, ``images_variant_{train,val,test}.txt``."""

    dataset_dir = "fgvc_aircraft"

    def prepare(self) -> None:
        labels = {name: label for label, name in enumerate(read_lines(self.path("variants.txt")))}
        self.parts = {part: self._annotated(part, labels) for part in ("train", "val", "test")}

    def entries(self, part: str) -> list[Entry]:
        return self.parts[part]

    def _annotated(self, part: str, labels: dict[str, int]) -> list[Entry]:
        """Lines are ``<image> <variant>``."""
        path = self.path(f"images_variant_{part}.txt")
        entries = []
        with reading(path):
            for line in read_lines(path):
                image, _, variant = line.partition(" ")
                entries.append(Entry(f"{image}.jpg", labels[variant], variant))
        return entries
