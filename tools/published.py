"""The numbers printed in the paper's Tables 1 to 4: accuracies in per cent.

Rows are data sets by the name of their file in ``configs/datasets``, columns the paper's methods; "-" is a cell that is
not known. They stand here as printed. Two things in them are odd: DPT's H on Flowers (57.50) is not that of its base
and new (29.17), and averages of Tables 2 and 3 are cut to two decimals, not rounded (59.088 is printed as 59.08).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Optional

# Not from the package `trainers`: importing that loads torch and Dassl, which takes longer than a whole report.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trainers"))

from prompting.results import harmonic_mean

Values = dict[str, dict[str, dict[str, float]]]  # method -> data set -> column -> value

NAMES = {  # file in configs/datasets -> its DATASET.NAME, in the paper's order
    "imagenet": "ImageNet",
    "caltech101": "Caltech101",
    "oxford_pets": "OxfordPets",
    "stanford_cars": "StanfordCars",
    "oxford_flowers": "OxfordFlowers",
    "food101": "Food101",
    "fgvc_aircraft": "FGVCAircraft",
    "sun397": "SUN397",
    "dtd": "DescribableTextures",
    "eurosat": "EuroSAT",
    "ucf101": "UCF101",
    "imagenetv2": "ImageNetV2",
    "imagenet_sketch": "ImageNetSketch",
    "imagenet_a": "ImageNetA",
    "imagenet_r": "ImageNetR",
}
METHODS = {"ZeroshotCLIP": "CLIP"}  # trainers that the paper calls otherwise
AVERAGE = "average"


def _table(columns: Sequence[str], *texts: str) -> Values:
    """Parse tables of methods side by side, each with these columns."""
    found: Values = {}
    for text in texts:
        head, *lines = text.strip().splitlines()
        for line in lines:
            dataset, *words = line.split()
            for i, method in enumerate(head.split()):
                cells = zip(columns, words[i * len(columns) : (i + 1) * len(columns)])
                row = {column: float(word) for column, word in cells if word != "-"}
                found.setdefault(method, {})[NAMES.get(dataset, dataset)] = row
    return found


# Table 1: ViT-B/16, 16 shots; base, new and H of each method
BASE_TO_NEW = _table(
    ("base", "new", "H"),
    """
               CLIP               CoOp               CoCoOp
average        69.34 74.22 71.70  82.69 63.22 71.66  80.47 71.69 75.83
imagenet       72.43 68.14 70.22  76.47 67.88 71.92  75.98 70.43 73.10
caltech101     96.84 94.00 95.40  98.00 89.81 93.73  97.96 93.81 95.84
oxford_pets    91.17 97.26 94.12  93.67 95.29 94.47  95.20 97.69 96.43
stanford_cars  63.37 74.89 68.65  78.12 60.40 68.13  70.49 73.59 72.01
oxford_flowers 72.08 77.80 74.83  97.60 59.67 74.06  94.87 71.75 81.71
food101        90.10 91.22 90.66  88.33 82.26 85.19  90.70 91.29 90.99
fgvc_aircraft  27.19 36.29 31.09  40.44 22.30 28.75  33.41 23.71 27.74
sun397         69.36 75.35 72.23  80.60 65.89 72.51  79.74 76.86 78.27
dtd            53.24 59.90 56.37  79.44 41.18 54.24  77.01 56.00 64.85
eurosat        56.48 64.05 60.03  92.19 54.74 68.69  87.49 60.04 71.21
ucf101         70.53 77.50 73.85  84.69 56.05 67.46  82.33 73.45 77.64
""",
    """
               VPT                DPT                LoGoPrompt
average        80.81 70.36 74.68  81.29 29.23 44.54  84.47 74.24 79.03
imagenet       70.93 65.90 68.32  75.15 25.43 38.00  76.74 70.83 73.66
caltech101     97.86 93.76 95.77  97.79 45.21 61.83  98.19 93.78 95.93
oxford_pets    94.81 96.00 95.40  95.11 54.55 69.33  96.07 96.31 96.18
stanford_cars  72.46 73.38 72.92  73.65 34.35 46.84  78.36 72.39 75.26
oxford_flowers 95.39 73.87 83.26  95.20 17.22 57.50  99.05 76.52 86.34
food101        89.88 87.76 88.81  88.87 26.81 41.19  90.82 91.41 91.11
fgvc_aircraft  33.10 30.49 31.74  34.27  2.24  4.20  45.98 34.67 39.53
sun397         79.66 72.68 76.01  80.42 25.22 38.39  81.20 78.12 79.63
dtd            79.15 50.76 61.85  79.53 25.54 38.66  82.87 60.14 69.70
eurosat        93.01 54.89 69.04  93.07 28.61 43.76  93.67 69.44 79.75
ucf101         82.67 74.54 78.39  81.09 36.35 50.19  86.19 73.07 79.09
""",
)

# Table 2: RN50, 16 shots
FEW_SHOT = _table(
    ("accuracy",),
    """
               CoOp   VisualPrompting  LoGoPrompt  TipAdapter  TipAdapterF  LoGoPrompt+Adapter
