"""Threads that end by an unforeseen error: restarted, counted, and in the end a new process."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import musetalk_core
from musetalk.errors import WeightsError
from tests.support.scripted_core import ScriptedCore
from tests.support.server import wait_until
from worker.engine import EngineLoader
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


def loading_core(folder: Path, monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> ScriptedCore:
    """A core whose loading raises these errors, one at each try."""

    def load(_self: EngineLoader) -> Any:
        if errors:
            raise errors.pop(0)
        return SimpleNamespace(models=SimpleNamespace(version="v15"))

    monkeypatch.setattr(EngineLoader, "load", load)
    return ScriptedCore(folder, MIN_FREE_DISK_MB="1")


def test_loading_begins_again_after_an_unforeseen_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = loading_core(tmp_path, monkeypatch, [KeyError("odd")])
    core.start_loading().join(20)
    assert core.engine.models.version == "v15"
    assert b'musetalk_restarts_total{part="model-loader"} 1.0' in core.metrics.text()
    assert core.status.snapshot(model="v15", loading="", is_busy=False).state == "ready"


def test_what_was_loaded_is_exempt_from_the_collections_of_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = loading_core(tmp_path, monkeypatch, [])
    assert gc.get_freeze_count() == 0
    core.start_loading().join(20)
    assert gc.get_freeze_count() > 10_000


def test_loading_stops_at_an_error_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = loading_core(tmp_path, monkeypatch, [WeightsError("unet.pth is missing")])
    core.start_loading().join(20)
    assert core.status.snapshot(model=None, loading="", is_busy=False).reason == "unet.pth is missing"
    assert b'musetalk_restarts_total{part="model-loader"} 0.0' in core.metrics.text()


def test_loading_waits_until_the_disk_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = ["WORK_DIR has 3 MiB free"]
    monkeypatch.setattr(musetalk_core, "folder_problem", lambda *_: problems.pop() if problems else None)
    core = loading_core(tmp_path, monkeypatch, [])
    thread = core.start_loading()
    wait_until(lambda: core.work_dir.waiting_for == "WORK_DIR has 3 MiB free", 10)
    # The claim loop may report what a killed process left.
    assert core.work_dir.is_ours
    thread.join(20)
    assert core.work_dir.waiting_for is None
    assert core.engine.models.version == "v15"
