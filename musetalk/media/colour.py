"""Colour tags of a source: what its samples mean, what the output will be tagged as, what has to be converted.

The numbers are the code points of ITU-T H.273 that FFmpeg and the containers share. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass

from musetalk.errors import MediaError
from musetalk.frames import BT601_NTSC, BT601_PAL, BT709, Colour

UNSPECIFIED = 2
_BT2020, _ICTCP, _IPT = 9, 14, 15
# Transfer curves of HDR: PQ and HLG. Without a tone curve they look dull and wrong (docs/media.md#colour).
_HDR_TRANSFERS = {16, 18}
_FULL_RANGE = 2

# Matrices by code point: FFmpeg's name of each, and the colour of the output when the tags say no more.
_MATRICES: dict[int, tuple[str, Colour]] = {
    1: ("bt709", BT709),
    4: ("fcc", BT601_NTSC),
    5: ("bt470bg", BT601_PAL),
    6: ("smpte170m", BT601_NTSC),
    7: ("smpte240m", BT709),
    9: ("bt2020", BT709),
}
# Matrices that stay as they are; the others are converted to the one of their colour above.
_KEPT_MATRICES = {1, 5, 6}
_HD_LINES = 720
_PAL_LINES = {288, 576}


@dataclass(frozen=True)
class Tags:
    """Colour tags of a decoded picture; 2 means "not said"."""

    matrix: int = UNSPECIFIED
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    is_full_range: bool = False


@dataclass(frozen=True)
class ColourPlan:
    """Conversion of pictures with some tags to `colour`: FFmpeg's name of their matrix, and what to convert."""

    matrix_name: str
    colour: Colour
    is_full_range: bool = False
    converts_matrix: bool = False
    converts_gamut: bool = False


def plan_colour(tags: Tags, n_lines: int, *, is_rgb: bool = False) -> ColourPlan:
    """Choose the conversion for pictures with `tags` and `n_lines` coded lines.

    Without tags, BT.601 is assumed below 720 lines and BT.709 from there on. Raises MediaError for HDR and for
    matrices that cannot be read.
    """
    if tags.transfer in _HDR_TRANSFERS or (not is_rgb and tags.matrix in {_ICTCP, _IPT}):
        raise MediaError("the source is HDR video, which is not supported; send it as standard dynamic range (SDR)")
    code = _assumed_matrix(tags, n_lines) if is_rgb or tags.matrix in {0, UNSPECIFIED, 3} else tags.matrix
    if code not in _MATRICES:
        raise MediaError(f"the source's colour matrix (code {code}) is not supported", matrix=code)
    name, default = _MATRICES[code]
    if is_rgb:
        return ColourPlan(name, _with_tags(default, tags))
    if code == _BT2020:
        return ColourPlan(name, BT709, tags.is_full_range, converts_gamut=True)
    kept = code in _KEPT_MATRICES
    return ColourPlan(name, _with_tags(default, tags), tags.is_full_range, converts_matrix=not kept)


def _assumed_matrix(tags: Tags, n_lines: int) -> int:
    """The matrix where the tag is missing: that of the primaries, else by size."""
    if tags.primaries in {1, 5, 6, _BT2020}:
        return tags.primaries
    if n_lines >= _HD_LINES:
        return 1
    return 5 if n_lines in _PAL_LINES else 6


def _with_tags(default: Colour, tags: Tags) -> Colour:
    """The default colour with the primaries and the transfer curve that the file names."""
    reserved = {0, UNSPECIFIED, 3}
    primaries = default.primaries if tags.primaries in reserved else tags.primaries
    transfer = default.transfer if tags.transfer in reserved else tags.transfer
    return Colour(default.matrix, primaries, transfer, default.matrix_code)
