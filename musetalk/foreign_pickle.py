"""Reader of checkpoints that contain another library's objects; it builds and imports none of them.

Torch's own protected reader refuses such a file as soon as it contains, say, a subclass of dict. This reader resolves
every name in the file itself: tensors and their storages are real, everything else becomes an inert object that ignores
its arguments. Knows the format of torch's zip files; nothing of networks.
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


# No library's checkpoint needs these modules; a file that names one is an attack and is refused as a whole.
_HOSTILE_MODULES = {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "importlib", "runpy", "ctypes"}


class InertObject:
    """Stand-in for any class or function of the file: it can be called, filled and set, and does nothing."""

    def __new__(cls, *_args: object, **_options: object) -> InertObject:
        """Create a stand-in, whatever the arguments are."""
        return super().__new__(cls)

    def __init__(self, *_args: object, **_options: object) -> None:
        """Ignore the arguments."""

    def __call__(self, *_args: object, **_options: object) -> InertObject:
        """Return the stand-in for the result of a function."""
        return InertObject()

    def __setstate__(self, _state: object) -> None:
        """Ignore an object's state."""

    def __setitem__(self, _key: object, _value: object) -> None:
        """Ignore an item of a mapping."""

    def append(self, _item: object) -> None:
        """Ignore an item of a list."""

    def extend(self, _items: object) -> None:
        """Ignore items of a list."""

    add = append
    update = extend


class _Reader(pickle._Unpickler):
    """Unpickler that resolves every global itself; the base's `find_class`, which imports, is never called.

    The base is Python's own and not the faster one in C, whose memo is an array: one index of it allocates gigabytes.
    """

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the real function for the few names that build tensors and plain dictionaries, else InertObject.

        Raises UnpicklingError for names of modules that reach the operating system.
        """
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): _tensor_with_attributes,
        }
        if module.partition(".")[0] in _HOSTILE_MODULES:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no checkpoint needs")
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return known.get((module, name), InertObject)

    def persistent_load(self, pid: Any) -> Tensor:
        """Return elements (n,) of a storage by its id ("storage", dtype, key, device, n); raises UnpicklingError."""
        kind, dtype, key, _device, n_elements = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isdigit():
            raise pickle.UnpicklingError("the file refers to something that is no storage")
        if key not in self._storages:
            member = f"{self._folder}/data/{key}"
            n_bytes = self._archive.getinfo(member).file_size
            # Compared before it is read.
            if n_bytes != n_elements * dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"storage {key} has {n_bytes} bytes, {n_elements * dtype.itemsize} expected"
                )
            data = self._archive.read(member)
            # A bytearray, because torch warns about tensors in read-only memory.
            self._storages[key] = (
                torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            )
        return self._storages[key]


class SizeReader(pickle._Unpickler):
    """Unpickler that builds nothing and notes the size of every storage that the pickle refers to."""

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self._sizes: dict[str, int] = {}

    def storages(self) -> dict[str, int]:
        """Bytes of each storage by key; raises whatever pickle raises for damaged bytes."""
        self.load()
        return self._sizes

    def find_class(self, module: str, name: str) -> Any:
        """Return the type of a storage, else a stand-in."""
        return _STORAGES[name] if module == "torch" and name in _STORAGES else InertObject

    def persistent_load(self, pid: Any) -> InertObject:
        """Note a storage's size."""
        if isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[1], torch.dtype) and type(pid[4]) is int:
            key = str(pid[2])
            self._sizes[key] = max(self._sizes.get(key, 0), pid[4] * pid[1].itemsize)
        return InertObject()


def rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: object
) -> Tensor:
    """Return the view of shape `size` that begins at element `offset` of `storage` (n,); `stride` counts elements.

    Raises UnpicklingError if the view leaves the storage.
    """
    numbers = (offset, *size, *stride)
    # Not isinstance: a bool is an int.
    if len(size) != len(stride) or any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor's size or stride makes no sense")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(storage):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return storage.as_strided(size, stride, offset if math.prod(size) else 0)


def _parameter(data: Tensor, *_rest: object) -> Tensor:
    return data


def _tensor_with_attributes(function: Any, _type: object, arguments: tuple[Any, ...], *_rest: object) -> object:
    return rebuild_tensor(*arguments) if function is rebuild_tensor else InertObject()


def read_foreign(path: Path) -> object:
    """Read the zip file `path` that torch saved; every object that is neither tensor nor plain value becomes inert.

    Raises zipfile.BadZipFile, KeyError, pickle.UnpicklingError, and whatever pickle raises for damaged bytes.
    """
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("/data.pkl")
        order = f"{folder}/byteorder"
        # The bytes of the storages are used as they are, which would give wrong numbers silently.
        if order in archive.namelist() and archive.read(order) != b"little":
            raise pickle.UnpicklingError("the file was written on a big-endian machine")
        return _Reader(io.BytesIO(archive.read(pickled)), archive, folder).load()
