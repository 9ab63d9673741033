"""The output file: exact times, right tags, sound in its place, and never half a file under its name."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from musetalk import files, media
from musetalk.errors import DiskFullError, EncodeError, MediaError
from musetalk.frames import BT601_PAL, BT709, Colour, Planes
from musetalk.media import writing
from musetalk.media.writing import encoder_errors, index_comes_first
from tests.support import clips

ROOT = Path(__file__).resolve().parents[2]
SIZE = (160, 96)
LIMITS = media.MediaLimits()
RATES = [Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(30), Fraction(50), Fraction(60000, 1001)]


def picture(number: int, size: tuple[int, int] = SIZE) -> Planes:
    return clips.picture_planes(number, *size)


def wav(path: Path, samples: NDArray[Any], rate: int) -> Path:
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


def read_tags(path: Path) -> tuple[int, ...]:
    with av.open(str(path)) as container:
        next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        assert context.profile == "High"
        assert context.pix_fmt == "yuv420p"
        tags = context.color_primaries, context.color_trc, context.colorspace, context.color_range
        return tuple(int(code) for code in tags)


@pytest.mark.parametrize("colour", [BT709, BT601_PAL], ids=["bt709", "bt601"])
def test_tags_are_in_the_stream_and_in_the_container(tmp_path: Path, colour: Colour) -> None:
    write(tmp_path / "out.mp4", 3, colour=colour)
    data = (tmp_path / "out.mp4").read_bytes()
    position = data.index(b"colrnclx")
    codes = [int.from_bytes(data[position + 8 + 2 * k : position + 10 + 2 * k], "big") for k in range(3)]
    assert codes == [colour.primaries, colour.transfer, colour.matrix_code]
    assert data[position + 14] == 0  # limited range
    assert read_tags(tmp_path / "out.mp4") == (colour.primaries, colour.transfer, colour.matrix_code, 1)
    # Without the container's copy the stream's own tags count.
    (tmp_path / "bare.mp4").write_bytes(data.replace(b"colrnclx", b"freenclx"))
    assert read_tags(tmp_path / "bare.mp4") == (colour.primaries, colour.transfer, colour.matrix_code, 1)


@pytest.mark.parametrize("colour", [replace(BT709, primaries=22), replace(BT601_PAL, transfer=200)], ids=str)
def test_tags_that_h264_does_not_carry_become_those_of_the_matrix(tmp_path: Path, colour: Colour) -> None:
    write(tmp_path / "out.mp4", 2, colour=colour)
    usual = BT709 if colour.matrix == "bt709" else BT601_PAL
    assert read_tags(tmp_path / "out.mp4") == (usual.primaries, usual.transfer, usual.matrix_code, 1)


def test_the_index_comes_first_and_nothing_of_the_machine_is_inside(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4", 3)
    assert index_comes_first(tmp_path / "out.mp4")
    assert str(tmp_path).encode() not in (tmp_path / "out.mp4").read_bytes()


def test_the_file_does_not_reveal_when_and_from_what_it_was_made(tmp_path: Path) -> None:
    sound = clips.Sound(clips.tone(1.0), codec="aac")
    tagged = clips.write_clip(tmp_path / "tagged.mkv", 25, sound=sound)
    with av.open(str(tagged)) as source, av.open(str(tmp_path / "titled.mkv"), "w") as titled:
        stream = source.streams.audio[0]
        copy = titled.add_stream_from_template(stream)
        titled.metadata.update({"title": "a secret title", "comment": "a secret comment"})
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                titled.mux(packet)
    write(tmp_path / "out.mp4", 25, audio_path=tmp_path / "titled.mkv")
    data = (tmp_path / "out.mp4").read_bytes()
    assert b"secret" in (tmp_path / "titled.mkv").read_bytes()
    assert b"secret" not in data
    with av.open(str(tmp_path / "out.mp4")) as container:
        found = [container.metadata, *(stream.metadata for stream in container.streams)]
    assert {name for metadata in found for name in metadata} <= {
        *("major_brand", "minor_version", "compatible_brands"),
        *("language", "handler_name", "vendor_id"),
    }
    for kind in (b"mvhd", b"tkhd", b"mdhd"):
        at = data.index(kind) + 8
        assert data[at : at + 8] == bytes(8), "creation and modification time"


@pytest.mark.parametrize(
    ("rate", "channels", "out_rate"),
    [
        *((48_000, 2, 48_000), (48_000, 6, 48_000), (44_100, 1, 44_100), (44_100, 2, 44_100)),
        *((16_000, 1, 48_000), (16_000, 2, 48_000), (8_000, 1, 48_000)),
    ],
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
@pytest.mark.parametrize("given", [Fraction(1, 2), Fraction(1), Fraction(2)], ids=["padded", "whole", "cut"])
def test_odd_lengths_of_sound_are_kept_cut_or_padded(tmp_path: Path, seconds: str, given: Fraction) -> None:
    duration = Fraction(seconds)
    audio = wav(tmp_path / "a.wav", clips.tone(float(duration * given), 16_000), 16_000)
    n_frames = -(-duration * 25 // 1)
    info = write(tmp_path / "out.mp4", int(n_frames), audio_path=audio, audio_duration=duration)
    assert info.audio_duration is not None
    assert abs(info.audio_duration - duration) <= Fraction(1, 48_000)
    heard = media.read_waveform(tmp_path / "out.mp4", media.inspect_audio(tmp_path / "out.mp4", LIMITS), LIMITS)
    assert abs(len(heard) - duration * 16_000) <= 1
    # What was added is silence; a millisecond belongs to the coder's echo.
    end = int(min(given, Fraction(1)) * duration * 16_000)
    assert np.abs(heard[: end - 80]).max() > 0.4
    if given < 1:
        assert np.abs(heard[end + 400 :]).max() < 0.02


def test_sound_is_heard_as_loud_as_it_was_and_without_wrapping(tmp_path: Path) -> None:
    audio = clips.write_sound(
        tmp_path / "a.wav", clips.Sound(clips.tone(1.0, 48_000, amplitude=1.7), codec="pcm_f32le", sample_format="flt")
    )
    write(tmp_path / "out.mp4", 25, audio_path=audio)
    heard = media.read_waveform(tmp_path / "out.mp4", media.inspect_audio(tmp_path / "out.mp4", LIMITS), LIMITS)
    # A sine cut off at full scale; wrapped numbers would jump between the extremes.
    assert 0.9 < np.abs(heard).max() < 1.3
    assert np.abs(np.diff(heard)).max() < 0.4


def test_one_picture_is_a_video(tmp_path: Path) -> None:
    assert write(tmp_path / "out.mp4", 1).n_frames == 1


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    audio = wav(tmp_path / "a.wav", clips.tone(1.0, 16_000), 16_000)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.mp4", 25, audio_path=audio, settings=media.EncoderSettings(threads=2))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("crf", [0, 16, 51])
def test_any_quality_of_the_settings_is_encoded_as_high_profile(tmp_path: Path, crf: int) -> None:
    info = write(tmp_path / "out.mp4", 3, settings=media.EncoderSettings(crf=crf))
    assert info.n_bytes == (tmp_path / "out.mp4").stat().st_size
    assert read_tags(tmp_path / "out.mp4") == (1, 1, 1, 1)


def test_the_best_quality_gives_every_plane_back(tmp_path: Path) -> None:
    noise = np.random.default_rng(3)
    given = [
        Planes(*(noise.integers(16, 236, shape, dtype=np.uint8) for shape in ((96, 160), (48, 80), (48, 80))))
        for _ in range(5)
    ]
    with start(tmp_path / "out.mp4", settings=media.EncoderSettings(crf=0)) as writer:
        for planes in given:
            writer.write(planes)
        writer.close()
    info = media.inspect_source(tmp_path / "out.mp4", LIMITS)
    read = [frame.planes for frame in media.read_source(tmp_path / "out.mp4", info, LIMITS)]
    for name in ("y", "u", "v"):
        for got, planes in zip(read, given, strict=True):
            # The right plane, rows, columns and picture: noise has no likeness to any other.
            assert np.abs(getattr(got, name).astype(int) - getattr(planes, name)).max() <= 6


def test_frames_may_come_from_another_thread_and_from_any_memory(tmp_path: Path) -> None:
    wide = picture(3, (320, 192))
    part = Planes(wide.y[:96, 160:], wide.u[:48, 80:], wide.v[:48, 80:])
    writer = start(tmp_path / "out.mp4", 5)

    def encode() -> None:
        for _ in range(5):
            writer.write(part)

    thread = threading.Thread(target=encode)
    thread.start()
    thread.join()
    assert not (tmp_path / "out.mp4").exists()
    assert writer.close().n_frames == 5
    info = media.inspect_source(tmp_path / "out.mp4", LIMITS)
    for frame in media.read_source(tmp_path / "out.mp4", info, LIMITS):
        assert clips.luma_psnr(frame.planes, part) > 40


def test_a_fresh_encode_is_close_to_what_was_given(tmp_path: Path) -> None:
    write(tmp_path / "out.mp4", 10)
    info = media.inspect_source(tmp_path / "out.mp4", LIMITS)
    for frame in media.read_source(tmp_path / "out.mp4", info, LIMITS):
        assert clips.luma_psnr(frame.planes, picture(frame.index)) > 40


def start(path: Path, n_frames: int = 5, **options: Any) -> media.VideoWriter:
    wanted: dict[str, Any] = {"width": SIZE[0], "height": SIZE[1], "rate": Fraction(25), "colour": BT709}
    wanted.update(n_frames=n_frames, audio_path=None, audio_duration=Fraction(1), **options)
    return media.VideoWriter(path, **wanted)


def test_too_few_too_many_and_wrong_pictures_are_refused(tmp_path: Path) -> None:
    with start(tmp_path / "few.mp4") as writer:
        writer.write(picture(0))
        with pytest.raises(EncodeError, match="1 of 5"):
            writer.close()
    with start(tmp_path / "many.mp4", 1) as writer:
        writer.write(picture(0))
        with pytest.raises(EncodeError, match="more than"):
            writer.write(picture(1))
    with start(tmp_path / "wrong.mp4") as writer:
        with pytest.raises(EncodeError, match="64x64"):
            writer.write(picture(0, (64, 64)))
        with pytest.raises(EncodeError, match="160x96"):
            writer.write(replace(picture(0), u=np.zeros((96, 160), np.uint8)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"width": 161}, {"height": 0}, {"n_frames": 0}, {"rate": Fraction(0)}, {"rate": Fraction(10**12, 7)}]
)
def test_what_cannot_be_encoded_is_said_at_once(tmp_path: Path, options: dict[str, Any]) -> None:
    wanted = {"n_frames": 5, **options}
    with pytest.raises(EncodeError, match="cannot be encoded"):
        start(tmp_path / "out.mp4", **{"n_frames": 5, **wanted})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [media.EncoderSettings(codec="none"), media.EncoderSettings(preset="none")])
def test_settings_that_no_encoder_knows_are_the_workers_fault(tmp_path: Path, settings: media.EncoderSettings) -> None:
    with pytest.raises(EncodeError):
        start(tmp_path / "out.mp4", settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_ended_takes_nothing_more(tmp_path: Path) -> None:
    with start(tmp_path / "out.mp4", 1) as writer:
        writer.write(picture(0))
        writer.close()
        with pytest.raises(EncodeError, match="closed"):
            writer.write(picture(1))
        with pytest.raises(EncodeError, match="closed"):
            writer.close()
    assert clips.decode_numbers(tmp_path / "out.mp4") == [0]


def test_an_error_about_an_unusable_name_contains_no_path(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").mkdir()
    with start(tmp_path / "out.mp4", 1) as writer:
        writer.write(picture(0))
        with pytest.raises(EncodeError) as caught:
            writer.close()
    assert str(tmp_path) not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


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


def test_an_error_about_a_missing_folder_contains_no_path(tmp_path: Path) -> None:
    with pytest.raises(EncodeError) as caught:
        start(tmp_path / "none" / "out.mp4")
    assert str(tmp_path) not in str(caught.value)


def limited_child(folder: str, n_bytes: int) -> str:
    """In a process of its own: write under a file-size limit, the stand-in for a full disk.

    Returns the error's name and the number of files that are still open.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        write(Path(folder) / "out.mp4", 25, audio_path=Path(folder) / "a.wav")
        name = "written"
    except Exception as error:
        name = type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    return f"{name} {sum(link.startswith(folder) for link in links)}"


