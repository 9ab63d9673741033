"""Buffer mode: claim jobs, run them, report their outcomes (docs/protocol.md#buffer-mode); a thread for heartbeats.

Gunicorn's post_fork hook calls `start`. Knows the core and the orchestrator; no Flask, no torch, no storage.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musetalk.errors import RequestError, UnavailableError
from musetalk.files import replacing
from musetalk_core import Core
from worker.jobs import Job, JobResult, error_body, parse_job
from worker.orchestrator import (
    Orchestrator,
    OrchestratorSettings,
    ProgressSender,
    Reply,
    cancelled_jobs,
    claimed_job,
    error_text,
    failed_report,
    orchestrator_settings,
    succeeded_report,
)
from worker.telemetry import job_logging, logger

HEARTBEAT_S = 10.0
MAX_BACKOFF_S = 60.0
# An outcome that the orchestrator has not accepted after this time is dropped.
REPORT_LIFETIME_S = 24 * 3600.0
# Outcomes that are remembered, for jobs that the orchestrator hands out again.
REMEMBERED_OUTCOMES = 200


class Backoff:
    """Pauses after failures: 1, 2, 4 .. 60 s, with jitter so that a fleet does not retry in step."""

    def __init__(self, longest_s: float = MAX_BACKOFF_S) -> None:
        self._longest_s = longest_s
        self._failures = 0

    def reset(self) -> None:
        """Start again at one second, after a success."""
        self._failures = 0

    def next_s(self, retry_after_s: float | None = None) -> float:
        """Return the pause after another failure, in seconds; a longer Retry-After of the server counts."""
        pause = min(self._longest_s, 2.0 ** min(self._failures, 10))
        self._failures += 1
        pause *= random.uniform(0.75, 1.0)  # noqa: S311 - spreads load, hides nothing
        return min(self._longest_s, max(pause, retry_after_s or 0.0))


@dataclass(frozen=True)
class Report:
    """The outcome of a job on its way to the orchestrator."""

    buffer_job_id: str
    body: Mapping[str, object]
    created: float  # seconds since the epoch, because the report outlives the process


class Outbox:
    """Reports that were not accepted yet, one small file each, so that a restart loses none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, report: Report) -> Path:
        """Store a report; a later one about the same job replaces it. Raises OSError when the disk is full."""
        path = self._folder / f"{hashlib.sha256(report.buffer_job_id.encode()).hexdigest()[:32]}.json"
        text = json.dumps({"id": report.buffer_job_id, "body": dict(report.body), "created": report.created})
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
        return path

    def reports(self) -> list[tuple[Path, Report]]:
        """Read all stored reports, oldest first; unreadable files are removed and logged."""
        found: list[tuple[Path, Report]] = []
        for path in self._folder.glob("*.json"):
            try:
                plain = json.loads(path.read_text(encoding="utf-8"))
                found.append((path, Report(str(plain["id"]), dict(plain["body"]), float(plain["created"]))))
            except (OSError, ValueError, KeyError, TypeError):
                logger.error("stored report unreadable; dropped", extra={"file": path.name})
                path.unlink(missing_ok=True)
        return sorted(found, key=lambda pair: pair[1].created)


class Heartbeat(threading.Thread):
    """Report every ten seconds that the worker is alive, whatever the job does; takes no lock that a job holds."""

    def __init__(self, orchestrator: Orchestrator, core: Core, interval_s: float = HEARTBEAT_S) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._orchestrator, self._core, self._interval_s = orchestrator, core, interval_s
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._error: str | None = None
        self._was_accepted: bool | None = None
        self.last_accepted: float | None = None

    @property
    def is_accepted(self) -> bool:
        """Whether the last heartbeat was accepted; before that no job is claimed."""
        return bool(self._was_accepted)

    @property
    def age_s(self) -> float:
        """Seconds since a heartbeat was last accepted; infinite before the first."""
        return math.inf if self.last_accepted is None else time.monotonic() - self.last_accepted

    def send_now(self, error: str | None = None) -> None:
        """Send a heartbeat without waiting for its turn: a job began or ended, or an error occurred."""
        if error is not None:
            self._error = error
        self._wake.set()

    def stop(self) -> None:
        """Send a last heartbeat and end the thread."""
        self._stopping.set()
        self._wake.set()

    def run(self) -> None:
        """Send heartbeats until stopped."""
        next_s = time.monotonic()
        while True:
            stopping = self._stopping.is_set()
            self.beat()
            if stopping:
                self._orchestrator.close()
                return
            # Counted from the last start, so that a slow call does not lengthen the gap.
            next_s = max(next_s + self._interval_s, time.monotonic())
            if self._wake.wait(max(0.0, next_s - time.monotonic())):
                next_s = time.monotonic()
            self._wake.clear()

    def beat(self) -> Reply:
        """Send one heartbeat with the state of this moment."""
        readiness = self._core.readiness
        error = self._error
        if not readiness.is_healthy and readiness.reason:
            error = readiness.reason
        reply = self._orchestrator.heartbeat("busy" if self._core.is_busy else "idle", error)
        for name in cancelled_jobs(reply):
            self._core.cancel(name)
        if reply.is_accepted:
            self.last_accepted = time.monotonic()
            if self._error == error:
                self._error = None
        if reply.is_accepted != self._was_accepted:
            level = 20 if reply.is_accepted else 40
            logger.log(level, "heartbeat accepted" if reply.is_accepted else "heartbeat rejected",
                       extra={} if reply.is_accepted else {"reason": reply.describe()})  # fmt: skip
        self._was_accepted = reply.is_accepted
        return reply


