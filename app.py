"""The HTTP front door: health, jobs, finished files, metrics, the API document; access control; one error handler.

Gunicorn calls `create_app()`; `python app.py` runs the same app for a quick local test. Knows no torch, no storage, no
media.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Mapping
from typing import Any

from flask import Flask, Response, current_app, jsonify, request, send_from_directory
from werkzeug.exceptions import (
    ClientDisconnected,
    Forbidden,
    HTTPException,
    LengthRequired,
    RequestEntityTooLarge,
    Unauthorized,
)
from werkzeug.serving import WSGIRequestHandler

from musetalk.errors import (
    MethodNotAllowedError,
    MuseTalkError,
    NotFoundError,
    ProcessingError,
    RequestError,
    ShutdownError,
    UnauthorizedError,
    UnavailableError,
)
from musetalk_core import Core, shared_core
from worker.config import bind_addresses, exposure_problem, load_settings, port_problem
from worker.jobs import DEMO_NOTICE, MAX_ID_LENGTH, Job, JobResult, error_body, parse_job, result_body
from worker.orchestrator import Orchestrator, completed_update, failed_update, orchestrator_settings
from worker.progress_sender import ProgressSender
from worker.telemetry import logger
from worker.web import page_routes, playground, previews, reference
from worker.web.bodies import decode_json, job_id_in, read_body, read_start
from worker.web.callers import TRUSTED, check
from worker.web.holding import CallerGoneError, Deliveries, wait_while

# Requests that may wait for the models at once; each holds a thread.
MAX_WAITING = 6
# Reports about refused requests that may be on their way at once.
MAX_REFUSAL_REPORTS = 4


def create_app(core: Core | None = None, *, with_playground: bool = False) -> Flask:
    """Build the app around `core`; without one, around the process's own core, which starts loading its models."""
    core = core or shared_core()
    app = Flask("musetalk-worker", static_folder=None)
    app.request_class = playground.UploadRequest
    app.config["MAX_CONTENT_LENGTH"] = core.settings.max_body_bytes
    app.extensions["core"] = core
    app.extensions["deliveries"] = Deliveries()
    app.extensions["waiting"] = threading.BoundedSemaphore(MAX_WAITING)
    app.extensions["refusal_reports"] = threading.BoundedSemaphore(MAX_REFUSAL_REPORTS)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.add_url_rule("/hc", view_func=health, methods=["GET"])
    app.add_url_rule("/generate", view_func=generate, methods=["POST"])
    app.add_url_rule("/preview", view_func=preview, methods=["POST"])
    app.add_url_rule("/generate/<path:job_id>", view_func=cancel, methods=["DELETE"])
    app.add_url_rule("/generate/<path:job_id>", view_func=progress, methods=["GET"])
    app.add_url_rule("/outputs/<name>", view_func=output, methods=["GET"])
    app.add_url_rule("/metrics", view_func=metrics, methods=["GET"])
    app.register_blueprint(reference.blueprint)
    if with_playground or core.settings.playground:
        playground.register(app)
        page_routes.register(app)
    app.before_request(check_caller)
    app.after_request(note_delivery)
    app.register_error_handler(Exception, answer_error)
    return app


def _core() -> Core:
    core = current_app.extensions["core"]
    assert isinstance(core, Core)
    return core


# The platform's probes come from outside and cannot send a key; the pages ask for it and contain nothing secret.
_OPEN_TO_ALL = {
    *("health", "playground.page", "playground.asset", "playground.demo_file"),
    *("reference.page", "reference.asset"),
}


def check_caller() -> None:
    """Let callers on this machine pass and ask others for the key, if one is set; refuse pages of other sites."""
    check(request, _core().settings, is_open=request.endpoint in _OPEN_TO_ALL)
    if request.endpoint == "generate":
        request.environ["musetalk.is_delivered"] = True
        _deliveries().begin()


def _deliveries() -> Deliveries:
    deliveries = current_app.extensions["deliveries"]
    assert isinstance(deliveries, Deliveries)
    return deliveries


def note_delivery(response: Response) -> Response:
    """Count the answer of a job as delivered once its last byte was sent."""
    if request.environ.pop("musetalk.is_delivered", False):
        response.call_on_close(_deliveries().end)
    return response


def health() -> tuple[Response, int]:
    """Answer 200 while the worker is ready or busy, 503 with the reason otherwise; never waits for a job."""
    readiness = _core().readiness
    body: dict[str, Any] = {"status": "ok" if readiness.is_healthy else readiness.state, "model": readiness.model}
    if readiness.model == "demo":
        body["notice"] = DEMO_NOTICE
    deliveries = _deliveries()
    if readiness.is_healthy:
        body["busy"] = readiness.state == "busy"
    else:
        body["reason"] = readiness.reason
        # run_worker.sh stops Salad's binary when both are gone.
        if readiness.state == "draining" and deliveries.is_busy:
            body["busy"] = True
    if deliveries.is_delivering:
        body["delivering"] = True
    return jsonify(body), 200 if readiness.is_healthy else 503


