"""Threads of tensor work on a crowded machine: fewer at once, more with patience, all of them afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musetalk.crowding import CROWDED, ThreadsByCrowding, Turns, turns, waited_share


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Machine:
    """Pieces of work of a second each, crowded while `others` want cores and more threads than are free compute."""

    def __init__(self, n_cores: int = 4) -> None:
        self.n_cores, self.others = n_cores, 0
        self.now = self.waited = 100.0

    def turns(self) -> Turns:
        return {"worker": (self.now - self.waited, self.waited), "encoder": (self.now / 9, self.now / 3)}

    def work(self, threads: ThreadsByCrowding, n_pieces: int) -> list[int]:
        numbers = []
        for _ in range(n_pieces):
            numbers.append(torch.get_num_threads())
            self.now += 1
            self.waited += 0.4 if self.others and numbers[-1] + self.others > self.n_cores else 0.01
            threads.adjust()
        return numbers

    def threads(self) -> ThreadsByCrowding:
        return ThreadsByCrowding(look=self.turns, clock=lambda: self.now)


def test_a_lone_job_keeps_its_threads() -> None:
    machine = Machine()
    with machine.threads() as threads:
        assert set(machine.work(threads, 200)) == {4}


def test_beside_neighbours_a_job_takes_the_cores_that_are_left() -> None:
    machine = Machine()
    with machine.threads() as threads:
        machine.others = 2
        numbers = machine.work(threads, 200)
    assert numbers[:3] == [4, 3, 2]
    assert set(numbers[3:]) == {2, 3}
    # One more is tried now and then, and less and less often.
    tries = [index for index, number in enumerate(numbers[3:]) if number == 3]
    assert 3 <= len(tries) <= 7
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps == sorted(gaps)
    assert torch.get_num_threads() == 4


def test_when_the_neighbours_leave_all_threads_come_back() -> None:
    machine = Machine()
    with machine.threads() as threads:
        machine.others = 4
        assert machine.work(threads, 60)[-1] in {1, 2}
        machine.others = 0
        assert machine.work(threads, 90)[-1] == 4


def test_one_thread_always_remains_and_the_old_number_comes_back_after_an_error() -> None:
    machine = Machine()
    machine.others = 99

    def fail() -> None:
        with machine.threads() as threads:
            assert min(machine.work(threads, 30)) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == 4


@given(waits=st.lists(st.floats(0, 1), max_size=60))
def test_the_number_stays_between_one_and_that_of_before(waits: list[float]) -> None:
    now = waited = 0.0
    with ThreadsByCrowding(look=lambda: {"1": (now - waited, waited)}, clock=lambda: now) as threads:
        for wait in waits:
            now, waited = now + 1, waited + wait
            before = torch.get_num_threads()
            threads.adjust()
            assert 1 <= torch.get_num_threads() <= 4
            assert torch.get_num_threads() >= before or wait > CROWDED - 1e-9
    assert torch.get_num_threads() == 4


def test_short_pieces_and_kernels_that_do_not_count_change_nothing() -> None:
    now = 0.0
    with ThreadsByCrowding(look=lambda: {"1": (0.0, now)}, clock=lambda: now) as threads:
        now = 0.1
        threads.adjust()
        assert torch.get_num_threads() == 4
    with ThreadsByCrowding(look=dict, clock=lambda: now) as threads:
        now = 10
        threads.adjust()
        assert torch.get_num_threads() == 4


def test_only_threads_that_always_want_a_core_count_and_the_worst_of_them() -> None:
    before = {"main": (10.0, 0.0), "worker": (9.0, 1.0), "encoder": (1.0, 1.0), "ended": (5.0, 5.0)}
    after = {"main": (11.0, 0.0), "worker": (9.6, 1.4), "encoder": (1.1, 1.5), "new": (0.1, 0.9)}
    assert waited_share(before, after, 1.0) == pytest.approx(0.4)
    assert waited_share(before, before, 1.0) == 0.0


@pytest.mark.skipif(not turns(), reason="this kernel does not count how long threads wait")
def test_the_kernel_counts_how_long_a_thread_waited_for_a_core() -> None:
    cores = os.sched_getaffinity(0)
    core = min(cores)
    program = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    busy = subprocess.Popen([sys.executable, "-S", "-c", program])
    try:
        os.sched_setaffinity(0, {core})
        before, began = turns(), time.perf_counter()
        # Until this thread has had its share of the core they fight for.
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            pass
        assert waited_share(before, turns(), time.perf_counter() - began) > CROWDED
    finally:
        os.sched_setaffinity(0, cores)
        busy.kill()
        busy.wait()
