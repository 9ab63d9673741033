"""Synthetic clips and sound: every picture carries its number as a bar code, every sound has events at known times.

The number is drawn as large luma blocks, so that it can be read back after lossy coding, scaling, turning and blending.
Knows nothing of the code under test but the picture planes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from musetalk.frames import Matrix, Planes, UInt8Array, bgr_to_planes, planes_to_bgr

# The code: two rows of eight blocks over the top quarter of the picture; 12 bits of number, 4 bits of check.
_COLUMNS, _ROWS, _N_BITS, _N_CHECK = 8, 2, 16, 4
MAX_NUMBER = 2 ** (_N_BITS - _N_CHECK)
_DARK, _LIGHT = 40, 210


def _code_word(number: int) -> int:
    check = (number ^ (number >> 4) ^ (number >> 8) ^ 0b1010) & 0xF
    return number << _N_CHECK | check


def _cells(width: int, height: int) -> Iterator[tuple[slice, slice]]:
    for cell in range(_N_BITS):
        row, column = divmod(cell, _COLUMNS)
        rows = slice(row * height // (4 * _ROWS), (row + 1) * height // (4 * _ROWS))
        yield rows, slice(column * width // _COLUMNS, (column + 1) * width // _COLUMNS)


def picture(number: int, width: int, height: int) -> UInt8Array:
    """The picture of frame `number` (0..4095) as BGR uint8 (height, width, 3): bar code, gradient, a moving disc."""
    if not 0 <= number < MAX_NUMBER:
        raise ValueError(f"frame numbers go from 0 to {MAX_NUMBER - 1}, not {number}")
    x = np.linspace(60, 190, width, dtype=np.float32)[None, :]
    y = np.linspace(0, 40, height, dtype=np.float32)[:, None]
    grey = x + y
    bgr = np.ascontiguousarray(np.stack([grey + 15, grey, grey - 20], axis=-1).clip(0, 255).astype(np.uint8))
    centre = (int(width * (0.2 + 0.6 * ((number * 7) % 100) / 100)), int(height * 0.65))
    cv2.circle(bgr, centre, max(2, height // 8), (40, 60, 200), -1)
    word = _code_word(number)
    for bit, (rows, columns) in enumerate(_cells(width, height)):
        bgr[rows, columns] = _LIGHT if word >> bit & 1 else _DARK
    return bgr


def picture_planes(number: int, width: int, height: int, matrix: Matrix = "bt601") -> Planes:
    """`picture` as limited-range planes; both sides must be even."""
    return bgr_to_planes(picture(number, width, height), matrix)


def read_number(luma: NDArray[Any]) -> int | None:
    """The frame number shown by a luma (or grey) picture (h, w); None when the code cannot be read."""
    height, width = luma.shape
    word = 0
    for bit, (rows, columns) in enumerate(_cells(width, height)):
        block = luma[rows, columns]
        inner = block[block.shape[0] // 4 : -(block.shape[0] // 4) or None, block.shape[1] // 4 :]
        inner = inner[:, : -(block.shape[1] // 4) or None]
        word |= int(inner.mean() > (_DARK + _LIGHT) / 2) << bit
    number = word >> _N_CHECK
    return number if _code_word(number) == word else None


# -- sound ------------------------------------------------------------------------------------------------------------


def tone(duration: float, rate: int = 48_000, frequency: float = 440.0, amplitude: float = 0.5) -> NDArray[np.float32]:
    """A sine, float32 (n,), n = round(duration * rate)."""
    samples: NDArray[np.float32] = (
        amplitude * np.sin(2 * np.pi * frequency * np.arange(round(duration * rate)) / rate)
    ).astype(np.float32)
    return samples


def clicks(
    duration: float, times: Sequence[float], rate: int = 48_000, *, width_s: float = 0.004, amplitude: float = 0.8
) -> NDArray[np.float32]:
    """Silence with a short burst (a raised-cosine pulse of 1 kHz) centred on each of `times` (s), float32 (n,)."""
    samples = np.zeros(round(duration * rate), np.float32)
    at = np.arange(len(samples)) / rate
    for time in times:
        offset = at - time
        window = np.where(np.abs(offset) < width_s / 2, 0.5 + 0.5 * np.cos(2 * np.pi * offset / width_s), 0)
        samples += (amplitude * window * np.cos(2 * np.pi * 1000 * offset)).astype(np.float32)
    return samples


def click_times(samples: NDArray[Any], rate: int, *, threshold: float = 0.3) -> list[float]:
    """Times (s) of the peaks of separate bursts in mono `samples` (n,)."""
    loud = np.flatnonzero(np.abs(samples) > threshold * max(float(np.abs(samples).max()), 1e-9))
    groups = np.split(loud, np.flatnonzero(np.diff(loud) > rate // 50) + 1) if len(loud) else []
    return [float(group[np.argmax(np.abs(samples[group]))]) / rate for group in groups]


@dataclass(frozen=True)
class Sound:
    """An audio track: float samples (n,) or (channels, n) and how they are coded."""

    samples: NDArray[Any]
    rate: int = 48_000
    codec: str = "aac"
    sample_format: str | None = None
    layout: str | None = None
    bit_rate: int | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def channels(self) -> NDArray[Any]:
        """The samples as (channels, n)."""
        return np.atleast_2d(self.samples)


_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_SAMPLE_BLOCK = 4096
_INTEGERS: dict[str, tuple[Any, float, float]] = {
    "u8": (np.uint8, 2.0**7, 2.0**7),
    "s16": (np.int16, 2.0**15, 0.0),
    "s32": (np.int32, 2.0**31, 0.0),
}


def _as_format(samples: NDArray[Any], sample_format: str) -> NDArray[Any]:
    """(channels, n) float samples in the numbers of a packed or planar FFmpeg sample format."""
    base = sample_format.removesuffix("p") if sample_format != "dblp" else "dbl"
    if base in {"flt", "dbl"}:
        return samples.astype(np.float32 if base == "flt" else np.float64)
    dtype, limit, offset = _INTEGERS[base]
    numbers: NDArray[Any] = np.clip(np.rint(samples.astype(np.float64) * limit), -limit, limit - 1) + offset
    return numbers.astype(dtype)


def _audio_frames(sound: Sound, sample_format: str, layout: str) -> Iterator[av.AudioFrame]:
    data = _as_format(sound.channels, sample_format)
    packed = not sample_format.endswith("p")
    for start in range(0, data.shape[1], _SAMPLE_BLOCK):
        block = data[:, start : start + _SAMPLE_BLOCK]
        block = block.T.reshape(1, -1) if packed else block
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=sample_format, layout=layout)
        frame.sample_rate = sound.rate
        frame.pts = start
        frame.time_base = Fraction(1, sound.rate)
        yield frame


def _add_audio(container: Any, sound: Sound) -> tuple[Any, Iterator[av.AudioFrame]]:
    layout = sound.layout or _LAYOUTS[sound.channels.shape[0]]
    codec = av.Codec(sound.codec, "w")
    formats = [form.name for form in codec.audio_formats or []]
    sample_format = sound.sample_format or (formats[0] if formats else "s16")
    stream = container.add_stream(sound.codec, rate=sound.rate)
    stream.codec_context.layout = layout
    stream.codec_context.format = sample_format
    if sound.bit_rate is not None:
        stream.codec_context.bit_rate = sound.bit_rate
    stream.options = dict(sound.options)
    source = sample_format if sample_format.removesuffix("p") in {"flt", "dbl", "u8", "s16", "s32"} else "flt"

    def frames() -> Iterator[av.AudioFrame]:
        stream.codec_context.open(strict=False)
        resampler = av.AudioResampler(
            format=sample_format, layout=layout, rate=sound.rate, frame_size=stream.codec_context.frame_size or None
        )
        for frame in _audio_frames(sound, source, layout):
            yield from resampler.resample(frame)
        yield from resampler.resample(None)

    return stream, frames()


def _write_audio(container: Any, stream: Any, frames: Iterator[av.AudioFrame]) -> None:
    for frame in frames:
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_sound(path: Path, sound: Sound, *, container_format: str | None = None, **container_options: str) -> Path:
    """Write one audio track to a file of its own; the container follows from the name."""
    with av.open(str(path), "w", format=container_format, options=container_options) as container:
        _write_audio(container, *_add_audio(container, sound))
    return path


# -- clips ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tags:
    """Colour tags as H.273 code points; `full_range` None leaves the range out of the file."""

    matrix: int = 2
    primaries: int = 2
    transfer: int = 2
    full_range: bool | None = None


_LOSSY_DEFAULTS = {
    "libx264": {"crf": "12", "preset": "ultrafast"},
    "libx265": {"crf": "12", "preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx-vp9": {"crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8"},
}


# Encoders that code pictures from others.
_BETWEEN_PICTURES = {"libx264", "libx265", "libvpx", "libvpx-vp9", "mpeg4", "mpeg2video", "mpeg1video", "flv"}


def write_clip(
    path: Path,
    n_frames: int = 25,
    *,
    size: tuple[int, int] = (160, 96),
    rate: Fraction = Fraction(25),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    draw: Callable[[int], av.VideoFrame] | None = None,
    timestamps: Iterable[Fraction] | None = None,
    last_duration: Fraction | None = None,
    time_base: Fraction | None = None,
    tags: Tags = Tags(),
    sample_aspect: Fraction | None = None,
    interlaced: bool = False,
    rotation: int = 0,
    mirrored: bool = False,
    gop: int = 12,
    b_frames: int = 0,
    options: dict[str, str] | None = None,
    sound: Sound | None = None,
    container_format: str | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a clip whose picture i shows number i (or what `draw(i)` returns) and return its path.

    `timestamps` are the times of the pictures in s (default i / rate), written in units of `time_base`.
    `rotation` is the number of degrees, counter-clockwise, by which a player turns the picture (MP4 and MOV only).
    """
    width, height = size
    time_base = time_base or (Fraction(1, 90_000) if timestamps is not None else 1 / rate)
    times = [Fraction(index) / rate for index in range(n_frames)] if timestamps is None else list(timestamps)
    draw = draw or (lambda index: drawn_frame(index, width, height, pixel_format, tags))
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        _set_up_video(stream, size, pixel_format, time_base, tags, sample_aspect)
        if codec in _BETWEEN_PICTURES:
            stream.codec_context.gop_size = gop
            stream.codec_context.max_b_frames = b_frames
        extra = {"flags": "+ildct+ilme", "x264-params": "tff=1"} if interlaced else {}
        # A fixed quantiser ("qp": "0" loses nothing) does not go together with a rate factor.
        defaults = {} if "qp" in (options or {}) else _LOSSY_DEFAULTS.get(codec, {})
        stream.options = {**defaults, **extra, **(options or {})}
        if sound is not None:
            _write_audio(container, *_add_audio(container, sound))
        durations: dict[int, int] = {}
        for index, time in enumerate(times):
            frame = draw(index)
            frame.pts = round(time / time_base)
            frame.time_base = time_base
            following = times[index + 1] if index + 1 < len(times) else time + (last_duration or 1 / rate)
            durations[frame.pts] = round(following / time_base) - frame.pts
            _mux(container, stream.encode(frame), time_base, durations)
        _mux(container, stream.encode(None), time_base, durations)
    if rotation or mirrored:
        turn(path, rotation, mirrored=mirrored)
    return path


