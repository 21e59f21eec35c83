"""Images with labels, and lists of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

__all__ = ["DatasetBase", "Datum"]


class Datum:
    """One image: its path, class label, domain label and class name, all read-only.

    The file is not looked for here: ImageNet's training set alone would cost 1.28 million stat calls, minutes on a
    network file system, at every start. Reading the image names the file that is missing.
    """

    __slots__ = ("_classname", "_domain", "_impath", "_label")

    def __init__(self, impath: str = "", label: int = 0, domain: int = 0, classname: str = "") -> None:
        if not isinstance(impath, str):
            raise TypeError(f"impath must be a str, not {type(impath).__name__}")
        self._impath, self._classname = impath, classname
        self._label, self._domain = label, domain

    @property
    def impath(self) -> str:
        """Path of the image file."""
        return self._impath

    @property
    def label(self) -> int:
        """Class label, from 0."""
        return self._label

    @property
    def domain(self) -> int:
        """Domain label, from 0."""
        return self._domain

    @property
    def classname(self) -> str:
        """Name of the class."""
        return self._classname


def _group_by(data_source: Sequence[Datum], attribute: str) -> dict[Any, list[Datum]]:
    groups: defaultdict[Any, list[Datum]] = defaultdict(list)
    for item in data_source:
        groups[getattr(item, attribute)].append(item)
    return groups


class DatasetBase:
    """The splits of a data set, as lists of :class:`Datum`; subclasses make the lists and hand them to ``__init__``.

    Args:
        train_x: labelled training images, which also define the classes.
        train_u: unlabelled training images, or None.
        val: validation images, or None.
        test: test images.

    Raises:
        ValueError: ``train_x`` is empty.
    """

    dataset_dir = ""  # name of the folder below DATASET.ROOT
    domains: Sequence[str] = ()  # names of the domains there are

    def __init__(
        self,
        train_x: list[Datum] | None = None,
        train_u: list[Datum] | None = None,
        val: list[Datum] | None = None,
        test: list[Datum] | None = None,
    ) -> None:
        self._train_x, self._train_u, self._val, self._test = train_x, train_u, val, test
        self._num_classes = self.get_num_classes(train_x)
        self._lab2cname, self._classnames = self.get_lab2cname(train_x)

    @property
    def train_x(self) -> list[Datum]:
        """Labelled training images."""
        return self._train_x

    @property
    def train_u(self) -> list[Datum] | None:
        """Unlabelled training images."""
        return self._train_u

    @property
    def val(self) -> list[Datum] | None:
        """Validation images."""
        return self._val

    @property
    def test(self) -> list[Datum]:
        """Test images."""
        return self._test

    @property
    def lab2cname(self) -> dict[int, str]:
        """Class name of each label."""
        return self._lab2cname

    @property
    def classnames(self) -> list[str]:
        """Class names in the order of their labels."""
        return self._classnames

    @property
    def num_classes(self) -> int:
        """The highest label of ``train_x`` plus one."""
        return self._num_classes

    @staticmethod
    def get_num_classes(data_source: Sequence[Datum]) -> int:
        """Return the highest label plus one; ValueError for an empty list."""
        if not data_source:
            raise ValueError("the train_x split has no images, so there are no classes to count")
        return 1 + max(item.label for item in data_source)

    @staticmethod
    def get_lab2cname(data_source: Sequence[Datum]) -> tuple[dict[int, str], list[str]]:
        """Return the class name of each label, and the names alone, both in the order of the labels."""
        lab2cname = dict(sorted({(item.label, item.classname) for item in data_source}))
        return lab2cname, list(lab2cname.values())

    def check_input_domains(self, source_domains: Sequence[str], target_domains: Sequence[str]) -> None:
        """Raise a ValueError unless both name at least one domain, and only domains there are."""
        for role, names in (("source", source_domains), ("target", target_domains)):
            if not names:
                raise ValueError(f"no {role} domain is given (DATASET.{role.upper()}_DOMAINS)")
            self.is_input_domain_valid(names)

    def is_input_domain_valid(self, input_domains: Sequence[str]) -> None:
        """Raise a ValueError naming the first domain that is not in ``self.domains``."""
        for name in input_domains:
            if name not in self.domains:
                raise ValueError(f"[{name}] is not one of the domains {list(self.domains)}")

    def generate_fewshot_dataset(
        self, *data_sources: list[Datum], num_shots: int = -1, repeat: bool = False
    ) -> list[Datum] | Sequence[list[Datum]]:
        """Draw ``num_shots`` images of each class, with Python's ``random``, classes in order of first appearance.

        Args:
            data_sources: lists to draw from, each for itself.
            num_shots: below 1, the lists are returned as they are.
            repeat: draw with replacement from classes that have fewer images; by default all of those are taken.

        Returns:
            A list for one data source; for more, a list of lists (their tuple where ``num_shots`` is below 1).
        """
        if num_shots < 1:
            return data_sources[0] if len(data_sources) == 1 else data_sources

        print(f"Creating a {num_shots}-shot dataset")

        def draw(items: list[Datum]) -> list[Datum]:
            if len(items) >= num_shots:
                return random.sample(items, num_shots)
            return random.choices(items, k=num_shots) if repeat else items

        drawn = [
            [item for items in self.split_dataset_by_label(source).values() for item in draw(items)]
            for source in data_sources
        ]
        return drawn[0] if len(drawn) == 1 else drawn

    def split_dataset_by_label(self, data_source: Sequence[Datum]) -> dict[int, list[Datum]]:
        """Return the images of each label, labels in order of first appearance."""
        return _group_by(data_source, "label")

    def split_dataset_by_domain(self, data_source: Sequence[Datum]) -> dict[int, list[Datum]]:
        """Return the images of each domain label, labels in order of first appearance."""
        return _group_by(data_source, "domain")
