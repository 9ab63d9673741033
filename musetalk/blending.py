"""Mask of a face, and pasting a patch under it: in BGR as upstream, and in planes, which is faster.

Masks depend only on the source frame and are made once for it (docs/model.md#masks). Knows no networks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from musetalk.frames import Matrix, Planes, UInt8Array, bgr_to_planes, planes_to_bgr
from musetalk.geometry import Box
from musetalk.options import MaskMode

_SKIN, _NOSE, _NECK = 1, 10, 14
_MOUTH = (11, 12, 13)  # mouth, upper lip, lower lip
_LABELS_PX = 512
# Of the mask's square only rows from this share on are used: the upper half of the face stays as it is.
_UPPER_BOUNDARY = 0.5
# Rows above one that its mask depends on: skin grows down by 6, two erosions look 1 further each.
_MASK_REACH = 8


# -- masks ------------------------------------------------------------------------------------------------------------


@cache
def _cone_kernel() -> UInt8Array:
    """33x33: centred runs of width 1, 3, .. 21 in rows 10..20, width 21 in rows 21..32 (docs/model.md#masks)."""
    kernel = np.zeros((33, 33), np.uint8)
    for row in range(10, 33):
        half = min(row - 10, 10)
        kernel[row, 16 - half : 16 + half + 1] = 1
    return kernel


@cache
def _cheek_kernel() -> UInt8Array:
    """The ellipse that takes the cheeks' edge away, 35 wide and 3 high."""
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (35, 3)), np.uint8)


def cheek_zone(left: int, right: int) -> NDArray[np.bool_]:
    """Columns outside the free zone around the mouth, both ends included: (512,) true where the cheeks are."""
    columns = np.arange(_LABELS_PX)
    centre = _LABELS_PX // 2
    return (columns <= centre - left) | (columns >= centre + right)


def face_mask(labels: UInt8Array, mode: MaskMode, left_cheek: int = 90, right_cheek: int = 90) -> UInt8Array:
    """Mask of the pixels that are redrawn: classes uint8 (512, 512) -> 0 or 255, uint8 (512, 512).

    `raw` is skin and mouth, `neck` adds the neck, `jaw` grows the skin downwards and upwards, then draws the cheeks
    back (docs/model.md#masks).
    """
    if mode == "raw":
        return _of_classes(labels, _SKIN, *_MOUTH)
    if mode == "neck":
        return _of_classes(labels, _SKIN, _NECK, *_MOUTH)
    grown = cv2.dilate(_of_classes(labels, _SKIN), _cone_kernel())
    eroded = cv2.erode(grown, _cheek_kernel(), iterations=2)
    zone = np.where(cheek_zone(left_cheek, right_cheek), 255, 0).astype(np.uint8)
    # The erosion only takes away, so "eroded in the zone, grown elsewhere" is the eroded or what is grown outside it.
    region = cv2.bitwise_or(eroded, cv2.bitwise_and(grown, np.broadcast_to(255 - zone, grown.shape).copy()))
    region = cv2.bitwise_and(region, cv2.bitwise_not(_of_classes(labels, _NOSE)))
    return np.asarray(cv2.bitwise_or(region, _of_classes(labels, *_MOUTH)), np.uint8)


def _of_classes(labels: UInt8Array, *classes: int) -> UInt8Array:
    """255 where a pixel is of one of the classes, else 0."""
    table = np.zeros(256, np.uint8)
    table[list(classes)] = 255
    return np.asarray(cv2.LUT(labels, table), np.uint8)