def _set_up_video(
    stream: Any,
    size: tuple[int, int],
    pixel_format: str,
    time_base: Fraction,
    tags: Tags,
    sample_aspect: Fraction | None,
) -> None:
    stream.width, stream.height = size
    stream.pix_fmt = pixel_format
    context = stream.codec_context
    context.time_base = time_base
    context.thread_count = 1
    context.colorspace, context.color_primaries, context.color_trc = tags.matrix, tags.primaries, tags.transfer
    if tags.full_range is not None:
        context.color_range = 2 if tags.full_range else 1
    if sample_aspect is not None:
        context.sample_aspect_ratio = sample_aspect


def _mux(container: Any, packets: Iterable[Any], time_base: Fraction, durations: dict[int, int]) -> None:
    """Write packets with the duration of the picture they hold: encoders only know the nominal one."""
    for packet in packets:
        if packet.pts in durations and packet.time_base == time_base:
            packet.duration = durations[packet.pts]
        container.mux(packet)


def drawn_frame(index: int, width: int, height: int, pixel_format: str = "yuv420p", tags: Tags = Tags()) -> Any:
    """Picture `index` as a frame of `pixel_format`, coded with the matrix and range that `tags` name."""
    matrix: Matrix = "bt709" if tags.matrix == 1 else "bt601"
    even_w, even_h = width + width % 2, height + height % 2
    drawn = np.asarray(cv2.resize(picture(index, width, height), (even_w, even_h)), np.uint8)
    planes = bgr_to_planes(drawn, matrix)
    if tags.full_range:
        planes = full_range(planes)
    frame: Any = planes_frame(planes, width, height)
    if pixel_format in {"bgra", "rgba", "rgb24", "bgr24", "bgr0", "gbrp", "pal8", "rgb8", "rgba64le"}:
        source = av.VideoFrame.from_ndarray(picture(index, width, height), format="bgr24")
        frame = source if pixel_format == "bgr24" else source.reformat(format=pixel_format)
    elif pixel_format not in {"yuv420p", "yuvj420p"}:
        frame = frame.reformat(format=pixel_format, interpolation="POINT")
    frame.colorspace, frame.color_primaries, frame.color_trc = tags.matrix, tags.primaries, tags.transfer
    frame.color_range = {None: 0, False: 1, True: 2}[tags.full_range]
    return frame


