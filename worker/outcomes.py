"""The outcome of a claimed job and its record: what is written can be read again, and nothing else passes for one.

Knows no files; see `worker.outbox`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from worker.records import RECORD_BYTES, BadRecordError

_MAX_DEPTH = 12
_MAX_TEXT = 8192
_MAX_NUMBER = 2**63


@dataclass(frozen=True)
class Outcome:
    """The outcome of a claimed job: the body of its report, and when it was made (seconds since the epoch)."""

    buffer_job_id: str
    body: Mapping[str, object]
    created: float


def encode_outcome(outcome: Outcome) -> bytes:
    """The record of an outcome; whatever this returns, `decode_outcome` reads."""
    return encode_record({"id": outcome.buffer_job_id, "body": dict(outcome.body), "created": outcome.created})


def decode_outcome(record: Mapping[str, Any], now: float) -> Outcome:
    """Validate a stored outcome; `now` in seconds since the epoch. Raises BadRecordError."""
    body, created = record.get("body"), record.get("created")
    if not isinstance(body, dict) or body.get("status") not in ("succeeded", "failed"):
        raise BadRecordError("no outcome in it")
    if isinstance(created, bool) or not isinstance(created, (int, float)):
        raise BadRecordError("no time in it")
    # A time in the future would never expire; the comparison also takes integers too large for a float.
    age_known = 0 <= created <= now
    return Outcome(_identity(record.get("id")), _plain(body), float(created) if age_known else now)


def claim_or_outcome(record: Mapping[str, Any], orphan_body: Mapping[str, object], now: float) -> Outcome:
    """The outcome in a record, or `orphan_body` as that of a claim without one. Raises BadRecordError."""
    if "body" in record:
        return decode_outcome(record, now)
    return Outcome(_identity(record.get("id")), orphan_body, now)


def _identity(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value or len(value) > _MAX_TEXT:
        raise BadRecordError("no job id in it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecordError("the job id is not text") from None
    return value


def encode_record(record: Mapping[str, object]) -> bytes:
    """The bytes of a record."""
    return json.dumps(record, allow_nan=False).encode()


def decode_record(data: bytes) -> dict[str, Any]:
    """The record in these bytes; raises BadRecordError for anything that is no JSON object."""
    try:
        record = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise BadRecordError("not JSON") from None
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object")
    return record


def _refuse_constant(_name: str) -> object:
    raise ValueError("NaN and Infinity are not JSON")


def fitting_body(outcome: Outcome) -> dict[str, object]:
    """The body as JSON values that fit into a record: without details, and then without metrics, if it is too large."""
    body = _plain(outcome.body)
    for name, smaller in (("details", {}), ("metrics", None)):
        if len(encode_outcome(replace(outcome, body=body))) <= RECORD_BYTES:
            break
        body[name] = smaller
    return body


def _plain(body: Mapping[Any, Any]) -> dict[str, object]:
    """`body` with nothing that JSON, a database or a disk refuses: no NaN, no surrogates, no giant numbers or texts."""

    def plain(value: object, depth: int) -> object:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return value if abs(value) < _MAX_NUMBER else None
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if depth > _MAX_DEPTH:
            return None
        if isinstance(value, Mapping):
            return {_text(key)[:200]: plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item, depth + 1) for item in value]
        return _text(value)

    return {_text(key)[:200]: plain(value, 1) for key, value in body.items()}


def _text(value: object) -> str:
    return str(value)[:_MAX_TEXT].encode("utf-8", "replace").decode()
