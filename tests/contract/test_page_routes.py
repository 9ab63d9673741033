"""Routes of the page: state and outcomes, options, uploads that are kept, results that survive a restart."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from app import create_app
from musetalk.errors import MediaError
from tests.support.clips import write_clip
from tests.support.results import a_result
from tests.support.scripted_core import ScriptedCore
from worker import own_files
from worker.inputs import fetch_inputs
from worker.job_control import JobProgress, RunningNow
from worker.jobs import Job
from worker.own_files import SAMPLES, SAMPLES_DIR, OwnFiles
from worker.readiness import Readiness

GOOD = {"musetalk_job_id": "job-1", "video_url": "sample:portrait", "audio_url": "sample:hello"}
SIDECAR = {
    "musetalk_job_id": "job-1",
    "model": "demo",
    "params": {"box_smoothing": 2.0},
    "stage_times": {"inference": 2.0},
    "video": {"width": 64, "height": 48, "fps": 25.0, "frames": 5, "duration_sec": 0.2},
    "warnings": [],
    "create_time_utc": "2026-11-27T10:00:00+00:00",
    "size_bytes": 10,
}

Make = Callable[..., tuple[FlaskClient, ScriptedCore]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def run(**environment: str) -> tuple[FlaskClient, ScriptedCore]:
        core = ScriptedCore(tmp_path, **{"PLAYGROUND": "1", **environment})
        return create_app(core=core).test_client(), core

    return run


def store(folder: Path, name: str, age_s: float = 0, **changes: Any) -> None:
    """A finished video and its JSON, as the local store writes them."""
    folder.mkdir(exist_ok=True)
    write_clip(folder / f"{name}.mp4", 3, size=(48, 64))
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**SIDECAR, "musetalk_job_id": name, **changes}), encoding="utf-8")
    os.utime(path, (1e9 - age_s, 1e9 - age_s))


# -- the state --


def test_the_state_shows_the_running_job_and_its_outcome_later(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    client, core = make()
    assert client.get("/playground/status").get_json()["job"] is None
    core.state = Readiness("busy", "v15")
    monkeypatch.setattr(core, "running_now", lambda: RunningNow("job-1", JobProgress("inference", 3, 25), 1.234))
    body = client.get("/playground/status?job=job-1").get_json()
    assert body["job"] == {
        "musetalk_job_id": "job-1",
        "elapsed_sec": 1.23,
        "stage": "inference",
        "done": 3,
        "total": 25,
    }
    assert (body["state"], body["outcome"]) == ("busy", None)
    core.state = Readiness("ready", "v15")
    core.outcome = a_result()
    assert client.post("/generate", json=GOOD).status_code == 200
    outcome = client.get("/playground/status?job=job-1").get_json()["outcome"]
    assert (outcome["status_code"], outcome["body"]["status"]) == (200, "success")
    core.outcome = MediaError("no sound")
    client.post("/generate", json={**GOOD, "musetalk_job_id": "job-2"})
    outcome = client.get("/playground/status?job=job-2").get_json()["outcome"]
    assert (outcome["status_code"], outcome["body"]["error_message"]) == (422, "no sound")
    assert client.get("/playground/status?job=other").get_json()["outcome"] is None


def test_options_have_their_schema_and_the_samples(make: Make) -> None:
    client, _ = make()
    body = client.get("/playground/options").get_json()
    assert body["params"]["extra_margin"]["maximum"] == 200
    assert {sample["name"] for sample in body["samples"]} >= {"portrait", "hello", "short"}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_every_sample_and_its_picture_ship(make: Make, sample: own_files.Sample) -> None:
    client, _ = make()
    for name in (sample.file, sample.picture):
        answer = client.get(f"/playground/demo/{name}", buffered=True)
        assert answer.status_code == 200
        assert len(answer.data) < 200_000
    assert OwnFiles(Path("nowhere")).find(f"sample:{sample.name}", "video_url") == SAMPLES_DIR / sample.file


# -- uploads --


def upload(client: FlaskClient, **files: bytes) -> Any:
    data = {name: (io.BytesIO(content), f"{name}.bin") for name, content in files.items()}
    return client.post("/uploads", data=data, content_type="multipart/form-data")


def test_an_upload_serves_several_jobs(make: Make, tmp_path: Path) -> None:
    client, core = make()
    answer = upload(client, source=b"p" * 2000, audio=b"s" * 2000)
    assert answer.status_code == 201
    kept = answer.get_json()
    assert set(kept) == {"video_url", "audio_url"}
    for number in (1, 2):
        folder = tmp_path / f"job-{number}"
        folder.mkdir()
        files = fetch_inputs(Job("j", kept["video_url"], kept["audio_url"]), folder, core.settings, lambda: False)
        assert files.source.read_bytes() == b"p" * 2000
        assert files.audio.read_bytes() == b"s" * 2000
        assert files.n_bytes == {"video_url": 2000, "audio_url": 2000}
    name = kept["video_url"].removeprefix("upload:")
    answer = client.get(f"/uploads/{name}", buffered=True)
    assert answer.data == b"p" * 2000
    assert answer.content_type == "application/octet-stream"
    assert answer.headers["Content-Disposition"].startswith("attachment")


@pytest.mark.parametrize("url", ["upload:", "upload:../../etc", "upload:" + "0" * 32, "sample:nothing", "sample:../x"])
def test_an_address_of_no_file_is_caused_by_the_input(make: Make, tmp_path: Path, url: str) -> None:
    _, core = make()
    with pytest.raises(MediaError) as caught:
        fetch_inputs(Job("j", url, "sample:hello"), tmp_path, core.settings, lambda: False)
    assert caught.value.details["field"] == "video_url"


@pytest.mark.parametrize("name", ["0" * 32, "x", "..%2f..%2fetc%2fpasswd"])
def test_no_other_file_is_served_as_an_upload(make: Make, name: str) -> None:
    client, _ = make()
    assert client.get(f"/uploads/{name}").status_code == 404


def test_a_form_without_a_file_or_with_a_large_one_leaves_nothing(make: Make, tmp_path: Path) -> None:
    client, _ = make(MAX_VIDEO_BYTES="100", MAX_AUDIO_BYTES="100")
    assert upload(client, other=b"x").status_code == 422
    assert upload(client, source=b"x" * 101).status_code == 413
    assert list((tmp_path / "work").iterdir()) == []


def test_old_and_surplus_uploads_are_removed(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = make(MAX_VIDEO_BYTES="1000", MAX_AUDIO_BYTES="1000")
    kept = [upload(client, source=b"x" * 600).get_json()["video_url"] for _ in range(3)]
    for age, url in enumerate(reversed(kept)):
        folder = tmp_path / "work" / f"job-kept-{url.removeprefix('upload:')}"
        os.utime(folder, (os.stat(folder).st_mtime - age,) * 2)
    upload(client, source=b"y" * 600)
    # Two thousand bytes at most, the newest first.
    assert len(list((tmp_path / "work").iterdir())) == 3
    monkeypatch.setattr(own_files, "KEPT_S", -1.0)
    OwnFiles(tmp_path / "work").prune(2000)
    assert list((tmp_path / "work").iterdir()) == []


def test_an_upload_that_was_used_is_removed_an_hour_after_that_and_all_share_one_timer(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_files, "KEPT_S", 0.3)
    client, _ = make()
    n_before = sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    for _ in range(3):
        url = upload(client, source=b"x" * 600).get_json()["video_url"]
    assert sum(isinstance(thread, threading.Timer) for thread in threading.enumerate()) <= n_before + 1
    # Used later than the others: their turn comes first, then its own.
    folder = tmp_path / "work" / f"job-kept-{url.removeprefix('upload:')}"
    os.utime(folder, (time.time() + 1,) * 2)
    deadline = time.monotonic() + 20
    while list((tmp_path / "work").iterdir()):
        assert time.monotonic() < deadline, "an upload stays for good"
        time.sleep(0.05)


# -- results --


def test_results_are_listed_from_their_files_after_a_restart(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    for number in range(14):
        store(folder, f"job-{number:02d}", age_s=number)
    (folder / "broken.json").write_text("{", encoding="utf-8")
    (folder / "broken.mp4").write_bytes(b"x")
    (folder / "alone.json").write_text(json.dumps(SIDECAR), encoding="utf-8")
    client, _ = make()
    results = client.get("/results").get_json()["results"]
    assert [result["name"] for result in results] == [f"job-{number:02d}.mp4" for number in range(12)]
    assert results[0]["path"] == "/outputs/job-00.mp4"
    assert results[0]["params"] == {"box_smoothing": 2.0}
    assert str(tmp_path) not in json.dumps(results)
    assert client.get(results[0]["path"], buffered=True).status_code == 200


def test_a_result_has_a_small_picture_and_can_be_deleted(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    store(folder, "job-1")
    client, _ = make()
    before = client.get("/playground/status").get_json()["results"]
    picture = client.get("/results/job-1.mp4/thumbnail")
    assert (picture.status_code, picture.content_type) == (200, "image/jpeg")
    assert picture.data.startswith(b"\xff\xd8")
    assert len(picture.data) < 20_000
    assert client.delete("/results/job-1.mp4").get_json() == {"status": "deleted", "name": "job-1.mp4"}
    assert list(folder.iterdir()) == []
    assert client.delete("/results/job-1.mp4").status_code == 404
    assert client.get("/playground/status").get_json()["results"] != before


@pytest.mark.parametrize("name", ["..%2fapp.mp4", "job-1", "job-1.json", "%2fetc%2fpasswd", "..", "a%00.mp4"])
def test_no_other_file_can_be_deleted(make: Make, tmp_path: Path, name: str) -> None:
    store(tmp_path / "outputs", "job-1")
    (tmp_path / "app.mp4").write_bytes(b"x")
    (tmp_path / "app.json").write_text("{}", encoding="utf-8")
    client, _ = make()
    assert client.delete(f"/results/{name}").status_code in (404, 405)
    assert client.get(f"/results/{name}/thumbnail").status_code == 404
    assert (tmp_path / "app.mp4").exists()
    assert len(list((tmp_path / "outputs").iterdir())) == 2


# -- guards --

_ROUTES = [
    ("GET", "/playground/status"),
    ("GET", "/playground/options"),
    ("POST", "/uploads"),
    ("GET", "/uploads/x"),
    ("GET", "/results"),
    ("DELETE", "/results/x.mp4"),
    ("GET", "/results/x.mp4/thumbnail"),
]


@pytest.mark.parametrize(("method", "path"), _ROUTES)
def test_a_caller_from_elsewhere_needs_the_key(make: Make, method: str, path: str) -> None:
    client, _ = make(INTERNAL_API_KEY="right")
    elsewhere = {"REMOTE_ADDR": "203.0.113.9"}
    assert client.open(path, method=method, environ_overrides=elsewhere).status_code == 401
    foreign = {"Origin": "https://evil.example"}
    assert client.open(path, method=method, headers=foreign).status_code == 403


@pytest.mark.parametrize(("method", "path"), _ROUTES)
def test_without_the_page_they_do_not_exist(make: Make, method: str, path: str) -> None:
    client, _ = make(PLAYGROUND="0")
    assert client.open(path, method=method).status_code == 404


# -- the reference --


@pytest.mark.parametrize("path", ["/docs", "/docs/docs.js", "/docs/docs.css", "/docs/swagger-ui.css"])
def test_the_reference_is_open_and_loads_nothing_from_elsewhere(make: Make, path: str) -> None:
    client, _ = make(INTERNAL_API_KEY="right", PLAYGROUND="0")
    answer = client.get(path, environ_overrides={"REMOTE_ADDR": "203.0.113.9"}, buffered=True)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "http" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_its_documents_need_the_key_and_no_other_file_is_served(make: Make) -> None:
    client, _ = make(INTERNAL_API_KEY="right")
    for path in ("/openapi.json", "/openapi-orchestrator.json"):
        assert client.get(path).get_json()["openapi"] == "3.1.0"
        assert client.get(path, environ_overrides={"REMOTE_ADDR": "203.0.113.9"}).status_code == 401
    for name in ("docs.html", "LICENSE", "..%2fapp.py", "swagger-ui.js"):
        assert client.get(f"/docs/{name}").status_code == 404
