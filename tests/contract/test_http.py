"""What a caller of the HTTP server sees: statuses and bodies of the protocol, always JSON, never a trace of ours."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder, TestResponse

from app import create_app
from musetalk.errors import MediaError, NoFaceError, OutOfMemoryError, ShutdownError, UnavailableError
from tests.support.fake_orchestrator import FakeOrchestrator
from tests.support.results import a_result
from tests.support.scripted_core import ScriptedCore
from worker.readiness import Readiness, State
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


def test_the_health_says_how_to_replace_the_demo_model(client: FlaskClient, core: ScriptedCore) -> None:
    assert "notice" not in body_of(client.get("/hc"))
    core.state = Readiness("ready", "demo")
    assert "musetalk.weights fetch" in body_of(client.get("/hc"))["notice"]


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
    [
        ("GET", "/generate", 405),
        ("POST", "/hc", 405),
        ("GET", "/nothing", 404),
        ("GET", "/outputs/none.mp4", 404),
        ("GET", "/generate/none", 404),
        ("DELETE", "/generate/none", 404),
    ],
)
def test_http_errors_are_json_with_a_type_of_their_own(
    client: FlaskClient, method: str, path: str, status: int
) -> None:
    answer = client.open(path, method=method)
    assert answer.status_code == status
    assert body_of(answer)["status"] == "failed"
    assert body_of(answer)["error_type"] == {404: "not_found", 405: "method_not_allowed"}[status]
    assert body_of(answer)["retryable"] is False
    if status == 405:
        assert answer.headers["Allow"]


def test_a_body_that_is_too_large_is_refused(client: FlaskClient, core: ScriptedCore) -> None:
    answer = client.post("/generate", data=b" " * (core.settings.max_body_bytes + 1))
    assert answer.status_code == 413
    assert body_of(answer)["status"] == "failed"
    assert "musetalk_job_id" not in body_of(answer)


@pytest.mark.parametrize("has_length", [True, False])
def test_a_body_that_is_too_large_is_answered_with_its_id(client: FlaskClient, has_length: bool) -> None:
    """For the queue this answer is the job's result, so it must say whose."""
    body = json.dumps({**GOOD, "musetalk_job_id": 'a "job" ü', "extra": "x" * 11_000_000}).encode()
    environ = EnvironBuilder("/generate", method="POST", data=body).get_environ()
    if not has_length:
        # As Gunicorn presents a chunked body.
        del environ["CONTENT_LENGTH"]
        environ["wsgi.input_terminated"] = True
    answer = client.open(environ)
    assert answer.status_code == 413
    assert body_of(answer)["musetalk_job_id"] == 'a "job" ü'
    assert "MAX_BODY_BYTES" in body_of(answer)["error_message"]


def test_a_body_of_ten_megabytes_is_accepted(client: FlaskClient, core: ScriptedCore) -> None:
    assert client.post("/generate", json={**GOOD, "extra": "x" * 10_000_000}).status_code == 200
    assert len(core.jobs) == 1


# -- reports about requests that are refused --------------------------------------------------------------------------


@pytest.fixture
def reporting(tmp_path: Path) -> Iterator[tuple[FlaskClient, FakeOrchestrator]]:
    """A worker with an orchestrator."""
    with FakeOrchestrator() as orchestrator:
        core = ScriptedCore(tmp_path, ORCHESTRATOR_BASE_URL=orchestrator.url, INTERNAL_API_KEY="key", PLAYGROUND="1")
        with create_app(core=core).test_client() as client:
            yield client, orchestrator


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"audio_url": None}, 422),
        ({"video_url": "no address"}, 422),
        ({"params": {"batch_size": "many"}}, 422),
        ({"params": []}, 422),
        ({"extra": "x" * 11_000_000}, 413),
    ],
)
def test_a_refused_request_with_an_id_is_reported_as_failed(
    reporting: tuple[FlaskClient, FakeOrchestrator], fields: dict[str, Any], status: int
) -> None:
    """For the queue the job is done, and the orchestrator waited for it."""
    client, orchestrator = reporting
    answer = client.post("/generate", json={**GOOD, **fields})
    assert answer.status_code == status
    orchestrator.wait_for(lambda: orchestrator.of("progress", "job-1"))
    (report,) = orchestrator.of("progress", "job-1")
    assert (report.body["status"], report.body["phase"]) == ("failed", "failed")
    assert body_of(answer)["error_message"] in report.body["error"]


