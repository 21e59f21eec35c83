"""What each data set consists of, who has it, and how many images there should be. Facts only, nothing is done here.

Folders, archives and Google Drive files are those that CoOp names; where a server has gone, what torchvision uses
instead. Checksums are published by torchvision ("md5"; the sha256 of SUN397's lists too), by TensorFlow Datasets
(ImageNetV2) and by Torch-Uncertainty (ImageNet-A and -R). What has none says "".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

CLASSNAMES = "1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF"  # classnames.txt of ImageNet on Google Drive, for its variants too
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"


@dataclass(frozen=True)
class Download:
    """A file to fetch.

    Args:
        file: its name; an archive by its ending, anything else is itself the one part.
        url: ``https://…`` or ``drive:<id>``, a file on Google Drive.
        parts: what it brings, as named in the data set's folder.
        checksum: ``md5:…`` or ``sha256:…``.
        inner: the archive inside the archive that holds the parts.
        renamed: parts that the archive calls otherwise, ``{name there: name here}``.
        copy: the same file in another data set, below the data root.
    """

    file: str
    url: str
    parts: tuple[str, ...]
    checksum: str = ""
    size: str = ""
    inner: str = ""
    renamed: dict[str, str] = field(default_factory=dict)
    copy: str = ""

    @property
    def drive(self) -> str:
        """Its id on Google Drive, or nothing."""
        return self.url[len("drive:") :] if self.url.startswith("drive:") else ""

    @property
    def page(self) -> str:
        """Where a browser gets it."""
        return f"https://drive.google.com/file/d/{self.drive}/view" if self.drive else self.url


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        folder: below the data root.
        classes: how many.
        counts: images in train, val and test of CoOp's split; only those that the data set has itself.
        images: files or folders in its folder that have to be there.
        names: the file of class names, or the split, that has to be there too.
        raw: annotations, read only where there is no split.
        manual: how to get by hand what no download brings; ``{folder}`` is the data set's folder.
    """

    folder: str
    classes: int
    counts: dict[str, int]
    images: tuple[str, ...]
    names: str = ""
    raw: tuple[str, ...] = ()
    downloads: tuple[Download, ...] = ()
    manual: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.images, *self.raw, *((self.names,) if self.names else ()))

    def kind(self, part: str) -> str:
        """What a part is, in a word or two."""
        if part in self.images:
            return "images"
        if part in self.raw:
            return "annotations"
        return "split" if part.endswith(".json") else "class names"

    def download_of(self, part: str) -> Optional[Download]:
        """What brings a part; None: nothing does."""
        return next((download for download in self.downloads if part in download.parts), None)


def split(name: str, drive: str) -> Download:
    """CoOp's split file."""
    return Download(f"split_zhou_{name}.json", f"drive:{drive}", (f"split_zhou_{name}.json",))


def counts(train: int, val: int, test: int) -> dict[str, int]:
    return {"train": train, "val": val, "test": test}


def classnames(copy: str = "imagenet/classnames.txt") -> Download:
    return Download("classnames.txt", f"drive:{CLASSNAMES}", ("classnames.txt",), copy=copy)


IMAGENET = """\
1. With an account at https://image-net.org download ILSVRC2012_img_train.tar (138 GB), ILSVRC2012_img_val.tar (6.3 GB)
   and ILSVRC2012_devkit_t12.tar.gz into {folder}/images/
2. torchvision checks and unpacks them into class folders, in hours (after an interruption delete the half-made train/
   or val/ first; the archives may go afterwards):
   cd {folder}/images
   python -c "from torchvision.datasets import ImageNet as I; I('.', 'train'); I('.', 'val')"
   Where you have both already: ln -s /where/train /where/val {folder}/images/
3. Call this again: it gets classnames.txt"""

