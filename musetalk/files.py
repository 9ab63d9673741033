"""Files that appear whole or not at all, the growing file of a download, and the errors of a full disk.

Knows no formats, no network and no settings.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

_BLOCK_BYTES = 2**20
# No space, no quota, and the process's own limit on the size of a file.
_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that no more bytes can be written: disk, quota or file-size limit."""
    # FFmpeg's errors have the number without being an OSError.
    return getattr(error, "errno", None) in _FULL_DISK


def part_path(path: Path, suffix: str = ".part") -> Path:
    """Return a new temporary name beside `path`: hidden, random, and short, however long the name of `path` is."""
    return path.with_name(f".{secrets.token_hex(8)}{suffix}")


def sync(path: Path) -> None:
    """fsync the file, so that a rename never publishes data a crash could lose. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def close_all(place: os.stat_result) -> None:
    """Close every descriptor that this process has of one file, for libraries that leave a given-up file open."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(int(name)), place):
                    os.close(int(name))


@contextlib.contextmanager
def replacing(path: Path, *, suffix: str = ".part", mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after the block the file written there replaces `path`.

    The file is on the disk before it gets its name, and gets the permissions `mode` if given. When the block or the
    rename raises, `path` is as it was and the temporary file is gone. Raises OSError.
    """
    part = part_path(path, suffix)
    try:
        yield part
        if mode is not None:
            part.chmod(mode)
        sync(part)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


class PartFile:
    """Growing file of a download, with its SHA-256; an existing file is hashed and continued.

    Every access to the disk happens inside `disk_errors`, where subclasses translate OSError. The file stays after the
    block, so that a later download can resume it; `remove` deletes it and `commit` names it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        self.n_bytes = 0

    def disk_errors(self) -> contextlib.AbstractContextManager[None]:
        """Context of every access to the disk; OSError passes unless a subclass translates it."""
        return contextlib.nullcontext()

    def __enter__(self) -> PartFile:
        with self.disk_errors():
            self._path.touch()
            # Unbuffered: after a kill the file has every byte that was received.
            self._file = self._path.open("r+b", buffering=0)
            while block := self._file.read(_BLOCK_BYTES):
                self._hash.update(block)
                self.n_bytes += len(block)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # `write` has raised already if the disk failed.
        with contextlib.suppress(OSError):
            self.close()

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes so far, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, block: bytes) -> None:
        """Append the next bytes."""
        assert self._file is not None
        rest = memoryview(block)
        with self.disk_errors():
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(block)
        self.n_bytes += len(block)

    def restart(self) -> None:
        """Drop the received bytes."""
        assert self._file is not None
        with self.disk_errors():
            self._file.seek(0)
            self._file.truncate()
        self._hash, self.n_bytes = hashlib.sha256(), 0

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)

    def commit(self, destination: Path, *, is_durable: bool = True) -> None:
        """Close the file and rename it to `destination`; `is_durable` adds an fsync before the rename."""
        with self.disk_errors():
            self.close()
            if is_durable:
                sync(self._path)
            self._path.replace(destination)
