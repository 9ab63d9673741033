"""The clock of sound: samples sit where their time stamps say, as every player plays them.

Specified in docs/media.md#sound-and-time. Knows no files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

# Shifts below this are the rounding of a container's clock (1 ms in Matroska and FLV) or of its writer.
TOLERANCE_S = Fraction(4, 1000)
# A shift counts only when it lasts: browsers stamp the sound of a microphone with several milliseconds of jitter.
_WINDOW_S = Fraction(1, 4)
_WINDOW_FRAMES = 12
# A shift of a last few frames must be this large, because too few of them follow to distinguish it from jitter.
_CLEAR_S = Fraction(40, 1000)
_SILENCE_SAMPLES = 2**14
# Silence for a hole of a meeting or a stream; a longer jump is a clock that was set again.
MAX_HOLE_S = Fraction(60)
# Sound that is given twice; a longer jump back is a clock that was set again.
MAX_OVERLAP_S = Fraction(2)


@dataclass(frozen=True)
class Block:
    """Samples (channels, n) of one decoded frame, their rate in Hz, and their time in s where the file says it."""

    samples: Float32Array
    rate: int
    time: Fraction | None

    @property
    def duration(self) -> Fraction:
        """Length in seconds."""
        return Fraction(self.samples.shape[1], self.rate)


@dataclass
class Corrections:
    """What was changed to keep the clock, in seconds of silence added and of sound left out."""

    n_holes: int = 0
    silence_s: Fraction = Fraction(0)
    n_overlaps: int = 0
    cut_s: Fraction = Fraction(0)

    def warnings(self, what: str) -> Iterator[str]:
        """Sentences for what a person would hear."""
        if self.silence_s > 10 * TOLERANCE_S:
            yield f"{what} has {_counted(self.n_holes, 'hole')}: {float(self.silence_s):.2f} s of silence were added"
        if self.cut_s > 10 * TOLERANCE_S:
            yield (
                f"{what} has {_counted(self.n_overlaps, 'overlap')}: {float(self.cut_s):.2f} s that were given twice "
                "were left out"
            )


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def on_clock(blocks: Iterator[Block], late: Fraction, done: Corrections) -> Iterator[Block]:
    """The blocks with silence in their holes and without their overlaps, beginning after `late` s of silence.

    Counts the corrections in `done`. The clock of the first block is the reference: its time stands for `late`.
    """
    waiting: deque[Block] = deque()
    waiting_s = Fraction(0)
    first: Fraction | None = None
    # The time of the output's end minus the time stamp that belongs to it.
    offset = Fraction(0)
    end = Fraction(0)
    is_over = False
    while True:
        while not is_over and (len(waiting) < _WINDOW_FRAMES or waiting_s < _WINDOW_S):
            block = next(blocks, None)
            if block is None:
                is_over = True
            else:
                waiting.append(block)
                waiting_s += block.duration
        if not waiting:
            return
        block = waiting[0]
        if first is None:
            first = _begins(waiting) or Fraction(0)
            offset = late - first
            yield from _silence(block, late)
            end = late
        shift = _shift(waiting, end - offset, is_whole=not is_over)
        if shift > MAX_HOLE_S or shift < -MAX_OVERLAP_S or _is_restart(waiting, first, shift):
            # Another clock begins here: its sound follows without a break.
            offset -= shift
        elif shift > 0:
            done.n_holes, done.silence_s = done.n_holes + 1, done.silence_s + shift
            yield from _silence(block, shift)
            end += shift
        elif shift < 0:
            cut = _cut(waiting, -shift)
            done.n_overlaps, done.cut_s = done.n_overlaps + 1, done.cut_s + cut
            waiting_s -= cut
            if not waiting:
                continue
            offset -= shift + cut
        block = waiting.popleft()
        waiting_s -= block.duration
        end += block.duration
        if block.samples.shape[1]:
            yield block


def _is_restart(waiting: deque[Block], first: Fraction, shift: Fraction) -> bool:
    """Whether the clock went back to where it began, as in files that were joined."""
    begins = _begins(waiting)
    return shift < -TOLERANCE_S and begins is not None and begins <= first + TOLERANCE_S


def _begins(waiting: deque[Block]) -> Fraction | None:
    """The time of the first waiting block, by its own time stamp or by the first one behind it."""
    before = Fraction(0)
    for block in waiting:
        if block.time is not None:
            return block.time - before
        before += block.duration
    return None


def _shift(waiting: deque[Block], expected: Fraction, *, is_whole: bool) -> Fraction:
    """How much later (s) than `expected` the waiting blocks say they are: what all of them agree on, else 0."""
    if (first := waiting[0].time) is not None and abs(first - expected) <= TOLERANCE_S:
        # Nearly always: whatever the others say, they do not all agree on more.
        return Fraction(0)
    shifts = []
    for block in waiting:
        if block.time is not None:
            shifts.append(block.time - expected)
        expected += block.duration
    if not shifts:
        return Fraction(0)
    limit = TOLERANCE_S if is_whole or 2 * len(shifts) >= _WINDOW_FRAMES else _CLEAR_S
    if min(shifts) > limit:
        return min(shifts)
    if max(shifts) < -limit:
        return max(shifts)
    # A jump at the first block may be followed by another within the window: the block itself decides.
    if abs(shifts[0]) > _CLEAR_S and all(abs(shift - shifts[0]) < TOLERANCE_S for shift in shifts[:3]):
        return shifts[0]
    return Fraction(0)


def _silence(like: Block, duration: Fraction) -> Iterator[Block]:
    """Silence in the form of `like`, in pieces: a minute of 64 channels would be 700 MB."""
    n_left = round(duration * like.rate)
    while n_left > 0:
        n = min(n_left, _SILENCE_SAMPLES)
        yield Block(np.zeros((like.samples.shape[0], n), np.float32), like.rate, None)
        n_left -= n


def _cut(waiting: deque[Block], duration: Fraction) -> Fraction:
    """Drop the first `duration` s of the waiting blocks; return how much was there to drop."""
    cut = Fraction(0)
    while waiting and cut < duration:
        block = waiting.popleft()
        n = min(round((duration - cut) * block.rate), block.samples.shape[1])
        if n == 0:
            waiting.appendleft(block)
            break
        cut += Fraction(n, block.rate)
        if n < block.samples.shape[1]:
            time = None if block.time is None else block.time + Fraction(n, block.rate)
            waiting.appendleft(Block(block.samples[:, n:], block.rate, time))
    return cut
