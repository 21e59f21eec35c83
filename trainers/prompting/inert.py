"""Reading files of torch that hold more than tensors, without executing anything in them.

The checkpoints of the original CoOp and CoCoOp hold a pickled learning-rate schedule, and OpenAI's weights are
TorchScript programs: ``torch.load(weights_only=True)`` refuses both as a whole, and ``torch.jit.load`` runs what a
program wants to have run when it is loaded. Neither switch is turned off here. Both kinds of file are a pickle of
descriptions beside the plain bytes of the tensors, in a zip archive or (before torch 1.6) one after the other, and that
is what is read:

- whatever a pickle names becomes an inert placeholder: nothing is imported, no function of its choice is called. Not
  even tensors are made while it is read, only descriptions of them (:class:`Stored`);
- a tensor is then made of the bytes of its storage: of a known type, within the bounds of that storage, and all of them
  together no larger than the file.

No private part of any library is used, so it does the same with any version of torch.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from .errors import UserError

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # magic number and version of the format before torch 1.6
MOST_TENSORS = 100_000  # in a program: modules may refer to each other, also in circles
MEMO = ("PUT", "BINPUT", "LONG_BINPUT")


class Storage(NamedTuple):
    """Where the numbers of tensors are: the name of the storage in its file, and what it holds."""

    key: str
    dtype: torch.dtype
    numel: int


class Stored(NamedTuple):
    """A tensor as a pickle describes it; whether that makes sense is seen when the tensor is made."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class Table(dict):
    """Stands for an ordered dictionary; what a pickle wants to set on it is left out."""

    def __setstate__(self, state: Any) -> None:
        pass


class Placeholder:
    """Stands for an object of a class that is not known here: takes whatever a pickle gives it and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> None:
        pass

    __setitem__ = append = extend = add = _ignore


class ScriptModule(Placeholder):
    """Stands for a module of a TorchScript program: what it holds, without its code."""

    def __setstate__(self, state: Any) -> None:
        self.held = state


class Unpickler(pickle.Unpickler):
    """Reads plain containers and numbers, and descriptions of tensors."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module.startswith("__torch__"):
            return type("ScriptModule", (ScriptModule,), {})
        # New functions every time: a pickle can set attributes of what it has named.
        known = {
            "collections.OrderedDict": Table,
            "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *_: Stored(
                storage, offset, size, stride
            ),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        }
        return known.get(f"{module}.{name}") or type("Placeholder", (Placeholder,), {})

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel, *view = pid
        storage = Storage(key, dtype, numel)
        well_formed = kind == "storage" and isinstance(key, str) and isinstance(dtype, torch.dtype) and _counts(numel)
        if not well_formed or view not in ([], [None]) or self.storages.setdefault(key, storage) != storage:
            raise ValueError("a storage of a kind that is not known")
        return storage


