"""Audio files to samples: the mono waveform the model hears, and blocks at any rate for the track of the output.

Both read the same decoded samples, so what is heard and what the lips follow agree to the sample. Decoding streams:
memory does not grow with the file, and a file longer than allowed is left where the limit is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from musetalk.errors import MediaError
from musetalk.media.limits import AudioInfo, MediaLimits
from musetalk.media.opening import (
    audio_stream,
    decode,
    ffmpeg_errors,
    open_container,
    packets,
    picture_format,
    prepare_decoder,
)
from musetalk.media.timing import as_fraction

Float32Array = NDArray[np.float32]

WAVEFORM_RATE = 16_000
WHAT = "the audio"

# A long filter: 7 kHz passes untouched, 8.4 kHz is 97 dB down; FFmpeg's default lets -22 dB of it alias into speech.
_RESAMPLER = "filter_size=128:phase_shift=10:cutoff=0.95"
# Values beyond this are no sound (a float file may contain anything); 18 dB above full scale allows overshoot.
_MAX_SAMPLE = 8.0
# Encoders pad the last frame; more than this is not padding but a wrong header.
_MAX_PADDING_S = Fraction(1, 4)
# Decoders round, so a file of exactly the allowed length may become a little longer.
_LENGTH_TOLERANCE_S = 0.1
_LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
# numpy type, middle and full scale of FFmpeg's sample formats, without the mark of planar ones.
_SAMPLE_FORMATS: dict[str, tuple[Any, float, float]] = {
    "u8": (np.uint8, 128.0, 2.0**7),
    "s16": (np.int16, 0.0, 2.0**15),
    "s32": (np.int32, 0.0, 2.0**31),
    "s64": (np.int64, 0.0, 2.0**63),
    "flt": (np.float32, 0.0, 1.0),
    "dbl": (np.float64, 0.0, 1.0),
}


def inspect_audio(path: Path, limits: MediaLimits) -> AudioInfo:
    """Describe the audio track of `path` and decode its beginning, in this process; see `probe_audio`."""
    _refuse_pictures(path)
    with open_container(path, limits, WHAT) as container:
        stream = audio_stream(container, WHAT)
        duration = _declared_duration(container, stream)
        block = next(_decoded(container, stream, limits), None)
        if block is None:
            raise MediaError(f"{WHAT} contains no sound that can be decoded")
        samples, rate = block
        return AudioInfo(duration, rate, samples.shape[0], stream.codec_context.name, container.format.name)


def read_waveform(path: Path, info: AudioInfo, limits: MediaLimits) -> Float32Array:  # noqa: ARG001 - see below
    """The whole track as mono float32 (n,) at 16 kHz, full scale 1; channels count equally.

    Specified in docs/model.md#sound-to-waveform. Its length is that of the decoded sound, not the header's; `info` says
    that the file was probed. Raises MediaError when it is shorter or longer than allowed, or when too much of it cannot
    be decoded.
    """
    blocks = [block[0] for block in read_audio_blocks(path, limits, rate=WAVEFORM_RATE, n_channels=1)]
    waveform = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    duration = len(waveform) / WAVEFORM_RATE
    if duration < limits.min_audio_s:
        raise MediaError(
            f"{WHAT} lasts {duration:.3f} s; at least {limits.min_audio_s:g} s are needed", duration_s=duration
        )
    if duration > limits.max_audio_s + _LENGTH_TOLERANCE_S:
        raise _too_long(limits)
    return waveform


def read_audio_blocks(path: Path, limits: MediaLimits, *, rate: int, n_channels: int) -> Iterator[Float32Array]:
    """The same sound in blocks of float32 (n_channels, n), n > 0, at `rate` Hz, full scale 1; 1 or 2 channels.

    Mono is the plain mean of all channels; more than two become stereo by the usual weights. The number of samples is
    ceil(duration * rate). A generator: closing it closes the file. Raises MediaError like `read_waveform`, but knows no
    shortest length.
    """
    _refuse_pictures(path)
    with open_container(path, limits, WHAT) as container:
        stream = audio_stream(container, WHAT)
        decoded = _without_padding(_decoded(container, stream, limits), _trusted_duration(container, stream))
        yield from _resampled(_limited(decoded, limits), rate, n_channels)


def _refuse_pictures(path: Path) -> None:
    if picture_format(path, WHAT) is not None:
        raise MediaError(f"{WHAT} is a picture")


def _declared_duration(container: Any, stream: Any) -> Fraction | None:
    unit = as_fraction(stream.time_base)
    if stream.duration and unit:
        return int(stream.duration) * unit
    return Fraction(container.duration, av.time_base) if container.duration else None


def _trusted_duration(container: Any, stream: Any) -> Fraction | None:
    """The declared length (s) where the container counts samples (the MP4 family); elsewhere it is an estimate."""
    unit = as_fraction(stream.time_base)
    if "mp4" in container.format.name.split(",") and stream.duration and unit:
        return int(stream.duration) * unit
    return None


def _decoded(container: Any, stream: Any, limits: MediaLimits) -> Iterator[tuple[Float32Array, int]]:
    """Blocks of (samples float32 (channels, n), rate in Hz) in the order of the file.

    A packet that cannot be decoded is left out; raises MediaError when they are more than the allowed share.
    """
    prepare_decoder(stream, limits)
    n_packets = n_bad = 0
    for packet in packets(container, stream):
        n_packets += 1
        try:
            frames = decode(packet, WHAT)
        except (av.error.MemoryError, av.error.DecoderNotFoundError):
            raise
        except (av.error.FFmpegError, UnicodeDecodeError):
            n_bad += 1
            continue
        for frame in frames:
            if frame.samples and frame.sample_rate:
                yield _as_float(frame), frame.sample_rate
    # The last packet of a cut file is often incomplete, and a tag between packets can look like one.
    if n_bad > max(2, limits.max_corrupt_share * n_packets):
        raise MediaError(f"{WHAT} is damaged: {n_bad} of {n_packets} packets cannot be decoded", corrupt=n_bad)


def _as_float(frame: Any) -> Float32Array:
    """The samples of a decoded frame as float32 (channels, n) of full scale 1, without NaN or infinity."""
    name, n_channels = frame.format.name, frame.layout.nb_channels
    planar = frame.format.is_planar
    dtype, middle, scale = _SAMPLE_FORMATS[name.removesuffix("p") if planar else name]
    count = frame.samples * (1 if planar else n_channels)
    planes = np.stack([np.frombuffer(plane, dtype, count) for plane in frame.planes])
    channels = planes if planar else planes.reshape(-1, n_channels).T
    if dtype is np.float32:
        samples = channels.astype(np.float32)
    else:
        samples = ((channels.astype(np.float64) - middle) / scale).astype(np.float32)
    return np.clip(np.nan_to_num(samples, copy=False, nan=0.0, posinf=0.0, neginf=0.0), -_MAX_SAMPLE, _MAX_SAMPLE)


def _without_padding(
    blocks: Iterator[tuple[Float32Array, int]], duration: Fraction | None
) -> Iterator[tuple[Float32Array, int]]:
    """The blocks up to `duration` (s), when what follows is short enough to be an encoder's padding; else all."""
    n_seen, held = 0, []
    for samples, rate in blocks:
        declared = None if duration is None else round(duration * rate)
        if declared is None or n_seen + samples.shape[1] <= declared:
            yield samples, rate
        else:
            n_kept = max(0, declared - n_seen)
            if n_kept:
                yield samples[:, :n_kept], rate
            held.append((samples[:, n_kept:], rate))
            if n_seen + samples.shape[1] - declared > _MAX_PADDING_S * rate:
                yield from held
                held, duration = [], None
        n_seen += samples.shape[1]


