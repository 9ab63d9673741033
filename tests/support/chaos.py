"""An hour of trouble for a real worker: an orchestrator, a bucket, a media host, a disk and signals that misbehave.

`Ledger` is the orchestrator's side: it hands out jobs, takes outcomes, and gives a job out again after a retryable
failure or when its lease is over. `Chaos` does one thing to the world at a time, chosen by a seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.fake_b2 import FakeB2
from tests.support.fake_b2 import Fault as BucketFault
from tests.support.fake_orchestrator import Answer, Call, FakeOrchestrator
from tests.support.media_host import Answer as MediaAnswer
from tests.support.media_host import MediaHost
from tests.support.small_disk import write_until_full

# A job without an outcome is given out again after this time, as orchestrators do with a worker that was lost.
LEASE_S = 90.0


@dataclass
class LedgerJob:
    """One job: what it must become, and what was said about it."""

    id: str
    length_s: float
    must_succeed: bool
    n_claims: int = 0
    claimed_at: float = 0.0
    # One list of bodies for each claim.
    outcomes: list[list[str]] = field(default_factory=list)

    @property
    def final(self) -> dict[str, Any] | None:
        """The accepted outcome after which the job is not given out again."""
        last: list[str] = self.outcomes[-1] if self.outcomes else []
        body: dict[str, Any] | None = json.loads(last[0]) if last else None
        return None if body is None or (body["status"] == "failed" and body.get("retryable")) else body


class Ledger:
    """The orchestrator's memory; used as a fault of `FakeOrchestrator`, so that it sees every call."""

    def __init__(self, orchestrator: FakeOrchestrator, make_job: Callable[[int], tuple[dict[str, Any], float, bool]]):
        """`make_job(number)` returns the fields of a job, its video's length, and whether it must become one."""
        self.jobs: dict[str, LedgerJob] = {}
        self.mode = "up"
        self.is_closed = False
        self.n_calls: Counter[str] = Counter()
        self.problems: list[str] = []
        self._make_job = make_job
        self._fields: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        orchestrator.faults.append(self._answer)

    def _answer(self, call: Call) -> Answer | None:
        with self._lock:
            # The hour's calls are counted, not kept: the test's own memory is no part of the figures.
            self.n_calls[f"{call.kind} {self.mode}"] += 1
            if (fault := self._fault(call.kind)) is not None:
                return fault
            if call.kind == "claim":
                fields = self._next()
                # The answer is lost on its way: the job stays with a worker that never heard of it, for its lease.
                return Answer(None) if self.mode == "lossy" else Answer(body=json.dumps({"job": fields}).encode())
            if call.kind == "status":
                self._take(call)
                return Answer(None) if self.mode == "lossy" else Answer()
            return Answer()

    def _fault(self, kind: str) -> Answer | None:
        if self.mode == "cut":
            return Answer(None)
        if self.mode in {"500", "401"} or (self.mode == "limited" and kind == "claim"):
            return Answer({"500": 500, "401": 401, "limited": 429}[self.mode], headers=(("Retry-After", "2"),))
        return Answer(body=b"<html>not json</html>") if self.mode == "html" and kind == "claim" else None

    def _next(self) -> dict[str, Any] | None:
        now = time.monotonic()
        for job in self.jobs.values():
            is_over = not job.outcomes[-1] and now - job.claimed_at > LEASE_S
            if job.final is None and (job.outcomes[-1] or is_over):
                return self._give(job, now)
        if self.is_closed:
            return None
        number = len(self.jobs)
        fields, length_s, must_succeed = self._make_job(number)
        job = LedgerJob(fields["buffer_job_id"], length_s, must_succeed)
        self.jobs[job.id] = job
        self._fields[job.id] = fields
        return self._give(job, now)

    def _give(self, job: LedgerJob, now: float) -> dict[str, Any]:
        job.n_claims += 1
        job.claimed_at = now
        job.outcomes.append([])
        return self._fields[job.id]

    def _take(self, call: Call) -> None:
        if call.body["status"] not in {"succeeded", "failed"}:
            return
        job = self.jobs.get(call.id)
        if job is None:
            self.problems.append(f"an outcome of a job nobody gave out: {call.id}")
            return
        text = json.dumps(call.body, sort_keys=True)
        received = job.outcomes[-1]
        if any(text != other for other in received):
            self.problems.append(f"two outcomes of {job.id}: {received} {text}")
        received.append(text)

    @property
    def open_jobs(self) -> list[LedgerJob]:
        with self._lock:
            return [job for job in self.jobs.values() if job.final is None]