def _counts(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def check_pickle(file: Any) -> None:
    """Look through a pickle and go back to its beginning.

    Raises:
        ValueError: it is cut short, or would have a table made that is larger than itself (gigabytes for a few bytes).
    """
    start = file.tell()
    most = max((arg for code, arg, _ in pickletools.genops(file) if code.name in MEMO), default=0)
    if most > file.tell() - start:
        raise ValueError("a pickle that wants more memory than it can need")
    file.seek(start)


def _unpickle(file: Any) -> tuple[Any, dict[str, Storage]]:
    check_pickle(file)
    unpickler = Unpickler(file)
    return unpickler.load(), unpickler.storages


class TensorFile:
    """What a file holds, as far as it is known here: containers, numbers, :class:`Stored` tensors, placeholders.

    Use it as a context: :meth:`tensor` reads from the file.

    Raises:
        ValueError, KeyError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, …: not of a known format.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        try:
            self._left = os.path.getsize(path)  # bytes that tensors may still take
            self._bytes: dict[str, bytearray] = {}
            self.content, self._read = self._open_zip() if zipfile.is_zipfile(self._file) else self._open_legacy()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def _open_zip(self) -> tuple[Any, Callable[[Storage], bytes]]:
        archive = zipfile.ZipFile(self._file)
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}  # all in one folder

        def read(name: str) -> bytes:
            if records[name].compress_type != zipfile.ZIP_STORED:
                raise ValueError("torch compresses nothing")
            return archive.read(records[name])

        if "byteorder" in records and read("byteorder") != b"little":
            raise ValueError("written on a machine with another order of bytes")
        content, _ = _unpickle(io.BytesIO(read("data.pkl")))
        return content, lambda storage: read(f"data/{storage.key}")

    def _open_legacy(self) -> tuple[Any, Callable[[Storage], bytes]]:
        file = self._file
        file.seek(0)
        if tuple(_unpickle(file)[0] for _ in LEGACY) != LEGACY or _unpickle(file)[0].get("little_endian") is not True:
            raise ValueError("not a file of torch")
        content, storages = _unpickle(file)
        places = {}
        for key in _unpickle(file)[0]:
            numel = int.from_bytes(file.read(8), "little")
            places[key] = file.tell(), _size(storages[key])
            if numel != storages[key].numel:
                raise ValueError("a storage of another size than is said")
            file.seek(_size(storages[key]), os.SEEK_CUR)

        def read(storage: Storage) -> bytes:
            file.seek(places[storage.key][0])
            return file.read(places[storage.key][1])

        return content, read

    def tensor(self, stored: Stored) -> torch.Tensor:
        """Make a tensor, on the CPU.

        Raises:
            ValueError: it does not lie within its storage, or all tensors together are larger than the file.
        """
        storage, offset, size, stride = stored
        shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
        if not isinstance(storage, Storage) or not shaped or not _counts(offset, *size, *stride):
            raise ValueError("a tensor of a kind that is not known")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        self._left -= math.prod(size) * _itemsize(storage.dtype)
        if self._left < 0 or (0 not in size and last >= storage.numel):
            raise ValueError("a tensor that is larger than what the file holds of it")
        if storage.numel == 0 or 0 in size:
            return torch.empty(size, dtype=storage.dtype)
        if storage.key not in self._bytes:
            self._bytes[storage.key] = bytearray(self._read(storage))
        content = self._bytes[storage.key]
        if len(content) != _size(storage):
            raise ValueError("a storage that is cut short")
        return torch.frombuffer(content, dtype=torch.uint8).view(storage.dtype).as_strided(size, stride, offset)


def _itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _size(storage: Storage) -> int:
    return storage.numel * _itemsize(storage.dtype)


# ------------------------------------------------------------------------------------------------- what is read


def is_jit_archive(path: str) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("constants.pkl") for entry in archive.namelist())


def refuse_programs(path: str) -> None:
    """Raises ValueError for TorchScript, which ``torch.load`` before 2.6 runs in spite of ``weights_only``, and for tar
    archives, which it unpacks."""
    if is_jit_archive(path) or tarfile.is_tarfile(path):
        raise ValueError("a TorchScript or tar archive")


def load_plain(path: str) -> Any:
    """``torch.load`` of tensors and plain types, on the CPU.

    Raises:
        ValueError: a TorchScript or tar archive.
        pickle.UnpicklingError: it holds anything else.
        Exception: whatever torch, zip and pickle say of a file that they cannot read.
    """
    refuse_programs(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_inert(path: str) -> dict[str, Any]:
    """A checkpoint's ``state_dict`` and ``epoch``, on the CPU; the rest is left out.

    Raises:
        ValueError: a program (TorchScript), an archive of files, or no state dict of tensors with an epoch.
        Exception: whatever zip and pickle say of a file that they cannot read.
    """
    refuse_programs(path)
    with TensorFile(path) as file:
        state, epoch = file.content["state_dict"], file.content["epoch"]
        tensors = all(isinstance(key, str) and isinstance(value, Stored) for key, value in state.items())
        if not tensors or type(epoch) is not int:
            raise ValueError("no state dict of tensors with an epoch")
        return {"state_dict": {key: file.tensor(value) for key, value in state.items()}, "epoch": epoch}


def load_weights(module: nn.Module, path: str) -> None:
    """Load into a module whatever fits by name and shape, as Dassl does, which has ``torch.load`` execute the file.

    Raises:
        UserError: the file cannot be read, or nothing in it fits.
    """
    own = module.state_dict()
    try:
        try:
            found = load_plain(path)
        except pickle.UnpicklingError:
            found = load_inert(path)
        offered = {key.removeprefix("module."): value for key, value in found.get("state_dict", found).items()}
        fitting = {key: offered[key] for key in own.keys() & offered.keys() if offered[key].shape == own[key].shape}
    except Exception as error:  # noqa: BLE001 (zip, pickle and torch each have errors of their own)
        raise UserError(f"MODEL.INIT_WEIGHTS {path}: cannot be read as weights ({type(error).__name__})") from error
    if not fitting:
        raise UserError(f"MODEL.INIT_WEIGHTS {path}: nothing in it fits, it holds {', '.join(offered) or 'nothing'}")
    module.load_state_dict({**own, **fitting})
    print(f"Successfully loaded pretrained weights from {path}")
    if len(fitting) < len(offered):
        print(f"Layers discarded due to unmatched keys or size: {sorted(offered.keys() - fitting.keys())}")


def load_script(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript program by their names in its state dict, on the CPU; its code is not looked at.

    Tensors that a module holds without having registered them come along (OpenAI's ``attn_mask``).

    Raises:
        ValueError: there are more modules than in any model.
        Exception: whatever zip and pickle say of a file that they cannot read.
    """

    def stored(module: Any, prefix: str) -> Iterator[tuple[str, Stored]]:
        for name, value in module.held.items():
            if isinstance(value, Stored):
                yield f"{prefix}{name}", value
            elif isinstance(value, ScriptModule):
                yield from stored(value, f"{prefix}{name}.")

    with TensorFile(path) as file:
        state: dict[str, torch.Tensor] = {}
        for name, value in stored(file.content, ""):
            state[name] = file.tensor(value)
            if len(state) > MOST_TENSORS:
                raise ValueError("more tensors than in any model")
        return state
