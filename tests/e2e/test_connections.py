"""The server against slow, silent and many connections: real sockets, a small app in the place of the worker's."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import requests

from tests.support.server import wait_until
from tests.support.small_app import SmallServer
from worker.receiving import HEAD_S
from worker.server import connection_limit

StartSmall = Callable[..., SmallServer]
# Half a request in every way in which a client can stop.
UNFINISHED = {
    "silent": b"",
    "head line": b"GET /hc HT",
    "header": b"GET /hc HTTP/1.1\r\nHost: x\r\nX-Long: a",
    "small body": b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc",
    "large body": b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\nabc",
    "chunked body": b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    "answer not read": b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallServer]:
    server = SmallServer(tmp_path_factory.mktemp("small"))
    yield server
    server.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartSmall]:
    servers: list[SmallServer] = []

    def run(**options: object) -> SmallServer:
        servers.append(SmallServer(tmp_path, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield run
    for server in servers:
        server.stop()


def opened(server: SmallServer, sent: bytes, number: int, stack: ExitStack) -> list[socket.socket]:
    return [stack.enter_context(server.connect(sent)) for _ in range(number)]


@pytest.mark.parametrize("kind", UNFINISHED)
def test_health_answers_within_a_second_under_500_unfinished_requests(small: SmallServer, kind: str) -> None:
    with ExitStack() as stack:
        opened(small, UNFINISHED[kind], 500, stack)
        assert max(small.health_s() for _ in range(10)) < 1
    wait_until(lambda: small.health_s() < 0.5, 30)


def test_a_head_that_drips_in_is_cut_off_at_its_deadline(small: SmallServer) -> None:
    """A byte a second never was silent, so no timeout between two bytes ended it."""
    with small.connect(b"GET /hc HTTP/1.1\r\n") as client:
        client.settimeout(1.0)
        begun, answer = time.monotonic(), b""
        while not answer and time.monotonic() - begun < HEAD_S + 10:
            client.sendall(b"x")
            try:
                answer = client.recv(100)
            except TimeoutError:
                continue
        assert b"408" in answer
        assert time.monotonic() - begun < HEAD_S + 5


def test_an_idle_server_ends_within_five_seconds_whatever_is_open(start: StartSmall) -> None:
    server = start()
    with ExitStack() as stack:
        for sent in UNFINISHED.values():
            opened(server, sent, 12, stack)
        server.health_s()
        assert server.stop() < 5
    assert server.process.returncode == 0


def test_a_request_under_way_is_answered_and_health_too_while_the_server_stops(start: StartSmall) -> None:
    server = start()
    answers: list[requests.Response] = []
    thread = threading.Thread(target=lambda: answers.append(requests.get(f"{server.url}/sleep/3", timeout=30)))
    thread.start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    while thread.is_alive():
        assert server.health_s() < 1
    thread.join()
    assert answers[0].status_code == 200
    assert server.process.wait(5) == 0


@pytest.mark.parametrize("descriptors", [(256, 256), (256, 1024), (1024, 1024)])
def test_more_connections_than_descriptors_end_nothing(start: StartSmall, descriptors: tuple[int, int]) -> None:
    server = start(descriptors=descriptors)
    assert requests.get(f"{server.url}/limit", timeout=10).text == str(descriptors[1])
    (worker,) = psutil.Process(server.process.pid).children()
    with ExitStack() as stack:
        opened(server, b"GET", 1000, stack)
        assert max(server.health_s() for _ in range(5)) < 2
        # Room for a job's files, its child processes and its own connections.
        assert worker.num_fds() <= descriptors[1] - min(200, descriptors[1] // 3)
    assert psutil.Process(server.process.pid).children() == [worker]
    assert "Traceback" not in server.log_text()


def test_the_limit_leaves_a_reserve_for_the_job() -> None:
    for n_descriptors in (64, 256, 1024, 65_536):
        limit = connection_limit(n_descriptors)
        assert 8 <= limit <= n_descriptors // 2 or limit <= n_descriptors - 256


def test_the_serving_process_ends_with_its_parent(start: StartSmall) -> None:
    """After SIGKILL to the parent the child ran on, with the port and the GPU."""
    server = start(graceful_s=4)
    (worker,) = psutil.Process(server.process.pid).children()
    clients = [server.connect(b"GET /sleep/60 HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(2)]
    server.health_s()
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    try:
        wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 8)
    finally:
        for client in clients:
            client.close()


def test_two_requests_sent_at_once_get_two_answers(small: SmallServer) -> None:
    request = b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    with small.connect(request + request[:30]) as client:
        answer = b""
        while b"\r\n\r\n3" not in answer:
            answer += client.recv(1000)
        client.sendall(request[30:])
        answer = b""
        while b"\r\n\r\n3" not in answer:
            answer += client.recv(1000)


@pytest.mark.parametrize("n_bytes", [0, 1000, 65_536, 65_537, 9_000_000])
def test_bodies_of_every_size_arrive_whole(small: SmallServer, n_bytes: int) -> None:
    assert requests.post(f"{small.url}/body", data=bytes(n_bytes), timeout=30).text == str(n_bytes)
    chunks = (bytes(1000) for _ in range(n_bytes // 1000))
    assert requests.post(f"{small.url}/body", data=chunks, timeout=30).text == str(n_bytes // 1000 * 1000)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", b"400"),
        (b"\n\nGET /hc HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /hc HTTP/9\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"414"),
        (b"GET /" + b"a" * 100_000, b"414"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\n\r\n", b"431"),
    ],
)
def test_what_is_no_request_is_refused_at_once(small: SmallServer, sent: bytes, status: bytes) -> None:
    with small.connect(sent) as client:
        client.settimeout(HEAD_S - 2)
        assert client.recv(1000).split(b" ")[1] == status
