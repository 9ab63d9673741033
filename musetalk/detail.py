"""Fine detail of the source under the patch: skin, stubble and grain come back where the mouth did not move.

The patch has the low frequencies of a face and hardly anything finer. Where source and patch agree in their low
frequencies, the source's high ones replace the patch's; where they differ the mouth moved, and only noise as strong as
the source's is added. In planes, luma only (docs/model.md#detail). Nothing is remembered from frame to frame: the
result is as steady as the source. Knows no networks; `device_detail` has the same arithmetic as tensor operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from musetalk.blending import PastePlan, mix_planes, patch_planes
from musetalk.frames import Matrix, Planes, UInt8Array, to_yuv
from musetalk.geometry import Box

FloatImage = NDArray[np.float32]

# Sides for a patch shown at its own size; they grow with the size at which it is shown, and so does what it lacks.
# Two box filters of 11 px leave 5 % of a period of 8 px. Narrower ones leave steeper slopes of the patch, whose
# rounding to whole levels flickers more.
_FILTER_PX, _CELL_PX = 11, 4
# Cells around the region in which the edge is repeated: what filters, growth and enlargement reach.
MARGIN_CELLS = 4
# Mean difference of luma levels up to which source and patch agree, and from which on they do not.
AGREE, DIFFER = 6.0, 16.0
# Where lips and teeth are in a crop box, in shares of its sides: an ellipse in which single cells count as movement.
_MOUTH_CENTRE, _MOUTH_RADII = (0.5, 0.74), (0.34, 0.19)
# A cheek that speech does not change, in shares of the crop box: the sample of the source's noise.
_CHEEK = (0.14, 0.38, 0.32, 0.54)
_SMALLEST_SAMPLE_PX = 8
# Outputs whose Lanczos weights are one matrix: small, because most of a larger one is zero.
_BLOCK = 64
# Largest amplitude of noise over its mean amplitude: half as much again adds to the mouth's error.
_NOISE_PEAK = 1.5
# Keeps a perfectly flat cell from counting as endless evidence of no noise.
_FLAT = 0.05


@dataclass(frozen=True)
class DetailPlan:
    """Sizes and places for the detail of one frame, in px: the box filter's side, the cell's side.

    `mouth` float32 is the share 0..1 by which each cell, margin included, belongs to the mouth; `cheek` is an even box
    inside the frame, or None where there is no room for a sample.
    """

    region: Box
    filter_px: int
    cell_px: int
    mouth: FloatImage
    cheek: Box | None

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Px to add to the region at its top, bottom, left and right: whole cells, and the margin."""
        margin, cell = MARGIN_CELLS * self.cell_px, self.cell_px
        return margin, margin + -self.region.height % cell, margin, margin + -self.region.width % cell


def plan_detail(plan: PastePlan, patch_px: int, width: int, height: int) -> DetailPlan:
    """The sizes for a patch of `patch_px` pasted by `plan` into a frame of `width` x `height` px."""
    scale = max(1.0, plan.box.width / patch_px, plan.box.height / patch_px)
    cell = round(_CELL_PX * scale)
    return DetailPlan(
        region=plan.region,
        filter_px=2 * round((_FILTER_PX * scale - 1) / 2) + 1,
        cell_px=cell,
        mouth=_mouth_cells(plan, cell),
        cheek=_cheek(plan.box, width, height),
    )


