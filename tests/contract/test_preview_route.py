"""`POST /preview`: the body of a job and a time, one picture, and the refusals of a job."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flask.testing import FlaskClient

from app import create_app
from musetalk.errors import MediaError, NoFaceError, UnavailableError
from tests.support.fake_orchestrator import FakeOrchestrator
from tests.support.results import a_preview
from tests.support.scripted_core import ScriptedCore
from worker.jobs import Job
from worker.readiness import Readiness
from worker.web import openapi

GOOD = {"musetalk_job_id": "p-1", "video_url": "sample:portrait", "audio_url": "sample:hello", "time_s": 1.5}
PICTURE = b"\xff\xd8\xff picture"


class PreviewingCore(ScriptedCore):
    """Remembers what was asked for; `problem` is raised instead of a picture."""

    problem: BaseException | None = None
    asked: list[tuple[Job, float, str]]

    def preview_job(self, job: Job, time_s: float, suffix: str = ".jpg") -> tuple[Any, bytes]:
        self.asked = [*getattr(self, "asked", []), (job, time_s, suffix)]
        if self.problem is not None:
            raise self.problem
        return a_preview(), PICTURE


@pytest.fixture
def core(tmp_path: Path) -> PreviewingCore:
    return PreviewingCore(tmp_path, PLAYGROUND="1")


@pytest.fixture
def client(core: PreviewingCore) -> Iterator[FlaskClient]:
    with create_app(core=core).test_client() as client:
        yield client


def test_one_picture_is_answered_with_its_stats(client: FlaskClient, core: PreviewingCore) -> None:
    answer = client.post("/preview", json=GOOD)
    assert (answer.status_code, answer.content_type, answer.data) == (200, "image/jpeg", PICTURE)
    assert json.loads(answer.headers["X-Preview"]) == {
        "frame": 37,
        "time_s": 1.48,
        "duration_sec": 9.56,
        "source_width": 64,
        "source_height": 48,
        "face_box": [1, 2, 3, 4],
        "model": "v15",
        "warnings": ["one thing"],
    }
    ((job, time_s, suffix),) = core.asked
    assert (job.job_id, job.audio_url, time_s, suffix) == ("p-1", "sample:hello", 1.5, ".jpg")


def test_png_is_sent_to_whoever_asks_for_it(client: FlaskClient, core: PreviewingCore) -> None:
    for accepted, kind in (("image/png", "image/png"), ("image/*", "image/jpeg"), ("*/*", "image/jpeg")):
        answer = client.post("/preview", json=GOOD, headers={"Accept": accepted})
        assert answer.content_type == kind
    assert core.asked[0][2] == ".png"


def test_without_a_speech_the_source_is_shown(client: FlaskClient, core: PreviewingCore) -> None:
    assert client.post("/preview", json={"musetalk_job_id": "p", "video_url": "sample:photo"}).status_code == 200
    ((job, time_s, _),) = core.asked
    assert (job.audio_url, job.params.silence, time_s) == ("", "source", 0.0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"time_s": -1}, "time_s"),
        ({"time_s": True}, "time_s"),
        ({"time_s": "1"}, "time_s"),
        ({"time_s": 1e9}, "time_s"),
        ({"video_url": None}, "video_url"),
        ({"audio_url": 7}, "audio_url"),
        ({"musetalk_job_id": ""}, "musetalk_job_id"),
        ({"params": {"loop_mode": "sideways"}}, "params.loop_mode"),
    ],
)
def test_a_wrong_field_is_named(client: FlaskClient, core: PreviewingCore, changes: dict[str, Any], field: str) -> None:
    answer = client.post("/preview", json={**GOOD, **changes})
    assert answer.status_code == 422
    jsonschema.validate(answer.get_json(), openapi.failure_schema())
    assert answer.get_json()["details"]["field"] == field
    assert not hasattr(core, "asked")


def test_a_body_that_is_no_object_is_refused(client: FlaskClient) -> None:
    for data in (b"", b"[]", b"null", b"{", b'{"time_s": NaN}'):
        answer = client.post("/preview", data=data)
        assert answer.status_code == 422
        assert answer.get_json()["details"]["field"] == "body"


@pytest.mark.parametrize(
    ("problem", "status"),
    [(NoFaceError("no face"), 422), (MediaError("bad"), 422), (UnavailableError("busy"), 503), (KeyError("/x"), 500)],
)
def test_errors_are_those_of_a_job(
    client: FlaskClient, core: PreviewingCore, problem: BaseException, status: int
) -> None:
    core.problem = problem
    answer = client.post("/preview", json=GOOD)
    body = answer.get_json()
    assert answer.status_code == status
    jsonschema.validate(body, openapi.failure_schema())
    assert body["musetalk_job_id"] == "p-1"
    assert ("Retry-After" in answer.headers) == (status == 503)


@pytest.mark.parametrize("state", ["busy", "draining", "failed"])
def test_a_worker_that_cannot_draw_refuses_at_once(client: FlaskClient, core: PreviewingCore, state: Any) -> None:
    core.state = Readiness(state, "v15", "the reason")
    answer = client.post("/preview", json=GOOD)
    assert answer.status_code == 503
    assert answer.get_json()["retryable"] is True
    assert answer.headers["Retry-After"]
    assert not hasattr(core, "asked")


def test_a_preview_with_files_is_a_form(client: FlaskClient, core: PreviewingCore, tmp_path: Path) -> None:
    files = {"source": (io.BytesIO(b"picture"), "a.mp4"), "audio": (io.BytesIO(b"sound"), "b.wav")}
    answer = client.post("/preview", data={**files, "time_s": "0.5", "params": '{"extra_margin": 3}'})
    assert answer.status_code == 200
    ((job, time_s, _),) = core.asked
    assert job.files is not None
    assert (job.params.extra_margin, time_s) == (3, 0.5)
    assert list((tmp_path / "work").iterdir()) == []
    for text in ("soon", "nan", "-1"):
        files = {"source": (io.BytesIO(b"picture"), "a.mp4"), "audio": (io.BytesIO(b"sound"), "b.wav")}
        answer = client.post("/preview", data={**files, "time_s": text})
        assert answer.get_json()["details"]["field"] == "time_s"


def test_the_key_and_the_origin_are_checked_as_for_a_job(tmp_path: Path) -> None:
    core = PreviewingCore(tmp_path, INTERNAL_API_KEY="right")  # pragma: allowlist secret
    with create_app(core=core).test_client() as client:
        elsewhere = {"REMOTE_ADDR": "203.0.113.9"}
        assert client.post("/preview", json=GOOD, environ_overrides=elsewhere).status_code == 401
        with_key = {"X-Internal-API-Key": "right"}
        assert client.post("/preview", json=GOOD, environ_overrides=elsewhere, headers=with_key).status_code == 200
        assert client.post("/preview", json=GOOD, headers={"Origin": "https://evil.example"}).status_code == 403
        assert client.post("/preview", json=GOOD, headers={"Host": "evil.example"}).status_code == 403


def test_a_refused_preview_is_reported_to_nobody(tmp_path: Path) -> None:
    """The orchestrator would take it for the outcome of a job."""
    with FakeOrchestrator() as orchestrator:
        core = PreviewingCore(tmp_path, ORCHESTRATOR_BASE_URL=orchestrator.url, INTERNAL_API_KEY="key")
        with create_app(core=core).test_client() as client:
            assert client.post("/preview", json={**GOOD, "params": []}).status_code == 422
            assert client.post("/preview", json=GOOD).status_code == 200
        assert orchestrator.calls == []


def test_the_document_describes_the_body() -> None:
    jsonschema.validate(GOOD, openapi.preview_schema())
    jsonschema.validate({"musetalk_job_id": "p", "video_url": "sample:photo"}, openapi.preview_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**GOOD, "time_s": -1}, openapi.preview_schema())
