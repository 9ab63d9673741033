"""Audio files to samples: the mono waveform the model hears, and blocks at any rate for the track of the output.

Both read the same decoded samples, so what is heard and what the lips follow agree to the sample. Decoding streams:
memory does not grow with the file, and a file longer than allowed is left where the limit is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np

from musetalk.errors import MediaError
from musetalk.media.headers import claimed_share, joined_parts
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
from musetalk.media.sound_clock import TOLERANCE_S, Block, Corrections, on_clock
from musetalk.media.sound_frames import Float32Array, as_float, float_frame
from musetalk.media.sound_mix import Mixer
from musetalk.media.timing import as_fraction

OnWarning = Callable[[str], None]

WAVEFORM_RATE = 16_000
WHAT = "the audio"

# A long filter: 7 kHz passes untouched, 8.4 kHz is 97 dB down; FFmpeg's default lets -22 dB of it alias into speech.
_RESAMPLER = "filter_size=128:phase_shift=10:cutoff=0.95"
# Encoders pad the last frame; more than this is not padding but a wrong header.
_MAX_PADDING_S = Fraction(1, 4)
# Decoders round, so a file of exactly the allowed length may become a little longer.
_LENGTH_TOLERANCE_S = 0.1
# The highest rate that any recorder has; a header of 48 MHz would cost gigabytes.
MAX_RATE = 768_000
MAX_CHANNELS = 64
_LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
# Containers whose clock begins with the file: sound that begins later was recorded later.
_ZERO_BASED = {"mov", "mp4", "matroska", "webm", "flv", "avi", "asf"}
# A later start belongs to a recording that was cut out of a longer one.
_MAX_LATE_S = Fraction(30)
# Containers that say nothing about their length; FFmpeg guesses it from the first packets or reads the last ones.
_UNDECLARED = {"mp3", "aac", "ac3", "eac3", "mpegts", "mpeg", "ogg", "amr", "loas"}
# Writers of WAV that cannot go back leave the largest size of one sign or the other.
_PLACEHOLDER_BYTES = 0x7FFF0000
# A missing end is reported from this length on, or from this share of what was promised.
MISSING_S, MISSING_SHARE = Fraction(1, 4), Fraction(2, 100)


def inspect_audio(path: Path, limits: MediaLimits) -> AudioInfo:
    """Describe the audio track of `path` and decode its beginning, in this process; see `probe_audio`."""
    _refuse_pictures(path)
    with open_container(path, limits, WHAT) as container:
        stream = audio_stream(container, WHAT)
        _check_rate(stream.codec_context.sample_rate or 0)
        duration = _declared_duration(container, stream)
        block = next(_decoded(container, stream, limits, _Health(limits)), None)
        if block is None:
            raise MediaError(f"{WHAT} contains no sound that can be decoded")
        return AudioInfo(duration, block.rate, block.samples.shape[0], stream.codec_context.name, container.format.name)


def joined_waveform(blocks: Iterable[Float32Array], limits: MediaLimits) -> Float32Array:
    """Mono blocks (1, n) at 16 kHz as one waveform (n,); raises MediaError outside the allowed lengths."""
    parts = [block[0] for block in blocks]
    waveform = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    duration = len(waveform) / WAVEFORM_RATE
    if duration < limits.min_audio_s:
        raise MediaError(
            f"{WHAT} lasts {duration:.3f} s; at least {limits.min_audio_s:g} s are needed", duration_s=duration
        )
    if duration > limits.max_audio_s + _LENGTH_TOLERANCE_S:
        raise _too_long(limits)
    return waveform


def read_audio_blocks(
    path: Path,
    limits: MediaLimits,
    *,
    rate: int,
    n_channels: int,
    on_warning: OnWarning = lambda _: None,
) -> Iterator[Float32Array]:
    """The sound in blocks of float32 (n_channels, n), n > 0, at `rate` Hz, full scale 1; 1 or 2 channels.

    Mono is the plain mean of all channels, unless they cancel each other; more than two become stereo by the usual
    weights. The number of samples is ceil(duration * rate). A generator: closing it closes the file. `on_warning` gets
    a sentence for each hole, overlap or missing end. Raises MediaError for what cannot be decoded, and when it is
    longer than allowed; knows no shortest length.
    """
    _refuse_pictures(path)
    blocks = _limited(_all_parts(path, limits, on_warning), limits)
    yield from _resampled(blocks, rate, n_channels, on_warning)


def _all_parts(path: Path, limits: MediaLimits, on_warning: OnWarning) -> Iterator[Block]:
    """The blocks of the file, or of all files that were joined in it, on their clocks."""
    parts = joined_parts(path)
    health, played, promised = _Health(limits), Fraction(0), list[Fraction | None]()
    for span in parts:
        length = Fraction(0)
        try:
            for block in _part(path, None if len(parts) == 1 else span, limits, health, promised, on_warning):
                length += block.duration
                yield block
        except MediaError:
            if not played:
                raise
            # What was played before stays; the rest is a part whose head is cut or damaged.
            health.break_off()
            break
        finally:
            played += length
        share = claimed_share(path, span)
        if share > 1:
            # FFmpeg's length is that of the bytes that are there, but for ASF, where it is a guess.
            there = promised[-1]
            is_near = there is not None and abs(there - length) < MISSING_S
            promised[-1] = (there if there is not None and is_near else length) * Fraction(share)
    health.check()
    total = None if None in promised else sum(filter(None, promised), Fraction(0))
    for warning in health.warnings(total, played):
        on_warning(warning)


def _part(
    path: Path,
    span: tuple[int, int] | None,
    limits: MediaLimits,
    health: _Health,
    promised: list[Fraction | None],
    on_warning: OnWarning,
) -> Iterator[Block]:
    """The blocks of one file; appends its promised length (s) to `promised`."""
    with open_container(path, limits, WHAT, span=span) as container:
        stream = audio_stream(container, WHAT)
        promised.append(_promised(container, stream))
        decoded = _decoded(container, stream, limits, health)
        trimmed = _without_padding(decoded, _trusted_duration(container, stream))
        yield from _on_clock(trimmed, container, stream, on_warning)


def _on_clock(blocks: Iterator[Block], container: Any, stream: Any, on_warning: OnWarning) -> Iterator[Block]:
    """The blocks at their times; warns of what was changed for that."""
    first = next(blocks, None)
    if first is None:
        return
    done = Corrections()
    late = _late_start(container, stream, first.time)
    yield from on_clock(chain([first], blocks), late, done)
    if late > MISSING_S:
        on_warning(f"{WHAT} begins {float(late):.2f} s after the start of its file: silence was added")
    for warning in done.warnings(WHAT):
        on_warning(warning)


def _late_start(container: Any, stream: Any, first: Fraction | None) -> Fraction:
    """Silence (s) before the first sample: what a player shows between the start of the file and its sound."""
    if first is None:
        return Fraction(0)
    if set(container.format.name.split(",")) & _ZERO_BASED:
        start = Fraction(0)
    else:
        # Where the clock begins anywhere, the earliest other track is the start.
        starts = [_start(other) for other in container.streams if other.index != stream.index]
        start = min((time for time in starts if time is not None), default=first)
    late = first - start
    return late if TOLERANCE_S < late <= _MAX_LATE_S else Fraction(0)


def _start(stream: Any) -> Fraction | None:
    unit = as_fraction(stream.time_base)
    if stream.type not in {"audio", "video"} or stream.start_time is None or unit is None:
        return None
    return int(stream.start_time) * unit


def _refuse_pictures(path: Path) -> None:
    if picture_format(path, WHAT) is not None:
        raise MediaError(f"{WHAT} is a picture")


def _declared_duration(container: Any, stream: Any) -> Fraction | None:
    unit = as_fraction(stream.time_base)
    if stream.duration and unit:
        return int(stream.duration) * unit
    return Fraction(container.duration, av.time_base) if container.duration else None


def _promised(container: Any, stream: Any) -> Fraction | None:
    """The length (s) that the header promises for this track; None where it promises none."""
    names = set(container.format.name.split(","))
    if names & _UNDECLARED:
        return None
    if not stream.duration and len(container.streams) > 1:
        # The container's length is that of its longest track.
        return None
    declared = _declared_duration(container, stream)
    n_bytes_a_second = (stream.codec_context.bit_rate or 0) / 8
    if declared is None or declared * n_bytes_a_second >= _PLACEHOLDER_BYTES:
        return None
    return declared


def _trusted_duration(container: Any, stream: Any) -> Fraction | None:
    """The declared length (s) where the container counts samples (the MP4 family); elsewhere it is an estimate."""
    unit = as_fraction(stream.time_base)
    if "mp4" in container.format.name.split(",") and stream.duration and unit:
        return int(stream.duration) * unit
    return None


class _Health:
    """Counts the packets of sound and those that cannot be decoded."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self._n_packets = self._n_bad = 0
        self._breaks_off = False

    def count(self, *, is_bad: bool = False) -> None:
        """Count one packet, or the failure of one that was counted."""
        if is_bad:
            self._n_bad += 1
        else:
            self._n_packets += 1

    def break_off(self) -> None:
        """Note that the container ended in the middle."""
        self._breaks_off = True

    def check(self) -> None:
        """Raise MediaError when more packets are damaged than allowed."""
        # The last packet of a cut file is often incomplete, and a tag between packets can look like one.
        if self._n_bad > max(2, self._limits.max_corrupt_share * self._n_packets):
            raise MediaError(
                f"{WHAT} is damaged: {self._n_bad} of {self._n_packets} packets cannot be decoded", corrupt=self._n_bad
            )

    def warnings(self, promised: Fraction | None, played: Fraction) -> Iterator[str]:
        """Sentences for what is missing of the `promised` length, in seconds."""
        if promised is not None and is_missing(promised, played):
            yield (
                f"{WHAT} is incomplete: its header promises {float(promised):.2f} s, "
                f"{float(played):.2f} s could be decoded"
            )
        elif self._breaks_off:
            yield f"{WHAT} breaks off: {float(played):.2f} s could be decoded, its end is missing or damaged"
        if self._n_bad > 1:
            yield f"{WHAT} is damaged: {self._n_bad} of {self._n_packets} packets could not be decoded"


