"""The pictures of a source, one for each tick of the output's rate, in memory that does not grow with its length."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av.error

from musetalk.errors import MediaError
from musetalk.frames import Planes
from musetalk.media.cadence import on_beat
from musetalk.media.converting import WHITE, Background, Deinterlacer, FrameConverter
from musetalk.media.limits import MediaLimits, SourceInfo
from musetalk.media.opening import decode, open_container, packets, picture_format, prepare_decoder, video_stream
from musetalk.media.stills import read_animation, read_still
from musetalk.media.timing import Clock, Timed, as_fraction, on_grid, tolerance

Loader = Callable[[], Planes]


@dataclass(frozen=True)
class SourceFrame:
    """The picture of the output at tick `index` (0, 1, ...), i.e. at index / rate seconds.

    A repeat shares the memory of the tick before, so code that writes into planes must copy them first.
    """

    index: int
    planes: Planes
    is_repeat: bool


def read_source(
    path: Path,
    info: SourceInfo,
    limits: MediaLimits,
    *,
    max_frames: int | None = None,
    background: Background = WHITE,
    on_warning: Callable[[str], None] = lambda _: None,
) -> Generator[SourceFrame, None, None]:
    """The first `max_frames` frames (default: all) of the probed source; a still gives one.

    Closing the generator closes the file. A cut file gives the frames that it contains. Raises MediaError when nothing
    can be decoded, when more pictures than the allowed share are damaged, or when it is longer than allowed.
    What is transparent shows `background` (RGB). `on_warning` gets a sentence when some are damaged.
    """
    form = picture_format(path)
    if form is not None and info.kind == "still":
        yield SourceFrame(0, read_still(path, form, info, limits, background), is_repeat=False)
        return
    health = _Health(limits)
    if form is not None:
        timed = read_animation(path, form, info, limits, background)
    else:
        timed = _video(path, info, limits, health, background)
    if info.is_steady:
        timed = on_beat(timed, info.source_rate)
    planes: Planes | None = None
    late = tolerance(info.rate, info.source_rate, info.clock_grain)
    for tick, load, is_repeat in on_grid(timed, info.rate, late):
        if tick == max_frames:
            break
        if tick == limits.max_frames:
            raise MediaError(f"the source has more than the {limits.max_frames} frames allowed")
        if planes is None or not is_repeat:
            planes = load()
        yield SourceFrame(tick, planes, is_repeat)
    if planes is None and max_frames != 0:
        raise MediaError("the source contains no picture that can be decoded")
    health.check()
    for warning in health.warnings():
        on_warning(warning)


class _Health:
    """Counts decoded and damaged pictures of one source."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self.n_pictures = self.n_corrupt = 0

    def count(self, *, is_corrupt: bool) -> None:
        """Count one picture; raises MediaError when a source has more of them than any output can use."""
        self.n_pictures += 1
        self.n_corrupt += is_corrupt
        if self.n_pictures > self._limits.max_decoded_frames:
            raise MediaError(f"the source has more than {self._limits.max_decoded_frames} pictures")

    def check(self) -> None:
        """Raise MediaError when too many pictures are damaged; one may be: the last of a file that was cut."""
        if self.n_corrupt > max(1, self._limits.max_corrupt_share * self.n_pictures):
            raise MediaError(
                f"the source is damaged: {self.n_corrupt} of {self.n_pictures} pictures cannot be decoded correctly",
                corrupt=self.n_corrupt,
                pictures=self.n_pictures,
            )

    def warnings(self) -> Iterator[str]:
        """A sentence when pictures are damaged, but so few that the source is used."""
        if self.n_corrupt:
            yield (
                f"the source is damaged: {self.n_corrupt} of {self.n_pictures} pictures could not be decoded correctly"
            )


def _video(
    path: Path, info: SourceInfo, limits: MediaLimits, health: _Health, background: Background
) -> Iterator[Timed[Loader]]:
    """The pictures of a video with their times, deinterlaced where they have two fields; converted on access."""
    converter = FrameConverter(info, limits, background)
    with open_container(path, limits) as container:
        stream = video_stream(container)
        decoder = prepare_decoder(stream, limits)
        clock = Clock(info.source_rate, as_fraction(stream.time_base), trusts_timestamps=info.trusts_timestamps)
        deinterlacer: Deinterlacer | None = None
        waiting: dict[int, Timed[None]] = {}
        for number, frame in enumerate(decoded_frames(container, stream, decoder, health.count)):
            time = Timed(*clock.stamp(frame.pts, getattr(frame, "duration", None)), None)
            if deinterlacer is None and frame.interlaced_frame:
                deinterlacer = Deinterlacer()
            if deinterlacer is None:
                yield Timed(time.time, time.duration, partial(converter.planes, frame))
                continue
            waiting[number] = time
            yield from _loaders(deinterlacer.push(frame, number), waiting, converter)
        if deinterlacer is not None:
            yield from _loaders(deinterlacer.finish(), waiting, converter)


def _loaders(
    frames: Iterator[tuple[int, Any]], waiting: dict[int, Timed[None]], converter: FrameConverter
) -> Iterator[Timed[Loader]]:
    for number, frame in frames:
        time = waiting.pop(number)
        yield Timed(time.time, time.duration, partial(converter.planes, frame))


def decoded_frames(container: Any, stream: Any, decoder: Any, count: Callable[..., None]) -> Iterator[Any]:
    """All frames of `stream` in order of presentation; calls `count(is_corrupt=...)` for each and for each lost one.

    A packet that cannot be decoded loses its picture only; a container that breaks off ends the stream.
    """
    for packet in packets(container, stream):
        try:
            frames = decode(packet, decoder=decoder)
        except (av.error.MemoryError, av.error.DecoderNotFoundError, av.error.ArgumentError):
            # The last is what the pixel limit ends with.
            raise
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            count(is_corrupt=True)
            continue
        for frame in frames:
            count(is_corrupt=frame.is_corrupt)
            yield frame
