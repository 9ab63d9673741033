"""A small WSGI app under the worker's server class, for tests of connections: no models, starts in a moment."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import requests

from tests.support.server import ROOT, wait_until

CONFIGURATION = """
bind = ["127.0.0.1:{port}"]
workers = 1
worker_class = "worker.server.Server"
wsgi_app = "tests.support.small_app:app"
pythonpath = {root!r}
graceful_timeout = {graceful_s}
keepalive = 5
control_socket_disable = True
"""


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer /hc at once, /body with the size of the body, /sleep/<seconds> later, /large with many megabytes."""
    path = environ["PATH_INFO"]
    if path.startswith("/sleep/"):
        time.sleep(float(path.rpartition("/")[2]))
    body = str(len(environ["wsgi.input"].read())).encode() if path == "/body" else b"ok"
    if path == "/limit":
        body = str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]).encode()
    if path == "/large":
        body = bytes(50_000_000)
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


class SmallServer:
    """The app in a real process; `descriptors` limits its open files."""

    def __init__(self, folder: Path, *, descriptors: tuple[int, int] | None = None, graceful_s: int = 30) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        configuration = folder / "small.conf.py"
        configuration.write_text(
            CONFIGURATION.format(port=self.port, root=str(ROOT), graceful_s=graceful_s), encoding="utf-8"
        )
        self.log_path = folder / "small.log"
        self._log = self.log_path.open("wb")
        command = [sys.executable, "-m", "gunicorn", "--config", str(configuration)]
        limit = f"ulimit -S -n {descriptors[0]}; ulimit -H -n {descriptors[1]}; " if descriptors else ""
        self.process = subprocess.Popen(
            ["bash", "-c", f'{limit}exec "$@"', "bash", *command], cwd=ROOT, stdout=self._log, stderr=self._log
        )
        wait_until(self.is_healthy, 30)

    def is_healthy(self) -> bool:
        assert self.process.poll() is None, self.log_text()
        try:
            return requests.get(f"{self.url}/hc", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def health_s(self) -> float:
        """Seconds that /hc takes on a new connection."""
        begun = time.monotonic()
        assert requests.get(f"{self.url}/hc", timeout=30).status_code == 200
        return time.monotonic() - begun

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection that has sent so much."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        client.sendall(sent)
        return client

    def log_text(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> float:
        """Send SIGTERM and wait; return the seconds until the end."""
        begun = time.monotonic()
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
        finally:
            self.process.kill()
            self._log.close()
        return time.monotonic() - begun