class Poller:
    """The claim loop; `step` runs one round and returns the pause before the next."""

    def __init__(
        self,
        core: Core,
        settings: OrchestratorSettings,
        folder: Path,
        *,
        poll_interval_s: float,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self.core = core
        self._settings = settings
        self._orchestrator = Orchestrator(settings)
        self.heartbeat = Heartbeat(Orchestrator(settings), core, heartbeat_s)
        self.outbox = Outbox(folder / "outbox")
        self._current_path = folder / "claimed.json"
        self._poll_interval_s = poll_interval_s
        self._claim_backoff, self._report_backoff = Backoff(), Backoff()
        self._next_report = 0.0
        self._outcomes: OrderedDict[str, Mapping[str, object]] = OrderedDict()
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._problem: str | None = None

    def run(self) -> None:
        """Claim and run jobs until `stop`; an error in one round does not end the loop."""
        # In a shared folder, another worker's running job looks like the leftover of a killed process.
        while not self.core.work_dir.is_ours:
            if self._stopping.wait(0.2):
                self.heartbeat.stop()
                self._orchestrator.close()
                return
        self.report_orphan()
        while not self._stopping.is_set():
            try:
                pause = self.step()
            except Exception as error:  # noqa: BLE001 - one round may fail, the loop must continue
                logger.error("claim round failed", exc_info=error)
                self.heartbeat.send_now(error_text(error))
                pause = self._claim_backoff.next_s()
            self._wake.wait(pause)
            self._wake.clear()
        self._deliver(force=True)
        self.heartbeat.stop()
        self._orchestrator.close()

    def start(self) -> None:
        """Run the loop in a daemon thread."""
        self.heartbeat.start()
        self._thread = threading.Thread(target=self.run, name="poller", daemon=True)
        self._thread.start()

    def join(self, limit_s: float) -> bool:
        """Wait up to `limit_s` seconds for the loop to end; return whether it has."""
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether both threads run; a worker whose loop has ended must not look healthy."""
        return self._thread.is_alive() and self.heartbeat.is_alive()

    def stop(self) -> None:
        """Claim no further job; the running one continues."""
        self._stopping.set()
        self._wake.set()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def step(self) -> float:
        """Send stored reports, then claim and run a job if the worker is free; return the pause in seconds."""
        self._deliver()
        # The orchestrator gives a silent worker's job to another one, so a worker it does not know must not claim.
        if not self.heartbeat.is_accepted or self.core.readiness.state != "ready":
            return 0.5
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
        self._handle(claimed)
        return 0.0

    def _log_claim_problem(self, problem: str | None) -> None:
        """Log when claims begin to fail or work again, not every attempt."""
        if problem != self._problem:
            if problem is None:
                logger.info("claims work again")
            else:
                logger.warning("claim failed", extra={"reason": problem})
        self._problem = problem

    def _handle(self, claimed: dict[str, Any]) -> None:
        buffer_job_id = claimed.get("buffer_job_id")
        # Some databases number their jobs; the route takes the number as text.
        if isinstance(buffer_job_id, (int, str)) and not isinstance(buffer_job_id, bool) and str(buffer_job_id):
            buffer_job_id = str(buffer_job_id)
        else:
            logger.error("claimed job has no buffer_job_id; it can neither run nor be reported")
            self.heartbeat.send_now("a claimed job has no buffer_job_id")
            self._stopping.wait(self._claim_backoff.next_s())
            return
        known = self._outcomes.get(buffer_job_id)
        # A failed job may succeed now, so only a success is repeated.
        if known is not None and known["status"] == "succeeded":
            logger.info("job repeated; known outcome reported", extra={"buffer_job_id": buffer_job_id})
            self._finish(buffer_job_id, known)
            return
        try:
            job = parse_job(claimed, buffer_job_id=buffer_job_id)
        except RequestError as error:
            error.stage = "validation"
            self._finish(buffer_job_id, failed_report(error_body(error)[1]))
            return
        self._run(job, buffer_job_id)

    def _run(self, job: Job, buffer_job_id: str) -> None:
        self._current_path.write_text(json.dumps({"id": buffer_job_id}), encoding="utf-8")
        progress = None
        if self._settings.base_url:
            progress = ProgressSender(Orchestrator(self._settings), job.job_id, on_cancel=self.core.cancel)
        try:
            with job_logging(job.job_id):
                result = self._run_when_free(job, self._progress_callback(progress))
            report = succeeded_report(result)
        except Exception as error:  # noqa: BLE001 - every outcome is reported
            report = failed_report(error_body(error, job_id=job.job_id)[1])
            self.heartbeat.send_now(error_text(error))
        finally:
            if progress is not None:
                progress.close()
        self._finish(buffer_job_id, report)
        self._current_path.unlink(missing_ok=True)
        self.heartbeat.send_now()

    def _run_when_free(self, job: Job, on_progress: Callable[[Any, int, int], None]) -> JobResult:
        """Run the job; if a posted job has taken the slot since the claim, wait until it is finished."""
        while True:
            try:
                return self.core.run_job(job, on_progress=on_progress)
            except UnavailableError as error:
                # The job is claimed already: waiting for the slot is cheaper than failing it.
                if error.details.get("state") != "busy" or self._stopping.wait(0.5):
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
        """Store the outcome on disk, remember it, and try to send it now."""
        self.outbox.put(Report(buffer_job_id, body, time.time()))
        self._outcomes[buffer_job_id] = body
        while len(self._outcomes) > REMEMBERED_OUTCOMES:
            self._outcomes.popitem(last=False)
        self._deliver(force=True)

    def _deliver(self, *, force: bool = False) -> None:
        """Send stored reports, oldest first; after a failure, wait before the next attempt."""
        if not force and time.monotonic() < self._next_report:
            return
        for path, report in self.outbox.reports():
            reply = self._orchestrator.report(report.buffer_job_id, report.body)
            # A refusal will not change, except where the key, the rate or the server's state may.
            is_refused = reply.status is not None and 400 <= reply.status < 500
            may_change = reply.is_unauthorised or reply.status in (408, 425, 429)
            too_old = time.time() - report.created > REPORT_LIFETIME_S
            if reply.is_final or (is_refused and not may_change) or too_old:
                if not reply.is_accepted:
                    logger.error(
                        "outcome rejected by the orchestrator; dropped",
                        extra={"buffer_job_id": report.buffer_job_id, "reason": reply.describe()},
                    )
                path.unlink(missing_ok=True)
                self._report_backoff.reset()
                continue
            self.heartbeat.send_now(f"the outcome of a job cannot be reported: {reply.describe()}")
            self._next_report = time.monotonic() + self._report_backoff.next_s(reply.retry_after_s)
            return

    def report_orphan(self) -> None:
        """Report the job of a killed process as failed and retryable."""
        try:
            buffer_job_id = json.loads(self._current_path.read_text(encoding="utf-8"))["id"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            self._current_path.unlink(missing_ok=True)
            return
        body = {
            "error_type": "processing_error",
            "stage": "unknown",
            "error_message": "the worker process was killed while it ran this job",
            "retryable": True,
        }
        is_reported = any(report.buffer_job_id == buffer_job_id for _, report in self.outbox.reports())
        if not is_reported:
            self.outbox.put(Report(str(buffer_job_id), failed_report(body), time.time()))
        self._current_path.unlink(missing_ok=True)


_running: Poller | None = None


def start(core: Core) -> Poller:
    """Start the claim loop in a daemon thread of this process."""
    global _running  # noqa: PLW0603 - Gunicorn's hooks share only the module
    settings = core.settings
    poller = Poller(
        core, orchestrator_settings(settings), settings.work_dir, poll_interval_s=settings.buffer_poll_interval_s
    )
    poller.start()
    core.metrics.register_gauge(
        "musetalk_heartbeat_age_seconds",
        "Time since the orchestrator last accepted a heartbeat.",
        lambda: poller.heartbeat.age_s,
    )
    core.status.add_check(lambda: None if poller.is_alive or poller.is_stopping else "the claim loop has ended")
    _running = poller
    return poller


def running() -> Poller | None:
    """The poller of this process, if there is one."""
    return _running
