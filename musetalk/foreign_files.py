"""What a file is that no decoder accepts, in words for its owner. Reads its first and last bytes, decodes nothing."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

from musetalk.errors import ProcessingError

_HEAD_BYTES = 4096
# Boxes that an ISO file (MP4, MOV, M4A) may begin with.
_ISO_BOXES = {b"ftyp", b"mdat", b"free", b"skip", b"wide", b"moov", b"pnot"}
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]*\Z")
_LFS_MARK = b"version https://git-lfs"
_SHOWN_CHARS = 200


def describe_text(head: bytes) -> str | None:
    """Name what a file of text is from its first bytes: a web page, JSON, XML, a Git LFS pointer; None for no text."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = start[:512].lower()
    if start.startswith(_LFS_MARK):
        return "a Git LFS pointer, which stands for the file in a repository"
    if lower.startswith((b"<!doctype html", b"<html")) or b"<html" in lower:
        return "a web page"
    if lower.startswith(b"<?xml") or (lower.startswith(b"<") and b">" in lower):
        return "an XML document"
    if start[:1] in {b"{", b"["} and _is_json_start(start):
        return "JSON"
    if start and b"\0" not in head and _TEXT.match(head) and _is_utf8(head):
        return "a text"
    return None


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be cut.
        return error.start >= len(head) - 3
    return True


def _is_json_start(start: bytes) -> bool:
    try:
        json.loads(start)
    except ValueError:
        return re.match(rb'[\[{]\s*("|\{|\[|\d|\]|\})', start) is not None
    except RecursionError:
        return True
    return True


def shown_text(head: bytes) -> str:
    """The first characters of a text on one line, without what is not printable."""
    text = head.decode("utf-8", "replace")
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return one_line[:_SHOWN_CHARS]


def unreadable_reason(path: Path, what: str) -> str:
    """One sentence on why the file at `path` cannot be opened as media; raises ProcessingError if it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            n_bytes = file.seek(0, 2)
            lacks_index = head[4:8] in _ISO_BOXES and _lacks_index(path, n_bytes)
    except OSError as error:
        raise ProcessingError(f"{what} cannot be read: {error.strerror}") from None
    if not head.strip(b"\0"):
        return f"{what} begins with zeros only: it was not written completely"
    if lacks_index:
        return f"{what} is incomplete: its end is missing, and with it the index of its pictures and its sound"
    kind = describe_text(head)
    if kind is not None:
        return f"{what} is {kind}, not a media file"
    return f"{what} is not a media file of a supported kind, or its beginning is damaged"


def _lacks_index(path: Path, n_bytes: int) -> bool:
    """Whether the boxes of an ISO file lead to its end, or beyond it, without an index."""
    at = 0
    with path.open("rb") as file:
        for _ in range(10_000):
            if at >= n_bytes:
                # A damaged size may be larger than any file; no system seeks there.
                return True
            file.seek(at)
            header = file.read(16)
            if len(header) < 8:
                return True
            size, kind = struct.unpack(">I4s", header[:8])
            if kind in {b"moov", b"moof"}:
                # It is there, but cut: then the end is missing as well.
                return bool(at + size > n_bytes)
            if size == 1 and len(header) == 16:
                size = struct.unpack(">Q", header[8:])[0]
            if size < 8 or not kind.isascii():
                return False
            at += size
    return False
