"""A first look at a source: what it is, and its first picture decoded. Runs in the process that reads files."""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error

from musetalk.errors import MediaError
from musetalk.media.cadence import measured_cadence, steady_rate
from musetalk.media.converting import applied_aspect, display_size, frame_colour, orientation
from musetalk.media.headers import avi_duration, claimed_share, joined_parts
from musetalk.media.limits import MediaLimits, SourceInfo
from musetalk.media.opening import decode, open_container, packets, picture_format, prepare_decoder, video_stream
from musetalk.media.sound import is_missing
from musetalk.media.stills import inspect_picture
from musetalk.media.timing import (
    PacketStamp,
    PacketTimes,
    as_fraction,
    n_ticks,
    nominal_rate,
    output_rate,
    packet_times,
)

# Dolby Vision without a base picture: plain decoders show it green and violet.
_DOLBY_VISION_TAGS = {"dvh1", "dvhe", "dva1", "dvav"}
# The packets of a file this long are looked at; beyond, its time stamps are believed.
_MAX_PACKETS = 1_000_000
_SCAN_S = 5.0
# Containers whose length is a guess of FFmpeg's, or read from their last packets.
_UNDECLARED = {"mpegts", "mpeg"}
# A beat that a file declares is believed up to here; browsers declare 1000 pictures a second.
_MAX_BELIEVED_RATE = 240


@dataclass(frozen=True)
class _Scan:
    """What all packets say: the times of the pictures (None: too many), and where the last of any track ends (s)."""

    times: PacketTimes | None
    stamps: list[PacketStamp]
    end: Fraction | None
    breaks_off: bool


def inspect_source(path: Path, limits: MediaLimits) -> SourceInfo:
    """Describe a source and decode its first picture, in this process; see `probe_source`."""
    form = picture_format(path)
    if form is not None:
        return inspect_picture(path, form, limits)
    with open_container(path, limits) as container:
        stream = video_stream(container)
        context = stream.codec_context
        if context.width and context.height:
            limits.check_size(context.width, context.height)
        if context.codec_tag in _DOLBY_VISION_TAGS and context.color_trc in {0, 2}:
            raise MediaError("the source is Dolby Vision video, which is not supported; send it as SDR")
        decoder = prepare_decoder(stream, limits)
        frame, scan = _first_frame(container, stream, decoder)
        return _describe(path, container, stream, frame, scan, limits)


def _first_frame(container: Any, stream: Any, decoder: Any) -> tuple[Any, _Scan]:
    """The first picture that can be decoded, and what the time stamps of all packets say."""
    first: Any = None
    stamps: list[PacketStamp] = []
    ends: list[Fraction] = []
    breaks: list[None] = []
    deadline = time.monotonic() + _SCAN_S
    # Where the pictures' track declares no length of its own, the length is that of the longest track.
    wanted = stream if stream.duration else tuple(container.streams)
    for packet in packets(container, wanted, lambda: breaks.append(None)):
        is_picture = packet.stream.index == stream.index
        if first is None and is_picture:
            first = next(iter(_decoded(packet, decoder)), None)
        elif first is not None and (len(stamps) >= _MAX_PACKETS or time.monotonic() > deadline):
            return first, _Scan(None, [], None, breaks_off=False)
        if packet.size and is_picture and not packet.is_discard:
            stamps.append(PacketStamp(packet.pts, packet.dts, packet.duration or 0))
        unit = as_fraction(packet.time_base)
        if packet.size and packet.pts is not None and unit:
            ends.append((packet.pts + (packet.duration or 0)) * unit)
    if first is None:
        raise MediaError("the source contains no picture that can be decoded")
    times = packet_times(stamps, as_fraction(stream.time_base))
    return first, _Scan(times, stamps, max(ends, default=None), breaks_off=bool(breaks))


def _decoded(packet: Any, decoder: Any) -> list[Any]:
    try:
        return decode(packet, decoder=decoder)
    except (av.error.MemoryError, av.error.DecoderNotFoundError, av.error.ArgumentError):
        raise
    except av.error.FFmpegError:
        return []