def generate() -> tuple[Response, int]:
    """Run one job and answer with its result; 422 for bad input, 503 at once when the worker cannot take it.

    While the models load, the request waits. While the process stops, it gets no answer.
    """
    core = _core()
    if core.status.is_draining:
        _hold()
    job = _received_job(core)
    _wait_for_models(core)
    try:
        if not core.settings.orchestrator_url or not core.settings.internal_api_key:
            return jsonify(result_body(core.run_job(job))), 200
        return jsonify(result_body(_run_with_progress(core, job))), 200
    except UnavailableError:
        if core.status.is_draining:
            _hold()
        raise
    except ShutdownError:
        # A refusal would make Salad's queue send the job here again at once, and cost another attempt.
        if job.queue_job_id:
            _hold()
        raise


def _received_job(core: Core) -> Job:
    """Read the job in the request; a refused one is reported to the orchestrator if its id can be read."""
    try:
        if playground.is_upload(request):
            # Refused before half a gigabyte is received.
            core.check_free()
            with playground.receiving(request):
                return playground.uploaded_job(request)
        return parse_job(_noted_body(), queue_job_id=request.headers.get("Salad-Job-Id"))
    except (RequestError, RequestEntityTooLarge) as error:
        _report_refusal(core, _as_our_error(error, 413) if isinstance(error, HTTPException) else error)
        raise


def preview() -> Response:
    """Answer with one picture of the video that a job would make; refused like a job, but never held or reported."""
    core = _core()
    if core.readiness.state != "starting":
        # Before the files of a form are received.
        core.check_free()
    if playground.is_upload(request):
        with playground.receiving(request):
            job = playground.uploaded_job(request)
            time_s = previews.parse_time_text(request.form.get("time_s"))
    else:
        job, time_s = previews.parse_preview(_noted_body())
    _wait_for_models(core)
    suffix = previews.wanted_suffix(request)
    return previews.picture_answer(*core.preview_job(job, time_s, suffix), suffix)


def _hold() -> None:
    """Keep the request without an answer until the caller or this process ends.

    Raises UnavailableError when the caller is gone, for an answer that nobody reads.
    """
    with _deliveries().held():
        try:
            wait_while(lambda: True, request.environ, float("inf"))
        except CallerGoneError:
            raise UnavailableError("the worker is shutting down", state="draining") from None


def _wait_for_models(core: Core) -> None:
    """Wait while the models load; the caller finds out what else keeps the worker from running a job.

    Raises UnavailableError when the caller has gone away or too many requests wait.
    """
    if core.readiness.state != "starting" or not core.settings.start_wait_s:
        return
    places = current_app.extensions["waiting"]
    if not places.acquire(blocking=False):
        raise UnavailableError("the models are loading, and other requests wait for them", state="starting")
    try:
        wait_while(lambda: core.readiness.state == "starting", request.environ, core.settings.start_wait_s)
    except CallerGoneError:
        raise UnavailableError("the caller went away while the models were loading", state="starting") from None
    finally:
        places.release()


