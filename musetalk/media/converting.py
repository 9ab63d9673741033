"""Decoded frames to planes: 8-bit 4:2:0, limited range, square pixels, even sides, upright, in memory of their own.

A frame that is already so passes bit by bit. Everything else goes through FFmpeg's scaler with its accurate flags: its
defaults darken the picture by 1.6 steps (docs/media.md#colour). Knows no files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import av
import av.error
import cv2
import numpy as np
from numpy.typing import NDArray

from musetalk.errors import MediaError
from musetalk.frames import Planes, UInt8Array, bgr_to_planes
from musetalk.media.colour import ColourPlan, Tags, plan_colour
from musetalk.media.limits import MediaLimits, SourceInfo
from musetalk.media.opening import ffmpeg_errors
from musetalk.media.timing import as_fraction

_SCALE_FLAGS = "flags=accurate_rnd+full_chroma_int+full_chroma_inp+bicubic"
_PLANAR_420 = {"yuv420p", "yuvj420p"}
_COLOURSPACE_INPUTS = {f"yuv{chroma}p{depth}" for chroma in ("420", "422", "444") for depth in ("", "10le", "12le")}
# Formats of interlaced material that bwdif accepts unchanged.
_DEINTERLACED_INPUTS = _COLOURSPACE_INPUTS | {"yuvj420p", "yuvj422p", "yuvj444p", "yuv411p", "yuv410p"}
_FULL_RANGE = 2
_FRAME_TIME = Fraction(1, 1000)
# Pixel aspects this near to 1:1 are leftovers of scaling, further away from it garbage
# (docs/media.md#picture-geometry).
_SQUARE_WITHIN = Fraction(25, 1000)
_WIDEST_ASPECT = 4

Matrix2 = tuple[int, int, int, int]
Background = tuple[int, int, int]  # red, green, blue

WHITE: Background = (255, 255, 255)


def frame_tags(frame: Any) -> Tags:
    """The colour tags of a decoded frame."""
    is_full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    return Tags(int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc), is_full)


def frame_colour(frame: Any) -> ColourPlan:
    """Choose the conversion of a decoded frame's colours; raises MediaError for HDR and unknown matrices."""
    return plan_colour(frame_tags(frame), frame.height, is_rgb=_is_rgb_like(frame.format))


def orientation(frame: Any) -> tuple[int, bool]:
    """(rotation in degrees counter-clockwise, whether it is mirrored before) of a frame's display matrix.

    Angles between count as the nearest quarter turn.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 0, False
    values = struct.unpack("=9i", bytes(data)[:36])
    return _orientation((values[0], values[1], values[3], values[4]))


def _orientation(matrix: Matrix2) -> tuple[int, bool]:
    """`matrix` takes the coded point (x, y) to (a x + c y, b x + d y); y points down."""
    a, b, c, d = matrix
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    if abs(a) >= abs(b):
        return (0 if a >= 0 else 180), mirrored
    return (90 if b < 0 else 270), mirrored


def applied_aspect(aspect: Fraction | None) -> Fraction:
    """The pixel aspect that is applied for a declared one: 1 when it is nearly square, missing or absurd."""
    if aspect is None or aspect <= 0 or not Fraction(1, _WIDEST_ASPECT) <= aspect <= _WIDEST_ASPECT:
        return Fraction(1)
    return Fraction(1) if abs(aspect - 1) <= _SQUARE_WITHIN else aspect


def display_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Even size (px) of the upright picture before it is turned, for a coded size and an applied pixel aspect.

    The width is scaled; an odd last row or column is left out.
    """
    shown = width - width % 2 if aspect == 1 else 2 * round(width * aspect / 2)
    return shown, height - height % 2


