"""The orchestrator's routes and wire names: heartbeat, claim, outcome of a job, progress.

See docs/protocol.md#routes-of-the-orchestrator. Every call has a limit on its total time, follows no redirect (the key
would travel along), and returns a `Reply`, never an exception: an orchestrator that is down is an everyday event. Knows
nothing of the core.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import requests

from musetalk.errors import MuseTalkError
from worker.config import Settings
from worker.jobs import JobResult, Stage, result_body
from worker.net.connections import CutSwitch, SwitchedAdapter
from worker.telemetry import logger

Status = Literal["idle", "busy"]

# A claim is a few hundred bytes; one with a monstrous id must still be read, so that its job can be reported.
_MAX_REPLY_BYTES = 2 * 2**20
# Long enough for every message of ours, short enough for a column of a database.
_MAX_ERROR_CHARACTERS = 2000
# Servers refuse request lines beyond 4,094 (Gunicorn) or 8,190 characters.
_MAX_SEGMENT_CHARACTERS = 3800
# The answer to a queue waits this long for the last progress to be accepted; the report continues behind it.
ANSWER_WAIT_S = 2.0
LAST_REPORT_LIMIT_S = 20.0

# Stage -> the orchestrator's phase, and the progress (0 to 1) at which it starts.
_PHASES: dict[Stage, tuple[str, float]] = {
    "download": ("downloading", 0.05),
    "validation": ("preparing", 0.06),
    "preprocessing": ("preparing", 0.08),
    "inference": ("inferring", 0.1),
    "postprocessing": ("encoding", 0.9),
    "upload": ("uploading", 0.95),
}
# From 0.1 to 0.9: inference takes most of a job's time, and only it reports in steps.
_INFERENCE_SHARE = 0.8


@dataclass(frozen=True)
class OrchestratorSettings:
    """Addresses of the orchestrator and identity of the caller; `repr` leaves the key out. Times in seconds."""

    base_url: str
    buffer_base_url: str
    api_key: str
    worker_id: str
    gpu_class: str
    capacity: int = 1
    config_label: str = "default"
    batch_size: int = 8
    # Together below the heartbeat's interval of 10 s, so that one slow call does not make a worker look dead.
    connect_timeout_s: float = 3.0
    read_timeout_s: float = 5.0
    total_timeout_s: float = 8.0
    proxy_url: str = ""
    ca_file: str = ""

    def __repr__(self) -> str:
        return f"OrchestratorSettings({self.base_url!r}, worker_id={self.worker_id!r})"


@dataclass(frozen=True)
class Reply:
    """Result of a call: status and decoded body, or the reason why there is none."""

    status: int | None
    body: Any = None
    problem: str | None = None
    retry_after_s: float | None = None

    @property
    def is_accepted(self) -> bool:
        """Whether the orchestrator accepted it (any 2xx)."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_unauthorised(self) -> bool:
        """Whether the key was refused."""
        return self.status in (401, 403)

    @property
    def is_final(self) -> bool:
        """Whether a retry is pointless: accepted, or the job is gone or cancelled."""
        # 404 and 410: the job is gone; 409: it has an outcome already.
        return self.is_accepted or self.status in (404, 409, 410)

    @property
    def is_refusal(self) -> bool:
        """Whether this body will never be accepted, in contrast to a key, a rate or a state that may change."""
        may_change = self.is_unauthorised or self.status in (408, 425, 429)
        return self.status is not None and 400 <= self.status < 500 and not may_change

    def describe(self) -> str:
        """The result in words, for the log or a heartbeat's `error`."""
        return self.problem or (f"HTTP {self.status}" if self.status is not None else "no reply")


def orchestrator_settings(settings: Settings) -> OrchestratorSettings:
    """Select the settings that the orchestrator's client needs."""
    return OrchestratorSettings(
        base_url=settings.orchestrator_url,
        buffer_base_url=settings.buffer_orchestrator_url or settings.orchestrator_url,
        api_key=settings.internal_api_key,
        worker_id=settings.worker_id,
        gpu_class=settings.gpu_class or "Unknown GPU",
        capacity=settings.buffer_capacity,
        config_label=settings.config_label,
        batch_size=settings.batch_size,
        proxy_url=settings.orchestrator_proxy,
        ca_file=str(settings.orchestrator_ca_file or ""),
    )


