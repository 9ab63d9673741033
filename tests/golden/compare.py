"""Differences between arrays, as the golden README states its tolerances."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def relative(got: Array, wanted: Array) -> float:
    """Largest difference over the largest value of `wanted`."""
    assert got.shape == wanted.shape, f"shape {got.shape}, wanted {wanted.shape}"
    assert np.isfinite(got).all()
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max()) if wanted.size else 0.0


def absolute(got: Array, wanted: Array) -> float:
    """Largest difference."""
    assert got.shape == wanted.shape, f"shape {got.shape}, wanted {wanted.shape}"
    assert np.isfinite(got).all()
    return float(np.abs(got.astype(np.float64) - wanted).max()) if wanted.size else 0.0


def equal_share(got: Array, wanted: Array) -> float:
    """Share of elements that are equal."""
    assert got.shape == wanted.shape, f"shape {got.shape}, wanted {wanted.shape}"
    return float((got == wanted).mean())


def every(got: Array, wanted: Array) -> Array:
    """`got` thinned out to the shape of `wanted`: the same step along each axis that was stored only in part."""
    steps = []
    for have, want in zip(got.shape, wanted.shape, strict=True):
        step = -(-have // want)
        assert len(range(0, have, step)) == want, f"cannot thin {got.shape} to {wanted.shape}"
        steps.append(slice(None, None, step))
    return got[tuple(steps)]
