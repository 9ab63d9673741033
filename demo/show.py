"""`run_worker.sh --demo`: start the worker, post the demo pair to it, show progress, print where the video is."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from musetalk.errors import SettingsError
from worker.config import ROOT, load_settings
from worker.jobs import DEMO_NOTICE

# As in demo.make_pair, whose imports take seconds.
MEDIA = ROOT / "demo" / "media"
AVATAR, SPEECH = MEDIA / "avatar.mp4", MEDIA / "speech.flac"

START_LIMIT_S = 180


class Progress:
    """Take the orchestrator's place and show the progress it receives."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar
        progress = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                progress.show(json.loads(body))
                answer = b'{"detail": "ok"}'
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Stay silent: the bar is on the terminal."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def show(self, update: dict[str, Any]) -> None:
        """One progress report on the bar."""
        self._bar.set_description(str(update.get("phase") or update.get("status")))
        self._bar.update(max(0.0, 100 * float(update.get("progress") or 0) - self._bar.n))


def bound_socket(port: int) -> socket.socket:
    """Bind `port` (0: a free one) on loopback for the server to inherit, so that no other process can take it first."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise SystemExit(f"error: port {port} cannot be used ({error.strerror}); set WORKER_PORT") from None
    return listener


def reason_in(log: str) -> str | None:
    """The reason of a failed start: the last error in the log of the worker, as JSON or as a line of text."""
    for line in reversed(log.splitlines()):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("severity") in ("error", "critical"):
            return str(entry.get("reason") or entry.get("message"))
    return None


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log_path: Path) -> dict[str, Any]:
    """Wait for /hc to be 200 and return its body; exits with the reason when the worker cannot start."""
    ends = time.monotonic() + START_LIMIT_S
    body: dict[str, Any] = {}
    while server.poll() is None and time.monotonic() < ends:
        try:
            answer = requests.get(f"{url}/hc", timeout=5)
        except requests.RequestException:
            time.sleep(0.1)
            continue
        body = answer.json()
        if answer.ok:
            return body
        if body.get("status") == "failed":
            break
        time.sleep(0.1)
    if server.poll() is None and body.get("status") != "failed":
        raise SystemExit(f"error: the worker was not ready after {START_LIMIT_S} s: {body.get('reason', 'no answer')}")
    log = log_path.read_text(encoding="utf-8", errors="replace")
    reason = body.get("reason") if body.get("status") == "failed" else reason_in(log)
    raise SystemExit(f"error: the worker did not start: {reason or f'its process ended with {server.poll()}'}")


def main() -> int:
    """Run the demo; returns the exit status (2: wrong settings)."""
    argparse.ArgumentParser(
        prog="run_worker.sh --demo",
        description="Start the worker, make the demo video, print its path, end. Settings come from the environment.",
    ).parse_args()
    environment = {
        **os.environ,
        "WORKER_HOST": "127.0.0.1",
        "WORKER_MODE": "queue",
        "MUSETALK_MODEL": os.environ.get("MUSETALK_MODEL") or "demo",
        # The demo is of this machine alone: no orchestrator, no bucket, no folder of a worker that runs beside it.
        "MUSETALK_ENV_FILE": "none",
        "ALLOW_FILE_URLS": "1",
        "FILE_URL_ROOTS": str(MEDIA),
    }
    elsewhere = ("ORCHESTRATOR_BASE_URL", "INTERNAL_API_KEY", "WORK_DIR", "BUFFER_WORKER_ID")
    for name in (*elsewhere, "B2_KEY_ID", "B2_APP_KEY", "B2_BUCKET_NAME"):
        environment.pop(name, None)
    try:
        settings = load_settings(environment, None)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    listener = bound_socket(settings.port if os.environ.get("WORKER_PORT") else 0)
    bar: tqdm[Any] = tqdm(total=100, desc="starting", bar_format="{desc:12} {bar} {n:3.0f}%", file=sys.stderr)
    progress = Progress(bar)
    port = int(listener.getsockname()[1])
    log_path = ROOT / "work" / "demo.log"
    log_path.parent.mkdir(exist_ok=True)
    environment |= {
        "WORKER_PORT": str(port),
        "ORCHESTRATOR_BASE_URL": progress.url,
        "INTERNAL_API_KEY": secrets.token_hex(8),
        "WORK_DIR": str(log_path.with_suffix("")),
    }
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "--bind", f"fd://{listener.fileno()}"],
            cwd=ROOT,
            pass_fds=(listener.fileno(),),
            env=environment,
            stdout=log,
            stderr=log,
        )
    listener.close()
    try:
        url = f"http://127.0.0.1:{port}"
        health = wait_until_ready(server, url, log_path)
        job = {"musetalk_job_id": "demo", "video_url": AVATAR.as_uri(), "audio_url": SPEECH.as_uri()}
        begun = time.monotonic()
        answer = requests.post(f"{url}/generate", json=job, timeout=3600).json()
        taken = time.monotonic() - begun
    except BaseException:
        bar.close()
        print(f"the worker's log: {log_path}", file=sys.stderr)
        raise
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    bar.close()
    if answer.get("status") != "success":
        print(f"error: {answer.get('error_message')}\nthe worker's log: {log_path}", file=sys.stderr)
        return 1
    video = answer["video"]
    print(
        f"{video['frames']} frames in {taken:.1f} s ({video['frames'] / taken:.1f} a second), model {health['model']}",
        file=sys.stderr,
    )
    if health["model"] == "demo":
        print(f"note: {DEMO_NOTICE}", file=sys.stderr)
    name = str(answer["output_url"]).rsplit("/", 1)[1]
    local = settings.output_dir
    path = (ROOT / local / name).resolve()
    print(path if path.is_file() else answer["output_url"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