@pytest.mark.parametrize("job_id", [None, 7, "", " ", ".", "..", "a\x00b", "x" * 300])
def test_a_refused_request_without_a_usable_id_is_reported_to_nobody(
    reporting: tuple[FlaskClient, FakeOrchestrator], job_id: Any
) -> None:
    client, orchestrator = reporting
    answer = client.post("/generate", json={"musetalk_job_id": job_id})
    assert answer.status_code == 422
    assert orchestrator.calls == []


def test_no_answer_waits_for_an_orchestrator_that_is_silent(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        core = ScriptedCore(tmp_path, ORCHESTRATOR_BASE_URL=url, INTERNAL_API_KEY="key")
        with create_app(core=core).test_client() as client:
            for body, status in (({"musetalk_job_id": "job-1"}, 422), (GOOD, 200)):
                begun = time.monotonic()
                assert client.post("/generate", json=body).status_code == status
                assert time.monotonic() - begun < 4


# -- requests that wait instead of being refused ----------------------------------------------------------------------


class Posted(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, core: ScriptedCore, body: Any = GOOD, **headers: str) -> None:
        super().__init__(daemon=True)
        self._client, self._body, self._headers = create_app(core=core).test_client(), body, headers
        self._answer: TestResponse | None = None
        self.start()

    def run(self) -> None:
        self._answer = self._client.post("/generate", json=self._body, headers=self._headers)

    def status(self, limit_s: float = 10) -> int | None:
        """Status of the answer; None when there is none within the limit."""
        self.join(limit_s)
        return self._answer.status_code if self._answer is not None else None


@pytest.mark.parametrize(("then", "status"), [("ready", 200), ("busy", 503), ("failed", 503)])
def test_a_job_that_arrives_while_the_models_load_waits_for_them(core: ScriptedCore, then: Any, status: int) -> None:
    """Each 503 cost the job one of its four attempts, and all were gone in a second."""
    core.state = Readiness("starting", None, "the models are loading")
    core.outcome = a_result() if then == "ready" else UnavailableError("not now", state=then)
    posted = Posted(core)
    assert posted.status(0.5) is None
    assert core.jobs == []
    core.state = Readiness(then, "v15")
    assert posted.status() == status


def test_a_wrong_job_is_refused_at_once_also_while_the_models_load(core: ScriptedCore) -> None:
    core.state = Readiness("starting", None, "the models are loading")
    posted = Posted(core, {})
    assert posted.status() == 422


def test_the_wait_for_the_models_has_a_limit(tmp_path: Path) -> None:
    for limit in ("0", "0.3"):
        core = ScriptedCore(tmp_path, START_WAIT_SEC=limit)
        core.state = Readiness("starting", None, "the models are loading")
        core.outcome = UnavailableError("the models are loading", state="starting")
        posted = Posted(core)
        assert posted.status() == 503


def test_a_job_that_arrives_while_the_worker_stops_gets_no_answer(core: ScriptedCore) -> None:
    core.status.drain()
    states: tuple[State, ...] = ("draining", "failed")
    for state in states:
        core.state = Readiness(state, "v15", "the reason")
        assert Posted(core).status(0.5) is None
    assert core.jobs == []


def test_a_job_of_the_queue_that_the_stop_interrupted_gets_no_answer(core: ScriptedCore) -> None:
    """Salad's queue sent the refused job to the same worker again at once, and counted another attempt."""
    core.outcome = ShutdownError("the worker shut down before the job was finished")
    from_queue, from_other = Posted(core, **{"Salad-Job-Id": "q-1"}), Posted(core)
    assert from_other.status() == 503
    assert from_queue.status(0.5) is None


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
        assert body_of(answer)["error_type"] == "unauthorized"
        assert "X-Internal-API-Key" in body_of(answer)["error_message"]
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


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "https://a]b", "", "//", "http://ℂ.example\u2100"])
def test_an_origin_that_is_no_address_is_refused_without_a_trace(
    guarded: tuple[FlaskClient, ScriptedCore], origin: str
) -> None:
    """Seen as 500 with a stack trace, before the key was asked for."""
    for address in ("127.0.0.1", "203.0.113.9"):
        headers = {"Origin": origin.encode("utf-8").decode("latin-1")}
        answer = guarded[0].post("/generate", json=GOOD, headers=headers, environ_base={"REMOTE_ADDR": address})
        assert answer.status_code == 403
        assert "stack_trace" not in body_of(answer)
    assert guarded[1].jobs == []


