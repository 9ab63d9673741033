"""The real server under Gunicorn, with tiny models: start, health, jobs over HTTP, refusals, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from musetalk import media
from tests.support.rendering import FACE, make_audio, make_source
from tests.support.server import OWN_COMMAND, START_LIMIT_S, Server, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "work" / "job-left-behind").mkdir(parents=True)
    (folder / "work" / "of-somebody-else").mkdir()
    server = Server(folder, tiny_models, command=OWN_COMMAND)
    make_source(folder / "media/source.mp4", 10)
    make_audio(folder / "media/audio.wav", 0.6)
    make_audio(folder / "media/long.wav", 8)
    try:
        server.wait_for(200)
        yield server
    finally:
        server.stop()


def test_health_names_the_model(server: Server) -> None:
    assert server.health() == (200, {"status": "ok", "model": "v15", "busy": False})


def test_a_job_comes_back_with_a_video_that_can_be_fetched(server: Server, tmp_path: Path) -> None:
    answer = server.post(server.job("first", params={"face_box": list(FACE), "guidance": 1}))
    body = answer.json()
    assert answer.status_code == 200, body
    assert body["status"] == "success"
    assert body["musetalk_job_id"] == "first"
    assert body["video"]["frames"] == 15
    assert set(body["metrics"]["stage_times"]) >= {"download", "validation", "inference", "upload"}
    assert any("guidance" in warning for warning in body["warnings"])
    name = body["output_url"].rsplit("/", 1)[1]
    video = requests.get(f"{server.url}/outputs/{name}", timeout=10)
    assert video.headers["Content-Type"] == "video/mp4"
    (tmp_path / "out.mp4").write_bytes(video.content)
    assert media.inspect_source(tmp_path / "out.mp4", media.MediaLimits()).n_frames == 15


def test_nothing_of_a_job_is_left_in_the_work_folder(server: Server) -> None:
    server.post(server.job("second"))
    server.post(server.job("third", video_url=(server.folder / "media/audio.wav").as_uri()))
    assert {path.name for path in (server.folder / "work").iterdir()} == {"of-somebody-else", ".lock"}


def test_bad_input_is_named_and_ours_stays_secret(server: Server) -> None:
    (server.folder / "media/page.mp4").write_text("<html>" + "not a video " * 200, encoding="utf-8")
    cases = {
        "video": server.job("bad", video_url=(server.folder / "media/page.mp4").as_uri()),
        "sound": server.job("bad", audio_url=(server.folder / "media/page.mp4").as_uri()),
        "missing": server.job("bad", video_url=(server.folder / "media/none.mp4").as_uri()),
        "outside": server.job("bad", video_url="file:///etc/passwd"),
        "loopback": server.job("bad", video_url=f"{server.url}/hc"),
        "box": server.job("bad", params={"face_box": [0, 0, 5, 5]}),
        "field": {"musetalk_job_id": "bad"},
    }
    for name, job in cases.items():
        answer = server.post(job)
        body = answer.json()
        assert answer.status_code == 422, f"{name}: {body}"
        assert body["error_type"] == "media_error", name
        assert body["retryable"] is False
        assert str(server.folder) not in answer.text, name
        assert "root:" not in answer.text
    assert not list((server.folder / "outputs").glob("bad*"))


def test_a_second_job_is_refused_at_once_and_health_answers_meanwhile(server: Server) -> None:
    answers: list[requests.Response] = []
    long_job = server.job("long", audio_url=(server.folder / "media/long.wav").as_uri())
    thread = threading.Thread(target=lambda: answers.append(server.post(long_job)))
    thread.start()
    try:
        while not server.health()[1]["busy"]:
            assert thread.is_alive()
        refused = server.post(server.job("other"))
        assert refused.status_code == 503
        assert refused.json()["retryable"] is True
        assert refused.headers["Retry-After"]
        assert server.health()[0] == 200
    finally:
        thread.join()
    assert answers[0].status_code == 200


def test_the_log_is_json_with_one_line_per_job(server: Server) -> None:
    server.post(server.job("logged"))
    entries = [json.loads(line) for line in server.log_text().splitlines() if line.startswith("{")]
    done = [entry for entry in entries if entry["message"] == "job_done" and entry.get("job_id") == "logged"]
    assert len(done) == 1
    assert done[0]["outcome"] == "succeeded"
    assert done[0]["stage_times"]["inference"] >= 0
    assert all("severity" in entry for entry in entries)


def test_a_start_without_weights_says_what_is_missing_and_takes_no_job(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    server = Server(tmp_path, tmp_path / "models", MUSETALK_MODEL="v15")
    try:
        limit = time.monotonic() + START_LIMIT_S
        server.wait_for(503)
        while server.health()[1]["status"] == "starting":
            assert time.monotonic() < limit
        body = server.health()[1]
        assert body["status"] == "failed"
        assert "musetalkV15/unet.pth" in body["reason"]
        assert "3,400,074,924 bytes" in body["reason"]
        assert server.post(server.job("early")).status_code == 503
    finally:
        server.stop()


def test_a_wrong_setting_stops_the_start_with_its_name(tmp_path: Path, tiny_models: Path) -> None:
    server = Server(tmp_path, tiny_models, BATCH_SIZE="many")
    assert server.process.wait(START_LIMIT_S) != 0
    server.stop()
    assert "BATCH_SIZE must be a whole number" in server.log_text()


def test_sigterm_lets_the_running_job_finish(tmp_path: Path, tiny_models: Path) -> None:
    server = Server(tmp_path, tiny_models)
    make_source(tmp_path / "media/source.mp4", 10)
    make_audio(tmp_path / "media/audio.wav", 4)
    try:
        server.wait_for(200)
        answers: list[requests.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.post(server.job("last"))))
        thread.start()
        while not server.health()[1]["busy"]:
            assert thread.is_alive()
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0].status_code == 200
        assert server.process.wait(30) == 0
        assert (tmp_path / "outputs/last.mp4").is_file()
    finally:
        server.stop()


def test_python_app_py_serves_jobs_and_the_page_and_says_that_it_claims_none(tmp_path: Path, tiny_models: Path) -> None:
    server = Server(tmp_path, tiny_models, command=[sys.executable, "app.py"], WORKER_MODE="buffer")
    make_source(tmp_path / "media/source.mp4", 10)
    make_audio(tmp_path / "media/audio.wav", 0.4)
    try:
        server.wait_for(200)
        page = requests.get(server.url, timeout=10)
        assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert server.post(server.job("local")).status_code == 200
        assert (tmp_path / "outputs/local.mp4").is_file()
        assert "python app.py claims no jobs" in server.log_text()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log_text()
    finally:
        server.stop()


def test_a_second_worker_in_the_same_work_folder_waits_and_leaves_the_running_job_alone(
    tmp_path: Path, tiny_models: Path
) -> None:
    first, folder = Server(tmp_path, tiny_models, faulty=True), tmp_path / "second"
    folder.mkdir()
    make_source(tmp_path / "media/source.mp4", 10)
    make_audio(tmp_path / "media/audio.wav", 0.4)
    servers = [first]
    try:
        first.wait_for(200)
        first.command("hold-inference")
        answers: list[requests.Response] = []
        thread = threading.Thread(target=lambda: answers.append(first.post(first.job("mine"))))
        thread.start()
        first.wait_held("inference")
        second = Server(folder, tiny_models, WORK_DIR=str(tmp_path / "work"))
        servers.append(second)
        wait_until(lambda: second.entries_starting("another worker uses WORK_DIR"))
        status, body = second.health()
        assert (status, body["status"]) == (503, "starting")
        assert "another worker uses WORK_DIR" in body["reason"]
        assert len(first.leftovers()) == 1
        first.release("hold-inference")
        thread.join()
        assert answers[0].status_code == 200
        first.stop()
        second.wait_for(200)
    finally:
        for server in servers:
            server.stop()


def test_sigterm_sent_to_every_process_several_times_ends_without_a_traceback(
    tmp_path: Path, tiny_models: Path
) -> None:
    """As `pkill gunicorn` does it: the worker gets the signal from outside and from its parent."""
    server = Server(tmp_path, tiny_models)
    try:
        server.wait_for(200)
        (worker,) = psutil.Process(server.process.pid).children()
        for _ in range(5):
            for process in (worker.pid, server.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log_text()
    finally:
        server.stop()


def test_both_address_families_are_served(tmp_path: Path, tiny_models: Path) -> None:
    server = Server(tmp_path, tiny_models, WORKER_HOST="::")
    try:
        server.wait_for(200)
        if socket.has_ipv6 and Path("/proc/net/if_inet6").is_file():
            port = server.url.rsplit(":", 1)[1]
            assert requests.get(f"http://[::1]:{port}/hc", timeout=10).status_code == 200
    finally:
        server.stop()