def _limited(blocks: Iterator[tuple[Float32Array, int]], limits: MediaLimits) -> Iterator[tuple[Float32Array, int]]:
    """The blocks; raises MediaError one second after the longest allowed duration."""
    seconds = 0.0
    for samples, rate in blocks:
        seconds += samples.shape[1] / rate
        if seconds > limits.max_audio_s + 1:
            raise _too_long(limits)
        yield samples, rate


def _too_long(limits: MediaLimits) -> MediaError:
    return MediaError(f"{WHAT} is longer than the {limits.max_audio_s:g} s allowed", limit_s=limits.max_audio_s)


def _resampled(blocks: Iterator[tuple[Float32Array, int]], rate: int, n_channels: int) -> Iterator[Float32Array]:
    """The blocks with `n_channels` channels at `rate` Hz; a stream may change its own rate and layout on the way."""
    resampler: _Resampler | None = None
    form: tuple[int, int] | None = None
    for samples, source_rate in blocks:
        # There is no usual way from more than eight channels to two.
        mixed = samples if n_channels == 2 and len(samples) in _LAYOUTS else samples.mean(axis=0, keepdims=True)
        if form != (mixed.shape[0], source_rate):
            if resampler is not None:
                yield from resampler.finish()
            form = (mixed.shape[0], source_rate)
            resampler = _Resampler(mixed.shape[0], source_rate, n_channels, rate)
        assert resampler is not None
        yield from resampler.resample(mixed)
    if resampler is not None:
        yield from resampler.finish()


