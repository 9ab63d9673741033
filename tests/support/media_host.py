"""A media host on loopback that shows the faults of real ones on request.

Each path has a list of answers, used one after another; the last one stays. The host counts connections and keeps the
requests, so a test can check what was dialled and what was sent.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from tests.support.loopback import LoopbackServer


@dataclass(frozen=True)
class Answer:
    """One answer. `length` is the declared size ("right", "none" or a number); the rest are faults.

    `cut_after` resets the connection after that many body bytes; `stall_after` goes silent there until the host closes;
    `wrong_range` and `wrong_total` falsify the Content-Range of a 206; `drip_s` sends single bytes with that pause;
    `chunked` and `endless` send without a length.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | str = "right"
    ranges: bool = False
    wrong_range: bool = False
    wrong_total: bool = False
    cut_after: int | None = None
    stall_after: int | None = None
    silent: bool = False
    drip_s: float | None = None
    drip_headers_s: float | None = None
    chunked: bool = False
    endless: bool = False


@dataclass(frozen=True)
class Seen:
    """One request that reached the host."""

    path: str
    headers: Mapping[str, str]


class MediaHost:
    """The host; use it as a context manager. `url(path)` has its loopback address."""

    def __init__(self, certificate: tuple[str, str] | None = None) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.seen: list[Seen] = []
        self.server_names: list[str | None] = []
        self.n_connections = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._context = self._tls(certificate) if certificate else None
        host = self

        class Server(LoopbackServer):
            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                host.n_connections += 1
                return connection, address

            def finish_request(self, request: Any, client_address: Any) -> None:
                try:
                    if host._context is not None:
                        request = host._context.wrap_socket(request, server_side=True)
                    super().finish_request(request, client_address)
                finally:
                    request.close()

        class Handler(_Handler):
            media_host = host

        self._server = Server(Handler)
        self.port = self._server.port

    def _tls(self, certificate: tuple[str, str]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        context.sni_callback = lambda _socket, name, _context: self.server_names.append(name)
        return context

    def __enter__(self) -> MediaHost:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.stop()

    def serve(self, path: str, *answers: Answer) -> str:
        """Answer requests for `path` (without query) in this order; returns the URL."""
        self.answers[path] = list(answers)
        return self.url(path)

    def url(self, path: str = "/", name: str = "127.0.0.1") -> str:
        """Return the URL of a path, under any name that the test resolves to loopback."""
        return f"{'https' if self._context else 'http'}://{name}:{self.port}{path}"

    def next_answer(self, path: str) -> Answer:
        """Return the answer to this request."""
        with self._lock:
            answers = self.answers.get(path.partition("?")[0])
            if not answers:
                return Answer(status=404, body=b"no such file")
            return answers.pop(0) if len(answers) > 1 else answers[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    media_host: MediaHost

    def do_GET(self) -> None:
        host = self.media_host
        host.seen.append(Seen(self.path, dict(self.headers.items())))
        self.close_connection = True
        answer = host.next_answer(self.path)
        if answer.silent:
            host.closing.wait()
            return
        status, body, headers = self._content(answer)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        if answer.drip_headers_s is not None:
            self.flush_headers()
            while not host.closing.wait(answer.drip_headers_s):
                self.wfile.write(b"X-Drip: 1\r\n")
        self.end_headers()
        self._send(answer, body)

    def _content(self, answer: Answer) -> tuple[int, bytes, dict[str, str]]:
        status, body, headers = answer.status, answer.body, dict(answer.headers)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        current = {headers.get("ETag"), headers.get("Last-Modified")} - {None}
        if answer.ranges and match and self.headers.get("If-Range") in current and int(match[1]) < len(body):
            start = int(match[1])
            claimed = start + 1 if answer.wrong_range else start
            total = len(body) + 1 if answer.wrong_total else len(body)
            headers["Content-Range"] = f"bytes {claimed}-{len(body) - 1}/{total}"
            status, body = 206, body[start:]
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif answer.length == "right":
            headers["Content-Length"] = str(len(body))
        elif answer.length != "none":
            headers["Content-Length"] = str(answer.length)
        return status, body, headers

    def _send(self, answer: Answer, body: bytes) -> None:
        host = self.media_host
        if answer.endless:
            while not host.closing.is_set():
                self._write(answer, b"\0" * 65536)
            return
        if answer.drip_s is not None:
            for value in body:
                self._write(answer, bytes([value]))
                if host.closing.wait(answer.drip_s):
                    return
        stop = answer.cut_after if answer.cut_after is not None else answer.stall_after
        self._write(answer, body[:stop])
        if answer.stall_after is not None:
            host.closing.wait()
        elif answer.cut_after is not None:
            self._reset()
        elif answer.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, answer: Answer, block: bytes) -> None:
        if answer.drip_s is not None and len(block) > 1:
            return
        if block:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if answer.chunked else block)

    def _reset(self) -> None:
        """End the connection with a reset; bytes sent before may or may not arrive."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""
