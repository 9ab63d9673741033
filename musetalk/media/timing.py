"""Clock arithmetic of a source: the rate of the output, and the picture each of its ticks shows.

Specified in docs/media.md#video-rate-and-time. Exact fractions throughout; knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

from musetalk.media.limits import MediaLimits

T = TypeVar("T")

STANDARD_RATES = tuple(
    Fraction(numerator, denominator)
    for numerator, denominator in (
        *((rate * 1000, 1001) for rate in (12, 15, 24, 30, 48, 60, 120, 240)),
        *((rate, 1) for rate in (10, 12, 15, 16, 18, 20, 24, 25, 30, 48, 50, 60, 72, 90, 100, 120, 144, 240)),
    )
)
# Containers with clocks of 1 ms make 19001/634 of 30000/1001. The true distance of 29.97 and 30 is 0.1 %.
_SNAP = Fraction(2, 10_000)
_DEFAULT_RATE = Fraction(25)
_SANE_RATES = (Fraction(1, 100), Fraction(100_000))

# Clocks of 1 ms and cameras put pictures a little behind the tick that they belong to.
_MIN_TOLERANCE = Fraction(1, 1000)


def as_fraction(value: Any) -> Fraction | None:
    """A rational of PyAV (a Fraction before release 19, a type of its own since) as a Fraction; None when unset."""
    if value is None or not value.denominator or not value.numerator:
        return None
    return Fraction(value.numerator, value.denominator)


def nominal_rate(candidates: Iterable[Fraction | None], default: Fraction = _DEFAULT_RATE) -> Fraction:
    """The first sane one of the rates a file declares (pictures per second), as the standard rate it stands for."""
    for candidate in candidates:
        if candidate is not None and _SANE_RATES[0] <= candidate <= _SANE_RATES[1]:
            nearest = min(STANDARD_RATES, key=lambda rate: abs(rate - candidate))
            if abs(nearest - candidate) <= _SNAP * nearest:
                return nearest
            return candidate.limit_denominator(1001) or candidate
    return default


def output_rate(source_rate: Fraction, limits: MediaLimits) -> Fraction:
    """Return the output's rate for a source of `source_rate` pictures per second.

    Within the limits it stays the same. A faster rate is divided by the smallest whole number that gives at most
    `resampled_rate`, a slower one is raised to `raised_rate`.
    """
    if source_rate > limits.max_rate:
        return source_rate / math.ceil(source_rate / limits.resampled_rate)
    return limits.raised_rate if source_rate < limits.min_rate else source_rate


def tolerance(rate: Fraction, source_rate: Fraction, clock_grain: Fraction) -> Fraction:
    """Tolerance (s) for a picture later than its tick: the clock's grain, at most a quarter of a picture."""
    return min(max(_MIN_TOLERANCE, clock_grain), 1 / (4 * max(rate, source_rate)))


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A picture and when it is shown: from `time` for `duration`, both in s from the first picture."""

    time: Fraction
    duration: Fraction
    picture: T


def on_grid(pictures: Iterable[Timed[T]], rate: Fraction, late: Fraction) -> Iterator[tuple[int, T, bool]]:
    """(tick, picture, is_repeat) for the ticks 0, 1, ... of `rate`; times must increase.

    Tick t shows the last picture with time <= t / rate + `late`. The last picture stays for its duration. Pictures
    that no tick shows are dropped; the picture of the first tick is the first one.
    """
    tick, is_repeat = 0, False
    current: Timed[T] | None = None
    for timed in pictures:
        if current is not None:
            while tick / rate + late < timed.time:
                yield tick, current.picture, is_repeat
                tick, is_repeat = tick + 1, True
        current, is_repeat = timed, False
    if current is None:
        return
    for last in range(tick, n_ticks(current.time + current.duration, rate)):
        yield last, current.picture, is_repeat
        is_repeat = True


def n_ticks(duration: Fraction, rate: Fraction) -> int:
    """Number of ticks of `rate` that begin within `duration` (s), at least one; a quarter of a tick is rounding."""
    return max(1, math.ceil(duration * rate - Fraction(1, 4)))


class Clock:
    """Time stamps of decoded pictures, made to start at 0 and to increase.

    A stamp that is missing or not later than the one before it is replaced by the time before plus one frame.
    """

    def __init__(self, source_rate: Fraction, time_base: Fraction | None, *, trusts_timestamps: bool) -> None:
        self._frame = 1 / source_rate
        self._time_base = time_base
        self._trusts = trusts_timestamps and time_base is not None
        self._first: int | None = None
        self._last: Fraction | None = None
        self._gap = self._frame

    def stamp(self, pts: int | None, duration: int | None) -> tuple[Fraction, Fraction]:
        """Time and duration (s) of the next picture, from its stamp and duration in units of the time base."""
        time = self._from_pts(pts)
        if self._last is None:
            time = Fraction(0)
        elif time is None or time <= self._last:
            time = self._last + self._frame
        else:
            self._gap = time - self._last
        self._last = time
        if not self._trusts or self._time_base is None:
            return time, self._frame
        if duration is not None and duration > 0:
            return time, duration * self._time_base
        # Recorders that write no durations: the picture before is the best guess.
        return time, min(self._gap, Fraction(1))

    def _from_pts(self, pts: int | None) -> Fraction | None:
        if not self._trusts or self._time_base is None or pts is None:
            return None
        if self._first is None:
            self._first = pts
        return (pts - self._first) * self._time_base


class PacketStamp(NamedTuple):
    """Times of one packet, in units of the time base: presentation, decoding, duration (0: unknown)."""

    pts: int | None
    dts: int | None
    duration: int


@dataclass(frozen=True)
class PacketTimes:
    """Summary of all time stamps of a stream: pictures, length (s), and whether the stamps are consistent."""

    n_pictures: int
    duration: Fraction | None
    average_rate: Fraction | None
    is_sound: bool


def packet_times(stamps: Sequence[PacketStamp], time_base: Fraction | None) -> PacketTimes:
    """Judge the stamps of all packets, in the order of the file.

    Sound means: hardly any presentation time is missing or given twice, and the decoding clock never runs back.
    """
    known = sorted((stamp for stamp in stamps if stamp.pts is not None), key=lambda stamp: stamp.pts or 0)
    if time_base is None or not known:
        return PacketTimes(len(stamps), None, None, is_sound=False)
    shown = [stamp.pts for stamp in known if stamp.pts is not None]
    clock = [stamp.dts for stamp in stamps if stamp.dts is not None]
    n_missing = len(stamps) - len(known)
    n_twice = sum(first == second for first, second in pairwise(shown))
    runs_back = any(second < first for first, second in pairwise(clock))
    span = (shown[-1] - shown[0]) * time_base
    average = (len(shown) - 1) / span if span > 0 else None
    last = known[-1].duration * time_base if known[-1].duration else (1 / average if average else Fraction(0))
    is_sound = not runs_back and 100 * (n_missing + n_twice) <= len(stamps)
    return PacketTimes(len(stamps), span + last, average, is_sound=is_sound)
