"""Readiness of the worker: the state that probes and callers see, and the reason when it cannot take a job.

Knows no models and no jobs; the core passes in what changes from moment to moment.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from worker.telemetry import logger

State = Literal["starting", "ready", "busy", "failed", "draining"]


@dataclass(frozen=True)
class Readiness:
    """A snapshot of the worker's state; `reason` explains to a person why no job can be taken."""

    state: State
    model: str | None = None
    reason: str | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether probes should pass: busy is healthy, loading and failed are not."""
        return self.state in ("ready", "busy")


class WorkerStatus:
    """The lasting part of the readiness: failures, draining, and checks of other parts of the process.

    `on_lost(reason)` is called once when only a new process can continue; the server's lifecycle sets it.
    """

    def __init__(self) -> None:
        self.on_lost: Callable[[str], None] | None = None
        self._failure: str | None = None
        self._checks: list[Callable[[], str | None]] = []
        self._lost = threading.Lock()
        # A plain flag: a signal handler sets it, where taking a lock may never return.
        self._is_draining = False

    def fail(self, reason: str) -> None:
        """Take no job from now on, for a reason that only a person or a new process can change."""
        self._failure = reason

    def drain(self) -> None:
        """Take no further job; the running one continues. May be called by a signal handler."""
        self._is_draining = True

    @property
    def is_draining(self) -> bool:
        """Whether this process ends soon, also where it has failed before."""
        return self._is_draining

    def add_check(self, check: Callable[[], str | None]) -> None:
        """Call `check()` for every snapshot: a text means that the worker is not healthy, for that reason."""
        self._checks.append(check)

    def mark_lost(self, reason: str) -> None:
        """Fail for good and ask, once, for a new process."""
        if not self._lost.acquire(blocking=False):
            return
        self._failure = reason
        logger.critical("new process needed", extra={"reason": reason})
        if self.on_lost is not None:
            self.on_lost(reason)

    def snapshot(self, *, model: str | None, loading: str, is_busy: bool) -> Readiness:
        """The readiness with `model` loaded (None: still `loading`); takes no lock that a job holds."""
        if self._failure is not None:
            return Readiness("failed", model, self._failure)
        if model is None:
            return Readiness("starting", None, loading)
        if self._is_draining:
            return Readiness("draining", model, "the worker is shutting down")
        for check in self._checks:
            if (reason := check()) is not None:
                return Readiness("failed", model, reason)
        return Readiness("busy" if is_busy else "ready", model)
