"""Tensors of a checkpoint that is full of another library's objects, none of which is built or imported.

Torch's own protected reader refuses such a file when it meets, say, a subclass of dict. Here every name the file asks
for is answered by this module alone: tensors and their storages are real, everything else is an inert object that
ignores its arguments. Knows the format of torch's zip files; nothing of networks.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


# A file that asks for these is no checkpoint of any library.
_HOSTILE_MODULES = {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "importlib", "runpy", "ctypes"}


class Swallower:
    """Stands for any class or function of the file: can be called, filled and set, and does nothing."""

    def __new__(cls, *_args: object, **_options: object) -> Swallower:
        """An empty stand-in, whatever it is called with."""
        return super().__new__(cls)

    def __init__(self, *_args: object, **_options: object) -> None:
        """Inert stand-in: accepts every call and keeps nothing."""

    def __call__(self, *_args: object, **_options: object) -> Swallower:
        """Result of an ignored function."""
        return Swallower()

    def __setstate__(self, _state: object) -> None:
        """Keeps nothing of an object's state."""

    def __setitem__(self, _key: object, _value: object) -> None:
        """Keeps nothing of a mapping's items."""

    def append(self, _item: object) -> None:
        """Keeps nothing of a list's item."""

    def extend(self, _items: object) -> None:
        """Keeps nothing of a list's items."""

    add = append
    update = extend


class _Reader(pickle.Unpickler):
    """Answers every global itself; `find_class` of the base, which imports, is never reached."""

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few names that make tensors and plain dictionaries; a Swallower for all others.

        Raises UnpicklingError for names that reach for the machine.
        """
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if module.partition(".")[0] in _HOSTILE_MODULES:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no checkpoint needs")
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return known.get((module, name), Swallower)

    def persistent_load(self, pid: Any) -> Tensor:
        """The elements (n,) of a storage, by its ("storage", type, key, device, n)."""
        kind, dtype, key, _device, n_elements = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isdigit():
            raise pickle.UnpicklingError("the file refers to something that is no storage")
        if key not in self._storages:
            data = self._archive.read(f"{self._folder}/data/{key}")
            if len(data) != n_elements * dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"storage {key} has {len(data)} bytes, {n_elements * dtype.itemsize} expected"
                )
            self._storages[key] = (
                torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            )
        return self._storages[key]


def rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: object
) -> Tensor:
    """The tensor of shape `size` at element `offset` of a storage (n,); raises UnpicklingError when it leaves it."""
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor's size or stride makes no sense")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(storage):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return storage.as_strided(size, stride, offset if math.prod(size) else 0)


def _parameter(data: Tensor, *_rest: object) -> Tensor:
    return data


def read_foreign(path: Path) -> object:
    """Read the zip file `path` that torch saved; every object that is neither tensor nor plain value becomes inert.

    Raises zipfile.BadZipFile, KeyError or pickle.UnpicklingError (and what pickle raises for damaged files).
    """
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("/data.pkl")
        order = f"{folder}/byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise pickle.UnpicklingError("the file was written on a big-endian machine")
        return _Reader(io.BytesIO(archive.read(pickled)), archive, folder).load()
