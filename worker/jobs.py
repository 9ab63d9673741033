"""A job as data: parse the request, name the stages, write result and error bodies. Knows no HTTP, no torch.

Field spellings and legacy metrics are those of docs/protocol.md#post-generate.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from musetalk.errors import (
    JobCancelledError,
    MediaError,
    MethodNotAllowedError,
    MuseTalkError,
    NotFoundError,
    RequestError,
    ShutdownError,
    UnauthorizedError,
    UnavailableError,
)
from musetalk.options import LoopMode, MaskMode, RenderOptions, SilenceMode

Stage = Literal["download", "validation", "preprocessing", "inference", "postprocessing", "upload"]
STAGES: tuple[Stage, ...] = get_args(Stage)
ALWAYS_REPORTED: tuple[Stage, ...] = ("download", "validation", "inference", "upload")

# Beyond these limits a value is an attack or a mistake; signed addresses reach some kilobytes.
MAX_ID_LENGTH = 256
MAX_URL_LENGTH = 8192
MAX_TEXT_LENGTH = 64


Schema = dict[str, object]


@dataclass(frozen=True)
class Param:
    """One job parameter: its parser, its JSON schema, its meaning, and the model option that it sets."""

    parse: Callable[[Any], Any]
    schema: Schema
    meaning: str
    option: str | None


def param(kind: tuple[Callable[[Any], Any], Schema], meaning: str, *, option: str | None = None) -> Any:
    """A field of `JobParams`; `option` names the field of `RenderOptions` where that is called otherwise."""
    return field(default=None, metadata={"param": Param(*kind, meaning, option)})


def _whole(low: int, high: int) -> tuple[Callable[[Any], int], Schema]:
    def parse(value: Any) -> int:
        # JSON has one kind of number and JavaScript writes 8.0 as 8, but true is no number.
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


def _one_of(choices: Any) -> tuple[Callable[[Any], str], Schema]:
    """A parser for the values of a `Literal` type."""
    allowed = get_args(choices)

    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return str(value)

    return parse, {"enum": [*allowed, None]}


def _colour() -> tuple[Callable[[Any], str], Schema]:
    pattern = "^#[0-9a-fA-F]{6}$"

    def parse(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError("must be a colour as #rrggbb")
        return value.lower()

    return parse, {"type": ["string", "null"], "pattern": pattern}


# Far beyond any picture, and small enough for exact arithmetic in float32.
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


@dataclass(frozen=True)
class JobParams:
    """The model options that a job sets; None = the default of the model version.

    A new parameter is one field here, named as on the wire, and the option in `musetalk.options`; the documents follow.
    """

    face_box: tuple[int, int, int, int] | None = param(
        _box(), "`[x0, y0, x1, y1]` in px: the face's position, the same in every frame; no detection runs"
    )
    bbox_shift: int | None = param(
        _whole(-100, 100),
        "v1.0 only: moves the box down (positive) or up by px; refused with v1.5, where it has no effect",
    )
    extra_margin: int | None = param(
        _whole(0, 200), "px added below the box (v1.5: 10, v1.0: 0); more lets the chin move further"
    )
    parsing_mode: MaskMode | None = param(
        _one_of(MaskMode),
        "which part of the face is redrawn: `jaw` (v1.5), `raw` (v1.0: mouth and skin), `neck`",
        option="mask_mode",
    )
    left_cheek_width: int | None = param(
        _whole(0, 256), "half-width of the free zone left of the mouth in `jaw` mode, in 512ths of the crop (90)"
    )
    right_cheek_width: int | None = param(_whole(0, 255), "half-width of the free zone right of the mouth (90)")
    box_smoothing: float | None = param(
        _number(0, 50), "sigma in frames of a Gaussian over the boxes; steadies a trembling mouth (0 = off)"
    )
    max_gap_frames: int | None = param(
        _whole(0, 250),
        "gaps without a face up to this length are interpolated (default: half a second); longer ones show the source",
    )
    loop_mode: LoopMode | None = param(
        _one_of(LoopMode),
        "speech longer than the source: `ping_pong` plays it back and forth (default), `loop` starts again, `hold` "
        "stays on the last frame, `trim` ends with the source and cuts the speech (a still is shown throughout)",
    )
    silence: SilenceMode | None = param(
        _one_of(SilenceMode),
        "pauses in the speech, also noisy ones: `generate` follows their sound (default), `closed` holds the mouth "
        "shut, `source` shows the source untouched",
    )
    detail: float | None = param(
        _number(0, 1),
        "how much of the source's fine detail (skin, stubble, grain) comes back where the mouth did not move; "
        "0 = the model's own softness (default), 1 = all",
    )
    restore: float | None = param(
        _number(0, 1),
        "how much of a restored mouth is blended in; needs a worker with `MUSETALK_RESTORER` (0 = off, default)",
    )
    background: str | None = param(_colour(), "colour behind a source with transparency (default `#ffffff`, white)")
    batch_size: int | None = param(_whole(1, 256), "output frames in one pass of the networks, instead of `BATCH_SIZE`")
    ignored: tuple[str, ...] = ()

    def chosen(self) -> dict[str, Any]:
        """The options that this job sets, by their names in `RenderOptions`."""
        given = ((row.option or name, getattr(self, name)) for name, row in PARAMS.items())
        return {option: value for option, value in given if value is not None}


PARAMS: dict[str, Param] = {item.name: item.metadata["param"] for item in fields(JobParams) if item.metadata}


def params_of(options: RenderOptions) -> dict[str, object]:
    """The parameters that `options` amount to, by their wire names; those without a value are left out."""
    values = ((name, getattr(options, row.option or name)) for name, row in PARAMS.items())
    return {name: value for name, value in values if value is not None}


@dataclass(frozen=True)
class Job:
    """One request to make one video; uploaded `files` (source, audio) replace the addresses."""

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
    """Parse a decoded JSON body (any value); unknown fields are ignored.

    Raises RequestError that names the wrong field.
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


