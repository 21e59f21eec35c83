"""Miniatures of all data sets in their exact formats on disk, and what is in them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

Row = tuple[str, int, str]  # path relative to the image folder, label, class name


@dataclass
class Tree:
    """What a reader should find. Of a data set without a split CoOp splits ``classes``; else ``trainval`` or parts."""

    name: str  # DATASET.NAME
    config: str  # file in configs/datasets
    folder: str  # below the data root
    images: str  # below the folder
    classnames: list[str]
    classes: list[tuple[int, str, list[str]]] = field(default_factory=list)  # split 50/20/30
    trainval: list[Row] = field(default_factory=list)  # split 80/20
    parts: dict[str, list[Row]] = field(default_factory=dict)  # as they are
    raw: list[str] = field(default_factory=list)  # annotation files, needed where there is no split file

    @property
    def split_file(self) -> str:
        return f"split_zhou_{self.name}.json"


_buffer = io.BytesIO()
Image.new("RGB", (8, 8), (200, 90, 40)).save(_buffer, "JPEG")
JPEG = _buffer.getvalue()


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(JPEG)


def text(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _folders(root: Path, name: str, config: str, folder: str, images: str, renamed: dict[str, str], extra=()) -> Tree:
    """Class folders of 10, 11, … images, made in an order that is not theirs."""
    tree = Tree(name, config, folder, images, [renamed[key] for key in sorted(renamed)])
    for key in sorted(renamed, reverse=True):
        paths = [f"{key}/{key}_{i:02d}.jpg" for i in range(10 + sorted(renamed).index(key))]
        for path in reversed(paths):
            image(root / folder / images / path)
        tree.classes.insert(0, (sorted(renamed).index(key), renamed[key], paths))
    for path in extra:
        image(root / folder / images / path)
    return tree


def caltech101(root: Path) -> Tree:
    names = {"Faces": "face", "Leopards": "leopard", "airplanes": "airplane", "cup": "cup", "wind_chime": "wind_chime"}
    ignored = ["BACKGROUND_Google/image_0001.jpg", "Faces_easy/image_0001.jpg", ".cache/image_0001.jpg"]
    return _folders(root, "Caltech101", "caltech101", "caltech-101", "101_ObjectCategories", names, ignored)


def dtd(root: Path) -> Tree:
    names = {name: name for name in ("banded", "blotchy", "braided", "polka-dotted", "zigzagged")}
    return _folders(root, "DescribableTextures", "dtd", "dtd", "images", names, ["banded/.directory"])


def food101(root: Path) -> Tree:
    names = {name: name for name in ("apple_pie", "baby_back_ribs", "sushi")}
    return _folders(root, "Food101", "food101", "food-101", "images", names)


def eurosat(root: Path) -> Tree:
    names = {"AnnualCrop": "Annual Crop Land", "Forest": "Forest", "Highway": "Highway or Road", "River": "River"}
    names["SeaLake"] = "Sea or Lake"
    return _folders(root, "EuroSAT", "eurosat", "eurosat", "2750", names)


def oxford_pets(root: Path) -> Tree:
    breeds = ["Abyssinian", "american_bulldog", "Maine_Coon"]
    tree = Tree("OxfordPets", "oxford_pets", "oxford_pets", "images", [breed.lower() for breed in breeds])
    tree.raw, tree.parts = ["annotations/trainval.txt", "annotations/test.txt"], {"test": []}
    lines: dict[str, list[str]] = {"trainval": [], "test": []}
    for i in range(14):  # labels in turns: the first class does not come first as a whole
        for label in (2, 0, 1):
            stem = f"{breeds[label]}_{100 + i}"
            image(root / "oxford_pets/images" / f"{stem}.jpg")
            lines["trainval" if i < 10 else "test"].append(f"{stem} {label + 1} {1 + label % 2} 1")
            (tree.trainval if i < 10 else tree.parts["test"]).append((f"{stem}.jpg", label, breeds[label].lower()))
    for part, rows in lines.items():
        text(root / "oxford_pets/annotations" / f"{part}.txt", rows)
    return tree


def oxford_flowers(root: Path) -> Tree:
    names = {"1": "pink primrose", "2": "hard-leaved pocket orchid", "3": "canterbury bells"}
    tree = Tree("OxfordFlowers", "oxford_flowers", "oxford_flowers", "jpg", list(names.values()))
    tree.raw = ["imagelabels.mat", "cat_to_name.json"]
    labels = [3] * 4 + [1] * 10 + [2] * 12 + [3] * 9
    for i in range(len(labels)):
        image(root / "oxford_flowers/jpg" / f"image_{i + 1:05d}.jpg")
    savemat(root / "oxford_flowers/imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    (root / "oxford_flowers/cat_to_name.json").write_text(json.dumps(names))
    for label in (3, 1, 2):
        paths = [f"image_{i:05d}.jpg" for i, found in enumerate(labels, 1) if found == label]
        tree.classes.append((label - 1, names[str(label)], paths))
    return tree


def stanford_cars(root: Path) -> Tree:
    models = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]
    names = ["2000 AM General Hummer SUV", "2012 Acura RL Sedan", "2012 smart fortwo Convertible"]
    tree = Tree("StanfordCars", "stanford_cars", "stanford_cars", "", names, parts={"test": []})
    tree.raw = ["devkit/cars_train_annos.mat", "devkit/cars_meta.mat", "cars_test_annos_withlabels.mat"]
    kind = np.dtype([(key, object) for key in ("bbox_x1", "class", "fname")])
    for folder, count, rows in (("cars_train", 24, tree.trainval), ("cars_test", 9, tree.parts["test"])):
        found = []
        for i in range(count):
            label = (2 * i + 1) % 3
            image(root / "stanford_cars" / folder / f"{i + 1:05d}.jpg")
            found.append((np.array([[10]]), np.array([[label + 1]], dtype=np.uint8), f"{i + 1:05d}.jpg"))
            rows.append((f"{folder}/{i + 1:05d}.jpg", label, names[label]))
        path = root / "stanford_cars" / tree.raw[0 if folder == "cars_train" else 2]
        path.parent.mkdir(exist_ok=True)
        savemat(path, {"annotations": np.array([found], dtype=kind)})
    classes = np.empty((1, 3), dtype=object)
    classes[0] = models
    savemat(root / "stanford_cars/devkit/cars_meta.mat", {"class_names": classes})
    return tree


def fgvc_aircraft(root: Path) -> Tree:
    variants = ["707-320", "A300B4", "Cessna 172", "Tu-134", "Yak-42"]
    tree = Tree("FGVCAircraft", "fgvc_aircraft", "fgvc_aircraft", "images", variants)
    tree.raw = ["variants.txt", *(f"images_variant_{part}.txt" for part in ("train", "val", "test"))]
    text(root / "fgvc_aircraft/variants.txt", variants)
    for part, count in (("train", 30), ("val", 15), ("test", 10)):
        tree.parts[part] = []
        for i in range(count):
            stem = f"{ {'train': 1, 'val': 2, 'test': 3}[part] }{i:06d}"
            image(root / "fgvc_aircraft/images" / f"{stem}.jpg")
            tree.parts[part].append((f"{stem}.jpg", (3 * i) % 5, variants[(3 * i) % 5]))
        rows = [f"{path[:-4]} {name}" for path, _, name in tree.parts[part]]
        text(root / "fgvc_aircraft" / f"images_variant_{part}.txt", rows)
    return tree


def sun397(root: Path) -> Tree:
    scenes = ["a/abbey", "a/apartment_building/outdoor", "c/cathedral/indoor"]
    names = ["abbey", "outdoor apartment_building", "indoor cathedral"]
    tree = Tree("SUN397", "sun397", "sun397", "SUN397", names, parts={"test": []})
    tree.raw = ["ClassName.txt", "Training_01.txt", "Testing_01.txt"]
    text(root / "sun397/ClassName.txt", [f"/{scene}" for scene in scenes])
    for name, count, rows in ((tree.raw[1], 10, tree.trainval), (tree.raw[2], 4, tree.parts["test"])):
        for label, scene in reversed(list(enumerate(scenes))):
            for i in range(count):
                path = f"{scene}/sun_{'b' if rows is tree.trainval else 'a'}{i:03d}.jpg"
                image(root / "sun397/SUN397" / path)
                rows.append((path, label, names[label]))
        text(root / "sun397" / name, [f"/{path}" for path, _, _ in rows])
    return tree


def ucf101(root: Path) -> Tree:
    actions = ["ApplyEyeMakeup", "BaseballPitch", "YoYo"]
    names = ["Apply_Eye_Makeup", "Baseball_Pitch", "Yo_Yo"]
    tree = Tree("UCF101", "ucf101", "ucf101", "UCF-101-midframes", names, parts={"test": []})
    lists = root / "ucf101/ucfTrainTestlist"
    tree.raw = [f"ucfTrainTestlist/{name}.txt" for name in ("classInd", "trainlist01", "testlist01")]
    text(lists / "classInd.txt", [f"{i} {action}" for i, action in enumerate(actions, 1)])
    for rows, groups in ((tree.trainval, range(8, 18)), (tree.parts["test"], range(1, 5))):
        lines = []
        for label, action in enumerate(actions):
            for group in groups:
                stem = f"v_{action}_g{group:02d}_c01"
                image(root / "ucf101/UCF-101-midframes" / names[label] / f"{stem}.jpg")
                rows.append((f"{names[label]}/{stem}.jpg", label, names[label]))
                lines.append(f"{action}/{stem}.avi" + (f" {label + 1}" if rows is tree.trainval else ""))
        text(lists / ("trainlist01.txt" if rows is tree.trainval else "testlist01.txt"), lines)
    return tree


WNIDS = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark", "n01491361": "tiger shark"}


def imagenet(root: Path) -> Tree:
    tree = Tree("ImageNet", "imagenet", "imagenet", "images", list(WNIDS.values()), parts={"train": [], "test": []})
    tree.raw = ["classnames.txt"]
    text(root / "imagenet/classnames.txt", [f"{wnid} {name}" for wnid, name in WNIDS.items()])
    for label, (wnid, name) in enumerate(WNIDS.items()):
        for part, folder, count in (("train", "train", 7), ("test", "val", 3)):
            for i in range(count):
                path = f"{folder}/{wnid}/{wnid}_{i}.JPEG"
                image(root / "imagenet/images" / path)
                tree.parts[part].append((path, label, name))
    tree.parts["val"] = tree.parts["test"]
    return tree


def _variant(root: Path, name: str, config: str, folder: str, images: str, kept: int, numbered=False) -> Tree:
    wnids = list(WNIDS)[:kept]
    tree = Tree(name, config, folder, images, [WNIDS[wnid] for wnid in wnids], parts={"test": [], "val": []})
    tree.raw = ["classnames.txt"]
    text(root / folder / "classnames.txt", [f"{wnid} {name}" for wnid, name in WNIDS.items()])
    for label, wnid in enumerate(wnids):
        for i in range(3):
            path = f"{label if numbered else wnid}/{i}.{'jpeg' if numbered else 'jpg'}"
            image(root / folder / images / path)
            tree.parts["test"].append((path, label, WNIDS[wnid]))
    text(root / folder / images / "README.txt", ["a text beside the folders"])
    return tree


def imagenetv2(root: Path) -> Tree:
    images = "imagenetv2-matched-frequency-format-val"
    return _variant(root, "ImageNetV2", "imagenetv2", "imagenetv2", images, 4, numbered=True)


def imagenet_sketch(root: Path) -> Tree:
    return _variant(root, "ImageNetSketch", "imagenet_sketch", "imagenet-sketch", "images", 4)


def imagenet_a(root: Path) -> Tree:
    return _variant(root, "ImageNetA", "imagenet_a", "imagenet-adversarial", "imagenet-a", 2)


def imagenet_r(root: Path) -> Tree:
    return _variant(root, "ImageNetR", "imagenet_r", "imagenet-rendition", "imagenet-r", 3)


FOLDERS = (caltech101, dtd, food101, eurosat, oxford_flowers)  # split 50/20/30 where there is no split file
ANNOTATED = (oxford_pets, stanford_cars, sun397, ucf101)  # annotations say what to test on
FEW_SHOT = (*FOLDERS, *ANNOTATED, fgvc_aircraft, imagenet)
VARIANTS = (imagenetv2, imagenet_sketch, imagenet_a, imagenet_r)
ALL = (*FEW_SHOT, *VARIANTS)
