"""The orchestrator's routes and wire names: heartbeat, claim, outcome of a job, progress.

See docs/protocol.md#routes-of-the-orchestrator. Every call has a limit on its total time, follows no redirect (the key
would travel along), and returns a `Reply`, never an exception: an orchestrator that is down is an everyday event. Knows
nothing of the core.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import requests

from musetalk.errors import MuseTalkError
from worker.config import Settings
from worker.jobs import JobResult, Stage, result_body
from worker.net.connections import CutSwitch, SwitchedAdapter
from worker.records import printable
from worker.telemetry import logger

Status = Literal["idle", "busy"]

# A claim is a few hundred bytes; one with a monstrous id must still be read, so that its job can be reported.
_MAX_REPLY_BYTES = 2 * 2**20
# Long enough for every message of ours, short enough for a column of a database.
_MAX_ERROR_CHARACTERS = 2000
# Servers refuse request lines beyond 4,094 (Gunicorn) or 8,190 characters.
_MAX_SEGMENT_CHARACTERS = 3800

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


def error_text(error: BaseException) -> str:
    """The text of an error in a heartbeat."""
    return error.message if isinstance(error, MuseTalkError) else f"unexpected {type(error).__name__}"


def reportable_id(claimed: Mapping[str, Any]) -> str | None:
    """The id under which a claimed job is reported; None when no report would reach the job."""
    given = claimed.get("buffer_job_id")
    # Some databases number their jobs; the route takes the number as text.
    if isinstance(given, bool) or not isinstance(given, (int, str)):
        return None
    buffer_job_id = str(given)
    if not is_reportable(buffer_job_id):
        logger.error("no outcome can be reported for this id", extra={"buffer_job_id": printable(buffer_job_id[:100])})
        return None
    return buffer_job_id
