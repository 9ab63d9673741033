"""Small files of WORK_DIR that must survive a full disk and bad content: claims and outcomes. Knows no jobs.

A file is written whole or not at all. A reserve of allocated bytes takes an outcome when the disk is full. Nothing is
read that is no regular file or too large; what cannot be used is moved aside, so that it is found only once.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import Protocol

from musetalk.files import replacing, sync
from worker.machine import folder_problem

# Largest record that is written, and the size of the reserve: outcomes have 1 to 10 KB.
RECORD_BYTES = 65_536
# Largest record that is read: earlier versions wrote without a limit.
READ_BYTES = 2**20
# With MIN_FREE_DISK_MB=0 as well: on a disk with less, a job could only fail.
MIN_FREE_BYTES = 2**20
QUARANTINE = "quarantine"
_RESERVE = ".reserve"
# Errors of the system that may pass; any other error of a file belongs to that file.
_PASSING = frozenset({errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT})


class BadRecordError(Exception):
    """A file that will never be usable; the text says why."""


class Disk(Protocol):
    """The records of one worker by their names (`claimed.json`, `outbox/1.json`); the simulator has another one."""

    def problem(self) -> str | None:
        """Reason why a claim and its outcome could not be stored now, or None."""

    def names(self, folder: str, limit: int) -> list[str]:
        """Names of the `*.json` files in `folder`, newest first, at most `limit`. Raises OSError."""

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None when it does not exist. Raises BadRecordError, and OSError that may pass."""

    def write(self, name: str, data: bytes, *, may_use_reserve: bool = False) -> None:
        """Replace a file as a whole. Raises OSError; the file is then as it was."""

    def move(self, name: str, to: str) -> None:
        """Rename a file, replacing `to`. Raises OSError."""

    def remove(self, name: str) -> None:
        """Remove a file, if it exists. Raises OSError."""

    def set_aside(self, name: str, folder: str) -> None:
        """Move whatever has this name into `folder`, under a new name. Raises OSError."""


class WorkDisk:
    """The records in WORK_DIR."""

    def __init__(self, folder: Path, *, min_free_mb: int) -> None:
        """Touch nothing yet: the folder may not exist and may belong to another worker."""
        self._folder, self._min_free_mb = folder, min_free_mb
        self._reserve = folder / _RESERVE

    def problem(self) -> str | None:
        """Reason why a claim and its outcome could not be stored now, or None; makes the reserve."""
        if (problem := folder_problem(self._folder, "WORK_DIR", self._min_free_mb)) is not None:
            return problem
        try:
            self._make_reserve()
            if shutil.disk_usage(self._folder).free < MIN_FREE_BYTES:
                return "WORK_DIR has less than 1 MiB free"
        except OSError as error:
            return f"WORK_DIR has no room for outcomes ({error_reason(error)})"
        return None

    def _make_reserve(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = self._reserve.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_size == RECORD_BYTES:
                return
            if not stat.S_ISREG(found.st_mode):
                self.set_aside(_RESERVE, QUARANTINE)
        with replacing(self._reserve) as part:
            # Written and not only sized: a file with holes has no bytes of its own on a full disk.
            part.write_bytes(b" " * RECORD_BYTES)

    def names(self, folder: str, limit: int) -> list[str]:
        """Names of the `*.json` files in `folder`, newest first, at most `limit`; another thing there is moved aside.

        Raises OSError.
        """
        path = self._folder / folder
        if not path.is_dir() and os.path.lexists(path):
            self.set_aside(folder, QUARANTINE)
        path.mkdir(parents=True, exist_ok=True)
        with os.scandir(path) as entries:
            found = ((_changed(entry), entry.name) for entry in entries if entry.name.endswith(".json"))
            return [f"{folder}/{name}" for _, name in heapq.nlargest(limit, found)]

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None when it does not exist. Raises BadRecordError, and OSError that may pass."""
        try:
            # A pipe would block the open, and a link may lead anywhere.
            fd = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in _PASSING:
                raise
            raise BadRecordError(error_reason(error)) from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadRecordError("not a regular file")
            with os.fdopen(fd, "rb", closefd=False) as file:
                data = file.read(READ_BYTES + 1)
        finally:
            os.close(fd)
        if len(data) > READ_BYTES:
            raise BadRecordError(f"larger than {READ_BYTES} bytes")
        return data

    def write(self, name: str, data: bytes, *, may_use_reserve: bool = False) -> None:
        """Replace a file as a whole; on a full disk, with the bytes of the reserve if allowed.

        Raises OSError; the file is then as it was.
        """
        path = self._folder / name
        try:
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(path.lstat().st_mode):
                    self.set_aside(name, QUARANTINE)
            with replacing(path) as part:
                part.write_bytes(data)
        except OSError:
            if not may_use_reserve:
                raise
            self._write_reserved(path, data)
        # After a power loss the name must be there as well; not every file system can do this.
        with contextlib.suppress(OSError):
            sync(path.parent)

    def _write_reserved(self, path: Path, data: bytes) -> None:
        with self._reserve.open("r+b", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            file.truncate(len(data))
            os.fsync(file.fileno())
        self._reserve.replace(path)

    def move(self, name: str, to: str) -> None:
        """Rename a file, replacing `to`. Raises OSError."""
        target = self._folder / to
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(target.lstat().st_mode):
                self.set_aside(to, QUARANTINE)
        target.parent.mkdir(exist_ok=True)
        (self._folder / name).replace(target)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists. Raises OSError."""
        (self._folder / name).unlink(missing_ok=True)

    def set_aside(self, name: str, folder: str) -> None:
        """Move whatever has this name into `folder`, under a new name. Raises OSError."""
        place = self._folder / folder
        if os.path.lexists(place) and not place.is_dir():
            place.rename(place.with_name(f"{folder}-{secrets.token_hex(4)}"))
        place.mkdir(exist_ok=True)
        # The old name may be as long as a name can be, and may not be text.
        old = printable(Path(name).name.lstrip("."))[:60]
        (self._folder / name).rename(place / f"{secrets.token_hex(4)}-{old}")


def _changed(entry: os.DirEntry[str]) -> int:
    """When the file was last changed, in nanoseconds; 0 when it has vanished meanwhile."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime_ns
    except OSError:
        return 0


def printable(text: str) -> str:
    """`text` as a log can take it: characters that cannot be encoded or printed become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def error_reason(error: OSError) -> str:
    """The system's words for an error, without paths."""
    return error.strerror or type(error).__name__
