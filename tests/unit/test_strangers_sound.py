"""Sound as strangers bring it: many channels, holes, late starts, missing ends, joined files, odd containers.

Specified in docs/media.md#sound-and-time and docs/media.md#containers.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from musetalk.errors import MediaError
from musetalk.media import MediaLimits, probe_audio, read_audio_blocks, read_waveform
from musetalk.media.opening import packets
from musetalk.media.sound_clock import TOLERANCE_S, Block, Corrections, on_clock
from tests.support import clips
from tests.support.clips import Sound, click_times, clicks, tone, write_clip, write_sound
from tests.support.strangers import joined, many_channels, pcm_wav, rewrite, write_many

LIMITS = MediaLimits()
RATE = 48_000


def heard(path: Path) -> tuple[NDArray[np.float32], list[str]]:
    """The waveform at 16 kHz, and the warnings."""
    warnings: list[str] = []
    return read_waveform(path, probe_audio(path, LIMITS), LIMITS, on_warning=warnings.append), warnings


def loudness(samples: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(samples**2)))


# -- channels and sample formats --------------------------------------------------------------------------------------

CHANNELS = [
    *((f"pcm-{n}.wav", n, "pcm_s16le", "s16") for n in (1, 2, 3, 7, 8, 9, 16, 24, 64)),
    ("u8.wav", 10, "pcm_u8", "u8"),
    ("s32.wav", 12, "pcm_s32le", "s32"),
    ("flt.wav", 11, "pcm_f32le", "flt"),
    ("dbl.wav", 8, "pcm_f64le", "dbl"),
    ("8.flac", 8, "flac", "s16"),
    ("8-32.flac", 8, "flac", "s32"),
    ("8.m4a", 8, "aac", "fltp"),
    ("6.m4a", 6, "aac", "fltp"),
    ("8.wv", 8, "wavpack", "s16p"),
    ("16.wv", 16, "wavpack", "fltp"),
    ("8.tta", 8, "tta", "s16"),
    ("6.ac3", 6, "ac3", "fltp"),
]


@pytest.mark.parametrize(("name", "n_channels", "codec", "form"), CHANNELS, ids=[case[0] for case in CHANNELS])
def test_any_number_of_channels_is_heard(tmp_path: Path, name: str, n_channels: int, codec: str, form: str) -> None:
    voice = tone(0.6, RATE, 300)
    path = write_many(tmp_path / name, many_channels(voice, n_channels), RATE, codec, form)
    info = probe_audio(path, LIMITS)
    assert info.channels == n_channels
    waveform, warnings = heard(path)
    assert warnings == []
    assert len(waveform) == pytest.approx(0.6 * 16_000, abs=1100)
    middle = waveform[1600:-1600]
    # The mean of gains from 1 down to a half; an encoder of 5.1 and 7.1 cuts its low-frequency channel.
    expected = loudness(voice) * (0.75 if n_channels > 1 else 1)
    assert loudness(middle) == pytest.approx(expected, rel=0.2 if codec in {"aac", "ac3"} else 0.01)
    for wanted in (1, 2):
        blocks = list(read_audio_blocks(path, LIMITS, rate=44_100, n_channels=wanted))
        assert {block.shape[0] for block in blocks} == {wanted}
        assert sum(block.shape[1] for block in blocks) == pytest.approx(0.6 * 44_100, abs=3000)
        assert max(float(np.abs(block).max()) for block in blocks) > 0.2


def test_opus_of_sixteen_channels_is_heard(tmp_path: Path) -> None:
    samples = many_channels(tone(0.6, RATE, 300), 16)
    path = write_many(tmp_path / "16.mka", samples, RATE, "libopus", "s16", mapping_family="255", b="800000")
    assert probe_audio(path, LIMITS).channels == 16
    assert loudness(heard(path)[0][1600:-1600]) == pytest.approx(loudness(tone(0.6, RATE, 300)) * 0.75, rel=0.1)


def test_a_stream_that_gets_more_channels_on_the_way_is_read_to_its_end(tmp_path: Path) -> None:
    voice = tone(0.5, RATE, 300)
    # FFmpeg 8.1 and newer write no ADTS of eight channels.
    most = 8 if av.library_versions["libavformat"] < (62, 13) else 6
    parts = [
        write_many(tmp_path / f"{index}.aac", many_channels(voice, n), RATE, "aac", "fltp")
        for index, n in enumerate((2, most, 1))
    ]
    waveform, _ = heard(joined(tmp_path / "all.aac", parts))
    assert len(waveform) / 16_000 == pytest.approx(1.5, abs=0.15)
    for second in (0.25, 0.75, 1.25):
        around = waveform[int((second - 0.1) * 16_000) : int((second + 0.1) * 16_000)]
        assert loudness(around) > 0.1


@pytest.mark.parametrize("rate", [800_000, 48_000_000])
def test_a_rate_that_no_recorder_has_is_refused_at_the_first_look(tmp_path: Path, rate: int) -> None:
    (tmp_path / "a.wav").write_bytes(pcm_wav(np.zeros((1, 400_000), np.float32), rate))
    with pytest.raises(MediaError, match=f"{rate} samples a second"):
        probe_audio(tmp_path / "a.wav", LIMITS)


@pytest.mark.parametrize("n_channels", [2, 3, 6])
def test_channels_that_cancel_each_other_still_move_the_mouth(tmp_path: Path, n_channels: int) -> None:
    voice = np.random.default_rng(4).normal(0, 0.1, RATE).astype(np.float32)
    channels = np.stack([voice * (-1) ** index for index in range(n_channels)])
    channels[: n_channels % 2] *= 0.1
    (tmp_path / "a.wav").write_bytes(pcm_wav(channels, RATE))
    (tmp_path / "mono.wav").write_bytes(pcm_wav(voice[None], RATE))
    waveform, warnings = heard(tmp_path / "a.wav")
    plain, none = heard(tmp_path / "mono.wav")
    assert loudness(waveform) > 0.6 * loudness(plain)
    assert ["cancel each other" in text for text in warnings] == [True]
    assert none == []


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_ordinary_stereo_is_the_plain_mean(tmp_path: Path, share: float) -> None:
    noise = np.random.default_rng(5).normal(0, 0.1, (2, RATE)).astype(np.float32)
    channels = np.stack([noise[0], share * noise[0] + (1 - share) * noise[1]])
    path = write_sound(tmp_path / "a.wav", Sound(channels, rate=RATE, codec="pcm_f32le"))
    mean = write_sound(tmp_path / "mean.wav", Sound(channels.mean(axis=0), rate=RATE, codec="pcm_f32le"))
    (stereo, warnings), (expected, _) = heard(path), heard(mean)
    assert warnings == []
    assert np.allclose(stereo, expected, atol=1e-6)


# -- the clock --------------------------------------------------------------------------------------------------------

TIMES = [0.2, 0.7, 1.4, 2.3, 2.8]
CLOCKED = {
    "opus.webm": Sound(clicks(3.0, TIMES, RATE), codec="libopus"),
    "aac.mp4": Sound(clicks(3.0, TIMES, RATE), codec="aac", bit_rate=128_000),
    "aac.mkv": Sound(clicks(3.0, TIMES, RATE), codec="aac", bit_rate=128_000),
    "mp3.mkv": Sound(clicks(3.0, TIMES, RATE), codec="libmp3lame", bit_rate=128_000),
    "flac.mka": Sound(clicks(3.0, TIMES, RATE), codec="flac"),
    "aac.ts": Sound(clicks(3.0, TIMES, RATE), codec="aac", bit_rate=128_000),
    "mp2.ts": Sound(clicks(3.0, TIMES, RATE), codec="mp2", bit_rate=192_000),
}


@pytest.mark.parametrize("name", CLOCKED)
def test_sound_behind_a_hole_stays_where_its_time_stamps_say(tmp_path: Path, name: str) -> None:
    """Packets from 1.0 to 2.0 s are lost; clicks before and behind keep their times."""
    whole = write_sound(tmp_path / f"whole-{name}", CLOCKED[name])
    start = heard(whole)[0]
    reference = click_times(start, 16_000)
    assert len(reference) == 5
    path = rewrite(whole, tmp_path / name, lambda time: None if 1.0 <= time < 2.0 else time)
    waveform, warnings = heard(path)
    found = click_times(waveform, 16_000)
    assert found == pytest.approx([reference[0], reference[1], reference[3], reference[4]], abs=0.005)
    assert len(waveform) == pytest.approx(len(start), abs=0.05 * 16_000)
    assert any("1 hole" in text and "of silence were added" in text for text in warnings), warnings


@pytest.mark.parametrize("name", ["opus.webm", "aac.mkv", "flac.mka"])
def test_sound_that_starts_late_is_preceded_by_silence(tmp_path: Path, name: str) -> None:
    whole = write_sound(tmp_path / f"whole-{name}", CLOCKED[name])
    reference = click_times(heard(whole)[0], 16_000)
    path = rewrite(whole, tmp_path / name, lambda time: time + Fraction(3, 4))
    waveform, warnings = heard(path)
    assert click_times(waveform, 16_000) == pytest.approx([time + 0.75 for time in reference], abs=0.005)
    assert any("begins 0.7" in text for text in warnings), warnings


@pytest.mark.parametrize("name", ["opus.webm", "aac.mkv", "flac.mka"])
def test_a_clock_of_milliseconds_with_jitter_adds_and_cuts_nothing(tmp_path: Path, name: str) -> None:
    whole = write_sound(tmp_path / f"whole-{name}", CLOCKED[name])
    rng = np.random.default_rng(7)
    path = rewrite(whole, tmp_path / name, lambda time: time + Fraction(int(rng.integers(0, 9)), 1000))
    start, (waveform, warnings) = heard(whole)[0], heard(path)
    assert abs(len(waveform) - len(start)) <= 0.010 * 16_000
    assert click_times(waveform, 16_000) == pytest.approx(click_times(start, 16_000), abs=0.010)
    assert warnings == []


@pytest.mark.parametrize("codec", ["aac", "mp2"])
def test_sound_that_is_given_twice_is_heard_once(tmp_path: Path, codec: str) -> None:
    """A stream that was restarted 0.4 s before it broke off: both pieces are in one file."""
    whole = write_sound(tmp_path / "whole.ts", Sound(clicks(3.0, TIMES, RATE), codec=codec, bit_rate=192_000))
    first = rewrite(whole, tmp_path / "first.ts", lambda time: time if time < Fraction(17, 10) else None)
    second = rewrite(whole, tmp_path / "second.ts", lambda time: time if time >= Fraction(13, 10) else None)
    waveform, warnings = heard(joined(tmp_path / "both.ts", [first, second]))
    reference = click_times(heard(whole)[0], 16_000)
    assert click_times(waveform, 16_000) == pytest.approx(reference, abs=0.03)
    assert any("overlap" in text for text in warnings), warnings


def test_an_hour_between_two_packets_is_no_hour_of_silence(tmp_path: Path) -> None:
    whole = write_sound(tmp_path / "whole.mka", CLOCKED["flac.mka"])
    path = rewrite(whole, tmp_path / "a.mka", lambda time: time + 3600 if time > 1 else time)
    assert len(heard(path)[0]) == pytest.approx(3 * 16_000, abs=200)


@given(
    st.lists(st.sampled_from([1024, 960, 480]), min_size=30, max_size=60),
    st.integers(5, 20),
    st.integers(-40, 120),
)
@settings(max_examples=60, deadline=None)
def test_a_shift_of_all_later_blocks_is_followed_to_the_sample(lengths: list[int], at: int, shift_ms: int) -> None:
    rate, time, blocks, expected_end = 48_000, Fraction(0), [], Fraction(0)
    for index, n in enumerate(lengths):
        if index == at:
            time += Fraction(shift_ms, 1000)
        blocks.append(Block(np.ones((1, n), np.float32), rate, time))
        time += Fraction(n, rate)
        expected_end = time
    out = list(on_clock(iter(blocks), Fraction(0), Corrections()))
    end = sum((block.duration for block in out), Fraction(0))
    assert abs(end - expected_end) <= TOLERANCE_S + Fraction(1, rate)


# -- losses -----------------------------------------------------------------------------------------------------------

PROMISING: dict[str, Any] = {
    "a.m4a": {"codec": "aac"},
    "a.wav": {"codec": "pcm_s16le"},
    "a.flac": {"codec": "flac"},
    "a.mp3": {"codec": "libmp3lame"},
    "a.mka": {"codec": "libopus"},
    "a.aiff": {"codec": "pcm_s16be"},
    "a.w64": {"codec": "pcm_s16le"},
    "a.wv": {"codec": "wavpack", "sample_format": "s16p"},
    "a.tta": {"codec": "tta", "sample_format": "s16"},
    "a.caf": {"codec": "pcm_s16le"},
    "a.au": {"codec": "pcm_s16be"},
    "a.wma": {"codec": "wmav2", "bit_rate": 128_000},
}


@pytest.mark.parametrize("name", PROMISING)
def test_half_an_upload_is_used_and_both_lengths_are_named(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, 3 * RATE).astype(np.float32)
    options: Any = {"movflags": "faststart"} if name.endswith("m4a") else {}
    path = write_sound(tmp_path / name, Sound(noise, rate=RATE, **PROMISING[name]), **options)
    assert heard(path)[1] == []
    clips.cut(path, 0.55)
    waveform, warnings = heard(path)
    seconds = len(waveform) / 16_000
    assert 0.9 < seconds < 2
    (warning,) = [text for text in warnings if "incomplete" in text]
    promised = float(warning.split("promises ")[1].split(" s")[0])
    assert promised == pytest.approx(3.0, abs=0.15)
    assert float(warning.split(", ")[1].split(" s")[0]) == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize("claimed", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF - 36, 0])
def test_a_placeholder_for_the_length_promises_nothing(tmp_path: Path, claimed: int) -> None:
    (tmp_path / "a.wav").write_bytes(pcm_wav(tone(1.0, 24_000)[None], 24_000, n_bytes=claimed))
    waveform, warnings = heard(tmp_path / "a.wav")
    assert len(waveform) == 16_000
    assert warnings == []


# -- joined files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [None, 0xFFFFFFFF, 0])
def test_wavs_that_were_joined_are_heard_to_the_end(tmp_path: Path, claimed: int | None) -> None:
    parts = [
        pcm_wav(tone(0.5, 24_000, 300)[None], 24_000, n_bytes=claimed),
        pcm_wav(many_channels(tone(0.5, 48_000, 600), 2), 48_000, n_bytes=claimed),
        pcm_wav(tone(0.25, 16_000, 900)[None], 16_000, n_bytes=claimed),
    ]
    (tmp_path / "a.wav").write_bytes(b"".join(parts))
    waveform, warnings = heard(tmp_path / "a.wav")
    assert len(waveform) == 20_000
    assert warnings == []
    # No header is played: it would be a click.
    assert float(np.abs(np.diff(waveform)).max()) < 0.35


def test_a_joined_wav_whose_end_is_missing_names_both_lengths(tmp_path: Path) -> None:
    whole = pcm_wav(tone(1.0, 24_000)[None], 24_000)
    (tmp_path / "a.wav").write_bytes(whole + whole[: len(whole) // 4])
    waveform, warnings = heard(tmp_path / "a.wav")
    seconds = len(waveform) / 16_000
    # Older releases of FFmpeg drop the last packet (of 4096 bytes) where it is cut.
    assert 1.25 - 4096 / 48_000 <= seconds <= 1.25
    assert f"promises 2.00 s, {seconds:.2f} s" in warnings[0]


JOINED = {
    "a.mp3": ("libmp3lame", "s16p", 0.05),
    "a.aac": ("aac", "fltp", 0.05),
    "a.ts": ("aac", "fltp", 0.05),
    "a.flac": ("flac", "s16", 0.001),
    "a.opus": ("libopus", "s16", 0.001),
    "a.oga": ("flac", "s16", 0.001),
    "a.m4a": ("aac", "fltp", 0.001),
    "a.aiff": ("pcm_s16be", "s16", 0.001),
    "a.caf": ("pcm_s16le", "s16", 0.001),
    "a.au": ("pcm_s16be", "s16", 0.001),
    "a.w64": ("pcm_s16le", "s16", 0.001),
    "a.flv": ("aac", "fltp", 0.05),
    "a.wv": ("wavpack", "s16p", 0.001),
    "a.tta": ("tta", "s16", 0.001),
    "a.mpg": ("mp2", "s16", 0.05),
    "a.ac3": ("ac3", "fltp", 0.05),
    "a.mka": ("libopus", "s16", 0.02),
    "a.avi": ("libmp3lame", "s16p", 0.06),
}


@pytest.mark.parametrize("channels", [(1, 1, 1), (1, 2, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("name", JOINED)
def test_other_files_that_were_joined_are_heard_to_the_end(
    tmp_path: Path, name: str, channels: tuple[int, ...]
) -> None:
    codec, form, priming = JOINED[name]
    parts = [
        write_many(tmp_path / f"{index}-{name}", many_channels(tone(0.6, RATE, 300), n), RATE, codec, form)
        for index, n in enumerate(channels)
    ]
    waveform, warnings = heard(joined(tmp_path / name, parts))
    assert len(waveform) / 16_000 == pytest.approx(1.8, abs=0.005 + 3 * priming)
    assert [text for text in warnings if "incomplete" in text or "breaks off" in text] == []
    for index, n in enumerate(channels):
        around = waveform[int((0.6 * index + 0.2) * 16_000) : int((0.6 * index + 0.4) * 16_000)]
        assert loudness(around) == pytest.approx(loudness(tone(0.6)) * (0.75 if n > 1 else 1) * 0.999, rel=0.1)


@pytest.mark.parametrize(("name", "codec", "rate"), [("a.wma", "wmav2", 44_100), ("a.amr", "libopencore_amrnb", 8000)])
def test_recordings_of_phones_that_were_joined_are_heard_to_the_end(
    tmp_path: Path, name: str, codec: str, rate: int
) -> None:
    sound = Sound(tone(0.6, rate, 300), rate=rate, codec=codec, bit_rate=128_000 if name == "a.wma" else None)
    parts = [write_sound(tmp_path / f"{index}-{name}", sound) for index in range(3)]
    waveform, warnings = heard(joined(tmp_path / name, parts))
    assert len(waveform) / 16_000 == pytest.approx(1.8, abs=0.25)
    assert loudness(waveform[-4000:-1000]) > 0.1
    assert warnings == []


def test_long_wavs_that_were_joined_are_heard_to_the_end(tmp_path: Path) -> None:
    sound = Sound(tone(0.6, RATE, 300), rate=RATE, codec="pcm_s16le", sample_format="s16")
    part = write_sound(tmp_path / "part.wav", sound, rf64="always")
    assert part.read_bytes()[:4] == b"RF64"
    waveform, _ = heard(joined(tmp_path / "a.wav", [part, part, part]))
    assert len(waveform) / 16_000 == pytest.approx(1.8, abs=0.005)


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("n_bytes", [4, 5, 12, 20])
def test_the_beginning_of_another_file_at_the_end_takes_nothing_away(tmp_path: Path, name: str, n_bytes: int) -> None:
    codec, form, priming = JOINED[name]
    path = write_many(tmp_path / name, many_channels(tone(0.6, RATE, 300), 1), RATE, codec, form)
    path.write_bytes(path.read_bytes() + path.read_bytes()[:n_bytes])
    assert len(heard(path)[0]) / 16_000 == pytest.approx(0.6, abs=0.005 + priming)


@pytest.mark.parametrize("name", ["a.opus", "a.flac", "a.m4a"])
def test_the_end_that_is_missing_of_a_joined_file_is_reported(tmp_path: Path, name: str) -> None:
    codec, form, _ = JOINED[name]
    options = {"movflags": "faststart"} if name == "a.m4a" else {}
    noise = np.random.default_rng(1).normal(0, 0.1, RATE).astype(np.float32)
    sound = Sound(noise, rate=RATE, codec=codec, sample_format=form)
    parts = [write_sound(tmp_path / f"{index}-{name}", sound, **options) for index in range(2)]
    clips.cut(parts[1], 0.5)
    waveform, warnings = heard(joined(tmp_path / name, parts))
    # A page of Ogg is a second long, and an Ogg promises no length.
    assert (1.0 if name == "a.opus" else 1.2) <= len(waveform) / 16_000 < 1.8
    expected = "breaks off: 1.00 s could be decoded" if name == "a.opus" else "promises 2.0"
    assert any(expected in text for text in warnings), warnings


class _NewTrackAtTheEnd:
    """A container in whose middle a further track begins: PyAV looks for it behind its list when it flushes."""

    def __init__(self, container: Any, error: Exception) -> None:
        self._container, self._error = container, error

    def demux(self, streams: Any) -> Iterator[Any]:
        yield from (packet for packet in self._container.demux(streams) if packet.size)
        raise self._error


@pytest.mark.parametrize("error", [IndexError("list index out of range"), av.error.InvalidDataError(1, "broken")])
def test_a_track_that_begins_in_the_middle_of_a_transport_stream_ends_nothing(tmp_path: Path, error: Exception) -> None:
    sound = Sound(tone(0.6, RATE, 300), rate=RATE)
    path = clips.write_clip(tmp_path / "a.ts", 15, codec="mpeg2video", sound=sound)
    with av.open(str(path)) as container:
        streams = tuple(container.streams)
        breaks: list[None] = []
        given_packets = packets(_NewTrackAtTheEnd(container, error), streams, lambda: breaks.append(None))
        found = [(packet.stream.type, packet.size > 0) for packet in given_packets]
    assert [kind for kind, is_full in found if not is_full] == ["video", "audio"]
    assert found.count(("video", True)) == 15
    assert len(breaks) == (not isinstance(error, IndexError))


# -- containers -------------------------------------------------------------------------------------------------------

CONTAINERS: dict[str, dict[str, Any]] = {
    "a.aiff": {"codec": "pcm_s16be"},
    "a.caf": {"codec": "pcm_s16le"},
    "a.au": {"codec": "pcm_s16be"},
    "mulaw.au": {"codec": "pcm_mulaw", "rate": 8000},
    "a.wma": {"codec": "wmav2", "rate": 44_100, "bit_rate": 128_000},
    "a.flv": {"codec": "aac", "rate": 44_100},
    "mp3.flv": {"codec": "libmp3lame", "rate": 44_100},
    "a.mpg": {"codec": "mp2", "bit_rate": 192_000},
    "a.ac3": {"codec": "ac3", "bit_rate": 192_000},
    "a.eac3": {"codec": "eac3", "bit_rate": 192_000},
    "a.w64": {"codec": "pcm_s16le"},
    "a.mp2": {"codec": "mp2", "bit_rate": 192_000},
    "a.wv": {"codec": "wavpack", "sample_format": "s16p"},
    "a.tta": {"codec": "tta", "sample_format": "s16"},
    "a.3gp": {"codec": "aac"},
    "a.opus": {"codec": "libopus"},
    "a.oga": {"codec": "flac"},
    "a.mov": {"codec": "alac", "sample_format": "s16p"},
    "a.avi": {"codec": "libmp3lame", "rate": 44_100},
    "a.ts": {"codec": "mp2", "bit_rate": 192_000},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_sound_in_the_containers_people_have_is_heard(tmp_path: Path, name: str) -> None:
    options = {"rate": RATE, **CONTAINERS[name]}
    sound = Sound(tone(1.0, options["rate"], 440), **options)
    waveform, warnings = heard(write_sound(tmp_path / name, sound))
    assert warnings == []
    assert len(waveform) / 16_000 == pytest.approx(1.0, abs=0.07)
    spectrum = np.abs(np.fft.rfft(waveform[2000:14_000]))
    assert float(np.argmax(spectrum)) * 16_000 / 12_000 == pytest.approx(440, abs=3)


@pytest.mark.parametrize(
    ("name", "container", "codec", "rate"),
    [("a.latm", "latm", "aac", RATE), ("a.amr", "amr", "libopencore_amrnb", 8000)],
)
def test_speech_of_phones_and_broadcasts_is_heard(
    tmp_path: Path, name: str, container: str, codec: str, rate: int
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    path = tmp_path / name
    write_sound(path, Sound(tone(1.0, rate, 440), rate=rate, codec=codec), container_format=container)
    assert len(heard(path)[0]) / 16_000 == pytest.approx(1.0, abs=0.07)


def test_the_sound_of_a_film_starts_with_its_pictures(tmp_path: Path) -> None:
    """In a transport stream both tracks begin at any time; the sound is late by what it is later than the picture."""
    film = write_clip(tmp_path / "a.ts", 50, sound=Sound(clicks(2.0, [0.5, 1.5], RATE), codec="aac"))
    assert click_times(heard(film)[0], 16_000) == pytest.approx([0.5, 1.5], abs=0.03)
