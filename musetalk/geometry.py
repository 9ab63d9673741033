"""Rectangles and the order of frames, in whole numbers. Knows nothing of arrays."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from musetalk.options import LoopMode


class Box(NamedTuple):
    """A rectangle in frame pixels, half-open: x0 <= x < x1, y0 <= y < y1."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        """Width in px; zero or less when the box is empty."""
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        """Height in px; zero or less when the box is empty."""
        return self.y1 - self.y0

    @property
    def is_empty(self) -> bool:
        """Whether the box contains no pixel."""
        return self.width <= 0 or self.height <= 0

    def shifted(self, dx: int, dy: int) -> Box:
        """The box moved by (dx, dy) px."""
        return Box(self.x0 + dx, self.y0 + dy, self.x1 + dx, self.y1 + dy)

    def clipped(self, width: int, height: int) -> Box:
        """The part of the box inside a picture of `width` x `height` px (may be empty)."""
        x0, y0 = min(max(self.x0, 0), width), min(max(self.y0, 0), height)
        return Box(x0, y0, max(x0, min(self.x1, width)), max(y0, min(self.y1, height)))

    def clipped_to(self, other: Box) -> Box:
        """The part of the box inside another one (may be empty)."""
        inside = self.shifted(-other.x0, -other.y0).clipped(other.width, other.height)
        return inside.shifted(other.x0, other.y0)

    def evened(self) -> Box:
        """The smallest box around this one whose edges are even: whole chroma samples of a 4:2:0 picture."""
        return Box(self.x0 - self.x0 % 2, self.y0 - self.y0 % 2, self.x1 + self.x1 % 2, self.y1 + self.y1 % 2)

    def with_bottom_margin(self, margin_px: int, height: int) -> Box:
        """The box grown by `margin_px` at the bottom, not beyond a picture `height` px high (docs/model.md#margin)."""
        return Box(self.x0, self.y0, self.x1, min(self.y1 + margin_px, height))


def blend_box(box: Box, expand: float = 1.5) -> Box:
    """The square, even-sided box around crop box `box` where the mask lives; may leave the frame.

    Specified in docs/model.md#blend-box.
    """
    centre_x, centre_y = (box.x0 + box.x1) // 2, (box.y0 + box.y1) // 2
    half = int(max(box.width, box.height) // 2 * expand)
    return Box(centre_x - half, centre_y - half, centre_x + half, centre_y + half)


def ping_pong_index(index: int, length: int) -> int:
    """Source index of output frame `index`: forwards, then backwards, both ends shown twice.

    Specified in docs/model.md#frame-order. Raises ValueError when `length` is not positive or `index` is negative.
    """
    if length <= 0 or index < 0:
        raise ValueError(f"no frame {index} in a cycle of {length}")
    position = index % (2 * length)
    return position if position < length else 2 * length - 1 - position


def source_index(mode: LoopMode, index: int, length: int) -> int:
    """Source index of output frame `index` when the source has `length` frames.

    `trim` has no frame after the last, so a later index gives the last. Raises ValueError as `ping_pong_index` does.
    """
    if mode == "ping_pong":
        return ping_pong_index(index, length)
    if length <= 0 or index < 0:
        raise ValueError(f"no frame {index} of {length}")
    return index % length if mode == "loop" else min(index, length - 1)


def median_box(boxes: Sequence[Box]) -> Box:
    """The box of the median edges of some boxes, at least one."""
    return Box(*(int(statistics.median_low(edges)) for edges in zip(*boxes, strict=True)))
