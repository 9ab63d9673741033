"""Anti-aliased outlines, curves and soft shading on a float picture, with NumPy and OpenCV. Colours are BGR, 0..1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

# Pictures are drawn at twice the size; lines are smooth after they were reduced.
SCALE = 2

Image = NDArray[np.float32]
Colour = tuple[float, float, float]
Points = Sequence[tuple[float, float]]


def rgb(red: int, green: int, blue: int) -> Colour:
    """A colour as designers write it."""
    return blue / 255, green / 255, red / 255


@dataclass
class Canvas:
    """A picture float32 (h, w, 3) in face coordinates, at SCALE px a unit; `origin` is the face point at its corner."""

    pixels: Image
    origin: tuple[float, float]
    alpha: Image | None = None

    def _places(self, points: Points) -> NDArray[np.int32]:
        placed = (np.asarray(points, np.float64) - self.origin) * SCALE
        return np.round(placed * 16).astype(np.int32)

    def mask(self, points: Points, blur: float = 0.0) -> Image:
        """Coverage 0..1 of a filled outline, softened by a Gaussian of `blur` units."""
        cover = np.zeros(self.pixels.shape[:2], np.uint8)
        cv2.fillPoly(cover, [self._places(points)], 255, cv2.LINE_AA, 4)
        return _softened(cover, blur)

    def stroke(self, points: Points, width: float, blur: float = 0.0) -> Image:
        """Coverage of an open line."""
        cover = np.zeros(self.pixels.shape[:2], np.uint8)
        thick = max(1, round(width * SCALE))
        cv2.polylines(cover, [self._places(points)], False, 255, thick, cv2.LINE_AA, 4)
        return _softened(cover, blur)

    def paint(self, mask: Image, colour: Colour | Image, strength: float = 1.0) -> None:
        """Blend a colour over the canvas under the mask; with an alpha channel, make the place opaque."""
        self.shade(mask, colour, strength)
        if self.alpha is not None:
            self.alpha[:] = np.maximum(self.alpha, mask * strength)

    def shade(self, mask: Image, colour: Colour | Image, strength: float) -> None:
        """Colour without making anything opaque."""
        # Most masks are a strand or a lip: only their part of the picture is computed.
        place = _bounds(mask)
        values = np.asarray(colour, np.float32)
        pixels = self.pixels[place]
        pixels += (mask[place] * strength)[..., None] * ((values[place] if values.ndim == 3 else values) - pixels)

    def fill(self, points: Points, colour: Colour, *, blur: float = 0.0, strength: float = 1.0) -> None:
        """A filled outline."""
        self.paint(self.mask(points, blur), colour, strength)


def _bounds(mask: Image | NDArray[np.uint8]) -> tuple[slice, slice]:
    """The smallest rectangle that holds everything but zeros."""
    x, y, width, height = cv2.boundingRect((mask != 0).astype(np.uint8))
    return slice(y, y + height), slice(x, x + width)


def _softened(cover: NDArray[np.uint8], blur: float) -> Image:
    """Coverage 0..1 after a Gaussian of `blur` units."""
    soft: Image = np.asarray(cover, np.float32) / np.float32(255)
    if blur <= 0:
        return soft
    rows, columns = _bounds(cover)
    # Further than this OpenCV's kernel for float pictures does not reach (four standard deviations).
    reach = round(blur * SCALE * 4) + 2
    place = (
        slice(max(0, rows.start - 2 * reach), rows.stop + 2 * reach),
        slice(max(0, columns.start - 2 * reach), columns.stop + 2 * reach),
    )
    soft[place] = cv2.GaussianBlur(soft[place].copy(), (0, 0), blur * SCALE)
    return soft


def curve(points: Points, *, closed: bool = True, n: int = 12) -> list[tuple[float, float]]:
    """A Catmull-Rom curve through the points."""
    given = np.asarray(points, np.float64)
    around = (
        np.concatenate([given[-1:], given, given[:2]]) if closed else np.concatenate([given[:1], given, given[-1:]])
    )
    shares = np.linspace(0, 1, n, endpoint=False)[:, None]
    pieces = []
    for index in range(len(around) - 3):
        a, b, c, d = around[index : index + 4]
        pieces.append(
            0.5
            * (2 * b + (c - a) * shares + (2 * a - 5 * b + 4 * c - d) * shares**2 + (3 * b - a - 3 * c + d) * shares**3)
        )
    line = np.concatenate(pieces if closed else [*pieces, given[-1:]])
    return [(float(x), float(y)) for x, y in line]


def mirrored(points: Points) -> list[tuple[float, float]]:
    """The left side's points after the right side's, for an outline that is given by its right half from top down."""
    right = list(points)
    return right + [(-x, y) for x, y in reversed(right) if x != 0]


def ellipse(x: float, y: float, rx: float, ry: float, n: int = 40) -> list[tuple[float, float]]:
    """Points of an ellipse."""
    angles = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return [(x + rx * float(np.cos(a)), y + ry * float(np.sin(a))) for a in angles]


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the second colour."""
    a, b, c = (one + share * (two - one) for one, two in zip(first, second, strict=True))
    return a, b, c
