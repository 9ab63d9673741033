"""A first look at an input, in a short-lived process of its own with limits on time and memory.

A decoder that crashes, hangs or eats memory on a hostile file ends that process, not the one with the models
(docs/media.md#opening-files).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av.error

from musetalk import errors
from musetalk.errors import MediaError, ProcessingError
from musetalk.media import probe_child
from musetalk.media.converting import applied_aspect, display_size, frame_colour, orientation
from musetalk.media.limits import AudioInfo, MediaLimits, SourceInfo, audio_from_json, source_from_json
from musetalk.media.opening import decode, open_container, packets, picture_format, prepare_decoder, video_stream
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

_WHAT = {"source": "the source", "audio": "the audio"}
# Signals by which a decoder dies; anything else came from outside and says nothing about the file.
_OUTSIDE_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# Dolby Vision without a base picture: plain decoders show it green and violet.
_DOLBY_VISION_TAGS = {"dvh1", "dvhe", "dva1", "dvav"}
# The packets of a file this long are looked at; beyond, its time stamps are believed.
_MAX_PACKETS = 1_000_000
_SCAN_S = 5.0
# What the process needs to find its libraries; nothing of the worker's settings or credentials.
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "LANG", "LC_ALL")


def probe_source(path: Path, limits: MediaLimits) -> SourceInfo:
    """Describe a video, animation or still and decode its first picture, in a limited process.

    Raises MediaError for what is not supported, outside the limits, cannot be decoded or crashes the decoder,
    ProcessingError when the process could not do its work for reasons of the machine.
    """
    plain = _ask("source", path, limits)
    try:
        return source_from_json(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise ProcessingError("the probing process gave no usable answer") from error


def probe_audio(path: Path, limits: MediaLimits) -> AudioInfo:
    """Describe the audio track of any media file and decode its beginning; see `probe_source`."""
    plain = _ask("audio", path, limits)
    try:
        return audio_from_json(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise ProcessingError("the probing process gave no usable answer") from error


def probe_both(source: Path, audio: Path, limits: MediaLimits) -> tuple[SourceInfo, AudioInfo]:
    """`probe_source` and `probe_audio` at once, as most of a look is the start of its process.

    Raises as they do; the source's error comes first.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="probe") as pool:
        sound = pool.submit(probe_audio, audio, limits)
        return probe_source(source, limits), sound.result()


def _ask(kind: Literal["source", "audio"], path: Path, limits: MediaLimits) -> dict[str, Any]:
    plain = {name: str(value) if isinstance(value, Fraction) else value for name, value in asdict(limits).items()}
    # An isolated interpreter knows its own packages only, so the paths of ours and of PYTHONPATH are passed on.
    root = str(Path(__file__).resolve().parents[2])
    sys_path = [root, *(os.path.abspath(entry) for entry in sys.path if entry)]
    request = {"kind": kind, "path": os.path.abspath(path), "limits": plain, "sys_path": sys_path}
    answer, status = _run_child(json.dumps(request), limits.probe_wall_s, kind)
    if status < 0:
        raise _crashed(-status, kind)
    try:
        parsed: dict[str, Any] = json.loads(answer)
    except ValueError:
        raise ProcessingError(f"the process that probes media ended with status {status}") from None
    if "info" in parsed:
        return dict(parsed["info"])
    error = getattr(errors, parsed["error"])
    raise error(parsed["message"], retryable=parsed["retryable"], **parsed["details"])


def _run_child(request: str, wall_s: float, kind: str) -> tuple[str, int]:
    """Standard output and exit status of the probing process (negative: the signal that ended it)."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    try:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and file, no shell
            [sys.executable, "-I", "-B", probe_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=os.sep,
            # One thread: more would only reserve address space.
            env={**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            text=True,
            # A signal to the worker's group is the worker's to handle.
            start_new_session=True,
        )
    except OSError as error:
        raise ProcessingError(f"the process that probes media cannot be started: {error.strerror}") from None
    with process:
        try:
            answer, _ = process.communicate(request, timeout=wall_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise MediaError(f"{_WHAT[kind]} could not be read within {wall_s:g} s") from None
        except BaseException:
            process.kill()
            raise
    return answer, process.returncode


def _crashed(number: int, kind: str) -> Exception:
    if number in _OUTSIDE_SIGNALS:
        return ProcessingError("the process that probes media was stopped from outside")
    if number == getattr(signal, "SIGXCPU", None):
        return MediaError(f"{_WHAT[kind]} takes too much time to read")
    return MediaError(f"{_WHAT[kind]} cannot be decoded: it crashes the decoder", signal=number)


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
        prepare_decoder(stream, limits)
        frame, times = _first_frame(container, stream)
        return _describe(container, stream, frame, times, limits)


def _first_frame(container: Any, stream: Any) -> tuple[Any, PacketTimes | None]:
    """The first picture that can be decoded, and what the time stamps of all packets say (None: too many of them)."""
    first: Any = None
    stamps: list[PacketStamp] = []
    deadline = time.monotonic() + _SCAN_S
    for packet in packets(container, stream):
        if first is None:
            first = next(iter(_decoded(packet)), None)
        elif len(stamps) >= _MAX_PACKETS or time.monotonic() > deadline:
            return first, None
        if packet.size and not packet.is_discard:
            stamps.append(PacketStamp(packet.pts, packet.dts, packet.duration or 0))
    if first is None:
        raise MediaError("the source contains no picture that can be decoded")
    return first, packet_times(stamps, as_fraction(stream.time_base))


def _decoded(packet: Any) -> list[Any]:
    try:
        return decode(packet)
    except (av.error.MemoryError, av.error.DecoderNotFoundError, av.error.ArgumentError):
        raise
    except av.error.FFmpegError:
        return []


def _describe(container: Any, stream: Any, frame: Any, times: PacketTimes | None, limits: MediaLimits) -> SourceInfo:
    limits.check_size(frame.width, frame.height)
    context = stream.codec_context
    aspect = applied_aspect(as_fraction(stream.sample_aspect_ratio))
    rotation, mirrored = orientation(frame)
    width, height = display_size(frame.width, frame.height, aspect)
    limits.check_size(width, height)
    average = None if times is None else times.average_rate
    declared = (stream.guessed_rate, stream.base_rate, stream.average_rate, context.framerate)
    source_rate = nominal_rate([*map(as_fraction, declared), average])
    rate = output_rate(source_rate, limits)
    # AVI counts pictures in the order of the file and says nothing about their order of presentation.
    is_unordered = container.format.name == "avi" and context.has_b_frames
    trusts = (times is None or times.is_sound) and not is_unordered
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
    )
