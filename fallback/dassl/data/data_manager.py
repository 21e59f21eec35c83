"""Loaders for the splits of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import torch
import torchvision.transforms as T
from torch.utils.data import DataLoader, Dataset

from ..utils import read_image
from .datasets import build_dataset
from .samplers import build_sampler
from .transforms import INTERPOLATION_MODES, build_transform

__all__ = ["DataManager", "DatasetWrapper", "build_data_loader"]


class _SteadyLoader(DataLoader):
    """A loader whose image order, for a fixed seed, does not depend on whether its workers live on.

    Every new iterator draws a seed for its workers from torch's global generator. An iterator that is used again, with
    its workers, does not, so that from the second epoch on the random sampler would find the generator elsewhere.
    """

    _used = False

    def __iter__(self) -> Any:
        if self._used and self.persistent_workers:
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        self._used = True
        return super().__iter__()


def build_data_loader(
    cfg: Any,
    sampler_type: str = "SequentialSampler",
    data_source: Sequence[Any] | None = None,
    batch_size: int = 64,
    n_domain: int = 0,
    n_ins: int = 2,
    tfm: Any = None,
    is_train: bool = True,
    dataset_wrapper: Callable[..., Dataset] | None = None,
    split: str = "data",
) -> DataLoader:
    """Build a loader over ``data_source``, a list of Datum objects.

    A training loader leaves out the last, incomplete batch, unless that is its only one.

    Args:
        n_domain, n_ins: for the samplers that use them.
        tfm: transform, or several in a list.
        dataset_wrapper: class to use in place of :class:`DatasetWrapper`, with the same arguments.
        split: name of the split, for the error message.

    Raises:
        ValueError: the loader would have no batch.
    """
    size = len(data_source) if data_source is not None else 0
    if size == 0:
        raise ValueError(f"the {split} split has no images")
    wrapper = dataset_wrapper or DatasetWrapper
    sampler = build_sampler(sampler_type, cfg, data_source, batch_size, n_domain, n_ins)
    num_workers = cfg.DATALOADER.NUM_WORKERS
    loader = _SteadyLoader(
        wrapper(cfg, data_source, transform=tfm, is_train=is_train),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # starting them again for each epoch takes longer than a few-shot epoch
        drop_last=is_train and size >= batch_size,
        pin_memory=cfg.USE_CUDA and torch.cuda.is_available(),
    )
    if len(loader) == 0:
        raise ValueError(f"the {size} images of the {split} split make no batch of {batch_size} with {sampler_type}")
    return loader


class DataManager:
    """The data set of a configuration with a loader for each split.

    Attributes: ``dataset``, ``train_loader_x``, ``train_loader_u`` and ``val_loader`` (None without such images),
    ``test_loader``, ``num_classes``, ``num_source_domains``, ``lab2cname``.

    Args:
        custom_tfm_train, custom_tfm_test: used in place of the transforms the configuration describes.
        dataset_wrapper: class to use in place of :class:`DatasetWrapper`.
    """

    def __init__(
        self,
        cfg: Any,
        custom_tfm_train: Any = None,
        custom_tfm_test: Any = None,
        dataset_wrapper: Callable[..., Dataset] | None = None,
    ) -> None:
        self.dataset = dataset = build_dataset(cfg)
        self._num_classes = dataset.num_classes
        self._num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        self._lab2cname = dataset.lab2cname

        transforms = {}
        for is_train, purpose, custom in ((True, "training", custom_tfm_train), (False, "testing", custom_tfm_test)):
            if custom is None:
                transforms[is_train] = build_transform(cfg, is_train=is_train)
            else:
                print(f"* Using custom transform for {purpose}")
                transforms[is_train] = custom

        def loader(split: str, node: Any, is_train: bool) -> DataLoader:
            sampling = {"n_domain": node.N_DOMAIN, "n_ins": node.N_INS} if is_train else {}
            return build_data_loader(
                cfg,
                sampler_type=node.SAMPLER,
                data_source=getattr(dataset, split),
                batch_size=node.BATCH_SIZE,
                tfm=transforms[is_train],
                is_train=is_train,
                dataset_wrapper=dataset_wrapper,
                split=split,
                **sampling,
            )

        nodes = cfg.DATALOADER
        node_u = nodes.TRAIN_X if nodes.TRAIN_U.SAME_AS_X else nodes.TRAIN_U
        self.train_loader_x = loader("train_x", nodes.TRAIN_X, True)
        self.train_loader_u = loader("train_u", node_u, True) if dataset.train_u else None
        self.val_loader = loader("val", nodes.TEST, False) if dataset.val else None
        self.test_loader = loader("test", nodes.TEST, False)

        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._num_classes

    @property
    def num_source_domains(self) -> int:
        """Number of source domains the configuration names."""
        return self._num_source_domains

    @property
    def lab2cname(self) -> dict[int, str]:
        """Class name of each label."""
        return self._lab2cname

    def show_dataset_summary(self, cfg: Any) -> None:
        """Print name, domains and sizes as a table of two columns."""
        rows = [("Dataset", cfg.DATASET.NAME)]
        rows += [("Source", str(cfg.DATASET.SOURCE_DOMAINS))] if cfg.DATASET.SOURCE_DOMAINS else []
        rows += [("Target", str(cfg.DATASET.TARGET_DOMAINS))] if cfg.DATASET.TARGET_DOMAINS else []
        rows.append(("# classes", f"{self.num_classes:,}"))
        for split in ("train_x", "train_u", "val", "test"):
            images = getattr(self.dataset, split)
            if images or split in ("train_x", "test"):
                rows.append((f"# {split}", f"{len(images):,}"))

        left, right = (max(map(len, column)) for column in zip(*rows))
        rule = f"{'-' * left}  {'-' * right}"
        print("\n".join([rule, *(f"{key:<{left}}  {value}" for key, value in rows), rule]))


class DatasetWrapper(Dataset):
    """Reads and transforms the images of a list of Datum objects.

    An item is a dictionary: "label", "domain", "impath", "index" (position in the list) and "img", the transformed
    image (the PIL image without a transform). Several transforms give "img", "img2", "img3", ... With
    DATALOADER.K_TRANSFORMS above 1, in training, each of those is a list of that many versions. DATALOADER.RETURN_IMG0
    adds "img0", the image resized to INPUT.SIZE without augmentation.

    Raises:
        ValueError: K_TRANSFORMS above 1 without a transform.
    """

    def __init__(self, cfg: Any, data_source: Sequence[Any], transform: Any = None, is_train: bool = False) -> None:
        self.cfg = cfg
        self.data_source, self.is_train, self.transform = data_source, is_train, transform
        loading = cfg.DATALOADER
        self.return_img0 = loading.RETURN_IMG0
        self.k_tfm = 1 if not is_train else loading.K_TRANSFORMS
        if transform is None and self.k_tfm > 1:
            raise ValueError(f"DATALOADER.K_TRANSFORMS is {self.k_tfm}, but there is no transform to apply")

        plain = [T.Resize(cfg.INPUT.SIZE, interpolation=INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION]), T.ToTensor()]
        if "normalize" in cfg.INPUT.TRANSFORMS:
            plain.append(T.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD))
        self.to_tensor = T.Compose(plain)

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        datum = self.data_source[idx]
        image = read_image(datum.impath)
        item = {"label": datum.label, "domain": datum.domain, "impath": datum.impath, "index": idx}
        if self.transform is None:
            item["img"] = image
        else:
            several = self.transform if isinstance(self.transform, (list, tuple)) else [self.transform]
            for number, tfm in enumerate(several, start=1):
                item["img" if number == 1 else f"img{number}"] = self._transform_image(tfm, image)
        if self.return_img0:
            item["img0"] = self.to_tensor(image)
        return item

    def _transform_image(self, tfm: Callable[[Any], Any], img0: Any) -> Any:
        versions = [tfm(img0) for _ in range(self.k_tfm)]
        return versions if len(versions) > 1 else versions[0]
