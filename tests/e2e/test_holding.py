"""Requests that wait, over real sockets: for the models, for the end of the process, for their own slow client."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import requests

from tests.support.fake_orchestrator import FakeOrchestrator
from tests.support.server import Server, wait_until

COMMAND = [sys.executable, "-m", "gunicorn", "--config", "tests/support/quick.conf.py"]
GOOD = {"musetalk_job_id": "job-1", "video_url": "https://host/a.mp4", "audio_url": "https://host/a.wav"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, tmp_path / "no-models", command=COMMAND, PLAYGROUND="1", UPLOAD_RECEIVE_TIMEOUT_SEC="3")
    try:
        server.wait_for(200)
        yield server
    finally:
        for name in ("hold-job", "hold-load"):
            server.release(name)
        server.stop()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=60)


def post(server: Server, job_id: str = "job-1") -> socket.socket:
    """A connection that has sent a job."""
    body = json.dumps({**GOOD, "musetalk_job_id": job_id}).encode()
    client = connect(server)
    client.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return client


def runs(server: Server) -> list[str]:
    path = server.faults / "runs"
    return path.read_text().split() if path.exists() else []


def replace_process(server: Server) -> None:
    """Kill the serving process; the next one loads its models until `hold-load` is released."""
    server.command("hold-load")
    (worker,) = psutil.Process(server.process.pid).children()
    worker.kill()
    server.wait_for(503)


def test_a_caller_that_leaves_while_the_models_load_runs_no_job(server: Server) -> None:
    replace_process(server)
    with post(server, "left"), post(server, "left-too"):
        time.sleep(0.5)
    with post(server, "patient") as patient:
        time.sleep(0.5)
        server.release("hold-load")
        assert b"200 OK" in patient.recv(1000)
    assert runs(server) == ["patient"]


def test_a_job_posted_during_a_stop_gets_no_byte_until_the_process_ends(server: Server) -> None:
    server.command("hold-job")
    running = post(server)
    wait_until(lambda: runs(server))
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.health()[1]["status"] == "draining")
    with running, post(server, "late") as late:
        late.settimeout(1)
        with pytest.raises(TimeoutError):
            late.recv(1)
        assert server.health()[1]["busy"] is True
        server.release("hold-job")
        assert b"200 OK" in running.recv(1000)
        late.settimeout(30)
        assert late.recv(1) == b""
    assert server.process.wait(10) == 0
    assert runs(server) == ["job-1"]


def test_slow_bodies_do_not_keep_a_job_out(server: Server) -> None:
    unfinished = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    with ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(connect(server)).sendall(unfinished)
        begun = time.monotonic()
        assert requests.post(f"{server.url}/generate", json=GOOD, timeout=30).status_code == 200
        assert time.monotonic() - begun < 2


def test_an_upload_that_drips_in_is_cut_off_and_leaves_nothing(server: Server) -> None:
    head = b'--cut\r\nContent-Disposition: form-data; name="source"; filename="a.mp4"\r\n\r\n'
    with connect(server) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=cut\r\n"
            b"Content-Length: 9000000\r\n\r\n" + head + bytes(1_000_000)
        )
        wait_until(lambda: list((server.folder / "work").glob("job-upload-*")), 10)
        stopped = threading.Event()

        def drip() -> None:
            while not stopped.wait(0.2):
                client.send(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        begun = time.monotonic()
        answer = client.recv(1000)
        stopped.set()
        dripping.join()
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert time.monotonic() - begun < 8
    wait_until(lambda: not list((server.folder / "work").glob("job-upload-*")), 10)


def test_a_chunked_body_beyond_the_limit_is_answered_with_its_id(server: Server) -> None:
    chunks = iter([json.dumps({**GOOD, "extra": ""})[:-2].encode(), *[b"x" * 1_000_000] * 11, b'"}'])
    answer = requests.post(f"{server.url}/generate", data=chunks, timeout=30)
    assert answer.status_code == 413
    assert answer.json()["musetalk_job_id"] == "job-1"
    assert runs(server) == []


def test_health_gives_the_reason_to_the_end_of_a_stop_in_buffer_mode_too(tmp_path: Path) -> None:
    """No request was open, so the server closed its port while the claim loop finished the job."""
    with FakeOrchestrator() as orchestrator:
        server = Server(
            tmp_path,
            tmp_path / "no-models",
            command=COMMAND,
            BUFFER_WORKER_ID="buffer-1",
            ORCHESTRATOR_BASE_URL=orchestrator.url,
            INTERNAL_API_KEY="key",  # pragma: allowlist secret
            BUFFER_POLL_INTERVAL_SEC="0.2",
        )
        try:
            server.wait_for(200)
            server.command("hold-job")
            orchestrator.jobs.append({"buffer_job_id": "b-1", **GOOD})
            wait_until(lambda: runs(server))
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.health()[1]["status"] == "draining")
            ends = time.monotonic() + 4
            while time.monotonic() < ends:
                begun = time.monotonic()
                status, body = server.health()
                assert (status, body["status"]) == (503, "draining")
                assert time.monotonic() - begun < 1
            server.release("hold-job")
            assert server.process.wait(20) == 0
            (report,) = orchestrator.of("status", "b-1")
            assert report.body["status"] == "succeeded"
        finally:
            server.release("hold-job")
            server.stop()
