"""run_worker.sh with an imitation of Salad's queue and binary: attempts that a stop or a replaced process costs.

The queue gives each job four attempts. A job may lose the attempt that really ran, or one that waited at a worker until
that ended; none is lost to a refusal.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.salad_queue import SaladQueue
from tests.support.server import ROOT, Server, wait_until

Start = Callable[..., Server]


@pytest.fixture
def queue() -> Iterator[SaladQueue]:
    # The control plane was seen to hand a rejected job out again at once, all four times.
    with SaladQueue(pauses_s=(0.0, 0.0, 0.0, 0.0)) as queue:
        yield queue


@pytest.fixture
def start(tmp_path: Path, queue: SaladQueue) -> Iterator[Start]:
    servers: list[Server] = []

    def run(**environment: str) -> Server:
        binary = queue.write_binary(tmp_path)
        script = ["bash", str(ROOT / "run_worker.sh"), "--config", "tests/support/quick.conf.py"]
        settings = {"MUSETALK_PYTHON": sys.executable, "SALAD_QUEUE_WORKER": str(binary), **environment}
        servers.append(Server(tmp_path, tmp_path / "no-models", faulty=False, command=script, **settings))
        return servers[-1]

    yield run
    for server in servers:
        for name in ("hold-job", "hold-load"):
            server.release(name)
        children = psutil.Process(server.process.pid).children(recursive=True) if server.process.poll() is None else []
        server.stop()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def runs(server: Server) -> list[str]:
    """Jobs that really ran, in order."""
    path = server.faults / "runs"
    return path.read_text().split() if path.exists() else []


def serving_process(server: Server) -> psutil.Process:
    """The process that serves requests: the child of Gunicorn's parent."""
    (worker,) = gunicorn_parent(server).children()
    return worker


def gunicorn_parent(server: Server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children()
    (parent,) = [child for child in children if "gunicorn" in " ".join(child.cmdline())]
    return parent


def start_job(server: Server, queue: SaladQueue, *ids: str) -> None:
    """Submit jobs, the first of which runs until `hold-job` is released."""
    server.command("hold-job")
    queue.submit(*ids)
    wait_until(lambda: runs(server), 60)


def test_jobs_are_run_one_after_the_other(start: Start, queue: SaladQueue) -> None:
    server = start()
    queue.submit("a", "b", "c")
    queue.wait_for_end("a", "b", "c")
    assert queue.attempts() == {name: ["completed"] for name in "abc"}
    assert runs(server) == ["a", "b", "c"]
    assert queue.jobs["a"].output is not None
    assert queue.jobs["a"].output["status"] == "success"


def test_a_stop_of_an_idle_worker_costs_a_job_that_arrives_at_most_one_attempt(start: Start, queue: SaladQueue) -> None:
    server = start()
    wait_until(lambda: server.entries_starting("run_worker: ready"), 60)
    queue.submit("first")
    queue.wait_for_end("first")
    time.sleep(1.5)
    server.process.send_signal(signal.SIGTERM)
    queue.submit("late", "later")
    assert server.process.wait(15) == 0
    assert sum(queue.n_lost().values()) <= 1


def test_a_stop_in_a_job_costs_no_job_more_than_one_attempt(start: Start, queue: SaladQueue) -> None:
    server = start()
    start_job(server, queue, "running", "next", "third")
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.health()[1]["status"] == "draining")
    server.release("hold-job")
    assert server.process.wait(30) == 0
    assert queue.attempts()["running"] == ["completed"]
    assert queue.n_lost()["next"] <= 1
    assert queue.attempts()["third"] == []
    assert runs(server) == ["running"]


def test_a_job_that_does_not_end_in_time_loses_only_the_attempt_that_ran(start: Start, queue: SaladQueue) -> None:
    server = start(GRACEFUL_TIMEOUT_SEC="4")
    start_job(server, queue, "endless", "next")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert queue.attempts() == {"endless": ["interrupted"], "next": []}