def blend_mask(mask: UInt8Array, box: Box, around: Box, *, blur: float = 0.05) -> UInt8Array:
    """Weight of the patch in the blend box: mask (512, 512) -> soft mask (side, side) uint8 (docs/model.md#soft-mask).

    The mask is cut to the crop box `box` and the lower half of the blend box `around`, then blurred by a Gaussian of
    `blur` times the side (upstream: 0.05, in real time 0.1). An empty blend box gives an empty mask.
    """
    side_w, side_h = around.width, around.height
    if side_w <= 0 or side_h <= 0:
        return np.zeros((max(0, side_h), max(0, side_w)), np.uint8)
    soft = np.zeros((side_h, side_w), np.uint8)
    inner = box.shifted(-around.x0, -around.y0).clipped(side_w, side_h)
    shown = Box(inner.x0, max(inner.y0, int(side_h * _UPPER_BOUNDARY)), inner.x1, inner.y1)
    if shown.is_empty:
        return soft
    kernel = int(blur * side_w // 2 * 2) + 1
    # Only what the blur can reach is blurred; beyond it everything is zero.
    reach = _grown(shown, kernel // 2)
    border = cv2.BORDER_CONSTANT
    if reach != reach.clipped(side_w, side_h):
        # At the square's edge the mask is mirrored; with so much room, zeros are mirrored at the other edges.
        reach, border = _grown(shown, kernel).clipped(side_w, side_h), cv2.BORDER_DEFAULT
    kept = np.zeros((reach.height, reach.width), np.uint8)
    place = shown.shifted(-reach.x0, -reach.y0)
    kept[place.y0 : place.y1, place.x0 : place.x1] = _resized_part(mask, side_w, side_h, shown)
    blurred = cv2.GaussianBlur(kept, (kernel, kernel), 0, borderType=border)
    soft[reach.y0 : reach.y1, reach.x0 : reach.x1] = blurred
    return soft


def _resized_part(mask: UInt8Array, width: int, height: int, part: Box) -> UInt8Array:
    """The pixels inside `part` of `mask` (h, w) resized to `width` x `height` px, equal to those of the whole.

    Pillow resizes rows, then columns. Each pass alone is given only what `part` shows.
    """
    first = _first_shown_row(mask.shape[0], part.y0, height)
    across = np.zeros((mask.shape[0], part.width), np.uint8)
    rows = Image.fromarray(mask[first:]).resize((width, mask.shape[0] - first))
    across[first:] = np.asarray(rows, np.uint8)[:, part.x0 : part.x1]
    return np.asarray(Image.fromarray(across).resize((part.width, height)), np.uint8)[part.y0 : part.y1]


def _first_shown_row(n_rows: int, row: int, height: int) -> int:
    """The first of `n_rows` that row `row` depends on when they are resized to `height`."""
    scale = n_rows / height
    # Bicubic, wider when it reduces.
    return max(0, int(row * scale - 2 * max(1.0, scale) - 1))


def _grown(box: Box, by_px: int) -> Box:
    return Box(box.x0 - by_px, box.y0 - by_px, box.x1 + by_px, box.y1 + by_px)


def soft_mask(
    labels: UInt8Array,
    box: Box,
    around: Box,
    mode: MaskMode,
    left_cheek: int = 90,
    right_cheek: int = 90,
    *,
    blur: float = 0.05,
) -> UInt8Array:
    """`blend_mask` of `face_mask`, without the rows of labels that the lower half of the blend box does not show."""
    n_rows, height = labels.shape[0], around.height
    shown = _first_shown_row(n_rows, int(height * _UPPER_BOUNDARY), height) if height > 0 else 0
    first = max(0, shown - _MASK_REACH)
    mask = np.zeros_like(labels)
    mask[first:] = face_mask(labels[first:], mode, left_cheek, right_cheek)
    return blend_mask(mask, box, around, blur=blur)


def crop_for_parsing(frame: UInt8Array, around: Box) -> UInt8Array:
    """The blend box of a BGR frame (H, W, 3) as a picture of its own, black where it leaves the frame."""
    square = np.zeros((max(1, around.height), max(1, around.width), 3), np.uint8)
    inside = around.clipped(frame.shape[1], frame.shape[0])
    if not inside.is_empty:
        place = inside.shifted(-around.x0, -around.y0)
        square[place.y0 : place.y1, place.x0 : place.x1] = frame[inside.y0 : inside.y1, inside.x0 : inside.x1]
    return square


# -- colours of a small model -----------------------------------------------------------------------------------------

# Rows of a crop between eyes and mouth, which speech does not change, as shares of its height; and how many columns of
# them are looked at, without the outermost, where the background is.
_BAND = (0.3, 0.56)
_BAND_COLUMNS = 12


def colour_band(crop: UInt8Array) -> NDArray[np.float32]:
    """Mean colours of the part of a crop (h, w, 3) that speech does not change, left to right, (10, 3)."""
    height = crop.shape[0]
    rows = crop[int(_BAND[0] * height) : int(_BAND[1] * height)]
    means = cv2.resize(rows.astype(np.float32), (_BAND_COLUMNS, 1), interpolation=cv2.INTER_AREA)[0]
    return np.asarray(means[1:-1], np.float32)


@cache
def _line_fit(width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(10 colours -> offset and slope, offset and slope -> width values): least squares along x."""
    x = ((np.arange(_BAND_COLUMNS) + 0.5) / _BAND_COLUMNS - 0.5)[1:-1]
    fit = np.linalg.pinv(np.stack([np.ones_like(x), x], axis=1))
    places = (np.arange(width) + 0.5) / width - 0.5
    return fit.astype(np.float32), np.stack([np.ones(width), places], axis=1).astype(np.float32)


def match_colours(patch: UInt8Array, band: NDArray[np.float32]) -> UInt8Array:
    """`patch` (h, w, 3) shifted so that its band has the colours of the source's (`colour_band`), constant down.

    A small autoencoder does not give every skin back; without this a step shows at the mask's edge.
    """
    fit, draw = _line_fit(patch.shape[1])
    shift = draw @ (fit @ (band - colour_band(patch)))
    matched: UInt8Array = np.clip(np.round(patch + shift[None]), 0, 255).astype(np.uint8)
    return matched


# -- pasting in BGR, as upstream --------------------------------------------------------------------------------------


def mix(new: UInt8Array, old: UInt8Array, weight: UInt8Array) -> UInt8Array:
    """`new` over `old` by `weight` 0..255, all uint8 of one shape, rounded as Pillow does.

    t = new * w + old * (255 - w) + 128; result = (t + t / 256) / 256."""
    weighted = new.astype(np.uint32) * weight + old.astype(np.uint32) * (255 - weight.astype(np.uint32)) + 128
    mixed: UInt8Array = (((weighted >> 8) + weighted) >> 8).astype(np.uint8)
    return mixed


def paste_reference(frame: UInt8Array, patch: UInt8Array, box: Box, mask: UInt8Array, around: Box) -> UInt8Array:
    """A new BGR frame (H, W, 3) with `patch` pasted into `box` under `mask`, which covers the blend box `around`.

    Specified in docs/model.md#pasting. Bit-equal to upstream, which blends the whole square; parts outside the frame
    are dropped. `frame` is not changed.
    """
    square = crop_for_parsing(frame, around)
    face = np.asarray(cv2.resize(patch, (box.width, box.height)), np.uint8)
    place = box.shifted(-around.x0, -around.y0)
    inside = place.clipped(square.shape[1], square.shape[0])
    square[inside.y0 : inside.y1, inside.x0 : inside.x1] = face[
        inside.y0 - place.y0 : inside.y1 - place.y0, inside.x0 - place.x0 : inside.x1 - place.x0
    ]
    result: UInt8Array = frame.copy()
    shown = around.clipped(frame.shape[1], frame.shape[0])
    if not shown.is_empty:
        part = shown.shifted(-around.x0, -around.y0)
        rows, columns = slice(part.y0, part.y1), slice(part.x0, part.x1)
        result[shown.y0 : shown.y1, shown.x0 : shown.x1] = mix(
            square[rows, columns],
            frame[shown.y0 : shown.y1, shown.x0 : shown.x1],
            mask[rows, columns, None],
        )
    return result


# -- pasting in planes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PastePlan:
    """Everything that pasting into one source frame needs, made once for it.

    `box` is the crop box (the patch's size); `region` the even box of all pixels with weight, inside the frame and
    inside the box grown to even edges; `luma` and `chroma` the weights there, (h, w) and (h/2, w/2) uint8.
    """

    box: Box
    region: Box
    luma: UInt8Array
    chroma: UInt8Array

    @staticmethod
    def prepare(mask: UInt8Array, box: Box, around: Box, width: int, height: int) -> PastePlan:
        """From the soft mask on blend box `around` and the frame's size (even).

        Outside `box` the mask only mixes the frame with itself, so weights there are dropped.
        """
        full = around.clipped(width, height)
        wanted = _intersection(full, box.clipped(width, height))
        empty = PastePlan(box, Box(0, 0, 0, 0), np.zeros((0, 0), np.uint8), np.zeros((0, 0), np.uint8))
        if wanted.is_empty:
            return empty
        weights = mask[wanted.y0 - around.y0 : wanted.y1 - around.y0, wanted.x0 - around.x0 : wanted.x1 - around.x0]
        rows, columns = np.flatnonzero(weights.any(axis=1)), np.flatnonzero(weights.any(axis=0))
        if len(rows) == 0:
            return empty
        tight = Box(
            wanted.x0 + int(columns[0]),
            wanted.y0 + int(rows[0]),
            wanted.x0 + int(columns[-1]) + 1,
            wanted.y0 + int(rows[-1]) + 1,
        )
        region = tight.evened()
        luma = np.zeros((region.height, region.width), np.uint8)
        place = tight.shifted(-region.x0, -region.y0)
        luma[place.y0 : place.y1, place.x0 : place.x1] = weights[
            tight.y0 - wanted.y0 : tight.y1 - wanted.y0, tight.x0 - wanted.x0 : tight.x1 - wanted.x0
        ]
        chroma = cv2.resize(luma, (region.width // 2, region.height // 2), interpolation=cv2.INTER_AREA)
        return PastePlan(box, region, luma, np.asarray(chroma, np.uint8))

    def faded(self, weight: float) -> PastePlan:
        """The plan with all its weights times `weight`, 0..1: the share of the patch over the source."""
        luma, chroma = (np.rint(mask * np.float32(weight)).astype(np.uint8) for mask in (self.luma, self.chroma))
        return replace(self, luma=luma, chroma=chroma)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The plan as named arrays, `boxes` int64 (2, 4), weights uint8, for the frame store."""
        return {"boxes": np.array([self.box, self.region], np.int64), "luma": self.luma, "chroma": self.chroma}

    @staticmethod
    def from_arrays(named: dict[str, NDArray[Any]]) -> PastePlan:
        """Rebuild the plan from its `arrays`."""
        box, region = (Box(*(int(edge) for edge in row)) for row in named["boxes"])
        return PastePlan(box, region, named["luma"], named["chroma"])


def paste_planes(planes: Planes, plan: PastePlan, patch: UInt8Array, matrix: Matrix) -> None:
    """Paste a BGR patch (256, 256, 3) into the frame's planes, in place, under the plan's mask.

    Samples whose weight is 0 keep their value exactly. The region's edge pixels outside the crop box come from the
    frame itself, so that chroma there is mixed with the real neighbours of the patch.
    """
    if plan.region.is_empty:
        return
    mix_planes(planes, patch_planes(planes, plan, patch, matrix), plan)


def patch_planes(planes: Planes, plan: PastePlan, patch: UInt8Array, matrix: Matrix) -> Planes:
    """The patch as it is in the plan's region, before the mask; what it does not cover there comes from the frame.

    The region must not be empty.
    """
    face = cv2.resize(patch, (plan.box.width, plan.box.height), interpolation=cv2.INTER_LINEAR)
    region, box = plan.region, plan.box
    place = region.shifted(-box.x0, -box.y0)
    if place == place.clipped(box.width, box.height):
        new = np.ascontiguousarray(face[place.y0 : place.y1, place.x0 : place.x1])
    else:
        new = planes_to_bgr(planes, matrix, region)
        inside = place.clipped(box.width, box.height)
        target = inside.shifted(-place.x0, -place.y0)
        new[target.y0 : target.y1, target.x0 : target.x1] = face[inside.y0 : inside.y1, inside.x0 : inside.x1]
    return bgr_to_planes(np.asarray(new, np.uint8), matrix)


def mix_planes(planes: Planes, new: Planes, plan: PastePlan) -> None:
    """Mix `new`, of the region's size, into the frame's planes, in place, under the plan's mask."""
    old = planes.region(plan.region)
    _mix_into(old.y, new.y, plan.luma)
    _mix_into(old.u, new.u, plan.chroma)
    _mix_into(old.v, new.v, plan.chroma)


def _mix_into(old: UInt8Array, new: UInt8Array, weight: UInt8Array) -> None:
    """Mix in place, in 16 bits: 255 * 255 + 128 is the largest sum, and adding its own 256th still fits."""
    weighted: NDArray[np.uint16] = new.astype(np.uint16)
    weighted *= weight
    kept = old.astype(np.uint16)
    kept *= 255 - weight
    weighted += kept
    weighted += 128
    weighted += np.right_shift(weighted, 8, dtype=np.uint16)
    weighted >>= 8
    old[...] = weighted


def _intersection(first: Box, second: Box) -> Box:
    return Box(max(first.x0, second.x0), max(first.y0, second.y0), min(first.x1, second.x1), min(first.y1, second.y1))