def is_reportable(buffer_job_id: str) -> bool:
    """Whether an outcome for this id would reach its own route: `.` and `..` leave it, and a path has limits."""
    try:
        quoted = quote(buffer_job_id, safe="")
    except UnicodeEncodeError:
        return False
    return quoted not in ("", ".", "..") and len(quoted) <= _MAX_SEGMENT_CHARACTERS


class Orchestrator:
    """Client of one thread; a connection serves one call at a time, so each calling thread owns an instance."""

    def __init__(self, settings: OrchestratorSettings) -> None:
        self.settings = settings
        self._open_session()

    def _open_session(self) -> None:
        self._switch = CutSwitch()
        self._session = requests.Session()
        # The environment's proxy would see our key, and a login from .netrc would be sent with each call.
        self._session.trust_env = False
        if self.settings.proxy_url:
            self._session.proxies = dict.fromkeys(("http", "https"), self.settings.proxy_url)
        self._session.verify = self.settings.ca_file or True
        self._session.headers.update({"X-Internal-API-Key": self.settings.api_key, "User-Agent": "musetalk-worker"})
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, SwitchedAdapter(self._switch))

    def heartbeat(self, status: Status, error: str | None) -> Reply:
        """Report that this worker is alive and whether it runs a job."""
        body = {
            "status": status,
            # Sent with every heartbeat: an orchestrator that lost its database learns the worker again.
            "gpu_class": self.settings.gpu_class,
            "capacity": self.settings.capacity,
            "error": error,
        }
        worker = quote(self.settings.worker_id, safe="")
        return self._post(f"{self.settings.buffer_base_url}/internal/buffer/workers/{worker}/heartbeat", body)

    def claim(self) -> Reply:
        """Ask for a job; `claimed_job` reads the reply."""
        return self._post(
            f"{self.settings.buffer_base_url}/internal/buffer/jobs/claim", {"worker_id": self.settings.worker_id}
        )

    def report(self, buffer_job_id: str, body: Mapping[str, object]) -> Reply:
        """Report the outcome of a claimed job; after a 422, again with only the four original fields."""
        url = f"{self.settings.buffer_base_url}/internal/buffer/jobs/{quote(buffer_job_id, safe='')}/status"
        reply = self._post(url, body)
        known = {name: body.get(name) for name in ("status", "error", "output_url", "metrics")}
        # An orchestrator with strict schemas refuses the fields that this worker added.
        if reply.status == 422 and known != dict(body):
            reply = self._post(url, known)
        return reply

    def progress(self, job_id: str, update: Mapping[str, object]) -> Reply:
        """Report the progress of a job; best effort."""
        body = {
            **update,
            "worker_id": self.settings.worker_id,
            "config_label": self.settings.config_label,
            "batch_size": self.settings.batch_size,
        }
        return self._post(f"{self.settings.base_url}/internal/jobs/{quote(job_id, safe='')}/progress", body)

    def cut(self) -> None:
        """End the call under way now; its caller gets a reply without a status."""
        self._switch.cut()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _post(self, url: str, body: Mapping[str, object]) -> Reply:
        """Make one call that ends within `total_timeout_s`, whatever the name service or the server do.

        The timeouts of requests apply to each step, so a reply that drips in would never end. The call runs in a thread
        that is waited for; after the limit its connection is cut.
        """
        replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        session, switch = self._session, self._switch
        call = threading.Thread(
            target=lambda: replies.put(self._call(session, url, body)), name="orchestrator-call", daemon=True
        )
        call.start()
        try:
            return replies.get(timeout=self.settings.total_timeout_s)
        except queue.Empty:
            switch.cut()
            self._open_session()
            return Reply(None, problem="the reply took too long")

    def _call(self, session: requests.Session, url: str, body: Mapping[str, object]) -> Reply:
        settings = self.settings
        try:
            with session.post(
                url,
                # requests would write NaN, which is not JSON.
                data=json.dumps(body, allow_nan=False).encode(),
                headers={"Content-Type": "application/json"},
                timeout=(settings.connect_timeout_s, settings.read_timeout_s),
                # requests keeps our key header on a redirect to another host.
                allow_redirects=False,
                stream=True,
            ) as response:
                received = bytearray()
                for block in response.iter_content(4096):
                    received += block
                    if len(received) > _MAX_REPLY_BYTES:
                        return Reply(response.status_code, problem="the reply is too large")
                return Reply(
                    response.status_code,
                    body=_decoded(bytes(received)),
                    retry_after_s=_seconds(response.headers.get("Retry-After")),
                )
        except requests.Timeout:
            return Reply(None, problem="the orchestrator did not answer in time")
        except (requests.RequestException, OSError) as error:
            return Reply(None, problem=f"the orchestrator cannot be reached ({type(error).__name__})")
        except Exception as error:  # noqa: BLE001 - the waiting caller must get a reply
            logger.error("orchestrator call failed", exc_info=error)
            return Reply(None, problem=f"the call failed ({type(error).__name__})")


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body) if body.strip() else None
    except (ValueError, RecursionError):
        return Unreadable()


