"""UCF101 (Soomro, Zamir, Shah 2012), 101 actions, one frame of each video."""

import re

from dassl.data.datasets import DATASET_REGISTRY

from .base import AnnotatedDataset
from .files import parse_lines
from .splits import Entry, Split


@DATASET_REGISTRY.register()
class UCF101(AnnotatedDataset):
    """``<root>/ucf101/UCF-101-midframes/Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg``, ``ucfTrainTestlist/``."""

    dataset_dir, image_dir = "ucf101", "UCF-101-midframes"
    lists = ("ucfTrainTestlist/trainlist01.txt", "ucfTrainTestlist/testlist01.txt")

    def make_split(self) -> Split:
        def parse(line: str) -> tuple[str, int]:
            label, name = line.split(" ")
            return name, int(label) - 1

        self.labels = dict(parse_lines(self.path("ucfTrainTestlist", "classInd.txt"), parse))
        return super().make_split()

    def parse(self, line: str) -> Entry:
        """Read ``ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi``, in the training list followed by the label."""
        action, video = line.split(" ")[0].split("/")
        classname = "_".join(re.findall("[A-Z][^A-Z]*", action))  # also the name of the folder
        return Entry(f"{classname}/{video.replace('.avi', '.jpg')}", self.labels[action], classname)
