"""Planes and a sound file to one MP4: a single H.264 encode, AAC, right tags, and a name only when it was checked.

A single picture goes to a PNG or JPEG.

Specified in docs/media.md#output-file. Knows no model.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import av.error
import cv2
import numpy as np
from numpy.typing import NDArray

from musetalk.cores import MAX_THREADS, usable_cores
from musetalk.errors import DiskFullError, EncodeError, MediaError
from musetalk.files import close_all, is_disk_full, part_path, replacing, sync
from musetalk.frames import BT601_NTSC, BT601_PAL, BT709, Colour, Matrix, Planes, black_planes, planes_to_bgr
from musetalk.media.decoder import probe_audio, read_audio_blocks
from musetalk.media.limits import MediaLimits
from musetalk.media.opening import decode, open_container, prepare_decoder
from musetalk.media.sound import inspect_audio
from musetalk.media.timing import as_fraction

# Sound is muxed this far ahead of the picture, so that players never wait for it.
_AUDIO_LEAD_S = Fraction(1, 2)
_AAC_FRAME = 1024
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
_JPEG_QUALITY = 95
_BIT_RATES = {1: 96_000, 2: 160_000}
_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG
_SOFTWARE_CODEC, _HARDWARE_CODEC = "libx264", "h264_nvenc"
# x264's `superfast` with the look-ahead of `veryfast`: it spends bits on what stays the same, most of a talking head.
_LEAN = {"preset": "superfast", "x264-params": "mbtree=1:rc-lookahead=10"}
_ENCODERS = ("auto", _SOFTWARE_CODEC, _HARDWARE_CODEC)
# Code points (ITU-T H.273) that x264 writes; it drops others, and a player would have to guess.
_WRITTEN_PRIMARIES = {1, *range(4, 13)}
_WRITTEN_TRANSFERS = {1, *range(4, 19)}
# Clocks of odd rates may be off by this much (s); those of the usual rates are exact.
_CLOCK_TOLERANCE = Fraction(1, 10_000)


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of the video encoder; `crf` (0..51) is x264's constant quality, NVENC's quantiser follows it.

    `preset` is one of x264's, or `lean`, which takes about half of the time of `veryfast` for somewhat larger files
    (benchmarks/RESULTS.md).
    """

    codec: str = "libx264"
    preset: str = "veryfast"
    crf: int = 16
    threads: int = 0  # 0: the usable cores but one, which launches the GPU's work

    def options(self) -> dict[str, str]:
        """The encoder's private options."""
        if self.codec == _HARDWARE_CODEC:
            return {"preset": "p4", "rc": "vbr", "cq": str(min(self.crf + 3, 51)), "b:v": "0", "profile": "high"}
        # 0 is lossless, which High profile does not have and browsers do not play.
        preset = _LEAN if self.preset == "lean" else {"preset": self.preset}
        return {**preset, "crf": str(max(self.crf, 1)), "profile": "high"}

    def n_threads(self) -> int:
        """Encoder threads."""
        return self.threads or max(1, min(usable_cores() - 1, MAX_THREADS))


@dataclass(frozen=True)
class OutputInfo:
    """A finished and checked file; durations in seconds, `codec` the encoder that made the picture."""

    width: int
    height: int
    rate: Fraction
    n_frames: int
    duration: Fraction
    audio_duration: Fraction | None
    n_bytes: int
    codec: str = _SOFTWARE_CODEC


def choose_encoder(preferred: str = "auto") -> tuple[EncoderSettings, str | None]:
    """The encoder to use and, where it is not the wanted one, why; NVENC has to prove itself by a test encode.

    `preferred` is auto, libx264 or h264_nvenc; raises ValueError for anything else.
    """
    if preferred not in _ENCODERS:
        raise ValueError(f"the encoder is one of {', '.join(_ENCODERS)}, not {preferred!r}")
    if preferred == _SOFTWARE_CODEC:
        return EncoderSettings(), None
    nvenc = EncoderSettings(codec=_HARDWARE_CODEC)
    try:
        _test_encode(nvenc)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        # Without a GPU or its driver libraries opening fails with one of several classes.
        return EncoderSettings(), f"{_HARDWARE_CODEC} cannot be used here ({type(error).__name__})"
    return nvenc, None


