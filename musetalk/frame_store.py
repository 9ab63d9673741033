"""Prepared source frames kept for a second showing: in memory up to a budget, beyond it in one scratch file.

The backwards leg of a short source needs every frame again in any order, and a minute of 1080p is four gigabytes.
Knows only named arrays.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from musetalk.errors import DiskFullError
from musetalk.files import is_disk_full

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Place:
    """Place of one array in the scratch file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class FrameStore:
    """Records of named arrays by number; use in a `with` block."""

    def __init__(self, folder: Path, *, memory_bytes: int, disk_bytes: int) -> None:
        """Store of frames: up to `memory_bytes` in memory, up to `disk_bytes` in an unnamed file in `folder`."""
        self._folder, self._memory_bytes, self._disk_bytes = folder, memory_bytes, disk_bytes
        self._in_memory: dict[int, dict[str, NDArray[Any]]] = {}
        self._on_disk: dict[int, dict[str, _Place]] = {}
        self.memory_used = 0
        self.disk_used = 0
        self._file: int | None = None

    def __enter__(self) -> FrameStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._in_memory) + len(self._on_disk)

    def put(self, number: int, arrays: Arrays) -> None:
        """Keep a record under `number`; an existing record stays, because it is the same picture.

        The arrays must not be written to afterwards. Raises DiskFullError when neither budget has room, or the disk.
        """
        if number in self._in_memory or number in self._on_disk:
            return
        size = sum(array.nbytes for array in arrays.values())
        if self.memory_used + size <= self._memory_bytes:
            self._in_memory[number] = dict(arrays)
            self.memory_used += size
            return
        if self.disk_used + size > self._disk_bytes:
            raise DiskFullError(
                "the source has more frames than the memory and scratch budgets allow",
                retryable=False,
                frames_kept=len(self),
                scratch_bytes=self._disk_bytes,
            )
        self._on_disk[number] = {name: self._write(array) for name, array in arrays.items()}

    def get(self, number: int) -> dict[str, NDArray[Any]]:
        """Return the arrays kept under `number`, with their shapes and types; raises KeyError when there are none."""
        if number in self._in_memory:
            return self._in_memory[number]
        return {name: self._read(place) for name, place in self._on_disk[number].items()}

    def close(self) -> None:
        """Give memory and disk back; safe to call twice."""
        self._in_memory.clear()
        self._on_disk.clear()
        self.memory_used = self.disk_used = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, array: NDArray[Any]) -> _Place:
        place = _Place(self.disk_used, array.shape, array.dtype)
        data = _bytes_of(np.ascontiguousarray(array)) if array.size else memoryview(b"")
        written = 0
        try:
            if self._file is None:
                self._file, name = tempfile.mkstemp(prefix="frames-", dir=self._folder)
                # Without a name the file is gone with the process, however that ends.
                os.unlink(name)
            while written < len(data):
                written += os.pwrite(self._file, data[written:], place.offset + written)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError("the disk is full; frames of the source could not be kept") from None
            raise
        self.disk_used += len(data)
        return place

    def _read(self, place: _Place) -> NDArray[Any]:
        assert self._file is not None
        array = np.empty(place.shape, place.dtype)
        if array.size:
            view = _bytes_of(array)
            done = 0
            while done < len(view):
                count = os.preadv(self._file, [view[done:]], place.offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "the scratch file is shorter than what was written")
                done += count
        return array


def _bytes_of(array: Any) -> memoryview:
    """The memory of a contiguous array, byte by byte."""
    return memoryview(array).cast("B")
