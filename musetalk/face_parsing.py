"""The class of each pixel around a face: skin, mouth, nose and so on.

The arithmetic is upstream's (docs/model.md#face-parsing-bisenet), batched. Knows nothing of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from musetalk.frames import UInt8Array

PARSE_PX = 512
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


class FaceParserLike(Protocol):
    """Classify each pixel of a face."""

    def labels(self, crops: Sequence[UInt8Array]) -> NDArray[np.uint8]:
        """Square BGR crops of any sizes -> classes uint8 (n, 512, 512)."""


def parse_picture(crop: UInt8Array) -> UInt8Array:
    """Square BGR crop -> RGB uint8 (512, 512, 3); Pillow's antialiased bilinear resize, as trained.

    Specified in docs/model.md#face-parsing-bisenet.
    """
    rgb = Image.fromarray(np.ascontiguousarray(crop[..., ::-1]))
    return np.asarray(rgb.resize((PARSE_PX, PARSE_PX), Image.Resampling.BILINEAR), np.uint8)


def parse_input(crop: UInt8Array) -> NDArray[np.float32]:
    """Square BGR crop -> normalised RGB (3, 512, 512), as the network reads it."""
    rgb = (parse_picture(crop).astype(np.float32) / np.float32(255) - _MEAN) / _STD
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


class FaceParser:
    """Classify each pixel of a face."""

    def __init__(self, network: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        self._network, self._device, self._dtype = network, device, dtype
        # On the device: a GPU divides by a number of the CPU as a product with its inverse, which rounds differently.
        self._full = torch.tensor(255.0, device=device)
        self._mean, self._std = (torch.from_numpy(values).to(device)[:, None, None] for values in (_MEAN, _STD))

    @torch.inference_mode()
    def labels(self, crops: Sequence[UInt8Array]) -> NDArray[np.uint8]:
        """Square BGR crops of any sizes -> classes uint8 (n, 512, 512)."""
        if not crops:
            return np.zeros((0, PARSE_PX, PARSE_PX), np.uint8)
        # Bytes travel to the device, not floats, and are normalised there.
        return self.classes(torch.from_numpy(np.stack([parse_picture(crop) for crop in crops])).to(self._device))

    @torch.inference_mode()
    def classes(self, pictures: Tensor) -> NDArray[np.uint8]:
        """RGB pictures uint8 (n, 512, 512, 3) on the device -> classes uint8 (n, 512, 512)."""
        scores = self._network(self.normalised(pictures).to(self._dtype))
        # The indices of `max` are those of `argmax`, in a third of its time on a CPU.
        labels: NDArray[np.uint8] = scores.max(dim=1).indices.to(torch.uint8).cpu().numpy()
        return labels

    @torch.inference_mode()
    def normalised(self, pictures: Tensor) -> Tensor:
        """RGB uint8 (n, 512, 512, 3) -> float32 (n, 3, 512, 512), equal to `parse_input` to the last bit."""
        rgb = pictures.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return rgb.div_(self._full).sub_(self._mean).div_(self._std)
