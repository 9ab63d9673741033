"""Limits of accepted input, and the description of a probed input. Opens nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

from musetalk.errors import MediaError
from musetalk.frames import BT709, Colour


@dataclass(frozen=True)
class MediaLimits:
    """Bounds on the inputs of one job (docs/media.md#media-limits); everything outside is a MediaError.

    Sides and pixels are checked for the coded and for the displayed picture. Faster sources than `max_rate` are
    resampled to at most `resampled_rate`, slower ones than `min_rate` raised to `raised_rate`, so neither is refused.
    """

    min_side: int = 64  # px, of the longer side
    max_side: int = 4096  # px, of the longer side
    max_pixels: int = 9_500_000
    # Larger stills up to here are scaled down; a phone's largest has 50 million.
    max_still_pixels: int = 60_000_000
    min_rate: Fraction = Fraction(10)
    raised_rate: Fraction = Fraction(25)
    max_rate: Fraction = Fraction(60)
    resampled_rate: Fraction = Fraction(30)
    max_frames: int = 27_000
    # Pictures decoded for one job: a source of 1000 frames a second costs 33 for each one shown.
    max_decoded_frames: int = 240_000
    min_audio_s: float = 0.1
    max_audio_s: float = 900.0
    max_corrupt_share: float = 0.05
    open_timeout_s: float = 5.0
    read_timeout_s: float = 5.0
    probe_wall_s: float = 20.0
    probe_cpu_s: int = 15
    probe_memory_bytes: int = 2 * 2**30  # address space of the process that takes a first look
    stall_s: float = 30.0  # between two pictures or blocks of sound
    max_animation_s: float = 60.0  # to decode all pictures of an animation
    reading_memory_bytes: int = 4 * 2**30  # address space of the process that decodes
    decoder_threads: int = 2

    def check_size(self, width: int, height: int, what: str = "the source") -> None:
        """Raise MediaError unless a picture of `width` x `height` px may be decoded."""
        longer, shorter = max(width, height), min(width, height)
        if longer > self.max_side or width * height > self.max_pixels:
            raise MediaError(
                f"{what} is {width}x{height} px; at most {self.max_side} px a side"
                f" and {self.max_pixels / 1e6:.1f} million pixels are allowed",
                width=width,
                height=height,
            )
        if longer < self.min_side or shorter < 2:
            raise MediaError(
                f"{what} is {width}x{height} px; its longer side must have at least {self.min_side} px",
                width=width,
                height=height,
            )

    def check_still_size(self, width: int, height: int, what: str = "the source") -> None:
        """Raise MediaError unless a still of `width` x `height` px may be decoded and scaled down."""
        if width * height > self.max_still_pixels:
            raise MediaError(
                f"{what} is a picture of {width}x{height} px; at most {self.max_still_pixels / 1e6:.0f} million pixels "
                "are allowed",
                width=width,
                height=height,
            )
        # Long and thin ones would have no pixels left.
        self.check_size(*self.fitting_size(width, height), what)

    def fitting_size(self, width: int, height: int) -> tuple[int, int]:
        """The size itself, or the largest with the same shape and even sides that is allowed."""
        share = min(1.0, self.max_side / max(width, height), math.sqrt(self.max_pixels / (width * height)))
        if share == 1.0:
            return width, height
        return max(2, int(width * share) // 2 * 2), max(2, int(height * share) // 2 * 2)

    def to_json(self) -> dict[str, Any]:
        """The limits as JSON values: fractions as "a/b"."""
        return {name: str(value) if isinstance(value, Fraction) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> MediaLimits:
        """The limits that `to_json` described."""
        rates = {name: Fraction(plain[name]) for name in ("min_rate", "raised_rate", "max_rate", "resampled_rate")}
        return cls(**{**plain, **rates})


@dataclass(frozen=True)
class SourceInfo:
    """A probed source, described as its frames are decoded: upright, square pixels, even sides, limited range."""

    kind: Literal["video", "still"]
    width: int
    height: int
    rate: Fraction  # of the output, frames per second
    n_frames: int | None = None  # estimate, in ticks of `rate`
    duration: Fraction | None = None  # s
    colour: Colour = BT709
    rotation: int = 0  # degrees counter-clockwise from the coded to the displayed picture: 0, 90, 180, 270
    mirrored: bool = False  # flipped left to right before it is turned
    pixel_aspect: Fraction = Fraction(1)  # width of a coded pixel by its height, as applied
    interlaced: bool = False
    codec: str = ""
    container: str = ""
    source_rate: Fraction = Fraction(25)  # nominal rate of the file
    trusts_timestamps: bool = True  # False: picture i of the file is shown at i / source_rate
    clock_grain: Fraction = Fraction(1, 1000)  # unit of the file's time stamps, s
    is_steady: bool = False  # its pictures follow a beat of `source_rate` under the jitter of their stamps
    warnings: tuple[str, ...] = ()  # sentences for its owner

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height (px) before the picture is turned."""
        return (self.height, self.width) if self.rotation % 180 else (self.width, self.height)


@dataclass(frozen=True)
class AudioInfo:
    """A probed audio track; `duration` (s) is what the file declares, which may be wrong."""

    duration: Fraction | None
    sample_rate: int
    channels: int
    codec: str = ""
    container: str = ""


def to_json(info: SourceInfo | AudioInfo) -> dict[str, Any]:
    """The description as JSON values: fractions as "a/b", the colour as its fields."""
    plain: dict[str, Any] = {}
    for name, value in vars(info).items():
        if isinstance(value, Fraction):
            plain[name] = str(value)
        elif isinstance(value, Colour):
            plain[name] = [value.matrix, value.primaries, value.transfer, value.matrix_code]
        else:
            plain[name] = value
    return plain


def source_from_json(plain: dict[str, Any]) -> SourceInfo:
    """The SourceInfo that `to_json` described; raises KeyError, TypeError or ValueError for anything else."""
    values = dict(plain)
    for name in ("rate", "pixel_aspect", "source_rate", "clock_grain"):
        values[name] = Fraction(values[name])
    values["duration"] = None if values["duration"] is None else Fraction(values["duration"])
    values["colour"] = Colour(*values["colour"])
    values["warnings"] = tuple(values["warnings"])
    return SourceInfo(**values)


def audio_from_json(plain: dict[str, Any]) -> AudioInfo:
    """The AudioInfo that `to_json` described; raises KeyError, TypeError or ValueError for anything else."""
    duration = plain["duration"]
    return AudioInfo(**{**plain, "duration": None if duration is None else Fraction(duration)})
