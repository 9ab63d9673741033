"""Response headers that a download depends on. Knows no connections."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin


def redirect_url(base: str, location: str) -> str:
    """Return the target of a redirect; header bytes arrive as Latin-1 although hosts write UTF-8."""
    with contextlib.suppress(UnicodeError):
        location = location.encode("latin-1").decode()
    if re.match(r"https?://", location, re.IGNORECASE):
        # Joining would rewrite it; it may be signed.
        return location
    try:
        return urljoin(base, location)
    except ValueError:
        # The check of addresses refuses it, with its own text.
        return location


def content_length(headers: Mapping[str, str]) -> int | None:
    """Return the declared size of the body in bytes; None if absent, unreadable or overruled by chunked transfer."""
    text = headers.get("Content-Length", "").strip()
    if "Transfer-Encoding" in headers or not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        return None
    return int(text)


def is_whole(headers: Mapping[str, str]) -> bool:
    """Whether the Content-Range of a 206 that nobody asked for covers the whole file."""
    match = re.fullmatch(r"bytes 0-(\d+)/(\d+|\*)", headers.get("Content-Range", "").strip())
    if match is None:
        return False
    last, total = int(match[1]), match[2]
    length = content_length(headers)
    return (total == "*" or last + 1 == int(total)) and length in {None, last + 1}


def version_validator(headers: Mapping[str, str]) -> str | None:
    """Return the value for If-Range that names this version: a strong ETag, else the date of the last change."""
    etag = headers.get("ETag", "")
    if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag):
        return etag
    return headers.get("Last-Modified") or None


def retry_after_s(value: str | None, longest_s: float) -> float:
    """Return the pause that the host requests (a number or a date), at most `longest_s`; 0 if there is none."""
    if value is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}", value.strip(), re.ASCII):
        return min(float(value), longest_s)
    try:
        wait = parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0
    return min(max(wait, 0.0), longest_s)
