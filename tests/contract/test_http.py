"""What a caller of the HTTP server sees: statuses and bodies of the protocol, always JSON, never a trace of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from app import create_app
from musetalk.errors import MediaError, NoFaceError, OutOfMemoryError, UnavailableError
from tests.support.results import a_result
from tests.support.scripted_core import ScriptedCore
from worker.readiness import Readiness
from worker.web import openapi

GOOD = {"musetalk_job_id": "job-1", "video_url": "https://host/a.mp4", "audio_url": "https://host/a.wav"}


@pytest.fixture
def core(tmp_path: Path) -> ScriptedCore:
    return ScriptedCore(tmp_path)


@pytest.fixture
def client(core: ScriptedCore) -> Iterator[FlaskClient]:
    with create_app(core=core).test_client() as client:
        yield client


def body_of(answer: TestResponse) -> Any:
    """The answer's JSON."""
    assert answer.is_json
    return answer.get_json()


def test_health_is_ok_when_ready_and_when_busy(client: FlaskClient, core: ScriptedCore) -> None:
    for state in ("ready", "busy"):
        core.state = Readiness(state, "v15")
        answer = client.get("/hc")
        assert (answer.status_code, body_of(answer)["status"], body_of(answer)["model"]) == (200, "ok", "v15")
        assert body_of(answer)["busy"] is (state == "busy")
    assert client.head("/hc").status_code == 200


@pytest.mark.parametrize("state", ["starting", "failed", "draining"])
def test_health_says_why_it_is_not_ready(client: FlaskClient, core: ScriptedCore, state: Any) -> None:
    core.state = Readiness(state, None, "the reason")
    answer = client.get("/hc")
    assert answer.status_code == 503
    assert answer.json == {"status": state, "model": None, "reason": "the reason"}


def test_a_good_job_is_answered_with_its_result(client: FlaskClient, core: ScriptedCore) -> None:
    core.outcome = a_result()
    answer = client.post("/generate", json=GOOD, headers={"Salad-Job-Id": "queue-7"})
    assert answer.status_code == 200
    assert body_of(answer)["status"] == "success"
    assert body_of(answer)["metrics"]["gpu_class"] == "RTX"
    assert core.jobs[0].queue_job_id == "queue-7"


def test_the_content_type_does_not_matter(client: FlaskClient, core: ScriptedCore) -> None:
    core.outcome = a_result()
    for kind in ("text/plain", "application/octet-stream", ""):
        assert client.post("/generate", data=json.dumps(GOOD), content_type=kind).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (NoFaceError("no frame of the source shows a face"), 422, "media_error"),
        (MediaError("the audio is empty"), 422, "media_error"),
        (OutOfMemoryError("too small", is_oom=True), 500, "processing_error"),
        (UnavailableError("busy"), 503, "processing_error"),
        (KeyError("/private/path"), 500, "unknown_error"),
    ],
)
def test_errors_have_the_status_and_body_of_the_protocol(
    client: FlaskClient, core: ScriptedCore, error: Exception, status: int, kind: str
) -> None:
    core.outcome = error
    answer = client.post("/generate", json=GOOD)
    assert (answer.status_code, body_of(answer)["error_type"], body_of(answer)["status"]) == (status, kind, "failed")
    assert body_of(answer)["musetalk_job_id"] == "job-1"
    assert "private" not in answer.text
    assert ("Retry-After" in answer.headers) == (status == 503)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'"text"',
        b"3",
        b"null",
        b"{}",
        b'{"musetalk_job_id": "\\u0000"}',
        b"<html>",
    ],
)
def test_a_body_that_is_no_job_is_422_json(client: FlaskClient, core: ScriptedCore, body: bytes) -> None:
    answer = client.post("/generate", data=body, content_type="application/json")
    assert answer.status_code == 422
    assert body_of(answer)["error_type"] == "media_error"
    assert body_of(answer)["stage"] == "validation"
    assert body_of(answer)["retryable"] is False
    assert core.jobs == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/generate", 405), ("POST", "/hc", 405), ("GET", "/nothing", 404), ("GET", "/outputs/none.mp4", 404)],
)
def test_http_errors_are_json_too(client: FlaskClient, method: str, path: str, status: int) -> None:
    answer = client.open(path, method=method)
    assert answer.status_code == status
    assert body_of(answer)["status"] == "failed"
    if status == 405:
        assert answer.headers["Allow"]


def test_a_body_that_is_too_large_is_refused(client: FlaskClient, core: ScriptedCore) -> None:
    answer = client.post("/generate", data=b" " * (core.settings.max_body_bytes + 1))
    assert answer.status_code == 413
    assert body_of(answer)["status"] == "failed"


