"""Image features kept on disk: a sweep over seeds, shots and methods encodes each test image once (a store in SQLite).

An image that is not augmented has the same features in every run with the same encoder, and so has its copy with a
rendered block. A key is made of all that decides them: the encoder's weights and precision, the preprocessing, the
image file (path below the data root, size, time of its last change), and for a class-conditional image the place and
the pixels of the block. SQLite keeps the file whole under several writers and when one of them is killed; what is lost
then is encoded again. As a program it shows what a store holds, or empties it:

    python trainers/prompting/features.py FILE [--clear]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Optional

import PIL
import torch
import torch.nn as nn

APPLICATION = 0x4C6F476F  # "LoGo", in the file's header: this is a store of ours
PATIENCE = 60.0  # seconds to wait for another writer
AT_A_TIME = 500  # keys in one query; old versions of SQLite take 999
BUFFER = 4096  # features written at a time: what a kill may lose
KEY = 16  # bytes of a digest


class NotAStore(Exception):
    """The file is something else."""


def digest(*parts: Any) -> bytes:
    """A key of texts, numbers and bytes."""
    hashed = hashlib.blake2b(digest_size=KEY)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        hashed.update(len(content).to_bytes(8, "little"))
        hashed.update(content)
    return hashed.digest()


def encoder_key(visual: nn.Module, tfm: Any, precision: str, device: str) -> bytes:
    """Key of an image encoder and what happens before it.

    Args:
        visual: the encoder; its weights count, not where they are from.
        tfm: the transform of test images; what it shows of itself counts.
        precision: fp32, fp16 or amp; device: where it runs: kinds differ in the last digits.
    """
    weights: list[Any] = []
    for name, value in sorted(visual.state_dict().items()):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        weights += [name, value.dtype, tuple(value.shape), content.tobytes()]
    return digest(*weights, tfm, precision, device, PIL.__version__)


def image_key(path: str, relative: str) -> bytes:
    """Key of an image file, without reading it."""
    found = os.stat(path)
    return digest(relative, found.st_size, found.st_mtime_ns)


class FeatureStore:
    """Features of one encoder in a file that others may use at the same time.

    Args:
        path: the file; it is made when it is missing.
        encoder: :func:`encoder_key`; name: for people who look into the store.
        limit: bytes that the file may take; beyond, what was written first goes first.

    Raises:
        NotAStore: the file is something else.
    """

    def __init__(self, path: str, encoder: bytes, name: str = "", limit: int = 4 * 2**30) -> None:
        self.path, self.limit = path, limit
        self.broken = False
        self._buffer: list[tuple[bytes, bytes]] = []
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self._db = connect(path)
        with self._db:
            self._db.execute("INSERT OR IGNORE INTO encoders (key, name) VALUES (?, ?)", (encoder, name))
            self.encoder = self._db.execute("SELECT id FROM encoders WHERE key = ?", (encoder,)).fetchone()[0]

    def get(self, keys: Sequence[bytes]) -> list[Optional[torch.Tensor]]:
        """The (E,) feature of each key, None where it is not there."""
        found: dict[bytes, bytes] = dict(self._buffer)
        with self._trouble():
            for i in range(0, len(keys), AT_A_TIME):
                some = keys[i : i + AT_A_TIME]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, value FROM features WHERE encoder = ? AND key IN ({marks})"
                found.update(self._db.execute(query, (self.encoder, *some)))
        return [_tensor(found[key]) if key in found else None for key in keys]

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Keep (N, E) features; they are written some at a time and by :meth:`flush`."""
        self._buffer += [(key, _bytes(row)) for key, row in zip(keys, features.detach().cpu())]
        if len(self._buffer) >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Write what :meth:`put` has gathered: all of it or, on a full disk or after a kill, nothing."""
        rows = [(self.encoder, key, value) for key, value in self._buffer]
        self._buffer = []
        if self.broken or not rows:
            return
        with self._trouble(), self._db:
            self._db.executemany("INSERT OR IGNORE INTO features (encoder, key, value) VALUES (?, ?, ?)", rows)
            self._evict()

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """A store saves time and nothing else: without it everything is encoded."""
        try:
            yield
        except sqlite3.Error as error:
            if not self.broken:
                print(f"{self.path}: {error}; features are not kept from here on")
            self.broken = True

    def _evict(self) -> None:
        """Within the limit: what came first goes, a tenth of the rows at a time; their pages are used again."""
        while self._size() > self.limit:
            first, last = self._db.execute("SELECT min(id), max(id) FROM features").fetchone()
            if first is None:
                break
            self._db.execute("DELETE FROM features WHERE id <= ?", (first + (last - first) // 10,))

    def _size(self) -> int:
        """Bytes of the file that are in use."""
        (size,), (pages,), (free,) = (
            self._db.execute(f"PRAGMA {name}").fetchone() for name in ("page_size", "page_count", "freelist_count")
        )
        return size * (pages - free)

    def close(self) -> None:
        self.flush()
        self._db.close()


def _bytes(feature: torch.Tensor) -> bytes:
    half = feature.dtype == torch.float16
    return (b"h" if half else b"f") + (feature if half else feature.float()).contiguous().numpy().tobytes()


def _tensor(value: bytes) -> torch.Tensor:
    dtype = torch.float16 if value[:1] == b"h" else torch.float32
    return torch.frombuffer(bytearray(value[1:]), dtype=dtype)


def connect(path: str) -> sqlite3.Connection:
    """Open a store, or make one. Raises NotAStore."""
    new = not os.path.exists(path) or os.path.getsize(path) == 0
    db = sqlite3.connect(path, timeout=PATIENCE)
    try:
        db.execute("PRAGMA synchronous = NORMAL")
        if new:
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.execute(f"PRAGMA application_id = {APPLICATION}")
                db.execute(
                    "CREATE TABLE IF NOT EXISTS encoders (id INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, name TEXT)"
                )
                db.execute(
                    "CREATE TABLE IF NOT EXISTS features (id INTEGER PRIMARY KEY, encoder INTEGER NOT NULL, "
                    "key BLOB NOT NULL, value BLOB NOT NULL, UNIQUE (encoder, key))"
                )
        elif db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
            raise NotAStore(f"{path}: not a store of features")
    except sqlite3.DatabaseError as error:
        db.close()
        if isinstance(error, sqlite3.OperationalError):  # locked, a full disk, no permission
            raise
        raise NotAStore(f"{path}: not a store of features ({error})") from error
    except BaseException:
        db.close()
        raise
    return db


# ------------------------------------------------------------------------------------------------- batches


class ImageBatch:
    """Images to be scored, of which there are pixels, kept features, or both.

    Args:
        backbone: encodes images.
        paths: B paths relative to the data root.
        pixels: (B, 3, H, W); None: only what is kept can be had.
        store, keys: where features are kept, and the :func:`image_key` of each image.
        network: makes class-conditional images: ``encode_pairs(pixels, paths, rows, classes)`` encodes the images
            ``rows`` with the blocks of ``classes``; ``pair_parts(paths, rows, classes)`` is what decides each beside
            the image, None where that is of this run alone and not worth keeping.

    Attributes:
        complete: for each image, whether everything asked for was there.
    """

    def __init__(
        self,
        backbone: Any,
        paths: Sequence[str],
        pixels: Optional[torch.Tensor] = None,
        store: Optional[FeatureStore] = None,
        keys: Sequence[bytes] = (),
        network: Any = None,
    ) -> None:
        self.backbone, self.network, self.paths, self.pixels = backbone, network, paths, pixels
        self.store, self.keys = store, keys
        self.complete = [True] * len(paths)
        self._features: Optional[torch.Tensor] = None

    def features(self) -> torch.Tensor:
        """f(x): (B, E), of unit length; encoded once, however often it is asked for."""
        if self._features is None:
            rows = range(len(self.paths))
            self._features = self._kept(self.keys, rows, lambda some: self.backbone.encode_image(self.pixels[some]))
        return self._features

    def conditional(self, classes: torch.Tensor) -> torch.Tensor:
        """f(x_c) of (B, N) classes for each image: (B, N, E), of unit length."""
        n = classes.shape[1]
        owners = [i for i in range(len(self.paths)) for _ in range(n)]
        flat = classes.flatten()
        parts = self.network.pair_parts(self.paths, owners, flat) if self.store is not None else None
        keys = () if parts is None else [digest(self.keys[i], *part) for i, part in zip(owners, parts)]

        def encode(pairs: list[int]) -> torch.Tensor:
            return self.network.encode_pairs(self.pixels, self.paths, [owners[i] for i in pairs], flat[pairs])

        return self._kept(keys, owners, encode).view(len(self.paths), n, -1)

    def _kept(
        self, keys: Sequence[bytes], owners: Sequence[int], encode: Callable[[list[int]], torch.Tensor]
    ) -> torch.Tensor:
        """Features from the store, or encoded and put there; zeros, for an incomplete image, where neither can be."""
        everything = list(range(len(owners)))
        found = self.store.get(keys) if keys else [None] * len(owners)
        missing = [i for i in everything if found[i] is None]
        if missing and self.pixels is not None:
            encoded = encode(missing)
            if keys:
                self.store.put([keys[i] for i in missing], encoded)
            if missing == everything:
                return encoded
            for i, feature in zip(missing, encoded.cpu()):
                found[i] = feature
        else:
            empty = torch.zeros(self.backbone.text_projection.shape[1])
            for i in missing:
                self.complete[owners[i]] = False
                found[i] = empty
        return torch.stack(found).to(self.backbone.logit_scale.device)


# ------------------------------------------------------------------------------------------------- the program


def describe(path: str) -> list[tuple[str, int, int]]:
    """(name of the encoder, features, bytes of them) of everything in a store."""
    with closing(connect(path)) as db:
        return db.execute(
            "SELECT name, count(features.id), coalesce(sum(length(value)), 0) FROM encoders "
            "LEFT JOIN features ON features.encoder = encoders.id GROUP BY encoders.id ORDER BY encoders.id"
        ).fetchall()


def clear(path: str) -> None:
    """Take all features out of a store; runs that use it go on."""
    with closing(connect(path)) as db:
        with db:
            db.execute("DELETE FROM features")  # encoders stay: runs at work know theirs by its number
        db.execute("VACUUM")


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="What a store of image features holds.")
    parser.add_argument("file", help="TEST.FEATURES of the runs that filled it")
    parser.add_argument("--clear", action="store_true", help="take everything out of it")
    args = parser.parse_args(argv)
    if not os.path.isfile(args.file):
        print(f"error: {args.file}: no such file", file=sys.stderr)
        return 2
    try:
        if args.clear:
            clear(args.file)
        rows = describe(args.file)
    except (NotAStore, sqlite3.Error) as error:
        print(f"error: {args.file}: {error}", file=sys.stderr)
        return 2
    for name, count, size in rows:
        print(f"{count:>10,} features {size / 2**20:>9,.1f} MB  {name}")
    print(f"{os.path.getsize(args.file) / 2**20:,.1f} MB on disk: {args.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
