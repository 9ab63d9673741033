"""Logs as JSON lines with the job's id in each, the clock of a job's stages, and the metrics. Knows no torch."""

from __future__ import annotations

import json
import logging
import re
import resource
import sys
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

# Attributes every LogRecord has; what a call gave in `extra` is the rest.
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


# What follows the path of an address may be a signature: it is never logged.
_QUERY = re.compile(r"(https?://[^\s?#\"'<>]*)[?#][^\s\"'<>]*")
_USER = re.compile(r"(https?://)[^\s/@\"'<>]*@")
_secrets: set[str] = set()


def keep_secret(values: Iterable[str | None]) -> None:
    """No later log line of this process shows one of `values`, wherever it comes from."""
    _secrets.update(value for value in values if value and len(value) >= 4)


def redacted(text: str) -> str:
    """`text` without queries and user names of addresses, and without what `keep_secret` was told."""
    text = _USER.sub(r"\1", _QUERY.sub(r"\1?...", text))
    for secret in _secrets:
        text = text.replace(secret, "***")
    return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, severity (the level field Salad reads), message, job id, extras."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON; what JSON cannot hold becomes text."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "severity": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if (job_id := _job_id.get()) is not None:
            entry["job_id"] = job_id
        entry.update({key: value for key, value in vars(record).items() if key not in _RECORD_FIELDS})
        if record.exc_info and record.exc_info[1] is not None:
            entry["exception"] = _trace_text(record.exc_info[1])
        return redacted(json.dumps(entry, default=str, ensure_ascii=False))


def _trace_text(error: BaseException) -> str:
    """The error and where it happened, with file names but without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__}: {str(error).replace(str(ROOT), '.')} ({where})"


def configure_logging(level: str, stream: TextIO = sys.stdout) -> None:
    """Send every log of the process as JSON lines to `stream`; safe to call twice.

    Ours from `level` on; other libraries' from warnings on, since their chatter holds addresses with signatures.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(level.upper())
    logging.captureWarnings(True)


@contextmanager
def job_logging(job_id: str) -> Iterator[None]:
    """Every record logged inside the block by this thread carries `job_id`."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


class StageClock:
    """Seconds spent in each stage of one job; writes the stage on errors that pass through."""

    def __init__(self) -> None:
        self.seconds: dict[Stage, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time the block as stage `name`; an error raised in it gets that stage unless it already has one."""
        started = time.monotonic()
        try:
            yield
        except MuseTalkError as error:
            error.stage = error.stage or name
            raise
        except BaseException as error:
            # What nobody foresaw still says where it happened.
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
        """Seconds since the clock was made."""
        return time.monotonic() - self._started


def peak_memory_kb() -> int:
    """Largest resident memory this process ever had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


Outcome = Literal["succeeded", "failed", "cancelled", "handed_back"]
# Upper bounds in seconds: a stage is a tenth of a second to half an hour.
_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800)


def outcome_of(error: BaseException | None) -> Outcome:
    """How a job ended that was begun; one that nobody wants or that goes to another worker did not fail."""
    if isinstance(error, JobCancelledError):
        return "cancelled"
    if isinstance(error, ShutdownError):
        return "handed_back"
    return "succeeded" if error is None else "failed"


class Metrics:
    """What Prometheus reads at /metrics; names as its conventions have them (base units, `_total`, `_info`)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._jobs = Counter("musetalk_jobs", "Jobs by how they ended.", ["result"], registry=self._registry)
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
        self._info = Gauge(
            "musetalk_build_info", "What runs here.", ["version", "model", "device", "torch"], registry=self._registry
        )
        self._readers: dict[str, tuple[str, Callable[[], float]]] = {}
        self._memory: Callable[[], Mapping[str, float]] = dict
        self._registry.register(_Live(self))
        for result in (*get_args(Outcome), "rejected"):
            self._jobs.labels(result)
        # All of them at once: a counter that first appears as 1 never rises from 0, so no rule sees the first failure.
        for kind in (MediaError, ProcessingError, MuseTalkError):
            for stage in (*STAGES, "unknown"):
                self._errors.labels(kind.error_type, stage)

    def rejected(self) -> None:
        """A job was refused because the worker could not take it."""
        self._jobs.labels("rejected").inc()

    def ended(self, clock: StageClock, error: BaseException | None, n_frames: int = 0) -> None:
        """A job ended, well (None) or with `error`."""
        result = outcome_of(error)
        self._jobs.labels(result).inc()
        self._job_seconds.labels(result).observe(clock.total_s)
        for stage, seconds in clock.seconds.items():
            self._stage_seconds.labels(stage).observe(seconds)
        self._frames.inc(n_frames)
        if result == "failed":
            kind = error.error_type if isinstance(error, MuseTalkError) else "unknown_error"
            self._errors.labels(kind, getattr(error, "stage", None) or "unknown").inc()

    def built(self, **facts: str) -> None:
        """What runs here, once the models are loaded: version, model, device, torch."""
        self._info.clear()
        self._info.labels(**facts).set(1)

    def read(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Show `value()` as the gauge `name` at each look; a later reader of the same name replaces it."""
        self._readers[name] = (meaning, value)

    def read_gpu_memory(self, memory: Callable[[], Mapping[str, float]]) -> None:
        """Show `memory()`, bytes by kind, at each look."""
        self._memory = memory

    def live(self) -> Iterator[GaugeMetricFamily]:
        """The gauges that are read at this moment."""
        for name, (meaning, value) in self._readers.items():
            yield GaugeMetricFamily(name, meaning, value=value())
        memory = GaugeMetricFamily("musetalk_gpu_memory_bytes", "GPU memory by kind.", labels=["kind"])
        for kind, n_bytes in self._memory().items():
            memory.add_metric([kind], n_bytes)
        yield memory

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Live:
    """Lets the registry ask for the live gauges."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing fixed: the gauges come as they are registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Called by the registry at each look."""
        return self._metrics.live()
