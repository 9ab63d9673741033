"""Files sent in a form: taken only where the playground is on, within their limits, and gone when the request ends."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flask.testing import FlaskClient
from werkzeug.test import EnvironBuilder, TestResponse, run_wsgi_app

from app import create_app
from musetalk.errors import MediaError
from tests.support.scripted_core import ScriptedCore
from worker.job_control import JobProgress
from worker.jobs import Job, JobResult
from worker.readiness import Readiness
from worker.web import openapi
from worker.web.playground import MAX_UPLOADS


class ReadingCore(ScriptedCore):
    """Remembers what a job's files held while it ran."""

    def run_job(self, job: Job, **callbacks: Any) -> JobResult:
        assert job.files is not None
        self.held = [path.read_bytes() for path in job.files]
        self.paths = list(job.files)
        return super().run_job(job, **callbacks)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[FlaskClient, ReadingCore]]:
    def run(**environment: str) -> tuple[FlaskClient, ReadingCore]:
        core = ReadingCore(tmp_path, **{"PLAYGROUND": "1", **environment})
        core.outcome = MediaError("the run is scripted")
        return create_app(core=core).test_client(), core

    return run


def send(
    client: FlaskClient, *, source: bytes | None = b"picture", audio: bytes | None = b"sound", **fields: str
) -> TestResponse:
    data: dict[str, Any] = dict(fields)
    for name, content in (("source", source), ("audio", audio)):
        if content is not None:
            data[name] = (io.BytesIO(content), f"{name}.bin")
    return client.post("/generate", data=data, content_type="multipart/form-data")


def call(client: FlaskClient, environ: dict[str, Any]) -> tuple[int, Any]:
    """Status and decoded body for exactly this environment; the client would build one of its own."""
    body, status, _ = run_wsgi_app(client.application, environ, buffered=True)
    return int(status.split()[0]), json.loads(b"".join(body))


def failure(answer: TestResponse) -> Any:
    body = answer.get_json()
    jsonschema.validate(body, openapi.failure_schema())
    return body


def test_both_files_reach_the_job_and_are_gone_afterwards(make: Any, tmp_path: Path) -> None:
    client, core = make()
    answer = send(client, musetalk_job_id="mine", params=json.dumps({"extra_margin": 3}))
    assert failure(answer)["error_message"] == "the run is scripted"
    assert core.held == [b"picture", b"sound"]
    assert (core.jobs[0].job_id, core.jobs[0].params.extra_margin) == ("mine", 3)
    assert all(path.is_relative_to(tmp_path / "work") for path in core.paths)
    assert list((tmp_path / "work").iterdir()) == []


def test_a_form_without_an_id_gets_one(make: Any) -> None:
    client, core = make()
    send(client)
    send(client)
    assert len({job.job_id for job in core.jobs}) == 2


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"source": None}, "source"),
        ({"audio": None}, "audio"),
        ({"params": "{"}, "params"),
        ({"params": "[1]"}, "params"),
        ({"params": '{"extra_margin": -1}'}, "params.extra_margin"),
        ({"musetalk_job_id": "a\x00b"}, "musetalk_job_id"),
    ],
)
def test_a_wrong_part_is_named_and_nothing_stays(make: Any, tmp_path: Path, fields: dict[str, Any], field: str) -> None:
    client, core = make()
    answer = send(client, **fields)
    assert answer.status_code == 422
    assert failure(answer)["details"]["field"] == field
    assert core.jobs == []
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("name", ["source", "audio"])
def test_a_file_beyond_its_limit_is_named(make: Any, tmp_path: Path, name: str) -> None:
    client, core = make(MAX_VIDEO_BYTES="100", MAX_AUDIO_BYTES="100")
    files: dict[str, Any] = {name: b"x" * 101}
    answer = send(client, **files)
    assert answer.status_code == 413
    assert name in failure(answer)["error_message"]
    assert core.jobs == []
    assert list((tmp_path / "work").iterdir()) == []


def test_a_form_beyond_all_limits_is_refused_before_it_is_read(make: Any, tmp_path: Path) -> None:
    client, core = make(MAX_VIDEO_BYTES="100", MAX_AUDIO_BYTES="100")
    # Made by hand: the test client would spool it to a file of its own.
    head = b'--cut\r\nContent-Disposition: form-data; name="source"; filename="a.mp4"\r\n\r\n'
    body = head + b"x" * 2_000_000 + b"\r\n--cut--\r\n"
    answer = client.post("/generate", data=body, content_type="multipart/form-data; boundary=cut")
    assert answer.status_code == 413
    failure(answer)
    assert not (tmp_path / "work").exists()
    assert core.jobs == []


def test_a_busy_worker_says_so_before_it_takes_the_files(make: Any, tmp_path: Path) -> None:
    client, core = make()
    core.state = Readiness("busy", "v15")
    answer = send(client)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert "busy" in failure(answer)["error_message"]
    assert not (tmp_path / "work").exists()


def test_without_the_playground_there_is_no_page_and_no_upload(make: Any, tmp_path: Path) -> None:
    client, core = make(PLAYGROUND="0")
    assert client.get("/").status_code == 404
    assert client.get("/playground/main.js").status_code == 404
    answer = send(client)
    assert answer.status_code == 422
    assert failure(answer)["details"]["field"] == "body"
    assert core.jobs == []
    assert not (tmp_path / "work").exists()


