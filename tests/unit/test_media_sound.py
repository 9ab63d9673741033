"""Audio files to samples: exact where nothing has to be resampled, in time everywhere, bounded always."""

from __future__ import annotations

import io
import wave
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from musetalk.errors import MediaError
from musetalk.media import (
    AudioInfo,
    MediaLimits,
    inspect_audio,
    inspect_source,
    probe_audio,
    probe_both,
    probe_source,
    read_audio_blocks,
    read_waveform,
    sound,
)
from musetalk.media.sound_clock import Block
from tests.support import clips
from tests.support.clips import Sound, click_times, clicks, tone, write_clip, write_sound

LIMITS = MediaLimits()
CLICKS = [0.1, 0.5, 1.7, 2.9]


def read(path: Path, limits: MediaLimits = LIMITS) -> tuple[AudioInfo, np.ndarray[Any, Any]]:
    info = inspect_audio(path, limits)
    waveform = read_waveform(path, info, limits)
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    return info, waveform


def write_pcm(path: Path, samples: np.ndarray[Any, Any], rate: int = 16_000) -> Path:
    """int16 samples (n,) or (n, channels) as a WAV file, by the standard library."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def test_16_khz_mono_of_16_bits_is_exact(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 50_001).astype(np.int16)
    _, waveform = read(write_pcm(tmp_path / "a.wav", samples))
    assert np.array_equal(waveform, samples.astype(np.float32) / 32768)


@pytest.mark.parametrize("n_channels", [2, 3, 6, 8, 12])
def test_channels_are_averaged(tmp_path: Path, n_channels: int) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, (8000, n_channels)).astype(np.int16)
    info, waveform = read(write_pcm(tmp_path / "a.wav", samples))
    assert info.channels == n_channels
    assert np.abs(waveform - samples.mean(axis=1) / 32768).max() < 1e-6


def test_the_low_frequency_channel_counts_like_the_others(tmp_path: Path) -> None:
    samples = np.zeros((6, 48_000), np.float32)
    samples[3] = tone(1.0)
    path = write_sound(tmp_path / "a.wav", Sound(samples, codec="pcm_f32le", layout="5.1"))
    _, waveform = read(path)
    assert np.abs(waveform[200:-200] - tone(1.0, 16_000)[200:-200] / 6).max() < 1e-4


FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("a.wav", {"codec": "pcm_s16le"}),
    ("a.wav", {"codec": "pcm_u8"}),
    ("a.wav", {"codec": "pcm_s24le"}),
    ("a.wav", {"codec": "pcm_s32le"}),
    ("a.wav", {"codec": "pcm_f32le"}),
    ("a.wav", {"codec": "pcm_f64le"}),
    ("a.wav", {"codec": "pcm_mulaw"}),
    ("a.wav", {"codec": "pcm_alaw"}),
    ("a.flac", {"codec": "flac"}),
    ("a.m4a", {"codec": "alac"}),
    ("a.mp3", {"codec": "libmp3lame"}),
    ("a.m4a", {"codec": "aac"}),
    ("a.mp4", {"codec": "aac"}),
    ("a.opus", {"codec": "libopus"}),
    ("a.webm", {"codec": "libopus"}),
    ("a.ogg", {"codec": "vorbis", "options": {"strict": "experimental"}}),
    ("a.mkv", {"codec": "ac3"}),
]


@pytest.mark.parametrize(("name", "form"), FORMATS, ids=[f"{form['codec']}-{name}" for name, form in FORMATS])
@pytest.mark.parametrize("rate", [48_000, 44_100])
def test_events_stay_where_they_are(tmp_path: Path, name: str, form: dict[str, Any], rate: int) -> None:
    if form["codec"] == "libopus" and rate != 48_000:
        pytest.skip("Opus has one rate")
    left = clicks(3.0, CLICKS, rate)
    path = write_sound(tmp_path / name, Sound(np.stack([left, left / 2]), rate=rate, **form))
    info, waveform = read(path)
    assert (info.sample_rate, info.channels) == (rate, 2)
    assert click_times(waveform, 16_000) == pytest.approx(CLICKS, abs=0.001)
    # AC-3 in Matroska and FFmpeg's own Vorbis name no end: their last block is padded.
    assert len(waveform) == pytest.approx(48_000, abs=600 if form["codec"] in {"ac3", "vorbis"} else 1)


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000])
def test_lossless_lengths_are_exact_at_every_rate(tmp_path: Path, rate: int) -> None:
    samples = (tone(1.234, rate) * 32767).astype(np.int16)
    _, waveform = read(write_pcm(tmp_path / "a.wav", samples, rate))
    assert len(waveform) == -(-len(samples) * 16_000 // rate)


@given(st.integers(min_value=1, max_value=20_000), st.sampled_from([8000, 22_050, 44_100, 48_000, 7_919]))
@settings(max_examples=25, deadline=None)
def test_the_resampler_neither_loses_nor_adds(n_samples: int, rate: int) -> None:
    blocks = iter([Block(np.zeros((1, n_samples), np.float32), rate, None)])
    lengths = [block.shape[1] for block in sound._resampled(blocks, 16_000, 1)]
    assert sum(lengths) == -(-n_samples * 16_000 // rate)


@pytest.mark.parametrize("rate", [44_100, 48_000])
@pytest.mark.parametrize(
    ("frequency", "least_db", "most_db"), [(300, -0.1, 0.1), (5000, -0.1, 0.1), (7000, -0.1, 0.1), (9000, -200, -80)]
)
def test_resampling_keeps_speech_and_lets_nothing_alias(
    tmp_path: Path, rate: int, frequency: int, least_db: float, most_db: float
) -> None:
    source = tone(1.0, rate, frequency)
    path = write_sound(tmp_path / "a.wav", Sound(source, rate=rate, codec="pcm_f32le"))
    _, waveform = read(path)
    gain = 20 * np.log10(np.std(waveform[800:-800]) / np.std(source) + 1e-12)
    assert least_db < gain < most_db


def test_a_change_of_rate_on_the_way_is_followed() -> None:
    first, second = np.zeros((2, 48_000), np.float32), np.zeros((1, 22_050), np.float32)
    blocks = iter([Block(first, 48_000, None), *[Block(second, 22_050, None)] * 2])
    assert sum(block.shape[1] for block in sound._resampled(blocks, 16_000, 1)) == 3 * 16_000


@pytest.mark.parametrize("n_channels", [1, 2])
def test_blocks_for_the_output_are_the_same_sound(tmp_path: Path, n_channels: int) -> None:
    left = clicks(2.0, [0.3, 1.4], 44_100)
    path = write_sound(tmp_path / "a.m4a", Sound(np.stack([left, left]), rate=44_100))
    blocks = list(read_audio_blocks(path, LIMITS, rate=48_000, n_channels=n_channels))
    assert all(block.shape[0] == n_channels and block.shape[1] for block in blocks)
    samples = np.concatenate(blocks, axis=1)
    assert samples.shape == (n_channels, 96_000)
    assert click_times(samples[0], 48_000) == pytest.approx([0.3, 1.4], abs=0.001)


@pytest.mark.parametrize("n_channels", [1, 6, 12])
def test_blocks_for_the_output_become_stereo(tmp_path: Path, n_channels: int) -> None:
    samples = (np.stack([tone(0.5)] * n_channels, axis=1) * 10_000).astype(np.int16)
    path = write_pcm(tmp_path / "a.wav", samples, 48_000)
    stereo = np.concatenate(list(read_audio_blocks(path, LIMITS, rate=48_000, n_channels=2)), axis=1)
    assert stereo.shape == (2, 24_000)
    assert np.abs(stereo).max() > 0.1


def test_probing_in_a_process_gives_the_same_answer(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.m4a", Sound(tone(1.0)))
    assert probe_audio(path, LIMITS) == inspect_audio(path, LIMITS)
    assert probe_audio(path, LIMITS).duration == 1


def test_a_film_is_a_source_of_sound(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 50, sound=Sound(clicks(2.0, [0.5, 1.5])))
    assert probe_audio(path, LIMITS).codec == "aac"
    _, waveform = read(path)
    assert len(waveform) == 32_000
    assert click_times(waveform, 16_000) == pytest.approx([0.5, 1.5], abs=0.001)


def test_silence_is_sound(tmp_path: Path) -> None:
    _, waveform = read(write_pcm(tmp_path / "a.wav", np.zeros(16_000, np.int16)))
    assert len(waveform) == 16_000
    assert not waveform.any()


def test_what_is_no_number_is_silence(tmp_path: Path) -> None:
    samples = tone(0.5, 16_000)
    samples[100], samples[200], samples[300], samples[400] = np.nan, np.inf, -np.inf, 1e30
    path = write_sound(tmp_path / "a.wav", Sound(samples, rate=16_000, codec="pcm_f32le"))
    _, waveform = read(path)
    assert np.isfinite(waveform).all()
    assert not waveform[[100, 200, 300]].any()
    assert np.abs(waveform).max() <= 8
    assert np.array_equal(np.delete(waveform, [100, 200, 300, 400]), np.delete(samples, [100, 200, 300, 400]))


# -- length -----------------------------------------------------------------------------------------------------------


def test_the_decoded_length_counts_not_the_headers(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.mp3", Sound(tone(10.0, 44_100), rate=44_100, codec="libmp3lame"))
    clips.cut(path, 0.65)
    info, waveform = read(path)
    assert info.duration == pytest.approx(10, abs=0.1)
    assert 6 < len(waveform) / 16_000 < 7


def test_a_cut_wav_is_accepted(tmp_path: Path) -> None:
    path = write_pcm(tmp_path / "a.wav", np.zeros(160_000, np.int16))
    clips.cut(path, 0.5)
    assert len(read(path)[1]) == pytest.approx(80_000, abs=50)


def test_padding_behind_the_declared_end_is_left_out() -> None:
    blocks = [Block(np.full((1, 1024), index, np.float32), 16_000, None) for index in range(10)]
    trimmed = sound._without_padding(iter(blocks), Fraction(9500, 16_000))
    kept = np.concatenate([block.samples for block in trimmed], axis=1)
    assert kept.shape[1] == 9500
    assert kept[0, -1] == 9


def test_a_declared_end_that_is_far_off_is_not_believed() -> None:
    blocks = [Block(np.full((1, 1024), index, np.float32), 16_000, None) for index in range(20)]
    trimmed = sound._without_padding(iter(blocks), Fraction(1, 10))
    kept = np.concatenate([block.samples for block in trimmed], axis=1)
    assert np.array_equal(kept, np.concatenate([block.samples for block in blocks], axis=1))


@pytest.mark.parametrize("n_samples", [1, 800, 1599])
def test_too_short_is_refused(tmp_path: Path, n_samples: int) -> None:
    path = write_pcm(tmp_path / "a.wav", np.zeros(n_samples, np.int16))
    with pytest.raises(MediaError, match=r"at least 0\.1 s"):
        read(path)


def test_the_shortest_allowed_is_accepted(tmp_path: Path) -> None:
    assert len(read(write_pcm(tmp_path / "a.wav", np.zeros(1600, np.int16)))[1]) == 1600


def test_no_samples_are_refused(tmp_path: Path) -> None:
    path = write_pcm(tmp_path / "a.wav", np.zeros(0, np.int16))
    for look in (inspect_audio, probe_audio):
        with pytest.raises(MediaError):
            look(path, LIMITS)


def test_longer_than_allowed_is_refused(tmp_path: Path) -> None:
    path = write_pcm(tmp_path / "a.wav", np.zeros(3 * 16_000, np.int16))
    assert len(read(path, replace(LIMITS, max_audio_s=3.0))[1]) == 48_000
    for limit in (1.0, 2.5):
        with pytest.raises(MediaError, match=f"longer than the {limit:g} s"):
            read(path, replace(LIMITS, max_audio_s=limit))


def test_reading_stops_one_second_after_the_limit(tmp_path: Path) -> None:
    path = write_pcm(tmp_path / "a.wav", np.zeros(60 * 16_000, np.int16))
    blocks = read_audio_blocks(path, replace(LIMITS, max_audio_s=2.0), rate=16_000, n_channels=1)
    lengths: list[int] = []
    with pytest.raises(MediaError):
        lengths.extend(block.shape[1] for block in blocks)
    assert 2 * 16_000 < sum(lengths) <= 3 * 16_000


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_silent_film_has_no_sound(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 10)
    for look in (inspect_audio, probe_audio):
        with pytest.raises(MediaError, match="no sound"):
            look(path, LIMITS)


def test_a_picture_is_no_sound(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.gif", 3, codec="gif", pixel_format="rgb8")
    with pytest.raises(MediaError, match="picture"):
        probe_audio(path, LIMITS)


def test_damaged_sound_is_refused(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 480_000).astype(np.float32)
    path = write_sound(tmp_path / "a.m4a", Sound(samples))
    clips.damage(path, 300)
    with pytest.raises(MediaError, match="damaged"):
        read(path)


def test_a_little_damage_is_accepted(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 480_000).astype(np.float32)
    path = write_sound(tmp_path / "a.m4a", Sound(samples))
    clips.damage(path, 4)
    assert len(read(path)[1]) > 155_000


def test_titles_in_unknown_encodings_do_no_harm(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.mp3", Sound(tone(1.0, 44_100), rate=44_100, codec="libmp3lame"))
    text = b"TIT2" + (5).to_bytes(4, "big") + b"\0\0" + b"\x03\xff\xfe\xc3\x28"
    tag = b"ID3\x04\0\0" + len(text).to_bytes(4, "big") + text
    path.write_bytes(tag + path.read_bytes())
    assert len(read(path)[1]) > 15_000


def test_a_cover_picture_makes_no_film(tmp_path: Path) -> None:
    cover = io.BytesIO()
    Image.new("RGB", (300, 300), (200, 30, 40)).save(cover, "jpeg")
    path = write_sound(tmp_path / "a.mp3", Sound(tone(1.0, 44_100), rate=44_100, codec="libmp3lame"))
    content = b"\0image/jpeg\0\x03\0" + cover.getvalue()
    frame = b"APIC" + len(content).to_bytes(4, "big") + b"\0\0" + content
    length = bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\0\0" + length + frame + path.read_bytes())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    assert read(path)[0].codec.startswith("mp3")
    with pytest.raises(MediaError, match="no video"):
        inspect_source(path, LIMITS)


def test_a_file_is_closed_when_its_reader_is(tmp_path: Path) -> None:
    path = write_pcm(tmp_path / "a.wav", np.zeros(160_000, np.int16))
    blocks = read_audio_blocks(path, LIMITS, rate=16_000, n_channels=1)
    assert isinstance(next(blocks), np.ndarray)
    blocks.close()
    links = [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists() and entry.readlink() == path]
    assert links == []


def test_both_files_are_looked_at_at_once_and_the_sources_error_comes_first(tmp_path: Path) -> None:
    video, speech = write_clip(tmp_path / "film.mp4", 5), write_sound(tmp_path / "a.m4a", Sound(tone(0.5)))
    assert probe_both(video, speech, LIMITS) == (probe_source(video, LIMITS), probe_audio(speech, LIMITS))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing" * 500)
    with pytest.raises(MediaError, match="the audio"):
        probe_both(video, broken, LIMITS)
    with pytest.raises(MediaError, match="the source"):
        probe_both(broken, broken, LIMITS)
