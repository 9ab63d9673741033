"""Pauses in synthetic sound, and the weights of frames around them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from musetalk.silence import BLOCK, HAND_OVER, levels_dbfs, quiet_spans, speech_weights
from tests.support import clips

RATE = 16_000
Waveform = NDArray[np.float32]


def noise(seconds: float, dbfs: float, seed: int = 1) -> Waveform:
    """White noise of a level."""
    random = np.random.default_rng(seed)
    return (random.normal(0, 10 ** (dbfs / 20), round(seconds * RATE))).astype(np.float32)


def tone(seconds: float, dbfs: float = -15.0, hertz: float = 220.0) -> Waveform:
    """A sine whose RMS has a level."""
    return clips.tone(seconds, RATE, hertz, math.sqrt(2) * 10 ** (dbfs / 20))


def seconds_of(waveform: Waveform) -> list[tuple[float, float]]:
    return [(begin / RATE, end / RATE) for begin, end in quiet_spans(waveform)]


def assert_spans(waveform: Waveform, *wanted: tuple[float, float]) -> None:
    found = seconds_of(waveform)
    assert len(found) == len(wanted), found
    assert np.allclose(np.ravel(found), np.ravel(wanted), atol=0.03), found


def test_a_level_is_that_of_a_tone() -> None:
    assert np.allclose(levels_dbfs(tone(1, -20, 1000)), -20, atol=0.1)


def test_an_offset_is_no_sound() -> None:
    assert levels_dbfs(np.full(RATE, 0.2, np.float32)).max() < -80


def test_pauses_between_bursts_are_found() -> None:
    quiet = np.zeros(RATE // 2, np.float32)
    assert_spans(np.concatenate([tone(0.4), quiet, tone(0.3), quiet, tone(0.2)]), (0.4, 0.9), (1.2, 1.7))


def test_silence_at_both_ends_is_a_pause() -> None:
    assert_spans(np.pad(tone(0.5), (RATE // 2, RATE // 2)), (0.0, 0.5), (1.0, 1.5))


@pytest.mark.parametrize("dbfs", [-50.0, -55.0, -70.0])
def test_a_pause_may_be_noisy(dbfs: float) -> None:
    sound = np.concatenate([tone(0.6), np.zeros(RATE, np.float32), tone(0.6)])
    assert_spans(sound + noise(2.2, dbfs), (0.6, 1.6))


def test_hum_below_the_floor_is_silence_and_above_it_is_not() -> None:
    pause = np.concatenate([tone(0.6), tone(0.8, -52, 50), tone(0.6)])
    assert_spans(pause, (0.6, 1.4))
    assert_spans(np.concatenate([tone(0.6), tone(0.8, -30, 50), tone(0.6)]))
    assert_spans(tone(2, -52, 50), (0, 2))


@pytest.mark.parametrize("n_samples", [1, 159, 1_600, 4_799])
def test_what_is_shorter_than_a_pause_has_none(n_samples: int) -> None:
    assert quiet_spans(np.zeros(n_samples, np.float32)) == []


def test_all_silent_is_one_pause_and_all_loud_has_none() -> None:
    assert quiet_spans(np.zeros(RATE + 7, np.float32)) == [(0, RATE + 7)]
    assert quiet_spans(tone(3)) == []
    assert quiet_spans(noise(3, -25)) == []


def test_short_stops_belong_to_speech() -> None:
    parts = [part for _ in range(5) for part in (tone(0.2), np.zeros(RATE // 5, np.float32))]
    assert quiet_spans(np.concatenate([*parts, tone(0.2)])) == []


def test_clicks_do_not_end_a_pause() -> None:
    sound = np.concatenate([tone(0.5), clips.clicks(1.5, [0.3, 0.8, 1.1], RATE), tone(0.5)])
    assert_spans(sound, (0.5, 2.0))
    assert_spans(clips.clicks(1.5, [0.002, 0.7, 1.498], RATE), (0, 1.5))


def test_a_short_word_ends_a_pause() -> None:
    quiet = np.zeros(RATE // 2, np.float32)
    assert_spans(np.concatenate([quiet, tone(0.15), quiet, tone(0.5)]), (0, 0.5), (0.65, 1.15))


def test_a_quiet_recording_is_speech_too() -> None:
    """Its level lies near the floor of a loud one, and its pauses further below."""
    sound = np.concatenate([tone(0.6, -40), noise(0.8, -75), tone(0.6, -50), noise(0.8, -75), tone(0.6, -40)])
    assert_spans(sound, (0.6, 1.4), (2.0, 2.8))


def test_noise_about_the_floor_does_not_break_a_pause() -> None:
    swell = 10 ** (3 * np.sin(2 * np.pi * 2 * np.arange(2 * RATE) / RATE) / 20)
    pause = (noise(2, -46) * swell).astype(np.float32)
    found = seconds_of(np.concatenate([tone(0.5), pause, tone(0.5)]))
    assert len(found) == 1
    assert found[0][1] - found[0][0] > 1.5


@st.composite
def sounds(draw: st.DrawFn) -> Waveform:
    """Silence, then tones and pauses of any length, then silence."""
    parts: list[Waveform] = [np.zeros(RATE // 2, np.float32)]
    for _ in range(draw(st.integers(1, 4))):
        parts.append(tone(draw(st.integers(5, 60)) / 100, draw(st.integers(-30, -6))))
        parts.append(noise(draw(st.integers(5, 80)) / 100, draw(st.integers(-90, -55))))
    return np.concatenate([*parts, np.zeros(RATE // 2, np.float32)])


@settings(deadline=None, max_examples=60)
@given(sounds(), st.integers(1, 300))
def test_shifting_the_sound_shifts_its_pauses(sound: Waveform, n_blocks: int) -> None:
    shift = n_blocks * BLOCK
    spans, shifted = quiet_spans(sound), quiet_spans(np.pad(sound, (shift, 0)))
    # The first pause begins with the sound and only grows.
    assert shifted == [(begin + shift if begin else 0, end + shift) for begin, end in spans]


@settings(deadline=None, max_examples=60)
@given(sounds(), st.floats(0.2, 4.0))
def test_pauses_are_in_order_apart_and_long_enough(sound: Waveform, gain: float) -> None:
    spans = quiet_spans((sound * np.float32(gain)).clip(-1, 1))
    assert all(end - begin >= 0.3 * RATE for begin, end in spans)
    assert all(first[1] < second[0] for first, second in pairwise(spans))
    assert all(0 <= begin < end <= len(sound) for begin, end in spans)


# -- weights ----------------------------------------------------------------------------------------------------------

rates = st.one_of(
    st.sampled_from([Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(60)]),
    st.fractions(min_value=10, max_value=60, max_denominator=2_000),
)


def slow_weight(spans: list[tuple[int, int]], n_samples: int, index: int, rate: Fraction) -> Fraction:
    """One frame's weight by fractions, as the words say it."""
    middle = (index + Fraction(1, 2)) / rate * RATE
    weight = Fraction(1)
    for begin, end in spans:
        since = middle - begin if begin > 0 else Fraction(HAND_OVER)
        until = end - middle if end < n_samples else Fraction(HAND_OVER)
        weight = min(weight, max(Fraction(0), 1 - max(Fraction(0), min(since, until)) / HAND_OVER))
    return weight


