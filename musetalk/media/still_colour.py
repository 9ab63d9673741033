"""Colours of still pictures to sRGB: ICC profiles by LittleCMS, the colour chunks of PNG by their formulas.

Specified in docs/media.md#colours-of-stills.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from musetalk.errors import MediaError

OnWarning = Callable[[str], None]
Float64Array = NDArray[np.float64]

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Gamma of a file (1/2.2) that means sRGB, as nearly every writer of it intends.
_SRGB_GAMMA, _GAMMA_TOLERANCE = 0.45455, 0.02
_CHROMATICITY_TOLERANCE = 0.003
# White point, then red, green, blue: CIE xy.
_D65 = (0.3127, 0.3290)
_SRGB_XY = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
# Primaries by their code of ITU-T H.273.
_PRIMARIES = {
    1: _SRGB_XY,
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
_HDR_TRANSFERS = {16, 18}
# Rows converted at once, so that a large picture needs no gigabyte of floats.
_STRIP_ROWS = 256


@dataclass(frozen=True)
class PngColour:
    """What the chunks of a PNG say about its colours; None where they say nothing."""

    code: tuple[int, int] | None = None  # primaries and transfer of cICP
    is_srgb: bool = False
    gamma: float | None = None
    chromaticities: tuple[float, ...] | None = None


NO_PNG = PngColour()


def png_colour(path: Path) -> PngColour:
    """The colour chunks of a PNG before its pixels; nothing for other files."""
    found: dict[bytes, bytes] = {}
    with path.open("rb") as file:
        if file.read(8) != _PNG_MAGIC:
            return NO_PNG
        while len(header := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", header)
            if kind in {b"IDAT", b"IEND"} or size > 2**24:
                break
            if kind in {b"cICP", b"sRGB", b"gAMA", b"cHRM"}:
                found.setdefault(kind, file.read(size))
                file.seek(4, 1)
            else:
                file.seek(size + 4, 1)
    cicp, gama, chrm = (found.get(name, b"") for name in (b"cICP", b"gAMA", b"cHRM"))
    return PngColour(
        code=(cicp[0], cicp[1]) if len(cicp) == 4 else None,
        is_srgb=b"sRGB" in found,
        gamma=struct.unpack(">I", gama)[0] / 100_000 if len(gama) == 4 else None,
        chromaticities=tuple(n / 100_000 for n in struct.unpack(">8I", chrm)) if len(chrm) == 32 else None,
    )


def in_srgb(image: Image.Image, png: PngColour, warn: OnWarning, what: str = "the source") -> Image.Image:
    """The picture in sRGB, with its alpha as it is; `warn` gets a sentence for a profile that cannot be used.

    Order of belief, as PNG's third edition has it: cICP, ICC profile, sRGB, gAMA with cHRM. Raises MediaError for HDR.
    """
    if png.code is not None:
        return _by_code(image, png.code, warn, what)
    profile = image.info.get("icc_profile")
    if profile:
        return _by_profile(image, profile, warn, what)
    if png.is_srgb or (png.gamma is None and png.chromaticities is None):
        return image
    gamma = _SRGB_GAMMA if png.gamma is None else png.gamma
    places = png.chromaticities or _SRGB_XY
    is_usual = all(abs(one - other) < _CHROMATICITY_TOLERANCE for one, other in zip(places, _SRGB_XY, strict=True))
    if not 0.05 <= gamma <= 5 or not _is_sane(places):
        warn(f"the colours of {what} are described by values that make no sense; they were ignored")
        return image
    if abs(gamma - _SRGB_GAMMA) <= _GAMMA_TOLERANCE:
        return image if is_usual else _converted(image, _srgb_to_linear, places)
    return _converted(image, lambda values: values ** (1 / gamma), places)


def _by_profile(image: Image.Image, profile: bytes, warn: OnWarning, what: str) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        alpha = image.getchannel("A") if "A" in image.getbands() else None
        opaque = _in_mode_of(image, source.profile.xcolor_space.strip())
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        converted = ImageCms.profileToProfile(
            opaque,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=intent,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        warn(f"the colour profile of {what} cannot be used; its colours were taken for sRGB")
        return image
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _in_mode_of(image: Image.Image, space: str) -> Image.Image:
    """The picture without alpha in the mode that a profile for `space` (ICC's name) takes."""
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "LAB": "LAB"}[space.upper()]
    if mode == image.mode:
        return image
    if mode == "CMYK" or (image.mode == "CMYK"):
        raise ValueError(f"a profile for {space} on a picture of mode {image.mode}")
    return image.convert(mode)


