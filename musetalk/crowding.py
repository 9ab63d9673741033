"""Fewer threads of tensor work while other processes want the same cores.

Threads of one operation wait for the slowest of them, by spinning. Where another process takes a core, all of them wait
for the one that lost it, and each operation may take more than twice as long; a single thread hardly loses anything.
How long the calling thread waited for a core is the difference between a busy machine and an idle one. Knows threads,
not what they compute.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

logger = logging.getLogger(__name__)

# Nanoseconds on a core, nanoseconds of waiting for one, number of turns; of the thread that reads it.
_SCHEDSTAT = Path("/proc/thread-self/schedstat")
# Share of the time for which the thread waited for a core from which on the machine is crowded. An idle machine shows
# 0 to 0.05 (decoder and encoder take their turns), one busy process on two cores 0.3 to 0.5.
CROWDED = 0.12
# Shorter pieces of work say little.
_MIN_PIECE_S = 0.2
# Pieces of work with fewer threads before one more is tried; doubled each time that it is crowded again.
_FIRST_PATIENCE, _LONGEST_PATIENCE = 8, 32


def waited_s() -> float | None:
    """How long (s) the calling thread has waited for a core since it began; None where the kernel does not count."""
    try:
        return int(_SCHEDSTAT.read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


class ThreadsByCrowding:
    """The number of threads of tensor work in the calling thread, between one and what it was before the block."""

    def __init__(
        self, *, waited: Callable[[], float | None] = waited_s, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._waited, self._clock = waited, clock
        self._most = self._n_threads = 1
        self._patience = self._left = _FIRST_PATIENCE
        # Whether one more thread was just given a try.
        self._is_trial = False
        self._since: tuple[float, float] | None = None

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
        waited = self._waited()
        if self._most == 1 or self._since is None or waited is None:
            return
        spent_s = self._clock() - self._since[0]
        if spent_s < _MIN_PIECE_S:
            return
        if waited - self._since[1] > CROWDED * spent_s:
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
        waited = self._waited()
        self._since = None if waited is None else (self._clock(), waited)
