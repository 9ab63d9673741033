"""Progress of one job to the orchestrator, from a thread of its own (docs/protocol.md#progress)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from worker.jobs import Stage
from worker.orchestrator import Orchestrator, cancelled_jobs, stage_update
from worker.telemetry import logger

# The answer to a queue waits this long for the last progress to be accepted; the report continues behind it.
ANSWER_WAIT_S = 2.0
LAST_REPORT_LIMIT_S = 20.0


class ProgressSender:
    """Send one job's progress from a thread of its own: the newest wins, nobody waits for it, the last is retried.

    Call `finish` with the last update, or `close`; the thread then closes the client.
    """

    def __init__(
        self,
        orchestrator: Orchestrator,
        job_id: str,
        *,
        interval_s: float = 1.0,
        step: float = 0.05,
        on_cancel: Callable[[str], object] = lambda _job_id: None,
        on_error: Callable[[str, BaseException], float] | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_cancel(id)` is called when the reply to an update names cancelled jobs, or is 410; `on_end()` at the end.

        `on_error(part, error)` is called after an unforeseen error and returns the pause before the restart in seconds.
        """
        self._orchestrator, self._job_id, self._on_cancel = orchestrator, job_id, on_cancel
        self._interval_s, self._step, self._on_error = interval_s, step, on_error or _log_error
        self._on_end = on_end
        self._changed = threading.Condition()
        self._waiting: dict[str, object] | None = None
        self._last: Mapping[str, object] | None = None
        self._last_ends = 0.0
        self._closed = False
        self._is_accepted = False
        self._highest = 0.0
        self._sent: tuple[object, float] = (None, -1.0)
        self._thread = threading.Thread(target=self._run, name="progress-sender", daemon=True)
        self._thread.start()

    def __call__(self, stage: Stage, done: int, total: int) -> None:
        """Note the progress and return at once."""
        update = stage_update(stage, done, total)
        fraction = update["progress"]
        assert isinstance(fraction, float)
        # A repeated stage must not make the progress bar of a user go back.
        self._highest = max(self._highest, fraction)
        update["progress"] = self._highest
        phase, sent = self._sent
        if update["phase"] == phase and self._highest - sent < self._step:
            return
        with self._changed:
            self._waiting = update
            self._changed.notify()

    def finish(
        self, update: Mapping[str, object], *, wait_s: float = ANSWER_WAIT_S, limit_s: float = LAST_REPORT_LIMIT_S
    ) -> bool:
        """Send the last update after the call under way; return within `wait_s` whether it has been accepted.

        The report continues behind the caller until it is accepted or `limit_s` is over.
        """
        with _last_reports_lock:
            _last_reports[:] = [sender for sender in _last_reports if sender._thread.is_alive()]
            _last_reports.append(self)
        with self._changed:
            self._last, self._last_ends, self._closed = update, time.monotonic() + limit_s, True
            self._changed.notify()
        self._thread.join(wait_s)
        return self._is_accepted

    def close(self, limit_s: float = ANSWER_WAIT_S) -> None:
        """Stop sending and drop what is waiting; wait for the call under way, and cut it after `limit_s`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._orchestrator.cut()

    def _run(self) -> None:
        while True:
            try:
                self._send_updates()
                self._send_last()
                break
            except Exception as error:  # noqa: BLE001 - a progress bar that stands still must be noticed
                pause = self._on_error("progress-sender", error)
                with self._changed:
                    if self._closed and (self._last is None or time.monotonic() > self._last_ends):
                        break
                    self._changed.wait(pause)
        self._orchestrator.close()
        self._on_end()

    def _send_updates(self) -> None:
        """Send what is waiting, until closed."""
        while True:
            with self._changed:
                while self._waiting is None and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                update, self._waiting = self._waiting, None
            assert update is not None
            fraction = update["progress"]
            assert isinstance(fraction, float)
            self._sent = (update["phase"], fraction)
            reply = self._orchestrator.progress(self._job_id, update)
            for name in (self._job_id,) if reply.status == 410 else cancelled_jobs(reply):
                self._on_cancel(name)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=self._interval_s)

    def _send_last(self) -> None:
        """Send the last update until it is accepted or its time is over."""
        pause = 0.5
        while self._last is not None:
            reply = self._orchestrator.progress(self._job_id, self._last)
            if reply.is_final or reply.is_unauthorised or time.monotonic() + pause > self._last_ends:
                self._is_accepted, self._last = reply.is_accepted, None
                if not reply.is_accepted:
                    logger.warning("last progress rejected", extra={"reason": reply.describe()})
                return
            time.sleep(pause)
            pause = min(2 * pause, 5.0)


# Senders whose last update may still be on its way.
_last_reports: list[ProgressSender] = []
_last_reports_lock = threading.Lock()


def wait_for_last_reports(limit_s: float) -> bool:
    """Wait, before the process ends, until the last updates are accepted or `limit_s` is over; return whether all are.

    They belong to answers that have been sent.
    """
    ends = time.monotonic() + limit_s
    with _last_reports_lock:
        threads = [sender._thread for sender in _last_reports]
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _log_error(part: str, error: BaseException) -> float:
    logger.error("unforeseen error; restarted", exc_info=error, extra={"part": part})
    return 1.0