def _test_encode(settings: EncoderSettings) -> None:
    context: Any = av.CodecContext.create(settings.codec, "w")
    context.width, context.height, context.pix_fmt = 256, 256, "yuv420p"
    context.time_base = Fraction(1, 25)
    context.options = settings.options()
    n_packets = 0
    for index in range(4):
        frame = planes_frame(black_planes(256, 256), BT709)
        frame.pts, frame.time_base = index, Fraction(1, 25)
        n_packets += len(context.encode(frame))
    n_packets += len(context.encode(None))
    if n_packets != 4:
        raise ValueError("the encoder lost frames")


def planes_frame(planes: Planes, colour: Colour) -> Any:
    """The planes as a yuv420p frame of their own, tagged."""
    frame: Any = av.VideoFrame(planes.width, planes.height, "yuv420p")
    for target, source in zip(frame.planes, (planes.y, planes.u, planes.v), strict=True):
        rows = np.frombuffer(target, np.uint8).reshape(-1, target.line_size)
        rows[: source.shape[0], : source.shape[1]] = source
    frame.color_range, frame.colorspace = _LIMITED_RANGE, colour.matrix_code
    for name, value in (("color_primaries", colour.primaries), ("color_trc", colour.transfer)):
        if hasattr(frame, name):
            setattr(frame, name, value)
    return frame


def written_colour(colour: Colour) -> Colour:
    """`colour` with the usual primaries and transfer of its matrix in place of those that H.264 files do not carry."""
    usual = next((known for known in (BT709, BT601_PAL) if known.matrix_code == colour.matrix_code), BT601_NTSC)
    return replace(
        colour,
        primaries=colour.primaries if colour.primaries in _WRITTEN_PRIMARIES else usual.primaries,
        transfer=colour.transfer if colour.transfer in _WRITTEN_TRANSFERS else usual.transfer,
    )


