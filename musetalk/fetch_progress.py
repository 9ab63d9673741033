"""Progress of a fetch of weights, for a log or a bar. Knows no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a fetch: bytes of all files and the current file; `n_total` grows where a size is unknown."""

    name: str
    n_done: int
    n_total: int

    @property
    def percent(self) -> int:
        """Whole percents; 100 only when all is there."""
        return self.n_done * 100 // self.n_total if self.n_total else 0


def every(n_percent: int, report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Wrap `report` so that it is called once per `n_percent` of a fetch, for lines of text instead of a bar."""
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
