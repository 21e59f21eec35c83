"""FGVC-Aircraft (Maji et al. 2013), 100 variants. CoOp uses the authors' split."""

from dassl.data.datasets import DATASET_REGISTRY

from .base import FewShotDataset
from .files import parse_lines, read_lines
from .splits import SPLITS, Entry


@DATASET_REGISTRY.register()
class FGVCAircraft(FewShotDataset):
    """``<root>/fgvc_aircraft/images/1025794.jpg``, ``variants.txt``, ``images_variant_{train,val,test}.txt``."""

    dataset_dir = "fgvc_aircraft"

    def prepare(self) -> None:
        self.labels = {name: label for label, name in enumerate(read_lines(self.path("variants.txt")))}
        self.parts = {part: parse_lines(self.path(f"images_variant_{part}.txt"), self._parse) for part in SPLITS}

    def _parse(self, line: str) -> Entry:
        """Read ``<image> <variant>``."""
        image, _, variant = line.partition(" ")
        return Entry(f"{image}.jpg", self.labels[variant], variant)