@dataclass
class Figures:
    """What a process and its disk hold: MiB, threads, descriptors, names in WORK_DIR."""

    rss_mib: float
    n_threads: int
    n_descriptors: int
    names: list[str]
    disk_mib: float


def figures_of(serving: psutil.Process, work: Path) -> Figures:
    """Take the figures of a serving process that runs no job."""
    return Figures(
        serving.memory_info().rss / 2**20,
        serving.num_threads(),
        serving.num_fds(),
        sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()),
        shutil.disk_usage(work).used / 2**20,
    )


class Chaos:
    """Trouble, one kind at a time; `happened` counts what was done."""

    def __init__(
        self,
        seed: int,
        *,
        ledger: Ledger,
        bucket: FakeB2,
        host: MediaHost,
        work: Path,
        serving: Callable[[], psutil.Process | None],
        parent: Callable[[], psutil.Process | None],
    ) -> None:
        self._rng = random.Random(seed)
        self._ledger, self._bucket, self._host, self._work = ledger, bucket, host, work
        self._serving, self._parent = serving, parent
        self.happened: Counter[str] = Counter()
        self._gentle: dict[str, Callable[[], object]] = {
            "orchestrator": self._orchestrator,
            "bucket": self._bucket_fault,
            "pause": self._pause,
            "disk": self._fill_disk,
            "media": self._cut_media,
        }
        self._rough: dict[str, Callable[[], object]] = {
            "kill the serving process": lambda: self._signal(self._serving(), signal.SIGKILL),
            "kill the parent": lambda: self._signal(self._parent(), signal.SIGKILL),
            "stop": lambda: self._signal(self._parent(), signal.SIGTERM),
            "stop twice": lambda: [self._signal(self._parent(), signal.SIGTERM) for _ in range(2)],
            "reload": lambda: self._signal(self._parent(), signal.SIGHUP),
        }

    def act(self, *, is_gentle: bool) -> None:
        """Do one thing and undo what can be undone; `is_gentle` ends no process."""
        actions = {**self._gentle, **({} if is_gentle else self._rough)}
        name = self._rng.choice(sorted(actions))
        self.happened[name] += 1
        actions[name]()

    def pause_s(self) -> float:
        return self._rng.choice((0.2, 1.0, 3.0, 6.0))

    def _orchestrator(self) -> None:
        self._ledger.mode = self._rng.choice(("cut", "500", "401", "limited", "html", "lossy"))
        self.happened[f"orchestrator {self._ledger.mode}"] += 1
        time.sleep(self._rng.choice((1.0, 4.0, 12.0)))
        self._ledger.mode = "up"

    def _bucket_fault(self) -> None:
        call = self._rng.choice(("upload", "upload", "b2_get_upload_url", "b2_authorize_account"))
        fault = self._rng.choice(
            (
                BucketFault(status=503),
                BucketFault(cut=True),
                BucketFault(lost=True),
                BucketFault(status=500, code="odd"),
            )
            if call == "upload"
            else (BucketFault(status=503), BucketFault(garbage=True), BucketFault(cut=True))
        )
        self._bucket.inject(call, fault, times=self._rng.choice((1, 2)))
        if self._rng.random() < 0.3:
            self._bucket.expire_upload_tokens()
        if self._rng.random() < 0.2:
            self._bucket.expire_account_tokens()

    def _pause(self) -> None:
        process = self._serving()
        self._signal(process, signal.SIGSTOP)
        time.sleep(self._rng.choice((0.5, 2.0, 5.0)))
        self._signal(process, signal.SIGCONT)

    def _fill_disk(self) -> None:
        # Uploads and results of the worker may end meanwhile, so the disk need not stay full.
        filler = write_until_full(self._work)
        time.sleep(self._rng.choice((0.5, 3.0, 8.0)))
        filler.unlink(missing_ok=True)

    def _cut_media(self) -> None:
        for path, answers in self._host.answers.items():
            whole = answers[-1]
            if whole.body and self._rng.random() < 0.5:
                spoiled = MediaAnswer(body=whole.body, cut_after=self._rng.randrange(len(whole.body)))
                self._host.serve(path, self._rng.choice((spoiled, MediaAnswer(503), MediaAnswer(429))), whole)

    @staticmethod
    def _signal(process: psutil.Process | None, number: signal.Signals) -> None:
        try:
            if process is not None:
                os.kill(process.pid, number)
        except ProcessLookupError:
            return
