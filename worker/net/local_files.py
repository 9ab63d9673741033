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
    """File that receives the copy; it enforces the limits of the job."""

    def check_room(self, n_more: int) -> None:
        """Raise if `n_more` bytes would be too many."""

    def write(self, block: bytes) -> None:
        """Append the next bytes."""


def copy_local(url: str, part: Part, roots: Sequence[Path] | None, check: Callable[[], None]) -> str | None:
    """Copy the file of a `file:` address into `part`; return the content type that its name suggests.

    `roots` are the allowed folders (None: `file:` addresses are refused). `check()` is called between blocks and may
    raise. Raises DownloadError; no text or detail contains the path.
    """
    path = _local_path(url, roots)
    try:
        # O_NOFOLLOW: a link may have been created since the check. O_NONBLOCK: opening a pipe would hang.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        raise DownloadError("the file named by a file: address does not exist", url="file:…") from None
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise DownloadError("the file: address does not name a regular file", url="file:…")
        part.check_room(info.st_size)
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
        raise DownloadError("the address was refused: file: addresses need ALLOW_FILE_URLS=1", url="file:…")
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
    if not is_inside:  # checked before the file is opened, so that the error does not reveal whether it exists
        raise DownloadError("the address was refused: it leads outside the folders of FILE_URL_ROOTS", url="file:…")
    return path