def planes_frame(planes: Planes, width: int | None = None, height: int | None = None) -> Any:
    """Planes as a yuv420p frame of `width` x `height` px (may be one less than the planes: odd sizes)."""
    width, height = width or planes.width, height or planes.height
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane, values in zip(frame.planes, (planes.y, planes.u, planes.v), strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = values[: plane.height, : plane.width]
        plane.update(rows.tobytes())
    return frame


def full_range(planes: Planes) -> Planes:
    """Limited-range planes stretched to the full range (rounded)."""

    def stretched(values: UInt8Array, low: float, span: float, centre: float, full: float) -> UInt8Array:
        result: UInt8Array = np.clip(np.rint((values - low) * (full / span) + centre), 0, 255).astype(np.uint8)
        return result

    return Planes(
        stretched(planes.y, 16.0, 219.0, 0.0, 255.0),
        stretched(planes.u, 128.0, 224.0, 128.0, 255.0),
        stretched(planes.v, 128.0, 224.0, 128.0, 255.0),
    )


# -- editing a written file -------------------------------------------------------------------------------------------

_TURNS = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}


def turn(path: Path, degrees: int, *, mirrored: bool = False) -> None:
    """Write a display matrix into the MP4's first video track: turned counter-clockwise by 0, 90, 180 or 270 degrees.

    `mirrored` flips the picture left to right before turning it.
    """
    data = bytearray(path.read_bytes())
    a, b, c, d = _TURNS[degrees % 360]
    if mirrored:
        a, b = -a, -b
    at = data.find(b"tkhd")
    if at < 0:
        raise ValueError("no track header: not an MP4 file")
    # version 0: 4 (name) + 4 (version, flags) + 20 (times, id, duration) + 16; version 1 has three 64-bit fields.
    start = at + 4 + 4 + (32 if data[at + 4] == 1 else 20) + 16
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def damage(path: Path, n_bytes: int, *, seed: int = 1, start: float = 0.05, end: float = 1.0) -> None:
    """Overwrite `n_bytes` random bytes of the media data between the shares `start` and `end` of the file."""
    data = bytearray(path.read_bytes())
    at = data.find(b"mdat")
    first = max(at + 8, int(len(data) * start))
    last = data.find(b"moov", at) if data.find(b"moov", at) > 0 else len(data)
    positions = np.random.default_rng(seed).integers(first, min(last - 8, int(len(data) * end)), n_bytes)
    for position in positions:
        data[position] ^= 0x5A
    path.write_bytes(data)


