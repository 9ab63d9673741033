"""The pixel work around the networks as tensor operations, for a GPU: only a face's region crosses the bus.

The same arithmetic as `generator.crop_patch` and `blending.paste_planes`, which OpenCV does on the CPU, in its fixed
point: weights in 2048ths, sums in whole numbers. Frames of a chunk have regions of different sizes; they are padded to
the largest and computed together. Knows no networks and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from musetalk.blending import PastePlan
from musetalk.devices import sent
from musetalk.frames import Matrix, Planes, UInt8Array, from_yuv, to_yuv
from musetalk.geometry import Box

# One in OpenCV's fixed point for 8-bit pictures.
_ONE = 2048
# Places and weights of the input samples that each output sample is made of.
_Taps = tuple[NDArray[np.int64], NDArray[np.int32]]


# -- resizing by taps -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _linear_taps(n_in: int, n_out: int) -> _Taps:
    """For each of `n_out` samples the two of `n_in` it is made of, and their weights: (n_out, 2) each."""
    # In single precision, as OpenCV has it: the last bit decides about the rounding of a weight.
    centre = ((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int64)
    share = centre - first.astype(np.float32)
    weights = np.rint(np.stack([1 - share, share], 1) * _ONE).astype(np.int32)
    # Beyond the outermost centres both are the edge's own sample.
    return np.stack([first, first + 1], 1).clip(0, n_in - 1), weights


@lru_cache(maxsize=4096)
def _lanczos_taps(n_in: int, n_out: int) -> _Taps:
    """The same for Lanczos with four lobes: sinc(x) sinc(x / 4) at eight samples, normalised, (n_out, 8) each."""
    centre = ((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int64)
    share = centre - first.astype(np.float32)
    steps = np.arange(-3, 5)
    distance = share.astype(np.float64)[:, None] - steps
    # sin(pi x) is the same for all eight but for its sign; at whole samples, where it is 0, one is all there is.
    is_whole = np.abs(distance) < 1e-6
    safe = np.where(is_whole, 1.0, distance)
    weights = np.where(steps % 2, -1.0, 1.0) * np.sin(safe * np.pi / 4) / safe**2
    weights = np.where(is_whole.any(axis=1, keepdims=True), is_whole.astype(float), weights).astype(np.float32)
    weights *= np.float32(1) / weights.sum(axis=1, keepdims=True, dtype=np.float32)
    return (first[:, None] + steps).clip(0, n_in - 1), np.rint(weights * np.float32(_ONE)).astype(np.int32)


def _stack_taps(
    taps: Sequence[_Taps],
    offsets: Sequence[int],
    n_out: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Taps of several frames, (n, n_out, k) each; `offsets` are where each one's samples begin; short ones padded."""
    # Two bytes each over the bus; a region is at most some thousand px wide.
    places = np.zeros((len(taps), n_out, taps[0][0].shape[1]), np.int16)
    weights = np.zeros(places.shape, np.int16)
    for index, ((place, weight), offset) in enumerate(zip(taps, offsets, strict=True)):
        places[index, : len(place)] = place + offset
        weights[index, : len(weight)] = weight
    return upload(places, device).long(), upload(weights, device).to(torch.int32)


def _across(pictures: Tensor, taps: tuple[Tensor, Tensor]) -> Tensor:
    """Weighted sums of columns: (n, h, w, c) int32 -> (n, h, n_out, c) int32, times 2048."""
    places, weights = taps
    n, height, _, channels = pictures.shape
    total: Tensor | None = None
    for tap in range(places.shape[2]):
        column = places[:, None, :, tap, None].expand(n, height, -1, channels)
        part = pictures.gather(2, column) * weights[:, None, :, tap, None]
        total = part if total is None else total + part
    assert total is not None
    return total


