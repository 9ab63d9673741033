"""How a patch gets into its frame: on the CPU, or behind the networks on their device; with the source's detail or not.

Knows pixels and tensors, no files and no networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from musetalk.avatars import PreparedFace
from musetalk.blending import PastePlan, paste_planes
from musetalk.detail import paste_detailed
from musetalk.device_detail import paste_regions_detailed
from musetalk.device_pixels import can_paste, paste_regions
from musetalk.devices import sent
from musetalk.frames import Matrix, Planes, UInt8Array

Faces = Sequence[tuple[Planes, PreparedFace]]


def paste(planes: Planes, plan: PastePlan, patch: UInt8Array, matrix: Matrix, detail: float) -> None:
    """Put a patch, BGR uint8 (s, s, 3), into its frame in place, with `detail` 0..1 of the source's fine detail."""
    if detail > 0:
        paste_detailed(planes, plan, patch, matrix, detail)
    else:
        paste_planes(planes, plan, patch, matrix)


def device_paste(
    faces: Faces, matrix: Matrix, detail: float, restore: Callable[[Tensor], Tensor] | None
) -> tuple[Callable[[Tensor], Tensor], list[bool]]:
    """A function from the patches of a chunk, uint8 (n, s, s, 3) on a device, to packed regions of the shown faces.

    The flags say which faces are shown; for the others nothing is pasted.
    """
    is_shown = [can_paste(face.plan) for _, face in faces]
    shown = [index for index, shows in enumerate(is_shown) if shows]
    plans, frames = [faces[index][1].plan for index in shown], [faces[index][0] for index in shown]

    def finish(levels: Tensor) -> Tensor:
        if restore is not None:
            levels = restore(levels)
        if not shown:
            return levels[:0]
        if len(shown) < len(levels):
            levels = levels[sent(torch.tensor(shown), levels.device)]
        if detail > 0:
            return paste_regions_detailed(levels, plans, frames, matrix, detail)
        return paste_regions(levels, plans, frames, matrix)

    return finish, is_shown