def test_a_killed_serving_process_costs_one_attempt_however_long_the_next_one_loads(
    start: Start, queue: SaladQueue
) -> None:
    """Three jobs failed for good in 1.3 s, each posted four times to a process whose models were loading."""
    server = start()
    start_job(server, queue, "running", "next", "third")
    server.command("hold-load")
    serving_process(server).kill()
    server.release("hold-job")
    wait_until(lambda: server.health()[1]["status"] == "starting")
    time.sleep(2)
    server.release("hold-load")
    queue.wait_for_end("running", "next", "third")
    assert queue.n_lost() == {"running": 1, "next": 0, "third": 0}
    assert runs(server) == ["running", "running", "next", "third"]


def test_a_lost_gpu_costs_one_attempt(start: Start, queue: SaladQueue) -> None:
    server = start()
    wait_until(lambda: server.entries_starting("run_worker: ready"), 60)
    server.command("lose-gpu")
    server.command("hold-load")
    queue.submit("running", "next")
    wait_until(lambda: server.entries("new process needed"))
    wait_until(lambda: len(server.entries("settings")) == 2)
    time.sleep(2)
    server.release("hold-load")
    queue.wait_for_end("running", "next")
    assert queue.n_lost() == {"running": 1, "next": 0}


def test_one_sigterm_to_every_process_finishes_the_job(start: Start, queue: SaladQueue) -> None:
    """The script passed the signal on, and the server took it for a second one and aborted."""
    server = start()
    start_job(server, queue, "running", "next")
    tree = psutil.Process(server.process.pid)
    for process in [*tree.children(recursive=True), tree]:
        process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.health()[1]["status"] == "draining")
    time.sleep(1)
    server.release("hold-job")
    assert server.process.wait(30) == 0
    assert server.entries("aborting") == []
    assert [entry["outcome"] for entry in server.entries("job_done")] == ["succeeded"]
    # The binary got the signal as well, and dropped the job it had.
    assert queue.attempts() == {"running": ["interrupted"], "next": []}


def test_a_real_second_sigterm_aborts(start: Start, queue: SaladQueue) -> None:
    server = start()
    start_job(server, queue, "running")
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.health()[1]["status"] == "draining")
    time.sleep(2.5)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(15)
    assert time.monotonic() - begun < 5
    assert server.entries("aborting")


def test_a_job_is_finished_and_delivered_when_gunicorns_parent_is_killed(start: Start, queue: SaladQueue) -> None:
    server = start()
    start_job(server, queue, "running")
    worker, parent = serving_process(server), gunicorn_parent(server)
    os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: server.health()[1]["status"] == "draining")
    server.release("hold-job")
    server.process.wait(30)
    wait_until(lambda: not worker.is_running(), 10)
    assert queue.attempts() == {"running": ["completed"]}


def test_without_its_parent_a_job_is_returned_within_the_graceful_time(start: Start, queue: SaladQueue) -> None:
    """The serving process ran on to the job's end, with the port, the folder and the GPU."""
    server = start(GRACEFUL_TIMEOUT_SEC="4")
    start_job(server, queue, "endless")
    worker = serving_process(server)
    begun = time.monotonic()
    os.kill(gunicorn_parent(server).pid, signal.SIGKILL)
    wait_until(lambda: not worker.is_running(), 15)
    assert time.monotonic() - begun < 9
    server.process.wait(15)
    assert queue.n_lost() == {"endless": 1}


def test_health_gives_the_reason_in_milliseconds_to_the_end_of_a_stop(start: Start, queue: SaladQueue) -> None:
    server = start()
    start_job(server, queue, "running")
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.health()[1]["status"] == "draining")
    ends = time.monotonic() + 3
    times: list[float] = []
    while time.monotonic() < ends:
        begun = time.monotonic()
        status, body = server.health()
        times.append(time.monotonic() - begun)
        assert (status, body["status"]) == (503, "draining")
        assert body["reason"]
    assert sorted(times)[len(times) // 2] < 0.2
    assert max(times) < 1
    server.release("hold-job")
    assert server.process.wait(30) == 0