class Unreadable:
    """Marker for a body that is not JSON."""


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text) if text else None
    except ValueError:
        return None
    # A date, a negative number or more than a day is no useful pause.
    return seconds if seconds is not None and 0 <= seconds < 86_400 else None


def claimed_job(reply: Reply) -> tuple[dict[str, Any] | None, str | None]:
    """Return the job in a claim's reply and the problem with the reply; (None, None) when there is no job."""
    if not reply.is_accepted or reply.problem is not None:
        return None, reply.describe()
    body = reply.body
    # 204 and an empty 200 are the usual ways to say that there is no job.
    if body is None:
        return None, None
    if not isinstance(body, dict) or "job" not in body:
        return None, "the reply to a claim has no job field"
    job, error = body["job"], body.get("error")
    if job is None:
        return None, f"the orchestrator reports: {str(error)[:200]}" if error else None
    if not isinstance(job, dict):
        return None, "the claimed job is not a JSON object"
    return job, None


def cancelled_jobs(reply: Reply) -> tuple[str, ...]:
    """Ids of cancelled jobs, from `"cancel": [ids]` in an accepted reply.

    An extension of this worker: an orchestrator that does not know it sends none.
    """
    if not reply.is_accepted or not isinstance(reply.body, dict):
        return ()
    wanted = reply.body.get("cancel")
    return tuple(name for name in wanted if isinstance(name, str)) if isinstance(wanted, list) else ()


def succeeded_report(result: JobResult) -> dict[str, object]:
    """The outcome of a job with a video."""
    body = result_body(result)
    return {"status": "succeeded", "error": None, "output_url": result.output_url, "metrics": body["metrics"]}


def failed_report(body: Mapping[str, object]) -> dict[str, object]:
    """The outcome of a job without a video, from the error body; the text repeats type and stage for older readers."""
    text = f"{body['error_type']} at {body['stage']}: {body['error_message']}"
    return {
        "status": "failed",
        "error": text[:_MAX_ERROR_CHARACTERS],
        "output_url": None,
        "metrics": None,
        "error_type": body["error_type"],
        "stage": body["stage"],
        "retryable": body["retryable"],
        "details": body.get("details") or {},
    }


def stage_update(stage: Stage, done: int, total: int) -> dict[str, object]:
    """Progress of a running job: phase, fraction from 0 to 1, and frames during inference."""
    phase, fraction = _PHASES[stage]
    update: dict[str, object] = {"status": "running", "phase": phase}
    if stage == "inference" and total > 0:
        fraction += _INFERENCE_SHARE * min(done, total) / total
        update["metrics"] = {"frames_done": done, "frames_total": total}
    update["progress"] = round(fraction, 4)
    return update


def completed_update(result: JobResult) -> dict[str, object]:
    """The last progress of a job with a video, with the place of the video."""
    body = result_body(result)
    metrics = body["metrics"]
    assert isinstance(metrics, dict)
    where = {"b2_bucket": result.bucket, "b2_file_name": result.object_name if result.bucket else None}
    return {
        "status": "succeeded",
        "phase": "completed",
        "progress": 1.0,
        "output_url": result.output_url,
        "metrics": {**metrics, **where},
    }


def failed_update(body: Mapping[str, object]) -> dict[str, object]:
    """The last progress of a failed attempt; if it is retryable, the job is not finished and stays `running`."""
    text = f"{body['error_type']} at {body['stage']}: {body['error_message']}"[:_MAX_ERROR_CHARACTERS]
    # The queue runs the job again, so a final `failed` here would contradict a later success.
    if body["retryable"]:
        return {"status": "running", "error": text}
    return {"status": "failed", "phase": "failed", "progress": 0.0, "error": text}


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


def error_text(error: BaseException) -> str:
    """The text of an error in a heartbeat."""
    return error.message if isinstance(error, MuseTalkError) else f"unexpected {type(error).__name__}"
