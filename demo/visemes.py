"""Phonemes -> what the mouth does: five values at 50 Hz, from a table of targets smoothed as coarticulation.

`open` 0 shut .. 1 wide open, `wide` -1 rounded .. 1 spread, `lip` lower lip under the teeth (f v), `teeth` clenched
teeth (s z), `tongue` tongue at the teeth (l th). Knows no sound and no picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RATE = 50
NAMES = ("open", "wide", "lip", "teeth", "tongue")
SHUT = (0.0, 0.0, 0.0, 0.0, 0.0)
# Width of the smoothing: reach of a neighbour's shape into a sound.
SMOOTHING_S = 0.032

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Phone:
    """One sound of an utterance: its symbol (IPA or ARPAbet) and when it sounds, in seconds."""

    symbol: str
    start_s: float
    end_s: float


# Symbols (IPA | ARPAbet), target (open, wide, lip, teeth, tongue), weight against its neighbours.
_TABLE: tuple[tuple[str, tuple[float, ...], float], ...] = (
    ("p b m ɓ", (0.0, 0.0, 0.0, 0.0, 0.0), 6.0),
    ("f v ɱ ʋ", (0.12, 0.15, 1.0, 0.0, 0.0), 4.0),
    ("s z ts dz ç", (0.16, 0.45, 0.0, 1.0, 0.0), 2.0),
    ("ʃ ʒ tʃ dʒ ɕ ʂ sh zh ch jh", (0.2, -0.45, 0.0, 0.9, 0.0), 2.0),
    ("θ ð th dh", (0.22, 0.2, 0.0, 0.2, 0.9), 1.6),
    ("l ɫ ɭ ʎ", (0.34, 0.15, 0.0, 0.0, 1.0), 1.2),
    ("t d n ɾ ɲ ɳ ʈ ɖ dx", (0.2, 0.2, 0.0, 0.45, 0.35), 0.8),
    ("k ɡ g ŋ x ɣ q χ ɟ c ng", (0.26, 0.05, 0.0, 0.1, 0.0), 0.6),
    ("h ɦ ʔ hh", (0.34, 0.05, 0.0, 0.0, 0.0), 0.3),
    ("r ɹ ʁ ɻ ʀ ɚ ɝ ɜ er", (0.28, -0.4, 0.0, 0.1, 0.0), 1.0),
    ("w ʍ ɥ", (0.14, -0.95, 0.0, 0.0, 0.0), 2.0),
    ("j y_glide", (0.2, 0.55, 0.0, 0.3, 0.0), 0.8),
    ("i ɪ iy ih ɨ", (0.3, 0.8, 0.0, 0.25, 0.0), 1.2),
    ("e ɛ eɪ ey eh ə_e", (0.5, 0.6, 0.0, 0.1, 0.0), 1.2),
    ("æ ae", (0.78, 0.5, 0.0, 0.0, 0.0), 1.4),
    ("a ɑ aɪ aʊ ʌ ɐ aa ay aw ah", (0.92, 0.1, 0.0, 0.0, 0.0), 1.4),
    ("ɔ ɒ ɔɪ ao oy", (0.72, -0.45, 0.0, 0.0, 0.0), 1.4),
    ("o oʊ əʊ ow ø œ", (0.5, -0.75, 0.0, 0.0, 0.0), 1.4),
    ("u ʊ uw uh y ʉ ɯ", (0.24, -1.0, 0.0, 0.0, 0.0), 1.5),
    ("ə ax ɘ ɵ ɤ", (0.36, 0.0, 0.0, 0.0, 0.0), 0.7),
)
_SOUNDS: dict[str, tuple[tuple[float, ...], float]] = {
    symbol: (target, weight) for symbols, target, weight in _TABLE for symbol in symbols.split()
}
_PAUSES = {"", "pau", "_", "_:", "sil", "ssil", "brth"}


def target_of(symbol: str) -> tuple[tuple[float, ...], float]:
    """Target shape of the mouth in a sound and its weight against neighbours; unknown sounds are a mild opening."""
    plain = re.sub(r"[ˈˌːˑ̩̯̃ʰʲʷ̪̥ˠ\d.ˤ^]", "", symbol).lower()
    if plain in _PAUSES:
        return SHUT, 1.0
    for length in range(min(2, len(plain)), 0, -1):
        if plain[:length] in _SOUNDS:
            return _SOUNDS[plain[:length]]
    return (0.3, 0.0, 0.0, 0.0, 0.0), 0.5


def track(phones: Sequence[Phone], duration_s: float) -> FloatArray:
    """Phones of an utterance -> the mouth (n, 5) at 50 Hz, n = ceil(50 * duration).

    Each millisecond has the weighted target of its sound; a Gaussian mixes neighbours by weight, and sounds that need
    closed lips close them.
    """
    fine = 1000
    n_fine = int(np.ceil(duration_s * fine)) + 1
    values = np.zeros((n_fine, len(NAMES)), np.float64)
    weights = np.full(n_fine, 0.6)
    for phone in phones:
        begin, end = int(phone.start_s * fine), max(int(phone.start_s * fine) + 1, int(phone.end_s * fine))
        target, weight = target_of(phone.symbol)
        values[begin:end] = target
        weights[begin:end] = weight
    reach = np.arange(-150, 151)
    kernel = np.exp(-0.5 * (reach / (SMOOTHING_S * fine)) ** 2)
    mass = np.convolve(weights, kernel, mode="same")
    smooth = np.stack([np.convolve(column * weights, kernel, mode="same") / mass for column in values.T], axis=1)
    n_rows = int(np.ceil(duration_s * RATE))
    # A row's time is its middle, as a Whisper state covers 20 ms.
    middles = np.minimum(((np.arange(n_rows) + 0.5) / RATE * fine).astype(int), n_fine - 1)
    rows: FloatArray = smooth[middles].astype(np.float32)
    return rows
