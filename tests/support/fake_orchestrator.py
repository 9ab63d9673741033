"""A loopback orchestrator: hands out jobs, records every call with its time, and fails on demand."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from tests.support.loopback import LoopbackServer


@dataclass(frozen=True)
class Call:
    """One request: its kind, the id in its path, body, key, arrival (monotonic seconds), headers."""

    kind: str
    id: str
    body: Any
    key: str | None
    time: float
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What to answer: status, body as it goes out, headers; `None` as status closes the connection without a word."""

    status: int | None = 200
    body: bytes = b'{"detail": "ok"}'
    headers: tuple[tuple[str, str], ...] = ()


Fault = Callable[[Call], Answer | None]


class FakeOrchestrator:
    """Use in a `with` block; `jobs` are handed out one by one, `faults` may answer instead."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.jobs: deque[Any] = deque()
        self.faults: list[Fault] = []
        self._changed = threading.Condition()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Headers and body are two writes; the second would wait 40 ms for the acknowledgement of the first.
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                owner._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Stay silent."""

        self._server = LoopbackServer(Handler)
        self.url = f"http://127.0.0.1:{self._server.port}"

    def __enter__(self) -> FakeOrchestrator:
        self._server.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.stop()

    def of(self, kind: str, id: str | None = None) -> list[Call]:
        """The calls of one kind so far, about one id if given."""
        with self._changed:
            return [call for call in self.calls if call.kind == kind and (id is None or call.id == id)]

    def wait_for(self, condition: Callable[[], object], limit_s: float = 60) -> None:
        """Wait until the condition holds, looking at each new call; fails after `limit_s`."""
        ends = time.monotonic() + limit_s
        while not condition():
            left = ends - time.monotonic()
            assert left > 0, f"in vain; calls so far: {[(call.kind, call.id, call.body) for call in self.calls][-12:]}"
            with self._changed:
                self._changed.wait(min(left, 0.2))

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        kind, identity = _kind(handler.path)
        headers = dict(handler.headers)
        call = Call(kind, identity, json.loads(body), headers.get("X-Internal-API-Key"), time.monotonic(), headers)
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        answer = next((found for fault in list(self.faults) if (found := fault(call)) is not None), None)
        if answer is None and kind == "claim":
            job = self.jobs.popleft() if self.jobs else None
            answer = Answer(body=json.dumps({"job": job}).encode())
        answer = answer or Answer()
        if answer.status is None:
            handler.close_connection = True
            handler.connection.close()
            return
        handler.send_response(answer.status)
        for name, value in answer.headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        handler.wfile.write(answer.body)


def _kind(path: str) -> tuple[str, str]:
    parts = path.strip("/").split("/")
    if parts[:3] == ["internal", "buffer", "workers"] and parts[4:] == ["heartbeat"]:
        return "heartbeat", unquote(parts[3])
    if parts == ["internal", "buffer", "jobs", "claim"]:
        return "claim", ""
    if parts[:3] == ["internal", "buffer", "jobs"] and parts[4:] == ["status"]:
        return "status", unquote(parts[3])
    if parts[:2] == ["internal", "jobs"] and parts[3:] == ["progress"]:
        return "progress", unquote(parts[2])
    return "unknown", path


class Times:
    """A fault that answers the first `count` calls of one kind."""

    def __init__(self, kind: str, count: int, answer: Answer) -> None:
        self.kind, self.left, self.answer = kind, count, answer

    def __call__(self, call: Call) -> Answer | None:
        if call.kind != self.kind or self.left <= 0:
            return None
        self.left -= 1
        return self.answer