def _by_code(image: Image.Image, code: tuple[int, int], warn: OnWarning, what: str) -> Image.Image:
    primaries, transfer = code
    if transfer in _HDR_TRANSFERS:
        raise MediaError(f"{what} is an HDR picture, which is not supported; send it as standard dynamic range (SDR)")
    places = _PRIMARIES.get(primaries)
    curve = _CURVES.get(transfer)
    if places is None or curve is None:
        warn(f"the colours of {what} are described by codes that are not known; they were taken for sRGB")
        return image
    if places == _SRGB_XY and curve is _srgb_to_linear:
        return image
    return _converted(image, curve, places)


def _srgb_to_linear(values: Float64Array) -> Float64Array:
    """IEC 61966-2-1."""
    light: Float64Array = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return light


def _linear_to_srgb(values: Float64Array) -> Float64Array:
    clipped = np.clip(values, 0, 1)
    encoded: Float64Array = np.where(clipped <= 0.0031308, clipped * 12.92, 1.055 * clipped ** (1 / 2.4) - 0.055)
    return encoded


# Curves by their code of ITU-T H.273. Those of television are shown as sRGB is, as browsers do.
_CURVES: dict[int, Callable[[Float64Array], Float64Array]] = {
    **dict.fromkeys((1, 6, 13, 14, 15), _srgb_to_linear),
    4: lambda values: values**2.2,
    5: lambda values: values**2.8,
    8: lambda values: values,
}


def _is_sane(places: tuple[float, ...]) -> bool:
    if not all(0 <= place <= 1 for place in places) or min(places[1::2]) <= 0:
        return False
    return abs(float(np.linalg.det(_directions(places)))) > 1e-4


def _directions(places: tuple[float, ...]) -> Float64Array:
    """XYZ of red, green, blue as columns, each of luminance 1."""
    columns = [(x / y, 1.0, (1 - x - y) / y) for x, y in zip(places[2::2], places[3::2], strict=True)]
    directions: Float64Array = np.array(columns).T
    return directions


def _to_xyz(places: tuple[float, ...]) -> Float64Array:
    """The matrix from linear RGB of these primaries to XYZ; white has luminance 1."""
    directions = _directions(places)
    matrix: Float64Array = directions * np.linalg.solve(directions, _white(places))
    return matrix


def _white(places: tuple[float, ...]) -> Float64Array:
    x, y = places[:2]
    return np.array([x / y, 1.0, (1 - x - y) / y])


# Cone responses of the Bradford adaptation.
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def _to_srgb_matrix(places: tuple[float, ...]) -> Float64Array:
    """From linear RGB of these primaries to that of sRGB; white stays white."""
    gains = (_BRADFORD @ _white(_SRGB_XY)) / (_BRADFORD @ _white(places))
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(gains) @ _BRADFORD
    result: Float64Array = np.linalg.inv(_to_xyz(_SRGB_XY)) @ adapted @ _to_xyz(places)
    return result


def _converted(
    image: Image.Image, curve: Callable[[Float64Array], Float64Array], places: tuple[float, ...]
) -> Image.Image:
    """The picture in sRGB by `curve` (code values 0 to 1 to linear light) and primaries."""
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    source = image.convert("RGBA" if has_alpha else "RGB")
    pixels: NDArray[Any] = np.array(source)
    table = curve(np.arange(256) / 255).astype(np.float32)
    matrix = _to_srgb_matrix(places).astype(np.float32)
    for start in range(0, len(pixels), _STRIP_ROWS):
        strip = pixels[start : start + _STRIP_ROWS, :, :3]
        light = table[strip] @ matrix.T
        strip[...] = np.rint(255 * _linear_to_srgb(light.astype(np.float64))).astype(np.uint8)
    return Image.fromarray(pixels)