def cut(path: Path, share: float) -> None:
    """Keep only the first `share` of the file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


# -- reading without the code under test ------------------------------------------------------------------------------


def decode_numbers(path: Path) -> list[int | None]:
    """The numbers shown by all pictures of a clip, in order of presentation, read with PyAV alone."""
    with av.open(str(path)) as container:
        return [read_number(frame.to_ndarray(format="gray")) for frame in container.decode(video=0)]


def decode_luma(path: Path) -> list[UInt8Array]:
    """The first planes (h, w) of all pictures of a clip of 8-bit planes, as the decoder gives them."""
    with av.open(str(path)) as container:
        planes = ((frame.planes[0], frame.width) for frame in container.decode(video=0))
        return [
            np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:, :width].copy()
            for plane, width in planes
        ]


def luma_psnr(first: Planes, second: Planes) -> float:
    """Peak signal-to-noise ratio of the two luma planes, dB (infinite when equal)."""
    error = float(np.mean((first.y.astype(np.float64) - second.y) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


__all__ = [
    "MAX_NUMBER",
    "Sound",
    "Tags",
    "click_times",
    "clicks",
    "cut",
    "damage",
    "decode_luma",
    "decode_numbers",
    "drawn_frame",
    "full_range",
    "luma_psnr",
    "picture",
    "picture_planes",
    "planes_frame",
    "planes_to_bgr",
    "read_number",
    "tone",
    "turn",
    "write_clip",
    "write_sound",
]
