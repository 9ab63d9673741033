"""The README's way to try buffer mode: orchestrator, worker and command as three processes."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from examples.orchestrator import Jobs
from tests.support.rendering import make_audio, make_source
from tests.support.server import ROOT, Server, wait_until

KEY = "key-of-this-test"
PROGRAM = [sys.executable, str(ROOT / "examples/orchestrator.py")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("orchestrator")
    with (folder / "log.txt").open("wb") as log, socket.create_server(("127.0.0.1", 0)) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        process = subprocess.Popen(
            [*PROGRAM, "serve", "--port", str(port), "--folder", str(folder)],
            # Werkzeug takes the listening socket from the two last variables.
            env={
                **os.environ,
                "INTERNAL_API_KEY": KEY,
                "WERKZEUG_RUN_MAIN": "true",
                "WERKZEUG_SERVER_FD": str(number),
            },
            pass_fds=(number,),
            stdout=log,
            stderr=log,
        )
        listener.close()
        address = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                return requests.get(f"{address}/health", timeout=2).ok
            except (requests.ConnectionError, requests.ReadTimeout):
                return False

        try:
            wait_until(answers)
            yield address
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def worker(url: str, tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("worker")
    (folder / "media").mkdir()
    make_source(folder / "media/face.mp4", 10)
    make_audio(folder / "media/speech.wav", 0.6)
    make_audio(folder / "media/long.wav", 20)
    server = Server(
        folder,
        tiny_models,
        WORKER_MODE="buffer",
        WORKER_ID="worker 1/ü",
        ORCHESTRATOR_BASE_URL=url,
        INTERNAL_API_KEY=KEY,
        ALLOW_PRIVATE_NETWORKS="1",
        BUFFER_POLL_INTERVAL_SEC="0.2",
    )
    try:
        yield server
    finally:
        server.stop()


def command(url: str, *arguments: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "INTERNAL_API_KEY": key, "ORCHESTRATOR_BASE_URL": url}
    return subprocess.run(
        [*PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_submitted_job_is_watched_to_its_end(url: str, worker: Server) -> None:
    media = worker.folder / "media"
    box = f"face_box={list(worker.face_box)}"
    done = command(url, "submit", str(media / "face.mp4"), str(media / "speech.wav"), "--param", box)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(".mp4")
    name = done.stdout.strip().rsplit("/", 1)[1]
    assert (worker.folder / "outputs" / name).is_file()
    listed = command(url, "list").stdout
    assert "worker worker 1/ü: idle" in listed
    assert "succeeded" in listed


def test_a_job_that_cannot_be_run_says_why(url: str, worker: Server) -> None:
    media = worker.folder / "media"
    failed = command(url, "submit", str(media / "speech.wav"), str(media / "speech.wav"))
    assert failed.returncode == 1
    assert "media_error at validation" in failed.stderr


def test_a_cancelled_claim_stops_within_a_heartbeat(url: str, worker: Server) -> None:
    media = worker.folder / "media"
    box = f"face_box={list(worker.face_box)}"
    submitted = command(url, "submit", "--no-watch", str(media / "face.mp4"), str(media / "long.wav"), "--param", box)
    job = submitted.stderr.split()[1]

    def state() -> Any:
        return requests.get(f"{url}/jobs/{job}", headers={"X-Internal-API-Key": KEY}, timeout=10).json()

    wait_until(lambda: state()["phase"] == "inferring")
    assert command(url, "cancel", job).returncode == 0
    wait_until(lambda: state()["state"] == "cancelled")
    assert "cancelled" in state()["error"]
    wait_until(lambda: worker.leftovers() == [])


def test_mistakes_are_answered_with_their_reason(url: str) -> None:
    assert "wrong key" in command(url, "list", key="another").stderr
    assert "INTERNAL_API_KEY" in command(url, "list", key="").stderr
    assert "no file" in command(url, "submit", "nothing.mp4", "nothing.wav").stderr
    assert "no orchestrator" in command("http://127.0.0.1:9", "list").stderr


def test_a_silent_workers_job_is_handed_out_again_until_it_was_tried_often_enough(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "jobs.sqlite")
    job_id = jobs.add({"musetalk_job_id": "m", "video_url": "x", "audio_url": "y"})
    for attempt in range(1, 5):
        claimed = jobs.claim(f"w{attempt}")
        assert claimed is not None, attempt
        assert claimed["buffer_job_id"] == job_id
        jobs.heard(f"w{attempt}", "busy", None, None)
        assert jobs.claim("other") is None
        with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as database, database:
            database.execute("UPDATE workers SET seen = ?", (time.time() - 31,))
    assert jobs.claim("w5") is None
    job = jobs.get(job_id)
    assert job is not None
    assert job["state"] == "failed"
    # The first worker returns after all: its success is refused, the second time as well.
    assert jobs.ended(job_id, {"status": "succeeded"}) == 409
    assert jobs.ended(job_id, {"status": "failed"}) == 200
    assert jobs.ended("unknown", {"status": "failed"}) == 404
