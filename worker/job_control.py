"""A running job: its clock, its progress, and why and when it must stop (a cancel, a shutdown, a time limit).

Every loop of a job asks `should_stop` between two chunks; nothing interrupts it from outside. All calls are safe from
any thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from musetalk.errors import (
    CancelledError,
    DeadlineError,
    DiskFullError,
    JobCancelledError,
    MuseTalkError,
    ProcessingError,
    ShutdownError,
)
from musetalk.files import is_disk_full
from worker.config import Settings
from worker.jobs import Job, JobResult, Stage
from worker.telemetry import StageClock

StopReason = Literal["cancelled", "shutdown", "job limit", "stage limit"]
OnProgress = Callable[[Stage, int, int], None]

# A job that has not checked its limit this long after it passed hangs in something that cannot be interrupted.
STUCK_AFTER_S = 120.0
# A queue that lost our answer sends the same job again within minutes.
KEPT_RESULTS = 50
KEPT_RESULTS_S = 3600.0


class JobControl:
    """One job's stop flag and limits, in seconds; the first reason to stop is the one that is reported."""

    def __init__(
        self,
        names: Iterable[str | None],
        *,
        limit_s: float,
        stage_limits_s: Mapping[Stage, float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`names` are the ids that cancel the job."""
        self._names = frozenset(name for name in names if name)
        self._limit_s, self._stage_limits_s, self._now = limit_s, stage_limits_s, now
        self._ends = now() + limit_s
        self._stage: Stage | None = None
        self._stage_ends: float | None = None
        self._reason: StopReason | None = None

    @classmethod
    def for_job(cls, job: Job | None, settings: Settings) -> JobControl:
        """The control of `job` (None: local files, which have no ids) with the limits of the settings."""
        names = () if job is None else (job.job_id, job.queue_job_id, job.buffer_job_id)
        heavy: tuple[Stage, ...] = ("preprocessing", "inference", "postprocessing")
        return cls(
            names, limit_s=settings.job_timeout_s, stage_limits_s=dict.fromkeys(heavy, settings.inference_timeout_s)
        )

    def has_id(self, name: str) -> bool:
        """Whether `name` is one of the job's ids."""
        return name in self._names

    def begin(self, stage: Stage) -> None:
        """Enter `stage`: its limit counts from now."""
        limit = self._stage_limits_s.get(stage)
        self._stage, self._stage_ends = stage, None if limit is None else self._now() + limit

    def stop(self, reason: StopReason) -> None:
        """Stop at the next check; a later reason does not replace an earlier one."""
        if self._reason is None:
            self._reason = reason

    def should_stop(self) -> bool:
        """Whether the job must end now; checks the limits."""
        if self._reason is None:
            now = self._now()
            if now >= self._ends:
                self.stop("job limit")
            elif self._stage_ends is not None and now >= self._stage_ends:
                self.stop("stage limit")
        return self._reason is not None

    @property
    def is_stuck(self) -> bool:
        """Whether the job is so far beyond a limit that it cannot be checking it any more."""
        ends = self._ends if self._stage_ends is None else min(self._ends, self._stage_ends)
        return self._now() > ends + STUCK_AFTER_S

    def error(self) -> MuseTalkError:
        """The stop reason as the error that the caller gets."""
        if self._reason == "cancelled":
            return JobCancelledError("the job was cancelled")
        if self._reason == "shutdown":
            return ShutdownError("the worker shut down before the job was finished")
        if self._reason == "stage limit" and self._stage is not None:
            limit = self._stage_limits_s[self._stage]
            return DeadlineError(f"{self._stage} did not finish within {limit:g} s", limit_s=limit)
        return DeadlineError(f"the job did not finish within {self._limit_s:g} s", limit_s=self._limit_s)


@dataclass(frozen=True)
class JobProgress:
    """Progress of the running job: frames in the stage `inference`, 0 of 1 in the others."""

    stage: Stage
    done: int
    total: int


@dataclass(frozen=True)
class RunningNow:
    """The job that runs right now, for a person: its id, its progress, and the seconds so far."""

    job_id: str
    progress: JobProgress | None
    elapsed_s: float


class RunningJob:
    """The job that holds the slot: its control, its clock, and its progress, passed on to `on_progress`."""

    def __init__(self, control: JobControl, on_progress: OnProgress, *, name: str | None = None) -> None:
        """`name` is the job's id as others see it; None for work that is no job of theirs."""
        self.control, self.name = control, name
        self.clock = StageClock()
        self.progress: JobProgress | None = None
        self._on_progress = on_progress

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Run the block as stage `name`: timed, limited and reported."""
        self.control.begin(name)
        with self.clock.stage(name):
            # Inference reports its own progress, in frames.
            if name != "inference":
                self.report(name, 0, 1)
            yield

    def report(self, stage: Stage, done: int, total: int) -> None:
        """Note the progress and pass it on."""
        self.progress = JobProgress(stage, done, total)
        self._on_progress(stage, done, total)

    def should_stop(self) -> bool:
        """Whether the job must end now."""
        return self.control.should_stop()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Complete the errors of the block: the reason of a stop, the class of a system error, the stage times."""
        try:
            with _system_errors():
                yield
        except CancelledError as stopped:
            if not self.should_stop():
                stopped.stage_times = self.clock.snapshot()
                raise
            error = self.control.error()
            error.stage, error.stage_times = stopped.stage, self.clock.snapshot()
            raise error from None
        except MuseTalkError as error:
            error.stage_times = self.clock.snapshot()
            raise


@contextmanager
def _system_errors() -> Iterator[None]:
    """Turn errors of the system into ours, without its paths."""
    try:
        yield
    except (OSError, MemoryError) as error:
        kind = DiskFullError if is_disk_full(error) else ProcessingError
        reason = error.strerror if isinstance(error, OSError) else "out of memory"
        translated = kind(f"system error: {reason or type(error).__name__}", kind=type(error).__name__)
        translated.stage = getattr(error, "stage", None)
        raise translated from error


class ResultCache:
    """Results of finished queue jobs, kept for an hour for a queue that lost our answer and sends the job again."""

    def __init__(self) -> None:
        self._results: OrderedDict[Job, tuple[float, JobResult]] = OrderedDict()

    def get(self, job: Job) -> JobResult | None:
        """The result of exactly this job (same ids, addresses and parameters), or None."""
        ended, result = self._results.get(job, (0.0, None))
        return result if result is not None and time.monotonic() - ended < KEPT_RESULTS_S else None

    def put(self, job: Job, result: JobResult) -> None:
        """Keep the result; a job without a queue's id is always run again, so it is not kept."""
        if not job.queue_job_id:
            return
        self._results[job] = (time.monotonic(), result)
        while len(self._results) > KEPT_RESULTS:
            self._results.popitem(last=False)