def _mouth_cells(plan: PastePlan, cell: int) -> FloatImage:
    def squares(first: int, length: int, start: int, size: int, centre: float, radius: float) -> FloatImage:
        n_cells = -(-length // cell) + 2 * MARGIN_CELLS
        middles = first - start + (np.arange(n_cells) - MARGIN_CELLS + 0.5) * cell
        return (((middles / size - centre) / radius) ** 2).astype(np.float32)

    box, region = plan.box, plan.region
    across = squares(region.x0, region.width, box.x0, box.width, _MOUTH_CENTRE[0], _MOUTH_RADII[0])
    down = squares(region.y0, region.height, box.y0, box.height, _MOUTH_CENTRE[1], _MOUTH_RADII[1])
    return _float(np.clip(2 - 2 * (down[:, None] + across[None]), 0, 1))


def _cheek(box: Box, width: int, height: int) -> Box | None:
    x0, y0, x1, y1 = (
        int(start + share * size)
        for share, start, size in zip(_CHEEK, (box.x0, box.y0) * 2, (box.width, box.height) * 2, strict=True)
    )
    cheek = Box(x0 - x0 % 2, y0 - y0 % 2, x1 - x1 % 2, y1 - y1 % 2)
    is_inside = cheek == cheek.clipped(width, height)
    return cheek if is_inside and min(cheek.width, cheek.height) >= _SMALLEST_SAMPLE_PX else None


# -- enlarging --------------------------------------------------------------------------------------------------------


def is_enlarged(plan: PastePlan, patch_px: int) -> bool:
    """Whether a patch of `patch_px` is shown larger than it is."""
    return plan.box.width > patch_px or plan.box.height > patch_px


@lru_cache(maxsize=1024)
def sampling_taps(n_in: int, size: int, first: int, end: int, step: int) -> tuple[NDArray[np.int64], FloatImage]:
    """Inputs and weights, (n, k) each, of the samples in px `first` to `end` of a row of `n_in` shown `size` px wide.

    Samples of one px (`step` 1, luma) take eight inputs by Lanczos, those of two px (chroma) two by distance. Outside
    the row the outermost value is repeated.
    """
    middles = np.arange(first, end, step) + step / 2
    centres = middles.clip(0, size) * (n_in / size) - 0.5
    reach = np.arange(-3, 5) if step == 1 else np.arange(2)
    places = np.floor(centres)[:, None] + reach
    distance = centres[:, None] - places
    weights = np.sinc(distance) * np.sinc(distance / 4) if step == 1 else 1 - np.abs(distance)
    weights /= weights.sum(axis=1, keepdims=True)
    return places.clip(0, n_in - 1).astype(np.int64), weights.astype(np.float32)


@lru_cache(maxsize=1024)
def _sampling_blocks(n_in: int, size: int, first: int, end: int, step: int) -> tuple[tuple[int, FloatImage], ...]:
    """The taps as small matrices: the first input that counts, and float32 (outputs, inputs)."""
    places, weights = sampling_taps(n_in, size, first, end, step)
    blocks = []
    for start in range(0, len(places), _BLOCK):
        chosen, values = places[start : start + _BLOCK], weights[start : start + _BLOCK]
        low, high = int(chosen.min()), int(chosen.max()) + 1
        block = np.zeros((len(chosen), high - low), np.float32)
        for tap in range(chosen.shape[1]):
            block[np.arange(len(chosen)), chosen[:, tap] - low] += values[:, tap]
        blocks.append((low, block))
    return tuple(blocks)


def _sampled(samples: FloatImage, plan: PastePlan, step: int) -> FloatImage:
    """Samples (256, 256) of a patch as the plan's region shows them, (h / step, w / step)."""
    box, place = plan.box, plan.region.shifted(-plan.box.x0, -plan.box.y0)
    rows = _sampling_blocks(samples.shape[0], box.height, place.y0, place.y1, step)
    down = np.vstack([block @ samples[low : low + block.shape[1]] for low, block in rows])
    columns = _sampling_blocks(samples.shape[1], box.width, place.x0, place.x1, step)
    return np.hstack([down[:, low : low + block.shape[1]] @ block.T for low, block in columns])


def enlarged_planes(patch: UInt8Array, plan: PastePlan, matrix: Matrix) -> tuple[FloatImage, UInt8Array, UInt8Array]:
    """Y (h, w), not rounded, U and V (h / 2, w / 2) of a BGR patch (256, 256, 3) in the plan's region."""
    pixels, factors = patch.astype(np.float32), to_yuv(matrix).astype(np.float32)
    y, u, v = (
        _sampled(_float(cv2.transform(pixels, factors[row : row + 1])), plan, 1 if row == 0 else 2) for row in range(3)
    )
    return y, rounded(u), rounded(v)


def rounded(samples: FloatImage) -> UInt8Array:
    """Levels 0 to 255, halves to even."""
    return np.asarray(np.clip(np.rint(samples), 0, 255), np.uint8)


# -- on the CPU -------------------------------------------------------------------------------------------------------


def detailed(new: FloatImage, planes: Planes, plan: DetailPlan, strength: float) -> UInt8Array:
    """The patch's luma (h, w) in the plan's region with the detail of the source's `planes`, by `strength` 0..1."""
    old = planes.region(plan.region).y
    high, weight = agreement(_float(cv2.subtract(old, new, dtype=cv2.CV_32F)), plan)
    if (noise := noise_sample(planes, plan)) is None:
        detail = cv2.multiply(high, weight, scale=strength)
    else:
        below, beside = max(0, new.shape[0] - len(noise)), max(0, new.shape[1] - noise.shape[1])
        spread = cv2.copyMakeBorder(noise, 0, below, 0, beside, cv2.BORDER_REFLECT)[: new.shape[0], : new.shape[1]]
        # spread + weight * (high - spread)
        detail = cv2.multiply(cv2.subtract(high, spread), weight, scale=strength)
        cv2.scaleAdd(spread, strength, detail, detail)
    return np.asarray(cv2.add(new, detail, dtype=cv2.CV_8U), np.uint8)


def agreement(difference: FloatImage, plan: DetailPlan) -> tuple[FloatImage, FloatImage]:
    """High frequencies of source minus patch (h, w), and how much source and patch agree there, 0..1."""
    height, width = difference.shape
    padded = cv2.copyMakeBorder(difference, *plan.padding, cv2.BORDER_REPLICATE)
    side = (plan.filter_px, plan.filter_px)
    low = cv2.blur(cv2.blur(padded, side), side)
    size = (padded.shape[1] // plan.cell_px, padded.shape[0] // plan.cell_px)
    cells = cv2.resize(padded, size, interpolation=cv2.INTER_AREA)
    moved = np.maximum(np.abs(cv2.blur(cells, (3, 3))), np.abs(cells) * plan.mouth)
    moved = cv2.blur(cv2.dilate(moved, np.ones((3, 3), np.uint8)), (3, 3))
    agreed = np.clip((DIFFER - moved) / (DIFFER - AGREE), 0, 1)
    weight = cv2.resize(agreed, (padded.shape[1], padded.shape[0]), interpolation=cv2.INTER_LINEAR)
    top, _, left, _ = plan.padding
    inside = slice(top, top + height), slice(left, left + width)
    return np.asarray(cv2.subtract(difference, low[inside]), np.float32), np.asarray(weight[inside], np.float32)


def noise_sample(planes: Planes, plan: DetailPlan) -> FloatImage | None:
    """Noise of the source on a cheek, float32 levels around 0; freckles and stubble are cut to the noise's strength."""
    if plan.cheek is None:
        return None
    sample = planes.region(plan.cheek).y.astype(np.float32)
    side = (plan.filter_px, plan.filter_px)
    high = sample - cv2.blur(cv2.blur(sample, side), side)
    # The harmonic mean follows the flattest places, which show the noise alone.
    peak = _NOISE_PEAK / float(np.mean(1 / (cv2.blur(np.abs(high), (_CELL_PX + 1,) * 2) + _FLAT)))
    return _float(np.clip(high, -peak, peak))


def _float(values: NDArray[Any]) -> FloatImage:
    return np.asarray(values, np.float32)


def paste_detailed(planes: Planes, plan: PastePlan, patch: UInt8Array, matrix: Matrix, strength: float) -> None:
    """`blending.paste_planes` with the source's detail by `strength` 0..1; a larger patch is made by Lanczos."""
    if plan.region.is_empty:
        return
    if is_enlarged(plan, patch.shape[0]):
        luma, u, v = enlarged_planes(patch, plan, matrix)
    else:
        new = patch_planes(planes, plan, patch, matrix)
        luma, u, v = new.y.astype(np.float32), new.u, new.v
    sizes = plan_detail(plan, patch.shape[0], planes.width, planes.height)
    mix_planes(planes, Planes(detailed(luma, planes, sizes, strength), u, v), plan)
