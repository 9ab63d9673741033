"""The OpenAPI document of the routes that an orchestrator offers and the worker calls. Knows the wire, no Flask."""

from __future__ import annotations

from worker.jobs import ERROR_TYPES, STAGES
from worker.web.openapi import Json, job_schema, with_ids

_TEXT: Json = {"type": "string"}
_PHASES = ("downloading", "preparing", "inferring", "encoding", "uploading", "completed", "failed")


def orchestrator_document(version: str) -> Json:
    """The whole document, OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Orchestrator, as the worker calls it",
            "version": version,
            "description": "Routes that an orchestrator offers and the worker calls; examples/orchestrator.py is a "
            "small one. Every call carries X-Internal-API-Key. Any 2xx is success.",
        },
        "servers": [
            {
                "url": "{orchestrator}",
                "variables": {"orchestrator": {"default": "https://orchestrator.example"}},
                "description": "ORCHESTRATOR_BASE_URL, or BUFFER_ORCHESTRATOR_BASE_URL for the routes of buffer mode",
            }
        ],
        "paths": with_ids(
            {
                "/internal/buffer/workers/{worker_id}/heartbeat": {"post": _heartbeat()},
                "/internal/buffer/jobs/claim": {"post": _claim()},
                "/internal/buffer/jobs/{buffer_job_id}/status": {"post": _status()},
                "/internal/jobs/{musetalk_job_id}/progress": {"post": _progress()},
            }
        ),
        "components": {
            "schemas": {
                "Heartbeat": heartbeat_schema(),
                "HeartbeatAnswer": heartbeat_answer_schema(),
                "Claim": claim_schema(),
                "ClaimAnswer": claim_answer_schema(),
                "Outcome": outcome_schema(),
                "Progress": progress_schema(),
            },
            "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "X-Internal-API-Key"}},
        },
        "security": [{"key": []}],
    }


def heartbeat_schema() -> Json:
    """The body of a heartbeat."""
    return {
        "type": "object",
        "required": ["status", "gpu_class", "capacity", "error"],
        "properties": {
            "status": {"enum": ["idle", "busy"]},
            "gpu_class": _TEXT,
            "capacity": {"type": "integer"},
            "error": {"type": ["string", "null"], "description": "Why the worker is not ready, or the last problem."},
        },
    }


def heartbeat_answer_schema() -> Json:
    """The answer to a heartbeat; everything in it is optional."""
    return {
        "type": "object",
        "properties": {
            "detail": _TEXT,
            "cancel": {"type": "array", "items": _TEXT, "description": "Jobs to stop, by any of their ids."},
        },
    }


def claim_schema() -> Json:
    """The body of a claim."""
    return {"type": "object", "required": ["worker_id"], "properties": {"worker_id": _TEXT}}


def claim_answer_schema() -> Json:
    """The answer to a claim: a job or null."""
    job = job_schema()
    properties, required = job["properties"], job["required"]
    assert isinstance(properties, dict)
    assert isinstance(required, list)
    claimed: Json = {
        "type": ["object", "null"],
        "required": ["buffer_job_id", *required],
        "properties": {"buffer_job_id": {"type": ["string", "integer"]}, **properties},
    }
    return {"type": "object", "required": ["job"], "properties": {"job": claimed}}


def outcome_schema() -> Json:
    """The report of a claimed job's outcome."""
    return {
        "type": "object",
        "required": ["status", "error", "output_url", "metrics"],
        "properties": {
            "status": {"enum": ["succeeded", "failed"]},
            "error": {"type": ["string", "null"]},
            "output_url": {"type": ["string", "null"]},
            "metrics": {"type": ["object", "null"]},
            "error_type": {"enum": [*ERROR_TYPES]},
            "stage": {"enum": [*STAGES, "unknown"]},
            "retryable": {"type": "boolean"},
            "details": {"type": "object"},
        },
    }


def progress_schema() -> Json:
    """A progress report; the last one of a job in queue mode has its result or its error."""
    return {
        "type": "object",
        "required": ["status", "worker_id", "config_label", "batch_size"],
        "properties": {
            "status": {"enum": ["running", "succeeded", "failed"]},
            "phase": {"enum": [*_PHASES]},
            "progress": {"type": "number", "minimum": 0, "maximum": 1},
            "metrics": {"type": "object"},
            "output_url": _TEXT,
            "error": _TEXT,
            "worker_id": _TEXT,
            "config_label": _TEXT,
            "batch_size": {"type": "integer"},
        },
    }


def _call(summary: str, body: str, example: Json, answers: Json, parameter: str | None = None) -> Json:
    """One route: a JSON body with its example, the answers by status, and the id in its path."""
    parameters = [] if parameter is None else [{"name": parameter, "in": "path", "required": True, "schema": _TEXT}]
    content: Json = {"schema": _ref(body), "example": example}
    return {
        "summary": summary,
        "parameters": parameters,
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": answers,
    }


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(description: str, schema: str | None = None, example: Json | None = None) -> Json:
    if schema is None:
        return {"description": description}
    return {
        "description": description,
        "content": {"application/json": {"schema": _ref(schema), "example": example}},
    }


def _heartbeat() -> Json:
    return _call(
        "A worker is alive; every 10 s, and when a job begins or ends",
        "Heartbeat",
        {"status": "busy", "gpu_class": "RTX 3090", "capacity": 1, "error": None},
        {"200": _answer("Accepted", "HeartbeatAnswer", {"detail": "ok", "cancel": ["job-1"]})},
        "worker_id",
    )


def _claim() -> Json:
    job: Json = {
        "buffer_job_id": "b-17",
        "musetalk_job_id": "job-1",
        "video_url": "https://media.example/face.mp4",
        "audio_url": "https://media.example/speech.wav",
        "params": {},
    }
    answers: Json = {"200": _answer("A job, or null", "ClaimAnswer", {"job": job}), "204": _answer("No job")}
    return _call("A worker asks for a job", "Claim", {"worker_id": "vast-17"}, answers)


def _status() -> Json:
    example: Json = {
        "status": "failed",
        "error": "media_error at download: the video could not be fetched: 404 from media host",
        "output_url": None,
        "metrics": None,
        "error_type": "media_error",
        "stage": "download",
        "retryable": False,
        "details": {"status_code": 404},
    }
    answers: Json = {
        "200": _answer("Accepted; the worker removes the outcome"),
        "404": _answer("The orchestrator no longer has the job; the worker removes the outcome"),
        "409": _answer("The job has an outcome already; the worker removes this one"),
        "422": _answer("The worker sends the four required fields alone, once"),
    }
    return _call("The outcome of a claimed job", "Outcome", example, answers, "buffer_job_id")


def _progress() -> Json:
    example: Json = {
        "status": "running",
        "phase": "inferring",
        "progress": 0.5,
        "metrics": {"frames_done": 120, "frames_total": 240},
        "worker_id": "vast-17",
        "config_label": "default",
        "batch_size": 8,
    }
    answers: Json = {"200": _answer("Accepted; the newest report wins")}
    return _call("Progress of a job, at most once a second", "Progress", example, answers, "musetalk_job_id")