class FrameConverter:
    """Turns decoded frames of one source into planes of the size its SourceInfo names."""

    def __init__(self, info: SourceInfo, limits: MediaLimits, background: Background = WHITE) -> None:
        """`background` is shown where the source is transparent."""
        self._info, self._limits = info, limits
        self._background = background
        self._size = info.upright_size
        self._graph: _FilterGraph | None = None

    def planes(self, frame: Any) -> Planes:
        """The frame's picture; raises MediaError when its size or its colours are not allowed."""
        self._limits.check_size(frame.width, frame.height)
        with ffmpeg_errors("the source"):
            upright = self._upright(frame)
        return turned(upright, self._info.rotation, mirrored=self._info.mirrored)

    def _upright(self, frame: Any) -> Planes:
        if _is_rgb_like(frame.format):
            return self._from_rgb(frame)
        plan = frame_colour(frame)
        converts = plan.converts_gamut or plan.colour.matrix != self._info.colour.matrix or plan.converts_matrix
        is_size_kept = display_size(frame.width, frame.height, Fraction(1)) == self._size
        if not (frame.format.name in _PLANAR_420 and is_size_kept and not converts):
            frame = self._filtered(frame, self._yuv_chain(frame, plan, converts=converts))
        planes = copied_planes(frame, self._size)
        return limited(planes) if plan.is_full_range else planes

    def _from_rgb(self, frame: Any) -> Planes:
        name = "bgra" if _has_alpha(frame.format) else "bgr24"
        plan = frame_colour(frame)
        source = ""
        if not (frame.format.is_rgb or frame.format.has_palette or frame.format.name.startswith("mono")):
            levels = "full" if plan.is_full_range or frame.format.name.startswith(("gray", "ya")) else "limited"
            source = f":in_color_matrix={plan.matrix_name}:in_range={levels}"
        chain = [*self._fitting(frame, source), ("format", name)]
        filtered = self._filtered(frame, chain)
        n_bytes = 4 if name == "bgra" else 3
        pixels = _rows(filtered.planes[0], filtered.height, filtered.width * n_bytes)
        blue_first = self._background[::-1]
        bgr = over(pixels.reshape(filtered.height, filtered.width, n_bytes), blue_first)
        return bgr_to_planes(np.ascontiguousarray(bgr), self._info.colour.matrix)

    def _yuv_chain(self, frame: Any, plan: ColourPlan, *, converts: bool) -> list[tuple[str, str]]:
        levels = "full" if plan.is_full_range else "limited"
        matrix = plan.matrix_name
        # Range stays as it is here: the scaler's own conversion is half a step off in chroma.
        same = f":in_color_matrix={matrix}:out_color_matrix={matrix}:in_range={levels}:out_range={levels}"
        chain = self._fitting(frame, same)
        if converts:
            if frame.format.name not in _COLOURSPACE_INPUTS:
                chain.append(("format", "yuv420p10le"))
            chain.append(("colorspace", _conversion(plan, self._info.colour.matrix, levels)))
        return [*chain, ("format", "yuv420p")]

    def _fitting(self, frame: Any, colours: str) -> list[tuple[str, str]]:
        """Filters to the upright size: whole rows and columns are cut off, everything else is scaled."""
        width, height = self._size
        even = display_size(frame.width, frame.height, Fraction(1))
        cut = (even[0] if even[0] == width else frame.width, even[1] if even[1] == height else frame.height)
        chain = []
        if cut != (frame.width, frame.height):
            chain.append(("crop", f"{cut[0]}:{cut[1]}:0:0:exact=1"))
        chain.append(("scale", f"{width}:{height}:{_SCALE_FLAGS}{colours}"))
        return chain

    def _filtered(self, frame: Any, chain: list[tuple[str, str]]) -> Any:
        key = (frame.width, frame.height, frame.format.name, tuple(chain))
        if self._graph is None or self._graph.key != key:
            self._graph = _FilterGraph(frame, chain, key)
        filtered = list(self._graph.push(frame))
        if len(filtered) != 1:
            raise MediaError("a picture of the source cannot be converted", format=frame.format.name)
        return filtered[0]


def _conversion(plan: ColourPlan, matrix: str, levels: str) -> str:
    """Arguments of the colorspace filter: to the output's matrix, and from BT.2020 primaries to BT.709's."""
    source = "bt2020ncl" if plan.matrix_name == "bt2020" else plan.matrix_name
    target = "bt709" if matrix == "bt709" else "smpte170m"
    primaries = "bt2020" if plan.converts_gamut else "bt709"
    range_name = "pc" if levels == "full" else "tv"
    return (
        f"ispace={source}:iprimaries={primaries}:itrc=bt709:irange={range_name}"
        f":space={target}:primaries=bt709:trc=bt709:range={range_name}:format=yuv420p"
    )