def _down(sums: Tensor, taps: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The rows of each tap and their weights: (n, h, w, c) -> k x ((n, n_out, w, c), (n, n_out, 1, 1))."""
    places, weights = taps
    n, _, width, channels = sums.shape
    return [
        (sums.gather(1, places[:, :, None, tap, None].expand(n, -1, width, channels)), weights[:, :, None, tap, None])
        for tap in range(places.shape[2])
    ]


def _linear(pictures: Tensor, columns: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]) -> Tensor:
    """OpenCV's bilinear resize of 8-bit samples: rows are added after each was shortened to 16 bits."""
    total: Tensor | int = 2
    for row, weight in _down(_across(pictures, columns), rows):
        total = total + (((row >> 4) * weight) >> 16)
    return (torch.as_tensor(total) >> 2).clamp(0, 255)


def _lanczos(pictures: Tensor, columns: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]) -> Tensor:
    """OpenCV's Lanczos resize of 8-bit samples: exact sums, rounded once."""
    total: Tensor | int = 1 << 21
    for row, weight in _down(_across(pictures, columns), rows):
        total = total + row * weight
    return (torch.as_tensor(total) >> 22).clamp(0, 255)


# -- planes -----------------------------------------------------------------------------------------------------------


def _padded(planes: Sequence[UInt8Array]) -> NDArray[np.uint8]:
    """Arrays of different sizes as one, (n, h, w), the smaller ones padded with zeros."""
    height, width = (max(plane.shape[axis] for plane in planes) for axis in (0, 1))
    stacked = np.zeros((len(planes), height, width), np.uint8)
    for target, plane in zip(stacked, planes, strict=True):
        target[: plane.shape[0], : plane.shape[1]] = plane
    return stacked


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device; the host does not wait for it to arrive."""
    return sent(torch.from_numpy(array), device)


def _to_levels(samples: Tensor, matrix: NDArray[np.float64]) -> Tensor:
    """A 3x4 colour matrix on 8-bit samples (..., 3) int32, by single products in 1024ths, as OpenCV has it."""
    factors = np.rint(matrix[:, :3] * 1024).astype(int).tolist()
    offsets = np.rint((matrix[:, 3] + 0.5) * 1024).astype(int).tolist()
    one, two, three = samples.unbind(-1)
    rows = [one * a + two * b + three * c + d for (a, b, c), d in zip(factors, offsets, strict=True)]
    return (torch.stack(rows, -1) >> 10).clamp(0, 255)


def _transform(samples: Tensor, matrix: NDArray[np.float64]) -> Tensor:
    """A 3x4 colour matrix on (..., 3) float32; by single products, since a GPU may shorten those of matrices."""
    one, two, three = samples.unbind(-1)
    rows = matrix.astype(np.float32).tolist()
    return torch.stack([one * a + two * b + three * c + d for a, b, c, d in rows], -1)


@torch.inference_mode()
def crop_patches(
    frames: Sequence[Planes], boxes: Sequence[Box], size_px: int, matrix: Matrix, device: torch.device
) -> Tensor:
    """The parts of frames inside their boxes as BGR uint8 (n, size_px, size_px, 3) on `device`.

    Equal to `crop_patch` of `planes_to_bgr` except for the rounding of single samples. Raises ValueError for a box that
    leaves its frame or is empty.
    """
    parts, places = [], []
    for planes, box in zip(frames, boxes, strict=True):
        if box.is_empty or box != box.clipped(planes.width, planes.height):
            raise ValueError(f"crop box {tuple(box)} is empty or outside {planes.width}x{planes.height}")
        even = box.evened()
        # One chroma sample around, as planes_to_bgr takes it, so that colours do not depend on where the cut is.
        around = Box(even.x0 - 2, even.y0 - 2, even.x1 + 2, even.y1 + 2).clipped(planes.width, planes.height)
        parts.append(planes.region(around))
        places.append(box.shifted(-around.x0, -around.y0))
    luma = upload(_padded([part.y for part in parts]), device).to(torch.int32)
    chroma = upload(np.stack([_padded([part.u for part in parts]), _padded([part.v for part in parts])], -1), device)
    n, height, width = luma.shape
    columns = [_linear_taps(part.width // 2, part.width) for part in parts]
    rows = [_linear_taps(part.height // 2, part.height) for part in parts]
    zeros = [0] * n
    doubled = _linear(
        chroma.to(torch.int32), _stack_taps(columns, zeros, width, device), _stack_taps(rows, zeros, height, device)
    )
    bgr = _to_levels(torch.cat([luma[..., None], doubled], -1), from_yuv(matrix))
    columns = [_lanczos_taps(box.width, size_px) for box in places]
    rows = [_lanczos_taps(box.height, size_px) for box in places]
    crops = _lanczos(
        bgr,
        _stack_taps(columns, [box.x0 for box in places], size_px, device),
        _stack_taps(rows, [box.y0 for box in places], size_px, device),
    )
    return crops.to(torch.uint8)


# -- pasting ----------------------------------------------------------------------------------------------------------


def can_paste(plan: PastePlan) -> bool:
    """Whether `paste_regions` can paste this plan: its region is not empty. For an empty one nothing is pasted."""
    return not plan.region.is_empty


def is_inside(plan: PastePlan) -> bool:
    """Whether the region needs no pixel beside the patch; evening moves its edges out by one at most."""
    return plan.region == plan.region.clipped_to(plan.box)


@torch.inference_mode()
def paste_regions(patches: Tensor, plans: Sequence[PastePlan], frames: Sequence[Planes], matrix: Matrix) -> Tensor:
    """Patches uint8 (n, 256, 256, 3) BGR on a device, pasted into the plans' regions of the frames.

    Returns (n, 3h/2, w) uint8 on the same device, h and w those of the largest region: rows of Y, then U and V side by
    side at half the size (`write_region` puts one back). Serves plans that `can_paste` accepts.
    """
    return mix_regions(*patch_regions(patches, plans, frames, matrix), plans, frames)


def patch_regions(
    patches: Tensor, plans: Sequence[PastePlan], frames: Sequence[Planes], matrix: Matrix
) -> tuple[Tensor, Tensor]:
    """Patches as they are in the plans' regions, before the mask: luma (n, h, w), chroma (n, h/2, w/2, 2), levels.

    h and w are those of the largest region.
    """
    device, n = patches.device, len(plans)
    regions = [plan.region for plan in plans]
    height, width = max(region.height for region in regions), max(region.width for region in regions)
    columns, rows = [], []
    for plan in plans:
        place = plan.region.shifted(-plan.box.x0, -plan.box.y0)
        columns.append(_part(_linear_taps(patches.shape[2], plan.box.width), place.x0, place.x1))
        rows.append(_part(_linear_taps(patches.shape[1], plan.box.height), place.y0, place.y1))
    zeros = [0] * n
    face = _linear(
        patches.to(torch.int32),
        _stack_taps(columns, zeros, width, device),
        _stack_taps(rows, zeros, height, device),
    )
    if not all(is_inside(plan) for plan in plans):
        old = [planes.region(plan.region).y for planes, plan in zip(frames, plans, strict=True)]
        old_luma = upload(_padded(old), device)
        face = torch.where(_box_mask(plans, height, width, device), face, _region_bgr(old_luma, plans, frames, matrix))
    yuv = _transform(face.float(), to_yuv(matrix))
    new_luma = yuv[..., 0].round().clamp(0, 255)
    # Means of two by two before rounding, as bgr_to_planes takes them.
    blocks = yuv[..., 1:].reshape(n, height // 2, 2, width // 2, 2, 2)
    return new_luma, blocks.mean(dim=(2, 4)).round().clamp(0, 255)


def mix_regions(luma: Tensor, chroma: Tensor, plans: Sequence[PastePlan], frames: Sequence[Planes]) -> Tensor:
    """Levels of `patch_regions` over the frames under the plans' masks; packed as `paste_regions` returns them."""
    device = luma.device
    old = [planes.region(plan.region) for planes, plan in zip(frames, plans, strict=True)]
    old_luma = upload(_padded([part.y for part in old]), device)
    old_chroma = upload(np.stack([_padded([part.u for part in old]), _padded([part.v for part in old])], -1), device)
    mixed = _mixed(luma, old_luma, upload(_padded([plan.luma for plan in plans]), device))
    weights = upload(_padded([plan.chroma for plan in plans]), device)[..., None]
    halves = _mixed(chroma, old_chroma, weights)
    return torch.cat([mixed, torch.cat([halves[..., 0], halves[..., 1]], 2)], 1)


