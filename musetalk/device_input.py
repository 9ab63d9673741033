"""Source pictures as the face networks take them, made of their planes by tensor operations, for a GPU.

The same arithmetic as `frames.planes_to_bgr`, OpenCV's `warpAffine` and Pillow's resize, which do this on the CPU: the
planes cross the bus, half the bytes of BGR and a twelfth of normalised pictures, and no CPU touches a pixel.
Knows no networks and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the customary name

from musetalk.device_pixels import _across, _down, _to_levels, _transform, upload
from musetalk.frames import Matrix, Picture, Planes, UInt8Array, from_yuv
from musetalk.geometry import Box

# Pillow's fixed point for 8-bit pictures.
_PILLOW_BITS = 22
# Luma (n, h, w) and chroma (n, 2, h/2, w/2), uint8 on a device.
Uploaded = tuple[Tensor, Tensor]


def upload_planes(pictures: Sequence[Planes], device: torch.device) -> Uploaded:
    """The planes of pictures of one size on `device`."""
    # Each by itself: stacked here, megabytes of fresh memory would be touched only to be copied once more.
    luma = torch.stack([upload(planes.y, device) for planes in pictures])
    chroma = [torch.stack([upload(part, device) for part in (planes.u, planes.v)]) for planes in pictures]
    return luma, torch.stack(chroma)


# -- whole pictures ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def to_bgr(uploaded: Uploaded, matrix: Matrix) -> Tensor:
    """BGR uint8 (n, h, w, 3), equal to `planes_to_bgr`."""
    luma, chroma = uploaded
    doubled = _doubled(_doubled_across(chroma))
    return _levels(luma, doubled, matrix)


def _doubled_across(chroma: Tensor) -> Tensor:
    """Chroma (..., w) at twice the columns, times 4: between two samples, three parts of the nearer one."""
    near = chroma.to(torch.int16)
    before = torch.cat([near[..., :1], near[..., :-1]], -1)
    behind = torch.cat([near[..., 1:], near[..., -1:]], -1)
    return torch.stack([3 * near + before, 3 * near + behind], -1).flatten(-2)


def _doubled(across: Tensor) -> Tensor:
    """The same for the rows (..., h, w); back to levels, rounded as OpenCV rounds."""
    above = torch.cat([across[..., :1, :], across[..., :-1, :]], -2)
    below = torch.cat([across[..., 1:, :], across[..., -1:, :]], -2)
    rows = [_mixed_rows(across, above), _mixed_rows(across, below)]
    return torch.stack(rows, -2).flatten(-3, -2)


def _mixed_rows(near: Tensor, far: Tensor) -> Tensor:
    """Three parts of one row and one of another, each shortened on its own; both are times 4."""
    return ((3 * near >> 2) + (far >> 2) + 2) >> 2


def _levels(luma: Tensor, chroma: Tensor, matrix: Matrix) -> Tensor:
    samples = torch.cat([luma[:, None].to(torch.int32), chroma.to(torch.int32)], 1).permute(0, 2, 3, 1)
    return _to_levels(samples, from_yuv(matrix)).to(torch.uint8)


@torch.inference_mode()
def reduced_bgr(uploaded: Uploaded, matrix: Matrix, size: tuple[int, int]) -> Tensor:
    """BGR uint8 (n, h, w, 3) reduced to `size` (width, height) px by means over areas."""
    luma, chroma = uploaded
    wanted = size[1], size[0]
    parts = [F.interpolate(part.float(), size=wanted, mode="area") for part in (luma[:, None], chroma)]
    bgr = _transform(torch.cat(parts, 1).permute(0, 2, 3, 1), from_yuv(matrix))
    return bgr.round().clamp(0, 255).to(torch.uint8)


class PictureInput:
    """Pictures on their way to a device: as planes that become pixels there, or as pixels that OpenCV made."""

    def __init__(self, device: torch.device, takes_planes: bool) -> None:
        """`takes_planes` on a GPU; on a CPU, OpenCV is the faster way."""
        self._device, self._takes_planes = device, takes_planes

    def uploaded(self, pictures: Sequence[Picture]) -> Uploaded | None:
        """The planes of pictures of one size; None where the device takes none or one has none."""
        planes = [picture.planes for picture in pictures if picture.planes is not None]
        if not self._takes_planes or len(planes) < len(pictures):
            return None
        return upload_planes(planes, self._device)

    def bgr(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures of one size as BGR uint8 (n, H, W, 3)."""
        if (uploaded := self.uploaded(pictures)) is not None:
            return to_bgr(uploaded, pictures[0].matrix)
        # Bytes travel to the device, not floats: a quarter of the transfer, and no work per pixel on the CPU.
        return torch.from_numpy(np.stack([picture.bgr for picture in pictures])).to(self._device)

    def reduced(self, picture: Picture, share: float) -> Tensor:
        """A copy of the picture at `share` of its size, BGR uint8 (1, h, w, 3)."""
        width, height = (max(1, round(side * share)) for side in picture.size)
        if (uploaded := self.uploaded([picture])) is not None:
            return reduced_bgr(uploaded, picture.matrix, (width, height))
        copy = cv2.resize(picture.bgr, (width, height), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(np.asarray(copy, np.uint8)[None]).to(self._device)


# -- the pose network's view ------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _sampling(
    n_in: int, n_out: int, factor: float, device: torch.device
) -> tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Along one axis of a picture of `n_in` px, shown in the middle of `n_out` px at `factor` of its size.

    Which output px show it; for each the two samples (their places, and the chroma samples nearest to and second
    nearest to each), whether they are inside, and the second one's share.
    """
    centre = ((np.arange(n_out) - n_out / 2) / factor + n_in / 2).astype(np.float32)
    seen = np.flatnonzero((centre > -1) & (centre < n_in))
    shown = slice(int(seen[0]), int(seen[-1]) + 1)
    first = np.floor(centre[shown]).astype(np.int64)
    samples = np.stack([first, first + 1], 1).ravel()
    is_inside = (samples >= 0) & (samples < n_in)
    places = samples.clip(0, n_in - 1)
    near = places // 2
    far = (near + np.where(places % 2, 1, -1)).clip(0, n_in // 2 - 1)
    arrays = (places, near, far, is_inside, centre[shown] - first.astype(np.float32))
    places_t, near_t, far_t, inside_t, share_t = (torch.from_numpy(array).to(device) for array in arrays)
    return shown, places_t, near_t, far_t, inside_t, share_t


@torch.inference_mode()
def warped_bgr(uploaded: Uploaded, matrix: Matrix, size: tuple[int, int], factor: float) -> Tensor:
    """BGR uint8 (n, h, w, 3) of `size` (width, height) px: the pictures at `factor` in the middle, black around.

    As `warpAffine` shows them, but for the rounding of single levels. Only the samples that are seen are converted.
    """
    luma, chroma = uploaded
    n, height, width = luma.shape
    across, columns, near_c, far_c, column_inside, column_share = _sampling(width, size[0], factor, luma.device)
    down, rows, near_r, far_r, row_inside, row_share = _sampling(height, size[1], factor, luma.device)

    def chroma_rows(picked: Tensor) -> Tensor:
        taken = chroma.index_select(2, picked).to(torch.int16)
        return 3 * taken.index_select(3, near_c) + taken.index_select(3, far_c)

    seen = _levels(
        luma.index_select(1, rows).index_select(2, columns),
        _mixed_rows(chroma_rows(near_r), chroma_rows(far_r)),
        matrix,
    )
    seen = seen.float() * (row_inside[:, None] & column_inside)[..., None]
    corners = seen.view(n, len(row_share), 2, len(column_share), 2, 3)
    share = column_share[:, None]
    lines = corners[..., 0, :] + share * (corners[..., 1, :] - corners[..., 0, :])
    upper, lower = lines[:, :, 0], lines[:, :, 1]
    mixed = upper + row_share[:, None, None] * (lower - upper)
    warped = torch.zeros(n, size[1], size[0], 3, dtype=torch.uint8, device=luma.device)
    warped[:, down, across] = mixed.round().clamp(0, 255).to(torch.uint8)
    return warped


# -- the parser's view ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _pillow_taps(n_in: int, n_out: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """First input sample of each output sample, (n_out,), and the weights from there on, (n_out, k).

    Pillow's bilinear filter, as wide as an output sample where it reduces.
    """
    scale = n_in / n_out
    width = max(scale, 1.0)
    centre = (np.arange(n_out) + 0.5) * scale
    first = np.maximum(0, (centre - width + 0.5).astype(np.int64))
    end = np.minimum(n_in, (centre + width + 0.5).astype(np.int64))
    steps = np.arange(int((end - first).max()))
    weights = np.maximum(0.0, 1 - np.abs((steps + first[:, None] - centre[:, None] + 0.5) / width))
    weights = np.where(steps < (end - first)[:, None], weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return first, (weights * (1 << _PILLOW_BITS) + 0.5).astype(np.int32)


def _square_taps(
    sides: Sequence[int], starts: Sequence[int], lengths: Sequence[int], n_out: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Taps of squares of which only a part is there, from `starts` on, (n, n_out, k) each; the rest is black."""
    all_taps = [_pillow_taps(side, n_out) for side in sides]
    n_taps = max(weights.shape[1] for _, weights in all_taps)
    places = np.zeros((len(sides), n_out, n_taps), np.int64)
    weights = np.zeros(places.shape, np.int32)
    for index, ((first, weight), start, length) in enumerate(zip(all_taps, starts, lengths, strict=True)):
        place = first[:, None] - start + np.arange(weight.shape[1])
        places[index, :, : place.shape[1]] = place.clip(0, length - 1)
        weights[index, :, : place.shape[1]] = np.where((place >= 0) & (place < length), weight, 0)
    return upload(places.astype(np.int16), device).long(), upload(weights, device)


