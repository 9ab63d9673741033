"""Files that appear whole or not at all, a file that grows while it is received, and the errors of a full disk.

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
    """A new temporary name beside `path`: hidden, and not longer when the name of `path` is long."""
    return path.with_name(f".{secrets.token_hex(8)}{suffix}")


def sync(path: Path) -> None:
    """fsync the file, so that a rename never publishes data a crash could lose. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """A file that grows while it is received, with its SHA-256; an existing one is read and continued.

    `errors` is the context of every access to the disk: subclasses translate OSError there. The file stays when the
    block ends, so that a later one resumes it; `remove` or `commit` end it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        self.n_bytes = 0

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """The context of every access to the disk; OSError passes unless a subclass translates it."""
        return contextlib.nullcontext()

    def __enter__(self) -> PartFile:
        with self.errors():
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
        # A failed write has been reported already.
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
        with self.errors():
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(block)
        self.n_bytes += len(block)

    def restart(self) -> None:
        """Drop what was received."""
        assert self._file is not None
        with self.errors():
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
        """Close the file and rename it to `destination`; fsync it before if it `is_durable`."""
        with self.errors():
            self.close()
            if is_durable:
                sync(self._path)
            self._path.replace(destination)
