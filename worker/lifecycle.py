"""Shutdown of the serving process: the meaning of each signal, when the running job is stopped, how the process ends.

A signal arrives in the main thread between any two instructions, so its handler only puts a command into a queue; a
thread does the rest. Knows the core and the poller through small protocols, nothing of Flask or Gunicorn.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Literal, Protocol

from worker.job_control import StopReason
from worker.readiness import WorkerStatus
from worker.telemetry import logger

Command = Literal["stop", "abort", "restart"]

# Time for the last reports between the stop of the running job and the end of the process.
LAST_REPORTS_S = 10.0
# An abort ends within two seconds: the job checks its flag between chunks and gets no more time than this.
ABORT_S = 1.5
# Time for a process that cannot continue to answer and report before it is cut off.
RESTART_S = 30.0
EXIT_ABORTED = 1
EXIT_RESTART = 70  # EX_SOFTWARE


class JobOwner(Protocol):
    """The core, as far as the end of the process concerns it."""

    @property
    def status(self) -> WorkerStatus:
        """The part of the readiness that outlives a job."""

    def stop_running(self, reason: StopReason) -> bool:
        """Stop the running job at its next chunk; return whether there was one."""


class Stoppable(Protocol):
    """The claim loop, as far as shutdown concerns it."""

    def stop(self) -> None:
        """Claim no further job."""


class Lifecycle(threading.Thread):
    """The thread that runs the commands which end the process.

    `stop`: accept no further job; the running one has `graceful_s` less the time for last reports, then it is stopped.
    `abort`: stop it now and end the process within two seconds. `restart`: as `stop`, but the process ends itself, so
    that a new one replaces it.
    """

    def __init__(
        self,
        core: JobOwner,
        claim_loop: Callable[[], Stoppable | None],
        *,
        graceful_s: float,
        exit_now: Callable[[int], None] = os._exit,
        end_process: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGTERM),
    ) -> None:
        super().__init__(name="lifecycle", daemon=True)
        self._core, self._claim_loop, self._graceful_s = core, claim_loop, graceful_s
        self._exit_now, self._end_process = exit_now, end_process
        # SimpleQueue.put may be interrupted by another put in the same thread, as a handler is by a second signal.
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        core.status.on_lost = lambda _reason: self.request("restart")

    def request(self, command: Command) -> None:
        """Queue a command; may be called by a signal handler."""
        if command != "restart":
            self._core.status.drain()
        self._commands.put(command)

    def run(self) -> None:
        """Run the commands; the process is ended by Gunicorn, by an abort, or by itself."""
        command = self._commands.get()
        # If the time is short, the job gets half of it.
        ends = time.monotonic() + self._graceful_s - min(LAST_REPORTS_S, self._graceful_s / 2)
        self._core.status.drain()
        if (loop := self._claim_loop()) is not None:
            loop.stop()
        if command == "restart":
            self._restart()
        while command != "abort":
            try:
                command = self._commands.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                if self._core.stop_running("shutdown"):
                    logger.warning("running job stopped for shutdown")
                command = self._commands.get()
            if command == "restart":
                self._restart()
        self._core.stop_running("shutdown")
        logger.warning("aborting")
        time.sleep(ABORT_S)
        self._exit_now(EXIT_ABORTED)

    def _restart(self) -> None:
        """End this process in order; after RESTART_S, end it anyway."""
        self._core.stop_running("shutdown")
        timer = threading.Timer(RESTART_S, self._exit_now, (EXIT_RESTART,))
        timer.daemon = True
        timer.start()
        self._end_process()
