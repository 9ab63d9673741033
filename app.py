"""The HTTP front door: health, jobs, finished files, metrics, the API document; access control; one error handler.

Gunicorn calls `create_app()`; `python app.py` runs the same app for a quick local test. Knows no torch, no storage, no
media.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
import sys
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Response, current_app, jsonify, request, send_from_directory
from werkzeug.exceptions import Forbidden, HTTPException, NotFound, RequestEntityTooLarge, Unauthorized

from musetalk import __version__
from musetalk.errors import MuseTalkError, ProcessingError, RequestError, UnavailableError
from musetalk_core import Core, shared_core
from worker.config import bind_addresses, load_settings
from worker.jobs import Job, JobResult, error_body, parse_job, result_body
from worker.orchestrator import Orchestrator, ProgressSender, completed_update, failed_update, orchestrator_settings
from worker.telemetry import logger
from worker.web import openapi, playground


def create_app(core: Core | None = None, *, with_playground: bool = False) -> Flask:
    """Build the app around `core`; without one, around the process's own core, which starts loading its models."""
    core = core or shared_core()
    app = Flask("musetalk-worker", static_folder=None)
    app.request_class = playground.UploadRequest
    app.config["MAX_CONTENT_LENGTH"] = core.settings.max_body_bytes
    app.extensions["core"] = core
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.add_url_rule("/hc", view_func=health, methods=["GET"])
    app.add_url_rule("/generate", view_func=generate, methods=["POST"])
    app.add_url_rule("/generate/<path:job_id>", view_func=cancel, methods=["DELETE"])
    app.add_url_rule("/generate/<path:job_id>", view_func=progress, methods=["GET"])
    app.add_url_rule("/outputs/<name>", view_func=output, methods=["GET"])
    app.add_url_rule("/metrics", view_func=metrics, methods=["GET"])
    app.add_url_rule("/openapi.json", view_func=openapi_document, methods=["GET"])
    if with_playground or core.settings.playground:
        playground.register(app)
    app.before_request(check_caller)
    app.register_error_handler(Exception, answer_error)
    return app


def _core() -> Core:
    core = current_app.extensions["core"]
    assert isinstance(core, Core)
    return core


# The platform's probes come from outside and cannot send a key; the page asks for it and contains nothing secret.
_OPEN_TO_ALL = {"health", "playground.page", "playground.asset", "playground.demo_file"}


def check_caller() -> None:
    """Let callers on this machine pass and ask others for the key, if one is set; refuse pages of other sites.

    A request that a proxy on this machine forwards is not local. A browser adds Origin to the requests of a page, and
    a page of any site can send a POST to localhost.
    """
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise Forbidden
    # After the check of Origin: a page of another site runs on this machine and would count as local.
    key = _core().settings.internal_api_key
    if request.endpoint in _OPEN_TO_ALL or not key or _is_local():
        return
    given = request.headers.get("X-Internal-API-Key", "")
    if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode()):
        raise Unauthorized


def _is_local() -> bool:
    if any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "X-Real-IP")):
        return False
    try:
        address = ipaddress.ip_address((request.remote_addr or "").split("%", 1)[0])
    except ValueError:
        return False
    # A socket for both families reports an IPv4 caller as ::ffff:127.0.0.1.
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def health() -> tuple[Response, int]:
    """Answer 200 while the worker is ready or busy, 503 with the reason otherwise; never waits for a job."""
    readiness = _core().readiness
    body: dict[str, Any] = {"status": "ok" if readiness.is_healthy else readiness.state, "model": readiness.model}
    if readiness.is_healthy:
        body["busy"] = readiness.state == "busy"
    else:
        body["reason"] = readiness.reason
    return jsonify(body), 200 if readiness.is_healthy else 503


def generate() -> tuple[Response, int]:
    """Run one job and answer with its result; 422 for bad input, 503 at once when the worker cannot take it."""
    core = _core()
    if playground.is_upload(request):
        # Refused before half a gigabyte is received.
        core.check_free()
        job = playground.uploaded_job(request)
        request.environ["musetalk.job_id"] = job.job_id
    else:
        body = _json_body()
        job_id = body.get("musetalk_job_id") if isinstance(body, dict) else None
        request.environ["musetalk.job_id"] = job_id if isinstance(job_id, str) else None
        job = parse_job(body, queue_job_id=request.headers.get("Salad-Job-Id"))
    if not core.settings.orchestrator_url or not core.settings.internal_api_key:
        return jsonify(result_body(core.run_job(job))), 200
    return jsonify(result_body(_run_with_progress(core, job))), 200


