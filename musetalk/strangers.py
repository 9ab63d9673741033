"""Faces that the demo model was not made for: less is redrawn of them, and what the model loses of them is given back.

The demo's small networks know one drawn portrait well. Of any other face only mouth and chin are redrawn, and the
difference between its crop and what the VAE makes of the crop (colours, shadows, small lines) is added to each patch:
whole where the patch equals the VAE's own picture, softened where the mouth moved. Lips that moved take the colour of
the source's (docs/model.md#strangers).
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
# An ellipse around the mouth, in shares of a crop's sides.
_MOUTH_CENTRE, _MOUTH_RADII = (0.5, 0.74), (0.34, 0.22)
# Inside it lips are redder than skin by at least this much (logarithm), and have at least this share of its light.
_LEAST_REDDER, _LIT = 0.12, 0.4
# Fewer pixels give no colour; and levels that are added so that black has a logarithm too.
_FEWEST_LIP_PX, _DARKEST = 20, 8


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


def lip_colour(crop: UInt8Array, landmarks: NDArray[np.float32], box: Box) -> NDArray[np.float32] | None:
    """Median BGR (3,) of the lips in a crop (s, s, 3) of `box`; None where too few pixels are lip.

    `landmarks` (68, 2) are in px of the frame.
    """
    side = crop.shape[0]
    points = (landmarks.astype(np.float64) - (box.x0, box.y0)) * (side / box.width, side / box.height)
    outline, opening = (np.round(points[part]).astype(np.int32) for part in (slice(48, 60), slice(60, 68)))
    lips = np.zeros((side, side), np.uint8)
    cv2.fillPoly(lips, [outline], 1)
    cv2.fillPoly(lips, [opening], 0)
    pixels = crop[lips > 0]
    return np.median(pixels, axis=0).astype(np.float32) if len(pixels) >= _FEWEST_LIP_PX else None


def give_back(patch: UInt8Array, original: UInt8Array, lips: NDArray[np.float32] | None = None) -> UInt8Array:
    """The patch (h, w, 3) with what the VAE lost of the source; `original` (2, s, s, 3): crop, and the VAE's.

    With `lips`, the source's `lip_colour`, lips that moved take it.
    """
    size = (patch.shape[1], patch.shape[0])
    crop, seen = (cv2.resize(picture, size).astype(np.float32) for picture in original)
    lost = crop - seen
    change = cv2.GaussianBlur(np.abs(patch - seen).max(axis=2), (0, 0), _LOOK_SIGMA)
    share = np.clip((_MOVED - change) / (_MOVED - _SAME), 0, 1)[..., None]
    added = cv2.GaussianBlur(lost, (0, 0), _SOFT_SIGMA)
    if lips is not None:
        # At half the size: colours need no more.
        half = (size[0] // 2, size[1] // 2)
        small = np.asarray(cv2.resize(patch, half, interpolation=cv2.INTER_AREA), np.uint8)
        is_lip = _lip_share(small, cv2.resize(share, half) > 0.5)
        weight = is_lip**2
        if weight.sum() >= _FEWEST_LIP_PX:
            drawn = (small * weight[..., None]).sum(axis=(0, 1)) / weight.sum()
            added += cv2.resize(is_lip, size)[..., None] * (lips - drawn - added)
    whole: UInt8Array = np.clip(np.rint(patch + added + share * (lost - added)), 0, 255).astype(np.uint8)
    return whole


def _lip_share(patch: UInt8Array, still: NDArray[np.bool_]) -> NDArray[np.float32]:
    """How much each pixel of a patch (h, w, 3) is lip, (h, w) 0..1: redder than the `still` skin, and not dark."""
    height, width = patch.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    (across, down), (radius_x, radius_y) = _MOUTH_CENTRE, _MOUTH_RADII
    mouth = ((x / width - across) / radius_x) ** 2 + ((y / height - down) / radius_y) ** 2 < 1
    blue, green, red = np.moveaxis(patch.astype(np.float32) + _DARKEST, 2, 0)
    # Of ratios, because light and shadow change all three by the same factor.
    redness = np.log(red) - (np.log(green) + np.log(blue)) / 2
    luma = 0.114 * blue + 0.587 * green + 0.299 * red
    skin = mouth & still if np.count_nonzero(mouth & still) >= _FEWEST_LIP_PX else mouth
    skin_redness, skin_luma = float(np.median(redness[skin])), float(np.median(luma[skin]))
    lit = mouth & (luma > _LIT * skin_luma)
    if not lit.any():
        return np.zeros((height, width), np.float32)
    most = max(float(np.percentile(redness[lit], 96)) - skin_redness, _LEAST_REDDER)
    # Shares below 0.15 are skin of another shade.
    redder = np.clip((redness - skin_redness) / most - 0.15, 0, 1) / 0.85
    # The dark of an open mouth is red as well.
    light = np.clip((luma / skin_luma - _LIT) / 0.2, 0, 1)
    share = np.where(mouth, redder * light, 0).astype(np.float32)
    return np.clip(cv2.GaussianBlur(share, (0, 0), 1.0), 0, 1)
