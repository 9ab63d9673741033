"""Progress of fetching weights, for a log or a bar. Knows no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress over all files: the current one, bytes received and in total; `n_total` grows if a size is unknown."""

    name: str
    n_done: int
    n_total: int

    @property
    def percent(self) -> int:
        """Percent received, rounded down, so that 100 means complete."""
        return self.n_done * 100 // self.n_total if self.n_total else 0


def every_percent(n_percent: int, report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Throttle `report` to one call per `n_percent`, for lines of text instead of a bar."""
    reported = 0

    def show(progress: Progress) -> None:
        nonlocal reported
        if progress.percent >= reported + n_percent:
            reported = progress.percent
            report(progress)

    return show


def _ignore(_message: object) -> None:
    """Drop a message."""


@dataclass(frozen=True)
class Watcher:
    """Observer of a fetch: `say` gets sentences for a log, `on_progress` every received block."""

    say: Callable[[str], None] = _ignore
    on_progress: Callable[[Progress], None] = _ignore