def _run_with_progress(core: Core, job: Job) -> JobResult:
    """Run a job and report its progress to the orchestrator, and its outcome before the caller gets the answer.

    The caller is Salad's binary, which discards the body of a 5xx, so the reason of a failure is reported here as well.
    A refusal because of another job is not this job's outcome and is not reported.
    """
    with closing(Orchestrator(orchestrator_settings(core.settings))) as orchestrator:
        sender = ProgressSender(
            orchestrator, job.job_id, on_cancel=core.cancel, on_error=core.supervisor.restart_pause_s
        )
        try:
            result = core.run_job(job, on_progress=sender)
        except UnavailableError:
            sender.close()
            raise
        except Exception as error:
            sender.finish(failed_update(error_body(error, job_id=job.job_id)[1]))
            raise
        sender.finish(completed_update(result))
        return result


def _json_body() -> object:
    """Read the body as JSON, whatever its content type; raises RequestError for anything that is not JSON."""
    data = request.get_data(cache=False)
    # Werkzeug cuts a body without a length at the limit silently.
    if request.content_length is None and len(data) >= _core().settings.max_body_bytes:
        raise RequestEntityTooLarge
    try:
        return json.loads(data, parse_constant=_refuse_constant, parse_float=_finite_float)
    except (ValueError, RecursionError):
        raise RequestError("the body must be JSON", field="body") from None


def _refuse_constant(_name: str) -> object:
    raise ValueError("NaN and Infinity are not JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("the number is too large")
    return number


def cancel(job_id: str) -> tuple[Response, int]:
    """Cancel the running job that has this id; 202 when it runs here, 404 otherwise."""
    if not _core().cancel(job_id):
        raise NotFound
    return jsonify({"status": "cancelling", "musetalk_job_id": job_id}), 202


def progress(job_id: str) -> Response:
    """Answer with the progress of the running job that has this id; 404 when it does not run here."""
    found = _core().progress_of(job_id)
    if found is None:
        raise NotFound
    return jsonify({"musetalk_job_id": job_id, "stage": found.stage, "done": found.done, "total": found.total})


def metrics() -> Response:
    """Answer with the metrics in Prometheus' text format."""
    return Response(_core().metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")


def openapi_document() -> Response:
    """Answer with the OpenAPI document of this server."""
    return jsonify(openapi.document(__version__))


def output(name: str) -> Response:
    """Send a finished file of the local folder."""
    return send_from_directory(_core().settings.output_dir, name, max_age=0)


def answer_error(error: Exception) -> tuple[Response, int, dict[str, str]]:
    """Answer every error with the JSON body of the protocol; HTTP errors of Flask keep their status and `Allow`."""
    headers: dict[str, str] = {}
    status = None
    if isinstance(error, HTTPException) and error.code is not None:
        status = error.code
        headers = {name: value for name, value in error.get_headers() if name.lower() == "allow"}
        error = _as_our_error(error, status)
    if isinstance(error, RequestError):
        error.stage = error.stage or "validation"
    if not isinstance(error, MuseTalkError):
        logger.error("unexpected error in a request", exc_info=error)
    own_status, body = error_body(error, job_id=request.environ.get("musetalk.job_id"))
    status = status or own_status
    if status == 503:
        headers["Retry-After"] = "5"
    return jsonify(body), status, headers


def _as_our_error(error: HTTPException, status: int) -> MuseTalkError:
    """An HTTP error of Flask as one of ours, with our own sentence if we gave one, else with the status in words."""
    text = str(error.name)
    if isinstance(error, RequestEntityTooLarge) and error.description != RequestEntityTooLarge.description:
        text = str(error.description)
    kind = RequestError if status < 500 else ProcessingError
    ours = kind(text, retryable=False, status_code=status)
    ours.stage = "validation"
    return ours


def main() -> int:
    """Serve on WORKER_PORT with Flask's own server, for quick local tests; returns the exit status."""
    try:
        settings = load_settings()
    except MuseTalkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if settings.is_buffer_mode:
        print("buffer mode: python app.py claims no jobs; start ./run_worker.sh for that", file=sys.stderr)
    app = create_app(with_playground=True)
    host = "0.0.0.0" if bind_addresses(settings.host, 0)[0].startswith("0.0.0.0") else settings.host  # noqa: S104
    print(f"open http://localhost:{settings.port}/ to try it; /hc reports when it is ready", file=sys.stderr)
    app.run(host=host, port=settings.port, threaded=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
