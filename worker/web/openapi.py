"""The OpenAPI document the worker serves at /openapi.json; the parameters come from the tables the parser uses.

Knows the wire, no Flask.
"""

from __future__ import annotations

import re

from worker.jobs import (
    ALWAYS_REPORTED,
    ERROR_TYPES,
    MAX_ID_LENGTH,
    MAX_TEXT_LENGTH,
    MAX_URL_LENGTH,
    PARAMS,
    STAGES,
)

Json = dict[str, object]

# Longer than any speech that is accepted.
MAX_PREVIEW_S = 86_400
# Works on every worker: the files ship with it.
EXAMPLE: Json = {
    "musetalk_job_id": "try-1",
    "video_url": "sample:portrait",
    "audio_url": "sample:short",
    "params": {"silence": "closed"},
}

_NUMBER: Json = {"type": ["number", "null"]}
_TEXT: Json = {"type": "string"}
_KEY_NOTE = "Callers on this machine need no key; others need X-Internal-API-Key when the worker has one."


def document(version: str) -> Json:
    """The whole document, OpenAPI 3.1."""
    return {
        # 3.1 because its schemas are plain JSON Schema, which the tests validate real bodies with.
        "openapi": "3.1.0",
        "info": {
            "title": "MuseTalk worker",
            "version": version,
            "description": "Lip-syncs a video or still to a speech track. One job at a time. " + _KEY_NOTE,
        },
        "paths": with_ids(
            {
                "/hc": {"get": _health()},
                "/generate": {"post": _generate()},
                "/preview": {"post": _preview()},
                "/generate/{job_id}": {"delete": _cancel(), "get": _progress()},
                "/outputs/{name}": {"get": _output()},
                "/metrics": {
                    "get": {
                        "summary": "Metrics in Prometheus' text format",
                        "responses": {"200": {"description": "Metrics", "content": {"text/plain": {"schema": _TEXT}}}},
                    }
                },
                "/uploads": {"post": _keep()},
                "/results": {"get": _results()},
                "/results/{name}": {"delete": _delete_result()},
                "/openapi.json": {
                    "get": {"summary": "This document", "responses": {"200": _json("OpenAPI 3.1", {"type": "object"})}}
                },
            }
        ),
        "components": {
            "schemas": {
                "Job": job_schema(),
                "Preview": preview_schema(),
                "Result": result_schema(),
                "Failure": failure_schema(),
                "Health": health_schema(),
            },
            "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "X-Internal-API-Key"}},
        },
        # The empty entry: callers on the worker's machine need no key.
        "security": [{}, {"key": []}],
    }


def with_ids(paths: dict[str, dict[str, Json]]) -> Json:
    """The routes, each with an id made of its method and its path: `postPreview`, `deleteGenerateJobId`."""
    named: Json = {}
    for path, methods in paths.items():
        words = "".join(word.title() for word in re.findall(r"[a-z]+", path))
        named[path] = {method: {"operationId": method + words, **route} for method, route in methods.items()}
    return named


def params_schema() -> dict[str, Json]:
    """The parameters of a job by their names, each with its meaning."""
    return {name: {**row.schema, "description": row.meaning.replace("`", "")} for name, row in PARAMS.items()}


def job_schema() -> Json:
    """The body of POST /generate."""
    # `file:` addresses are for tests and closed machines, so they are not part of the public schema.
    pattern = "^(https?://|sample:|upload:)"
    address: Json = {"type": "string", "format": "uri", "pattern": pattern, "maxLength": MAX_URL_LENGTH}
    return {
        "type": "object",
        "required": ["musetalk_job_id", "video_url", "audio_url"],
        "properties": {
            "musetalk_job_id": {
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_ID_LENGTH,
                "description": "Names the output; the same id again replaces it.",
            },
            "video_url": {**address, "description": "Video or still; sample:portrait ships with the worker."},
            "audio_url": {**address, "description": "Any file that contains sound; sample:hello ships with it."},
            "aspect_ratio": {"type": ["string", "null"], "maxLength": MAX_TEXT_LENGTH, "examples": ["9:16"]},
            "resolution": {"type": ["string", "null"], "maxLength": MAX_TEXT_LENGTH, "examples": ["720p", "512x512"]},
            "params": {"type": ["object", "null"], "properties": params_schema()},
        },
    }


