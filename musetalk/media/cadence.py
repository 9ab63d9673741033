"""The cadence of a camera: its true rate under the jitter of capture, and the beat that each picture belongs to.

Specified in docs/media.md#cadence. Knows no files.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from musetalk.media.timing import STANDARD_RATES, Timed

T = TypeVar("T")
Float64Array = NDArray[np.float64]

# Fewer pictures do not show a rate.
_MIN_PICTURES = 8
# The search for the period: so many pictures, within this share of a first estimate.
_SEARCHED = 2000
_SEARCH_SPAN = 0.04
# Length of the mean unit vector of all phases: 1 without jitter, 0.53 at 6 ms and 30 pictures a second, about
# 1 / sqrt(n) for times without a beat, and more for the best of many periods.
_MIN_CONCENTRATION, _CHANCE = 0.3, 3.2
# Without a visible beat: the longest usual distance in periods, when no picture is missing, and how many keep it; and
# the deviation from a straight line, which jitter keeps small and random distances let grow.
_GAPLESS, _GAPLESS_SHARE, _GAPLESS_DEVIATION, _GAPLESS_PICTURES = 2.6, 0.98, 0.5, 24
# Share of distances of half a period from which a source alternates between two rates.
_DOUBLED_SHARE = 0.1
_SNAP = 2e-4
_MAX_SNAP = 6e-3
# A picture is moved to another beat when it and the median of those behind it are this far off, in periods. Half a
# period would be the nearest beat; more is hysteresis.
_SLIP = 0.65
_AHEAD = 9
_MAX_PHASE = 0.75
_PHASE_PICTURES = 15


@dataclass(frozen=True)
class Cadence:
    """A steady rate (pictures a second) and its standard error, as a share of it."""

    rate: float
    error: float


def measured_cadence(times: Sequence[float]) -> Cadence | None:
    """The steady rate behind sorted presentation times (s); None when there is none, as in screen recordings."""
    stamps = np.unique(np.asarray(times, np.float64))
    if len(stamps) < _MIN_PICTURES:
        return None
    distances = np.diff(stamps)
    median = float(np.median(distances))
    near = distances[(distances > 0.5 * median) & (distances < 1.5 * median)]
    if len(near) == 0 or _alternates(distances, median):
        return None
    period, concentration = _best_period(stamps[:_SEARCHED] - stamps[0], float(near.mean()))
    if concentration < max(_MIN_CONCENTRATION, _CHANCE / math.sqrt(min(len(stamps), _SEARCHED))):
        return _gapless(stamps, distances)
    period, error = _fitted(stamps - stamps[0], period)
    if not 0.7 < median / period < 1.3:
        return None
    return Cadence(1 / period, error)


def _alternates(distances: Float64Array, median: float) -> bool:
    """Whether many distances are half or double the usual one, each group sharp: two rates, no jitter."""
    ratios = distances / median
    spread = float(np.median(np.abs(ratios - 1)))
    halves, doubles = np.abs(ratios - 0.5) < 0.06, np.abs(ratios - 2) < 0.06
    return spread < 0.1 and float((halves | doubles).mean()) > _DOUBLED_SHARE and float(halves.mean()) > 0.02


def _best_period(stamps: Float64Array, guess: float) -> tuple[float, float]:
    """The period near `guess` (s) whose beat the stamps keep best, and how well (0 to 1)."""
    n_beats = max(1.0, float(stamps[-1]) / guess)
    step = 1 / (4 * n_beats)
    shares = np.arange(-_SEARCH_SPAN, _SEARCH_SPAN + step, step)
    frequencies = (1 + shares) / guess
    lengths = np.array([abs(np.exp(2j * np.pi * frequency * stamps).mean()) for frequency in frequencies])
    best = int(lengths.argmax())
    return float(1 / frequencies[best]), float(lengths[best])


def _fitted(stamps: Float64Array, period: float) -> tuple[float, float]:
    """The period by least squares over growing beginnings of the stamps, and its standard error as a share."""
    error = 1.0
    n = min(len(stamps), 64)
    phase = float(np.angle(np.exp(2j * np.pi * stamps[:n] / period).mean())) / (2 * np.pi) * period
    while True:
        part = stamps[:n]
        beats = np.rint((part - phase) / period)
        slope, phase = (float(value) for value in np.polyfit(beats, part, 1))
        if 0.9 < slope / period < 1.1:
            period = slope
        spread = float(np.sqrt(np.sum((beats - beats.mean()) ** 2)))
        error = float(np.std(part - phase - period * beats)) / max(spread, 1e-9) / period
        if n == len(stamps):
            return period, error
        n = min(len(stamps), 2 * n)


def _gapless(stamps: Float64Array, distances: Float64Array) -> Cadence | None:
    """The mean rate when pictures are as dense as a steady rate without gaps would make them."""
    if len(stamps) < _GAPLESS_PICTURES:
        return None
    index = np.arange(len(stamps), dtype=np.float64)
    period, start = (float(value) for value in np.polyfit(index, stamps, 1))
    deviation = float(np.std(stamps - start - period * index)) / period
    if deviation > _GAPLESS_DEVIATION or (distances < _GAPLESS * period).mean() < _GAPLESS_SHARE:
        return None
    return Cadence(1 / period, deviation * math.sqrt(12) / len(stamps) ** 1.5)


def steady_rate(cadence: Cadence, declared: Iterable[Fraction | None]) -> Fraction:
    """The rate that a measured cadence stands for: a standard one within its error, else the measured one."""
    tolerance = min(max(_SNAP, 3 * cadence.error), _MAX_SNAP)

    def distance(rate: Fraction) -> float:
        return abs(float(rate) / cadence.rate - 1)

    near = [rate for rate in STANDARD_RATES if distance(rate) <= tolerance]
    said = set(declared)
    # Where the measurement leaves 29.97 and 30 open and the file says neither, a whole number is the likelier one.
    for preferred in ([rate for rate in near if rate in said], [rate for rate in near if rate.denominator == 1], near):
        if preferred:
            return min(preferred, key=distance)
    return Fraction(cadence.rate).limit_denominator(1001)


def on_beat(pictures: Iterable[Timed[T]], rate: Fraction) -> Iterator[Timed[T]]:
    """The pictures at whole beats of `rate` instead of their jittered times, which must increase.

    The first picture is beat 0. Each other one is on the beat after the one before it, unless it and those behind it
    are late: then the camera left pictures out. When they are early, two pictures share a beat.
    """
    waiting: deque[Timed[T]] = deque()
    source = iter(pictures)
    period = float(1 / rate)
    phase: float | None = None
    beat = -1
    while True:
        while len(waiting) < (_PHASE_PICTURES if phase is None else _AHEAD):
            picture = next(source, None)
            if picture is None:
                break
            waiting.append(picture)
        if not waiting:
            return
        if phase is None:
            phase = _first_phase([float(picture.time) for picture in waiting], period)
        beat += 1 + _slip(waiting, beat + 1, phase, period, is_first=beat < 0)
        picture = waiting.popleft()
        # Recorders that do not know how long the last picture is shown give it a millisecond.
        yield Timed(beat / rate, max(picture.duration, 1 / rate), picture.picture)


def _first_phase(times: Sequence[float], period: float) -> float:
    """Where beat 0 lies (s): by the first pictures, so that the jitter of the very first one does not count."""
    phase = float(np.angle(np.exp(2j * np.pi * np.asarray(times) / period).mean())) / (2 * np.pi) * period
    near = statistics.median(time - index * period for index, time in enumerate(times[1:4], 1)) if len(times) > 1 else 0
    phase += round((near - phase) / period) * period
    # Further away it is no jitter: a picture is missing behind the first.
    return phase - round(phase / period) * period if abs(phase) > _MAX_PHASE * period else phase


def _slip(waiting: Iterable[Timed[T]], beat: int, phase: float, period: float, *, is_first: bool) -> int:
    """By how many beats the first waiting picture is later (or, -1, earlier) than `beat`."""
    if is_first:
        return 0
    offs = [(float(picture.time) - phase) / period - (beat + index) for index, picture in enumerate(waiting)][:_AHEAD]
    middle = statistics.median(offs)
    if offs[0] > _SLIP and (middle > _SLIP or _stands_alone(offs)):
        return max(1, round(min(offs[0], middle) if middle > _SLIP else offs[0]))
    if offs[0] < -_SLIP and middle < -_SLIP:
        return -1
    return 0


def _stands_alone(offs: Sequence[float]) -> bool:
    """Whether the pictures after a long pause are too few or too irregular to have a middle."""
    return math.floor(offs[0]) >= 2 and min(offs) > _SLIP
