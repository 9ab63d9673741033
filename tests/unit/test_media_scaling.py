"""Crop and scale in planes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("factor", [Fraction(1, 2), Fraction(2)])
def test_black_is_not_mixed_into_the_picture(factor: Fraction) -> None:
    grey = Planes(np.full((96, 160), 180, np.uint8), np.full((48, 80), 90, np.uint8), np.full((48, 80), 170, np.uint8))
    size = (int(200 * factor), int(136 * factor))
    padded = media.fit_planes(grey, Box(-20, -24, 180, 112), size)
    inside = (slice(int(24 * factor), int(120 * factor)), slice(int(20 * factor), int(180 * factor)))
    expected = np.full((size[1], size[0]), 16, np.uint8)
    expected[inside] = 180
    assert np.array_equal(padded.y, expected)
    assert set(np.unique(padded.u)) == {90, 128}
    assert set(np.unique(padded.v)) == {128, 170}


def test_a_crop_far_outside_takes_no_more_memory_than_its_output(planes: Planes) -> None:
    # As one canvas this crop would have a hundred billion pixels.
    thin = media.fit_planes(planes, Box(-500_000, -100_000, 500_160, 100_096), (640, 128))
    assert (thin.width, thin.height) == (640, 128)
    assert (thin.y == 16).all()


@settings(max_examples=60, deadline=None)
@given(
    edges=st.tuples(*[st.integers(-60, 120).map(lambda number: number * 2)] * 4),
    size=st.tuples(*[st.integers(1, 100).map(lambda number: number * 2)] * 2),
)
def test_any_window_has_its_size_and_black_only_where_the_picture_ends(
    edges: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    (x0, x1), (y0, y1) = sorted(edges[:2]), sorted(edges[2:])
    crop = Box(x0, y0, x1, y1)
    assume(not crop.is_empty)
    light = Planes(np.full((96, 160), 200, np.uint8), np.full((48, 80), 60, np.uint8), np.full((48, 80), 60, np.uint8))
    fitted = media.fit_planes(light, crop, size)
    assert fitted.y.shape == (size[1], size[0])
    assert fitted.u.shape == fitted.v.shape == (size[1] // 2, size[0] // 2)
    assert all(plane.flags["C_CONTIGUOUS"] for plane in (fitted.y, fitted.u, fitted.v))
    inside = crop.clipped(160, 96)
    share = inside.width * inside.height / (crop.width * crop.height)
    rows = np.flatnonzero((fitted.y == 200).any(axis=1))
    columns = np.flatnonzero((fitted.y == 200).any(axis=0))
    assert np.array_equal(fitted.y == 200, np.outer((fitted.y == 200).any(axis=1), (fitted.y == 200).any(axis=0)))
    assert abs(len(rows) / size[1] * len(columns) / size[0] - share) <= 2 / size[0] + 2 / size[1]
    # The planes agree on where the picture is.
    assert np.array_equal(fitted.u == 60, (fitted.y == 200)[::2, ::2])


def test_shrinking_by_a_whole_number_is_the_mean_of_the_blocks(planes: Planes) -> None:
    small = media.fit_planes(planes, Box(0, 0, 160, 96), (40, 24))
    for plane, original in zip((small.y, small.u, small.v), (planes.y, planes.u, planes.v), strict=True):
        blocks = original.reshape(original.shape[0] // 4, 4, original.shape[1] // 4, 4)
        assert np.abs(plane - blocks.mean(axis=(1, 3))).max() <= 0.5


@pytest.mark.parametrize("size", [(80, 192), (320, 48), (400, 240), (64, 36)])
def test_luma_and_colour_stay_together(size: tuple[int, int]) -> None:
    """An edge that lies at the same place in all planes does so at any size, to half an output pixel."""
    y, chroma = np.full((96, 160), 40, np.uint8), np.full((48, 80), 100, np.uint8)
    y[:, 80:], chroma[:, 40:] = 200, 160
    fitted = media.fit_planes(Planes(y, chroma, chroma.copy()), Box(0, 0, 160, 96), size)
    luma_edge = (200 - fitted.y.astype(float)).clip(0, 160).sum(axis=1) / 160
    chroma_edge = 2 * (160 - fitted.u.astype(float)).clip(0, 60).sum(axis=1) / 60
    assert np.abs(luma_edge - size[0] / 2).max() <= 0.5
    assert np.abs(chroma_edge - size[0] / 2).max() <= 0.5


@pytest.mark.parametrize("size", [(80, 48), (320, 192), (64, 64), (162, 98), (80, 192), (320, 48)])
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