@settings(deadline=None)
@given(rates, st.lists(st.integers(0, 80_000), min_size=0, max_size=6, unique=True), st.integers(1, 120))
def test_weights_are_exact_at_any_rate(rate: Fraction, edges: list[int], n_frames: int) -> None:
    ordered = sorted(edges)
    spans = [(begin, end) for begin, end in zip(ordered[::2], ordered[1::2], strict=False) if end - begin >= 4_800]
    n_samples = max([16_000, *ordered])
    weights = speech_weights(spans, n_samples, n_frames, rate)
    assert weights.shape == (n_frames,)
    assert weights.dtype == np.float64
    expected = [float(slow_weight(spans, n_samples, index, rate)) for index in range(n_frames)]
    assert np.allclose(weights, expected, rtol=0, atol=1e-12)


def test_a_pause_is_handed_over_in_four_frames_and_speech_is_left_alone() -> None:
    weights = speech_weights([(16_000, 32_000)], 48_000, 75, Fraction(25))
    assert weights[:25].tolist() == [1.0] * 25
    assert np.allclose(weights[25:29], [0.875, 0.625, 0.375, 0.125])
    assert weights[29:46].tolist() == [0.0] * 17
    assert np.allclose(weights[46:50], [0.125, 0.375, 0.625, 0.875])
    assert weights[50:].tolist() == [1.0] * 25


def test_a_pause_at_an_end_is_silent_from_the_first_and_to_the_last_frame() -> None:
    weights = speech_weights([(0, 16_000), (32_000, 47_990)], 47_990, 75, Fraction(25))
    assert (weights[0], weights[-1]) == (0, 0)
    assert weights[30:45].tolist() == [1.0] * 15


def test_the_shortest_pause_has_room_for_both_hand_overs() -> None:
    weights = speech_weights([(16_000, 20_800)], 48_000, 75, Fraction(25))
    assert weights.min() < 0.2


def test_no_pause_no_change() -> None:
    assert speech_weights([], 16_000, 25, Fraction(25)).tolist() == [1.0] * 25


def test_the_longest_job_does_not_overflow() -> None:
    rate = Fraction(60000, 1001)
    weights = speech_weights([(14_000_000, 14_320_000)], 14_400_000, 53_947, rate)
    assert weights[int(Fraction(14_160_000, RATE) * rate)] == 0
    assert weights[0] == 1
