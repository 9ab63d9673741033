"""Effects of each shutdown command, with a core and a claim loop that only record calls."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from worker import lifecycle
from worker.lifecycle import EXIT_ABORTED, EXIT_RESTART, LAST_REPORTS_S, Lifecycle
from worker.readiness import WorkerStatus


class NotedStatus(WorkerStatus):
    """A status that notes when it drains."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self._notes = notes

    def drain(self) -> None:
        super().drain()
        self._notes.note("drain")


class Notes:
    """A core, a claim loop and a process that note what is done to them."""

    def __init__(self) -> None:
        self.done: list[Any] = []
        self.status = NotedStatus(self)
        self.changed = threading.Condition()
        self.is_running = True

    def note(self, what: Any) -> None:
        with self.changed:
            self.done.append(what)
            self.changed.notify_all()

    def stop(self) -> None:
        self.note("stop claiming")

    def stop_running(self, reason: str) -> bool:
        self.note(f"stop the job: {reason}")
        return self.is_running

    def wait_for(self, what: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: what in self.done, 10), self.done


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "ABORT_S", 0.01)
    monkeypatch.setattr(lifecycle, "RESTART_S", 0.2)
    monkeypatch.setattr(lifecycle, "LAST_REPORTS_S", 0.0)


def make(notes: Notes, graceful_s: float) -> Lifecycle:
    life = Lifecycle(
        notes,
        lambda: notes,
        graceful_s=graceful_s,
        exit_now=lambda status: notes.note(("exit", status)),
        end_process=lambda: notes.note("end the process"),
    )
    life.start()
    return life


def test_a_short_graceful_time_is_shared_with_the_job(notes: Notes) -> None:
    assert LAST_REPORTS_S > 0.6
    life = make(notes, 0.6)
    life.request("stop")
    notes.wait_for("stop claiming")
    assert "stop the job: shutdown" not in notes.done
    notes.wait_for("stop the job: shutdown")


@pytest.mark.usefixtures("quick")
def test_a_stop_drains_and_stops_the_job_when_the_time_is_over(notes: Notes) -> None:
    life = make(notes, 0.3)
    life.request("stop")
    notes.wait_for("stop claiming")
    assert "stop the job: shutdown" not in notes.done
    notes.wait_for("stop the job: shutdown")
    assert ("exit", EXIT_ABORTED) not in notes.done


@pytest.mark.usefixtures("quick")
def test_an_abort_stops_the_job_and_exits(notes: Notes) -> None:
    life = make(notes, 1000)
    life.request("stop")
    notes.wait_for("stop claiming")
    life.request("stop")
    life.request("abort")
    notes.wait_for(("exit", EXIT_ABORTED))
    assert notes.done.index("stop the job: shutdown") < notes.done.index(("exit", EXIT_ABORTED))


@pytest.mark.usefixtures("quick")
def test_a_lost_core_ends_the_process_in_order_or_by_force(notes: Notes) -> None:
    make(notes, 1000)
    notes.status.mark_lost("the GPU is gone")
    notes.wait_for("end the process")
    assert "stop claiming" in notes.done
    # Nobody ended it, so it is cut off.
    notes.wait_for(("exit", EXIT_RESTART))
