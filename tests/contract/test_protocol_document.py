"""docs/protocol.md describes what the code sends and accepts: examples, routes, phases, statuses."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from flask.testing import FlaskClient

from app import create_app
from musetalk.errors import DownloadError, MuseTalkError, ProcessingError
from tests.support.fake_orchestrator import FakeOrchestrator
from tests.support.results import a_preview, a_result
from tests.support.scripted_core import ScriptedCore
from worker.config import ROOT
from worker.job_control import JobProgress
from worker.jobs import (
    HTTP_STATUSES,
    STAGES,
    Stage,
    error_body,
    parse_job,
    result_body,
    sidecar_body,
)
from worker.orchestrator import (
    Orchestrator,
    OrchestratorSettings,
    Reply,
    cancelled_jobs,
    claimed_job,
    completed_update,
    failed_report,
    failed_update,
    stage_update,
    succeeded_report,
)
from worker.own_files import SAMPLES
from worker.readiness import Readiness, State
from worker.stored import StoredObject, sidecar_bytes
from worker.web import openapi, openapi_orchestrator
from worker.web.previews import picture_answer

TEXT = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"<!-- example: ([\w ]+) -->\n```json\n(.*?)\n```", re.DOTALL)
RESULT = a_result(
    video={
        "width": 1280,
        "height": 720,
        "fps": 25.0,
        "frames": 239,
        "duration_sec": 9.56,
        "bytes": 2996300,
        "source_frames": 200,
        "source_frames_without_face": 0,
        "source_frames_interpolated": 0,
        "source_frames_reused": 0,
        "encoder": "libx264",
    },
    stage_times=dict.fromkeys(STAGES, 1.0),
    peak_gpu_memory_mib=3120.5,
    bucket="clips",
)


def examples(kind: str) -> list[Any]:
    """The decoded examples of one kind; there is at least one."""
    found = [json.loads(text) for name, text in EXAMPLE.findall(TEXT) if name == kind]
    assert found, f"docs/protocol.md has no example of: {kind}"
    return found


def shape(value: Any) -> Any:
    """The keys of a JSON value, nested; `params` and `details` differ from job to job."""
    if not isinstance(value, dict):
        return None
    return {key: None if key in {"params", "details"} else shape(item) for key, item in value.items()}


def failure(error: MuseTalkError, stage: Stage) -> dict[str, object]:
    error.stage = stage
    return error_body(error, job_id="job-1")[1]


@pytest.fixture
def core(tmp_path: Path) -> ScriptedCore:
    return ScriptedCore(tmp_path)


@pytest.fixture
def client(core: ScriptedCore) -> Iterator[FlaskClient]:
    with create_app(core=core, with_playground=True).test_client() as client:
        yield client


def caller_of(orchestrator: FakeOrchestrator, worker_id: str) -> Orchestrator:
    url = orchestrator.url
    return Orchestrator(OrchestratorSettings(url, url, "key", worker_id, "RTX 3090"))


def test_every_json_block_is_a_marked_example() -> None:
    assert len(EXAMPLE.findall(TEXT)) == TEXT.count("```json\n")


NOT_FOUND = DownloadError("the video could not be fetched: 404 from media host", url="u", status_code=404)
NO_BUCKET = ProcessingError("B2 did not store the file: the bucket does not exist")


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("result", lambda: result_body(RESULT)),
        ("failure", lambda: failure(NOT_FOUND, "download")),
        ("succeeded", lambda: succeeded_report(RESULT)),
        ("failed", lambda: failed_report(failure(NOT_FOUND, "download"))),
        (
            "sidecar",
            lambda: json.loads(
                sidecar_bytes(sidecar_body(RESULT.rendered, RESULT.stage_times), StoredObject("n", "u", 1, "s", "b"))
            ),
        ),
    ],
)
def test_an_example_has_the_keys_of_the_real_body(kind: str, make: Callable[[], dict[str, object]]) -> None:
    real = shape(make())
    for example in examples(kind):
        documented = shape(example)
        if kind == "sidecar":
            # The example shortens `video`, which stands in full in the result.
            assert documented.pop("video").keys() <= real.pop("video").keys()
        assert documented == real


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("job", openapi.job_schema()),
        ("result", openapi.result_schema()),
        ("failure", openapi.failure_schema()),
        ("health", openapi.health_schema()),
        ("preview", openapi.preview_schema()),
        ("heartbeat", openapi_orchestrator.heartbeat_schema()),
        ("heartbeat answer", openapi_orchestrator.heartbeat_answer_schema()),
        ("claim", openapi_orchestrator.claim_schema()),
        ("succeeded", openapi_orchestrator.outcome_schema()),
        ("failed", openapi_orchestrator.outcome_schema()),
        ("progress", openapi_orchestrator.progress_schema()),
        ("completed progress", openapi_orchestrator.progress_schema()),
        ("failed progress", openapi_orchestrator.progress_schema()),
        ("retryable progress", openapi_orchestrator.progress_schema()),
    ],
)
def test_an_example_fits_the_served_schema(kind: str, schema: dict[str, object]) -> None:
    for example in examples(kind):
        jsonschema.validate(example, schema)


def test_the_example_of_a_job_is_a_job() -> None:
    for example in (*examples("job"), *examples("preview")):
        assert parse_job(example).params.ignored == ()


def test_answers_about_pictures_uploads_and_results_are_as_documented(core: ScriptedCore, client: FlaskClient) -> None:
    stats = json.loads(picture_answer(a_preview(), b"", ".jpg").headers["X-Preview"])
    assert set(examples("preview stats")[0]) == set(stats)
    files = {name: (io.BytesIO(b"x"), name) for name in ("source", "audio")}
    kept = client.post("/uploads", data=files).get_json()
    (documented,) = examples("uploads")
    assert set(kept) == set(documented)
    assert all(len(kept[name]) == len(documented[name]) for name in kept)
    core.settings.output_dir.mkdir()
    for suffix in ("mp4", "json"):
        (core.settings.output_dir / f"job-1.{suffix}").touch()
    assert client.delete("/results/job-1.mp4").get_json() == examples("deleted")[0]


def test_the_document_of_the_orchestrator_has_the_documented_routes() -> None:
    paths: Any = openapi_orchestrator.orchestrator_document("1")["paths"]
    assert set(paths) == set(re.findall(r"^### POST (/internal/\S+)$", TEXT, re.MULTILINE))


def test_every_sample_is_documented() -> None:
    assert {f"sample:{sample.name}" for sample in SAMPLES} <= set(re.findall(r"sample:[a-z]+", TEXT))


def test_the_texts_of_failures_are_those_of_the_code() -> None:
    (documented,) = examples("failure")
    real = failure(NOT_FOUND, "download")
    for name in ("error_type", "error_message", "error", "stage", "retryable"):
        assert documented[name] == real[name]
    assert examples("failed")[0]["error"] == failed_report(real)["error"]
    assert examples("retryable progress")[0]["error"] == failed_update(failure(NO_BUCKET, "upload"))["error"]


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("progress", lambda: stage_update("inference", 120, 240)),
        ("completed progress", lambda: completed_update(RESULT)),
        ("failed progress", lambda: failed_update(failure(NOT_FOUND, "download"))),
        ("retryable progress", lambda: failed_update(failure(NO_BUCKET, "upload"))),
    ],
)
def test_a_progress_report_arrives_as_documented(kind: str, make: Callable[[], dict[str, object]]) -> None:
    with FakeOrchestrator() as orchestrator:
        caller = Orchestrator(
            OrchestratorSettings(
                orchestrator.url, orchestrator.url, "key", "vast-17", "RTX 3090"
            )  # pragma: allowlist secret
        )
        caller.progress("job-1", make())
        caller.close()
        (call,) = orchestrator.of("progress", "job-1")
    for example in examples(kind):
        assert shape(example) == shape(call.body)
        assert (example["status"], example.get("phase")) == (call.body["status"], call.body.get("phase"))
        assert example.get("progress") == call.body.get("progress")


def test_heartbeat_and_claim_arrive_as_documented() -> None:
    with FakeOrchestrator() as orchestrator:
        caller = Orchestrator(
            OrchestratorSettings(
                orchestrator.url, orchestrator.url, "key", "vast-17", "RTX 3090"
            )  # pragma: allowlist secret
        )
        caller.heartbeat("busy", None)
        caller.claim()
        caller.close()
        assert [orchestrator.of("heartbeat")[0].body] == examples("heartbeat")
        assert [orchestrator.of("claim")[0].body] == examples("claim")


def test_answers_of_the_orchestrator_are_read_as_documented() -> None:
    with_job, without = examples("claim answer")
    job, problem = claimed_job(Reply(200, body=with_job))
    assert problem is None
    assert parse_job(job, buffer_job_id="b-17").job_id == "job-1"
    assert claimed_job(Reply(200, body=without)) == (None, None)
    (answer,) = examples("heartbeat answer")
    assert cancelled_jobs(Reply(200, body=answer)) == ("job-1",)


def test_answers_of_the_worker_are_as_documented(
    client: FlaskClient, core: ScriptedCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, starting = examples("health")
    assert set(client.get("/hc").get_json()) == set(ready)
    core.state = Readiness("starting", None, starting["reason"])
    assert client.get("/hc").get_json() == starting
    monkeypatch.setattr(core, "progress_of", lambda _id: JobProgress("inference", 16, 239))
    monkeypatch.setattr(core, "cancel", lambda _id: True)
    assert client.get("/generate/job-1").get_json() == examples("running")[0]
    assert client.delete("/generate/job-1").get_json() == examples("cancelling")[0]


def test_every_state_of_the_health_is_documented() -> None:
    line = next(line for line in TEXT.splitlines() if line.startswith("`status` is `ok`"))
    documented = set(re.findall(r"`(\w+)`", line)) - {"status"}
    assert documented == {"ok" if state in {"ready", "busy"} else state for state in get_args(State)}


def test_every_route_is_documented_and_every_documented_route_exists(client: FlaskClient) -> None:
    rules = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in client.application.url_map.iter_rules()
        for method in (rule.methods or set()) & {"GET", "POST", "DELETE"}
    }
    documented = set(re.findall(r"\b(GET|POST|DELETE) (/[\w/{}.-]*)", TEXT))
    calls = {
        ("POST", "/internal/buffer/workers/{worker_id}/heartbeat"),
        ("POST", "/internal/buffer/jobs/claim"),
        ("POST", "/internal/buffer/jobs/{buffer_job_id}/status"),
        ("POST", "/internal/jobs/{musetalk_job_id}/progress"),
    }
    # The overview of the modes writes the ids of the orchestrator's routes shorter.
    short = {("POST", "/internal/jobs/{id}/progress"), ("POST", "/internal/buffer/jobs/{id}/status")}
    # The page's routes are named with `GET` only once.
    documented |= {("GET", "/playground/{name}"), ("GET", "/playground/demo/{name}"), ("GET", "/")}
    assert documented - short == rules | calls
    for path in ("/playground/{name}", "/playground/demo/{name}"):
        assert f"`GET {path}`" in TEXT


def test_the_calls_reach_the_documented_paths() -> None:
    with FakeOrchestrator() as orchestrator:
        caller = caller_of(orchestrator, "worker/1")
        caller.heartbeat("idle", None)
        caller.claim()
        caller.report("b", {"status": "failed"})
        caller.progress("m", {"progress": 0.5})
        caller.close()
        assert [call.kind for call in orchestrator.calls] == ["heartbeat", "claim", "status", "progress"]
        assert orchestrator.of("heartbeat")[0].id == "worker/1"


def test_the_table_of_phases_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    real = [(update["phase"], stage, update["progress"]) for stage in STAGES if (update := stage_update(stage, 0, 1))]
    assert [(phase, stage, float(start)) for phase, stage, start in rows] == real


def test_the_table_of_statuses_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| `(\w+)` \|", TEXT, re.MULTILINE)
    documented = {(int(status), kind) for statuses, kind in rows for status in statuses.split(", ")}
    ours = {(status, kind.error_type) for kind, status in HTTP_STATUSES.items()}
    # What Flask answers itself, and what is not in the table of statuses.
    assert documented == ours | {(s, "media_error") for s in (403, 408, 411, 413)} | {
        (500, "processing_error"),
        (500, "unknown_error"),
    }
