"""Threads that end by an unforeseen error: restarted, counted, and in the end a new process."""

from __future__ import annotations

import threading

from tests.support.server import wait_until
from worker.supervision import Loop, Supervisor


class Noted:
    """A status and a counter that note what is done to them."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def fail(self, reason: str) -> None:
        self.done.append(f"fail: {reason}")

    def mark_lost(self, reason: str) -> None:
        self.done.append(f"lost: {reason}")

    def count(self, part: str) -> None:
        self.done.append(f"restart: {part}")


def test_the_third_error_in_ten_minutes_asks_for_a_new_process() -> None:
    noted, now = Noted(), [0.0]
    supervisor = Supervisor(noted, noted.count, now=lambda: now[0], notice_s=0.0)
    pauses = []
    for now[0] in (0.0, 500.0, 650.0, 700.0):
        pauses.append(supervisor.restart_pause_s("heartbeat", KeyError("odd")))
    wait_until(lambda: "lost: the heartbeat failed 3 times in ten minutes" in noted.done, 10)
    # At 650 s the first error is older than ten minutes.
    assert noted.done[:5] == ["restart: heartbeat"] * 4 + ["fail: the heartbeat failed 3 times in ten minutes"]
    assert pauses[0] <= 1 < pauses[3] <= 4


def test_errors_of_different_parts_do_not_add_up() -> None:
    noted = Noted()
    supervisor = Supervisor(noted, noted.count, notice_s=0.0)
    for part in ("poller", "heartbeat", "poller", "heartbeat"):
        supervisor.restart_pause_s(part, KeyError("odd"))
    assert noted.done == ["restart: poller", "restart: heartbeat"] * 2


def test_the_process_ends_only_after_the_running_job() -> None:
    noted, is_busy = Noted(), [True]
    supervisor = Supervisor(noted, noted.count, is_busy=lambda: is_busy[0], notice_s=0.0)
    for _ in range(5):
        supervisor.restart_pause_s("progress-sender", KeyError("odd"))
    assert not any(line.startswith("lost") for line in noted.done)
    is_busy[0] = False
    wait_until(lambda: [line for line in noted.done if line.startswith("lost")], 10)


def test_a_loop_survives_whatever_its_step_raises() -> None:
    noted = Noted()
    errors: list[BaseException] = [KeyError("odd"), SystemExit(3)]
    done = threading.Event()

    def step() -> float:
        if errors:
            raise errors.pop(0)
        done.set()
        return 3600.0

    ended: list[str] = []
    loop = Loop("heartbeat", step, Supervisor(noted, noted.count), last=lambda: ended.append("last"))
    loop.start()
    assert done.wait(20)
    assert noted.done == ["restart: heartbeat"] * 2
    loop.stop()
    loop.join(10)
    assert (loop.is_alive(), ended) == (False, ["last"])


def test_a_loop_that_is_woken_does_not_wait_for_its_turn() -> None:
    steps: list[int] = []

    def step() -> float:
        steps.append(1)
        return 3600.0

    loop = Loop("poller", step, Supervisor(Noted(), lambda _part: None))
    loop.start()
    wait_until(lambda: steps, 10)
    loop.wake()
    wait_until(lambda: len(steps) == 2, 10)
    loop.stop()
    loop.join(10)
