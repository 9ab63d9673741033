"""Faces that the demo model was not made for: less is redrawn of them, and what the model loses of them is given back.

The demo's small networks know one drawn portrait well. Of any other face only mouth and chin are redrawn, and the
difference between its crop and what the VAE makes of the crop (colours, shadows, small lines) is added to each patch:
whole where the patch equals the VAE's own picture, softened where the mouth moved (docs/model.md#strangers).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from musetalk.frames import UInt8Array
from musetalk.geometry import Box

# Colours of the upper half of the demo portrait's crop, BGR, 4 rows of 6; and how far another crop of it may be from
# them. In other poses and light the portrait differs by up to 5 levels, the most similar of six other people by 17.
_PORTRAIT = np.frombuffer(
    bytes.fromhex(
        "485b7ca4bbe0b4cbeca4bce36d83aa283651"  # pragma: allowlist secret
        "89a2cb99b1d6a4bce0a1bae189a2cb738ab5"  # pragma: allowlist secret
        "90aad47d8fa596add196afd778889e86a0cf"  # pragma: allowlist secret
        "99b1dca6bee6a9c3e99fb9e397b0de8ca6d7"  # pragma: allowlist secret
    ),
    np.uint8,
).reshape(4, 6, 3)
_PORTRAIT_LEVELS = 11.0

_LABELS_PX, _SKIN = 512, 1
# Levels between patch and the VAE's own picture up to which nothing moved, and from which on the mouth did.
_SAME, _MOVED = 8.0, 24.0
_LOOK_SIGMA, _SOFT_SIGMA = 3.0, 4.0


def is_demo_portrait(crop: UInt8Array) -> bool:
    """Whether a BGR crop (h, w, 3) shows the portrait that the demo model was made for: eyes, brows and hair decide."""
    upper = crop[: crop.shape[0] // 2].astype(np.float32)
    seen = cv2.resize(upper, (_PORTRAIT.shape[1], _PORTRAIT.shape[0]), interpolation=cv2.INTER_AREA)
    return float(np.abs(seen - _PORTRAIT).mean()) < _PORTRAIT_LEVELS


def mouth_labels(landmarks: NDArray[np.float32], around: Box) -> UInt8Array:
    """Classes uint8 (512, 512) of the blend box: skin (1) around mouth and chin, from 68 landmarks (68, 2) in px."""
    points = landmarks.astype(np.float64)
    middle = points[48:60].mean(axis=0)
    across = (points[54] - points[48]) / 2
    up, down = points[33] - middle, points[8] - middle
    right_half = [
        0.72 * up,
        0.72 * up + 0.9 * across,
        1.75 * across,
        0.5 * down + 1.55 * across,
        0.75 * down + 1.1 * across,
        0.92 * down + 0.5 * across,
        0.92 * down,
    ]
    mirrored = [offset - 2 * across * (offset @ across) / max(1.0, across @ across) for offset in right_half]
    outline = middle + np.array(right_half + mirrored)
    scale = _LABELS_PX / max(1, around.width)
    placed = np.round((outline - (around.x0, around.y0)) * scale).astype(np.int32)
    labels = np.zeros((_LABELS_PX, _LABELS_PX), np.uint8)
    cv2.fillPoly(labels, [cv2.convexHull(placed)], _SKIN)
    return labels


def give_back(patch: UInt8Array, original: UInt8Array) -> UInt8Array:
    """The patch (h, w, 3) with what the VAE lost of the source; `original` (2, s, s, 3): crop, and the VAE's."""
    size = (patch.shape[1], patch.shape[0])
    crop, seen = (cv2.resize(picture, size).astype(np.float32) for picture in original)
    lost = crop - seen
    change = cv2.GaussianBlur(np.abs(patch - seen).max(axis=2), (0, 0), _LOOK_SIGMA)
    share = np.clip((_MOVED - change) / (_MOVED - _SAME), 0, 1)[..., None]
    soft = cv2.GaussianBlur(lost, (0, 0), _SOFT_SIGMA)
    whole: UInt8Array = np.clip(np.rint(patch + soft + share * (lost - soft)), 0, 255).astype(np.uint8)
    return whole
