"""The worker as a real process: Gunicorn with the project's own configuration, on a free port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import requests

from tests.support.warm_start import WarmProcess

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 120
OWN_COMMAND = [sys.executable, "-m", "gunicorn", "--config", str(ROOT / "gunicorn.conf.py")]


def wait_until(condition: Callable[[], object], limit_s: float = 120) -> None:
    """Poll until the condition is true; fails after `limit_s`."""
    ends = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends, f"not true within {limit_s:g} s"
        time.sleep(0.02)


class Server:
    """One Gunicorn process group, its address and its log; jobs are about the files in its media folder."""

    face_box = (50, 100, 142, 216)

    def __init__(
        self,
        folder: Path,
        models: Path,
        *,
        faulty: bool = False,
        command: Sequence[str] | None = None,
        **environment: str,
    ) -> None:
        """`faulty` runs the same worker with deliberate faults (`faulty.conf.py`), commanded in `folder/faults`.

        Without a `command` the large libraries are imported already; `OWN_COMMAND` starts it as an operator does.
        """
        host = environment.get("WORKER_HOST", "127.0.0.1")
        # Kept bound while the server runs, without listening: Linux lets the server bind the port too (both set
        # SO_REUSEADDR), and no other process is given it.
        self.reservation = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reservation.bind((host, 0))
        port = self.reservation.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder
        self.log_path = folder / "log.txt"
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        variables = {
            **kept,
            "PYTHONUNBUFFERED": "1",
            # What a developer keeps in .env is no part of a test.
            "MUSETALK_ENV_FILE": "none",
            # One thread: two that share cores with the test's own work mostly wait for each other.
            "OMP_NUM_THREADS": "1",
            "MUSETALK_CPU_THREADS": "1",
            "WORKER_HOST": "127.0.0.1",
            "WORKER_PORT": str(port),
            "MUSETALK_MODELS_DIR": str(models),
            "MUSETALK_DEVICE": "cpu",
            "OUTPUT_DIR": str(folder / "outputs"),
            "WORK_DIR": str(folder / "work"),
            "AVATAR_DIR": str(folder / "avatars"),
            "ALLOW_FILE_URLS": "1",
            "FILE_URL_ROOTS": str(folder / "media"),
            "FAULTS_DIR": str(folder / "faults"),
            "MIN_FREE_DISK_MB": "16",
            **environment,
        }
        (folder / "media").mkdir(exist_ok=True)
        self.faults = folder / "faults"
        self.faults.mkdir(exist_ok=True)
        configuration = ROOT / "tests/support/faulty.conf.py" if faulty else ROOT / "gunicorn.conf.py"
        arguments = ["-m", "gunicorn", "--config", str(configuration)]
        self.log = self.log_path.open("wb")
        self.process: subprocess.Popen[bytes] | WarmProcess
        if command is None:
            self.process = WarmProcess(arguments, cwd=ROOT, env=variables, stdout=self.log.fileno())
        else:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdout=self.log,
                stderr=subprocess.STDOUT,
            )

    def health(self) -> tuple[int, dict[str, Any]]:
        answer = requests.get(f"{self.url}/hc", timeout=30)
        return answer.status_code, answer.json()

    def wait_for(self, state: int) -> dict[str, Any]:
        """Ask until /hc answers with this status; fails when the process ends or the time is over."""
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < limit:
            assert self.process.poll() is None, self.log_text()
            try:
                status, body = self.health()
            except (requests.ConnectionError, requests.ReadTimeout):
                continue
            if status == state:
                return body
        raise AssertionError(f"/hc did not become {state}:\n{self.log_text()}")

    def post(self, body: Any) -> requests.Response:
        return requests.post(f"{self.url}/generate", json=body, timeout=120)

    def job(self, job_id: str, **fields: Any) -> dict[str, Any]:
        """A job about the files in the media folder."""
        return {
            "musetalk_job_id": job_id,
            "video_url": (self.folder / "media/source.mp4").as_uri(),
            "audio_url": (self.folder / "media/audio.wav").as_uri(),
            "params": {"face_box": list(self.face_box)},
            **fields,
        }

    def command(self, name: str) -> None:
        """Give a command to the faulty worker."""
        (self.faults / name).touch()

    def release(self, name: str) -> None:
        """Take a command back."""
        (self.faults / name).unlink(missing_ok=True)

    def wait_held(self, stage: str, limit_s: float = 120) -> None:
        """Wait until a job waits at the stage that was commanded."""
        wait_until((self.faults / f"held-{stage}").exists, limit_s)

    def leftovers(self) -> list[str]:
        """Folders of jobs in the work folder."""
        return [path.name for path in (self.folder / "work").glob("job-*")]

    def entries(self, message: str) -> list[dict[str, Any]]:
        """Log lines with this message."""
        lines = [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"] == message]

    def entries_starting(self, message: str) -> list[dict[str, Any]]:
        """Log lines whose message begins like this."""
        lines = [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"].startswith(message)]

    def log_text(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        self.reservation.close()
        assert self.process.returncode is not None
        return self.process.returncode
