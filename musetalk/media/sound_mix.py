"""Many channels to one. Knows no files."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

# Of the channels' mean power (10 dB below): less is left of the mean where channels cancel each other, and of ten or
# more channels that have nothing in common, for which the correlation then finds no opposite.
_CANCELLED = 0.1
# Power below this (-60 dB) decides nothing: noise has no sign.
_QUIET = 1e-6
# A correlation with the loudest channel that is clearly negative.
_OPPOSED = -0.7


class Mixer:
    """Mean of all channels; a channel that is another one inverted is turned round, for else both are silence.

    Signs are those of the sound so far and are kept until the number of channels changes.
    """

    def __init__(self) -> None:
        self._sums: NDArray[np.float64] | None = None
        self.was_needed = False

    def mono(self, samples: Float32Array) -> Float32Array:
        """Mix samples (channels, n) to (1, n)."""
        if len(samples) == 1:
            return samples
        mean: Float32Array = samples.mean(axis=0, keepdims=True, dtype=np.float32)
        signs = self._signs(samples)
        if signs is None:
            return mean
        self.was_needed = True
        mixed: Float32Array = (samples * signs[:, None]).mean(axis=0, keepdims=True, dtype=np.float32)
        return mixed

    def _signs(self, samples: Float32Array) -> NDArray[np.float32] | None:
        """1 or -1 for each channel; None while the plain mean loses nothing."""
        exact = samples.astype(np.float64)
        products = exact @ exact.T / max(1, samples.shape[1])
        if self._sums is None or self._sums.shape != products.shape:
            self._sums = np.zeros_like(products)
        # The products of the last seconds count; of a minute ago they say nothing about who speaks now.
        self._sums = 0.9 * self._sums + products
        power = np.diag(self._sums)
        if power.mean() < _QUIET or self._sums.mean() > _CANCELLED * power.mean():
            return None
        loudest = int(power.argmax())
        scale = np.sqrt(np.maximum(power * power[loudest], 1e-30))
        opposed = self._sums[loudest] / scale < _OPPOSED
        if not opposed.any():
            return None
        signs: NDArray[np.float32] = np.where(opposed, -1, 1).astype(np.float32)
        return signs