def is_missing(promised: Fraction, found: Fraction) -> bool:
    """Whether so much of a promised length (s) was not found that its owner should know."""
    missing = promised - found
    return missing > MISSING_S or (missing > MISSING_SHARE * promised and missing > Fraction(5, 100))


def _decoded(container: Any, stream: Any, limits: MediaLimits, health: _Health) -> Iterator[Block]:
    """The decoded frames in the order of the file; a packet that cannot be decoded is left out and counted."""
    prepare_decoder(stream, limits)
    for packet in packets(container, stream, health.break_off):
        health.count()
        try:
            frames = decode(packet, WHAT)
        except (av.error.MemoryError, av.error.DecoderNotFoundError):
            raise
        except (av.error.FFmpegError, UnicodeDecodeError):
            health.count(is_bad=True)
            continue
        for frame in frames:
            if frame.samples and frame.sample_rate:
                _check_form(frame)
                unit = as_fraction(frame.time_base)
                time = None if frame.pts is None or unit is None else frame.pts * unit
                yield Block(as_float(frame), frame.sample_rate, time)


def _check_rate(rate: int) -> None:
    if rate > MAX_RATE:
        raise MediaError(f"{WHAT} has {rate} samples a second; at most {MAX_RATE} are allowed", sample_rate=rate)