def preview_schema() -> Json:
    """The body of POST /preview."""
    job = job_schema()
    properties = job["properties"]
    assert isinstance(properties, dict)
    time: Json = {"type": ["number", "null"], "minimum": 0, "maximum": MAX_PREVIEW_S}
    meaning = "Seconds from the start of the video; 0 by default."
    return {
        **job,
        "required": ["musetalk_job_id", "video_url"],
        "properties": {**properties, "time_s": {**time, "description": meaning}},
    }


def result_schema() -> Json:
    """The body of a finished job."""
    metrics: Json = {
        **dict.fromkeys(("GENERATION_TIME_SEC", "SCRIPT_WALL_TIME_SEC", "PEAK_VRAM_MIB", "PEAK_RAM_KB"), _NUMBER),
        "gpu_class": _TEXT,
        "stage_times": _stage_times(),
        "total_time": _NUMBER,
    }
    return {
        "type": "object",
        "required": ["status", "output_url", "musetalk_job_id", "metrics"],
        "properties": {
            "status": {"const": "success"},
            "output_url": _TEXT,
            "musetalk_job_id": _TEXT,
            "model": _TEXT,
            "metrics": {"type": "object", "required": list(metrics), "properties": metrics},
            "video": {"type": "object"},
            "warnings": {"type": "array", "items": _TEXT},
            "error": {"type": "null"},
        },
    }


def failure_schema() -> Json:
    """The body of every error."""
    return {
        "type": "object",
        "required": ["status", "error_type", "error_message", "error", "stage", "details", "retryable", "stage_times"],
        "properties": {
            "status": {"const": "failed"},
            "error_type": {"enum": [*ERROR_TYPES]},
            "error_message": _TEXT,
            "error": _TEXT,
            "stage": {"enum": [*STAGES, "unknown"]},
            "details": {"type": "object"},
            "retryable": {"type": "boolean"},
            "stage_times": {"type": "object"},
            "musetalk_job_id": _TEXT,
            "stack_trace": _TEXT,
        },
    }


def health_schema() -> Json:
    """The body of GET /hc."""
    return {
        "type": "object",
        "required": ["status", "model"],
        "properties": {
            "status": {"enum": ["ok", "starting", "failed", "draining"]},
            "model": {"type": ["string", "null"]},
            "busy": {"type": "boolean", "description": "With draining: the answer of the last job is not sent yet."},
            "delivering": {"type": "boolean", "description": "A job was answered within the last second."},
            "reason": {"type": ["string", "null"]},
            "notice": {"type": "string", "description": "With the demo model: how to get the official one."},
        },
    }


def _stage_times() -> Json:
    seconds: Json = {stage: {"type": "number"} for stage in STAGES}
    return {"type": "object", "required": list(ALWAYS_REPORTED), "properties": seconds}


def _json(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _failures(*statuses: tuple[int, str]) -> Json:
    return {str(status): _json(meaning, _ref("Failure")) for status, meaning in statuses}


def _health() -> Json:
    return {
        "summary": "Whether the worker is ready or busy",
        "responses": {
            "200": _json("Ready or busy", _ref("Health")),
            "503": _json("Starting, shutting down or broken, with the reason", _ref("Health")),
        },
    }


def _generate() -> Json:
    return {
        "summary": "Run one job and answer when it is finished",
        "parameters": [{"name": "Salad-Job-Id", "in": "header", "required": False, "schema": _TEXT}],
        "requestBody": {
            "required": True,
            "description": "JSON with addresses; files, where the playground is on.",
            "content": {
                "application/json": {"schema": _ref("Job"), "example": EXAMPLE},
                "multipart/form-data": {"schema": _upload()},
            },
        },
        "responses": {
            "200": _json("The video is stored", _ref("Result")),
            **_failures(
                (401, "The header X-Internal-API-Key is missing or wrong"),
                (403, "The request comes from a page of another site, or names the server in an unknown way"),
                (408, "The body did not arrive in time"),
                (409, "The job was cancelled"),
                (411, "The upload has no length"),
                (413, "The body is too large"),
                (422, "The request or its media caused the error; a retry would fail again"),
                (
                    500,
                    "Caused by the worker or something it depends on; `retryable` says if a retry can help",
                ),
                (503, "Busy, or not able to run any job"),
            ),
        },
    }


def _preview() -> Json:
    form = _upload()
    properties = form["properties"]
    assert isinstance(properties, dict)
    properties["time_s"] = {"type": "string", "description": "Seconds."}
    picture: Json = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": "One picture of the video that a job would make",
        "description": "PNG if `Accept` asks for it, else JPEG. The header `X-Preview` has frame, time, length, and "
        "the face's box as JSON. Without `audio_url` the picture is the source's.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _ref("Preview"), "example": {**EXAMPLE, "time_s": 0.8}},
                "multipart/form-data": {"schema": form},
            },
        },
        "responses": {
            "200": {"description": "The picture", "content": {"image/jpeg": picture, "image/png": picture}},
            **_failures(
                (401, "The header X-Internal-API-Key is missing or wrong"),
                (403, "The request comes from a page of another site, or names the server in an unknown way"),
                (409, "The preview was cancelled"),
                (413, "The body is too large"),
                (422, "The request or its media caused the error; a retry would fail again"),
                (500, "Caused by the worker; `retryable` says if a retry can help"),
                (503, "Busy, or not able to run any job"),
            ),
        },
    }


