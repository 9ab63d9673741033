"""`POST /preview`: its body, and its answer of one picture. Knows Flask's responses and jobs, no torch and no media."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from flask import Request, Response

from musetalk.errors import RequestError
from worker.jobs import Job, parse_job
from worker.web.openapi import MAX_PREVIEW_S

if TYPE_CHECKING:
    from musetalk.render import Preview

_SUFFIXES = {"image/jpeg": ".jpg", "image/png": ".png"}


def parse_preview(body: object) -> tuple[Job, float]:
    """Parse the body of a preview: a job whose `audio_url` may be absent, and `time_s`, 0 by default.

    Raises RequestError that names the wrong field.
    """
    if isinstance(body, Mapping) and body.get("audio_url") is None:
        job = parse_job({**body, "audio_url": "silence:"})
        # The source alone: nothing is spoken, so nothing is drawn.
        job = replace(job, audio_url="", params=replace(job.params, silence="source"))
    else:
        job = parse_job(body)
    assert isinstance(body, Mapping)
    return job, parse_time(body.get("time_s"))


def parse_time(value: object) -> float:
    """The point in time of a preview in seconds; raises RequestError."""
    if value is None:
        return 0.0
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_PREVIEW_S:
        return float(value)
    raise RequestError(f"time_s must be a number of seconds from 0 to {MAX_PREVIEW_S}", field="time_s")


def parse_time_text(text: str | None) -> float:
    """The point in time of a preview in a form; raises RequestError."""
    try:
        return parse_time(float(text) if text else None)
    except ValueError:
        raise RequestError("time_s must be a number of seconds", field="time_s") from None


def wanted_suffix(request: Request) -> str:
    """The kind of file that the caller accepts: `.png` if it asks for that, else `.jpg`."""
    return _SUFFIXES[request.accept_mimetypes.best_match(list(_SUFFIXES)) or "image/jpeg"]


def picture_answer(preview: Preview, picture: bytes, suffix: str) -> Response:
    """The picture, with what is known of it as JSON in the header `X-Preview`."""
    width, height = preview.source_size
    stats = {
        "frame": preview.index,
        "time_s": round(preview.time_s, 3),
        "duration_sec": round(preview.duration_s, 3),
        "source_width": width,
        "source_height": height,
        "face_box": None if preview.face_box is None else [int(edge) for edge in preview.face_box],
        "model": preview.model,
        "warnings": list(preview.warnings),
    }
    kind = next(kind for kind, known in _SUFFIXES.items() if known == suffix)
    answer = Response(picture, content_type=kind)
    # ASCII alone: nothing else passes through a header unchanged.
    answer.headers["X-Preview"] = json.dumps(stats)
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Content-Type-Options"] = "nosniff"
    return answer
