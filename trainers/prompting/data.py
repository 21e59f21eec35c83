"""Images: reading image files, and the data set that Dassl's loaders use."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import numpy as np
import torch
from dassl.data import DatasetWrapper
from dassl.data.data_manager import build_data_loader
from dassl.data.transforms import build_transform
from PIL import Image, UnidentifiedImageError
from torch.utils.data import BatchSampler, DataLoader, get_worker_info
from tqdm import tqdm
from yacs.config import CfgNode

from . import distributed
from .random_states import seed_of, seeded, seeded_view

# Only these formats are decoded, as far as this Pillow can; it starts another program for some others (EPS).
Image.init()
FORMATS = tuple(f for f in ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") if f in Image.OPEN)
ENDINGS = tuple(sorted(end for end, name in Image.registered_extensions().items() if name in FORMATS))
MAX_ASPECT = 1000  # long side / short side: the transforms resize the short side to the model's input
MAX_PIXELS = 178_956_970  # Pillow's own limit, half a gigabyte in RGB; Pillow would warn from half of it on
READER_VERSION = 1  # of what read_image returns; part of the key of stored features
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: str) -> Image.Image:
    """The image at ``path``, fully decoded, in RGB with 8 bits, as CoOp reads it (``Image.convert``).

    Transparency is dropped, the first of several frames is taken, and the EXIF orientation is ignored. Unlike in CoOp,
    where Pillow would clip nearly everything to white, pixels of 16 or more bits are scaled so that 65535 is white, and
    floats so that 1 is white (255 where a pixel exceeds 1).

    Raises FileNotFoundError or OSError with one argument, a line that names the path: a DataLoader can re-raise that
    from a worker.
    """
    name = " ".join(path.splitlines())
    try:
        with open_image(path) as image:
            image.info.pop("transparency", None)  # Pillow would warn that it is dropped
            return (_scaled(image) if image.mode[0] in "IF" else image).convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image file at {name}") from error
    except UnidentifiedImageError as error:
        raise OSError(f"cannot decode image {name}: not an image of a known format") from error
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, ValueError, EOFError and others
        reason = getattr(error, "strerror", None) or " ".join(str(error).splitlines()) or type(error).__name__
        raise OSError(f"cannot decode image {name}: {reason}") from error


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """An image file of which only the header has been read. Raises ValueError for one that would fill the memory."""
    with Image.open(path, formats=FORMATS) as image:
        size = f"{image.width}x{image.height} pixels"
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{size}, the limit is {MAX_PIXELS}")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"{size} are too long and thin to be resized")
        yield image


def _scaled(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits, or of floats, in 8 bits."""
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=np.inf, neginf=0)
    white = 65535.0 if image.mode[0] == "I" else 1.0 if pixels.max(initial=0) <= 1 else 255.0
    return Image.fromarray(np.rint(np.clip(pixels / white, 0, 1) * 255).astype(np.uint8))


def decoded_size(paths: Sequence[str], limit: float) -> Optional[int]:
    """Bytes that the images take when decoded, read from their headers; None where that exceeds ``limit``."""
    total = 0
    for path in paths:
        try:
            with open_image(path) as image:
                total += 3 * image.width * image.height
        except Exception:
            read_image(path)  # names the file
            raise
        if total > limit:
            return None
    return total


@dataclass
class DrawnImage:
    """A training image that is drawn instead of read; the attributes are those of Dassl's ``Datum``."""

    image: Image.Image
    label: int
    classname: str
    domain: int = 0
    impath: str = "a drawn image"


def drawn_items(images: torch.Tensor, classnames: Sequence[str]) -> list[DrawnImage]:
    """(C, 3, H, W) images of C classes, RGB in [0, 1], as items of a data set; none for an empty tensor."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy() if len(images) else []
    return [DrawnImage(Image.fromarray(array), i, name) for i, (array, name) in enumerate(zip(pixels, classnames))]


def image_of(item: Any) -> Image.Image:
    """The decoded image of an item of a data set."""
    return item.image if isinstance(item, DrawnImage) else read_image(item.impath)


def training_loader(cfg: CfgNode, items: Sequence[Any]) -> DataLoader:
    """Dassl's loader of training images, for other items than those of the data set."""
    options = cfg.DATALOADER.TRAIN_X
    sampling = {"batch_size": options.BATCH_SIZE, "n_domain": options.N_DOMAIN, "n_ins": options.N_INS}
    transform = build_transform(cfg, is_train=True)
    return build_data_loader(
        cfg, options.SAMPLER, items, **sampling, tfm=transform, is_train=True, dataset_wrapper=ImageDataset
    )


