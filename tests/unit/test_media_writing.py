"""The output file: exact times, right tags, sound in its place, and never half a file under its name."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from errors import DiskFullError, EncodeError, MediaError
from musetalk import media
from musetalk.frames import BT601_PAL, BT709, Colour, Planes
from musetalk.media.writing import index_comes_first
from tests.support import clips

ROOT = Path(__file__).resolve().parents[2]
SIZE = (160, 96)
LIMITS = media.MediaLimits()
RATES = [Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(50), Fraction(60000, 1001)]


def picture(number: int, size: tuple[int, int] = SIZE) -> Planes:
    return clips.picture_planes(number, *size)


def wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    return clips.write_sound(path, clips.Sound(samples, rate=rate, codec="pcm_s16le", sample_format="s16"))


def write(path: Path, n_frames: int, rate: Fraction = Fraction(25), **options: Any) -> media.OutputInfo:
    size = options.pop("size", SIZE)
    audio = options.pop("audio_path", None)
    duration = options.pop("audio_duration", n_frames / rate)
    with media.VideoWriter(
        path,
        width=size[0],
        height=size[1],
        rate=rate,
        colour=options.pop("colour", BT709),
        n_frames=n_frames,
        audio_path=audio,
        audio_duration=duration,
        **options,
    ) as writer:
        for number in range(n_frames):
            writer.write(picture(number % 4000, size))
        return writer.close()


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.3f}")
def test_every_time_stamp_is_exact(tmp_path: Path, rate: Fraction) -> None:
    info = write(tmp_path / "out.mp4", 40, rate)
    assert (info.n_frames, info.rate, info.duration) == (40, rate, 40 / rate)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        times = sorted(packet.pts * packet.time_base for packet in container.demux(stream) if packet.pts is not None)
        assert stream.average_rate == rate
    assert times == [index / rate for index in range(40)]
    assert clips.decode_numbers(tmp_path / "out.mp4") == list(range(40))


@pytest.mark.slow
def test_ten_minutes_at_29_97_do_not_drift(tmp_path: Path) -> None:
    rate, seconds = Fraction(30000, 1001), 600
    times = [5.0, 100.0, 300.0, 590.0]
    audio = wav(tmp_path / "a.wav", clips.clicks(seconds, times, 16_000), 16_000)
    info = write(tmp_path / "out.mp4", 17_983, rate, audio_path=audio, audio_duration=Fraction(seconds))
    assert info.duration - seconds < 1 / rate
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        stamps = sorted(p.pts * p.time_base for p in container.demux(stream) if p.pts is not None)
    assert stamps == [index / rate for index in range(17_983)]
    heard = media.read_waveform(tmp_path / "out.mp4", media.inspect_audio(tmp_path / "out.mp4", LIMITS), LIMITS)
    found = clips.click_times(heard, 16_000, threshold=0.15)
    assert len(found) == len(times)
    assert max(abs(a - b) for a, b in zip(found, times, strict=True)) < 0.001


@pytest.mark.parametrize("colour", [BT709, BT601_PAL], ids=["bt709", "bt601"])
def test_tags_are_in_the_stream_and_in_the_container(tmp_path: Path, colour: Colour) -> None:
    write(tmp_path / "out.mp4", 3, colour=colour)
    data = (tmp_path / "out.mp4").read_bytes()
    position = data.index(b"colrnclx")
    codes = [int.from_bytes(data[position + 8 + 2 * k : position + 10 + 2 * k], "big") for k in range(3)]
    assert codes == [colour.primaries, colour.transfer, colour.matrix_code]
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = next(container.decode(video=0)) and container.streams.video[0].codec_context
        got = context.color_primaries, context.color_trc, context.colorspace, context.color_range
        assert tuple(int(code) for code in got) == (colour.primaries, colour.transfer, colour.matrix_code, 1)
        assert context.profile == "High"
        assert context.pix_fmt == "yuv420p"


def test_the_index_comes_first_and_nothing_of_the_machine_is_inside(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4", 3)
    assert index_comes_first(tmp_path / "out.mp4")
    assert str(tmp_path).encode() not in (tmp_path / "out.mp4").read_bytes()


@pytest.mark.parametrize(
    ("rate", "channels", "out_rate"),
    [(48_000, 2, 48_000), (44_100, 1, 44_100), (16_000, 1, 48_000), (8_000, 1, 48_000), (48_000, 6, 48_000)],
)
def test_sound_is_where_it_was(tmp_path: Path, rate: int, channels: int, out_rate: int) -> None:
    times = [0.25, 1.0, 2.6]
    mono = clips.clicks(3.0, times, rate)
    audio = wav(tmp_path / "a.wav", np.repeat(mono[None], channels, axis=0), rate)
    info = write(tmp_path / "out.mp4", 75, audio_path=audio, audio_duration=Fraction(3))
    assert info.audio_duration is not None
    assert abs(info.audio_duration - 3) < Fraction(1, 100)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.audio[0]
        assert (stream.rate, stream.channels) == (out_rate, min(channels, 2))
        assert stream.codec_context.name == "aac"
    heard = media.read_waveform(tmp_path / "out.mp4", media.inspect_audio(tmp_path / "out.mp4", LIMITS), LIMITS)
    reference = media.read_waveform(audio, media.inspect_audio(audio, LIMITS), LIMITS)
    count = min(len(heard), len(reference))
    for time in times:
        window = slice(max(0, int((time - 0.1) * 16_000)), min(count, int((time + 0.1) * 16_000)))
        lags = np.arange(-64, 65)
        match = [float((np.roll(heard[:count], -lag)[window] * reference[:count][window]).sum()) for lag in lags]
        assert abs(int(lags[int(np.argmax(match))])) <= 16  # one millisecond


@pytest.mark.parametrize("seconds", ["0.1", "0.40001", "1.234", "2.04"])
def test_odd_lengths_of_sound_are_kept(tmp_path: Path, seconds: str) -> None:
    duration = Fraction(seconds)
    audio = wav(tmp_path / "a.wav", clips.tone(float(duration), 16_000), 16_000)
    n_frames = -(-duration * 25 // 1)
    info = write(tmp_path / "out.mp4", int(n_frames), audio_path=audio, audio_duration=duration)
    assert info.audio_duration is not None
    assert abs(info.audio_duration - duration) <= Fraction(1, 25)


def test_one_picture_is_a_video(tmp_path: Path) -> None:
    assert write(tmp_path / "out.mp4", 1).n_frames == 1


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    audio = wav(tmp_path / "a.wav", clips.tone(1.0, 16_000), 16_000)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.mp4", 25, audio_path=audio, settings=media.EncoderSettings(threads=2))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_fresh_encode_is_close_to_what_was_given(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4", 10)
    info = media.inspect_source(tmp_path / "out.mp4", LIMITS)
    for frame in media.read_source(tmp_path / "out.mp4", info, LIMITS):
        assert clips.luma_psnr(frame.planes, picture(frame.index)) > 40


def start(path: Path, n_frames: int = 5) -> media.VideoWriter:
    return media.VideoWriter(
        path,
        width=SIZE[0],
        height=SIZE[1],
        rate=Fraction(25),
        colour=BT709,
        n_frames=n_frames,
        audio_path=None,
        audio_duration=Fraction(1),
    )


def test_too_few_too_many_and_wrong_pictures_are_refused(tmp_path: Path) -> None:
    with start(tmp_path / "few.mp4") as writer:
        writer.write(picture(0))
        with pytest.raises(EncodeError, match="1 of 5"):
            writer.close()
    with start(tmp_path / "many.mp4", 1) as writer:
        writer.write(picture(0))
        with pytest.raises(EncodeError, match="more than"):
            writer.write(picture(1))
    with start(tmp_path / "wrong.mp4") as writer, pytest.raises(EncodeError, match="64x64"):
        writer.write(picture(0, (64, 64)))
    assert list(tmp_path.iterdir()) == []


def test_leaving_early_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"earlier")
    with start(tmp_path / "out.mp4") as writer:
        writer.write(picture(0))
    assert (tmp_path / "out.mp4").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    writer.abort()


def test_sound_that_cannot_be_read_is_the_inputs_fault_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"no sound" * 300)
    with pytest.raises(MediaError, match="the audio"):
        write(tmp_path / "out.mp4", 5, audio_path=tmp_path / "a.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_a_folder_that_is_not_there_is_told_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(EncodeError) as caught:
        start(tmp_path / "none" / "out.mp4")
    assert str(tmp_path) not in str(caught.value)


def limited_child(folder: str) -> int:
    """In a process of its own: write under a file-size limit, the stand-in for a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        with start(Path(folder) / "out.mp4", 200) as writer:
            noise = np.random.default_rng(0)
            for _ in range(200):
                plane = noise.integers(16, 235, (96, 160), dtype=np.uint8)
                writer.write(replace(picture(0), y=plane))
            writer.close()
    except DiskFullError:
        return 7
    return 1


def test_a_full_disk_has_its_own_error_and_leaves_nothing(tmp_path: Path) -> None:
    program = (
        f"import sys; from tests.unit.test_media_writing import limited_child as run; sys.exit(run({str(tmp_path)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 7, done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_the_encoder_is_chosen_by_trying_it() -> None:
    settings, reason = media.choose_encoder("libx264")
    assert (settings.codec, reason) == ("libx264", None)
    settings, reason = media.choose_encoder("auto")
    assert (settings.codec == "h264_nvenc") == (reason is None)
    if reason is not None:
        assert "h264_nvenc" in reason
