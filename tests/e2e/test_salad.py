"""run_worker.sh in queue mode, with a program in the place of Salad's binary: who starts and ends first."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.rendering import make_audio, make_source
from tests.support.server import ROOT, Server, wait_until

# Behaves as the binary does: forwards one job, records the answer, and ends at once on SIGTERM.
BINARY = """#!{python}
import json, os, signal, sys, time, urllib.error, urllib.request
folder = {folder!r}
def note(name, value=""):
    with open(os.path.join(folder, name), "w") as file:
        file.write(str(value))
def end(*_):
    note("terminated", time.time())
    os._exit(0)
signal.signal(signal.SIGTERM, end)
url = "http://localhost:" + os.environ["WORKER_PORT"]
note("started", urllib.request.urlopen(url + "/hc").status)
job = os.path.join(folder, "job.json")
if os.path.exists(job):
    request = urllib.request.Request(url + "/generate", open(job, "rb").read(), {{"Salad-Job-Id": "q-1"}})
    try:
        with urllib.request.urlopen(request) as answer:
            note("answer", answer.read().decode())
    except Exception as error:
        note("answer", repr(error))
while not os.path.exists(os.path.join(folder, "end")):
    time.sleep(0.05)
sys.exit(int(open(os.path.join(folder, "end")).read() or 0))
"""

StartScript = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path, tiny_models: Path) -> Iterator[StartScript]:
    servers: list[Server] = []
    (tmp_path / "media").mkdir()
    make_source(tmp_path / "media/source.mp4", 10)
    make_audio(tmp_path / "media/audio.wav", 4)
    binary = tmp_path / "queue worker"
    binary.write_text(BINARY.format(python=sys.executable, folder=str(tmp_path)), encoding="utf-8")
    binary.chmod(0o755)

    def run(**environment: str) -> Server:
        environment = {"MUSETALK_PYTHON": sys.executable, "SALAD_QUEUE_WORKER": str(binary), **environment}
        command = ["bash", str(ROOT / "run_worker.sh")]
        servers.append(Server(tmp_path, tiny_models, faulty=False, command=command, **environment))
        return servers[-1]

    yield run
    for server in servers:
        server.stop()


def with_job(server_folder: Path, job: dict[str, Any]) -> None:
    (server_folder / "job.json").write_text(json.dumps(job), encoding="utf-8")


def test_the_binary_starts_when_ready_and_a_stop_lets_its_job_finish_first(start: StartScript, tmp_path: Path) -> None:
    job = {
        "musetalk_job_id": "salad",
        "video_url": (tmp_path / "media/source.mp4").as_uri(),
        "audio_url": (tmp_path / "media/audio.wav").as_uri(),
        "params": {"face_box": list(Server.face_box)},
    }
    with_job(tmp_path, job)
    server = start()
    wait_until((tmp_path / "started").exists, 90)
    assert (tmp_path / "started").read_text() == "200"
    wait_until(lambda: server.health()[1]["busy"])
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    answer = json.loads((tmp_path / "answer").read_text())
    assert answer["status"] == "success"
    assert (tmp_path / "answer").stat().st_mtime <= float((tmp_path / "terminated").read_text())
    assert (tmp_path / "outputs/salad.mp4").is_file()


def test_the_server_ends_with_the_binary(start: StartScript, tmp_path: Path) -> None:
    server = start()
    wait_until((tmp_path / "started").exists, 90)
    (tmp_path / "end").write_text("7")
    assert server.process.wait(60) != 0
    assert "queue binary has ended" in server.log_text()
    assert not psutil.pid_exists(server.process.pid) or not psutil.Process(server.process.pid).children()


def test_the_binary_ends_with_the_server(start: StartScript, tmp_path: Path) -> None:
    server = start()
    wait_until((tmp_path / "started").exists, 90)
    parents = [
        child for child in psutil.Process(server.process.pid).children() if "gunicorn" in " ".join(child.cmdline())
    ]
    parents[0].kill()
    server.process.wait(60)
    assert (tmp_path / "terminated").exists()


def test_buffer_mode_starts_no_binary(start: StartScript, tmp_path: Path) -> None:
    server = start(WORKER_MODE="buffer", ORCHESTRATOR_BASE_URL="http://127.0.0.1:9", INTERNAL_API_KEY="key")
    server.wait_for(200)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert not (tmp_path / "started").exists()


def test_wrong_settings_end_the_start_with_their_names(start: StartScript) -> None:
    server = start(BATCH_SIZE="many", WORKER_PORT="0")
    assert server.process.wait(60) == 2
    assert "BATCH_SIZE must be a whole number" in server.log_text()
    assert "WORKER_PORT must be 1 to 65535" in server.log_text()


def test_a_stop_before_it_is_ready_ends_at_once(start: StartScript, tmp_path: Path) -> None:
    server = start()
    wait_until(lambda: "Booting worker" in server.log_text())
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    assert not (tmp_path / "started").exists()
