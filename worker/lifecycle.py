"""How the serving process ends: what a signal means, who stops the job and when, and when the process ends itself.

Signals arrive in the main thread between any two instructions, so their handlers only put a word into a queue; a thread
does what follows. Knows the core and the poller, nothing of Flask or Gunicorn.
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

Word = Literal["stop", "abort", "restart"]

# Left for the last reports after the running job was told to stop, before the process is killed.
LAST_WORDS_S = 10.0
# An abort is over within two seconds: a job looks at its flag between chunks, and this is all that it gets.
ABORT_S = 1.5
# A process that cannot go on gets so long to answer and report before it is cut off.
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
    """The claim loop, as far as its end goes."""

    def stop(self) -> None:
        """Claim no more."""


class Lifecycle(threading.Thread):
    """Waits for the words that end the process.

    `stop`: take no further job; the running one has `graceful_s` less the time for last reports, then it is stopped.
    `abort`: it is stopped now and the process ends within two seconds. `restart`: as `stop`, but the process ends
    itself, so that a new one takes its place.
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
        self._words: queue.SimpleQueue[Word] = queue.SimpleQueue()
        core.status.on_lost = lambda _reason: self.say("restart")

    def say(self, word: Word) -> None:
        """Hand over a word; may be called by a signal's handler."""
        if word != "restart":
            self._core.status.drain()
        self._words.put(word)

    def run(self) -> None:
        """Do what the words say; the process ends by Gunicorn's hand, by an abort's, or by its own."""
        word = self._words.get()
        # Of a short time the job gets half.
        ends = time.monotonic() + self._graceful_s - min(LAST_WORDS_S, self._graceful_s / 2)
        self._core.status.drain()
        if (loop := self._claim_loop()) is not None:
            loop.stop()
        if word == "restart":
            self._restart()
        while word != "abort":
            try:
                word = self._words.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                if self._core.stop_running("shutdown"):
                    logger.warning("the running job does not end in time and is handed back")
                word = self._words.get()
            if word == "restart":
                self._restart()
        self._core.stop_running("shutdown")
        logger.warning("aborting")
        time.sleep(ABORT_S)
        self._exit_now(EXIT_ABORTED)

    def _restart(self) -> None:
        """End this process in good order, or after a while in any."""
        self._core.stop_running("shutdown")
        timer = threading.Timer(RESTART_S, self._exit_now, (EXIT_RESTART,))
        timer.daemon = True
        timer.start()
        self._end_process()
