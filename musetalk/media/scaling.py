"""Crop and scale of a picture in its planes, as the last step before encoding."""

from __future__ import annotations

import cv2
import numpy as np

from musetalk.frames import Planes, UInt8Array, black_planes
from musetalk.geometry import Box


def fit_planes(planes: Planes, crop: Box, size: tuple[int, int]) -> Planes:
    """The part of the picture inside `crop` at `size` (width, height) px; all edges and sides even.

    What of `crop` lies outside the picture is black. The whole picture at its own size is returned as it is. Raises
    ValueError for odd or empty boxes and sizes.
    """
    width, height = size
    if any(edge % 2 for edge in (*crop, width, height)) or crop.is_empty or width <= 0 or height <= 0:
        raise ValueError(f"crop {tuple(crop)} to {width}x{height}: edges and sides must be even and not empty")
    whole = Box(0, 0, planes.width, planes.height)
    if crop == whole and size == (planes.width, planes.height):
        return planes
    part = _cropped(planes, crop)
    if size == (part.width, part.height):
        return Planes(*(np.ascontiguousarray(plane) for plane in (part.y, part.u, part.v)))
    half = (width // 2, height // 2)
    return Planes(_scaled(part.y, size), _scaled(part.u, half), _scaled(part.v, half))


def _cropped(planes: Planes, crop: Box) -> Planes:
    inside = crop.clipped(planes.width, planes.height)
    if inside == crop:
        return planes.region(crop)
    canvas = black_planes(crop.width, crop.height)
    if not inside.is_empty:
        target, source = canvas.region(inside.shifted(-crop.x0, -crop.y0)), planes.region(inside)
        target.y[...], target.u[...], target.v[...] = source.y, source.u, source.v
    return canvas


def _scaled(plane: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    height, width = plane.shape
    # Area averaging is the antialiased way down; cubic keeps edges on the way up.
    shrinks = size[0] < width or size[1] < height
    scaled = cv2.resize(plane, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return np.asarray(scaled, np.uint8)
