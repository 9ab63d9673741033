"""A job as data: parse the request, name the stages, write result and error bodies. Knows no HTTP, no torch.

The wire names (field spellings, legacy metrics) are those of the protocol notes, sections 3 and 4.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from musetalk.errors import JobCancelledError, MediaError, MuseTalkError, RequestError, ShutdownError, UnavailableError

ParsingMode = Literal["jaw", "raw", "neck"]
LoopMode = Literal["ping_pong", "loop", "hold", "trim"]
SilenceMode = Literal["generate", "closed", "source"]
Stage = Literal["download", "validation", "preprocessing", "inference", "postprocessing", "upload"]
STAGES: tuple[Stage, ...] = ("download", "validation", "preprocessing", "inference", "postprocessing", "upload")
ALWAYS_REPORTED: tuple[Stage, ...] = ("download", "validation", "inference", "upload")

MAX_ID_LENGTH = 256
MAX_URL_LENGTH = 8192
MAX_TEXT_LENGTH = 64


@dataclass(frozen=True)
class JobParams:
    """What a job may ask of the model; None = the model version's own default."""

    bbox_shift: int = 0
    extra_margin: int | None = None
    parsing_mode: ParsingMode | None = None
    left_cheek_width: int = 90
    right_cheek_width: int = 90
    face_box: tuple[int, int, int, int] | None = None
    box_smoothing: float = 0.0
    max_gap_frames: int | None = None
    loop_mode: LoopMode = "ping_pong"
    silence: SilenceMode = "generate"
    batch_size: int | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One request to make one video; uploaded `files`, source and audio, take the place of the addresses."""

    job_id: str
    video_url: str
    audio_url: str
    aspect_ratio: str | None = None
    resolution: str | None = None
    params: JobParams = field(default_factory=JobParams)
    queue_job_id: str | None = None
    buffer_job_id: str | None = None
    files: tuple[Path, Path] | None = None


def parse_job(body: object, *, queue_job_id: str | None = None, buffer_job_id: str | None = None) -> Job:
    """The job in a decoded JSON body (any value); unknown fields are ignored.

    Raises RequestError that names the field at fault.
    """
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object", field="body")
    params = body.get("params")
    return Job(
        job_id=_identifier(body, "musetalk_job_id"),
        video_url=_address(body, "video_url"),
        audio_url=_address(body, "audio_url"),
        aspect_ratio=_optional_text(body, "aspect_ratio"),
        resolution=_optional_text(body, "resolution"),
        params=parse_params({} if params is None else params),
        queue_job_id=queue_job_id,
        buffer_job_id=buffer_job_id,
    )


def parse_upload(fields: Mapping[str, object], files: tuple[Path, Path]) -> Job:
    """The job whose source and audio are local `files`; `fields` are those of `parse_job` without the addresses.

    Raises RequestError that names the field at fault.
    """
    return Job(
        job_id=_identifier(fields, "musetalk_job_id"),
        video_url="",
        audio_url="",
        aspect_ratio=_optional_text(fields, "aspect_ratio"),
        resolution=_optional_text(fields, "resolution"),
        params=parse_params(fields.get("params") or {}),
        files=files,
    )


def parse_params(raw: object) -> JobParams:
    """The model parameters of a job; names it does not know are kept in `ignored`, to be told in the result.

    Raises RequestError that names the parameter at fault.
    """
    if not isinstance(raw, Mapping):
        raise RequestError("params must be a JSON object", field="params")
    values: dict[str, Any] = {}
    for name, param in PARAMS.items():
        if raw.get(name) is None:
            continue
        try:
            values[name] = param.parse(raw[name])
        except ValueError as problem:
            raise RequestError(f"params.{name} {problem}", field=f"params.{name}") from None
    ignored = sorted(str(name)[:100] for name in raw if name not in PARAMS)
    return JobParams(**values, ignored=tuple(ignored))


Schema = dict[str, object]


@dataclass(frozen=True)
class Param:
    """One model parameter: how it is read, its JSON schema, and what it does."""

    parse: Callable[[Any], Any]
    schema: Schema
    meaning: str


def _whole(low: int, high: int) -> tuple[Callable[[Any], int], Schema]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError("must be a whole number")
        # The range first: it refuses NaN, infinities and integers too large for a float.
        if not low <= value <= high or int(value) != value:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return parse, {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _number(low: float, high: float) -> tuple[Callable[[Any], float], Schema]:
    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError("must be a number")
        if not low <= value <= high:
            raise ValueError(f"must be from {low:g} to {high:g}")
        return float(value)

    return parse, {"type": ["number", "null"], "minimum": low, "maximum": high}


def _one_of(*allowed: str) -> tuple[Callable[[Any], str], Schema]:
    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return str(value)

    return parse, {"enum": [*allowed, None]}


_MAX_EDGE = 100_000


def _box() -> tuple[Callable[[Any], tuple[int, int, int, int]], Schema]:
    edge, edge_schema = _whole(-_MAX_EDGE, _MAX_EDGE)

    def parse(value: Any) -> tuple[int, int, int, int]:
        if not isinstance(value, (list, tuple)) or len(value) != 4:
            raise ValueError("must be [x0, y0, x1, y1] in pixels")
        x0, y0, x1, y1 = (edge(number) for number in value)
        if x1 <= x0 or y1 <= y0:
            raise ValueError("must have x1 > x0 and y1 > y0")
        return x0, y0, x1, y1

    item = {**edge_schema, "type": "integer"}
    return parse, {"type": ["array", "null"], "items": item, "minItems": 4, "maxItems": 4}


PARAMS: dict[str, Param] = {
    "face_box": Param(
        *_box(), "`[x0, y0, x1, y1]` in px: where the face is, the same in every frame; no detection is run"
    ),
    "bbox_shift": Param(
        *_whole(-100, 100),
        "v1.0 only: moves the box down (positive) or up by px; refused with v1.5, where it has no effect",
    ),
    "extra_margin": Param(
        *_whole(0, 200), "px added below the box (v1.5: 10, v1.0: 0); more lets the chin move further"
    ),
    "parsing_mode": Param(
        *_one_of("jaw", "raw", "neck"),
        "which part of the face is redrawn: `jaw` (v1.5), `raw` (v1.0: mouth and skin), `neck`",
    ),
    "left_cheek_width": Param(
        *_whole(0, 256), "half-width of the free zone left of the mouth in `jaw` mode, in 512ths of the crop (90)"
    ),
    "right_cheek_width": Param(*_whole(0, 255), "the same right of the mouth (90)"),
    "box_smoothing": Param(
        *_number(0, 50), "sigma in frames of a Gaussian over the boxes; steadies a trembling mouth (0 = off)"
    ),
    "max_gap_frames": Param(
        *_whole(0, 250),
        "faceless gaps up to this length are interpolated (default: half a second); longer ones show the source",
    ),
    "loop_mode": Param(
        *_one_of("ping_pong", "loop", "hold", "trim"),
        "speech longer than the source: `ping_pong` plays it to and fro (default), `loop` starts again, `hold` stays "
        "on the last frame, `trim` ends with the source and cuts the speech (a still is shown throughout)",
    ),
    "silence": Param(
        *_one_of("generate", "closed", "source"),
        "pauses in the speech, also noisy ones: `generate` follows their sound (default), `closed` holds the mouth "
        "shut, `source` shows the source untouched",
    ),
    "batch_size": Param(*_whole(1, 256), "output frames in one pass of the networks, instead of `BATCH_SIZE`"),
}


def _identifier(body: Mapping[Any, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{name} must be a non-empty string", field=name)
    if len(value) > MAX_ID_LENGTH:
        raise RequestError(f"{name} must not be longer than {MAX_ID_LENGTH} characters", field=name)
    if any(not character.isprintable() for character in value):
        raise RequestError(f"{name} must not hold control characters", field=name)
    return value


def _address(body: Mapping[Any, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{name} must be an address (http or https)", field=name)
    if len(value) > MAX_URL_LENGTH:
        raise RequestError(f"{name} must not be longer than {MAX_URL_LENGTH} characters", field=name)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", value.strip()):
        raise RequestError(f"{name} must be an address (http or https)", field=name)
    return value.strip()


def _optional_text(body: Mapping[Any, Any], name: str) -> str | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_TEXT_LENGTH:
        raise RequestError(f"{name} must be a short string", field=name)
    return value.strip() or None


@dataclass(frozen=True)
class JobResult:
    """A finished job: where the video is, and the figures of how it was made."""

    job_id: str
    output_url: str
    object_name: str
    bucket: str | None
    model: str
    stage_times: Mapping[str, float]
    total_time_s: float
    gpu_class: str | None
    peak_gpu_memory_mib: float | None
    peak_memory_kb: int | None
    video: Mapping[str, object]
    warnings: tuple[str, ...] = ()


def result_body(result: JobResult) -> dict[str, object]:
    """The success body of POST /generate; every number is finite or null."""
    return {
        "status": "success",
        "output_url": result.output_url,
        "musetalk_job_id": result.job_id,
        "model": result.model,
        "metrics": {
            "GENERATION_TIME_SEC": _finite(result.stage_times.get("inference")),
            "SCRIPT_WALL_TIME_SEC": _finite(_rendering_s(result.stage_times)),
            "PEAK_VRAM_MIB": _finite(result.peak_gpu_memory_mib),
            "PEAK_RAM_KB": _finite(result.peak_memory_kb),
            "gpu_class": result.gpu_class or "unknown",
            "stage_times": stage_times_body(result.stage_times),
            "total_time": _finite(result.total_time_s),
        },
        "video": dict(result.video),
        "warnings": list(result.warnings),
        "error": None,
    }


def sidecar_body(
    job: Job,
    *,
    created: str,
    stage_times: Mapping[str, float],
    peak_gpu_memory_mib: float | None,
    peak_memory_kb: int | None,
    video: Mapping[str, object],
    **worker: object,
) -> dict[str, object]:
    """What is stored beside the MP4 (protocol section 7); the store adds the object's name, size and SHA-1.

    `created` is ISO 8601 with an offset; `worker` says who made it (gpu_class, worker_id, model, ...). The addresses of
    the inputs are left out: they may be signed.
    """
    params = {name: value for name, value in asdict(job.params).items() if value is not None and name != "ignored"}
    return {
        "musetalk_job_id": job.job_id,
        "queue_job_id": job.queue_job_id,
        "buffer_job_id": job.buffer_job_id,
        **worker,
        "aspect_ratio": job.aspect_ratio,
        "resolution": job.resolution,
        "params": params,
        "generation_time_sec": _finite(stage_times.get("inference")),
        "script_wall_time_sec": _finite(_rendering_s(stage_times)),
        "peak_vram_mib": _finite(peak_gpu_memory_mib),
        "peak_ram_kb": _finite(peak_memory_kb),
        "stage_times": stage_times_body(stage_times),
        "video": dict(video),
        "create_time_utc": created,
    }


def _rendering_s(stage_times: Mapping[str, float]) -> float:
    """Everything between validation and upload."""
    return sum(stage_times.get(stage, 0.0) for stage in ("preprocessing", "inference", "postprocessing"))


# Answers to the caller: 4xx is final for Salad's queue and for the orchestrator, 5xx may be tried again. The nearest
# class in an error's ancestry counts; what is not listed is 500.
HTTP_STATUSES: dict[type[MuseTalkError], int] = {
    MediaError: 422,
    JobCancelledError: 409,
    ShutdownError: 503,
    UnavailableError: 503,
}


def http_status(error: BaseException) -> int:
    """The HTTP status that answers `error`."""
    return next((HTTP_STATUSES[kind] for kind in type(error).__mro__ if kind in HTTP_STATUSES), 500)


def error_body(error: BaseException, *, job_id: str | None = None) -> tuple[int, dict[str, object]]:
    """HTTP status and body for any exception; the only place where an error becomes JSON.

    What we did not raise on purpose is an `unknown_error`: its text may hold anything, so only its class is told.
    """
    status = http_status(error)
    if isinstance(error, MuseTalkError):
        error_type, message = error.error_type, error.message
        stage, retryable, details = error.stage or "unknown", error.retryable, _json_details(error.details)
    else:
        error_type, message = "unknown_error", f"unexpected {type(error).__name__}"
        stage, retryable, details = getattr(error, "stage", None) or "unknown", False, {}
    body: dict[str, object] = {
        "status": "failed",
        "error_type": error_type,
        "error_message": message,
        "error": message,
        "stage": stage,
        "details": details,
        "retryable": retryable,
        "stage_times": stage_times_body(getattr(error, "stage_times", {})),
    }
    if job_id is not None:
        body["musetalk_job_id"] = job_id
    if status == 500:
        body["stack_trace"] = _safe_trace(error)
    return status, body


def stage_times_body(stage_times: Mapping[Any, float]) -> dict[str, float]:
    """Seconds per stage, rounded to milliseconds; the four stages every consumer knows are always there."""
    return {
        stage: round(stage_times.get(stage, 0.0), 3)
        for stage in STAGES
        if stage in stage_times or stage in ALWAYS_REPORTED
    }


def _safe_trace(error: BaseException) -> str:
    """Function names and line numbers of the trace, without paths, source lines or the texts of errors."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " > ".join(f"{frame.name}:{frame.lineno}" for frame in frames[-12:])
    return f"{type(error).__name__} at {where}" if where else type(error).__name__


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return round(value, 3)


def _json_details(details: Mapping[str, object]) -> dict[str, object]:
    """`details` as JSON values: what JSON cannot hold becomes text, and no number is NaN or infinite."""

    def plain(value: object) -> object:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value)

    return {str(key): plain(value) for key, value in details.items()}
