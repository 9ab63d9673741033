"""A full picture as 8-bit 4:2:0 planes, and the exact way between planes and BGR.

The picture stays in the planes it was decoded to; only the region of a face is converted, with the source's own matrix,
so that everything else reaches the encoder untouched. Knows nothing of files or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from musetalk.geometry import Box

Matrix = Literal["bt601", "bt709"]
UInt8Array = NDArray[np.uint8]

# Luma weights of red and blue (ITU-R BT.601-7 section 2.5.1, BT.709-6 section 3.2).
_LUMA_WEIGHTS: dict[Matrix, tuple[float, float]] = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


@dataclass(frozen=True, slots=True)
class Colour:
    """Meaning of a picture's samples; the integers are the code points of ITU-T H.273 that files contain."""

    matrix: Matrix
    primaries: int
    transfer: int
    matrix_code: int


BT709 = Colour("bt709", primaries=1, transfer=1, matrix_code=1)
BT601_NTSC = Colour("bt601", primaries=6, transfer=6, matrix_code=6)
BT601_PAL = Colour("bt601", primaries=5, transfer=6, matrix_code=5)


@dataclass(frozen=True, slots=True)
class Planes:
    """A full picture: limited-range Y (H, W), U and V (H/2, W/2), uint8, C-contiguous, H and W even.

    Decoding must return planes of its own, never the decoder's reference picture, because a paste may write into them.
    """

    y: UInt8Array
    u: UInt8Array
    v: UInt8Array

    @property
    def width(self) -> int:
        """Width in px (even)."""
        return int(self.y.shape[1])

    @property
    def height(self) -> int:
        """Height in px (even)."""
        return int(self.y.shape[0])

    @property
    def n_bytes(self) -> int:
        """Bytes of the three planes."""
        return self.y.nbytes + self.u.nbytes + self.v.nbytes

    def copy(self) -> Planes:
        """The same picture in memory of its own."""
        return Planes(self.y.copy(), self.u.copy(), self.v.copy())

    def region(self, box: Box) -> Planes:
        """A view of the pixels inside `box`, whose edges must be even and inside the picture."""
        if any(edge % 2 for edge in box) or box != box.clipped(self.width, self.height):
            raise ValueError(f"region {tuple(box)} is not an even box inside {self.width}x{self.height}")
        half = slice(box.y0 // 2, box.y1 // 2), slice(box.x0 // 2, box.x1 // 2)
        return Planes(self.y[box.y0 : box.y1, box.x0 : box.x1], self.u[half], self.v[half])


@cache
def from_yuv(matrix: Matrix) -> NDArray[np.float64]:
    """3x4 matrix from limited-range (Y, U, V, 1) to full-range (B, G, R)."""
    red, blue = _LUMA_WEIGHTS[matrix]
    green = 1.0 - red - blue
    luma, chroma = 255.0 / 219.0, 255.0 / 224.0
    to_blue, to_red = 2 * (1 - blue) * chroma, 2 * (1 - red) * chroma
    linear = np.array(
        [
            [luma, to_blue, 0.0],
            [luma, -to_blue * blue / green, -to_red * red / green],
            [luma, 0.0, to_red],
        ]
    )
    return np.hstack([linear, -linear @ np.array([[16.0], [128.0], [128.0]])])


@cache
def to_yuv(matrix: Matrix) -> NDArray[np.float64]:
    """3x4 matrix from full-range (B, G, R, 1) to limited-range (Y, U, V): the inverse of `from_yuv`."""
    forward = from_yuv(matrix)
    linear = np.linalg.inv(forward[:, :3])
    return np.hstack([linear, -linear @ forward[:, 3:]])


def planes_to_bgr(planes: Planes, matrix: Matrix, box: Box | None = None) -> UInt8Array:
    """The picture, or the part of it inside `box`, as BGR uint8 (h, w, 3).

    `box` may have odd edges and must lie inside the picture (ValueError otherwise). Chroma is doubled by linear
    interpolation between sample centres over the smallest even box around `box`, plus one sample on each side so that
    a region equals the same pixels of the whole picture.
    """
    whole = Box(0, 0, planes.width, planes.height)
    box = whole if box is None else box
    if box.is_empty or box != box.clipped(planes.width, planes.height):
        raise ValueError(f"box {tuple(box)} is empty or outside {planes.width}x{planes.height}")
    even = box.evened()
    around = Box(even.x0 - 2, even.y0 - 2, even.x1 + 2, even.y1 + 2).clipped(planes.width, planes.height)
    part = planes.region(around)
    size = (around.width, around.height)
    yuv = cv2.merge(
        [
            part.y,
            cv2.resize(part.u, size, interpolation=cv2.INTER_LINEAR),
            cv2.resize(part.v, size, interpolation=cv2.INTER_LINEAR),
        ]
    )
    top, left = box.y0 - around.y0, box.x0 - around.x0
    yuv = yuv[top : top + box.height, left : left + box.width]
    return _as_uint8(cv2.transform(np.ascontiguousarray(yuv), from_yuv(matrix)))


class Picture:
    """A picture for the face networks: its planes where they are known, BGR made only where it is needed."""

    def __init__(self, planes: Planes | None, matrix: Matrix = "bt709", bgr: UInt8Array | None = None) -> None:
        """From planes, or from `bgr` uint8 (H, W, 3) of any size."""
        shown = planes.y if planes is not None else bgr
        assert shown is not None, "a picture has planes or BGR"
        self.planes, self.matrix, self._bgr = planes, matrix, bgr
        self.size = int(shown.shape[1]), int(shown.shape[0])

    @property
    def bgr(self) -> UInt8Array:
        """BGR uint8 (H, W, 3); not kept, because a batch of large pictures waits in memory."""
        if self._bgr is not None:
            return self._bgr
        assert self.planes is not None
        return planes_to_bgr(self.planes, self.matrix)


def bgr_to_planes(bgr: UInt8Array, matrix: Matrix) -> Planes:
    """BGR uint8 (h, w, 3), h and w even, as limited-range planes; chroma is the mean of each 2x2 block."""
    height, width = bgr.shape[:2]
    if height % 2 or width % 2 or not height or not width:
        raise ValueError(f"a 4:2:0 picture needs an even size, not {width}x{height}")
    # The mean precedes the rounding: 8-bit chroma at full size would be rounded twice.
    yuv = cv2.transform(bgr.astype(np.float32), to_yuv(matrix))
    y, u, v = cv2.split(yuv)
    half = (width // 2, height // 2)
    return Planes(
        _rounded(y),
        _rounded(cv2.resize(u, half, interpolation=cv2.INTER_AREA)),
        _rounded(cv2.resize(v, half, interpolation=cv2.INTER_AREA)),
    )


def black_planes(width: int, height: int) -> Planes:
    """A black picture of `width` x `height` px (both even)."""
    half = (height // 2, width // 2)
    return Planes(np.full((height, width), 16, np.uint8), np.full(half, 128, np.uint8), np.full(half, 128, np.uint8))


def _rounded(values: NDArray[Any]) -> UInt8Array:
    rounded: UInt8Array = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded


def _as_uint8(values: Any) -> UInt8Array:
    return np.asarray(values, dtype=np.uint8)