def parse_upload(form: Mapping[str, object], files: tuple[Path, Path]) -> Job:
    """Parse a job whose source and audio are local `files`; `form` has the fields of `parse_job` without the addresses.

    Raises RequestError that names the wrong field.
    """
    return Job(
        job_id=_identifier(form, "musetalk_job_id"),
        video_url="",
        audio_url="",
        aspect_ratio=_optional_text(form, "aspect_ratio"),
        resolution=_optional_text(form, "resolution"),
        params=parse_params(form.get("params") or {}),
        files=files,
    )


def parse_params(raw: object) -> JobParams:
    """Parse the parameters of a job; unknown names are kept in `ignored` and reported as warnings in the result.

    Raises RequestError that names the wrong parameter.
    """
    if not isinstance(raw, Mapping):
        raise RequestError("params must be a JSON object", field="params")
    values: dict[str, Any] = {}
    for name, row in PARAMS.items():
        if raw.get(name) is None:
            continue
        try:
            values[name] = row.parse(raw[name])
        except ValueError as problem:
            raise RequestError(f"params.{name} {problem}", field=f"params.{name}") from None
    # Unknown names are not refused: an orchestrator may send parameters of a newer worker.
    ignored = sorted(str(name)[:100] for name in raw if name not in PARAMS)
    return JobParams(**values, ignored=tuple(ignored))


