"""Logs as JSON lines with the job's id in each, the clock of a job's stages, and the metrics. Knows no torch."""

from __future__ import annotations

import json
import logging
import math
import re
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector

from musetalk.errors import JobCancelledError, MediaError, MuseTalkError, ProcessingError, ShutdownError
from worker.jobs import STAGES, Stage

logger = logging.getLogger("musetalk")

ROOT = Path(__file__).resolve().parents[1]

_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

# Attributes that every LogRecord has; the others come from `extra`.
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


# A terminal's colours in the text of a library.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# The query of an address may be a signature, so it is never logged.
_QUERY = re.compile(r"(https?://[^\s?#]*)[?#]\S*")
_USER = re.compile(r"(https?://)[^\s/@]*@")
# A value that its name calls a secret, also in the words of another program: `token=…`, `Authorization: Bearer …`.
_NAMED = re.compile(
    r"((?:authorization|signature|token|secret|password|api[_-]?key)\w*[\"']?\s*[=:]\s*(?:(?:bearer|basic)\s+)?)"
    r"(?:\"[^\"]*\"|'[^']*'|[^\s\"'&,;]+)",
    re.IGNORECASE,
)
_secrets: set[str] = set()
# Written into every line.
_constant_fields: dict[str, str] = {}
# Deeper values are written as text.
_MAX_DEPTH = 6


def redact_values(values: Iterable[str | None]) -> None:
    """Redact `values` in every later log line of this process."""
    _secrets.update(value for value in values if value and len(value) >= 4)


def redacted(text: str) -> str:
    """Return `text` without the queries and user names of addresses and without the values to redact."""
    text = _NAMED.sub(r"\1***", _USER.sub(r"\1", _QUERY.sub(r"\1?...", text)))
    for secret in tuple(_secrets):
        text = text.replace(secret, "***")
    return text


def add_to_every_line(**fields: str) -> None:
    """Write `fields` into every later log line of this process and of those it forks."""
    _constant_fields.update(fields)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, severity (the level field Salad reads), message, job id, extras."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record as one line of ASCII; never raises, because logging would print a traceback instead."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "severity": record.levelname.lower(),
            "message": _message(record),
            **_constant_fields,
        }
        if (job_id := _job_id.get()) is not None:
            entry["job_id"] = job_id
        entry.update({key: value for key, value in vars(record).items() if key not in _RECORD_FIELDS})
        if record.exc_info and record.exc_info[1] is not None:
            entry["exception"] = _trace_text(record.exc_info[1])
        # ASCII: a line separator of Unicode would end the line for some readers, half a surrogate pair the record.
        return json.dumps(_plain(entry), ensure_ascii=True)


def _message(record: logging.LogRecord) -> str:
    try:
        return _COLOUR.sub("", record.getMessage())
    except Exception:  # noqa: BLE001 - a library may log arguments that do not fit its text
        return str(record.msg)


def _plain(value: object, depth: int = 0) -> Any:
    """`value` as JSON can express it, every text redacted before it is encoded: escapes would hide what to redact."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            return {redacted(_text(key)): _plain(item, depth + 1) for key, item in list(value.items())}
        if isinstance(value, (list, tuple)):
            return [_plain(item, depth + 1) for item in value]
    return redacted(_text(value))


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - an object of any library
        return f"<{type(value).__name__}>"


def _trace_text(error: BaseException) -> str:
    """The error and where it happened, with file names but without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__}: {_text(error).replace(str(ROOT), '.')} ({where})"


def gunicorn_logging(level: str) -> dict[str, Any]:
    """Gunicorn's `logconfig_dict`: its own lines from `level` on, in the JSON format of all others."""
    handlers = ["stdout"]
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}},
        "root": {"level": "WARNING", "handlers": handlers},
        "loggers": {"gunicorn.error": {"level": level, "handlers": handlers, "propagate": False}},
    }


def configure_logging(level: str, stream: TextIO = sys.stdout) -> None:
    """Send every log of the process as JSON lines to `stream`; safe to call twice.

    Our records from `level` on; those of other libraries from warnings on, because theirs below contain signed
    addresses.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(level.upper())
    logging.captureWarnings(True)
    # What no one catches would be printed as a traceback of many lines.
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _log_thread_error


def _log_thread_error(given: threading.ExceptHookArgs) -> None:
    """Log an error that ended a thread."""
    name = given.thread.name if given.thread is not None else "unknown"
    logger.error("thread ended by an error", extra={"thread_name": name}, exc_info=given.exc_value)


@contextmanager
def job_logging(job_id: str) -> Iterator[None]:
    """Add `job_id` to every record that this thread logs inside the block."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


class StageClock:
    """Seconds spent in each stage of one job; sets the stage of errors that pass through."""

    def __init__(self) -> None:
        self.seconds: dict[Stage, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time the block as stage `name`; an error raised in it gets that stage unless it has one."""
        started = time.monotonic()
        try:
            yield
        except MuseTalkError as error:
            error.stage = error.stage or name
            raise
        except BaseException as error:
            # Unforeseen errors name their stage too.
            if getattr(error, "stage", None) is None:
                error.stage = name  # type: ignore[attr-defined]
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def snapshot(self) -> dict[str, float]:
        """Seconds per stage so far."""
        return {str(stage): seconds for stage, seconds in self.seconds.items()}

    @property
    def total_s(self) -> float:
        """Seconds since the clock was created."""
        return time.monotonic() - self._started


def peak_memory_kb() -> int:
    """Highest resident memory of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


Outcome = Literal["succeeded", "failed", "cancelled", "handed_back"]
# Upper bounds in seconds: a stage takes a tenth of a second to half an hour.
_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800)


