"""Loaders for the splits of a data set."""

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset

from ..utils import read_image
from .datasets import build_dataset
from .samplers import build_sampler
from .transforms import build_transform


class _SteadyLoader(DataLoader):
    """A loader whose order, for a fixed seed, is the same with persistent workers as without."""

    def __iter__(self):
        if self._iterator is not None:  # used again: a new one would draw a seed for its workers
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        return super().__iter__()


def build_data_loader(
    cfg, sampler_type="SequentialSampler", data_source=None, batch_size=64, n_domain=0, n_ins=2, tfm=None,
    is_train=True, dataset_wrapper=None, split="data",
) -> DataLoader:  # fmt: skip
    """Build a loader; in training it drops the last, incomplete batch unless that is the only one."""
    workers, size = cfg.DATALOADER.NUM_WORKERS, len(data_source)
    loader = _SteadyLoader(
        (dataset_wrapper or DatasetWrapper)(cfg, data_source, transform=tfm, is_train=is_train),
        batch_size=batch_size,
        sampler=build_sampler(sampler_type, cfg, data_source, batch_size, n_domain, n_ins),
        num_workers=workers,
        persistent_workers=workers > 0,  # a few-shot epoch takes less time than starting them
        drop_last=is_train and size >= batch_size,
        pin_memory=cfg.USE_CUDA and torch.cuda.is_available(),
    )
    if len(loader) == 0:
        raise ValueError(f"the {size} images of the {split} split make no batch of {batch_size} with {sampler_type}")
    return loader


class DataManager:
    """The data set of a configuration and a loader for each split, None for a missing train_u or val."""

    def __init__(self, cfg, custom_tfm_train=None, custom_tfm_test=None, dataset_wrapper=None) -> None:
        self.dataset = dataset = build_dataset(cfg)
        self.num_classes, self.lab2cname = dataset.num_classes, dataset.lab2cname
        self.num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        transforms = {True: custom_tfm_train, False: custom_tfm_test}
        for is_train, custom in transforms.items():
            if custom is not None:
                print(f"* Using custom transform for {'training' if is_train else 'testing'}")
            transforms[is_train] = build_transform(cfg, is_train=is_train) if custom is None else custom

        def loader(split, node):
            items, is_train, n_ins = getattr(dataset, split), split.startswith("train"), node.get("N_INS", 2)
            args = (node.SAMPLER, items, node.BATCH_SIZE, 0, n_ins, transforms[is_train], is_train, dataset_wrapper)
            return build_data_loader(cfg, *args, split)

        nodes = cfg.DATALOADER
        self.train_loader_x = loader("train_x", nodes.TRAIN_X)
        node_u = nodes.TRAIN_X if nodes.TRAIN_U.SAME_AS_X else nodes.TRAIN_U
        self.train_loader_u = loader("train_u", node_u) if dataset.train_u else None
        self.val_loader = loader("val", nodes.TEST) if dataset.val else None
        self.test_loader = loader("test", nodes.TEST)
        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    def show_dataset_summary(self, cfg) -> None:
        """Print name, domains and sizes as a table."""
        data, node = self.dataset, cfg.DATASET
        rows = {"Dataset": node.NAME, "Source": node.SOURCE_DOMAINS, "Target": node.TARGET_DOMAINS}
        rows["# classes"] = self.num_classes
        rows |= {f"# {split}": len(getattr(data, split) or ()) for split in ("train_x", "train_u", "val", "test")}
        rows = [(key, f"{value:,}" if isinstance(value, int) else str(value)) for key, value in rows.items() if value]
        print(tabulate(rows, disable_numparse=True))


class DatasetWrapper(Dataset):
    """Reads and transforms the images of a list of Datum objects; several transforms give "img", "img2", "img3", …"""

    def __init__(self, cfg, data_source, transform=None, is_train=False) -> None:
        self.cfg, self.data_source, self.transform, self.is_train = cfg, data_source, transform, is_train
        self.return_img0 = cfg.DATALOADER.RETURN_IMG0
        if self.return_img0 or (is_train and cfg.DATALOADER.K_TRANSFORMS > 1):
            raise ValueError("DATALOADER.RETURN_IMG0 True and K_TRANSFORMS above 1 need Dassl.pytorch")

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, idx: int) -> dict:
        image = read_image((datum := self.data_source[idx]).impath)
        item = {"label": datum.label, "domain": datum.domain, "impath": datum.impath, "index": idx, "img": image}
        several = self.transform if isinstance(self.transform, (list, tuple)) else [self.transform]
        for number, tfm in enumerate(several, start=1):
            item[f"img{number}" if number > 1 else "img"] = image if tfm is None else self._transform_image(tfm, image)
        return item

    def _transform_image(self, tfm, img0):
        return tfm(img0)