REBOUND = [
    *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "2130706433", "a b", ""),
]


@pytest.mark.parametrize("host", REBOUND)
@pytest.mark.parametrize("with_key", [False, True])
def test_a_page_whose_name_leads_to_this_machine_is_refused(tmp_path: Path, host: str, with_key: bool) -> None:
    """DNS rebinding: the page is local, its Origin is its Host, and it could post jobs and read the metrics."""
    core = ScriptedCore(tmp_path, **({"INTERNAL_API_KEY": "the-key"} if with_key else {}))
    with create_app(core=core).test_client() as client:
        for method, path in (
            ("POST", "/generate"),
            ("GET", "/metrics"),
            ("DELETE", "/generate/x"),
            ("GET", "/nothing"),
        ):
            headers = {"Host": host, "Origin": f"http://{host}"}
            for given in (headers, {"Host": host}):
                answer = client.open(path, method=method, json=GOOD, headers=given)
                assert answer.status_code == 403, (path, host)
        assert client.get("/hc", headers={"Host": host}).status_code == 200
    assert core.jobs == []


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "localhost.",
        "127.0.0.1:8000",
        "[::1]:8000",
        "192.168.1.7",
        "worker.lan",
        "a.b.lan",
    ],
)
def test_names_of_this_machine_and_those_of_the_setting_are_known(tmp_path: Path, host: str) -> None:
    core = ScriptedCore(tmp_path, ALLOWED_HOSTS="worker.lan, *.b.lan", PUBLIC_BASE_URL="https://videos.example/x")
    with create_app(core=core).test_client() as client:
        for name in (host, socket.gethostname(), "videos.example"):
            assert client.post("/generate", json=GOOD, headers={"Host": name}).status_code == 200


def test_the_right_key_passes_under_every_name(guarded: tuple[FlaskClient, ScriptedCore]) -> None:
    headers = {"Host": "proxy.example", "X-Internal-API-Key": "the-key"}
    assert guarded[0].post("/generate", json=GOOD, headers=headers).status_code == 200
    assert guarded[0].post("/generate", json=GOOD, headers={**headers, "X-Internal-API-Key": "x"}).status_code == 403


def test_only_callers_who_are_known_get_a_trace(tmp_path: Path) -> None:
    core = ScriptedCore(tmp_path)
    core.outcome = KeyError("x")
    with create_app(core=core).test_client() as client:
        assert "stack_trace" in body_of(client.post("/generate", json=GOOD))
        far = client.post("/generate", json=GOOD, environ_base={"REMOTE_ADDR": "203.0.113.9"})
        assert (far.status_code, "stack_trace" in body_of(far)) == (500, False)


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
    # Not part of the interface for programs: the reference page. Served with PLAYGROUND=1 only: what the page keeps.
    reference = {"/docs", "/docs/{name}", "/openapi-orchestrator.json"}
    kept = {"/uploads", "/results", "/results/{name}"}
    assert kept <= set(paths)
    assert set(paths) - kept == rules - reference


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