def _pillow(sums: Tensor) -> Tensor:
    return ((sums + (1 << (_PILLOW_BITS - 1))) >> _PILLOW_BITS).clamp(0, 255)


@torch.inference_mode()
def square_pictures(
    frames: Sequence[Planes], squares: Sequence[Box], size_px: int, matrix: Matrix, device: torch.device
) -> Tensor:
    """The squares of frames, black where they leave them, as RGB uint8 (n, size_px, size_px, 3) on `device`.

    Equal to Pillow's antialiased bilinear resize of `crop_for_parsing`. Raises ValueError for an empty square.
    """
    parts: list[Planes] = []
    starts: list[tuple[int, int]] = []
    for planes, square in zip(frames, squares, strict=True):
        if square.is_empty:
            raise ValueError(f"square {tuple(square)} is empty")
        inside = square.clipped(planes.width, planes.height).evened()
        # One chroma sample around, so that colours do not depend on where the cut is; at least one of a square that
        # lies outside, whose samples then get no weight.
        around = _with_room(inside).clipped(planes.width, planes.height)
        if around.is_empty:
            around = Box(0, 0, 2, 2)
        parts.append(planes.region(around))
        starts.append((around.x0 - square.x0, around.y0 - square.y0))
    luma = upload(_stacked([part.y for part in parts]), device)
    chroma = np.stack([_stacked([part.u for part in parts]), _stacked([part.v for part in parts])], 1)
    # Two samples of luma to one of chroma, also in the column and the row that are repeated.
    doubled = _doubled(_doubled_across(upload(chroma, device)))[..., : luma.shape[1], : luma.shape[2]]
    bgr = _levels(luma, doubled, matrix).to(torch.int32)
    inside_taps = [
        _square_taps(
            [square.width for square in squares],
            [start[axis] for start in starts],
            [part.width if axis == 0 else part.height for part in parts],
            size_px,
            device,
        )
        for axis in (0, 1)
    ]
    lines = _pillow(_across(bgr, inside_taps[0]))
    rows = sum(row * weight for row, weight in _down(lines, inside_taps[1]))
    return _pillow(torch.as_tensor(rows)).to(torch.uint8).flip(3)


def _with_room(box: Box) -> Box:
    return Box(box.x0 - 2, box.y0 - 2, box.x1 + 2, box.y1 + 2)


def _stacked(arrays: Sequence[UInt8Array]) -> NDArray[Any]:
    """Arrays of different sizes as one, (n, h, w); the last row and column of a smaller one are repeated once."""
    height, width = (max(array.shape[axis] for array in arrays) for axis in (0, 1))
    stacked = np.zeros((len(arrays), height, width), np.uint8)
    for target, array in zip(stacked, arrays, strict=True):
        rows, columns = array.shape
        target[:rows, :columns] = array
        target[rows : rows + 1, :columns] = array[-1:]
        target[: rows + 1, columns : columns + 1] = target[: rows + 1, columns - 1 : columns]
    return stacked
