"""Skin with texture for a drawn person: pores, freckles and stubble, drawn with seeded random numbers.

The texture is part of the head's canvas, so it follows every pose and the jaw. Only evaluation uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from demo.drawing import SCALE, Image
from demo.portrait import HEAD_ORIGIN, Portrait


@dataclass
class TexturedPortrait(Portrait):
    """A person whose skin has pores, freckles and stubble, each by its strength in shares of full brightness."""

    pores: float = 0.02
    freckles: float = 0.10
    stubble: float = 0.12
    seed: int = 5

    def textured(self, colours: Image) -> Image:
        """The head's colours, darker in pores, freckles and stubble."""
        random = np.random.default_rng(self.seed)
        height, width = colours.shape[:2]
        ys, xs = np.mgrid[0:height, 0:width].astype(np.float32) / SCALE
        x, y = xs + HEAD_ORIGIN[0], ys + HEAD_ORIGIN[1]
        skin = np.exp(-((colours - np.asarray(self.identity.skin)) ** 2).sum(axis=2) / 0.08) * (np.abs(x) < 100)
        darker = self.pores * cv2.GaussianBlur(random.normal(0, 1, (height, width)).astype(np.float32), (0, 0), 0.8)
        darker += self.freckles * _spots(random, (height, width), 2200, 1.5) * _near(y, 42, 34)
        beard = _near(y, 112, 26) * (1 - _near(x, 0, 9) * _near(y, 60, 16))
        darker += self.stubble * _spots(random, (height, width), 42_000, 0.55) * beard
        return np.asarray(np.clip(colours - (darker * skin)[..., None], 0, 1), np.float32)


def _near(values: Image, middle: float, reach: float) -> Image:
    return np.asarray(np.exp(-(((values - middle) / reach) ** 2)), np.float32)


def _spots(random: np.random.Generator, shape: tuple[int, int], count: int, radius: float) -> Image:
    """Random dots of about this radius in canvas px, their middles near 1."""
    dots = np.zeros(shape, np.float32)
    np.add.at(dots, tuple(random.integers(0, side, count) for side in shape), random.uniform(0.4, 1.0, count))
    soft = cv2.GaussianBlur(dots, (0, 0), radius)
    return np.asarray(soft * (2 * np.pi * radius**2), np.float32)