def test_results_are_served_and_nothing_beside_them(client: FlaskClient, core: ScriptedCore) -> None:
    folder = core.settings.output_dir
    folder.mkdir(parents=True)
    (folder / "job-1.mp4").write_bytes(b"video")
    (folder.parent / "secret.txt").write_text("secret", encoding="utf-8")
    with client.get("/outputs/job-1.mp4") as answer:
        assert answer.data == b"video"
    for name in ("../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt"):
        assert client.get(f"/outputs/{name}").status_code == 404


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from([*GOOD, "params", "resolution"]), json_values).map(
        lambda fields: json.dumps({**GOOD, **fields}).encode()
    )
)
def test_no_body_whatever_causes_a_500(client: FlaskClient, core: ScriptedCore, body: bytes) -> None:
    core.outcome = a_result()
    answer = client.post("/generate", data=body, content_type="application/json")
    assert answer.status_code in (200, 422)
    assert answer.is_json
    assert "Traceback" not in answer.text


# -- who may call -----------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[FlaskClient, ScriptedCore]]:
    """A worker with a key."""
    core = ScriptedCore(tmp_path, INTERNAL_API_KEY="the-key")
    core.outcome = a_result()
    with create_app(core=core).test_client() as client:
        yield client, core


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_callers_on_this_machine_need_no_key(guarded: tuple[FlaskClient, ScriptedCore], address: str) -> None:
    answer = guarded[0].post("/generate", json=GOOD, environ_base={"REMOTE_ADDR": address})
    assert answer.status_code == 200


@pytest.mark.parametrize("address", ["10.0.0.5", "::ffff:10.0.0.5", "2001:db8::1", "fe80::1%eth0", ""])
@pytest.mark.parametrize("key", [None, "", "wrong", "the-ke", "the-key-\xfc"])
def test_others_without_the_right_key_are_refused(
    guarded: tuple[FlaskClient, ScriptedCore], address: str, key: str | None
) -> None:
    client, core = guarded
    headers = {} if key is None else {"X-Internal-API-Key": key}
    for method, path in (("POST", "/generate"), ("DELETE", "/generate/x"), ("GET", "/metrics"), ("GET", "/outputs/a")):
        answer = client.open(path, method=method, json=GOOD, headers=headers, environ_base={"REMOTE_ADDR": address})
        assert answer.status_code == 401, path
        assert body_of(answer)["status"] == "failed"
    assert core.jobs == []


def test_the_right_key_passes_from_anywhere_and_probes_need_none(guarded: tuple[FlaskClient, ScriptedCore]) -> None:
    far = {"REMOTE_ADDR": "203.0.113.9"}
    key = {"X-Internal-API-Key": "the-key"}
    assert guarded[0].post("/generate", json=GOOD, headers=key, environ_base=far).status_code == 200
    assert guarded[0].get("/hc", environ_base=far).status_code == 200


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP"])
def test_what_a_proxy_on_this_machine_passes_on_is_not_from_this_machine(
    guarded: tuple[FlaskClient, ScriptedCore], header: str
) -> None:
    assert guarded[0].post("/generate", json=GOOD, headers={header: "127.0.0.1"}).status_code == 401


def test_pages_of_other_sites_are_refused(client: FlaskClient, core: ScriptedCore) -> None:
    core.outcome = a_result()
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://localhost", 200)):
        answer = client.post("/generate", json=GOOD, headers={"Origin": origin})
        assert answer.status_code == status, origin


# -- cancelling, metrics, the document --------------------------------------------------------------------------------


def test_a_job_that_does_not_run_cannot_be_cancelled(client: FlaskClient) -> None:
    answer = client.delete("/generate/job-1")
    assert answer.status_code == 404
    assert body_of(answer)["status"] == "failed"


def test_metrics_and_the_document_are_served(client: FlaskClient) -> None:
    answer = client.get("/metrics")
    assert answer.content_type.startswith("text/plain; version=0.0.4")
    assert "musetalk_model_ready 1.0" in answer.text
    paths = body_of(client.get("/openapi.json"))["paths"]
    rules = {re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule) for rule in client.application.url_map.iter_rules()}
    assert set(paths) == rules


def test_answers_are_what_the_document_says(client: FlaskClient, core: ScriptedCore) -> None:
    def check(answer: TestResponse, schema: dict[str, object]) -> None:
        jsonschema.validate(body_of(answer), schema)

    check(client.get("/hc"), openapi.health_schema())
    core.outcome = a_result()
    check(client.post("/generate", json=GOOD), openapi.result_schema())
    check(client.post("/generate", json={}), openapi.failure_schema())
    for error in (UnavailableError("busy"), KeyError("x"), NoFaceError("none")):
        core.outcome = error
        check(client.post("/generate", json=GOOD), openapi.failure_schema())
    for method, path in (("GET", "/generate"), ("GET", "/nothing"), ("DELETE", "/generate/x")):
        check(client.open(path, method=method), openapi.failure_schema())
