"""Picture files by Pillow: stills, and animations (GIF, WebP, APNG) frame by frame.

FFmpeg's picture readers are not used: which of them exist differs between releases, and Pillow reads the size before
it decodes. Everything becomes 8-bit BGR in sRGB over the background, upright, with even sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from musetalk.errors import MediaError, MuseTalkError, ProcessingError
from musetalk.frames import Planes, UInt8Array, bgr_to_planes
from musetalk.media.colour import Tags, plan_colour
from musetalk.media.converting import WHITE, Background, over
from musetalk.media.limits import MediaLimits, SourceInfo
from musetalk.media.opening import PictureFormat
from musetalk.media.still_colour import NO_PNG, PngColour, in_srgb, png_colour
from musetalk.media.timing import Timed, nominal_rate, output_rate

_WHAT = "the source"
# JPEG files of cameras may contain more than one picture; the first one counts.
_PILLOW_FORMATS: dict[PictureFormat, list[str]] = {"JPEG": ["JPEG", "MPO"]}
_ANIMATED_FORMATS: set[PictureFormat] = {"GIF", "WEBP", "PNG"}
_STILL_RATE = Fraction(25)
# Browsers show frames of 10 ms and less for 100 ms: such files were made for slower programs.
_SHORTEST_MS, _REPLACED_MS = 10, 100
_ORIENTATION_TAG = 0x0112
# EXIF 2.3, 4.6.4 A: how the picture has to be turned for each value of the tag.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Frames looked at to find an animation's rate.
_N_PROBED = 50


@dataclass(frozen=True)
class _View:
    """How the pictures of a file become pixels."""

    limits: MediaLimits
    background: Background = WHITE
    png: PngColour = NO_PNG
    warn: Callable[[str], None] = lambda _: None


def inspect_picture(path: Path, form: PictureFormat, limits: MediaLimits) -> SourceInfo:
    """Describe a still or an animation and decode its first picture, in this process; see `probe_source`."""
    warnings: list[str] = []
    with _opened(path, form, limits) as image:
        view = _View(limits, png=png_colour(path), warn=warnings.append)
        is_animated = form in _ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1
        if not is_animated:
            given = image.size
            bgr = _bgr(image, view)
            if max(given) > max(bgr.shape[:2]) + 1:
                warnings.append(
                    f"the source is a picture of {given[0]}x{given[1]} px and was scaled down to "
                    f"{bgr.shape[1]}x{bgr.shape[0]} px"
                )
            return _described(bgr, form, kind="still", rate=_STILL_RATE, n_frames=1, warnings=tuple(warnings))
        limits.check_size(*image.size)
        n_frames = _n_animated(image)
        durations: list[int] = []
        first: UInt8Array | None = None
        for pixels, duration_ms in _animation(image, view, _N_PROBED):
            first = pixels if first is None else first
            durations.append(duration_ms)
        if first is None:
            raise MediaError(f"{_WHAT} contains no picture that can be decoded")
    source_rate = nominal_rate([Fraction(1000, min(durations))])
    rate = output_rate(source_rate, limits)
    duration = Fraction(sum(durations) * n_frames, 1000 * len(durations))
    return _described(
        first,
        form,
        kind="video",
        rate=rate,
        n_frames=max(1, round(duration * rate)),
        duration=duration,
        source_rate=source_rate,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _described(bgr: UInt8Array, form: PictureFormat, **facts: Any) -> SourceInfo:
    height, width = bgr.shape[:2]
    colour = plan_colour(Tags(), height, is_rgb=True).colour
    return SourceInfo(width=width, height=height, colour=colour, codec=form.lower(), container=form.lower(), **facts)


def read_still(
    path: Path, form: PictureFormat, info: SourceInfo, limits: MediaLimits, background: Background = WHITE
) -> Planes:
    """The picture of a still as planes; raises MediaError when it cannot be decoded."""
    with _opened(path, form, limits) as image:
        return _planes(_bgr(image, _View(limits, background, png_colour(path))), info)


def read_animation(
    path: Path, form: PictureFormat, info: SourceInfo, limits: MediaLimits, background: Background = WHITE
) -> Iterator[Timed[Callable[[], Planes]]]:
    """The pictures of an animation with their times; a cut file gives those that it contains."""
    time = Fraction(0)
    with _opened(path, form, limits) as image:
        view = _View(limits, background, png_colour(path))
        begun = process_time()
        for pixels, duration_ms in _animation(image, view, limits.max_decoded_frames):
            if process_time() - begun > limits.max_animation_s:
                raise MediaError(f"{_WHAT} is an animation that takes more than {limits.max_animation_s:g} s to decode")
            duration = Fraction(duration_ms, 1000)
            yield Timed(time, duration, partial(_planes, pixels, info))
            time += duration


def _planes(bgr: UInt8Array, info: SourceInfo) -> Planes:
    if bgr.shape[:2] != (info.height, info.width):
        raise MediaError(f"{_WHAT} changes its size on the way")
    return bgr_to_planes(bgr, info.colour.matrix)


@contextmanager
def _opened(path: Path, form: PictureFormat, limits: MediaLimits) -> Iterator[Image.Image]:
    with _picture_errors(), Image.open(path, formats=_PILLOW_FORMATS.get(form, [form])) as image:
        limits.check_still_size(*image.size)
        yield image


@contextmanager
def _picture_errors() -> Iterator[None]:
    try:
        yield
    except MuseTalkError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(f"{_WHAT} has too many pixels") from None
    except MemoryError:
        raise ProcessingError(f"there is not enough memory to decode {_WHAT}", reason="MemoryError") from None
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise anything on a broken file, from struct to zlib
        # Pillow's texts contain the path.
        raise MediaError(f"{_WHAT} is a picture that cannot be decoded", reason=type(error).__name__) from None


def _n_animated(image: Any) -> int:
    """Number of frames; a PNG may contain a picture for programs without animation, which does not count."""
    return int(image.n_frames) - bool(image.info.get("default_image"))


def _animation(image: Any, view: _View, n_most: int) -> Iterator[tuple[UInt8Array, int]]:
    """(BGR picture, duration in ms) of the first frames; ends early where the file does, after one frame at least."""
    first = image.n_frames - _n_animated(image)
    for index in range(first, min(image.n_frames, first + n_most)):
        try:
            image.seek(index)
            view.limits.check_size(*image.size)
            pixels = _bgr(image, view)
        except MuseTalkError:
            raise
        except Exception:  # Pillow's readers raise anything at all where a file is cut or damaged
            if index == first:
                raise
            return
        duration = int(image.info.get("duration") or 0)
        yield pixels, duration if duration > _SHORTEST_MS else _REPLACED_MS


def _bgr(image: Image.Image, view: _View) -> UInt8Array:
    """The current picture as BGR (h, w, 3) with even sides, upright, over the background, no larger than allowed."""
    view.limits.check_still_size(*image.size)
    size = view.limits.fitting_size(*image.size)
    if size != image.size and image.format in {"JPEG", "MPO"}:
        # Half, a quarter or an eighth while decoding: of a picture of 48 million pixels only what is needed.
        image.draft("RGB" if image.mode != "CMYK" else "CMYK", size)
    image.load()
    # In eight bits first: a resampling of 16 bits or of a palette is another one in each mode.
    shown = _eight_bit(image)
    if size != image.size:
        shown = shown.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
        shown.info = dict(image.info)
    upright = _upright(in_srgb(shown, view.png, view.warn), image)
    rgb = upright if upright.mode in {"RGB", "RGBA"} else upright.convert("RGB")
    pixels = over(np.asarray(rgb), view.background)
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    return np.ascontiguousarray(pixels[:height, :width, ::-1])


def _upright(shown: Image.Image, image: Image.Image) -> Image.Image:
    """`shown`, turned as the notes of the camera in `image` say."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - broken notes of a camera are no reason to refuse its picture
        return shown
    turn = _TURNS.get(orientation)
    return shown if turn is None else shown.transpose(turn)


