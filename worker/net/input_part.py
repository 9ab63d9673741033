"""The growing file of one input while it arrives: its limit in bytes, the room on the disk, its first bytes."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

from musetalk.errors import DiskFullError, DownloadError, ProcessingError
from musetalk.files import PartFile, is_disk_full, part_path
from worker.net.addresses import redact_url

Kind = Literal["video", "audio"]
# A download leaves this much free, because the rest of the job writes files as well.
SPARE_DISK_BYTES = 64 * 2**20


class InputPart(PartFile):
    """Growing input file with a temporary name and a byte limit; removed unless committed.

    Raises DownloadError beyond the limit, DiskFullError, or ProcessingError for other errors of the disk.
    """

    def __init__(self, destination: Path, kind: Kind, limit: int, url: str) -> None:
        super().__init__(part_path(destination))
        self.kind, self.limit = kind, limit
        self._url, self._destination = url, destination

    def __enter__(self) -> InputPart:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.remove()

    def check_room(self, n_more: int) -> None:
        """Raise if `n_more` bytes would exceed the limit or do not fit on the disk."""
        if self.n_bytes + n_more > self.limit:
            raise self._too_large()
        with self.disk_errors():
            free = shutil.disk_usage(self._destination.parent).free
        if free < n_more + SPARE_DISK_BYTES:
            raise DiskFullError(
                f"the disk has too little room for the {self.kind} of {self.n_bytes + n_more} bytes",
                n_bytes=self.n_bytes + n_more,
            )

    def head(self, n_bytes: int) -> bytes:
        """The first bytes that were written."""
        with self.disk_errors(), self._path.open("rb") as file:
            return file.read(n_bytes)

    def write(self, block: bytes) -> None:
        """Append the next bytes."""
        if self.n_bytes + len(block) > self.limit:
            raise self._too_large()
        super().write(block)

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Translate OSError; the text of the new error contains no path."""
        try:
            yield
        except OSError as problem:
            if is_disk_full(problem):
                raise DiskFullError(f"the disk is full; the {self.kind} could not be written") from None
            name = errno.errorcode.get(problem.errno or 0, "unknown")
            raise ProcessingError(f"the {self.kind} could not be written ({name})") from None

    def _too_large(self) -> DownloadError:
        return DownloadError(
            f"the {self.kind} is too large: more than {self.limit} bytes", url=redact_url(self._url), limit=self.limit
        )
