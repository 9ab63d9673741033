"""Optional restoration of patches by a face restorer that the `spandrel` library loads, steadied over time.

The weights are read by our own reader, so no code stored in them is executed. What the restorer adds to a patch is
smoothed from frame to frame where the patch itself hardly changes, because a restorer invents other pores each time and
lips would tremble. Knows no frames and no masks: the result is a patch like any other, only larger.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from musetalk.errors import WeightsError
from musetalk.weights import loading, read_state

logger = logging.getLogger(__name__)

REQUIREMENTS = "requirements-restorer.txt"
# The restored patch is at most this many times as large as the patch.
_LARGEST_FACTOR = 2
# Share of this frame's addition where the patch stands still; where it changes by `_CHANGED` levels or more it is 1.
_SHARE, _CHANGED = 0.25, 16.0
# The change of a patch is looked at over this many px of it, so that single pixels do not decide.
_LOOK_PX = 9


@dataclass(frozen=True)
class Restorer:
    """A restorer on its device: `network` maps RGB 0..1 (n, 3, h, w) to the same, `scale` times as large.

    `name` is the architecture's; `side_px` rounds the side of a square up to one that the network takes.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    side_px: Callable[[int], int]
    device: torch.device

    @torch.inference_mode()
    def restored(self, patches: Tensor) -> Tensor:
        """RGB 0..1 float (n, 3, s, s) -> restored, float32 (n, 3, t, t), t from s to twice s."""
        side = patches.shape[-1]
        larger = _resized(patches.to(self.device), self.side_px(side))
        result = self.network(larger).float().clamp(0, 1)
        wanted = min(result.shape[-1], _LARGEST_FACTOR * side)
        return result if result.shape[-1] == wanted else _resized(result, wanted)

    def try_out(self, patch_px: int) -> None:
        """Restore a grey patch; raises WeightsError when the result is not a picture."""
        result = self.restored(torch.full((1, 3, patch_px, patch_px), 0.5))
        if result.shape[:2] != (1, 3) or result.shape[-1] < patch_px or not bool(torch.isfinite(result).all()):
            raise WeightsError(f"the restorer ({self.name}) gives no picture for a patch of {patch_px} px")


def load_restorer(path: Path, device: torch.device) -> Restorer:
    """Load a restorer's weights; raises WeightsError for a missing or wrong file, or a missing library."""
    state = read_state(path)
    label = f"MUSETALK_RESTORER ({path.name})"
    if importlib.util.find_spec("spandrel") is None:
        raise WeightsError(f"{label} needs the spandrel library: pip install --no-deps -r {REQUIREMENTS}")
    try:
        with _torchvision():
            import spandrel
    except (ImportError, RuntimeError) as error:
        raise WeightsError(
            f"{label}: spandrel cannot be imported ({error}); pip install --no-deps -r {REQUIREMENTS}"
        ) from None
    try:
        with loading(label):
            model: Any = spandrel.MAIN_REGISTRY.load(state)
    except spandrel.UnsupportedModelError:
        raise WeightsError(f"{label} contains no network that spandrel {spandrel.__version__} knows") from None
    if not isinstance(model, spandrel.ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
        raise WeightsError(f"{label} is {model.architecture.name}, which restores no colour pictures")
    model.to(device).eval()
    logger.info("restorer loaded", extra={"architecture": model.architecture.name, "file": path.name})
    needs = model.size_requirements

    def side_px(side: int) -> int:
        step = int(needs.multiple_of)
        return -(-max(side, int(needs.minimum)) // step) * step

    return Restorer(model.architecture.name, model, side_px, device)


@contextmanager
def _torchvision() -> Iterator[None]:
    """The few names of torchvision that spandrel imports, where torchvision is not installed.

    A torchvision built for another torch would stop diffusers from being imported, so it is not required.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    functional = ModuleType("torchvision.transforms.functional")
    # Only an inpainting network, which is refused, uses the other two.
    vars(functional).update(normalize=_normalize, InterpolationMode=None, rotate=None)
    stand_ins = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
    stand_ins[functional.__name__] = functional
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


def _normalize(pictures: Tensor, mean: list[float], std: list[float], inplace: bool = False) -> Tensor:
    """Pictures (..., c, h, w) minus the mean, over the deviation, of each channel."""
    mean_, std_ = (torch.tensor(values, dtype=pictures.dtype, device=pictures.device) for values in (mean, std))
    result = (pictures - mean_[:, None, None]) / std_[:, None, None]
    return pictures.copy_(result) if inplace else result


class SteadyRestoration:
    """The restoration of one video's patches, in the order of its frames."""

    def __init__(self, restorer: Restorer, strength: float, *, is_steady: bool = True) -> None:
        """`strength` 0..1; without `is_steady` each frame is for itself."""
        self._restorer, self._strength, self._is_steady = restorer, strength, is_steady
        self._patch: Tensor | None = None
        self._added: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, levels: Tensor) -> Tensor:
        """BGR patches uint8 (n, s, s, 3) of consecutive frames -> uint8 (n, t, t, 3) on the same device."""
        patches = levels.to(self._restorer.device).flip(-1).permute(0, 3, 1, 2).float() / 255
        restored = self._restorer.restored(patches)
        larger = _resized(patches, restored.shape[-1])
        added = restored - larger
        if self._is_steady:
            added = self._steadied(patches, added)
        result = ((larger + self._strength * added).clamp(0, 1) * 255).round().to(torch.uint8)
        return result.flip(1).permute(0, 2, 3, 1).contiguous().to(levels.device)

    def _steadied(self, patches: Tensor, added: Tensor) -> Tensor:
        before, mean, steadied = self._patch, self._added, []
        for patch, addition in zip(patches, added, strict=True):
            if before is None or mean is None:
                mean = addition
            else:
                moved = mean + self._share(patch, before, addition.shape[-1]) * (addition - mean)
                # Chosen on the device: reading the answer here would wait for every frame.
                mean = torch.where(torch.isfinite(mean).all(), moved, addition)
            before = patch
            steadied.append(mean)
        # Kept only here: a batch that did not fit into memory is computed again.
        self._patch, self._added = before, mean
        return torch.stack(steadied)

    @staticmethod
    def _share(patch: Tensor, before: Tensor, side: int) -> Tensor:
        """Share of the new addition for each pixel, (1, side, side)."""
        change = (patch - before).abs().amax(0, keepdim=True)[None] * 255
        change = functional.max_pool2d(change, _LOOK_PX, 1, _LOOK_PX // 2)
        share = (_SHARE + (1 - _SHARE) * change / _CHANGED).clamp(max=1)
        return _resized(share, side)[0]


def _resized(pictures: Tensor, side: int) -> Tensor:
    if pictures.shape[-1] == side:
        return pictures
    is_smaller = side < pictures.shape[-1]
    return functional.interpolate(pictures, (side, side), mode="bilinear", align_corners=False, antialias=is_smaller)
