"""Crop and scale of a picture in its planes, as the last step before encoding."""

from __future__ import annotations

import cv2
import numpy as np

from musetalk.frames import Planes, UInt8Array, black_planes
from musetalk.geometry import Box


def fit_planes(planes: Planes, crop: Box, size: tuple[int, int]) -> Planes:
    """The part of the picture inside `crop` at `size` (width, height) px; all edges and sides even.

    `crop` is black outside the picture. Chroma samples count as the middle of their four luma samples, as in `frames`;
    for MPEG-2, where they are at the left, colour moves by at most half an output pixel. The whole picture at its own
    size is returned unchanged, a part of it may share its memory. Raises ValueError for odd or empty
    boxes and sizes.
    """
    width, height = size
    if any(edge % 2 for edge in (*crop, width, height)) or crop.is_empty or width <= 0 or height <= 0:
        raise ValueError(f"crop {tuple(crop)} to {width}x{height}: edges and sides must be even and not empty")
    inside = crop.clipped(planes.width, planes.height)
    if inside != crop:
        return _with_black(planes, inside, crop, size)
    if crop == Box(0, 0, planes.width, planes.height) and size == (planes.width, planes.height):
        return planes
    part = planes.region(crop)
    half = (width // 2, height // 2)
    return Planes(_scaled(part.y, size), _scaled(part.u, half), _scaled(part.v, half))


def _with_black(planes: Planes, inside: Box, crop: Box, size: tuple[int, int]) -> Planes:
    """Place `inside` where it is in `crop`, scaled to `size`, on black.

    The canvas has the size of the output, however far the crop reaches, and no black is mixed into the picture's edge.
    """
    canvas = black_planes(*size)
    xs = [_even_place(x - crop.x0, crop.width, size[0]) for x in (inside.x0, inside.x1)]
    ys = [_even_place(y - crop.y0, crop.height, size[1]) for y in (inside.y0, inside.y1)]
    place = Box(xs[0], ys[0], xs[1], ys[1])
    if not place.is_empty:
        target, shown = canvas.region(place), fit_planes(planes, inside, (place.width, place.height))
        target.y[...], target.u[...], target.v[...] = shown.y, shown.u, shown.v
    return canvas


def _even_place(offset: int, length: int, scaled: int) -> int:
    """The even position nearest to `offset` of `length` px on an axis scaled to `scaled` px."""
    return (offset * scaled + length) // (2 * length) * 2


def _scaled(plane: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """The plane at `size` (width, height): averaged on the axes that shrink, cubic on those that grow; C-contiguous."""
    height, width = plane.shape
    smaller = (min(width, size[0]), min(height, size[1]))
    if smaller != (width, height):
        plane = np.asarray(cv2.resize(plane, smaller, interpolation=cv2.INTER_AREA), np.uint8)
    if smaller != size:
        plane = np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    return np.ascontiguousarray(plane)