def _eight_bit(image: Image.Image) -> Image.Image:
    """The picture in 8 bits: RGB or RGBA, or the mode that a colour profile may be made for (grey, CMYK, LAB)."""
    if image.mode.startswith("I") or image.mode == "F":
        return _with_info(Image.fromarray(_grey(np.asarray(image), image.mode)), image)
    has_alpha = image.mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info
    if has_alpha:
        return _with_info(image.convert("RGBA"), image)
    return image if image.mode in {"RGB", "L", "CMYK", "LAB"} else _with_info(image.convert("RGB"), image)


def _with_info(shown: Image.Image, image: Image.Image) -> Image.Image:
    """`shown` with the colour profile of `image`."""
    if "icc_profile" in image.info:
        shown.info["icc_profile"] = image.info["icc_profile"]
    return shown


def _grey(values: NDArray[Any], mode: str) -> UInt8Array:
    """16-bit, 32-bit or floating greys as 8 bits: the scale is the format's, floats go to 1 or to 255."""
    numbers = np.nan_to_num(values.astype(np.float64))
    if mode == "F":
        scale = 255.0 if numbers.max() <= 1 else 1.0
    else:
        # Older releases of Pillow use "I" for 16-bit files; more bits are rare.
        scale = 255 / 65535 if numbers.max() <= 65535 else 255 / (2**31 - 1)
    grey: UInt8Array = np.clip(np.rint(numbers * scale), 0, 255).astype(np.uint8)
    return grey
