"""Planes and BGR: the conversions against the standards' formulas in float64, regions like the whole, edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from musetalk.frames import Matrix, Planes, UInt8Array, bgr_to_planes, black_planes, planes_to_bgr
from musetalk.geometry import Box

MATRICES: tuple[Matrix, ...] = ("bt601", "bt709")
every_matrix = pytest.mark.parametrize("matrix", MATRICES)
Float = NDArray[np.float64]

half_sizes = st.integers(1, 12)


def weights_of(matrix: Matrix) -> tuple[float, float, float]:
    """Kr, Kg, Kb (BT.601-7 2.5.1, BT.709-6 3.2)."""
    return (0.299, 0.587, 0.114) if matrix == "bt601" else (0.2126, 0.7152, 0.0722)


def reference_yuv(bgr: Float, matrix: Matrix) -> Float:
    """Full-range BGR (..., 3) -> limited-range Y, Cb, Cr (..., 3), not rounded: the definition, pixel by pixel."""
    red_weight, green_weight, blue_weight = weights_of(matrix)
    blue, green, red = (bgr[..., index] / 255 for index in range(3))
    luma = red_weight * red + green_weight * green + blue_weight * blue
    cb = (blue - luma) / (2 * (1 - blue_weight))
    cr = (red - luma) / (2 * (1 - red_weight))
    return np.stack([16 + 219 * luma, 128 + 224 * cb, 128 + 224 * cr], axis=-1)


def reference_bgr(yuv: Float, matrix: Matrix) -> Float:
    """The way back (..., 3), not rounded and not clipped."""
    red_weight, green_weight, blue_weight = weights_of(matrix)
    luma, cb, cr = (yuv[..., 0] - 16) / 219, (yuv[..., 1] - 128) / 224, (yuv[..., 2] - 128) / 224
    red, blue = luma + 2 * (1 - red_weight) * cr, luma + 2 * (1 - blue_weight) * cb
    green = (luma - red_weight * red - blue_weight * blue) / green_weight
    return np.stack([blue, green, red], axis=-1) * 255


def doubled(chroma: UInt8Array) -> Float:
    """A chroma plane at twice its size, linear between sample centres, edges repeated; in float64."""

    def along(values: Float, axis: int) -> Float:
        length = values.shape[axis]
        place = (np.arange(2 * length) + 0.5) / 2 - 0.5
        low = np.floor(place).astype(int)
        share = place - low
        shape = [1, 1]
        shape[axis] = -1
        first: Float = np.take(values, low.clip(0, length - 1), axis)
        second: Float = np.take(values, (low + 1).clip(0, length - 1), axis)
        mixed: Float = first * (1 - share).reshape(shape) + second * share.reshape(shape)
        return mixed

    return along(along(chroma.astype(np.float64), 0), 1)


def noise(seed: int, *shape: int) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def noisy_planes(seed: int, half_width: int, half_height: int) -> Planes:
    """Planes of any samples, legal or not."""
    half = half_height, half_width
    return Planes(noise(seed, 2 * half_height, 2 * half_width), noise(seed + 1, *half), noise(seed + 2, *half))


# -- to planes --------------------------------------------------------------------------------------------------------


@every_matrix
@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 10), half_width=half_sizes, half_height=half_sizes)
def test_planes_are_the_rounded_definition(matrix: Matrix, seed: int, half_width: int, half_height: int) -> None:
    bgr = noise(seed, 2 * half_height, 2 * half_width, 3)
    planes = bgr_to_planes(bgr, matrix)
    wanted = reference_yuv(bgr.astype(np.float64), matrix)
    means = wanted.reshape(half_height, 2, half_width, 2, 3).mean(axis=(1, 3))
    for got, exact in ((planes.y, wanted[..., 0]), (planes.u, means[..., 1]), (planes.v, means[..., 2])):
        assert got.dtype == np.uint8
        assert got.flags.c_contiguous
        # Rounded to the nearest: float32 may only decide a tie the other way.
        assert np.abs(got - exact).max() < 0.5 + 1e-3


@pytest.mark.parametrize(
    ("matrix", "bgr", "yuv"),
    [
        ("bt601", (0, 0, 0), (16, 128, 128)),
        ("bt601", (255, 255, 255), (235, 128, 128)),
        ("bt601", (0, 0, 255), (81, 90, 240)),
        ("bt601", (0, 255, 0), (145, 54, 34)),
        ("bt601", (255, 0, 0), (41, 240, 110)),
        ("bt709", (0, 0, 0), (16, 128, 128)),
        ("bt709", (255, 255, 255), (235, 128, 128)),
        ("bt709", (0, 0, 255), (63, 102, 240)),
        ("bt709", (0, 255, 0), (173, 42, 26)),
        ("bt709", (255, 0, 0), (32, 240, 118)),
    ],
)
def test_pure_colours_have_their_published_values(
    matrix: Matrix, bgr: tuple[int, int, int], yuv: tuple[int, int, int]
) -> None:
    planes = bgr_to_planes(np.full((4, 6, 3), bgr, np.uint8), matrix)
    assert {int(value) for value in planes.y.flat} == {yuv[0]}
    assert {int(value) for value in planes.u.flat} == {yuv[1]}
    assert {int(value) for value in planes.v.flat} == {yuv[2]}
    back = planes_to_bgr(planes, matrix)
    assert np.abs(back.astype(int) - bgr).max() <= 2


@every_matrix
def test_chroma_is_averaged_before_it_is_rounded(matrix: Matrix) -> None:
    # Two rows whose chroma lies a little above a whole step on one side and below on the other.
    bgr = np.zeros((2, 2, 3), np.uint8)
    for levels in np.ndindex(8, 8, 8):
        bgr[...] = 100
        bgr[0, 0], bgr[0, 1], bgr[1, 0] = ([100 + level, 100, 100 - level] for level in levels)
        exact = reference_yuv(bgr.astype(np.float64), matrix)[..., 1:].mean(axis=(0, 1))
        planes = bgr_to_planes(bgr, matrix)
        assert abs(float(planes.u[0, 0]) - exact[0]) < 0.5 + 1e-3
        assert abs(float(planes.v[0, 0]) - exact[1]) < 0.5 + 1e-3


@pytest.mark.parametrize("shape", [(3, 4, 3), (4, 3, 3), (1, 1, 3), (0, 4, 3), (4, 0, 3), (0, 0, 3)])
def test_an_odd_or_empty_picture_has_no_planes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs an even size"):
        bgr_to_planes(np.zeros(shape, np.uint8), "bt709")


# -- to BGR -----------------------------------------------------------------------------------------------------------


@every_matrix
@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 10), half_width=half_sizes, half_height=half_sizes)
def test_bgr_is_the_definition_within_the_rounding_of_chroma(
    matrix: Matrix, seed: int, half_width: int, half_height: int
) -> None:
    planes = noisy_planes(seed, half_width, half_height)
    yuv = np.stack([planes.y.astype(np.float64), doubled(planes.u), doubled(planes.v)], axis=-1)
    wanted = reference_bgr(yuv, matrix).clip(0, 255)
    got = planes_to_bgr(planes, matrix)
    # Doubled chroma is rounded to whole steps first: half a step of it is up to 1.06 of blue. Measured: 1.9.
    assert np.abs(got - wanted).max() < 2.1


@every_matrix
def test_bgr_of_flat_chroma_is_the_rounded_definition(matrix: Matrix) -> None:
    for u, v in ((128, 128), (90, 160), (200, 60), (16, 240), (0, 255)):
        luma = np.arange(256, dtype=np.uint8).repeat(4).reshape(256, 4).repeat(2, axis=0)
        planes = Planes(luma, np.full((256, 2), u, np.uint8), np.full((256, 2), v, np.uint8))
        yuv = np.stack([luma, np.full_like(luma, u), np.full_like(luma, v)], axis=-1).astype(np.float64)
        error = planes_to_bgr(planes, matrix) - reference_bgr(yuv, matrix).clip(0, 255)
        # OpenCV's coefficients for bytes have ten bits: up to 0.15 beyond the half step of rounding, next to no bias.
        assert np.abs(error).max() < 0.65
        assert abs(float(error.mean())) < 0.04


@every_matrix
@settings(deadline=None)
@given(data=st.data(), half_width=half_sizes, half_height=half_sizes)
def test_a_region_equals_the_same_pixels_of_the_whole(
    matrix: Matrix, data: st.DataObject, half_width: int, half_height: int
) -> None:
    planes = noisy_planes(data.draw(st.integers(0, 1000)), half_width, half_height)
    x0 = data.draw(st.integers(0, planes.width - 1))
    y0 = data.draw(st.integers(0, planes.height - 1))
    box = Box(x0, y0, data.draw(st.integers(x0 + 1, planes.width)), data.draw(st.integers(y0 + 1, planes.height)))
    part = planes_to_bgr(planes, matrix, box)
    assert part.shape == (box.height, box.width, 3)
    assert np.array_equal(part, planes_to_bgr(planes, matrix)[box.y0 : box.y1, box.x0 : box.x1])


@every_matrix
def test_grey_comes_back_within_a_level(matrix: Matrix) -> None:
    # 256 levels do not fit into 220 steps of luma; half a step is 0.6 levels.
    for level in range(256):
        planes = bgr_to_planes(np.full((2, 2, 3), level, np.uint8), matrix)
        assert planes.u[0, 0] == planes.v[0, 0] == 128
        assert np.abs(planes_to_bgr(planes, matrix).astype(int) - level).max() <= 1


@every_matrix
def test_flat_colours_keep_their_samples_on_the_way_there_and_back(matrix: Matrix) -> None:
    samples = np.stack(np.meshgrid(range(16, 236, 5), range(16, 241, 8), range(16, 241, 8)), -1).reshape(-1, 3)
    exact = reference_bgr(samples.astype(np.float64), matrix)
    shown = samples[((exact >= 0) & (exact <= 255)).all(axis=1)].astype(np.uint8)
    assert len(shown) > 5000
    # One colour for each block of 2x2.
    picture = Planes(shown[:, 0].repeat(2)[None].repeat(2, 0), shown[None, :, 1], shown[None, :, 2])
    changes = []
    for index in range(len(shown)):
        block = picture.region(Box(2 * index, 0, 2 * index + 2, 2))
        back = bgr_to_planes(planes_to_bgr(block, matrix), matrix)
        changes += [
            int(ours[0, 0]) - int(theirs[0, 0])
            for ours, theirs in zip((back.y, back.u, back.v), (block.y, block.u, block.v), strict=True)
        ]
    assert not any(changes)


@pytest.mark.parametrize(
    "box",
    [
        Box(0, 0, 0, 0),
        Box(2, 2, 2, 6),
        Box(5, 5, 3, 3),
        Box(-1, 0, 4, 4),
        Box(0, -2, 4, 4),
        Box(0, 0, 9, 4),
        Box(0, 0, 4, 7),
        Box(20, 20, 30, 30),
    ],
)
def test_a_box_that_is_empty_or_leaves_the_picture_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match="is empty or outside 8x6"):
        planes_to_bgr(black_planes(8, 6), "bt709", box)


# -- planes -----------------------------------------------------------------------------------------------------------


def test_a_region_is_a_view() -> None:
    planes = black_planes(8, 6)
    part = planes.region(Box(2, 4, 6, 6))
    assert (part.width, part.height) == (4, 2)
    part.y[...], part.u[...], part.v[...] = 1, 2, 3
    assert planes.y[4:6, 2:6].tolist() == [[1] * 4] * 2
    assert planes.u[2, 1:3].tolist() == [2, 2]
    assert planes.v[2, 1:3].tolist() == [3, 3]
    assert [int((plane == blank).sum()) for plane, blank in ((planes.y, 16), (planes.u, 128), (planes.v, 128))] == [
        40,
        10,
        10,
    ]


@pytest.mark.parametrize(
    "box", [Box(1, 0, 4, 4), Box(0, 1, 4, 4), Box(0, 0, 3, 4), Box(0, 0, 4, 5), Box(-2, 0, 4, 4), Box(0, 0, 10, 4)]
)
def test_a_region_with_odd_edges_or_outside_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match="is not an even box inside 8x6"):
        black_planes(8, 6).region(box)


def test_a_copy_shares_no_memory() -> None:
    planes = noisy_planes(0, 4, 3)
    copy = planes.copy()
    assert all(
        np.array_equal(ours, theirs) and not np.shares_memory(ours, theirs)
        for ours, theirs in ((planes.y, copy.y), (planes.u, copy.u), (planes.v, copy.v))
    )


@settings(deadline=None)
@given(half_sizes, half_sizes)
def test_sizes_and_bytes_are_those_of_the_planes(half_width: int, half_height: int) -> None:
    planes = black_planes(2 * half_width, 2 * half_height)
    assert (planes.width, planes.height) == (2 * half_width, 2 * half_height)
    assert planes.n_bytes == 6 * half_width * half_height


@every_matrix
def test_black_is_black(matrix: Matrix) -> None:
    assert not planes_to_bgr(black_planes(6, 4), matrix).any()
