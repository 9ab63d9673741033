"""Fine detail under the patch as tensor operations, for a GPU: the arithmetic of `musetalk.detail` for a whole chunk.

Regions differ in size; each is extended by its own edge to the size of the largest, so that no frame sees another's
size. Knows no networks and no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from musetalk.blending import PastePlan
from musetalk.detail import AGREE, DIFFER, DetailPlan, is_enlarged, noise_sample, plan_detail, sampling_taps
from musetalk.device_pixels import mix_regions, patch_regions, upload
from musetalk.frames import Matrix, Planes, to_yuv


@torch.inference_mode()
def paste_regions_detailed(
    patches: Tensor, plans: Sequence[PastePlan], frames: Sequence[Planes], matrix: Matrix, strength: float
) -> Tensor:
    """`device_pixels.paste_regions` with the sources' detail by `strength` 0..1; larger patches are made by Lanczos.

    Equal to `detail.paste_detailed` except for the rounding of single samples. Serves plans that `can_paste` accepts.
    """
    luma, chroma = patch_regions(patches, plans, frames, matrix)
    luma = luma.float()
    yuv: Tensor | None = None
    for index, plan in enumerate(plans):
        if is_enlarged(plan, patches.shape[1]):
            yuv = _yuv(patches, matrix) if yuv is None else yuv
            height, width = plan.region.height, plan.region.width
            luma[index, :height, :width] = _sampled(yuv[index, ..., :1], plan, 1)[..., 0]
            half = _sampled(yuv[index, ..., 1:], plan, 2).round().clamp(0, 255)
            chroma[index, : height // 2, : width // 2] = half.to(chroma.dtype)
    details = [
        plan_detail(plan, patches.shape[1], planes.width, planes.height)
        for plan, planes in zip(plans, frames, strict=True)
    ]
    for detail in {(detail.filter_px, detail.cell_px) for detail in details}:
        same = [index for index, other in enumerate(details) if (other.filter_px, other.cell_px) == detail]
        chosen = [details[index] for index in same]
        places = upload(np.array(same), luma.device)
        detailed = _detailed(luma.index_select(0, places), [frames[index] for index in same], chosen, strength)
        luma.index_copy_(0, places, detailed)
    return mix_regions(luma.round().clamp(0, 255), chroma, plans, frames)


def _yuv(patches: Tensor, matrix: Matrix) -> Tensor:
    """BGR uint8 (n, h, w, 3) -> Y, U, V float32, not rounded; by single products, since a GPU may shorten matrices'."""
    one, two, three = patches.float().unbind(-1)
    rows = to_yuv(matrix).astype(np.float32).tolist()
    return torch.stack([one * a + two * b + three * c + d for a, b, c, d in rows], -1)


def _sampled(samples: Tensor, plan: PastePlan, step: int) -> Tensor:
    """Samples (256, 256, c) of a patch as the plan's region shows them, (h / step, w / step, c)."""
    box, place = plan.box, plan.region.shifted(-plan.box.x0, -plan.box.y0)
    down = _weighted(samples, *sampling_taps(samples.shape[0], box.height, place.y0, place.y1, step))
    across = sampling_taps(samples.shape[1], box.width, place.x0, place.x1, step)
    return _weighted(down.transpose(0, 1), *across).transpose(0, 1)


def _weighted(samples: Tensor, places: NDArray[np.int64], weights: NDArray[np.float32]) -> Tensor:
    chosen = samples[upload(places, samples.device)]
    return (chosen * upload(weights, samples.device)[..., None, None]).sum(1)


def _detailed(luma: Tensor, frames: Sequence[Planes], details: Sequence[DetailPlan], strength: float) -> Tensor:
    """`detail.detailed` for regions with the same filter and cell; luma float32 (n, h, w), padded anyhow."""
    device, cell = luma.device, details[0].cell_px
    top, _, left, _ = details[0].padding
    rows, columns = (-(-size // cell) * cell for size in luma.shape[1:])
    old = np.zeros((len(details), rows + 2 * top, columns + 2 * left), np.float32)
    mouth = np.zeros((len(details), old.shape[1] // cell, old.shape[2] // cell), np.float32)
    for index, (planes, detail) in enumerate(zip(frames, details, strict=True)):
        height, width = detail.region.height, detail.region.width
        old[index, :height, :width] = planes.region(detail.region).y
        mouth[index, : detail.mouth.shape[0], : detail.mouth.shape[1]] = detail.mouth
    sizes = [(detail.region.height, detail.region.width) for detail in details]
    source = upload(old, device)
    difference = source[:, : luma.shape[1], : luma.shape[2]] - luma
    padded = _extended(difference, sizes, source.shape[1:], (top, left))
    low = _box(_box(padded, details[0].filter_px), details[0].filter_px)
    cells = functional.avg_pool2d(padded[:, None], cell)[:, 0]
    moved = torch.maximum(_box(cells, 3).abs(), cells.abs() * upload(mouth, device))
    moved = _box(functional.max_pool2d(moved[:, None], 3, 1, 1)[:, 0], 3)
    agreed = ((DIFFER - moved) / (DIFFER - AGREE)).clamp(0, 1)
    weight = functional.interpolate(agreed[:, None], scale_factor=cell, mode="bilinear", align_corners=False)[:, 0]
    inside = slice(None), slice(top, top + luma.shape[1]), slice(left, left + luma.shape[2])
    noise = upload(_noise(frames, details, luma.shape), device)
    return luma + strength * (noise + weight[inside] * (difference - low[inside] - noise))


def _extended(values: Tensor, sizes: list[tuple[int, int]], shape: torch.Size, first: tuple[int, int]) -> Tensor:
    """Pictures (n, h, w) of which `sizes` count, from `first` on in a larger `shape`, their edges repeated around."""
    rows = torch.arange(shape[0], device=values.device) - first[0]
    columns = torch.arange(shape[1], device=values.device) - first[1]
    return torch.stack(
        [
            picture[rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)[None]]
            for picture, (height, width) in zip(values, sizes, strict=True)
        ]
    )


def _box(values: Tensor, side: int) -> Tensor:
    """Means of squares of an odd side, (n, h, w); only the middle is right, the edges have zeros around them."""
    return functional.avg_pool2d(values[:, None], side, 1, side // 2)[:, 0]


def _noise(frames: Sequence[Planes], details: Sequence[DetailPlan], shape: torch.Size) -> NDArray[np.float32]:
    """The samples of noise, spread over regions of one size; where there is none, the zeros leave the weight alone."""
    spread = np.zeros(tuple(shape), np.float32)
    for target, planes, detail in zip(spread, frames, details, strict=True):
        if (noise := noise_sample(planes, detail)) is not None:
            rows, columns = (np.arange(size) for size in target.shape)
            # Back and forth, as OpenCV's BORDER_REFLECT repeats it.
            rows, columns = (
                np.minimum(places % (2 * length), 2 * length - 1 - places % (2 * length))
                for places, length in zip((rows, columns), noise.shape, strict=True)
            )
            target[...] = noise[rows[:, None], columns]
    return spread
