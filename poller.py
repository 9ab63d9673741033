"""Buffer mode: claim jobs, run them, report their outcomes (docs/protocol.md#buffer-mode); a thread for heartbeats.

Gunicorn's post_fork hook calls `start`. Knows the core and the orchestrator; no Flask, no torch, no storage.
"""

from __future__ import annotations

import math
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from musetalk.errors import ProcessingError, RequestError, UnavailableError
from musetalk_core import Core
from worker.clock import Backoff, Clock
from worker.jobs import Job, JobResult, check_id, error_body, parse_job
from worker.orchestrator import (
    Orchestrator,
    OrchestratorSettings,
    Reply,
    cancelled_jobs,
    claimed_job,
    error_text,
    failed_report,
    orchestrator_settings,
    reportable_id,
    succeeded_report,
)
from worker.outbox import Entry, Outbox
from worker.outcomes import Outcome
from worker.progress_sender import ProgressSender
from worker.readiness import Readiness
from worker.records import Disk, WorkDisk, error_reason
from worker.supervision import Loop, Supervisor
from worker.telemetry import job_logging, logger
from worker.work_dir import WorkDir

HEARTBEAT_S = 10.0
# Outcomes that are remembered, for jobs that the orchestrator hands out again.
REMEMBERED_OUTCOMES = 200
# Pause before a worker that may not claim looks again.
NOT_READY_S = 0.5
NO_ROOM_S = 1.0
# A claim waits this long for the report of the job before.
FIRST_REPORT_S = 2.0
# At the end of the process: for the report under way, and for those that were never sent.
LAST_REPORT_S = 9.0
LAST_HEARTBEAT_S = 1.0
# The outcome of a job that an earlier process left without one.
_ORPHAN = {
    "error_type": "processing_error",
    "stage": "unknown",
    "error_message": "the worker process was killed while it ran this job",
    "retryable": True,
}


class JobCore(Protocol):
    """The core, as far as the claim loop concerns it."""

    @property
    def readiness(self) -> Readiness:
        """A snapshot of the worker's state."""

    @property
    def is_busy(self) -> bool:
        """Whether a job runs right now."""

    @property
    def work_dir(self) -> WorkDir:
        """The folder of this worker."""

    @property
    def supervisor(self) -> Supervisor:
        """Who counts unforeseen errors."""

    def cancel(self, job_id: str) -> bool:
        """Stop the running job if `job_id` is one of its ids."""

    def run_job(self, job: Job, *, on_progress: Callable[[Any, int, int], None]) -> JobResult:
        """Run a whole job."""


class Heartbeat(Loop):
    """Report every ten seconds that the worker is alive, whatever the job does; takes no lock that a job holds."""

    def __init__(
        self, orchestrator: Orchestrator, core: JobCore, interval_s: float = HEARTBEAT_S, clock: Clock | None = None
    ) -> None:
        super().__init__("heartbeat", self.step, core.supervisor, last=self._end)
        self._orchestrator, self._core, self._interval_s = orchestrator, core, interval_s
        self._clock = clock or Clock()
        self._error: str | None = None
        self._was_accepted: bool | None = None
        self.last_accepted: float | None = None
        # Called when heartbeats are accepted again.
        self.on_accepted: Callable[[], None] = lambda: None
        # Why outcomes cannot be stored; said also by a worker that shuts down.
        self.storage_problem: Callable[[], str | None] = lambda: None

    @property
    def is_accepted(self) -> bool:
        """Whether the last heartbeat was accepted; before that no job is claimed."""
        return bool(self._was_accepted)

    @property
    def age_s(self) -> float:
        """Seconds since a heartbeat was last accepted; infinite before the first."""
        return math.inf if self.last_accepted is None else self._clock.monotonic() - self.last_accepted

    def note(self, error: str) -> None:
        """Send `error` with the next heartbeat."""
        self._error = error

    def send_now(self, error: str | None = None) -> None:
        """Send a heartbeat without waiting for its turn: a job began or ended, or an error occurred."""
        if error is not None:
            self.note(error)
        self.wake()

    def step(self) -> float:
        """Send a heartbeat; return the pause before the next one, in seconds."""
        # Counted from the start, so that a slow call does not lengthen the gap.
        next_s = self._clock.monotonic() + self._interval_s
        self.beat()
        return max(0.0, next_s - self._clock.monotonic())

    def _end(self) -> None:
        self.beat()
        self._orchestrator.close()

    def beat(self) -> Reply:
        """Send one heartbeat with the state of this moment."""
        readiness = self._core.readiness
        error = self._error
        if not readiness.is_healthy and readiness.reason:
            error = readiness.reason
        error = self.storage_problem() or error
        reply = self._orchestrator.heartbeat("busy" if self._core.is_busy else "idle", error)
        for name in cancelled_jobs(reply):
            self._core.cancel(name)
        if reply.is_accepted:
            self.last_accepted = self._clock.monotonic()
            if self._error == error:
                self._error = None
        was_accepted, self._was_accepted = self._was_accepted, reply.is_accepted
        if reply.is_accepted != was_accepted:
            level = 20 if reply.is_accepted else 40
            logger.log(level, "heartbeat accepted" if reply.is_accepted else "heartbeat rejected",
                       extra={} if reply.is_accepted else {"reason": reply.describe()})  # fmt: skip
            if reply.is_accepted:
                self.on_accepted()
        return reply


