"""Which rate an output gets and which picture each tick shows: exact arithmetic, no files."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.media.limits import MediaLimits
from musetalk.media.timing import (
    Clock,
    PacketStamp,
    Timed,
    n_ticks,
    nominal_rate,
    on_grid,
    output_rate,
    packet_times,
    tolerance,
)

LIMITS = MediaLimits()
NTSC = Fraction(30_000, 1001)


@pytest.mark.parametrize(
    ("declared", "rate"),
    [
        (Fraction(19_001, 634), NTSC),
        (Fraction(24_000, 1001), Fraction(24_000, 1001)),
        (Fraction(2997, 100), NTSC),
        (Fraction(30), Fraction(30)),
        (Fraction(59_940, 1000), Fraction(60_000, 1001)),
        (Fraction(50, 3), Fraction(50, 3)),
        (Fraction(2955, 100), Fraction(591, 20)),
    ],
)
def test_a_rate_is_taken_for_the_standard_one_it_stands_for(declared: Fraction, rate: Fraction) -> None:
    assert nominal_rate([declared]) == rate


def test_29_97_and_30_stay_apart() -> None:
    assert nominal_rate([NTSC]) != nominal_rate([Fraction(30)])


@pytest.mark.parametrize("candidates", [[], [None], [Fraction(0)], [Fraction(-25)], [Fraction(10**9)]])
def test_without_a_sane_rate_25_is_taken(candidates: list[Fraction | None]) -> None:
    assert nominal_rate(candidates) == 25


def test_the_first_sane_candidate_wins() -> None:
    assert nominal_rate([None, Fraction(0), Fraction(50), Fraction(24)]) == 50


@pytest.mark.parametrize(
    ("source", "output"),
    [
        (Fraction(60), Fraction(60)),
        (Fraction(60_000, 1001), Fraction(60_000, 1001)),
        (Fraction(10), Fraction(10)),
        (Fraction(120), Fraction(30)),
        (Fraction(100), Fraction(25)),
        (Fraction(1000), Fraction(1000, 34)),
        (Fraction(120_000, 1001), NTSC),
        (Fraction(9), Fraction(25)),
        (Fraction(1, 2), Fraction(25)),
    ],
)
def test_output_rate(source: Fraction, output: Fraction) -> None:
    assert output_rate(source, LIMITS) == output


@given(st.fractions(min_value=Fraction(1, 100), max_value=100_000))
@settings(max_examples=100)
def test_output_rates_are_within_the_limits(source: Fraction) -> None:
    assert LIMITS.min_rate <= output_rate(source, LIMITS) <= LIMITS.max_rate


def timeline(times: list[Fraction], last: Fraction = Fraction(1, 25)) -> list[Timed[int]]:
    ends = [*times[1:], times[-1] + last]
    return [Timed(time, end - time, index) for index, (time, end) in enumerate(zip(times, ends, strict=True))]


@pytest.mark.parametrize("rate", [Fraction(24_000, 1001), 24, 25, NTSC, 30, 50, Fraction(60_000, 1001), 60])
def test_a_constant_rate_passes_picture_by_picture(rate: Fraction) -> None:
    rate = Fraction(rate)
    pictures = timeline([index / rate for index in range(200)], 1 / rate)
    shown = list(on_grid(pictures, rate, tolerance(rate, rate, Fraction(1, 90_000))))
    assert shown == [(index, index, False) for index in range(200)]


@pytest.mark.parametrize("rate", [Fraction(24_000, 1001), 25, NTSC, Fraction(60_000, 1001), 60])
@pytest.mark.parametrize("rounding", ["nearest", "down", "up"])
def test_clocks_of_one_millisecond_drop_and_repeat_nothing(rate: Fraction, rounding: str) -> None:
    rate = Fraction(rate)
    offset = {"nearest": Fraction(1, 2), "down": Fraction(0), "up": Fraction(999, 1000)}[rounding]
    times = [Fraction(int(index * 1000 / rate + offset), 1000) for index in range(3000)]
    pictures = timeline([time - times[0] for time in times], Fraction(round(1000 / rate), 1000))
    shown = list(on_grid(pictures, rate, tolerance(rate, rate, Fraction(1, 1000))))
    assert shown == [(index, index, False) for index in range(3000)]


steps = st.lists(st.integers(min_value=1, max_value=4000), min_size=1, max_size=40)


@given(steps, st.sampled_from([Fraction(25), NTSC, Fraction(60), Fraction(1000, 34)]))
@settings(max_examples=100, deadline=None)
def test_each_tick_shows_the_last_picture_that_has_begun(gaps: list[int], rate: Fraction) -> None:
    times = [Fraction(0)]
    for gap in gaps:
        times.append(times[-1] + Fraction(gap, 10_000))
    pictures, late = timeline(times), Fraction(1, 1000)
    shown = list(on_grid(pictures, rate, late))
    assert [tick for tick, _, _ in shown] == list(range(len(shown)))
    for tick, picture, _ in shown:
        assert picture == max(index for index, time in enumerate(times) if time <= tick / rate + late)
    assert [repeat for _, _, repeat in shown] == [
        index > 0 and picture == shown[index - 1][1] for index, (_, picture, _) in enumerate(shown)
    ]
    # Ticks are never later than the end, and the last one is within one tick of it.
    end = pictures[-1].time + pictures[-1].duration
    assert end - 1 / rate - Fraction(1, 4) / rate <= (len(shown) - 1) / rate <= max(end, late, Fraction(0)) + late


def test_no_picture_gives_no_tick() -> None:
    assert list(on_grid([], Fraction(25), Fraction(0))) == []


def test_the_last_picture_stays_for_its_duration() -> None:
    pictures = timeline([Fraction(0), Fraction(1, 25)], Fraction(2))
    shown = list(on_grid(pictures, Fraction(25), Fraction(1, 1000)))
    assert len(shown) == 51
    assert [picture for _, picture, _ in shown] == [0] + [1] * 50


def test_a_length_in_ticks_is_rounded_by_a_quarter_at_most() -> None:
    assert n_ticks(Fraction(4), Fraction(25)) == 100
    assert n_ticks(Fraction(4001, 1000), Fraction(25)) == 100
    assert n_ticks(Fraction(402, 100), Fraction(25)) == 101
    assert n_ticks(Fraction(0), Fraction(25)) == 1


def test_stamps_start_at_zero_and_keep_their_distances() -> None:
    clock = Clock(Fraction(25), Fraction(1, 1000), trusts_timestamps=True)
    assert [clock.stamp(pts, 10)[0] for pts in (5000, 5040, 5200)] == [0, Fraction(40, 1000), Fraction(200, 1000)]


@pytest.mark.parametrize("odd", [None, 5040, 3000])
def test_a_stamp_that_is_missing_or_runs_back_is_one_frame_later(odd: int | None) -> None:
    clock = Clock(Fraction(25), Fraction(1, 1000), trusts_timestamps=True)
    times = [clock.stamp(pts, 40)[0] for pts in (5000, 5040, odd, 5120)]
    assert times == [0, Fraction(1, 25), Fraction(2, 25), Fraction(3, 25)]


@pytest.mark.parametrize("time_base", [None, Fraction(1, 1000)])
def test_without_trust_time_is_index_by_rate(time_base: Fraction | None) -> None:
    clock = Clock(NTSC, time_base, trusts_timestamps=False)
    assert [clock.stamp(pts, 7) for pts in (9, 1, 4, None)] == [(index / NTSC, 1 / NTSC) for index in range(4)]


def test_a_picture_without_duration_lasts_as_long_as_the_one_before() -> None:
    clock = Clock(Fraction(25), Fraction(1, 1000), trusts_timestamps=True)
    assert clock.stamp(0, 0)[1] == Fraction(1, 25)
    assert clock.stamp(300, None)[1] == Fraction(300, 1000)
    assert clock.stamp(90_300, None)[1] == 1


def stamps(pts: list[int | None], dts: list[int | None] | None = None) -> list[PacketStamp]:
    return [PacketStamp(p, d, 40) for p, d in zip(pts, dts or pts, strict=True)]


def test_packets_in_order_are_sound() -> None:
    times = packet_times(stamps([0, 120, 40, 80, 160], [-80, -40, 0, 40, 80]), Fraction(1, 1000))
    assert times.is_sound
    assert times.duration == Fraction(200, 1000)
    assert times.average_rate == 25
    assert times.n_pictures == 5


@pytest.mark.parametrize(
    ("pts", "dts"),
    [
        ([None] * 5, [0, 40, 80, 120, 160]),
        ([0, 40, None, 120, 160], [0, 40, 80, 120, 160]),
        ([0, 40, 40, 120, 160], [0, 40, 80, 120, 160]),
        ([0, 40, 80, 10, 50], [0, 40, 80, 10, 50]),
    ],
    ids=["no stamps", "one missing", "one twice", "clock runs back"],
)
def test_broken_stamps_are_noticed(pts: list[int | None], dts: list[int | None]) -> None:
    assert not packet_times(stamps(pts, dts), Fraction(1, 1000)).is_sound


def test_without_a_time_base_nothing_is_sound() -> None:
    assert not packet_times(stamps([0, 1]), None).is_sound
