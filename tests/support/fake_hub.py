"""A hub on loopback, as huggingface_hub and our fetching see the real one, and the content host to which it redirects.

For a large file the hub answers with a redirect to a signed address of the content host; its headers contain size and
checksum. The hub serves small files (`.json`) itself, with their git blob id. The content host also serves S3FD. Faults
are orders for one path: each is used for one request, and after the last one requests are answered as usual.
"""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType

from musetalk.manifest import MANIFEST, WeightFile
from tests.support.loopback import LoopbackServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # pragma: allowlist secret
SIGNATURE = "very-secret-signature"
TOKEN = "hf_veryverysecrettoken"


@dataclass(frozen=True)
class Order:
    """Fault of one answer.

    `status` refuses; `cut_after` ends the connection after that many bytes of the body, with a reset if `resets`;
    `body` replaces the content; `holds` waits after `cut_after` bytes until `FakeHub.release` is set.
    """

    status: int | None = None
    cut_after: int | None = None
    resets: bool = False
    body: bytes | None = None
    ignores_range: bool = False
    holds: bool = False


@dataclass(frozen=True)
class Seen:
    """One request that reached a host; header names are in lower case."""

    host: str
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class _Stored:
    content: bytes
    is_large: bool
    # A wrong size or checksum that the hub announces.
    announced_size: int | None = None
    announced_checksum: str | None = None


def manifest_of(models_dir: Path, prefix: int | None = None) -> tuple[WeightFile, ...]:
    """Return the official manifest with sizes and SHA-256 of the files in `models_dir`, cut to `prefix` digits."""
    entries = []
    for entry in MANIFEST:
        path = models_dir / entry.name
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entries.append(replace(entry, n_bytes=path.stat().st_size, sha256=digest[:prefix]))
    return tuple(entries)


@dataclass
class FakeHub:
    """Both hosts; use it as a context manager. `url` is the HF_ENDPOINT, `s3fd_url` a signed address."""

    files: dict[str, _Stored] = field(default_factory=dict)
    orders: dict[str, list[Order]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    heads_are_refused: bool = False

    def __post_init__(self) -> None:
        self.release = threading.Event()
        self.is_held = threading.Event()
        self.n_sent = 0
        self._lock = threading.Lock()
        hub = self

        class HubHandler(_Handler):
            fake = hub
            host = "hub"

        class ContentHandler(_Handler):
            fake = hub
            host = "content"

        self._servers = [LoopbackServer(handler) for handler in (HubHandler, ContentHandler)]
        self.url = f"http://127.0.0.1:{self._servers[0].port}"
        # Another name: for the client this is another host, which must not get the hub's login.
        self.content_url = f"http://localhost:{self._servers[1].port}"

    @property
    def s3fd_url(self) -> str:
        """Signed address of S3FD on the content host."""
        return f"{self.content_url}/s3fd-619a316812.pth?sig={SIGNATURE}"

    def __enter__(self) -> FakeHub:
        for server in self._servers:
            server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release.set()
        for server in self._servers:
            server.stop()

    def serve_all(self, models_dir: Path) -> None:
        """Serve every file of the official layout in `models_dir` under its path on the hub."""
        for entry in MANIFEST:
            path = models_dir / entry.name
            if path.is_file():
                place = f"{entry.repo}/{entry.repo_path}" if entry.repo else path.name
                self.files[place] = _Stored(path.read_bytes(), path.suffix != ".json")

    def requests_for(self, name: str, method: str = "GET", host: str = "content") -> list[Seen]:
        """Return the requests whose path ends with `name`."""
        return [
            seen
            for seen in self.seen
            if (seen.host, seen.method) == (host, method) and seen.path.partition("?")[0].endswith(name)
        ]

    def next_order(self, place: str) -> Order:
        """Return the order for this request for content."""
        with self._lock:
            orders = self.orders.get(place)
            return orders.pop(0) if orders else Order()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeHub
    host: str

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.fake.seen.append(Seen(self.host, self.command, self.path, headers))
        self.close_connection = True
        path, _, query = self.path.partition("?")
        if self.host == "content":
            self._content(path.lstrip("/"), query)
            return
        match = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
        place = f"{match[1]}/{match[3]}" if match else path
        stored = self.fake.files.get(place)
        if place in self.fake.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, {"X-Error-Code": "GatedRepo"})
        elif stored is None or match is None or match[2] not in ("main", COMMIT):
            self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        elif stored.is_large:
            size, digest = len(stored.content), hashlib.sha256(stored.content).hexdigest()
            order = self.fake.next_order(f"hub:{place}")
            if order.status is not None:
                self._refuse(order.status)
                return
            headers = {
                "Location": f"{self.fake.content_url}/{place}?sig={SIGNATURE}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(stored.announced_size or size),
                "X-Linked-Etag": f'"{stored.announced_checksum or digest}"',
                "ETag": '"of-the-pointer"',
            }
            self._refuse(302, headers)
        else:
            self._serve(stored, place, {"X-Repo-Commit": COMMIT, "ETag": f'"{_git_sha1(stored)}"'})

    def _content(self, place: str, query: str) -> None:
        stored = self.fake.files.get(place)
        if stored is None:
            self._refuse(404)
        elif query != f"sig={SIGNATURE}":
            self._refuse(403)
        elif self.command == "HEAD" and self.fake.heads_are_refused:
            self._refuse(405)
        else:
            self._serve(stored, place, {"ETag": f'"{hashlib.md5(stored.content).hexdigest()}"'})

    def _refuse(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def _serve(self, stored: _Stored, place: str, headers: Mapping[str, str]) -> None:
        order = self.fake.next_order(place) if self.command == "GET" else Order()
        if order.status is not None:
            self._refuse(order.status)
            return
        body = stored.content if order.body is None else order.body
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match and not order.ignores_range else None
        if start is not None and start >= len(body):
            self._refuse(416)
            return
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self._send(body, order)

    def _send(self, body: bytes, order: Order) -> None:
        part = body[: order.cut_after]
        self.wfile.write(part)
        self.fake.n_sent += len(part)
        if order.holds:
            self.fake.is_held.set()
            self.fake.release.wait()
            self.wfile.write(body[len(part) :])
        if order.resets:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def _git_sha1(stored: _Stored) -> str:
    if stored.announced_checksum is not None:
        return stored.announced_checksum
    return hashlib.sha1(b"blob %d\0" % len(stored.content) + stored.content).hexdigest()
