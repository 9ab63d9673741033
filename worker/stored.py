"""Parts that all stores share: the stored object, object names, the sidecar's bytes, the limit of one upload.

Knows neither the bucket nor the local folder, no downloads, no jobs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from musetalk.errors import CancelledError, DeadlineError, DiskFullError, ProcessingError, SettingsError, StorageError
from musetalk.files import is_disk_full

_BLOCK_BYTES = 2**20
_POLL_S = 0.05
# b2sdk refuses longer names.
_MAX_NAME_BYTES = 1000
# With the hash and the suffix a stem stays below 250 bytes, the most that B2 accepts between two slashes.
_MAX_STEM_CHARS = 200


@dataclass(frozen=True)
class StoredObject:
    """A finished file where callers can reach it; `url` may carry a token, so it is kept out of `repr`."""

    name: str
    url: str = field(repr=False)
    n_bytes: int
    sha1: str
    bucket: str | None


class Store(Protocol):
    """Destination of finished files."""

    def check(self) -> None:
        """Check before the first job that uploads can work.

        Raises SettingsError if the store refuses the configured key, bucket or rights. Other problems are only logged:
        a store that is unreachable now may be back when the first video is finished.
        """

    def upload(
        self,
        path: Path,
        job_id: str | None,
        sidecar: Mapping[str, object],
        *,
        deadline_s: float,
        should_stop: Callable[[], bool] = ...,
    ) -> StoredObject:
        """Store the MP4 at `path` and its sidecar; a repeated job id replaces what was stored before.

        The sidecar gets `b2_bucket`, `b2_file_name`, `size_bytes` and `sha1`; if it cannot be stored, the store logs
        that and the upload still succeeds. Raises StorageError, DeadlineError after `deadline_s` seconds,
        CancelledError once `should_stop()` is true, DiskFullError.
        """


def object_name(prefix: str, job_id: str | None, suffix: str = ".mp4") -> str:
    """Return the object's name for a job, `{prefix}/{job id}.mp4`, or `manual-{uuid4}` without an id.

    Letters, digits, `-`, `_` and inner dots stay; every other byte becomes `~XX`. A long id is cut and gets a hash. So
    different ids have different names, and each name is safe in a URL, a bucket and a folder. Specified in
    docs/protocol.md#stored-objects. Raises SettingsError if the prefix leaves no room.
    """
    stem = _escape(job_id) if job_id else f"manual-{uuid.uuid4()}"
    if len(stem) > _MAX_STEM_CHARS:
        digest = hashlib.sha256(str(job_id).encode("utf-8", "surrogatepass")).hexdigest()[:32]
        # No escaped id contains `~~`, so a cut one cannot equal a short one.
        stem = f"{stem[:_MAX_STEM_CHARS]}~~{digest}"
    parts = [_escape(part) for part in prefix.split("/") if part]
    name = "/".join([*parts, stem + suffix])
    if len(name) > _MAX_NAME_BYTES or any(len(part) > 250 for part in parts):
        raise SettingsError(f"the prefix of object names is too long ({len(prefix)} characters)")
    return name


def _escape(text: str) -> str:
    # "surrogatepass": a JSON string may contain half of a surrogate pair, which UTF-8 cannot encode.
    escaped = re.sub(rb"[^A-Za-z0-9._-]", lambda match: b"~%02X" % match[0][0], text.encode("utf-8", "surrogatepass"))
    return re.sub(r"^\.", "~2E", escaped.decode("ascii"))


def sidecar_bytes(sidecar: Mapping[str, object], stored: StoredObject) -> bytes:
    """Return the sidecar as JSON, with the fields that only the store knows."""
    body = {
        **sidecar,
        "b2_bucket": stored.bucket,
        "b2_file_name": stored.name,
        "size_bytes": stored.n_bytes,
        "sha1": stored.sha1,
    }
    return json.dumps(body, ensure_ascii=False, indent=1, default=str).encode("utf-8", "replace")


class TimeLimit:
    """Deadline of one upload, and whether its job is to stop."""

    def __init__(self, seconds: float, should_stop: Callable[[], bool]) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._should_stop = should_stop
        self.last_fault = ""

    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        return self._until - time.monotonic()

    def check(self) -> None:
        """Raise CancelledError if the job is to stop, DeadlineError if the time is up."""
        if self._should_stop():
            raise CancelledError("the job was stopped during the upload")
        if self.remaining_s() <= 0:
            text = f"the upload did not finish within {self._seconds:g} s"
            raise DeadlineError(text + (f": {self.last_fault}" if self.last_fault else ""), limit_s=self._seconds)

    def pause(self, seconds: float) -> None:
        """Wait; raises as `check` as soon as the upload has to end."""
        until = time.monotonic() + seconds
        while (rest := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(rest, _POLL_S))


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Translate OSError into DiskFullError or StorageError; their texts contain no path."""
    try:
        yield
    except OSError as problem:
        if is_disk_full(problem):
            raise DiskFullError("the disk of the output folder is full") from None
        name = errno.errorcode.get(problem.errno or 0, "unknown")
        raise StorageError(f"the finished file could not be read or stored ({name})") from None


def sha1_of(path: Path, limit: TimeLimit, copy: Callable[[bytes], object] = len) -> tuple[str, int]:
    """Return SHA-1 (hex) and bytes of a file; each block read is also passed to `copy`.

    Raises ProcessingError for an empty file, StorageError, DiskFullError, and as `TimeLimit.check`.
    """
    # SHA-1, because B2 checks and lists its files by it.
    digest, n_bytes = hashlib.sha1(usedforsecurity=False), 0
    with disk_errors(), path.open("rb") as source:
        while block := source.read(_BLOCK_BYTES):
            limit.check()
            digest.update(block)
            n_bytes += len(block)
            copy(block)
    if n_bytes == 0:
        raise ProcessingError("the output is empty", retryable=False)
    return digest.hexdigest(), n_bytes