class VideoWriter:
    """Writes one MP4 in a `with` block; `close` gives it its name, leaving the block without `close` removes it.

    Calls may come from another thread than the one that made the writer, one after the other.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        rate: Fraction,
        colour: Colour,
        n_frames: int,
        audio_path: Path | None,
        audio_duration: Fraction,
        settings: EncoderSettings | None = None,
        limits: MediaLimits | None = None,
    ) -> None:
        """`n_frames` pictures at `rate` beside the first `audio_duration` seconds of `audio_path` (None: silent).

        Raises EncodeError when this cannot be encoded, MediaError when the sound cannot be read.
        """
        self._path, self._limits = path, limits or MediaLimits()
        self._size, self._rate, self._n_frames = (width, height), rate, n_frames
        self._colour = written_colour(colour)
        self._duration = audio_duration if audio_path is not None else None
        self._n_written = 0
        self._closed = False
        self._part = part_path(path)
        self._container: Any = None
        self._sound: _SoundTrack | None = None
        if min(width, height) < 2 or width % 2 or height % 2 or n_frames < 1 or rate <= 0:
            raise EncodeError(f"{n_frames} pictures of {width}x{height} px at {rate} a second cannot be encoded")
        try:
            with encoder_errors():
                # FFmpeg opens the file with the first packet; so a missing folder is noticed here.
                self._part.touch(exist_ok=False)
            self._open(settings or EncoderSettings())
            if audio_path is not None:
                with encoder_errors():
                    self._sound = _SoundTrack(self._container, audio_path, audio_duration, self._limits)
        except BaseException:
            self.abort()
            raise

    def _open(self, settings: EncoderSettings) -> None:
        """Make the container and its encoder; x264 stands in where the hardware does not take this picture."""
        self.codec = settings.codec
        try:
            with encoder_errors():
                self._container = av.open(
                    f"file:{os.path.abspath(self._part)}",
                    "w",
                    format="mp4",
                    options={"movflags": "+faststart", "fflags": "+bitexact"},
                )
                self._video = self._add_video(settings)
        except EncodeError:
            if settings.codec != _HARDWARE_CODEC:
                raise
            # It passed its test, but has a smallest size and a limited number of sessions. Nothing is written yet.
            self._container.close()
            self._open(replace(settings, codec=_SOFTWARE_CODEC))

    def _add_video(self, settings: EncoderSettings) -> Any:
        # A rational rate is its own time base: no time stamp is ever rounded.
        stream = self._container.add_stream(settings.codec, rate=self._rate, options=settings.options())
        context = stream.codec_context
        context.width, context.height = self._size
        context.pix_fmt = "yuv420p"
        context.time_base = stream.time_base = 1 / self._rate
        context.thread_count = settings.n_threads()
        context.color_range, context.colorspace = _LIMITED_RANGE, self._colour.matrix_code
        context.color_primaries, context.color_trc = self._colour.primaries, self._colour.transfer
        context.sample_aspect_ratio = Fraction(1)
        context.open()
        return stream

    def write(self, planes: Planes) -> None:
        """Encode the next picture; raises EncodeError for a wrong size or one too many, DiskFullError."""
        if self._container is None:
            raise EncodeError("a picture for an output that is closed")
        width, height = self._size
        half = (height // 2, width // 2)
        if planes.y.shape != (height, width) or planes.u.shape != half or planes.v.shape != half:
            raise EncodeError(f"a picture of {planes.width}x{planes.height} px in a video of {width}x{height} px")
        if self._n_written >= self._n_frames:
            raise EncodeError(f"more than the {self._n_frames} pictures that were announced")
        with encoder_errors():
            frame = planes_frame(planes, self._colour)
            frame.pts, frame.time_base = self._n_written, 1 / self._rate
            if self._sound is not None:
                self._sound.write_until(self._n_written / self._rate + _AUDIO_LEAD_S)
            for packet in self._video.encode(frame):
                self._container.mux(packet)
        self._n_written += 1

    def close(self) -> OutputInfo:
        """Finish, check and name the file.

        Raises EncodeError when pictures are missing or the file is not as intended, and DiskFullError; the file is then
        removed.
        """
        if self._container is None:
            raise EncodeError("the output is closed already")
        try:
            if self._n_written != self._n_frames:
                raise EncodeError(f"{self._n_written} of {self._n_frames} pictures were written")
            with encoder_errors():
                if self._sound is not None:
                    self._sound.finish()
                for packet in self._video.encode(None):
                    self._container.mux(packet)
                container, self._container = self._container, None
                container.close()
                sync(self._part)
            info = self._check()
            # Not `replacing`: pictures arrive call by call, and the finished part is checked before it gets its name.
            with encoder_errors():
                os.replace(self._part, self._path)
        except BaseException:
            self.abort()
            raise
        self._closed = True
        return info

    def abort(self) -> None:
        """Drop what was written; raises nothing. Does nothing after a successful `close`."""
        if self._closed:
            return
        self._closed = True
        place = None
        # Unlinked first: finishing a file that nobody needs would rewrite all of it.
        with suppress(OSError):
            place = os.stat(self._part)
            self._part.unlink()
        container, self._container = self._container, None
        if self._sound is not None:
            self._sound.close()
        if container is not None:
            with suppress(av.error.FFmpegError, OSError, ValueError):
                container.close()
            # A file whose header did not fit on the disk stays open otherwise, for the life of the process.
            if place is not None:
                close_all(place)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _check(self) -> OutputInfo:
        """Open the finished file as a player would; raises EncodeError for whatever is not as it was meant."""
        # A request may enlarge a picture beyond what is accepted as a source.
        limits = replace(self._limits, max_pixels=2**30)
        sound = None
        try:
            with open_container(self._part, limits, "the output") as container:
                problems = self._video_problems(container, limits)
            if self._duration is not None and not problems:
                sound = inspect_audio(self._part, limits).duration
                if sound is None or abs(sound - self._duration) > 1 / self._rate:
                    problems.append(f"sound of {float(sound or 0):.3f} s instead of {float(self._duration):.3f} s")
        except MediaError as error:
            # The file is ours, so no input caused the error.
            raise EncodeError(f"the output cannot be read again: {error.message}") from None
        if not index_comes_first(self._part):
            problems.append("index behind the data")
        if problems:
            raise EncodeError(f"the output is not as it should be: {', '.join(problems)}")
        return OutputInfo(
            *self._size,
            rate=self._rate,
            n_frames=self._n_frames,
            duration=self._n_frames / self._rate,
            audio_duration=sound,
            n_bytes=self._part.stat().st_size,
            codec=self.codec,
        )

    def _video_problems(self, container: Any, limits: MediaLimits) -> list[str]:
        """Return the problem of the video track, or None: reads all time stamps, decodes the first picture."""
        n_streams = (len(container.streams.video), len(container.streams.audio))
        if n_streams != (1, int(self._duration is not None)):
            return [f"{n_streams[0]} video and {n_streams[1]} audio tracks"]
        stream, first, stamps = container.streams.video[0], None, []
        prepare_decoder(stream, limits)
        for packet in container.demux(stream):
            stamps += [packet.pts] if packet.size else []
            first = first or next(iter(decode(packet, "the output")), None)
        if first is None or first.pts != 0 or first.is_corrupt or None in stamps:
            return ["a damaged first picture"]
        problems, context = [], stream.codec_context
        if (first.width, first.height) != self._size or as_fraction(stream.sample_aspect_ratio) not in {None, 1}:
            problems.append(f"size {first.width}x{first.height}")
        if first.format.name != "yuv420p":
            problems.append(f"format {first.format.name}")
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        wanted = (self._colour.primaries, self._colour.transfer, self._colour.matrix_code, _LIMITED_RANGE)
        if tuple(map(int, tags)) != wanted:
            problems.append(f"colour tags {tuple(map(int, tags))}")
        return problems + self._clock_problems(sorted(stamps), stream)

    def _clock_problems(self, stamps: list[int], stream: Any) -> list[str]:
        """Return the problem of the time stamps (in units of the stream's time base, in order), or None."""
        if len(stamps) != self._n_frames:
            return [f"{len(stamps)} pictures instead of {self._n_frames}"]
        unit = as_fraction(stream.time_base) or Fraction(1)
        if any(abs(stamp * unit - index / self._rate) > _CLOCK_TOLERANCE for index, stamp in enumerate(stamps)):
            return ["time stamps"]
        if abs((stream.duration or 0) * unit - self._n_frames / self._rate) > 1 / self._rate:
            return [f"duration {float((stream.duration or 0) * unit):.3f} s"]
        return []


class _SoundTrack:
    """Decodes a sound file again and encodes it as AAC, up to an exact length, a little ahead of the picture."""

    def __init__(self, container: Any, path: Path, duration: Fraction, limits: MediaLimits) -> None:
        info = probe_audio(path, limits)
        self._rate = 44_100 if info.sample_rate == 44_100 else 48_000
        self._n_channels = 1 if info.channels == 1 else 2
        self._layout = "mono" if self._n_channels == 1 else "stereo"
        self._container = container
        self._stream = container.add_stream("aac", rate=self._rate)
        self._stream.codec_context.layout = self._layout
        self._stream.codec_context.bit_rate = _BIT_RATES[self._n_channels]
        self._stream.codec_context.time_base = self._stream.time_base = Fraction(1, self._rate)
        self._blocks: Iterator[NDArray[np.float32]] = read_audio_blocks(
            path, limits, rate=self._rate, n_channels=self._n_channels
        )
        self._waiting: NDArray[np.float32] = np.zeros((self._n_channels, 0), np.float32)
        self._n_total = math.ceil(duration * self._rate)
        self._n_encoded = 0

    def write_until(self, time: Fraction) -> None:
        """Encode whole frames of sound until `time` (s) is covered, or the sound ends."""
        wanted = min(math.ceil(time * self._rate), self._n_total)
        while self._n_encoded < wanted:
            count = min(_AAC_FRAME, self._n_total - self._n_encoded)
            self._encode(self._take(count))

    def finish(self) -> None:
        """Encode what is left and flush."""
        self.write_until(Fraction(self._n_total, self._rate))
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self.close()

    def close(self) -> None:
        """Close the sound file."""
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()

    def _take(self, count: int) -> NDArray[np.float32]:
        """The next `count` samples (channels, count); silence once the file has no more."""
        while self._waiting.shape[1] < count:
            block = next(self._blocks, None)
            if block is None:
                missing = np.zeros((self._n_channels, count - self._waiting.shape[1]), np.float32)
                block = missing
            self._waiting = np.concatenate([self._waiting, block], axis=1)
        taken, self._waiting = self._waiting[:, :count], self._waiting[:, count:]
        return taken

    def _encode(self, samples: NDArray[np.float32]) -> None:
        clipped = np.ascontiguousarray(np.clip(samples, -1.0, 1.0))
        frame = av.AudioFrame.from_ndarray(clipped, format="fltp", layout=self._layout)
        frame.sample_rate, frame.time_base = self._rate, Fraction(1, self._rate)
        frame.pts = self._n_encoded
        self._n_encoded += samples.shape[1]
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def write_picture(path: Path, planes: Planes, matrix: Matrix) -> None:
    """One picture as PNG or JPEG, by the name's suffix; the file appears whole or not at all.

    Raises EncodeError, also for another suffix, or DiskFullError.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise EncodeError(f"a picture is one of {', '.join(PICTURE_SUFFIXES)}, not {path.suffix or 'without a suffix'}")
    bgr = planes_to_bgr(planes, matrix)
    suffix = path.suffix.lower()
    # OpenCV prints a warning for a quality of a PNG.
    settings = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    _, data = cv2.imencode(suffix, bgr, settings)
    with encoder_errors(), replacing(path) as part:
        part.write_bytes(data.tobytes())


@contextmanager
def encoder_errors() -> Iterator[None]:
    """Turn what FFmpeg and the file system raise while writing into EncodeError or DiskFullError."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        # FFmpeg's classes are OSErrors too where the number is the system's; the text may contain the path.
        if is_disk_full(error):
            raise DiskFullError("the disk is full; the output could not be written") from None
        reason = error.strerror or type(error).__name__
        raise EncodeError(f"the output could not be encoded or written ({reason})", kind=type(error).__name__) from None
    except (ValueError, OverflowError) as error:
        # An encoder that this build lacks, or a value outside the range of its settings.
        raise EncodeError("the output cannot be encoded with these settings", kind=type(error).__name__) from error


def index_comes_first(path: Path) -> bool:
    """Whether an MP4's index (`moov`) precedes its data (`mdat`), so that it plays while it loads."""
    with path.open("rb") as file:
        while header := file.read(8):
            if len(header) < 8:
                return False
            size, kind = struct.unpack(">I4s", header)
            if kind == b"moov":
                return True
            if kind == b"mdat":
                return False
            if size == 1:
                size = struct.unpack(">Q", file.read(8))[0] - 8
            if size < 8:
                return False
            file.seek(size - 8, os.SEEK_CUR)
    return False
