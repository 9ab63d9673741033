"""WORKER_GPUS: run_worker.sh with pretended cards starts, watches, restarts and stops a real server for each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.support.buffer_mode import KEY, claimed, prepare
from tests.support.cards import is_running, pretend_cards
from tests.support.fake_orchestrator import FakeOrchestrator
from tests.support.server import ROOT, Server, wait_until

# A server that loads no models: what is tested here is around them.
QUICK = ["bash", str(ROOT / "run_worker.sh"), "--config", "tests/support/quick.conf.py"]
WHOLE = ["bash", str(ROOT / "run_worker.sh")]
StartMachine = Callable[..., "Machine"]


@contextmanager
def reserved_ports(count: int) -> Iterator[int]:
    """The first of `count` ports in a row, which are kept bound as the one of `Server` is."""
    # Below the range from which the system chooses ports.
    for port in range(28_000, 32_000, count):
        with ExitStack() as stack:
            try:
                for number in range(count):
                    each = stack.enter_context(socket.socket())
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    each.bind(("127.0.0.1", port + number))
            except OSError:
                continue
            yield port
            return
    raise AssertionError("no ports are free")


class Machine(Server):
    """A machine with three pretended cards, of which 0 and 2 work; `url` is the summary's."""

    def __init__(self, folder: Path, models: Path, orchestrator: FakeOrchestrator, command: list[str]) -> None:
        self.ports = ExitStack()
        self.port = self.ports.enter_context(reserved_ports(3))
        super().__init__(
            folder,
            models,
            command=command,
            PATH=pretend_cards(folder / "bin", 3),
            MUSETALK_PYTHON=sys.executable,
            WORKER_GPUS="0,2",
            WORKER_MODE="buffer",
            WORKER_ID="vast-17",
            ORCHESTRATOR_BASE_URL=orchestrator.url,
            INTERNAL_API_KEY=KEY,
            BUFFER_POLL_INTERVAL_SEC="0.1",
            GRACEFUL_TIMEOUT_SEC="60",
            WORKER_PORT=str(self.port),
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> int:
        status = super().stop()
        self.ports.close()
        return status

    def card(self, number: int, path: str = "/hc") -> requests.Response:
        """What the server of the first or second card answers."""
        return requests.get(f"http://127.0.0.1:{self.port + number}{path}", timeout=30)

    def servers(self) -> dict[str, psutil.Process]:
        """The Gunicorn of each card, by the card that it was given."""
        found: dict[str, psutil.Process] = {}
        for child in psutil.Process(self.process.pid).children():
            variables = child.environ()
            if "MUSETALK_CARD" in variables and "gunicorn" in child.cmdline():
                found[variables["MUSETALK_CARD"]] = child
        return found

    def wait_healthy(self, n_cards: int) -> dict[str, Any]:
        """Wait until the summary counts so many healthy cards; return its body."""

        def is_so() -> bool:
            try:
                return bool(self.health()[1]["healthy"] == n_cards)
            except requests.ConnectionError:
                assert self.process.poll() is None, self.log_text()
                return False

        wait_until(is_so, 90)
        return self.health()[1]


@pytest.fixture(scope="module")
def orchestrator() -> Iterator[FakeOrchestrator]:
    with FakeOrchestrator() as orchestrator:
        yield orchestrator


@pytest.fixture
def start(tmp_path: Path, orchestrator: FakeOrchestrator) -> Iterator[StartMachine]:
    machines: list[Machine] = []

    def run(command: list[str] = QUICK, models: Path = tmp_path) -> Machine:
        machines.append(Machine(prepare(tmp_path), models, orchestrator, command))
        return machines[-1]

    orchestrator.calls.clear()
    orchestrator.jobs.clear()
    yield run
    for machine in machines:
        machine.stop()


def test_each_card_has_a_worker_and_one_that_ends_is_started_again(
    start: StartMachine, orchestrator: FakeOrchestrator
) -> None:
    machine = start()
    body = machine.wait_healthy(2)
    assert body["status"] == "ok"
    assert [(card["card"], card["port"] - machine.port, card["worker_id"]) for card in body["cards"]] == [
        ("0", 1, "vast-17-0"),
        ("2", 2, "vast-17-2"),
    ]
    servers = machine.servers()
    assert {card: server.environ()["CUDA_VISIBLE_DEVICES"] for card, server in servers.items()} == {"0": "0", "2": "2"}
    assert sorted(path.name for path in (machine.folder / "work").iterdir()) == ["card-0", "card-2"]
    orchestrator.wait_for(lambda: {call.id for call in orchestrator.of("heartbeat")} == {"vast-17-0", "vast-17-2"})
    assert [machine.card(number).json()["status"] for number in (1, 2)] == ["ok", "ok"]

    # Every line of the common log names its card.
    lines = [line for line in machine.entries("settings") if "card" in line]
    assert {line["card"] for line in lines} == {"0", "2"}

    metrics = requests.get(f"{machine.url}/metrics", timeout=30).text
    assert [f'musetalk_card_up{{card="{card}"}} 1' in metrics for card in ("0", "2")] == [True, True]
    assert [f'musetalk_model_ready{{card="{card}"}} 1.0' in metrics for card in ("0", "2")] == [True, True]
    assert metrics.count("# TYPE musetalk_model_ready gauge") == 1
    forwarded = requests.get(f"{machine.url}/metrics", headers={"X-Forwarded-For": "192.0.2.1"}, timeout=30)
    assert (forwarded.status_code, forwarded.json()["error_type"]) == (401, "unauthorized")
    wrong = requests.post(f"{machine.url}/generate", json={}, timeout=30)
    assert wrong.status_code == 404
    assert "each card serves the other routes at its own port" in wrong.json()["error_message"]

    # The one that follows is not ready before this file goes.
    machine.command("hold-load")
    victim = servers["0"]
    for process in (*victim.children(recursive=True), victim):
        process.kill()
    machine.wait_healthy(1)
    wait_until(lambda: machine.health()[1]["cards"][0]["status"] == "starting")
    status, body = machine.health()
    assert (status, body["status"], body["cards"][1]["status"]) == (200, "ok", "ok")
    machine.release("hold-load")
    machine.wait_healthy(2)
    assert machine.servers()["0"].pid != victim.pid
    assert machine.servers()["2"].pid == servers["2"].pid
    assert "card 0: the server ended with status 137; it starts again in 1 s" in machine.log_text()


def test_a_stop_lets_the_running_job_finish_and_ends_everything(
    start: StartMachine, orchestrator: FakeOrchestrator
) -> None:
    machine = start()
    machine.command("hold-job")
    machine.wait_healthy(2)
    orchestrator.jobs.append(claimed(machine, 1))
    wait_until((machine.faults / "runs").exists)
    servers = machine.servers()
    # The platform signals every process of the group, or only the first one.
    os.kill(machine.process.pid, signal.SIGTERM)
    wait_until(lambda: machine.health()[1]["status"] == "draining")
    status, body = machine.health()
    assert (status, body["healthy"]) == (503, 0)
    assert orchestrator.of("status") == []
    machine.release("hold-job")
    assert machine.process.wait(60) == 0
    assert [call.body["status"] for call in orchestrator.of("status")] == ["succeeded"]
    assert [is_running(server.pid) for server in servers.values()] == [False, False]
    for number in range(3):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", machine.port + number))


def test_a_second_signal_aborts_the_job_of_every_card(start: StartMachine, orchestrator: FakeOrchestrator) -> None:
    machine = start()
    machine.command("hold-job")
    machine.wait_healthy(2)
    orchestrator.jobs.extend([claimed(machine, 1), claimed(machine, 2)])
    wait_until(lambda: (machine.faults / "runs").exists() and (machine.faults / "runs").read_text().count("\n") == 2)
    first = time.monotonic()
    machine.process.send_signal(signal.SIGTERM)
    # Two signals within two seconds count as one.
    wait_until(lambda: time.monotonic() > first + 2.1)
    assert machine.health()[1]["status"] == "draining"
    machine.process.send_signal(signal.SIGTERM)
    assert machine.process.wait(20) == 0
    assert {call.body["status"] for call in orchestrator.of("status")} == {"failed"}


def test_two_cards_share_the_work_and_what_they_prepared(
    start: StartMachine, orchestrator: FakeOrchestrator, tiny_models: Path
) -> None:
    machine = start(WHOLE, tiny_models)
    machine.wait_healthy(2)
    orchestrator.jobs.append(claimed(machine, 1))
    orchestrator.wait_for(lambda: len(orchestrator.of("status")) == 1)
    first = workers_of(machine)
    wait_until(lambda: list((machine.folder / "avatars").glob("*")))
    # The same source until the other card has had it.
    number = 1
    while len(workers_of(machine)) < 2:
        number += 1
        assert number < 40
        orchestrator.jobs.append(claimed(machine, number))
        wait_for_outcomes(orchestrator, number)
    assert {call.body["status"] for call in orchestrator.of("status")} == {"succeeded"}
    assert workers_of(machine) == {"0", "2"} > first
    sidecars = [json.loads(path.read_text()) for path in (machine.folder / "outputs").glob("*.json")]
    later = [each["video"] for each in sidecars if each["worker_id"] not in {f"vast-17-{card}" for card in first}]
    assert [video["source_frames_reused"] == video["source_frames"] for video in later] == [True] * len(later) != []


def wait_for_outcomes(orchestrator: FakeOrchestrator, count: int) -> None:
    """Wait until so many outcomes have been reported."""
    orchestrator.wait_for(lambda: len(orchestrator.of("status")) == count)


def workers_of(machine: Machine) -> set[str]:
    """The cards that have finished a job."""
    return {line["card"] for line in machine.entries("job_done")}


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"WORKER_GPUS": "all", "WORKER_MODE": "queue"}, "WORKER_GPUS needs buffer mode"),
        ({"WORKER_GPUS": "all", "WORKER_MODE": ""}, "WORKER_GPUS needs buffer mode"),
        ({"WORKER_GPUS": "0,5"}, "WORKER_GPUS names card 5; this machine has 0, 1, 2"),
        ({"WORKER_GPUS": "0;1"}, "WORKER_GPUS must be `all` or the numbers of cards"),
        ({"WORKER_GPUS": "all", "BATCH_SIZE": "many"}, "BATCH_SIZE must be a whole number"),
    ],
)
def test_what_cannot_work_ends_the_start_in_one_line(environment: dict[str, str], reason: str, tmp_path: Path) -> None:
    done = start_alone(tmp_path, environment, 28_000)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert reason in line


