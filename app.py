"""The HTTP front door: health, jobs, finished files, metrics, the API's document; who may call; one error handler.

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
from musetalk.errors import MuseTalkError, RequestError, UnavailableError
from musetalk_core import Core, shared_core
from worker.config import bind_addresses, load_settings
from worker.jobs import Job, JobResult, error_body, parse_job, result_body
from worker.orchestrator import Orchestrator, ProgressSender, completed_update, failed_update, orchestrator_settings
from worker.telemetry import logger
from worker.web import openapi, playground


def create_app(core: Core | None = None, *, with_playground: bool = False) -> Flask:
    """The app around `core`; without one, around the process's own, which starts loading its models."""
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


# Probes of the platform come from outside and cannot carry a key; the page asks for it and holds nothing itself.
_OPEN_TO_ALL = {"health", "playground.page", "playground.asset", "playground.demo_file"}


def check_caller() -> None:
    """Callers on this machine pass; others need the key when there is one. Pages of other sites are refused.

    A request that a proxy on this machine passed on is not from this machine. A browser adds Origin to what a page
    sends, and a page of any site can send a POST to localhost.
    """
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise Forbidden
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
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def health() -> tuple[Response, int]:
    """200 while the worker can do its work or is doing it, 503 with the reason otherwise; never waits for a job."""
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
        # Said before half a gigabyte has come in.
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
    """Run a job and tell the orchestrator how far it is, and how it ended before our caller hears of it.

    The caller is Salad's binary, which throws the body of a 5xx away: what a failure meant goes out this way too. A
    refusal because of another job is not this job's end and is not told.
    """
    with closing(Orchestrator(orchestrator_settings(core.settings))) as orchestrator:
        sender = ProgressSender(orchestrator, job.job_id, on_cancel=core.cancel)
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
    """The body as JSON, whatever the content type says; raises RequestError for anything that is not JSON."""
    data = request.get_data(cache=False)
    # A body without a length is cut at the limit without a word.
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
    """Stop the running job that has this id; 202 when it does run here, 404 otherwise."""
    if not _core().cancel(job_id):
        raise NotFound
    return jsonify({"status": "cancelling", "musetalk_job_id": job_id}), 202


def progress(job_id: str) -> Response:
    """How far the running job is that has this id; 404 when none runs here."""
    found = _core().progress_of(job_id)
    if found is None:
        raise NotFound
    return jsonify({"musetalk_job_id": job_id, "stage": found.stage, "done": found.done, "total": found.total})


def metrics() -> Response:
    """The metrics in Prometheus' text format."""
    return Response(_core().metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")


def openapi_document() -> Response:
    """What this server speaks."""
    return jsonify(openapi.document(__version__))


def output(name: str) -> Response:
    """A finished file of the local folder."""
    return send_from_directory(_core().settings.output_dir, name, max_age=0)


def answer_error(error: Exception) -> tuple[Response, int]:
    """Every error as the JSON body of the protocol; HTTP errors of Flask keep their status."""
    if isinstance(error, HTTPException) and error.code is not None:
        kind = "media_error" if error.code < 500 else "processing_error"
        body: dict[str, object] = {
            "status": "failed",
            "error_type": kind,
            "error_message": _words_of(error),
            "error": error.name,
            "stage": "validation",
            "details": {"status_code": error.code},
            "retryable": False,
            "stage_times": {},
        }
        response = jsonify(body)
        for header, value in error.get_headers():
            if header.lower() == "allow":
                response.headers["Allow"] = value
        return response, error.code
    if isinstance(error, RequestError):
        error.stage = error.stage or "validation"
    if not isinstance(error, MuseTalkError):
        logger.error("unexpected error in a request", exc_info=error)
    status, failed = error_body(error, job_id=request.environ.get("musetalk.job_id"))
    response = jsonify(failed)
    if status == 503:
        response.headers["Retry-After"] = "5"
    return response, status


def _words_of(error: HTTPException) -> str:
    """Our own sentence where we gave one, else the status in words: the library's sentences are for other readers."""
    if isinstance(error, RequestEntityTooLarge) and error.description != RequestEntityTooLarge.description:
        return str(error.description)
    return str(error.name)


def main() -> int:
    """Serve on WORKER_PORT with Flask's own server, for quick local tests; returns the exit status."""
    try:
        settings = load_settings()
    except MuseTalkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if settings.is_buffer_mode:
        print("buffer mode: this local server claims no job, ./run_worker.sh does", file=sys.stderr)
    app = create_app(with_playground=True)
    host = "0.0.0.0" if bind_addresses(settings.host, 0)[0].startswith("0.0.0.0") else settings.host  # noqa: S104
    print(f"http://localhost:{settings.port}/ is a page to try it on, /hc says when it is ready", file=sys.stderr)
    app.run(host=host, port=settings.port, threaded=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
