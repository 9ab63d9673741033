"""Time as the claim loop sees it: clocks, waiting, and the pauses of a back-off. Knows no jobs."""

from __future__ import annotations

import random
import threading
import time

MAX_BACKOFF_S = 60.0


class Clock:
    """The machine's clocks, in seconds; the simulator of the claim loop has another one."""

    def monotonic(self) -> float:
        """Seconds that never jump, for intervals."""
        return time.monotonic()

    def time(self) -> float:
        """Seconds since the epoch, for what outlives the process."""
        return time.time()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until `event` is set, for `seconds` at most; return whether it is set."""
        return event.wait(seconds)


class Backoff:
    """Pauses after failures: 1, 2, 4 .. 60 s, with jitter so that a fleet does not retry in step."""

    def __init__(self, longest_s: float = MAX_BACKOFF_S) -> None:
        self._longest_s = longest_s
        self._failures = 0

    def reset(self) -> None:
        """Start again at one second, after a success."""
        self._failures = 0

    def next_s(self, retry_after_s: float | None = None) -> float:
        """Return the pause after another failure, in seconds; a longer Retry-After of the server counts."""
        pause = pause_after(self._failures, self._longest_s)
        self._failures += 1
        return min(self._longest_s, max(pause, retry_after_s or 0.0))


def pause_after(n_failures: int, longest_s: float = MAX_BACKOFF_S) -> float:
    """The pause after `n_failures` earlier ones: 1, 2, 4 .. `longest_s` seconds, less up to a quarter."""
    pause = min(longest_s, 2.0 ** min(n_failures, 20))
    return pause * random.uniform(0.75, 1.0)  # noqa: S311 - spreads load, hides nothing