def test_a_list_on_the_cpu_needs_no_cards(tmp_path: Path) -> None:
    with reserved_ports(3) as port, socket.create_server(("127.0.0.1", port + 2)):
        done = start_alone(tmp_path, {"WORKER_GPUS": "5,7", "MUSETALK_DEVICE": "cpu"}, port)
    # Two workers, one of which has no port.
    assert done.stderr.startswith(f"error: port {port + 2} is in use")


def test_a_port_in_use_is_one_line_that_names_it(tmp_path: Path) -> None:
    with reserved_ports(4) as port, socket.create_server(("127.0.0.1", port + 2)):
        done = start_alone(tmp_path, {"WORKER_GPUS": "all"}, port)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"error: port {port + 2} is in use by another program; stop that one, or set WORKER_PORT to a free port\n"
    )


def start_alone(folder: Path, environment: dict[str, str], port: int) -> subprocess.CompletedProcess[str]:
    """Run the start on a machine with three pretended cards until it ends."""
    variables = {
        "PATH": pretend_cards(folder / "bin", 3),
        "MUSETALK_ENV_FILE": "none",
        "WORKER_MODE": "buffer",
        "WORKER_HOST": "127.0.0.1",
        "WORKER_PORT": str(port),
        "WORK_DIR": str(folder / "work"),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", "worker.cli.start"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
