"""Routes that only the page calls: the worker's state, options with their defaults, uploads, results.

They need the key like a job does. Knows Flask and jobs, no torch and no media.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from flask import Blueprint, Flask, Response, current_app, jsonify, request, send_file

from musetalk.errors import MuseTalkError, NotFoundError, RequestError
from worker.jobs import DEMO_NOTICE, JobParams, params_of
from worker.own_files import SAMPLES, OwnFiles
from worker.web import openapi
from worker.web.history import History
from worker.web.playground import guarded, path_of, receiving

# Jobs whose outcome a page that was reloaded can still ask for.
_MAX_OUTCOMES = 32

blueprint = Blueprint("page_routes", __name__)


def register(app: Flask) -> None:
    """Serve the routes, and note the outcome of each job for a page that was reloaded meanwhile."""
    settings = app.extensions["core"].settings
    app.extensions["history"] = History(settings.output_dir)
    app.extensions["outcomes"] = OrderedDict()
    app.register_blueprint(blueprint)
    app.after_request(_note_outcome)


def _note_outcome(response: Response) -> Response:
    job_id = request.environ.get("musetalk.job_id")
    # A busy worker's refusal is no outcome of a job that may have the same id.
    if request.endpoint == "generate" and isinstance(job_id, str) and response.status_code != 503:
        outcomes = _outcomes()
        outcomes[job_id] = (response.status_code, response.get_json(silent=True))
        while len(outcomes) > _MAX_OUTCOMES:
            outcomes.popitem(last=False)
    return response


def _outcomes() -> OrderedDict[str, tuple[int, Any]]:
    outcomes: OrderedDict[str, tuple[int, Any]] = current_app.extensions["outcomes"]
    return outcomes


def _history() -> History:
    history = current_app.extensions["history"]
    assert isinstance(history, History)
    return history


def _core() -> Any:
    return current_app.extensions["core"]


@blueprint.get("/playground/status")
def status() -> Response:
    """The worker's state, its running job, and with `?job=<id>` the outcome of that job once it has ended."""
    core = _core()
    readiness, running = core.readiness, core.running_now()
    body: dict[str, Any] = {
        "state": readiness.state,
        "model": readiness.model,
        "reason": readiness.reason,
        "notice": DEMO_NOTICE if readiness.model == "demo" else None,
        "job": None,
        "outcome": None,
        "results": _history().stamp(),
    }
    if running is not None:
        body["job"] = {"musetalk_job_id": running.job_id, "elapsed_sec": round(running.elapsed_s, 2)}
        if (progress := running.progress) is not None:
            body["job"] |= {"stage": progress.stage, "done": progress.done, "total": progress.total}
    if (outcome := _outcomes().get(request.args.get("job", ""))) is not None:
        body["outcome"] = {"status_code": outcome[0], "body": outcome[1]}
    return jsonify(body)


@blueprint.get("/playground/options")
def options() -> Response:
    """The parameters of a job as in the OpenAPI document, with the defaults of the loaded model, and the samples."""
    core, schema = _core(), openapi.params_schema()
    try:
        defaults = params_of(core.engine.options(JobParams(), None, None))
    except MuseTalkError:
        # The models still load.
        defaults = {}
    return jsonify(
        {
            "model": core.readiness.model,
            "params": {name: {**row, "default": defaults.get(name)} for name, row in schema.items()},
            "samples": [vars(sample) for sample in SAMPLES],
        }
    )


@blueprint.post("/uploads")
def upload() -> tuple[Response, int]:
    """Keep uploaded files for the next jobs and previews; answer with the fields of a job that name them."""
    settings = _core().settings
    limits = {"source": settings.max_video_bytes, "audio": settings.max_audio_bytes}
    kept: dict[str, str] = {}
    with receiving(request):
        given = {name: request.files[name] for name in limits if name in request.files}
        if not given:
            raise RequestError("the form must have a file source or audio", field="source")
        for name, file in given.items():
            path = path_of(file, name, limits[name])
            uploads = request.environ["musetalk.uploads"]
            (entry,) = (entry for entry in uploads if entry[0] == path.parent)
            uploads.remove(entry)
            entry[1].close()
            own = OwnFiles(settings.work_dir)
            field = "video_url" if name == "source" else "audio_url"
            kept[field] = own.keep(path.parent, max_bytes=sum(limits.values()))
    return jsonify(kept), 201


@blueprint.get("/uploads/<name>")
def uploaded(name: str) -> Response:
    """An uploaded file, for a page that was reloaded; never shown by the browser itself."""
    try:
        path = OwnFiles(_core().settings.work_dir).find(f"upload:{name}", "video_url")
    except MuseTalkError:
        path = None
    if path is None:
        raise NotFoundError("no such upload is here")
    return guarded(send_file(path, mimetype="application/octet-stream", as_attachment=True, download_name="upload"))


@blueprint.get("/results")
def results() -> Response:
    """The newest results of the local folder."""
    return jsonify({"results": _history().newest()})


@blueprint.delete("/results/<name>")
def delete_result(name: str) -> Response:
    """Remove a result."""
    _history().delete(name)
    return jsonify({"status": "deleted", "name": name})


@blueprint.get("/results/<name>/thumbnail")
def thumbnail(name: str) -> Response:
    """A small picture of a result."""
    return guarded(Response(_history().thumbnail(name), content_type="image/jpeg"))
