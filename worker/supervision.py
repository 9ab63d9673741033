"""Supervision of threads: restarted after an unforeseen error, counted, and in the end a new process.

An error that a thread foresees is no business of this module. Knows no jobs and no orchestrator.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from worker.clock import MAX_BACKOFF_S, pause_after
from worker.telemetry import logger

# The third unforeseen error of one part within this time is no accident any more.
WINDOW_S = 600.0
MAX_ERRORS = 3
# Time in which /hc and the heartbeat say why, before the process ends.
NOTICE_S = 5.0


class Status(Protocol):
    """The worker's status, as far as supervision concerns it."""

    def fail(self, reason: str) -> None:
        """Take no job from now on."""

    def mark_lost(self, reason: str) -> None:
        """Ask for a new process."""


class Supervisor:
    """Counts the unforeseen errors of each part of the process; after the third in ten minutes asks for a new one."""

    def __init__(
        self,
        status: Status,
        count_restart: Callable[[str], None],
        *,
        is_busy: Callable[[], bool] = lambda: False,
        now: Callable[[], float] = time.monotonic,
        notice_s: float = NOTICE_S,
    ) -> None:
        """`count_restart(part)` counts for the metrics; the process ends when no job runs (`is_busy`)."""
        self._status, self._count_restart, self._is_busy = status, count_restart, is_busy
        self._now, self._notice_s = now, notice_s
        self._lock = threading.Lock()
        self._errors: dict[str, deque[float]] = {}
        self._is_given_up = False

    def restart_pause_s(self, part: str, error: BaseException) -> float:
        """Note an unforeseen error of `part`; return the pause before its restart, in seconds."""
        now = self._now()
        with self._lock:
            times = self._errors.setdefault(part, deque(maxlen=MAX_ERRORS))
            times.append(now)
            n_recent = sum(1 for then in times if now - then <= WINDOW_S)
        self._count_restart(part)
        logger.error("unforeseen error; restarted", exc_info=error, extra={"part": part, "n_in_ten_minutes": n_recent})
        if n_recent >= MAX_ERRORS:
            self._give_up(f"the {part} failed {n_recent} times in ten minutes")
        return pause_after(n_recent - 1, MAX_BACKOFF_S)

    def _give_up(self, reason: str) -> None:
        self._status.fail(reason)
        with self._lock:
            if self._is_given_up:
                return
            self._is_given_up = True
        threading.Thread(target=self._end_process, args=(reason,), name="supervisor", daemon=True).start()

    def _end_process(self, reason: str) -> None:
        time.sleep(self._notice_s)
        while self._is_busy():
            time.sleep(0.2)
        self._status.mark_lost(reason)


class Loop(threading.Thread):
    """A thread that calls `step` until stopped; `step` returns the pause before the next call, in seconds."""

    def __init__(
        self,
        name: str,
        step: Callable[[], float],
        supervisor: Supervisor,
        *,
        last: Callable[[], object] = lambda: None,
    ) -> None:
        """`last` is called once, when the loop was stopped."""
        super().__init__(name=name, daemon=True)
        self._step, self._last, self._supervisor = step, last, supervisor
        self._wake = threading.Event()
        self._stopping = threading.Event()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def wake(self) -> None:
        """Call `step` without waiting for its turn."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread after the step under way."""
        self._stopping.set()
        self._wake.set()

    def run(self) -> None:
        """Call `step` until stopped, whatever it raises."""
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self._wake.wait(min(self._step(), threading.TIMEOUT_MAX))
            except BaseException as error:  # noqa: BLE001 - a loop that ends would leave a worker that only looks alive
                self._stopping.wait(self._supervisor.restart_pause_s(self.name, error))
        try:
            self._last()
        except Exception as error:  # noqa: BLE001 - the process ends, nothing can be repeated
            logger.error("last step failed", exc_info=error, extra={"part": self.name})
