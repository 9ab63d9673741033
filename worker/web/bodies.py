"""Bodies of requests: strict JSON, and the job's id in a body that is too large to be read. Knows no Flask."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

# Read of a body that is too large, in search of the job's id.
MAX_START_BYTES = 1_000_000
_ID = re.compile(rb'"musetalk_job_id"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.){1,1600}")')


def decode_json(data: bytes | str) -> object:
    """Decode JSON; raises ValueError for anything else, and for what JSON does not have: NaN, infinities, 1e999.

    Nesting that exhausts the stack counts as no JSON.
    """
    try:
        return json.loads(data, parse_constant=_refuse_constant, parse_float=_finite_float)
    except RecursionError:
        raise ValueError("the nesting is too deep") from None


def _refuse_constant(_name: str) -> object:
    raise ValueError("NaN and Infinity are not JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("the number is too large")
    return number


def read_body(stream: IO[bytes], limit: int) -> bytes:
    """Read a body that ends by itself, but at most `limit` bytes; raises OSError when it breaks off."""
    return b"".join(_blocks(stream, limit))


def read_start(stream: IO[bytes]) -> bytes:
    """Read the first bytes of a body that nobody needs as a whole, fewer where it ends or breaks off."""
    parts: list[bytes] = []
    with suppress(OSError, ValueError):
        parts.extend(_blocks(stream, MAX_START_BYTES))
    return b"".join(parts)


def _blocks(stream: IO[bytes], limit: int) -> Iterator[bytes]:
    while limit > 0 and (block := stream.read(min(limit, 65_536))):
        yield block
        limit -= len(block)


def job_id_in(start: bytes) -> str | None:
    """Return the job's id in the beginning of a JSON body, or None."""
    match = _ID.search(start)
    if match is None:
        return None
    try:
        found: Any = json.loads(match[1])
    except ValueError:
        return None
    return found if isinstance(found, str) else None
