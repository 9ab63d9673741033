"""Size and crop of the output from a job's `aspect_ratio` and `resolution`, in whole numbers (spec media.md 3.2).

The crop is fixed for the clip and never cuts the face: where a picture of the wanted shape cannot hold it, black is
added.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from errors import RequestError
from musetalk.geometry import Box

MIN_SIDE, MAX_SIDE = 128, 3840
MAX_UPSCALE = 2
# Room kept on each side of the face, as a share of its width or height.
FACE_MARGIN = Fraction(1, 4)
# Two aspects that differ by less are taken for the same.
_SAME_ASPECT = Fraction(1, 100)
# A crop thinner than this shows no face.
_MIN_CROP = 64


@dataclass(frozen=True)
class OutputPlan:
    """Which part of the frame is shown (even edges; may leave the frame, black there) and at which size (even)."""

    crop: Box
    width: int
    height: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resolution:
    """A parsed `resolution`: the short side, or both sides exactly; in px."""

    short_side: int | None = None
    size: tuple[int, int] | None = None


def parse_aspect_ratio(text: str | None) -> Fraction | None:
    """Width by height of `a:b`; None for an absent, empty or `source` value. Raises RequestError for anything else."""
    if text is None or text in ("", "source"):
        return None
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text, re.ASCII)
    if match:
        width, height = int(match[1]), int(match[2])
        if 1 <= width <= 100 and 1 <= height <= 100:
            return Fraction(width, height)
    raise RequestError("aspect_ratio must be a:b with whole numbers from 1 to 100, or source", field="aspect_ratio")


def parse_resolution(text: str | None) -> Resolution | None:
    """`Np` (short side) or `WxH`; None when absent, empty or `source`. Raises RequestError for anything else."""
    if text is None or text in ("", "source"):
        return None
    if match := re.fullmatch(r"([0-9]{1,5})p", text, re.ASCII):
        return Resolution(short_side=_side(int(match[1])))
    if match := re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text, re.ASCII):
        return Resolution(size=(_side(int(match[1])), _side(int(match[2]))))
    raise RequestError("resolution must be like 720p or 512x512, or source", field="resolution")


def _side(value: int) -> int:
    if not MIN_SIDE <= value <= MAX_SIDE or value % 2:
        raise RequestError(
            f"resolution: each side must be an even number from {MIN_SIDE} to {MAX_SIDE}, not {value}",
            field="resolution",
        )
    return value


def plan_output(
    width: int, height: int, face: Box | None, aspect_ratio: str | None, resolution: str | None
) -> OutputPlan:
    """What to show of a `width` x `height` px frame (both even) around `face`, and how large.

    Raises RequestError that names the field for a malformed value, a shape no face fits in, or more than double size.
    """
    aspect, wanted = parse_aspect_ratio(aspect_ratio), parse_resolution(resolution)
    warnings: tuple[str, ...] = ()
    if wanted is not None and wanted.size is not None:
        exact = Fraction(*wanted.size)
        if aspect is not None and abs(exact / aspect - 1) > _SAME_ASPECT:
            warnings = (f"resolution {resolution} and aspect_ratio {aspect_ratio} differ; the resolution is used",)
        aspect = exact
    crop = Box(0, 0, width, height) if aspect is None else _crop(width, height, face, aspect)
    if min(crop.width, crop.height) < _MIN_CROP <= min(width, height):
        raise RequestError(
            f"aspect_ratio leaves only {crop.width}x{crop.height} px of the {width}x{height} picture",
            field="aspect_ratio" if aspect_ratio else "resolution",
        )
    out_width, out_height = _size(crop, aspect, wanted)
    if out_width > MAX_UPSCALE * crop.width or out_height > MAX_UPSCALE * crop.height:
        raise RequestError(
            f"resolution asks for {out_width}x{out_height} px of a {crop.width}x{crop.height} picture; "
            f"at most {MAX_UPSCALE} times the size is made",
            field="resolution",
        )
    return OutputPlan(crop, out_width, out_height, warnings)


def _crop(width: int, height: int, face: Box | None, aspect: Fraction) -> Box:
    """The largest window of this aspect inside the frame, placed around the face, or larger where the face needs it."""
    if abs(Fraction(width, height) / aspect - 1) <= Fraction(1, max(width, height)):
        return Box(0, 0, width, height)
    needed = _needed(width, height, face)
    window_height = min(Fraction(height), width / aspect)
    window_height = max(window_height, Fraction(needed.height), needed.width / aspect)
    crop_width = max(_even(window_height * aspect), needed.width)
    crop_height = max(_even(window_height), needed.height)
    x0 = _placed(crop_width, width, needed.x0, needed.x1)
    y0 = _placed(crop_height, height, needed.y0, needed.y1)
    return Box(x0, y0, x0 + crop_width, y0 + crop_height)


def _needed(width: int, height: int, face: Box | None) -> Box:
    """The face and its margin inside the frame, with even edges; the frame's middle when there is no face."""
    if face is None:
        x, y = width // 4 * 2, height // 4 * 2
        return Box(x, y, x, y)
    margin_x, margin_y = math.ceil(face.width * FACE_MARGIN), math.ceil(face.height * FACE_MARGIN)
    grown = Box(face.x0 - margin_x, face.y0 - margin_y, face.x1 + margin_x, face.y1 + margin_y)
    return grown.clipped(width, height).evened()


def _placed(window: int, length: int, low: int, high: int) -> int:
    """Even start of a window over 0..length that holds low..high: centred on it, inside the frame where it fits."""
    start = (low + high - window) // 4 * 2
    if window > length:
        # Black on both sides alike.
        start = (length - window) // 4 * 2
        return max(min(start, low), high - window)
    return max(0, min(start, length - window, low), high - window)


def _size(crop: Box, aspect: Fraction | None, wanted: Resolution | None) -> tuple[int, int]:
    if wanted is not None and wanted.size is not None:
        return wanted.size
    shape = Fraction(crop.width, crop.height) if aspect is None or wanted is None else aspect
    if wanted is not None and wanted.short_side is not None:
        side = wanted.short_side
        width, height = (_even(side * shape), side) if shape >= 1 else (side, _even(side / shape))
    else:
        width, height = crop.width, crop.height
    longest = max(width, height)
    if longest > MAX_SIDE:
        if wanted is not None:
            raise RequestError(f"resolution gives a picture {longest} px long; at most {MAX_SIDE}", field="resolution")
        width, height = _even(Fraction(width * MAX_SIDE, longest)), _even(Fraction(height * MAX_SIDE, longest))
    return width, height


def _even(value: Fraction | int) -> int:
    """The nearest even number, at least 2."""
    return max(2, round(value / 2) * 2)