def _keep() -> Json:
    file: Json = {"type": "string", "format": "binary"}
    form: Json = {"type": "object", "properties": {"source": file, "audio": file}}
    kept: Json = {"type": "object", "properties": {"video_url": _TEXT, "audio_url": _TEXT}}
    return {
        "summary": "Keep files for the next jobs and previews; only with the page",
        "description": "The answer has the fields of a job that name the files. They stay for an hour after their "
        "last use.",
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": {
            "201": _json("Kept", kept),
            **_failures(
                (401, "The header X-Internal-API-Key is missing or wrong"),
                (411, "The upload has no length"),
                (413, "A file is too large"),
                (422, "The form has no file"),
                (503, "Other uploads are arriving"),
            ),
        },
    }


def _results() -> Json:
    one: Json = {"type": "object", "properties": {"name": _TEXT, "path": _TEXT, "musetalk_job_id": _TEXT}}
    body: Json = {"type": "object", "properties": {"results": {"type": "array", "items": one}}}
    return {
        "summary": "The newest results of the local folder; only with the page",
        "responses": {
            "200": _json("Newest first", body),
            **_failures((401, "The header X-Internal-API-Key is missing or wrong")),
        },
    }


def _delete_result() -> Json:
    return {
        "summary": "Remove a result of the local folder; only with the page",
        "parameters": [
            {"name": "name", "in": "path", "required": True, "schema": _TEXT, "example": "try-1.mp4"},
        ],
        "responses": {
            "200": _json("Removed", {"type": "object"}),
            **_failures((401, "The header X-Internal-API-Key is missing or wrong"), (404, "No such result")),
        },
    }


def _upload() -> Json:
    """The form that the page sends."""
    file: Json = {"type": "string", "format": "binary"}
    return {
        "type": "object",
        "required": ["source", "audio"],
        "properties": {
            "source": {**file, "description": "Video or still."},
            "audio": {**file, "description": "Any file that contains sound."},
            "params": {"type": "string", "description": "As in Job, as JSON text."},
            "musetalk_job_id": {"type": "string", "description": "One is made when it is absent."},
        },
    }


def _progress() -> Json:
    body: Json = {
        "type": "object",
        "required": ["musetalk_job_id", "stage", "done", "total"],
        "properties": {
            "musetalk_job_id": _TEXT,
            "stage": {"enum": [*STAGES]},
            "done": {"type": "integer"},
            "total": {"type": "integer"},
        },
    }
    return {
        "summary": "Progress of the running job, by any of its ids; frames in the stage inference",
        "parameters": [{"name": "job_id", "in": "path", "required": True, "schema": _TEXT, "example": "try-1"}],
        "responses": {
            "200": _json("It runs", body),
            **_failures((401, "The header X-Internal-API-Key is missing or wrong"), (404, "No such job runs here")),
        },
    }


def _cancel() -> Json:
    return {
        "summary": "Cancel the running job by any of its ids",
        "parameters": [{"name": "job_id", "in": "path", "required": True, "schema": _TEXT, "example": "try-1"}],
        "responses": {
            "202": _json("It stops within one chunk", {"type": "object"}),
            **_failures((401, "The header X-Internal-API-Key is missing or wrong"), (404, "No such job runs here")),
        },
    }


def _output() -> Json:
    return {
        "summary": "A finished file, when no bucket is configured",
        "parameters": [{"name": "name", "in": "path", "required": True, "schema": _TEXT, "example": "try-1.mp4"}],
        "responses": {
            "200": {"description": "The file", "content": {"video/mp4": {}, "application/json": {}}},
            **_failures((401, "The header X-Internal-API-Key is missing or wrong"), (404, "No such file")),
        },
    }
