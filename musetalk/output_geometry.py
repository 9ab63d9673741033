"""Size and crop of the output from a job's `aspect_ratio` and `resolution`, in whole numbers.

Specified in docs/media.md#output-size. The crop is fixed for the clip and never cuts the face: if the
requested shape is too small for it, black is added.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from musetalk.errors import RequestError
from musetalk.geometry import Box

MIN_SIDE, MAX_SIDE = 128, 3840
MAX_UPSCALE = 2
# Room kept on each side of the face, as a share of its width or height.
FACE_MARGIN = Fraction(1, 4)
# Two aspects that differ by less count as equal.
_SAME_ASPECT = Fraction(1, 100)
# Where less than this is left of a picture, or shown of it beside the black, no face can be seen (px).
_MIN_SHOWN = 64
# Largest distance of an even number from the exact one (px).
_ROUNDING = 1


@dataclass(frozen=True)
class OutputPlan:
    """Visible part of the frame (even edges; black outside the frame) and output size (even)."""

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


def parse_request(aspect_ratio: str | None, resolution: str | None) -> tuple[Fraction | None, Resolution | None]:
    """Both fields of a request, before any source is known; None keeps the source's.

    Raises RequestError that names the field for a malformed value, and for a size that no source could give.
    """
    aspect, wanted = parse_aspect_ratio(aspect_ratio), parse_resolution(resolution)
    if aspect is not None and wanted is not None and wanted.short_side is not None:
        _from_short_side(wanted.short_side, aspect)
    return aspect, wanted


def plan_output(
    width: int, height: int, face: Box | None, aspect_ratio: str | None, resolution: str | None
) -> OutputPlan:
    """Choose crop and size for a `width` x `height` px frame (both even) around `face`.

    Raises RequestError that names the field for a malformed value, a shape that leaves too little of the picture, or
    more than double size; ValueError for a frame that is not even.
    """
    if min(width, height) < 2 or width % 2 or height % 2:
        raise ValueError(f"a frame of {width}x{height} px has no even size")
    aspect, wanted = parse_request(aspect_ratio, resolution)
    field, warnings = "aspect_ratio", []
    if wanted is not None and wanted.size is not None:
        exact = Fraction(*wanted.size)
        if aspect is not None and abs(exact / aspect - 1) > _SAME_ASPECT:
            warnings.append(f"resolution {resolution} and aspect_ratio {aspect_ratio} differ; the resolution is used")
        aspect, field = exact, "resolution"
    crop = Box(0, 0, width, height) if aspect is None else _crop(width, height, face, aspect)
    plan = OutputPlan(crop, *_size(crop, aspect, wanted), tuple(warnings))
    _refuse_unusable(plan, width, height, field)
    return plan


def _refuse_unusable(plan: OutputPlan, width: int, height: int, field: str) -> None:
    """Raise RequestError for too much enlargement, or a shape (asked for by `field`) that shows too little."""
    crop, size = plan.crop, (plan.width, plan.height)
    # The longer side follows from the shorter one, and both sides of both sizes were rounded.
    short, long = MAX_UPSCALE * min(crop.width, crop.height), MAX_UPSCALE * max(crop.width, crop.height)
    if min(size) > short or max(size) > long + 2 * _ROUNDING:
        raise RequestError(
            f"resolution asks for {plan.width}x{plan.height} px of a {crop.width}x{crop.height} picture; "
            f"at most {MAX_UPSCALE} times the size is made",
            field="resolution",
        )
    shown = crop.clipped(width, height)
    drawn = (shown.width * plan.width // crop.width, shown.height * plan.height // crop.height)
    if min(shown.width, shown.height, *drawn) < _MIN_SHOWN <= min(width, height):
        raise RequestError(
            f"{field} leaves only {shown.width}x{shown.height} px of the {width}x{height} picture, "
            f"drawn {drawn[0]}x{drawn[1]} px large",
            field=field,
        )


def _crop(width: int, height: int, face: Box | None, aspect: Fraction) -> Box:
    """The largest window of this aspect inside the frame, placed around the face, or larger where the face needs it."""
    if abs(width - height * aspect) <= _ROUNDING or abs(height - width / aspect) <= _ROUNDING:
        return Box(0, 0, width, height)
    needed = _needed(width, height, face)
    window_height = min(Fraction(height), width / aspect)
    window_height = max(window_height, Fraction(needed.height), needed.width / aspect)
    # One of the two is an even side of the frame or of the face, the other is rounded.
    crop_width, crop_height = _even(window_height * aspect), _even(window_height)
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
    """Even start of a window over 0..length that contains low..high: centred on it, inside the frame if it fits."""
    start = (low + high - window) // 4 * 2
    if window > length:
        # Black on both sides alike.
        start = (length - window) // 4 * 2
        return max(min(start, low), high - window)
    return max(0, min(start, length - window, low), high - window)


def _size(crop: Box, aspect: Fraction | None, wanted: Resolution | None) -> tuple[int, int]:
    """Width and height (px) of the output."""
    if wanted is not None and wanted.size is not None:
        return wanted.size
    shape = aspect or Fraction(crop.width, crop.height)
    if wanted is not None and wanted.short_side is not None:
        return _from_short_side(wanted.short_side, shape)
    if aspect is None or max(crop.width, crop.height) <= MAX_SIDE:
        return crop.width, crop.height
    return (MAX_SIDE, _even(MAX_SIDE / shape)) if shape >= 1 else (_even(MAX_SIDE * shape), MAX_SIDE)


def _from_short_side(side: int, shape: Fraction) -> tuple[int, int]:
    """Width and height (px) of a picture of this shape; raises RequestError when the longer one is too long."""
    size = (_even(side * shape), side) if shape >= 1 else (side, _even(side / shape))
    if max(size) > MAX_SIDE:
        raise RequestError(f"resolution gives a picture {max(size)} px long; at most {MAX_SIDE}", field="resolution")
    return size


def _even(value: Fraction | int) -> int:
    """The nearest even number, at least 2."""
    return max(2, round(value / 2) * 2)
