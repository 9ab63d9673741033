"""Inputs named by `file:` addresses: only in allowed folders, only regular files. Knows no network."""

from __future__ import annotations

import mimetypes
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from musetalk.errors import DownloadError

BLOCK_BYTES = 64 * 1024


class Part(Protocol):
    """The file that receives the copy, with the limits of the job."""

    def expect(self, n_more: int) -> None:
        """Raise when `n_more` bytes would be too many."""

    def write(self, block: bytes) -> None:
        """Append the next bytes."""


def copy_local(url: str, part: Part, roots: Sequence[Path] | None, check: Callable[[], None]) -> str | None:
    """Copy the file that a `file:` address names into `part` and return its content type by its name.

    `roots` are the allowed folders (None: `file:` addresses are refused). `check()` is called between blocks and may
    raise. Raises DownloadError.
    """
    path = _local_path(url, roots)
    try:
        # Without following a link that was created since the check, and without hanging on a pipe.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        raise DownloadError("the file named by a file: address does not exist", url="file:…") from None
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise DownloadError("the file: address does not name a regular file", url="file:…")
        part.expect(info.st_size)
        while block := os.read(handle, BLOCK_BYTES):
            check()
            part.write(block)
    except OSError:
        raise DownloadError("the file named by a file: address could not be read", url="file:…") from None
    finally:
        os.close(handle)
    return mimetypes.guess_type(path.name)[0]


def _local_path(url: str, roots: Sequence[Path] | None) -> Path:
    if roots is None:
        raise DownloadError("the address was refused: file: addresses are not allowed here", url="file:…")
    try:
        parts = urlsplit(url)
        text = unquote(parts.path, errors="strict")
        is_plain = parts.netloc.lower() in {"", "localhost"} and not parts.query and not parts.fragment
    except ValueError:
        is_plain = False
    if not is_plain or not text.startswith("/") or "\0" in text:
        raise DownloadError("the address was refused: it is not a plain file: address", url="file:…")
    try:
        path = Path(text).resolve()
        is_inside = any(path.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError):
        is_inside = False
    if not is_inside:  # refused first, so that the answer does not reveal whether the file exists
        raise DownloadError("the address was refused: it leads outside the allowed folders", url="file:…")
    return path
