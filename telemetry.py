"""Logs as JSON lines with the job's id in each, and the clock of a job's stages. Knows no torch."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from errors import MuseTalkError
from jobs import Stage

logger = logging.getLogger("musetalk")

ROOT = Path(__file__).resolve().parent

_job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

# Attributes every LogRecord has; what a call gave in `extra` is the rest.
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


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
        return json.dumps(entry, default=str, ensure_ascii=False)


def _trace_text(error: BaseException) -> str:
    """The error and where it happened, with file names but without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__}: {str(error).replace(str(ROOT), '.')} ({where})"


def configure_logging(level: str) -> None:
    """Send our log as JSON lines to standard output; safe to call twice."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


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
