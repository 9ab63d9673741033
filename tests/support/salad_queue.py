"""An imitation of Salad's job queue for the binary in `salad_binary.py`: four attempts, and what became of each."""

from __future__ import annotations

import json
import socketserver
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.server import wait_until

BINARY = Path(__file__).resolve().parent / "salad_binary.py"
MAX_ATTEMPTS = 4
# Seconds before the next attempt, after the first, second, third and fourth failed one.
PAUSES_S = (0.0, 1.0, 3.0, 5.0)


@dataclass
class QueuedJob:
    """A job in the queue; `attempts` has the outcome of each one: completed, rejected, interrupted."""

    id: str
    body: dict[str, Any]
    attempts: list[str] = field(default_factory=list)
    output: dict[str, Any] | None = None
    due: float = 0.0
    is_out: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the queue will not hand it out again."""
        return self.output is not None or len(self.attempts) >= MAX_ATTEMPTS

    @property
    def n_lost(self) -> int:
        """Attempts that brought no result."""
        return len([attempt for attempt in self.attempts if attempt != "completed"])


class SaladQueue:
    """Use in a `with` block; hands its jobs out in order, each to one binary at a time."""

    def __init__(self, pauses_s: tuple[float, ...] = PAUSES_S) -> None:
        self.jobs: dict[str, QueuedJob] = {}
        self._pauses_s = pauses_s
        self._changed = threading.Condition()
        owner = self

        class Stream(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                owner._serve(self)

        class Queue(socketserver.ThreadingTCPServer):
            daemon_threads = True

        self._server = Queue(("127.0.0.1", 0), Stream)
        self.port = self._server.server_address[1]

    def __enter__(self) -> SaladQueue:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write_binary(self, folder: Path, *, readiness_s: float = 5.0, delivery_s: float = 0.1) -> Path:
        """Write the program that SALAD_QUEUE_WORKER names."""
        path = folder / "salad-queue-worker"
        path.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{BINARY}" {self.port} {readiness_s} {delivery_s}\n', encoding="utf-8"
        )
        path.chmod(0o755)
        return path

    def submit(self, *ids: str) -> None:
        """Add jobs at the end."""
        with self._changed:
            for name in ids:
                body = {"musetalk_job_id": name, "video_url": "https://host/a.mp4", "audio_url": "https://host/a.wav"}
                self.jobs[name] = QueuedJob(f"queue-{name}", body)
            self._changed.notify_all()

    def attempts(self) -> dict[str, list[str]]:
        """Outcomes of all attempts so far, by job."""
        with self._changed:
            return {name: list(job.attempts) for name, job in self.jobs.items()}

    def n_lost(self) -> dict[str, int]:
        """Attempts without a result, by job."""
        return {name: job.n_lost for name, job in self.jobs.items()}

    def wait_for_end(self, *ids: str, limit_s: float = 60) -> None:
        """Wait until these jobs have a result or no attempt left."""
        wait_until(lambda: all(self.jobs[name].is_over for name in ids), limit_s)

    def _serve(self, stream: socketserver.StreamRequestHandler) -> None:
        """One binary, from its connection to its end."""
        state: dict[str, Any] = {"ready": False, "job": None, "open": True}
        threading.Thread(target=self._hand_out, args=(stream, state), daemon=True).start()
        for line in stream.rfile:
            message = json.loads(line)
            with self._changed:
                if "ready" in message:
                    state["ready"] = message["ready"]
                else:
                    self._note(state, message)
                self._changed.notify_all()
        with self._changed:
            state["open"] = False
            if state["job"] is not None:
                self._note(state, {"result": "interrupted"})
            self._changed.notify_all()

    def _note(self, state: dict[str, Any], message: dict[str, Any]) -> None:
        job, state["job"] = state["job"], None
        job.is_out = False
        reason = message.get("reason")
        job.attempts.append(message["result"] + (f" {reason}" if reason else ""))
        if message["result"] == "completed":
            job.output = json.loads(message["body"])
        job.due = time.monotonic() + self._pauses_s[min(len(job.attempts), len(self._pauses_s)) - 1]

    def _hand_out(self, stream: socketserver.StreamRequestHandler, state: dict[str, Any]) -> None:
        while True:
            with self._changed:
                job = self._next() if state["ready"] and state["job"] is None and state["open"] else None
                if not state["open"]:
                    return
                if job is None:
                    self._changed.wait(0.02)
                    continue
                job.is_out, state["job"] = True, job
            try:
                stream.wfile.write(json.dumps({"id": job.id, "body": job.body}).encode() + b"\n")
            except OSError:
                return

    def _next(self) -> QueuedJob | None:
        now = time.monotonic()
        waiting = (job for job in self.jobs.values() if not job.is_over and not job.is_out and job.due <= now)
        return next(waiting, None)