class Deinterlacer:
    """Deinterlacer: merges the two fields of a frame (bwdif) and passes other frames; each leaves one frame later.

    Frames keep the number they were pushed with in `pts`, in units of 1 ms.
    """

    def __init__(self) -> None:
        self._graph: _FilterGraph | None = None

    def push(self, frame: Any, number: int) -> Iterator[tuple[int, Any]]:
        """(number, frame) of the frames that are ready after `frame`."""
        key = (frame.width, frame.height, frame.format.name)
        if self._graph is not None and self._graph.key != key:
            yield from self.finish()
        if self._graph is None:
            self._graph = _FilterGraph(frame, self._chain(frame), key)
        yield from map(_numbered, self._graph.push(frame, number))

    def finish(self) -> Iterator[tuple[int, Any]]:
        """(number, frame) of those still inside."""
        if self._graph is not None:
            graph, self._graph = self._graph, None
            yield from map(_numbered, graph.push(None))

    @staticmethod
    def _chain(frame: Any) -> list[tuple[str, str]]:
        bwdif = ("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        if frame.format.name in _DEINTERLACED_INPUTS:
            return [bwdif]
        return [("scale", f"{_SCALE_FLAGS}:interl=1"), ("format", "yuv422p"), bwdif]


def _numbered(frame: Any) -> tuple[int, Any]:
    unit = as_fraction(frame.time_base)
    assert unit is not None
    return round(frame.pts * unit / _FRAME_TIME), frame


class _FilterGraph:
    """A chain of FFmpeg filters for frames of one size and format."""

    def __init__(self, frame: Any, chain: list[tuple[str, str]], key: object) -> None:
        self.key = key
        self._graph = av.filter.Graph()
        size, form = f"{frame.width}x{frame.height}", frame.format.name
        source = self._graph.add("buffer", f"video_size={size}:pix_fmt={form}:time_base={_FRAME_TIME}:pixel_aspect=1/1")
        middle = [self._graph.add(name, arguments) for name, arguments in chain]
        self._graph.link_nodes(source, *middle, self._graph.add("buffersink")).configure()

    def push(self, frame: Any | None, number: int = 0) -> Iterator[Any]:
        """Push `frame` and return the frames that leave; None says that no more will follow."""
        if frame is not None:
            frame.pts, frame.time_base = number, _FRAME_TIME
        self._graph.push(frame)
        while True:
            try:
                out = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            if frame is not None and isinstance(out, av.VideoFrame):
                # bwdif's frames keep the meaning of the source's tags; the scaler drops some.
                out.colorspace, out.color_range = frame.colorspace, frame.color_range
            yield out


def copied_planes(frame: Any, size: tuple[int, int]) -> Planes:
    """The top left `size` (width, height; even) of a yuv420p frame, in memory of its own."""
    width, height = size
    y, u, v = frame.planes
    return Planes(
        _rows(y, height, width).copy(),
        _rows(u, height // 2, width // 2).copy(),
        _rows(v, height // 2, width // 2).copy(),
    )


def _rows(plane: Any, n_rows: int, n_bytes: int) -> UInt8Array:
    """The first `n_bytes` of each of the first `n_rows` lines of a plane: a view of the frame's memory."""
    lines = np.frombuffer(plane, np.uint8)
    return lines[: n_rows * plane.line_size].reshape(n_rows, plane.line_size)[:, :n_bytes]


@cache
def _range_tables() -> tuple[UInt8Array, UInt8Array]:
    """Full-range luma and chroma values as limited-range ones, rounded (BT.601-7 section 2.5.3)."""
    values = np.arange(256)
    luma: UInt8Array = np.rint(16 + values * (219 / 255)).astype(np.uint8)
    chroma: UInt8Array = np.rint(128 + (values - 128) * (224 / 255)).astype(np.uint8)
    return luma, chroma


def limited(planes: Planes) -> Planes:
    """Full-range planes in limited range."""
    luma, chroma = _range_tables()

    def mapped(values: UInt8Array, table: UInt8Array) -> UInt8Array:
        return np.asarray(cv2.LUT(values, table), np.uint8)

    return Planes(mapped(planes.y, luma), mapped(planes.u, chroma), mapped(planes.v, chroma))


def over(pixels: NDArray[Any], background: Background = WHITE) -> UInt8Array:
    """Three or four 8-bit channels (RGB or RGBA, h, w, c) as three: what is transparent shows `background` (RGB)."""
    if pixels.shape[2] == 3:
        return np.asarray(pixels, np.uint8)
    alpha = pixels[..., 3].astype(np.uint16)
    shown = np.empty((*alpha.shape, 3), np.uint8)
    for channel, level in enumerate(background):
        # 255 * 255 + 127 still fits 16 bits. One channel at a time: a large still takes 18 MB for each.
        shown[..., channel] = (pixels[..., channel] * alpha + level * (255 - alpha) + 127) // 255
    return shown


def turned(planes: Planes, rotation: int, *, mirrored: bool) -> Planes:
    """Planes flipped left to right when `mirrored`, then turned counter-clockwise by `rotation` degrees."""
    if rotation == 0 and not mirrored:
        return planes

    def moved(values: UInt8Array) -> UInt8Array:
        return np.ascontiguousarray(np.rot90(np.fliplr(values) if mirrored else values, rotation // 90))

    return Planes(moved(planes.y), moved(planes.u), moved(planes.v))


def _has_alpha(form: Any) -> bool:
    return bool(form.has_palette or any(component.is_alpha for component in form.components))


def _is_rgb_like(form: Any) -> bool:
    """Whether the way to planes leads over RGB: RGB itself, palettes, greys, bits, and everything with alpha."""
    return bool(form.is_rgb or form.name.startswith(("gray", "mono", "xyz")) or _has_alpha(form))
