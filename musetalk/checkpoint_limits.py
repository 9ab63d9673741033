"""Bounds of a checkpoint, checked before any reader sees it: what it declares must fit what it has.

A few bytes can ask a reader for gigabytes: an index in the pickle's memo, a compressed member, the size of a storage, a
constructor that takes a size, a tuple that contains itself many times. The pickle's operations are read one by one,
without building anything. Knows the two formats of torch; nothing of networks.
"""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from musetalk.foreign_pickle import SizeReader

# Far more than the names and shapes of any network need.
MAX_PICKLE_BYTES = 64_000_000
# Torch stores members as they are; an archive that somebody compressed may be this much larger inside.
MAX_INFLATION = 2
_SLACK_BYTES = 1_000_000
# Values in a tuple, those in tuples inside it counted as often as they are met.
_MAX_TUPLE = 1_000_000
# Magic number, protocol and system in front of the object, the keys of its storages behind it.
_LEGACY_PICKLES = 5
_LEGACY_OBJECT = 3


class OversizeError(Exception):
    """The checkpoint asks for more than it contains."""


class RefusedNameError(pickle.UnpicklingError):
    """The pickle names a constructor that takes a size; a reader that builds none of them may still read the file."""


def check_zip(path: Path) -> bool:
    """Check a zip file that torch saved; return whether its members are stored as they are, so that it can be mapped.

    Raises OversizeError, RefusedNameError, and whatever the zip or pickle readers raise for damaged bytes.
    """
    n_bytes = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} for member in members):
            raise ValueError("it is compressed in a way that torch does not read")
        declared = sum(member.file_size for member in members)
        if declared > MAX_INFLATION * n_bytes + _SLACK_BYTES:
            raise OversizeError(f"declares {declared:,} bytes of content in a file of {n_bytes:,} bytes")
        sizes = {member.filename: member.file_size for member in members}
        for name in [name for name in sizes if name.endswith("/data.pkl")]:
            if sizes[name] > MAX_PICKLE_BYTES:
                raise OversizeError(f"has an index of {sizes[name]:,} bytes, {MAX_PICKLE_BYTES:,} at most are read")
            folder = name.removesuffix("data.pkl")
            pickled = archive.read(name)
            check_operations(pickled)
            for key, declared_bytes in SizeReader(pickled).storages().items():
                if declared_bytes > sizes.get(f"{folder}data/{key}", declared_bytes):
                    raise OversizeError(f"declares {declared_bytes:,} bytes for storage {key}, which has fewer")
    return all(member.compress_type == zipfile.ZIP_STORED for member in members)


def check_legacy(path: Path) -> None:
    """Check a file from before torch 1.6; raises OversizeError, RefusedNameError, or as the pickle readers do."""
    n_bytes = path.stat().st_size
    start = 0
    with path.open("rb") as file:
        for number in range(_LEGACY_PICKLES):
            pickled = _Limited(file, MAX_PICKLE_BYTES)
            check_operations(pickled)
            if number == _LEGACY_OBJECT:
                file.seek(start)
                declared = sum(SizeReader(file.read(pickled.n_read)).storages().values())
                if declared > n_bytes:
                    raise OversizeError(f"declares {declared:,} bytes of numbers in a file of {n_bytes:,} bytes")
            start += pickled.n_read


class _Limited:
    """A file of which at most so many bytes are read, and which counts them."""

    def __init__(self, file: IO[bytes], n_bytes: int) -> None:
        self._file, self._n_bytes = file, n_bytes
        self.n_read = 0

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        return self._counted(self._file.read(max(0, min(size, self._n_bytes - self.n_read))))

    def readline(self) -> bytes:
        """Read up to the end of the line."""
        return self._counted(self._file.readline(max(0, self._n_bytes - self.n_read)))

    def _counted(self, data: bytes) -> bytes:
        self.n_read += len(data)
        return data


def check_operations(pickled: bytes | _Limited) -> None:
    """Check the operations of one pickle.

    Raises OversizeError for an index of the memo that no pickle of this length needs and for tuples that multiply,
    RefusedNameError for constructors that take a size, ValueError and others for bytes that are no pickle.
    """
    with warnings.catch_warnings():
        # Damaged texts contain escapes that Python does not know.
        warnings.simplefilter("ignore", DeprecationWarning)
        _check_sizes(pickletools.genops(pickled))  # type: ignore[arg-type]  # its readers need no more than _Limited


def _check_sizes(operations: Iterable[tuple[Any, Any, Any]]) -> None:
    stack: list[int | None] = []
    memo: dict[int, int] = {}
    for n_operations, (operation, argument, _position) in enumerate(operations, 1):
        name = operation.name
        if name in _PUTS:
            index = len(memo) if name == "MEMOIZE" else int(argument)
            # Each value that is put took an operation to make.
            if index > 2 * n_operations + 1000:
                raise OversizeError(f"asks for {index:,} remembered values after {n_operations:,} operations")
            memo[index] = (stack[-1] or 1) if stack else 1
        elif name in _GETS:
            stack.append(memo.get(int(argument), 1))
        elif name == "GLOBAL":
            stack.append(_size_of_name(str(argument)))
        else:
            _apply(operation, stack)


_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"}
_SIZE_TAKER = -1
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}


def _apply(operation: Any, stack: list[int | None]) -> None:
    """Do to the stack of sizes what the operation does to the stack of values; None is a mark."""
    if operation.name == "DUP":
        stack.append(stack[-1] if stack else 1)
        return
    taken: list[int] = []
    before = operation.stack_before
    if pickletools.markobject in before:
        while stack and (size := stack.pop()) is not None:
            taken.append(size)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        size = stack.pop() if stack else None
        taken.append(size or 1)
    if operation.name in _CALLS and taken and taken[-1] == _SIZE_TAKER:
        raise RefusedNameError("the file asks for an empty storage of some size")
    result = 1
    if operation.name in _TUPLES:
        # Hashing and printing visit each value as often as it is met.
        result = 1 + sum(abs(size) for size in taken)
        if result > _MAX_TUPLE:
            raise OversizeError(f"has a tuple of more than {_MAX_TUPLE:,} values")
    stack.extend(None if kind is pickletools.markobject else result for kind in operation.stack_after)


def _size_of_name(name: str) -> int:
    """1, or _SIZE_TAKER for a class that may be named but not called; raises RefusedNameError for others like it."""
    module, _, function = name.partition(" ")
    is_torch = module.partition(".")[0] == "torch"
    # The last one calls any function that is named beside it.
    if function in {"bytearray", "_rebuild_from_type_v2"} or (is_torch and function.endswith("Tensor")):
        raise RefusedNameError(f"the file asks for {module}.{function}, which takes a size")
    return _SIZE_TAKER if is_torch and function.endswith(("UntypedStorage", "TypedStorage")) else 1