def _describe(path: Path, container: Any, stream: Any, frame: Any, scan: _Scan, limits: MediaLimits) -> SourceInfo:
    limits.check_size(frame.width, frame.height)
    context, times = stream.codec_context, scan.times
    aspect = applied_aspect(as_fraction(stream.sample_aspect_ratio))
    rotation, mirrored = orientation(frame)
    width, height = display_size(frame.width, frame.height, aspect)
    limits.check_size(width, height)
    # AVI counts pictures in the order of the file and says nothing about their order of presentation.
    is_unordered = container.format.name == "avi" and context.has_b_frames
    trusts = (times is None or times.is_sound) and not is_unordered
    source_rate, is_steady = _source_rate(stream, scan, trusts=trusts)
    rate = output_rate(source_rate, limits)
    duration = None
    if times is not None:
        duration = times.duration if trusts and times.duration else times.n_pictures / source_rate
    return SourceInfo(
        kind="video",
        width=height if rotation % 180 else width,
        height=width if rotation % 180 else height,
        rate=rate,
        n_frames=None if duration is None else n_ticks(duration, rate),
        duration=duration,
        colour=frame_colour(frame).colour,
        rotation=rotation,
        mirrored=mirrored,
        pixel_aspect=aspect,
        interlaced=bool(frame.interlaced_frame),
        codec=context.name,
        container=container.format.name,
        source_rate=source_rate,
        trusts_timestamps=trusts,
        clock_grain=as_fraction(stream.time_base) or SourceInfo.clock_grain,
        is_steady=is_steady,
        warnings=_losses(path, container, stream, scan, duration) or _films_behind(path, duration, limits),
    )


def _source_rate(stream: Any, scan: _Scan, *, trusts: bool) -> tuple[Fraction, bool]:
    """The pictures a second of the source, and whether they follow a beat under the jitter of their stamps."""
    average = None if scan.times is None else scan.times.average_rate
    declared = [
        as_fraction(rate)
        for rate in (stream.guessed_rate, stream.base_rate, stream.average_rate, stream.codec_context.framerate)
    ]
    unit = as_fraction(stream.time_base)
    if trusts and unit is not None:
        times = sorted(float(stamp.pts * unit) for stamp in scan.stamps if stamp.pts is not None)
        cadence = measured_cadence(times)
        if cadence is not None:
            return steady_rate(cadence, map(_as_nominal, declared)), True
    believed = [rate for rate in declared if rate is not None and rate <= _MAX_BELIEVED_RATE]
    return nominal_rate([*believed, average, *declared]), False


def _as_nominal(rate: Fraction | None) -> Fraction | None:
    return None if rate is None else nominal_rate([rate])


def _losses(path: Path, container: Any, stream: Any, scan: _Scan, found: Fraction | None) -> tuple[str, ...]:
    """A sentence when the source contains less than its header promises."""
    unit = as_fraction(stream.time_base)
    if stream.duration and unit:
        promised: Fraction | None = int(stream.duration) * unit
    else:
        promised, found = Fraction(container.duration or 0, av.time_base), scan.end
    if set(container.format.name.split(",")) & _UNDECLARED:
        promised = None
    share = claimed_share(path, (0, path.stat().st_size))
    if share > 1 and found is not None:
        promised = found * Fraction(share)
    promised = avi_duration(path) or promised
    if promised and found is not None and is_missing(promised, found):
        return (
            f"the source is incomplete: its header promises {float(promised):.2f} s, {float(found):.2f} s are there",
        )
    if scan.breaks_off:
        return (f"the source breaks off after {float(found or 0):.2f} s: its end is missing or damaged",)
    return ()


def _films_behind(path: Path, found: Fraction | None, limits: MediaLimits) -> tuple[str, ...]:
    """A sentence when other films were joined to this one: FFmpeg plays the first alone and says nothing."""
    parts = joined_parts(path)
    if len(parts) == 1 or found is None:
        return ()
    total = Fraction(0)
    for span in parts:
        try:
            with open_container(path, limits, span=span) as container:
                total += Fraction(container.duration or 0, av.time_base)
        except MediaError:
            # What is behind the film may be damaged; the film is not.
            continue
    if not is_missing(total, found):
        return ()
    return (
        f"the source is {len(parts)} files joined in one: only the first {float(found):.2f} s are used; "
        f"{float(total):.2f} s are there",
    )