def test_large_json_stays_refused_with_the_playground_on(make: Any) -> None:
    client, _ = make()
    answer = client.post("/generate", data=b'{"a": "' + b"x" * 11_000_000 + b'"}', content_type="application/json")
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "params", ["[" * 100_000, '{"a":' * 100_000, '{"box_smoothing": NaN}', '{"box_smoothing": 1e999}', "9" * 5000]
)
def test_parameters_that_no_parser_survives_are_refused_as_in_a_json_body(make: Any, params: str) -> None:
    """Deep nesting in a form was an unknown error."""
    client, core = make()
    answer = send(client, params=params)
    assert answer.status_code == 422
    assert failure(answer)["details"]["field"] == "params"
    assert core.jobs == []


def test_a_form_that_is_refused_is_answered_with_its_id(make: Any) -> None:
    client, _ = make(MAX_VIDEO_BYTES="100")
    for fields in ({"params": "{"}, {"source": b"x" * 101}):
        assert failure(send(client, musetalk_job_id="mine", **fields))["musetalk_job_id"] == "mine"


def test_an_upload_without_a_length_is_refused(make: Any, tmp_path: Path) -> None:
    client, core = make()
    head = b'--cut\r\nContent-Disposition: form-data; name="source"; filename="a.mp4"\r\n\r\nx\r\n--cut--\r\n'
    environ = EnvironBuilder("/generate", method="POST", data=head).get_environ()
    del environ["CONTENT_LENGTH"]
    environ.update({"CONTENT_TYPE": "multipart/form-data; boundary=cut", "wsgi.input_terminated": True})
    status, body = call(client, environ)
    assert status == 411
    assert "Content-Length" in body["error_message"]
    assert core.jobs == []
    assert not (tmp_path / "work").exists()


class SlowBody:
    """A body that begins to arrive, and continues when the test allows it."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)
        self.begun, self.may_continue = threading.Event(), threading.Event()

    def read(self, size: int = -1) -> bytes:
        self.begun.set()
        assert self.may_continue.wait(30)
        return self._content.read(size)


def test_a_third_upload_at_once_is_refused_before_it_is_received(make: Any, tmp_path: Path) -> None:
    """Ten unfinished uploads filled the disk."""
    client, _ = make()
    form = EnvironBuilder(method="POST", data={"source": (io.BytesIO(b"a"), "a"), "audio": (io.BytesIO(b"b"), "b")})
    whole = form.get_environ()
    body, kind = whole["wsgi.input"].read(), whole["CONTENT_TYPE"]
    slow = [SlowBody(body) for _ in range(MAX_UPLOADS)]
    answers: list[int] = []

    def upload(stream: SlowBody) -> None:
        environ = EnvironBuilder("/generate", method="POST", content_type=kind).get_environ()
        environ.update({"wsgi.input": stream, "CONTENT_LENGTH": str(len(body))})
        answers.append(call(client, environ)[0])

    threads = [threading.Thread(target=upload, args=(stream,)) for stream in slow]
    for thread, stream in zip(threads, slow, strict=True):
        thread.start()
        assert stream.begun.wait(10)
    refused = send(client)
    assert refused.status_code == 503
    assert "other uploads" in failure(refused)["error_message"]
    for stream in slow:
        stream.may_continue.set()
    for thread in threads:
        thread.join()
    assert answers == [422, 422]
    assert "scripted" in failure(send(client))["error_message"]
    assert list((tmp_path / "work").iterdir()) == []


def test_an_upload_that_the_disk_has_no_room_for_is_refused_before_it_is_received(make: Any, tmp_path: Path) -> None:
    free_mb = shutil.disk_usage(tmp_path).free // 2**20
    client, core = make(MIN_FREE_DISK_MB=str(free_mb + 100))
    answer = send(client)
    assert answer.status_code == 500
    assert "too little room" in failure(answer)["error_message"]
    assert failure(answer)["retryable"] is True
    assert list((tmp_path / "work").iterdir()) == []
    assert core.jobs == []


@pytest.mark.parametrize("path", ["/", "/playground/main.js", "/playground/page.css", "/playground/demo/avatar.mp4"])
def test_the_page_may_load_nothing_from_elsewhere(make: Any, path: str) -> None:
    client, _ = make(INTERNAL_API_KEY="secret-key")
    answer = client.get(path, environ_overrides={"REMOTE_ADDR": "203.0.113.9"}, buffered=True)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert b"secret-key" not in answer.data


@pytest.mark.parametrize("name", ["../app.py", "..%2fapp.py", "nothing.js", "demo/../../app.py"])
def test_only_the_pages_own_files_are_served(make: Any, name: str) -> None:
    client, _ = make()
    assert client.get(f"/playground/{name}").status_code == 404


def test_an_upload_from_elsewhere_needs_the_key(make: Any, tmp_path: Path) -> None:
    client, core = make(INTERNAL_API_KEY="secret-key")
    data = {"source": (io.BytesIO(b"a"), "a"), "audio": (io.BytesIO(b"b"), "b")}
    answer = client.post("/generate", data=data, environ_overrides={"REMOTE_ADDR": "203.0.113.9"})
    assert answer.status_code == 401
    assert core.jobs == []
    assert not (tmp_path / "work").exists()


def test_how_far_the_running_job_is(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, core = make()
    assert client.get("/generate/mine").status_code == 404
    monkeypatch.setattr(
        core, "progress_of", lambda job_id: JobProgress("inference", 8, 25) if job_id == "mine/1" else None
    )
    answer = client.get("/generate/mine/1")
    assert answer.get_json() == {"musetalk_job_id": "mine/1", "stage": "inference", "done": 8, "total": 25}
    assert client.get("/generate/other").status_code == 404
