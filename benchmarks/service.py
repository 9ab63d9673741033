"""Responsiveness under load: /hc and heartbeats while a job runs, both cores are busy, and clients are slow.

    python -m benchmarks.service [--seconds 40] [--hogs 2] [--slow 500]

Starts the real server in buffer mode against a loopback orchestrator, with tiny models, and as many busy processes as
asked for. Prints the times of /hc (median, 99th percentile, longest) and the gaps between heartbeats: idle, in a job,
and in a job under slow connections, half of which send a byte a second and half nothing.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    arguments.service(__doc__)

import contextlib
import json
import multiprocessing
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import requests

from tests.support.fake_orchestrator import FakeOrchestrator
from tests.support.rendering import make_audio, make_source
from tests.support.server import Server
from tests.support.tiny_models import write_tiny_models

PAUSE_S = 0.1


def hog() -> None:
    """Keep a core busy."""
    while True:
        sum(range(10_000))


def health_times(server: Server, seconds: float, orchestrator: FakeOrchestrator, job: str | None) -> list[float]:
    """Milliseconds of /hc, ten times a second, for `seconds` or until the job's end."""
    times: list[float] = []
    ends = time.monotonic() + seconds
    with requests.Session() as session:
        while time.monotonic() < ends and not (job and orchestrator.of("status", job)):
            begun = time.perf_counter()
            session.get(f"{server.url}/hc", timeout=30)
            times.append(1000 * (time.perf_counter() - begun))
            time.sleep(PAUSE_S)
    return times


@contextlib.contextmanager
def slow_connections(server: Server, number: int) -> Iterator[None]:
    """Keep `number` unfinished requests open inside the block; those that the server closes are opened again."""
    port = int(server.url.rsplit(":", 1)[1])
    stopped = threading.Event()

    def connect() -> socket.socket:
        client = socket.create_connection(("127.0.0.1", port), timeout=30)
        client.sendall(b"GET /hc HTTP/1.1\r\nX: ")
        return client

    clients = [connect() for _ in range(number)]

    def drip() -> None:
        while not stopped.wait(1.0):
            for place, client in enumerate(clients):
                try:
                    if place % 2:
                        client.sendall(b"x")
                    elif client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) is not None:
                        raise ConnectionError
                except BlockingIOError:
                    continue
                except OSError:
                    client.close()
                    clients[place] = connect()

    dripping = threading.Thread(target=drip, daemon=True)
    dripping.start()
    try:
        yield
    finally:
        stopped.set()
        dripping.join()
        for client in clients:
            client.close()


def summary(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and longest, in ms."""
    ordered = sorted(times)
    return {
        "n": len(times),
        "median_ms": round(statistics.median(ordered), 1),
        "p99_ms": round(ordered[int(0.99 * (len(ordered) - 1))], 1),
        "longest_ms": round(ordered[-1], 1),
    }


def main() -> None:
    """Run both situations and print them as JSON."""
    given = arguments.service(__doc__)
    with tempfile.TemporaryDirectory() as name, FakeOrchestrator() as orchestrator:
        folder = Path(name)
        (folder / "media").mkdir()
        make_source(folder / "media/source.mp4", 10)
        # Longer than the measurement on any machine; it is cancelled at the end.
        make_audio(folder / "media/audio.wav", 300)
        models = write_tiny_models(folder / "models")
        server = Server(
            folder,
            models,
            BUFFER_WORKER_ID="bench",
            ORCHESTRATOR_BASE_URL=orchestrator.url,
            INTERNAL_API_KEY="key",  # pragma: allowlist secret
            BUFFER_POLL_INTERVAL_SEC="0.2",
        )
        try:
            server.wait_for(200)
            idle = health_times(server, given.seconds / 4, orchestrator, None)
            hogs = [multiprocessing.Process(target=hog, daemon=True) for _ in range(given.hogs)]
            for process in hogs:
                process.start()
            orchestrator.jobs.append({"buffer_job_id": "b", **server.job("m")})
            orchestrator.wait_for(lambda: orchestrator.of("progress", "m"))
            begun = time.monotonic()
            loaded = health_times(server, given.seconds, orchestrator, "b")
            with slow_connections(server, given.slow):
                slow = health_times(server, given.seconds, orchestrator, "b")
            beats = [call.time for call in orchestrator.of("heartbeat") if call.time >= begun - 10]
            gaps = [later - earlier for earlier, later in pairwise([*beats, time.monotonic()])]
            requests.delete(f"{server.url}/generate/m", timeout=30)
            for process in hogs:
                process.kill()
        finally:
            server.stop()
    figures = {
        "hc_idle": summary(idle),
        "hc_in_a_job_with_busy_cores": summary(loaded),
        "hc_in_a_job_under_slow_connections": summary(slow),
        "slow_connections": given.slow,
        "longest_heartbeat_gap_s": round(max(gaps), 2),
        "busy_processes": given.hogs,
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