def _identifier(body: Mapping[Any, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{name} must be a non-empty string", field=name)
    check_id(value, name)
    return value


def check_id(value: str, name: str) -> None:
    """Raise RequestError for an id that cannot be the name of an object and a segment of a path."""
    if len(value) > MAX_ID_LENGTH:
        raise RequestError(f"{name} must not be longer than {MAX_ID_LENGTH} characters", field=name)
    if any(not character.isprintable() for character in value):
        raise RequestError(f"{name} must not contain control characters", field=name)
    # As a segment of a path these two lead to another route, also when they are percent-encoded.
    if value in (".", ".."):
        raise RequestError(f"{name} must not be {value}", field=name)


def _address(body: Mapping[Any, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{name} must be an address (http or https)", field=name)
    if len(value) > MAX_URL_LENGTH:
        raise RequestError(f"{name} must not be longer than {MAX_URL_LENGTH} characters", field=name)
    # Only the form is checked here; the download decides which schemes and hosts are allowed.
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
class RenderedJob:
    """A job whose video is made but not stored yet; its sidecar and its result both start from this value.

    `created` is ISO 8601 with an offset. Memory: the highest the GPU and the process used.
    """

    job: Job
    options: RenderOptions
    model: str
    video: Mapping[str, object]
    warnings: tuple[str, ...]
    created: str
    worker_id: str
    config_label: str
    gpu_class: str | None
    peak_gpu_memory_mib: float | None
    peak_memory_kb: int | None


@dataclass(frozen=True)
class JobResult:
    """A finished job: the rendered one, where its video is stored, and the seconds it took."""

    rendered: RenderedJob
    output_url: str
    object_name: str
    bucket: str | None
    stage_times: Mapping[str, float]
    total_time_s: float


def result_body(result: JobResult) -> dict[str, object]:
    """The success body of POST /generate; every number is finite or null."""
    rendered = result.rendered
    return {
        "status": "success",
        "output_url": result.output_url,
        "musetalk_job_id": rendered.job.job_id,
        "model": rendered.model,
        "metrics": {
            "GENERATION_TIME_SEC": _finite(result.stage_times.get("inference")),
            "SCRIPT_WALL_TIME_SEC": _finite(_rendering_s(result.stage_times)),
            "PEAK_VRAM_MIB": _finite(rendered.peak_gpu_memory_mib),
            "PEAK_RAM_KB": _finite(rendered.peak_memory_kb),
            "gpu_class": rendered.gpu_class or "unknown",
            "stage_times": stage_times_body(result.stage_times),
            "total_time": _finite(result.total_time_s),
        },
        "video": dict(rendered.video),
        "warnings": list(rendered.warnings),
        "error": None,
    }


def sidecar_body(rendered: RenderedJob, stage_times: Mapping[str, float]) -> dict[str, object]:
    """The JSON beside the MP4 (docs/protocol.md#stored-objects); the store adds the object's name, size, SHA-1.

    The addresses of the inputs are left out: they may be signed.
    """
    job = rendered.job
    return {
        "musetalk_job_id": job.job_id,
        "queue_job_id": job.queue_job_id,
        "buffer_job_id": job.buffer_job_id,
        "gpu_class": rendered.gpu_class or "unknown",
        "worker_id": rendered.worker_id,
        "config_label": rendered.config_label,
        "batch_size": rendered.options.batch_size,
        "model": rendered.model,
        "aspect_ratio": job.aspect_ratio,
        "resolution": job.resolution,
        "params": params_of(rendered.options),
        "generation_time_sec": _finite(stage_times.get("inference")),
        "script_wall_time_sec": _finite(_rendering_s(stage_times)),
        "peak_vram_mib": _finite(rendered.peak_gpu_memory_mib),
        "peak_ram_kb": _finite(rendered.peak_memory_kb),
        "stage_times": stage_times_body(stage_times),
        "video": dict(rendered.video),
        "warnings": list(rendered.warnings),
        "create_time_utc": rendered.created,
    }


def _rendering_s(stage_times: Mapping[str, float]) -> float:
    """Seconds between validation and upload."""
    return sum(stage_times.get(stage, 0.0) for stage in ("preprocessing", "inference", "postprocessing"))


# For the health route and the last line of the command line.
DEMO_NOTICE = (
    "this is the small demo model, made for the demo portrait; get the official one with "
    "`.venv/bin/python -m musetalk.weights fetch` (docs/weights.md)"
)

# 4xx is final for Salad's queue and for the orchestrator, 5xx may be retried. The nearest class in an error's ancestry
# counts; classes that are not listed are 500.
HTTP_STATUSES: dict[type[MuseTalkError], int] = {
    MediaError: 422,
    UnauthorizedError: 401,
    NotFoundError: 404,
    MethodNotAllowedError: 405,
    JobCancelledError: 409,
    ShutdownError: 503,
    UnavailableError: 503,
}
# Values of `error_type` in a body; the last one stands for errors that nobody raised on purpose.
_BODIES: tuple[type[MuseTalkError], ...] = (*HTTP_STATUSES, MuseTalkError)
ERROR_TYPES = tuple(dict.fromkeys(kind.error_type for kind in _BODIES))


def http_status(error: BaseException) -> int:
    """Return the HTTP status for `error`."""
    return next((HTTP_STATUSES[kind] for kind in type(error).__mro__ if kind in HTTP_STATUSES), 500)


def error_body(error: BaseException, *, job_id: str | None = None) -> tuple[int, dict[str, object]]:
    """HTTP status and body for any exception; the only place where an error becomes JSON.

    An error that was not raised on purpose is an `unknown_error`: its text may contain anything, so only its class is
    reported.
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
        # Older consumers read `error`, newer ones `error_message`.
        "error": message,
        "stage": stage,
        "details": details,
        "retryable": retryable,
        "stage_times": stage_times_body(getattr(error, "stage_times", {})),
    }
    if job_id is not None:
        body["musetalk_job_id"] = job_id
    # Only unexpected states need a trace; a 422 names the field and a 503 the state.
    if status == 500:
        body["stack_trace"] = _safe_trace(error)
    return status, body


def stage_times_body(stage_times: Mapping[Any, float]) -> dict[str, float]:
    """Seconds per stage, rounded to milliseconds; the four stages that every consumer reads are always present."""
    return {
        stage: round(stage_times.get(stage, 0.0), 3)
        for stage in STAGES
        if stage in stage_times or stage in ALWAYS_REPORTED
    }


def _safe_trace(error: BaseException) -> str:
    """Function names and line numbers of the trace, without paths, source lines or the texts of errors."""
    # Answers leave the machine: no paths, no source lines, no text of the error.
    frames = traceback.extract_tb(error.__traceback__)
    where = " > ".join(f"{frame.name}:{frame.lineno}" for frame in frames[-12:])
    return f"{type(error).__name__} at {where}" if where else type(error).__name__


def _finite(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return round(value, 3)


def _json_details(details: Mapping[str, object]) -> dict[str, object]:
    """`details` as JSON values: other types become text, NaN and infinity become null."""

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
