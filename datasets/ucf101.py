"""UCF101 (Soomro, Zamir, Shah 2012), 101 actions, one frame of each video."""

from __future__ import annotations

import re

from dassl.data.datasets import DATASET_REGISTRY

from .base import SplitDataset
from .raw import Split, read_lines, reading, split_trainval
from .splits import Entry


@DATASET_REGISTRY.register()
class UCF101(SplitDataset):
    """``<root>/ucf101/UCF-101-midframes/Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg``, ``ucfTrainTestlist/``."""

    dataset_dir = "ucf101"
    image_dir = "UCF-101-midframes"
    split_file = "split_zhou_UCF101.json"

    def make_split(self) -> Split:
        path = self.path("ucfTrainTestlist", "classInd.txt")
        with reading(path):
            labels = {name: int(label) - 1 for label, name in (line.split(" ") for line in read_lines(path))}
        trainval = self._annotated("trainlist01.txt", labels)
        test = self._annotated("testlist01.txt", labels)
        train, val = split_trainval(trainval)
        return {"train": train, "val": val, "test": test}

    def _annotated(self, name: str, labels: dict[str, int]) -> list[Entry]:
        """Lines are ``ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi``, in the training list with the label behind."""
        path = self.path("ucfTrainTestlist", name)
        entries = []
        with reading(path):
            for line in read_lines(path):
                action, video = line.split(" ")[0].split("/")
                classname = "_".join(re.findall("[A-Z][^A-Z]*", action))  # its folder's name too
                entries.append(Entry(f"{classname}/{video.replace('.avi', '.jpg')}", labels[action], classname))
        return entries