def _check_form(frame: Any) -> None:
    _check_rate(frame.sample_rate)
    if frame.layout.nb_channels > MAX_CHANNELS:
        raise MediaError(f"{WHAT} has {frame.layout.nb_channels} channels; at most {MAX_CHANNELS} are allowed")


def _without_padding(blocks: Iterator[Block], duration: Fraction | None) -> Iterator[Block]:
    """The blocks up to `duration` (s), when what follows is short enough to be an encoder's padding; else all."""
    n_seen, held = 0, list[Block]()
    for block in blocks:
        n = block.samples.shape[1]
        declared = None if duration is None else round(duration * block.rate)
        if declared is None or n_seen + n <= declared:
            yield block
        else:
            n_kept = max(0, declared - n_seen)
            if n_kept:
                yield replace(block, samples=block.samples[:, :n_kept])
            time = None if block.time is None else block.time + Fraction(n_kept, block.rate)
            held.append(Block(block.samples[:, n_kept:], block.rate, time))
            if n_seen + n - declared > _MAX_PADDING_S * block.rate:
                yield from held
                held, duration = [], None
        n_seen += n


def _limited(blocks: Iterator[Block], limits: MediaLimits) -> Iterator[Block]:
    """The blocks; raises MediaError one second after the longest allowed duration."""
    seconds = 0.0
    for block in blocks:
        seconds += block.samples.shape[1] / block.rate
        if seconds > limits.max_audio_s + 1:
            raise _too_long(limits)
        yield block


def _too_long(limits: MediaLimits) -> MediaError:
    return MediaError(f"{WHAT} is longer than the {limits.max_audio_s:g} s allowed", limit_s=limits.max_audio_s)


def _resampled(
    blocks: Iterator[Block], rate: int, n_channels: int, on_warning: OnWarning = lambda _: None
) -> Iterator[Float32Array]:
    """The blocks with `n_channels` channels at `rate` Hz; a stream may change its own rate and layout on the way."""
    resampler: _Resampler | None = None
    form: tuple[int, int] | None = None
    mixer = Mixer()
    for block in blocks:
        # There is no usual way from more than eight channels to two.
        keeps_channels = n_channels == 2 and len(block.samples) in _LAYOUTS
        mixed = block.samples if keeps_channels else mixer.mono(block.samples)
        if form != (mixed.shape[0], block.rate):
            if resampler is not None:
                yield from resampler.finish()
            form = (mixed.shape[0], block.rate)
            resampler = _Resampler(mixed.shape[0], block.rate, n_channels, rate)
        assert resampler is not None
        yield from resampler.resample(mixed)
    if resampler is not None:
        yield from resampler.finish()
    if mixer.was_needed:
        on_warning(f"the channels of {WHAT} cancel each other; for the mouth their signs were made equal")


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
            f"sample_rate={self._source_rate}:sample_fmt=flt:channel_layout={self._layout}"
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
        frame = float_frame(samples, self._source_rate, self._layout)
        frame.pts = self._n_in
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
