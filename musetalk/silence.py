"""Pauses in speech by the waveform's level, and the share of the generated mouth that each output frame shows.

Knows only arrays; other modules decide how a pause looks.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]

# Of every waveform, Hz.
_RATE = 16_000

# Levels are those of 30 ms around each 10 ms: more than a period of mains hum and two of the deepest voice.
BLOCK = _RATE // 100
_BLOCKS_IN_WINDOW = 3
# Below this there is a pause; recorded speech is at -30 to -15 dBFS, a quiet room below -50.
FLOOR_DBFS = -45.0
# A quiet recording has a lower floor: weak consonants lie some 20 dB below its loud vowels.
BELOW_SPEECH_DB = 25.0
# How loud a recording is, is the level that it has for at least so long: a click is no speech.
_LOUD_BLOCKS = 30
# Noise may rise above the floor by so much without ending a pause.
HYSTERESIS_DB = 6.0
# Shorter stops are part of speech: a long plosive lasts 0.15 s. The length also leaves room for both transitions.
SHORTEST = 30 * BLOCK  # samples
# Shorter bursts between two pauses are clicks: the shortest word takes twice as long.
CLICK_BLOCKS = 8
# Length of the transition inside the pause: four frames at 25 a second, about as fast as lips close.
HAND_OVER = 4 * _RATE // 25  # samples
_QUIETEST_DBFS = -120.0


def levels_dbfs(waveform: NDArray[np.float32]) -> NDArray[np.float64]:
    """RMS of 30 ms around each block of 10 ms in dB of full scale, without its mean: (n,) -> (ceil(n / 160),)."""
    starts = np.arange(0, len(waveform), BLOCK)
    counts = np.diff([*starts, len(waveform)])
    totals = np.stack(
        [
            counts.astype(np.float64),
            np.add.reduceat(waveform, starts, dtype=np.float64),
            np.add.reduceat(np.square(waveform), starts, dtype=np.float64),
        ]
    )
    reach = _BLOCKS_IN_WINDOW // 2
    padded = np.pad(totals, ((0, 0), (reach, reach)), mode="edge")
    n, total, squares = np.lib.stride_tricks.sliding_window_view(padded, _BLOCKS_IN_WINDOW, axis=1).sum(axis=-1)
    power = np.maximum(squares / n - np.square(total / n), 10 ** (_QUIETEST_DBFS / 10))
    levels: NDArray[np.float64] = 10 * np.log10(power)
    return levels


def floor_dbfs(levels: NDArray[np.float64]) -> float:
    """Level (dBFS) below which a recording with these `levels` (n,) pauses; one that stays below is all pause."""
    n_loud = min(_LOUD_BLOCKS, len(levels))
    loudness = float(np.partition(levels, -n_loud)[-n_loud])
    return FLOOR_DBFS if loudness < FLOOR_DBFS else min(FLOOR_DBFS, loudness - BELOW_SPEECH_DB)


def quiet_spans(waveform: NDArray[np.float32]) -> list[Span]:
    """Pauses of a waveform (n,) at 16 kHz, n > 0, as samples [begin, end), in order, each at least 0.3 s long."""
    levels = levels_dbfs(waveform)
    floor = floor_dbfs(levels)
    below = levels < floor
    pauses = []
    # What stays near the floor is one pause if it falls below it, and reaches from there to where it does so last.
    for first, end in _runs(levels < floor + HYSTERESIS_DB):
        inside = np.flatnonzero(below[first:end])
        if len(inside):
            pauses.append((first + int(inside[0]), first + int(inside[-1]) + 1))
    joined = _without_clicks(pauses, len(levels))
    spans = [(first * BLOCK, min(end * BLOCK, len(waveform))) for first, end in joined]
    return [(begin, end) for begin, end in spans if end - begin >= SHORTEST]


def _runs(flags: NDArray[np.bool_]) -> list[Span]:
    """Runs of true `flags`, as [first, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def _without_clicks(pauses: list[Span], n_blocks: int) -> list[Span]:
    """The pauses with what is too short to be speech between them; a burst at either end of the sound counts too."""
    joined: list[Span] = []
    for first, end in pauses:
        before = joined[-1][1] if joined else 0
        if first - before > CLICK_BLOCKS:
            joined.append((first, end))
        elif joined:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((0, end))
    if joined and n_blocks - joined[-1][1] <= CLICK_BLOCKS:
        joined[-1] = (joined[-1][0], n_blocks)
    return joined


def speech_weights(spans: list[Span], n_samples: int, n_frames: int, rate: Fraction) -> NDArray[np.float64]:
    """Weight of the generated mouth in each output frame, float (n_frames,) in 0..1: 1 in speech, 0 in a pause.

    Sampled in the middle of each frame, in whole numbers at any rate. It falls and rises inside a pause, never in
    speech; a pause at the start or end of the sound has no transition there.
    """
    weights = np.ones(n_frames)
    # Times in units of 1 / (2 * rate's numerator * 16,000) s, in which all of them are whole.
    unit = 2 * rate.numerator
    middles = (2 * np.arange(n_frames, dtype=np.int64) + 1) * rate.denominator * _RATE
    hand_over = HAND_OVER * unit
    for begin, end in spans:
        since = middles - begin * unit if begin > 0 else np.full(n_frames, hand_over)
        until = end * unit - middles if end < n_samples else np.full(n_frames, hand_over)
        depth = np.minimum(since, until)
        weights = np.minimum(weights, np.clip(1 - depth / hand_over, 0, 1))
    return weights
