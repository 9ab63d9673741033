"""Why and when a running job must stop: a cancel, a shutdown, its time limits. May be called from any thread.

Every loop of a job asks `should_stop` between two chunks; nothing is interrupted from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from musetalk.errors import DeadlineError, JobCancelledError, MuseTalkError, ShutdownError
from worker.jobs import Stage

StopReason = Literal["cancelled", "shutdown", "job limit", "stage limit"]

# A job that did not look at its limit for so long after it had passed hangs in something that cannot be interrupted.
STUCK_AFTER_S = 120.0


class JobControl:
    """One job's stop flag and limits, in seconds; the first reason to stop is the one that is told."""

    def __init__(
        self,
        names: Iterable[str | None],
        *,
        limit_s: float,
        stage_limits_s: Mapping[Stage, float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`names` are the ids the job may be cancelled by."""
        self._names = frozenset(name for name in names if name)
        self._limit_s, self._stage_limits_s, self._now = limit_s, stage_limits_s, now
        self._ends = now() + limit_s
        self._stage: Stage | None = None
        self._stage_ends: float | None = None
        self._reason: StopReason | None = None

    def is_called(self, name: str) -> bool:
        """Whether `name` is one of the job's ids."""
        return name in self._names

    def begin(self, stage: Stage) -> None:
        """The job enters `stage`: that stage's limit counts from now."""
        limit = self._stage_limits_s.get(stage)
        self._stage, self._stage_ends = stage, None if limit is None else self._now() + limit

    def stop(self, reason: StopReason) -> None:
        """Stop at the next look; a later reason does not replace an earlier one."""
        if self._reason is None:
            self._reason = reason

    def should_stop(self) -> bool:
        """Whether the job must end now; looks at the clock."""
        if self._reason is None:
            now = self._now()
            if now >= self._ends:
                self.stop("job limit")
            elif self._stage_ends is not None and now >= self._stage_ends:
                self.stop("stage limit")
        return self._reason is not None

    @property
    def is_stuck(self) -> bool:
        """Whether the job is so far beyond a limit that it cannot be looking at it any more."""
        ends = self._ends if self._stage_ends is None else min(self._ends, self._stage_ends)
        return self._now() > ends + STUCK_AFTER_S

    def error(self) -> MuseTalkError:
        """The reason as the error the caller gets."""
        if self._reason == "cancelled":
            return JobCancelledError("the job was cancelled")
        if self._reason == "shutdown":
            return ShutdownError("the worker is shutting down before the job's end")
        if self._reason == "stage limit" and self._stage is not None:
            limit = self._stage_limits_s[self._stage]
            return DeadlineError(f"{self._stage} did not end within {limit:g} s", limit_s=limit)
        return DeadlineError(f"the job did not end within {self._limit_s:g} s", limit_s=self._limit_s)