def test_a_full_disk_has_its_own_error_and_leaves_nothing_open_or_behind_wherever_it_strikes(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", clips.tone(1.0, 16_000), 16_000)
    size = write(tmp_path / "whole.mp4", 25, audio_path=tmp_path / "a.wav").n_bytes
    # From the first byte over the middle to the last steps of moving the index to the front.
    limits = [1, 1000, size // 2, size - 3000, size - 100, size - 1, size]
    program = (
        "from tests.unit.test_media_writing import limited_child as run\n"
        f"for limit in {limits!r}: print(run({str(tmp_path)!r}, limit))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=False, capture_output=True)
    assert done.stdout.decode().splitlines() == ["DiskFullError 0"] * 6 + ["written 0"], done.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "out.mp4", "whole.mp4"]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EIO, EncodeError)],
)
def test_errors_of_the_disk_are_distinguished_without_a_path(number: int, expected: type[Exception]) -> None:
    for error in (OSError(number, os.strerror(number), "/secret/place"), av.error.FFmpegError(number, "x", "/secret")):
        with pytest.raises(expected) as caught, encoder_errors():
            raise error
        assert "secret" not in str(caught.value)


def swapped(**options: Any) -> Callable[[Path], None]:
    """Puts another finished file in the place of the one to be checked."""

    def spoil(path: Path) -> None:
        other = path.with_name("other.mp4")
        audio = (
            wav(path.with_name("other.wav"), clips.tone(2.0, 16_000), 16_000) if options.get("sound", True) else None
        )
        settings = {key: value for key, value in options.items() if key != "sound"}
        write(other, **{"n_frames": 25, "audio_path": audio, **settings})
        other.replace(path)

    return spoil