def _part(taps: _Taps, first: int, end: int) -> _Taps:
    """Taps of the samples first .. end - 1; beside the outermost ones theirs again."""
    chosen = np.arange(first, end).clip(0, len(taps[0]) - 1)
    return taps[0][chosen], taps[1][chosen]


def _box_mask(plans: Sequence[PastePlan], height: int, width: int, device: torch.device) -> Tensor:
    """Where each plan's region is inside its crop box, bool (n, height, width, 1)."""
    boxes = np.array([plan.box.shifted(-plan.region.x0, -plan.region.y0) for plan in plans], np.int32)
    x0, y0, x1, y1 = upload(boxes, device)[:, :, None].unbind(1)
    columns, rows = torch.arange(width, device=device), torch.arange(height, device=device)
    in_columns, in_rows = (columns >= x0) & (columns < x1), (rows >= y0) & (rows < y1)
    return (in_columns[:, None, :] & in_rows[:, :, None])[..., None]


def _region_bgr(luma: Tensor, plans: Sequence[PastePlan], frames: Sequence[Planes], matrix: Matrix) -> Tensor:
    """The frames themselves inside the regions, as `planes_to_bgr` gives them: (n, h, w, 3) int32 BGR.

    `luma` (n, h, w) is that of the regions, padded.
    """
    device, (n, height, width) = luma.device, luma.shape
    parts, columns, rows = [], [], []
    for planes, plan in zip(frames, plans, strict=True):
        region = plan.region
        around = Box(region.x0 - 2, region.y0 - 2, region.x1 + 2, region.y1 + 2).clipped(planes.width, planes.height)
        place = region.shifted(-around.x0, -around.y0)
        parts.append(planes.region(around))
        columns.append(_part(_linear_taps(around.width // 2, around.width), place.x0, place.x1))
        rows.append(_part(_linear_taps(around.height // 2, around.height), place.y0, place.y1))
    chroma = upload(np.stack([_padded([part.u for part in parts]), _padded([part.v for part in parts])], -1), device)
    doubled = _linear(
        chroma.to(torch.int32),
        _stack_taps(columns, [0] * n, width, device),
        _stack_taps(rows, [0] * n, height, device),
    )
    return _to_levels(torch.cat([luma.to(torch.int32)[..., None], doubled], -1), from_yuv(matrix))


def _mixed(new: Tensor, old: Tensor, weight: Tensor) -> Tensor:
    """`blending.mix` in whole numbers."""
    share = weight.to(torch.int32)
    weighted = new.to(torch.int32) * share + old.to(torch.int32) * (255 - share) + 128
    return (((weighted >> 8) + weighted) >> 8).to(torch.uint8)


def write_region(planes: Planes, region: Box, packed: UInt8Array) -> None:
    """Put one picture of `paste_regions`, (3h/2, w), back into a frame's planes."""
    height, width = packed.shape[0] * 2 // 3, packed.shape[1]
    target = planes.region(region)
    target.y[...] = packed[: region.height, : region.width]
    rows = slice(height, height + region.height // 2)
    target.u[...] = packed[rows, : region.width // 2]
    target.v[...] = packed[rows, width // 2 : width // 2 + region.width // 2]