class _Resampler:
    """Float blocks of one rate and layout to another; gives ceil(n * rate / source_rate) samples for n."""

    def __init__(self, source_channels: int, source_rate: int, n_channels: int, rate: int) -> None:
        self._layout, self._source_rate, self._rate = _LAYOUTS[source_channels], source_rate, rate
        self._n_channels = n_channels
        self._n_in = self._n_out = 0
        self._is_identity = source_channels == n_channels and source_rate == rate
        self._graph = None if self._is_identity else self._build(_LAYOUTS[n_channels])

    def _build(self, layout: str) -> av.filter.Graph:
        graph = av.filter.Graph()
        source = graph.add(
            "abuffer",
            f"sample_rate={self._source_rate}:sample_fmt=fltp:channel_layout={self._layout}"
            f":time_base=1/{self._source_rate}",
        )
        resample = graph.add("aresample", f"{self._rate}:{_RESAMPLER}")
        form = graph.add("aformat", f"sample_fmts=fltp:sample_rates={self._rate}:channel_layouts={layout}")
        sink = graph.add("abuffersink")
        graph.link_nodes(source, resample, form, sink).configure()
        return graph

    def resample(self, samples: Float32Array) -> Iterator[Float32Array]:
        """Push `samples` (source channels, n) and return the resampled ones that are ready."""
        if self._graph is None:
            yield samples
            return
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=self._layout)
        frame.sample_rate, frame.time_base, frame.pts = self._source_rate, Fraction(1, self._source_rate), self._n_in
        self._n_in += samples.shape[1]
        self._graph.push(frame)
        yield from self._pull()

    def finish(self) -> Iterator[Float32Array]:
        """Return the remaining samples (channels, n), cut or filled with silence to the exact length."""
        if self._graph is None:
            return
        self._graph.push(None)
        yield from self._pull()
        missing = self._due() - self._n_out
        if missing > 0:
            yield np.zeros((self._n_channels, missing), np.float32)

    def _due(self) -> int:
        return -(-self._n_in * self._rate // self._source_rate)

    def _pull(self) -> Iterator[Float32Array]:
        assert self._graph is not None
        with ffmpeg_errors(WHAT):
            while True:
                try:
                    frame: Any = self._graph.pull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    return
                n_kept = min(frame.samples, self._due() - self._n_out)
                if n_kept > 0:
                    self._n_out += n_kept
                    yield frame.to_ndarray()[:, :n_kept]