CARS = """\
1. Stanford's server has gone (it had http://ai.stanford.edu/~jkrause/car196/cars_train.tgz, cars_test.tgz,
   cars_test_annos_withlabels.mat and https://ai.stanford.edu/~jkrause/cars/car_devkit.tgz). People use
   https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset for the images and
   https://github.com/pytorch/vision/issues/7545#issuecomment-1631441616 for the annotations
2. The images are to be cars_train/00001.jpg … and cars_test/00001.jpg …, in that copy they are a folder deeper, in
   {folder}/
   devkit/ and cars_test_annos_withlabels.mat are read only where there is no split_zhou_StanfordCars.json
3. Call this again: it gets CoOp's split"""

SOURCES: dict[str, Source] = {
    "imagenet": Source(
        "imagenet",
        1000,
        {"train": 1_281_167, "test": 50_000},
        ("images/train", "images/val"),
        "classnames.txt",
        downloads=(classnames(""),),
        manual=IMAGENET,
    ),
    "caltech101": Source(
        "caltech-101",
        100,
        counts(4128, 1649, 2465),
        ("101_ObjectCategories",),
        "split_zhou_Caltech101.json",
        downloads=(
            split("Caltech101", "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"),
            Download(
                "caltech-101.zip",
                "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                ("101_ObjectCategories",),
                "md5:3138e1922a9193bfa496528edbbc45d0",
                "137 MB",
                inner="101_ObjectCategories.tar.gz",
            ),
        ),
    ),
    "oxford_pets": Source(
        "oxford_pets",
        37,
        counts(2944, 736, 3669),
        ("images",),
        "split_zhou_OxfordPets.json",
        ("annotations",),
        (
            split("OxfordPets", "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs"),
            Download(
                "annotations.tar.gz",
                f"{OXFORD}/pets/data/annotations.tar.gz",
                ("annotations",),
                "md5:95a8c909bbe2e81eed6a22bccdf3f68f",
                "19 MB",
            ),
            Download(
                "images.tar.gz",
                f"{OXFORD}/pets/data/images.tar.gz",
                ("images",),
                "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c",
                "792 MB",
            ),
        ),
    ),
    "stanford_cars": Source(
        "stanford_cars",
        196,
        counts(6509, 1635, 8041),
        ("cars_train", "cars_test"),
        "split_zhou_StanfordCars.json",
        ("devkit", "cars_test_annos_withlabels.mat"),
        (split("StanfordCars", "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"),),
        CARS,
    ),
    "oxford_flowers": Source(
        "oxford_flowers",
        102,
        counts(4093, 1633, 2463),
        ("jpg",),
        "split_zhou_OxfordFlowers.json",
        ("imagelabels.mat", "cat_to_name.json"),
        (
            split("OxfordFlowers", "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
            Download("cat_to_name.json", "drive:1AkcxCXeK_RCGCEC_GvmWxjcjaNhu-at0", ("cat_to_name.json",)),
            Download(
                "imagelabels.mat",
                f"{OXFORD}/flowers/102/imagelabels.mat",
                ("imagelabels.mat",),
                "md5:e0620be6f572b9609742df49c70aed4d",
            ),
            Download(
                "102flowers.tgz",
                f"{OXFORD}/flowers/102/102flowers.tgz",
                ("jpg",),
                "md5:52808999861908f626f3c1f4e79d11fa",
                "345 MB",
            ),
        ),
    ),
    "food101": Source(
        "food-101",
        101,
        counts(50_500, 20_200, 30_300),
        ("images",),
        "split_zhou_Food101.json",
        downloads=(
            split("Food101", "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl"),
            Download(
                "food-101.tar.gz",
                "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                ("images",),
                "md5:85eeb15f3717b99a5da872d97d918f87",
                "5 GB",
            ),
        ),
    ),
    "fgvc_aircraft": Source(
        "fgvc_aircraft",
        100,
        counts(3334, 3333, 3333),
        ("images",),
        raw=("variants.txt", *(f"images_variant_{part}.txt" for part in ("train", "val", "test"))),
        downloads=(
            Download(
                "fgvc-aircraft-2013b.tar.gz",
                f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                ("images", "variants.txt", *(f"images_variant_{part}.txt" for part in ("train", "val", "test"))),
                size="2.8 GB",
            ),
        ),
    ),
    "sun397": Source(
        "sun397",
        397,
        counts(15_880, 3970, 19_850),
        ("SUN397",),
        "split_zhou_SUN397.json",
        ("ClassName.txt", "Training_01.txt", "Testing_01.txt"),
        (
            split("SUN397", "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq"),
            Download(
                "Partitions.zip",
                "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip",
                ("ClassName.txt", "Training_01.txt", "Testing_01.txt"),
                "sha256:e3311ea5f812d4cc6faef194688343d1111f6cd6f70f2c62f393c2b8d6ba1ec9",
            ),
            Download(
                "SUN397.tar.gz",
                "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
                ("SUN397",),
                "md5:8ca2778205c41d23104230ba66911c7a",
                "37 GB",
            ),
        ),
    ),
    "dtd": Source(
        "dtd",
        47,
        counts(2820, 1128, 1692),
        ("images",),
        "split_zhou_DescribableTextures.json",
        downloads=(
            split("DescribableTextures", "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x"),
            Download(
                "dtd-r1.0.1.tar.gz",
                f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz",
                ("images",),
                "md5:fff73e5086ae6bdbea199a49dfb8a4c1",
                "625 MB",
            ),
        ),
    ),
    "eurosat": Source(
        "eurosat",
        10,
        counts(13_500, 5400, 8100),
        ("2750",),
        "split_zhou_EuroSAT.json",
        downloads=(
            split("EuroSAT", "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o"),
            Download(
                "EuroSAT.zip",
                "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                ("2750",),
                "md5:c8fa014336c82ac7804f0398fcb19387",
                "94 MB",
            ),
        ),
    ),
    "ucf101": Source(
        "ucf101",
        101,
        counts(7639, 1898, 3783),
        ("UCF-101-midframes",),
        "split_zhou_UCF101.json",
        downloads=(
            split("UCF101", "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y"),
            Download("UCF-101-midframes.zip", "drive:10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O", ("UCF-101-midframes",)),
        ),
    ),
    "imagenetv2": Source(
        "imagenetv2",
        1000,
        {"test": 10_000},
        ("imagenetv2-matched-frequency-format-val",),
        "classnames.txt",
        downloads=(
            classnames(),
            Download(
                "imagenetv2-matched-frequency.tar.gz",
                "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
                ("imagenetv2-matched-frequency-format-val",),
                "sha256:f0c37fdf925916b19ea1323cd9a2208cdb6959ba2c32eef2a7fc393835c9ca7c",
                "1.3 GB",
            ),
        ),
    ),
    "imagenet_sketch": Source(
        "imagenet-sketch",
        1000,
        {"test": 50_889},
        ("images",),
        "classnames.txt",
        downloads=(
            classnames(),
            Download(
                "ImageNet-Sketch.zip",
                "https://huggingface.co/datasets/songweig/imagenet_sketch/resolve/main/data/ImageNet-Sketch.zip",
                ("images",),
                size="8 GB",
                renamed={"sketch": "images"},
            ),
        ),
    ),
    "imagenet_a": Source(
        "imagenet-adversarial",
        200,
        {"test": 7500},
        ("imagenet-a",),
        "classnames.txt",
        downloads=(
            classnames(),
            Download(
                "imagenet-a.tar",
                "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
                ("imagenet-a",),
                "md5:c3e55429088dc681f30d81f4726b6595",
                "688 MB",
            ),
        ),
    ),
    "imagenet_r": Source(
        "imagenet-rendition",
        200,
        {"test": 30_000},
        ("imagenet-r",),
        "classnames.txt",
        downloads=(
            classnames(),
            Download(
                "imagenet-r.tar",
                "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
                ("imagenet-r",),
                "md5:a61312130a589d0ca1a8fca1f2bd3337",
                "2.2 GB",
            ),
        ),
    ),
}
