"""Image features on disk: a sweep over seeds, shots and methods encodes each test image once (an SQLite file).

An image that is not augmented has the same features in every run with the same encoder, and so has its copy with a
rendered block. Stored are the encoder's outputs, before they are scaled to unit length. A key covers everything that
decides them: the encoder's weights and precision, the preprocessing, the image file (path below the data root, size,
modification time), and for a class-conditional image the place and pixels of the block. SQLite keeps the file intact
under several writers and when one of them is killed; what is lost then is encoded again. To empty it, delete the file.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import PIL
import torch
import torch.nn as nn

APPLICATION_ID = 0x4C6F476F  # "LoGo", in the file's header
TIMEOUT = 60.0  # seconds to wait for another writer
KEYS_PER_QUERY = 500  # old versions of SQLite accept 999
BUFFER = 4096  # features written at a time: what a kill may lose
KEY_BYTES = 16
LAYOUT = "encoder outputs"  # earlier versions stored features of unit length; their rows are never matched
SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    "CREATE TABLE IF NOT EXISTS encoders (id INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, name TEXT)",
    "CREATE TABLE IF NOT EXISTS features (id INTEGER PRIMARY KEY, encoder INTEGER NOT NULL, key BLOB NOT NULL, "
    "value BLOB NOT NULL, UNIQUE (encoder, key))",
)


class NotAStore(Exception):
    """The file is something else."""


def digest(*parts: Any) -> bytes:
    """A key of texts, numbers and bytes."""
    hashed = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        hashed.update(len(content).to_bytes(8, "little") + content)
    return hashed.digest()


def encoder_key(visual: nn.Module, transform: Any, precision: str, device: str) -> bytes:
    """Key of an image encoder (its weights), its preprocessing (``repr`` of the transform), precision and device."""
    weights: list[Any] = []
    for name, value in sorted(visual.state_dict().items()):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        weights += [name, value.dtype, tuple(value.shape), content.tobytes()]
    return digest(*weights, transform, precision, device, PIL.__version__, LAYOUT)


def image_key(path: str, relative: str) -> bytes:
    """Key of an image file, without reading it."""
    found = os.stat(path)
    return digest(relative, found.st_size, found.st_mtime_ns)


class FeatureStore:
    """Features of one encoder, in a file that other processes may use at the same time.

    Args:
        encoder: from :func:`encoder_key`.
        name: of the encoder, for people who look into the store.
        limit: bytes that the file may take; beyond that the oldest features are removed.
    """

    def __init__(self, path: str, encoder: bytes, name: str = "", limit: int = 4 * 2**30) -> None:
        self.path, self.limit, self.broken = path, limit, False
        self._buffer: list[tuple[bytes, bytes]] = []
        self._blocks, self._block_digests = None, {}
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self._db = connect(path)
        with self._db:
            self._db.execute("INSERT OR IGNORE INTO encoders (key, name) VALUES (?, ?)", (encoder, name))
            self.encoder = self._db.execute("SELECT id FROM encoders WHERE key = ?", (encoder,)).fetchone()[0]

    def get(self, keys: Sequence[bytes]) -> list[Optional[torch.Tensor]]:
        """The (E,) feature of each key, None where there is none."""
        found: dict[bytes, bytes] = dict(self._buffer)
        with self._ignoring_errors():
            for i in range(0, len(keys), KEYS_PER_QUERY):
                some = keys[i : i + KEYS_PER_QUERY]
                query = f"SELECT key, value FROM features WHERE encoder = ? AND key IN ({','.join('?' * len(some))})"
                found.update(self._db.execute(query, (self.encoder, *some)))
        return [_from_bytes(found[key]) if key in found else None for key in keys]

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Store (N, E) features, except rows that are not finite. They reach the disk in batches, or by flush()."""
        rows = zip(keys, features.detach().cpu())
        self._buffer += [(key, _to_bytes(row)) for key, row in rows if row.isfinite().all()]
        if len(self._buffer) >= BUFFER:
            self.flush()

    def look_up(
        self, keys: Sequence[bytes], encode: Callable[[list[int]], torch.Tensor], store: bool = True
    ) -> torch.Tensor:
        """(N, E) features of N keys; missing ones are encoded, given their positions, and stored."""
        found = self.get(keys)
        missing = [i for i, feature in enumerate(found) if feature is None]
        if missing:
            encoded = encode(missing)
            if store:
                self.put([keys[i] for i in missing], encoded)
            if len(missing) == len(keys):
                return encoded
            for i, feature in zip(missing, encoded.cpu()):
                found[i] = feature
        return torch.stack(found)

    def block_digest(self, blocks: torch.Tensor, c: int) -> bytes:
        """Key of the pixels of ``blocks[c]``, computed once as long as the same tensor comes again."""
        if blocks is not self._blocks:
            self._blocks, self._block_digests = blocks, {}
        if c not in self._block_digests:
            self._block_digests[c] = digest(blocks[c].detach().cpu().numpy().tobytes(), *blocks.shape[1:])
        return self._block_digests[c]

    def flush(self) -> None:
        """Write what :meth:`put` has gathered: all of it or, on a full disk or after a kill, nothing."""
        rows = [(self.encoder, key, value) for key, value in self._buffer]
        self._buffer = []
        if rows and not self.broken:
            with self._ignoring_errors(), self._db:
                self._db.executemany("INSERT OR IGNORE INTO features (encoder, key, value) VALUES (?, ?, ?)", rows)
                self._evict()

    @contextmanager
    def _ignoring_errors(self) -> Iterator[None]:
        """A store only saves time: after an error everything is encoded."""
        try:
            yield
        except sqlite3.Error as error:
            if not self.broken:
                print(f"{self.path}: {error}; features are no longer stored")
            self.broken = True

    def _evict(self) -> None:
        """Remove the oldest tenth of the rows until the limit is met; SQLite reuses their pages."""
        pages = "pragma_page_size, pragma_page_count, pragma_freelist_count"
        in_use = f"SELECT page_size * (page_count - freelist_count) FROM {pages}"  # bytes
        while self._db.execute(in_use).fetchone()[0] > self.limit:
            first, last = self._db.execute("SELECT min(id), max(id) FROM features").fetchone()
            if first is None:
                break
            self._db.execute("DELETE FROM features WHERE id <= ?", (first + (last - first) // 10,))

    def close(self) -> None:
        self.flush()
        self._db.close()


def _to_bytes(feature: torch.Tensor) -> bytes:
    kind, dtype = (b"h", torch.float16) if feature.dtype == torch.float16 else (b"f", torch.float32)
    return kind + feature.to(dtype).contiguous().numpy().tobytes()


def _from_bytes(value: bytes) -> torch.Tensor:
    dtype = torch.float16 if value[:1] == b"h" else torch.float32
    return torch.frombuffer(bytearray(value[1:]), dtype=dtype)


def connect(path: str) -> sqlite3.Connection:
    """Open a store, or create one. Raises NotAStore."""
    new = not os.path.exists(path) or os.path.getsize(path) == 0
    db = sqlite3.connect(path, timeout=TIMEOUT)
    try:
        db.execute("PRAGMA synchronous = NORMAL")
        if new:
            with db:
                for statement in ("BEGIN IMMEDIATE", *SCHEMA):
                    db.execute(statement)
        elif db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise NotAStore(f"{path}: not a feature store")
    except BaseException as error:
        db.close()
        if isinstance(error, sqlite3.OperationalError) or not isinstance(error, sqlite3.DatabaseError):
            raise  # locked, a full disk, no permission
        raise NotAStore(f"{path}: not a feature store ({error})") from error
    return db
