"""The start as an operator sees it: who can reach the worker, and one line for each mistake. No models are loaded."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.server import ROOT, Server, wait_until

Start = Callable[..., Server]
GUNICORN = [sys.executable, "-m", "gunicorn", "--config", "tests/support/quick.conf.py"]
APP = [sys.executable, "app.py"]
EVERY_WAY = pytest.mark.parametrize(
    "command", [GUNICORN, APP, ["bash", str(ROOT / "run_worker.sh")]], ids=["gunicorn", "app", "script"]
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def run(command: list[str], **environment: str) -> Server:
        settings = {"MUSETALK_MODEL": "v15", **environment}
        servers.append(Server(tmp_path, tmp_path / "no-models", faulty=False, command=command, **settings))
        return servers[-1]

    yield run
    for server in servers:
        server.stop()


def listening(server: Server) -> set[str]:
    """Addresses on which the processes of the server listen."""
    tree = psutil.Process(server.process.pid)
    found = [each for process in (tree, *tree.children(recursive=True)) for each in process.net_connections("inet")]
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}


def test_python_app_py_can_be_reached_from_this_machine_only(start: Start) -> None:
    """Seen as a page, jobs and videos open to everybody in the network, without a warning."""
    server = start(APP, WORKER_HOST="")
    wait_until(lambda: "open http://localhost" in server.log_text(), 60)
    wait_until(lambda: listening(server), 30)
    assert listening(server) == {"127.0.0.1"}
    assert server.entries_starting("ANYONE") == []


def test_python_app_py_listens_where_it_should_and_warns(start: Start) -> None:
    server = start(APP, WORKER_HOST="0.0.0.0")
    wait_until(lambda: listening(server), 60)
    assert listening(server) == {"0.0.0.0"}
    (warning,) = server.entries_starting("ANYONE")
    assert warning["severity"] == "warning"
    assert "INTERNAL_API_KEY" in warning["message"]


@pytest.mark.parametrize(
    ("environment", "n_warnings"),
    [
        ({"WORKER_HOST": ""}, 1),
        ({"WORKER_HOST": "", "INTERNAL_API_KEY": "key"}, 0),  # pragma: allowlist secret
        ({"WORKER_HOST": "127.0.0.1"}, 0),
    ],
)
def test_a_server_open_to_others_without_a_key_says_so(
    start: Start, environment: dict[str, str], n_warnings: int
) -> None:
    server = start(GUNICORN, **environment)
    server.wait_for(200)
    assert len(server.entries_starting("ANYONE")) == n_warnings


@EVERY_WAY
def test_a_port_in_use_is_one_line_that_names_it_and_its_setting(start: Start, command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        server = start(command, WORKER_PORT=port, MUSETALK_PYTHON=sys.executable, SALAD_QUEUE_WORKER="none")
        assert server.process.wait(60) == 1
    lines = [
        line for line in server.log_text().splitlines() if "Starting gunicorn" not in line and "binary" not in line
    ]
    assert len(lines) == 1, server.log_text()
    assert port in lines[0]
    assert "WORKER_PORT" in lines[0]


@EVERY_WAY
def test_an_unknown_mode_stops_the_start(start: Start, command: list[str]) -> None:
    server = start(command, WORKER_MODE="bufer", MUSETALK_PYTHON=sys.executable)
    assert server.process.wait(60) == 2
    assert "WORKER_MODE must be one of queue, buffer (it is 'bufer')" in server.log_text()


def test_a_misspelt_name_in_the_env_file_is_a_warning_in_the_log(start: Start, tmp_path: Path) -> None:
    (tmp_path / "my.env").write_text("BATCH_SIZ=4\n", encoding="utf-8")
    server = start(GUNICORN, MUSETALK_ENV_FILE=str(tmp_path / "my.env"))
    server.wait_for(200)
    (warning,) = server.entries_starting("BATCH_SIZ")
    assert warning["severity"] == "warning"
    assert "did you mean BATCH_SIZE?" in warning["message"]


def test_a_folder_that_cannot_be_written_is_named_in_the_log_alone(start: Start) -> None:
    server = start(APP, OUTPUT_DIR="/proc/out")
    wait_until(lambda: server.entries("startup failed"), 60)
    (line,) = server.entries("folder not usable")
    assert (line["setting"], line["folder"]) == ("OUTPUT_DIR", "/proc/out")
    status, body = server.health()
    assert (status, body["status"]) == (503, "failed")
    assert "OUTPUT_DIR cannot be written" in body["reason"]
    assert "/proc/out" not in json.dumps(body)
