"""Seeded weights: every tensor is drawn on its own from its key, so the order of keys does not matter.

The recipe is that of the golden vectors, so the same function fills the networks of the golden tests and of the tiny
models.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import torch

GAIN_CONV = math.sqrt(2.0)

# S3FD's three L2 normalisations carry a learned scale; these are the sizes it is started with.
_NORM_SCALES = {"conv3_3_norm.weight": 10.0, "conv4_3_norm.weight": 8.0, "conv5_3_norm.weight": 5.0}


def seeded_tensor(key: str, shape: tuple[int, ...], seed: int, gain: float) -> torch.Tensor:
    """The tensor of `shape` that belongs to `key` for this seed; float32 except counters (int64 zeros)."""
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    random = np.random.RandomState((seed * 1000003 + zlib.crc32(key.encode())) % 2**32)
    n_elements = math.prod(shape)
    if last == "running_var":
        values = 0.5 + random.random_sample(n_elements)
    else:
        z = random.standard_normal(n_elements)
        if last in {"running_mean", "beta"}:
            values = 0.1 * z
        elif last == "gamma":
            values = z
        elif len(shape) >= 2:
            values = z * (gain / math.sqrt(math.prod(shape[1:])))
        elif last == "bias":
            values = 0.05 * z
        else:
            values = (1 + 0.1 * z) * _NORM_SCALES.get(key, 1.0)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def seeded_state(
    module: torch.nn.Module, seed: int, gain: float = 1.0, select: Callable[[str], bool] = lambda key: True
) -> dict[str, torch.Tensor]:
    """A full state for `module`: seeded where `select(key)` holds, as it stands elsewhere."""
    return {
        key: seeded_tensor(key, tuple(value.shape), seed, gain) if select(key) else value
        for key, value in module.state_dict().items()
    }


def fill(
    module: torch.nn.Module, seed: int, gain: float = 1.0, select: Callable[[str], bool] = lambda key: True
) -> torch.nn.Module:
    """Load `seeded_state` into `module` and switch it to inference."""
    module.load_state_dict(seeded_state(module, seed, gain, select), strict=True)
    return module.eval()
