"""Crop and scale in planes."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk import media
from musetalk.frames import Planes
from musetalk.geometry import Box
from tests.support import clips


@pytest.fixture
def planes() -> Planes:
    return clips.picture_planes(5, 160, 96)


def test_the_whole_at_its_size_is_the_same_object(planes: Planes) -> None:
    assert media.fit_planes(planes, Box(0, 0, 160, 96), (160, 96)) is planes


def test_a_crop_is_exact(planes: Planes) -> None:
    cut = media.fit_planes(planes, Box(20, 10, 100, 60), (80, 50))
    assert np.array_equal(cut.y, planes.y[10:60, 20:100])
    assert np.array_equal(cut.u, planes.u[5:30, 10:50])
    assert cut.y.flags["C_CONTIGUOUS"]


def test_what_lies_outside_is_black(planes: Planes) -> None:
    padded = media.fit_planes(planes, Box(-40, -20, 200, 116), (240, 136))
    assert np.array_equal(padded.y[20:116, 40:200], planes.y)
    assert (padded.y[:20] == 16).all()
    assert (padded.u[:, :20] == 128).all()
    assert (media.fit_planes(planes, Box(200, 0, 240, 40), (40, 40)).y == 16).all()


@pytest.mark.parametrize("size", [(80, 48), (320, 192), (64, 64), (162, 98)])
def test_scaling_keeps_the_picture(planes: Planes, size: tuple[int, int]) -> None:
    scaled = media.fit_planes(planes, Box(0, 0, 160, 96), size)
    assert (scaled.width, scaled.height) == size
    assert scaled.u.shape == (size[1] // 2, size[0] // 2)
    assert clips.read_number(scaled.y) == 5
    for plane, original in zip((scaled.y, scaled.u, scaled.v), (planes.y, planes.u, planes.v), strict=True):
        assert abs(float(plane.mean()) - float(original.mean())) < 1.0


@pytest.mark.parametrize(
    ("crop", "size"),
    [
        (Box(1, 0, 160, 96), (160, 96)),
        (Box(0, 0, 160, 96), (161, 96)),
        (Box(0, 0, 0, 96), (10, 10)),
        (Box(0, 0, 10, 10), (0, 10)),
    ],
)
def test_odd_and_empty_boxes_are_refused(planes: Planes, crop: Box, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="even"):
        media.fit_planes(planes, crop, size)