def late_index(path: Path) -> None:
    data = path.read_bytes()
    moov = data.index(b"moov") - 4
    mdat = data.index(b"mdat") - 4
    # Padding of the same length keeps the data where the index says.
    padding = (mdat - moov).to_bytes(4, "big") + b"free" + bytes(mdat - moov - 8)
    path.write_bytes(data[:moov] + padding + data[mdat:] + data[moov:mdat])


SPOILERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "read again"),
    "no video": (lambda path: path.write_bytes(b"text" * 5000), "read again"),
    "cut short": (lambda path: clips.cut(path, 0.5), "pictures instead of 25"),
    "first picture gone": (lambda path: clips.damage(path, 4000, start=0, end=0.5), "damaged first picture|read again"),
    "index at the end": (late_index, "index behind"),
    "fewer pictures": (swapped(n_frames=24), "24 pictures"),
    "another size": (swapped(size=(96, 160)), "size 96x160"),
    "another rate": (swapped(rate=Fraction(30)), "time stamps"),
    "another colour": (swapped(colour=BT601_PAL), "colour tags"),
    "other primaries": (swapped(colour=replace(BT709, primaries=9)), "colour tags"),
    "no sound": (swapped(sound=False), "0 audio tracks"),
    "short sound": (swapped(audio_duration=Fraction(9, 10)), "sound of 0.900 s"),
    "long sound": (swapped(audio_duration=Fraction(11, 10)), "sound of 1.100 s"),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_a_file_that_is_not_what_was_meant_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spoil, complaint = SPOILERS[name]
    folder = tmp_path / "job"
    folder.mkdir()
    audio = wav(tmp_path / "a.wav", clips.tone(1.0, 16_000), 16_000)
    sync = files.sync

    def sync_and_spoil(path: Path) -> None:
        sync(path)
        if path.parent == folder:
            moved = path.replace(tmp_path / "spoiled")
            spoil(moved)
            moved.replace(path)

    monkeypatch.setattr(writing, "sync", sync_and_spoil)
    with pytest.raises(EncodeError, match=complaint) as caught:
        write(folder / "out.mp4", 25, audio_path=audio)
    assert str(tmp_path) not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_the_encoder_is_chosen_by_trying_it() -> None:
    settings, reason = media.choose_encoder("libx264")
    assert (settings.codec, reason) == ("libx264", None)
    settings, reason = media.choose_encoder("auto")
    assert (settings.codec == "h264_nvenc") == (reason is None)
    if reason is not None:
        assert "h264_nvenc" in reason
    with pytest.raises(ValueError, match="mpeg2"):
        media.choose_encoder("mpeg2")


def test_a_picture_the_hardware_does_not_take_is_encoded_in_software(tmp_path: Path) -> None:
    # Smaller than any NVENC accepts, and without a GPU it accepts nothing.
    info = write(tmp_path / "out.mp4", 5, size=(64, 32), settings=media.EncoderSettings(codec="h264_nvenc"))
    assert info.codec == "libx264"
    assert clips.decode_numbers(tmp_path / "out.mp4") == list(range(5))