class ImageDataset(DatasetWrapper):
    """Dassl's data set, with images read by :func:`read_image` and decoded once where memory allows.

    Args:
        view: number of a pass, which together with the seed and the image decides the augmentation; None: random.
    """

    decoded: Optional[list[Image.Image]] = None

    def __init__(self, *args: Any, view: Optional[int] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.view = view
        self.process = distributed.rank(), distributed.processes()  # a worker cannot ask
        self.epoch = torch.zeros((), dtype=torch.int64)
        if self.is_train and self.cfg.DATALOADER.NUM_WORKERS > 0:
            self.epoch.share_memory_()  # persistent workers see a new epoch through this

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """This process's share of a batch, with the batch's size in ``total``.

        In a worker, the augmentation of an image is a function of (seed, epoch, batch, row) alone. Elsewhere images
        draw from the global random states one after another, so those of other processes are augmented too.
        """
        share = distributed.share(len(indices), *self.process).rows if self.is_train else slice(None)
        if not (self.is_train and get_worker_info()):
            found = [self[i] for i in indices][share]
        else:
            batch = f"{max(self.cfg.SEED, 0)}/{int(self.epoch)}/{list(indices)}"
            found = []
            for row in range(len(indices))[share]:
                with seeded(seed_of(f"{batch}/{row}")):
                    found.append(self[indices[row]])
        return [{**item, "total": len(indices)} for item in found]

    def decode(self, limit: float) -> None:
        """Keep all images decoded unless they take more than ``limit`` bytes; forked workers share that memory."""
        items = self.data_source
        if limit and decoded_size([item.impath for item in items if not isinstance(item, DrawnImage)], limit):
            with ThreadPoolExecutor() as pool:
                images = pool.map(image_of, items)
                self.decoded = list(tqdm(images, "decoding", len(items), leave=False, disable=None))

    def __getitem__(self, idx: int) -> dict[str, Any]:
        if callable(self.transform) and not self.return_img0:
            item = self.data_source[idx]
            image = image_of(item) if self.decoded is None else self.decoded[idx]
            with nullcontext() if self.view is None else seeded_view(self.cfg.SEED, idx, self.view):
                image = self._transform_image(self.transform, image)
            return {"label": item.label, "domain": item.domain, "impath": item.impath, "index": idx, "img": image}
        try:
            return super().__getitem__(idx)
        except Exception:
            read_image(self.data_source[idx].impath)  # names the file, unless something else is wrong
            raise


def ordered_loader(cfg: CfgNode, items: Sequence[Any], transform: Any, view: Optional[int] = None) -> DataLoader:
    """A loader of images in their order."""
    sizes, wrapper = {"batch_size": cfg.DATALOADER.TEST.BATCH_SIZE, "is_train": False}, partial(ImageDataset, view=view)
    return build_data_loader(cfg, data_source=items, tfm=transform, dataset_wrapper=wrapper, **sizes)


def few_shot_loader(cfg: CfgNode, items: Sequence[Any], view: Optional[int] = None) -> DataLoader:
    """A loader of images in their order, as in tests or augmented as in pass number ``view`` of training."""
    return ordered_loader(cfg, items, build_transform(cfg, is_train=view is not None), view)


def index_loader(items: Sequence[Any], batch_size: int) -> DataLoader:
    """Indices and labels of training images, without pixels, in random order and Dassl's batches."""
    rows = [{"index": i, "label": x.label, "domain": x.domain, "impath": x.impath} for i, x in enumerate(items)]
    return DataLoader(rows, batch_size=batch_size, shuffle=True, drop_last=len(rows) >= batch_size)


def handle_last_batch(loader: DataLoader, drop_last: bool) -> DataLoader:
    """Report the images that a training loader leaves out of every epoch, or make it use them.

    Dassl always drops an incomplete last batch; with a sequential sampler these are the same images every time.
    """
    n, size, options = len(loader.sampler), loader.batch_size, ("num_workers", "pin_memory")
    if not loader.drop_last or n % size == 0:
        return loader
    if drop_last:
        left_out = f"{n % size} of {n} training images are left out of every epoch (batches of {size})"
        print(f"{left_out}; set TRAIN.DROP_LAST False to use them")
        return loader
    batches = BatchSampler(loader.sampler, size, drop_last=False)
    return DataLoader(loader.dataset, batch_sampler=batches, **{name: getattr(loader, name) for name in options})


def normalisation(cfg: CfgNode) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (3, 1, 1) that the transforms of a config apply to RGB in [0, 1]."""
    applied = "normalize" in cfg.INPUT.TRANSFORMS
    mean, std = (cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD) if applied else ([0.0] * 3, [1.0] * 3)
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
