"""The claim loop in a simulated world: orchestrator faults x disk faults x signals x restarts, with virtual time.

Asserted after every schedule: each claimed job has one outcome, accepted or stored or in the memory of a living process
that says so; no second, different outcome; heartbeat gaps of 12 s at most; no claim while busy, draining, not ready or
without room.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import poller
from tests.support.claim_simulator import (
    Chooser,
    Event,
    PlannedChooser,
    event_schedules,
    quick_rounds,
    random_schedule,
    simulate,
)
from worker.outbox import Outbox
from worker.records import Disk

CHUNK = 2500


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in quick_rounds().items():
        monkeypatch.setattr(poller, name, value)
    state = random.getstate()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    random.setstate(state)


def run_seeds(seeds: range) -> Counter[str]:
    """Run one random schedule for each seed; a failure names its seed."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        events, chooser, ends = random_schedule(seed)
        try:
            seen.update(simulate(events, chooser, ends=ends).seen)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}; events: {events}") from error
    return seen


@pytest.mark.parametrize("first", range(0, 10_000, CHUNK))
def test_no_random_schedule_loses_or_doubles_an_outcome(first: int) -> None:
    print(f"seeds {first} to {first + CHUNK - 1}")
    seen = run_seeds(range(first, first + CHUNK))
    # The schedules do reach what they are about.
    for what in ("killed", "ended", "in memory", "reserve used", "disk error", "stopped", "killed before the record"):
        assert seen[what] >= 5, f"{what}: {seen}"


@pytest.mark.slow
def test_no_schedule_of_two_hundred_thousand_loses_or_doubles_an_outcome() -> None:
    first = random.SystemRandom().randrange(10**6, 10**9)
    print(f"seeds from {first}")
    run_seeds(range(first, first + 200_000))


def check_events(depth: int) -> None:
    for events in event_schedules(depth):
        random.seed(1)
        try:
            simulate(events, Chooser(), ends=7.0 * depth)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}; events: {events}") from error


def test_no_sequence_of_six_events_loses_or_doubles_an_outcome() -> None:
    check_events(6)


@pytest.mark.slow
def test_no_sequence_of_seven_events_loses_or_doubles_an_outcome() -> None:
    check_events(7)


JOBS: list[tuple[float, Event]] = [(0.0, "job"), (0.0, "job")]


def check_faults(n_faults: int, n_operations: int) -> int:
    """Every choice of `n_faults` faults among the first operations of a worker with two jobs; returns the number."""
    n_runs = 0
    for places in itertools.combinations(range(n_operations), n_faults):
        plans: list[Mapping[int, int]] = [{}]
        for place in places:
            plans = [{**plan, place: option} for plan in plans for option in range(1, 5)]
        for plan in plans:
            random.seed(1)
            chooser = PlannedChooser(plan)
            try:
                simulate(JOBS, chooser, ends=80.0)
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error}; faults: {plan}") from error
            n_runs += 1
    return n_runs


def test_no_single_fault_and_no_pair_of_faults_loses_or_doubles_an_outcome() -> None:
    assert check_faults(1, 60) == 240
    assert check_faults(2, 22) == 231 * 16


@pytest.mark.slow
def test_no_three_faults_lose_or_double_an_outcome() -> None:
    check_faults(3, 20)


# -- the simulator finds what it looks for ----------------------------------------------------------------------------


def _forgets(self: Outbox, *_args: Any, **_options: Any) -> None:
    """A change that a mistake could make: nothing is done."""


def _move_early(self: Any, entry: Any) -> None:
    self._disk.remove("claimed.json")


MISTAKES: dict[str, tuple[type, str, Any]] = {
    "the claim is not written": (Outbox, "write_claim", _forgets),
    "an outcome is removed before it is moved": (Outbox, "_move_from_claim", _move_early),
    "an accepted outcome stays": (Outbox, "_forget", Outbox._unlist),
    "the disk is not checked": (Outbox, "check", lambda _self: None),
    "a failed report counts as accepted": (Outbox, "mark_failed", lambda self, entry, _outcome: self._forget(entry)),
    "a worker that is not ready claims": (poller.Poller, "_may_claim", lambda self: self.heartbeat.is_accepted),
    "heartbeats come too late": (poller.Heartbeat, "step", lambda self: (self.beat(), 15.0)[1]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_simulation_finds_a_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, changed = MISTAKES[mistake]
    monkeypatch.setattr(owner, name, changed)
    with pytest.raises(AssertionError, match="seed"):
        run_seeds(range(2000))


def test_the_simulated_disk_has_the_operations_of_the_real_one() -> None:
    from tests.support.claim_simulator import SimDisk

    operations = {name for name in vars(Disk) if not name.startswith("_")}
    assert operations <= set(vars(SimDisk))