def outcome_of(error: BaseException | None) -> Outcome:
    """The outcome of a started job; a cancelled one, or one that another worker takes over, did not fail."""
    if isinstance(error, JobCancelledError):
        return "cancelled"
    if isinstance(error, ShutdownError):
        return "handed_back"
    return "succeeded" if error is None else "failed"


class Metrics:
    """The metrics at /metrics; names follow the conventions of Prometheus (base units, `_total`, `_info`)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._jobs = Counter("musetalk_jobs", "Jobs by outcome.", ["result"], registry=self._registry)
        self._errors = Counter(
            "musetalk_job_errors", "Failed jobs by kind and stage.", ["error_type", "stage"], registry=self._registry
        )
        self._job_seconds = Histogram(
            "musetalk_job_duration_seconds", "Whole jobs.", ["result"], buckets=_BUCKETS, registry=self._registry
        )
        self._stage_seconds = Histogram(
            "musetalk_stage_duration_seconds", "Stages of jobs.", ["stage"], buckets=_BUCKETS, registry=self._registry
        )
        self._frames = Counter("musetalk_frames", "Output frames of finished jobs.", registry=self._registry)
        self._restarts = Counter(
            "musetalk_restarts", "Parts restarted after an unforeseen error.", ["part"], registry=self._registry
        )
        self._info = Gauge(
            "musetalk_build_info",
            "Version, model, device and torch of this process.",
            ["version", "model", "device", "torch"],
            registry=self._registry,
        )
        self._gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._memory: Callable[[], Mapping[str, float]] = dict
        self._registry.register(_GaugeCollector(self))
        for part in ("poller", "heartbeat", "outcome-sender", "progress-sender", "model-loader"):
            self._restarts.labels(part)
        for result in (*get_args(Outcome), "rejected"):
            self._jobs.labels(result)
        # Created at once: a counter that first appears as 1 never rose from 0, and no alert sees the first failure.
        for kind in (MediaError, ProcessingError, MuseTalkError):
            for stage in (*STAGES, "unknown"):
                self._errors.labels(kind.error_type, stage)

    def count_rejection(self) -> None:
        """Count a job that was refused because the worker could not take it."""
        self._jobs.labels("rejected").inc()

    def count_restart(self, part: str) -> None:
        """Count a restart of a part of the process after an unforeseen error."""
        self._restarts.labels(part).inc()

    def count_job(self, clock: StageClock, error: BaseException | None, n_frames: int = 0) -> None:
        """Count a job that ended, with `error` or successfully (None)."""
        result = outcome_of(error)
        self._jobs.labels(result).inc()
        self._job_seconds.labels(result).observe(clock.total_s)
        for stage, seconds in clock.seconds.items():
            self._stage_seconds.labels(stage).observe(seconds)
        self._frames.inc(n_frames)
        if result == "failed":
            kind = error.error_type if isinstance(error, MuseTalkError) else "unknown_error"
            self._errors.labels(kind, getattr(error, "stage", None) or "unknown").inc()

    def set_build_info(self, **labels: str) -> None:
        """Publish version, model, device and torch, once the models are loaded."""
        self._info.clear()
        self._info.labels(**labels).set(1)

    def register_gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Register a gauge that calls `value()` on every scrape; the same name again replaces it."""
        self._gauges[name] = (meaning, value)

    def register_gpu_memory(self, memory: Callable[[], Mapping[str, float]]) -> None:
        """Register the gauge of GPU memory: `memory()` returns bytes by kind, on every scrape."""
        self._memory = memory

    def collect_gauges(self) -> Iterator[GaugeMetricFamily]:
        """Read all registered gauges now."""
        for name, (meaning, value) in self._gauges.items():
            yield GaugeMetricFamily(name, meaning, value=value())
        memory = GaugeMetricFamily("musetalk_gpu_memory_bytes", "GPU memory by kind.", labels=["kind"])
        for kind, n_bytes in self._memory().items():
            memory.add_metric([kind], n_bytes)
        yield memory

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _GaugeCollector:
    """Adapter by which the registry reads the registered gauges."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing fixed: gauges may be registered at any time."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Called by the registry on every scrape."""
        return self._metrics.collect_gauges()


def log_job_end(clock: StageClock, error: BaseException | None, **stats: object) -> None:
    """Log the one record per job that says how it ended: outcome, seconds per stage, and `stats`."""
    times = {stage: round(seconds, 3) for stage, seconds in clock.seconds.items()}
    outcome: dict[str, object] = {"outcome": outcome_of(error)}
    if isinstance(error, MuseTalkError):
        outcome.update(error_type=error.error_type, reason=error.message, stage=error.stage)
    elif error is not None:
        outcome.update(error_type="unknown_error", reason=type(error).__name__)
    is_unforeseen = error is not None and not isinstance(error, MuseTalkError)
    logger.log(
        logging.ERROR if is_unforeseen else logging.INFO,
        "job_done",
        exc_info=error if is_unforeseen else None,
        extra={**outcome, **stats, "stage_times": times, "total_time": round(clock.total_s, 3)},
    )