imagenet       62.95  50.65            66.34       62.01       65.51        67.34
caltech101     91.83  77.02            92.98       90.18       92.86        93.23
oxford_pets    87.01  69.64            89.40       88.14       89.70        90.35
stanford_cars  73.36  56.99            77.01       66.77       75.74        77.64
oxford_flowers 94.51  89.97            96.55       89.89       94.80        96.83
food101        74.67  59.99            78.73       77.83       79.43        79.77
fgvc_aircraft  31.26  23.01            37.14       29.76       35.55        38.70
sun397         69.26  57.01            70.63       66.85       71.47        72.13
dtd            63.58  55.67            67.97       60.93       66.55        70.07
eurosat        83.53  73.19            85.40       70.54       84.54        85.74
ucf101         75.71  67.11            77.35       -           -            -
average        73.42  61.84            76.31       70.32       75.83        77.28
""",
)

# Table 3: ViT-B/16, trained on ImageNet with 16 shots; the average includes ImageNet
DOMAIN_GENERALIZATION = _table(
    ("accuracy",),
    """
                CLIP   CoOp   CoCoOp  VPT    DPT    LoGoPrompt
imagenet        66.73  71.51  71.02   70.72  69.95  75.27
imagenetv2      60.83  64.20  64.07   58.22  15.93  66.65
imagenet_sketch 46.15  47.99  48.75   44.67  13.41  48.99
imagenet_a      47.77  49.71  50.63   43.00   9.10  51.36
imagenet_r      73.96  75.21  76.18   71.86  32.34  76.85
average         59.08  61.72  62.13   57.69  28.14  63.82
""",
)

# Table 4: LoGoPrompt on ImageNet, RN50, 16 shots; part -> setting -> value
ABLATION = {
    "visual_prompt_type": {"text_augmentation": 63.12, "paired": 63.54, "selection": 66.34},
    "size_ratio": {"1/14": 66.02, "1/7": 66.34, "2/7": 66.17},
    "n_ctx": {"2": 65.58, "8": 66.14, "16": 66.34},
    "location": {"top": 65.98, "bottom": 66.01, "random": 66.34},
}

# Kind of experiment -> its table, its backbone; all of them have 16 shots.
TABLES = {
    "base2new": (BASE_TO_NEW, "ViT-B/16"),
    "few_shot": (FEW_SHOT, "RN50"),
    "domain_generalization": (DOMAIN_GENERALIZATION, "ViT-B/16"),
}
SHOTS = 16
ABLATION_BACKBONE = "RN50"


def same_backbone(name: str, paper: str) -> bool:
    """Whether ``MODEL.BACKBONE.NAME`` (a name, OpenAI's archive or open_clip's arch/tag) is the paper's backbone."""
    name = name.lower().removesuffix("/openai")
    if name.endswith(".pt"):
        name = Path(name).stem
    return name.replace("/", "-") == paper.lower().replace("/", "-")


def compares(kind: str, backbone: str) -> bool:
    """Whether the paper has a table of this kind, with this backbone."""
    return kind in TABLES and same_backbone(backbone, TABLES[kind][1])


def average(kind: str, trainer: str, datasets: Sequence[str], column: str) -> Optional[float]:
    """The average printed, where it is over just these data sets; else that of the values printed for them.

    H is always that of the averaged base and new. So it is printed too, but for VPT (74.68) and DPT (44.54): these are
    means of the eleven H, which are not comparable with the others.
    """
    if column == "H":
        base, new = (average(kind, trainer, datasets, half) for half in ("base", "new"))
        return None if base is None or new is None else round(harmonic_mean(base, new), 2)
    rows = TABLES[kind][0].get(METHODS.get(trainer, trainer), {})
    if set(datasets) == rows.keys() - {AVERAGE}:
        return rows[AVERAGE][column]
    values = [rows.get(dataset, {}).get(column) for dataset in datasets]
    return None if None in values or not values else mean(values)


def value(kind: str, trainer: str, dataset: str, column: str) -> Optional[float]:
    """What the paper prints for a trainer on a data set (``DATASET.NAME``); None where it prints nothing."""
    return TABLES[kind][0].get(METHODS.get(trainer, trainer), {}).get(dataset, {}).get(column)
