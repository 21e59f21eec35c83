"""SUN397 (Xiao et al. 2010), 397 scenes."""

from dassl.data.datasets import DATASET_REGISTRY

from .base import AnnotatedDataset
from .files import read_lines
from .splits import Entry, Split


@DATASET_REGISTRY.register()
class SUN397(AnnotatedDataset):
    """``<root>/sun397/SUN397/a/abbey/sun_….jpg``, ``ClassName.txt``, ``{Training,Testing}_01.txt``."""

    dataset_dir, image_dir = "sun397", "SUN397"
    lists = ("Training_01.txt", "Testing_01.txt")

    def make_split(self) -> Split:
        self.labels = {name.lstrip("/"): label for label, name in enumerate(read_lines(self.path("ClassName.txt")))}
        return super().make_split()

    def parse(self, line: str) -> Entry:
        """Read ``/a/apartment_building/outdoor/sun_….jpg``, an image of the class "outdoor apartment_building"."""
        image = line.lstrip("/")
        scene = image.rpartition("/")[0]
        return Entry(image, self.labels[scene], " ".join(reversed(scene.split("/")[1:])))