def _run_with_progress(core: Core, job: Job) -> JobResult:
    """Run a job and report its progress to the orchestrator, and its outcome before the caller gets the answer.

    The caller is Salad's binary, which discards the body of a 5xx, so the reason of a failure is reported here as well.
    A refusal because of another job is not this job's outcome and is not reported.
    """
    sender = ProgressSender(
        Orchestrator(orchestrator_settings(core.settings)),
        job.job_id,
        on_cancel=core.cancel,
        on_error=core.supervisor.restart_pause_s,
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


def _report_refusal(core: Core, error: MuseTalkError) -> None:
    """Report a refused request as failed if its id is one.

    For Salad's queue a refused job is done, so nobody else would say that it failed.
    """
    settings, job_id = core.settings, str(request.environ.get("musetalk.job_id") or "")
    if not settings.orchestrator_url or not settings.internal_api_key or not _is_reportable(job_id):
        return
    places = current_app.extensions["refusal_reports"]
    if not places.acquire(blocking=False):
        logger.warning("refused request not reported; too many reports are on their way")
        return
    error.stage = error.stage or "validation"
    sender = ProgressSender(Orchestrator(orchestrator_settings(settings)), job_id, on_end=places.release)
    sender.finish(failed_update(error_body(error, job_id=job_id)[1]))


def _is_reportable(job_id: str) -> bool:
    """Whether an id can be part of the orchestrator's route."""
    is_name = bool(job_id.strip()) and job_id not in {".", ".."}
    return is_name and len(job_id) <= MAX_ID_LENGTH and job_id.isprintable()


def _noted_body() -> object:
    """Read the body as JSON and note the job's id for the answer, whatever that will be."""
    body = _json_body()
    job_id = body.get("musetalk_job_id") if isinstance(body, dict) else None
    request.environ["musetalk.job_id"] = job_id if isinstance(job_id, str) else None
    return body


def _json_body() -> object:
    """Read the body as JSON, whatever its content type; raises RequestError for anything that is not JSON."""
    limit = _core().settings.max_body_bytes
    if (request.content_length or 0) > limit:
        raise _too_large(read_start(request.environ["wsgi.input"]))
    if request.content_length is None and request.environ.get("wsgi.input_terminated"):
        # Werkzeug cuts a body without a length at the limit, and does not say so.
        try:
            data = read_body(request.environ["wsgi.input"], limit + 1)
        except OSError as error:
            raise ClientDisconnected from error
        if len(data) > limit:
            raise _too_large(data)
    else:
        data = request.get_data(cache=False)
    try:
        return decode_json(data)
    except ValueError:
        raise RequestError("the body must be JSON", field="body") from None


def _too_large(start: bytes) -> RequestEntityTooLarge:
    """The error for a body beyond the limit; its answer has the job's id if the body begins with it."""
    request.environ["musetalk.job_id"] = job_id_in(start)
    return RequestEntityTooLarge(f"the body is larger than {_core().settings.max_body_bytes} bytes (MAX_BODY_BYTES)")


_NO_SUCH_JOB = "no job with this id runs here"


def cancel(job_id: str) -> tuple[Response, int]:
    """Cancel the running job that has this id; 202 when it runs here, 404 otherwise."""
    if not _core().cancel(job_id):
        raise NotFoundError(_NO_SUCH_JOB)
    return jsonify({"status": "cancelling", "musetalk_job_id": job_id}), 202


def progress(job_id: str) -> Response:
    """Answer with the progress of the running job that has this id; 404 when it does not run here."""
    found = _core().progress_of(job_id)
    if found is None:
        raise NotFoundError(_NO_SUCH_JOB)
    return jsonify({"musetalk_job_id": job_id, "stage": found.stage, "done": found.done, "total": found.total})


def metrics() -> Response:
    """Answer with the metrics in Prometheus' text format."""
    return Response(_core().metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")


def output(name: str) -> Response:
    """Send a finished file of the local folder."""
    return send_from_directory(_core().settings.output_dir, name, max_age=0)


def answer_error(error: Exception) -> tuple[Response, int, dict[str, str]]:
    """Answer every error with the JSON body of the protocol; HTTP errors of Flask keep their status and `Allow`."""
    headers: dict[str, str] = {}
    status = None
    if isinstance(error, HTTPException) and error.code is not None:
        # The body arrived too slowly, or not at all.
        status = 408 if isinstance(error, ClientDisconnected) else error.code
        headers = {name: value for name, value in error.get_headers() if name.lower() == "allow"}
        error = _as_our_error(error, status)
    if isinstance(error, RequestError):
        error.stage = error.stage or "validation"
    if not isinstance(error, MuseTalkError):
        logger.error("unexpected error in a request", exc_info=error)
    own_status, body = error_body(error, job_id=request.environ.get("musetalk.job_id"))
    status = status or own_status
    if not request.environ.get(TRUSTED):
        body.pop("stack_trace", None)
    if status == 503:
        headers["Retry-After"] = "5"
    return jsonify(body), status, headers


_WITH_OUR_TEXT = (RequestEntityTooLarge, Forbidden, LengthRequired, Unauthorized)
# The other refusals of Flask are plain RequestErrors.
_KINDS: Mapping[int, type[RequestError]] = {
    401: UnauthorizedError,
    404: NotFoundError,
    405: MethodNotAllowedError,
}


def _as_our_error(error: HTTPException, status: int) -> MuseTalkError:
    """An HTTP error of Flask as one of ours, with our own sentence if we gave one, else with the status in words."""
    text = "the body did not arrive in time" if isinstance(error, ClientDisconnected) else str(error.name)
    if isinstance(error, _WITH_OUR_TEXT) and error.description != type(error).description:
        text = str(error.description)
    kind = _KINDS.get(status, RequestError) if status < 500 else ProcessingError
    ours = kind(text, retryable=status == 408, status_code=status)
    ours.stage = "validation"
    return ours


class _Handler(WSGIRequestHandler):
    """Handler of Flask's own server that gives up on a client which sends nothing."""

    timeout = 30


def main() -> int:
    """Serve on WORKER_PORT with Flask's own server, for quick local tests; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Serve the worker and its page on this machine, for a quick local test. Settings come from the "
        "environment and .env; WORKER_HOST=0.0.0.0 lets other machines in."
    )
    parser.parse_args()
    try:
        settings = load_settings()
    except MuseTalkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # A quick test needs no other machine.
    host = settings.host or "127.0.0.1"
    if host == "::":
        # Where the machine has no IPv6, this is 0.0.0.0.
        host = bind_addresses(host, 0)[0].rpartition(":")[0].strip("[]")
    if (problem := port_problem(host, settings.port, patience_s=1.0)) is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    if settings.is_buffer_mode:
        print("buffer mode: python app.py claims no jobs; start ./run_worker.sh for that", file=sys.stderr)
    app = create_app(with_playground=True)
    if (problem := exposure_problem(settings, host)) is not None:
        logger.warning(problem)
    print(f"open http://localhost:{settings.port}/ to try it; /hc reports when it is ready", file=sys.stderr)
    app.run(host=host, port=settings.port, threaded=True, request_handler=_Handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
