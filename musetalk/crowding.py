"""Fewer threads of tensor work while other processes want the same cores.

Threads of one operation wait for the slowest of them, by spinning. Where another process takes a core, all of them wait
for the one that lost it, and each operation may take more than twice as long; a single thread hardly loses anything.
How long the threads that always want a core have waited for one is the difference between a busy machine and an idle
one. Knows threads, not what they compute.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

logger = logging.getLogger(__name__)

_TASKS = Path("/proc/self/task")
# Share of the time for which a thread waited for a core from which on the machine is crowded. An idle machine shows 0
# to 0.05 (decoder and encoder take their turns), one busy process on two cores 0.3 to 0.5.
CROWDED = 0.12
# A thread that computes or spins wants a core nearly all the time; those of decoder and encoder do not.
_ALWAYS = 0.7
# Shorter pieces of work say little.
_MIN_PIECE_S = 0.2
# Pieces of work with fewer threads before one more is tried; doubled each time that it is crowded again.
_FIRST_PATIENCE, _LONGEST_PATIENCE = 8, 32

# Of each thread of the process by its id: seconds on a core, and seconds of waiting for one.
Turns = dict[str, tuple[float, float]]


def turns(tasks: Path = _TASKS) -> Turns:
    """How long each thread of this process ran and waited since it began; empty where the kernel does not count."""
    found: Turns = {}
    for path in tasks.glob("*/schedstat"):
        try:
            # In nanoseconds, and the number of turns.
            ran, waited, _ = path.read_text(encoding="ascii").split()
            found[path.parent.name] = int(ran) / 1e9, int(waited) / 1e9
        except (OSError, ValueError):
            # The thread has ended.
            continue
    return found


def waited_share(before: Turns, after: Turns, spent_s: float) -> float:
    """The largest share of `spent_s` for which one of the threads that always wanted a core waited for it."""
    shares = [0.0]
    for name, (ran, waited) in after.items():
        ran_before, waited_before = before.get(name, (ran, waited))
        if ran + waited - ran_before - waited_before >= _ALWAYS * spent_s:
            shares.append((waited - waited_before) / spent_s)
    return max(shares)


class ThreadsByCrowding:
    """The number of threads of tensor work in the calling thread, between one and what it was before the block."""

    def __init__(self, *, look: Callable[[], Turns] = turns, clock: Callable[[], float] = time.perf_counter) -> None:
        self._look, self._clock = look, clock
        self._most = self._n_threads = 1
        self._patience = self._left = _FIRST_PATIENCE
        # Whether one more thread was just given a try.
        self._is_trial = False
        self._since: tuple[float, Turns] = 0.0, {}

    def __enter__(self) -> ThreadsByCrowding:
        self._most = self._n_threads = torch.get_num_threads()
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._n_threads != self._most:
            torch.set_num_threads(self._most)

    def adjust(self) -> None:
        """Call between pieces of work, in the thread that computes them."""
        began, before = self._since
        spent_s = self._clock() - began
        if self._most == 1 or spent_s < _MIN_PIECE_S:
            return
        if waited_share(before, self._look(), spent_s) > CROWDED:
            if self._is_trial:
                self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
            if self._n_threads > 1:
                self._choose(self._n_threads - 1)
            self._left, self._is_trial = self._patience, False
        else:
            if self._is_trial or self._n_threads == self._most:
                self._patience = _FIRST_PATIENCE
            self._left, self._is_trial = self._left - 1, False
            if self._left <= 0 and self._n_threads < self._most:
                self._choose(self._n_threads + 1)
                self._left, self._is_trial = self._patience, True
        self._begin()

    def _choose(self, n_threads: int) -> None:
        logger.debug("threads of tensor work", extra={"threads": n_threads, "before": self._n_threads})
        self._n_threads = n_threads
        torch.set_num_threads(n_threads)

    def _begin(self) -> None:
        self._since = self._clock(), self._look()