class OutcomeSender(Loop):
    """Report stored outcomes from a thread of its own: new ones first, each of the others in its own time."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        outbox: Outbox,
        supervisor: Supervisor,
        on_problem: Callable[[str], None],
        clock: Clock | None = None,
    ) -> None:
        """`on_problem(text)` is called when a report was not accepted."""
        super().__init__("outcome-sender", self.step, supervisor)
        self._orchestrator, self._outbox, self._on_problem = orchestrator, outbox, on_problem
        self._clock = clock or Clock()
        self._backoff = Backoff()
        # Until then only new outcomes are tried, so that an orchestrator that is away is not asked 20,000 times.
        self._closed_until = 0.0

    def step(self) -> float:
        """Report one outcome if one is due; return the pause before the next, in seconds."""
        closed_s = self._closed_until - self._clock.monotonic()
        found = self._outbox.next_outcome(only_fresh=closed_s > 0)
        if found is None:
            return max(closed_s, min(self._outbox.next_due_s(), HEARTBEAT_S))
        self._send(*found)
        return 0.0

    def open(self) -> None:
        """Try the stored outcomes again now: the orchestrator is back."""
        self._backoff.reset()
        self._closed_until = 0.0
        self.wake()

    def finish(self, limit_s: float) -> None:
        """After `stop`: report what was never sent and what is due, until one fails or `limit_s` is over."""
        if self.is_alive():
            self.join(limit_s)
        ends = self._clock.monotonic() + limit_s
        while self._clock.monotonic() < ends and (found := self._outbox.next_outcome()) is not None:
            if not self._send(*found):
                break
        self._orchestrator.close()

    def _send(self, entry: Entry, outcome: Outcome) -> bool:
        """Report an outcome; return whether it needs no further report."""
        extra = {"buffer_job_id": outcome.buffer_job_id}
        try:
            reply = self._orchestrator.report(outcome.buffer_job_id, outcome.body)
        except BaseException:
            self._outbox.mark_failed(entry, outcome)
            raise
        if reply.is_final or reply.is_refusal:
            self._backoff.reset()
            self._closed_until = 0.0
        if reply.is_final:
            if not reply.is_accepted:
                extra["reason"] = reply.describe()
                logger.error("outcome rejected by the orchestrator; dropped", extra=extra)
            self._outbox.mark_accepted(entry)
            return True
        if reply.is_refusal:
            extra["reason"] = reply.describe()
            logger.error("outcome refused by the orchestrator; moved to undelivered", extra=extra)
            self._outbox.mark_refused(entry)
            return True
        self._closed_until = self._clock.monotonic() + self._backoff.next_s(reply.retry_after_s)
        self._on_problem(f"the outcome of a job cannot be reported: {reply.describe()}")
        self._outbox.mark_failed(entry, outcome)
        return False


class Poller:
    """The claim loop; `step` runs one round and returns the pause before the next."""

    def __init__(
        self,
        core: JobCore,
        settings: OrchestratorSettings,
        folder: Path,
        *,
        poll_interval_s: float,
        heartbeat_s: float = HEARTBEAT_S,
        min_free_mb: int = 0,
        connect: Callable[[OrchestratorSettings], Orchestrator] = Orchestrator,
        disk: Disk | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`folder` is WORK_DIR; it is not touched before it is this worker's. The last three are for the simulator."""
        self.core = core
        self._settings, self._connect = settings, connect
        self._clock = clock or Clock()
        self._orchestrator = connect(settings)
        self.heartbeat = Heartbeat(connect(settings), core, heartbeat_s, self._clock)
        disk = disk or WorkDisk(folder, min_free_mb=min_free_mb)
        self.outbox = Outbox(disk, failed_report(_ORPHAN), clock=self._clock)
        self.sender = OutcomeSender(
            connect(settings), self.outbox, core.supervisor, self.heartbeat.note, clock=self._clock
        )
        self.heartbeat.on_accepted = self.sender.open
        self.heartbeat.storage_problem = lambda: self.outbox.problem
        self._loop = Loop("poller", self._round, core.supervisor, last=self.end)
        self._poll_interval_s = poll_interval_s
        self._claim_backoff = Backoff()
        self._outcomes: OrderedDict[str, Mapping[str, object]] = OrderedDict()
        self._stopping = threading.Event()
        self._problem: str | None = None
        self._room_problem: str | None = None

    def start(self) -> None:
        """Run the loops in daemon threads."""
        for loop in (self.heartbeat, self.sender, self._loop):
            loop.start()

    def join(self, limit_s: float) -> bool:
        """Wait up to `limit_s` seconds for the claim loop to end; return whether it has."""
        self._loop.join(limit_s)
        return not self._loop.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether all threads run; a worker whose loop has ended must not look healthy."""
        return all(loop.is_alive() for loop in (self.heartbeat, self.sender, self._loop))

    def stop(self) -> None:
        """Claim no further job; the running one continues."""
        self._stopping.set()
        self._loop.stop()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def _round(self) -> float:
        # In a shared folder, another worker's running job looks like the leftover of a killed process.
        return self.step() if self.core.work_dir.is_ours else NOT_READY_S

    def end(self) -> None:
        """Send the last reports and the last heartbeat."""
        self.sender.stop()
        self.sender.finish(LAST_REPORT_S)
        if self.outbox.n_in_memory:
            self.outbox.check()
        self.heartbeat.stop()
        if self.heartbeat.is_alive():
            self.heartbeat.join(LAST_HEARTBEAT_S)
        self._orchestrator.close()

    def step(self) -> float:
        """Claim and run a job if the worker is free and has room; return the pause in seconds."""
        if self.outbox.open():
            self.sender.wake()
        # With a problem the worker is not ready until there is room again, which only `check` finds out.
        if self.outbox.problem is None and not self._may_claim():
            return NOT_READY_S
        if self._has_no_room():
            return NO_ROOM_S
        if not self._may_claim():
            return NOT_READY_S
        reply = self._orchestrator.claim()
        claimed, problem = claimed_job(reply)
        self._log_claim_problem(problem)
        if problem is not None:
            self.heartbeat.send_now(problem)
            return self._claim_backoff.next_s(reply.retry_after_s)
        self._claim_backoff.reset()
        if claimed is None:
            # Jitter, so that a fleet started together does not poll in step.
            return self._poll_interval_s * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load, hides nothing
        return self._handle(claimed)

    def _may_claim(self) -> bool:
        # The orchestrator gives a silent worker's job to another one, so a worker it does not know must not claim.
        return self.heartbeat.is_accepted and self.core.readiness.state == "ready" and not self.is_stopping

    def _has_no_room(self) -> bool:
        """Check the disk; report when a problem begins and when it ends."""
        problem = self.outbox.check()
        if problem != self._room_problem:
            if problem is None:
                logger.info("WORK_DIR can be used again")
            else:
                logger.error("no job is claimed", extra={"reason": problem})
            self.heartbeat.send_now()
        self._room_problem = problem
        return problem is not None

    def _log_claim_problem(self, problem: str | None) -> None:
        """Log when claims begin to fail or work again, not every attempt."""
        if problem != self._problem:
            if problem is None:
                logger.info("claims work again")
            else:
                logger.warning("claim failed", extra={"reason": problem})
        self._problem = problem

    def _handle(self, claimed: dict[str, Any]) -> float:
        """Run a claimed job, or fail it when it cannot run; return the pause in seconds."""
        buffer_job_id = reportable_id(claimed)
        if buffer_job_id is None:
            logger.error("claimed job has no usable buffer_job_id; it can neither run nor be reported")
            self.heartbeat.send_now("a claimed job has no usable buffer_job_id")
            return self._claim_backoff.next_s()
        known = self._outcomes.get(buffer_job_id)
        # A failed job may succeed now, so only a success is repeated.
        if known is not None and known["status"] == "succeeded":
            logger.info("job repeated; known outcome reported", extra={"buffer_job_id": buffer_job_id})
            self._finish(buffer_job_id, known)
            return 0.0
        try:
            check_id(buffer_job_id, "buffer_job_id")
            job = parse_job(claimed, buffer_job_id=buffer_job_id)
            self._write_claim(buffer_job_id)
        except (RequestError, ProcessingError) as error:
            error.stage = "validation"
            self._finish(buffer_job_id, failed_report(error_body(error)[1]))
            return 0.0
        self._run(job, buffer_job_id)
        return 0.0

    def _write_claim(self, buffer_job_id: str) -> None:
        """Write down the claim; raises ProcessingError when that fails, because a killed process would lose the job."""
        try:
            self.outbox.write_claim(buffer_job_id)
        except OSError as error:
            raise ProcessingError(f"the claim could not be written to WORK_DIR ({error_reason(error)})") from None

    def _run(self, job: Job, buffer_job_id: str) -> None:
        progress = None
        if self._settings.base_url:
            progress = ProgressSender(
                self._connect(self._settings),
                job.job_id,
                on_cancel=self.core.cancel,
                on_error=self.core.supervisor.restart_pause_s,
            )
        try:
            with job_logging(job.job_id):
                result = self._run_when_free(job, self._progress_callback(progress))
            report = succeeded_report(result)
        except Exception as error:  # noqa: BLE001 - every outcome is reported
            report = failed_report(error_body(error, job_id=job.job_id)[1])
            self.heartbeat.note(error_text(error))
        finally:
            if progress is not None:
                progress.close()
        self._finish(buffer_job_id, report)
        self.heartbeat.send_now()

    def _run_when_free(self, job: Job, on_progress: Callable[[Any, int, int], None]) -> JobResult:
        """Run the job; if a posted job has taken the slot since the claim, wait until it is finished."""
        while True:
            try:
                return self.core.run_job(job, on_progress=on_progress)
            except UnavailableError as error:
                # The job is claimed already: waiting for the slot is cheaper than failing it.
                if error.details.get("state") != "busy" or self._clock.wait(self._stopping, 0.5):
                    raise

    def _progress_callback(self, progress: ProgressSender | None) -> Callable[[Any, int, int], None]:
        """Pass progress on; the first call also sends a heartbeat, because from then on the worker is busy."""
        is_first = True

        def report(stage: Any, done: int, total: int) -> None:
            nonlocal is_first
            if is_first:
                is_first = False
                self.heartbeat.send_now()
            if progress is not None:
                progress(stage, done, total)

        return report

    def _finish(self, buffer_job_id: str, body: Mapping[str, object]) -> None:
        """Store the outcome and remember it; the sender reports it before all others."""
        entry = self.outbox.add(Outcome(buffer_job_id, body, self._clock.time()))
        self._outcomes[buffer_job_id] = body
        while len(self._outcomes) > REMEMBERED_OUTCOMES:
            self._outcomes.popitem(last=False)
        self.sender.wake()
        if self.sender.is_alive():
            # So that the orchestrator usually has it before it sees an idle worker.
            self.outbox.wait_tried(entry, FIRST_REPORT_S)


_running: Poller | None = None


def start(core: Core) -> Poller | None:
    """Start the claim loop in daemon threads of this process; without its settings the core fails with the reason."""
    global _running  # noqa: PLW0603 - Gunicorn's hooks share only the module
    settings = core.settings
    needed = {
        "ORCHESTRATOR_BASE_URL": settings.orchestrator_url or settings.buffer_orchestrator_url,
        "INTERNAL_API_KEY": settings.internal_api_key,
    }
    if missing := [name for name, value in needed.items() if not value]:
        reason = f"buffer mode needs {' and '.join(missing)}"
        core.status.fail(reason)
        logger.error("no job can be claimed", extra={"reason": reason})
        return None
    poller = Poller(
        core,
        orchestrator_settings(settings),
        settings.work_dir,
        poll_interval_s=settings.buffer_poll_interval_s,
        min_free_mb=settings.min_free_disk_mb,
    )
    poller.start()
    _register_gauges(core, poller)
    core.status.add_check(lambda: poller.outbox.problem)
    core.status.add_check(lambda: None if poller.is_alive or poller.is_stopping else "the claim loop has ended")
    _running = poller
    return poller


def _register_gauges(core: Core, poller: Poller) -> None:
    gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
        (
            "musetalk_heartbeat_age_seconds",
            "Time since the orchestrator last accepted a heartbeat.",
            lambda: poller.heartbeat.age_s,
        ),
        ("musetalk_outcomes_waiting", "Outcomes that are not accepted yet.", lambda: poller.outbox.n_waiting),
        (
            "musetalk_outcomes_parked",
            "Waiting outcomes that fail while others are accepted.",
            lambda: poller.outbox.n_parked,
        ),
        ("musetalk_outcomes_in_memory", "Waiting outcomes that cannot be stored.", lambda: poller.outbox.n_in_memory),
    )
    for name, meaning, value in gauges:
        core.metrics.register_gauge(name, meaning, value)


def running() -> Poller | None:
    """The poller of this process, if there is one."""
    return _running
