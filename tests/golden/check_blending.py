"""Blend box, masks and the paste, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from musetalk import blending
from musetalk.geometry import Box, blend_box
from tests.golden.compare import absolute, equal_share

REALTIME_BLUR = 0.1


def check_crop_box(path: Path) -> None:
    """The square around a box, for several growths."""
    data = np.load(path)
    for row, wanted, half in zip(data["boxes"].tolist(), data["crop"].tolist(), data["s"].tolist(), strict=True):
        around = blend_box(Box(*(int(edge) for edge in row[:4])), row[4])
        assert list(around) == wanted
        assert around.width == around.height == 2 * half


def check_face_masks(path: Path) -> None:
    """Kernels, cheek zones and the masks of every mode."""
    data = np.load(path)
    assert equal_share(blending._cone_kernel(), data["kernel"]) == 1.0
    assert equal_share(blending._cheek_kernel(), data["cheek_kernel"]) == 1.0
    for left, right in data["widths"].tolist():
        zone = np.broadcast_to(blending.cheek_zone(left, right), (512, 512))
        assert equal_share(zone, data[f"cheek_mask_{left}_{right}"] > 0) == 1.0
    for index, labels in enumerate(data["parsing"]):
        for mode in ("raw", "neck"):
            mask = blending.face_mask(labels, mode)
            assert equal_share(mask, data[f"mask_{index}_{mode}"]) == 1.0
        for left, right in data["widths"].tolist():
            mask = blending.face_mask(labels, "jaw", left, right)
            assert equal_share(mask, data[f"mask_{index}_jaw_{left}_{right}"]) == 1.0


def check_blend(path: Path) -> None:
    """The pasted frame, offline and in real time, and the mask as the blend shows it."""
    data = np.load(path)
    for index, row in enumerate(data["rows"].tolist()):
        box, around = Box(*row[:4]), Box(*row[4:])
        assert blend_box(box) == around
        image, face = data[f"image{index}"], data[f"face{index}"]
        assert face.shape[:2] == (box.height, box.width)
        mask = blending.blend_mask(data[f"mask512_{index}"], box, around)
        pasted = blending.paste_reference(image, face, box, mask, around)
        assert absolute(pasted, data[f"out{index}"]) == 0
        if f"gen{index}" in data:
            assert (
                absolute(blending.paste_reference(image, data[f"gen{index}"], box, mask, around), data[f"out{index}"])
                <= 1
            )
        white = blending.paste_reference(np.zeros_like(image), np.full_like(face, 255), box, mask, around)
        assert absolute(white[..., 0], data[f"white{index}"]) <= 1
        soft = blending.blend_mask(data[f"mask512_{index}"], box, around, blur=REALTIME_BLUR)
        assert absolute(soft, data[f"rt_mask{index}"]) <= 1
        realtime = blending.paste_reference(image, face, box, data[f"rt_mask{index}"], around)
        assert absolute(realtime, data[f"rt_out{index}"]) == 0
