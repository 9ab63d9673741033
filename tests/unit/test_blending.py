"""Masks and pasting: what stays untouched, what is mixed how, and how far the planes' paste is from upstream's."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from musetalk import blending
from musetalk.blending import (
    PastePlan,
    blend_mask,
    cheek_zone,
    crop_for_parsing,
    face_mask,
    mix,
    paste_planes,
    paste_reference,
)
from musetalk.frame_store import FrameStore
from musetalk.frames import Matrix, Planes, UInt8Array, bgr_to_planes, planes_to_bgr
from musetalk.geometry import Box, blend_box
from musetalk.options import MaskMode

MATRICES: tuple[Matrix, ...] = ("bt601", "bt709")
MODES: tuple[MaskMode, ...] = ("raw", "neck", "jaw")
every_matrix = pytest.mark.parametrize("matrix", MATRICES)
WIDTH, HEIGHT = 96, 64


def noise(seed: int, *shape: int) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def noisy_planes(seed: int) -> Planes:
    """Planes of any samples, legal or not."""
    half = HEIGHT // 2, WIDTH // 2
    return Planes(noise(seed, HEIGHT, WIDTH), noise(seed + 1, *half), noise(seed + 2, *half))


def natural(seed: int, height: int, width: int) -> UInt8Array:
    """A BGR picture with the strong slow and weak fast changes of a photograph, most of them common to all colours."""
    random = np.random.default_rng(seed)
    levels = np.zeros((height, width, 3))
    for n_cells, strength in ((4, 36.0), (12, 15.0), (40, 5.0), (120, 1.2)):
        rows, columns = (max(2, side * n_cells // max(height, width) + 1) for side in (height, width))
        knots = random.normal(size=(rows, columns, 3))
        levels += strength * cv2.resize(
            0.8 * knots[..., :1] + 0.35 * knots, (width, height), interpolation=cv2.INTER_CUBIC
        )
    return (128 + levels).clip(20, 235).astype(np.uint8)


def skin_labels() -> UInt8Array:
    """An oval of skin with a nose and a mouth, on a neck."""
    labels = np.zeros((512, 512), np.uint8)
    cv2.rectangle(labels, (180, 400), (330, 511), 14, -1)
    cv2.ellipse(labels, (256, 256), (150, 190), 0, 0, 360, 1, -1)
    cv2.ellipse(labels, (256, 250), (25, 40), 0, 0, 360, 10, -1)
    cv2.ellipse(labels, (256, 350), (50, 20), 0, 0, 360, 12, -1)
    return labels


FULL = np.full((512, 512), 255, np.uint8)


@st.composite
def boxes_in_frame(draw: st.DrawFn, width: int = WIDTH, height: int = HEIGHT, margin: int = 0) -> Box:
    """Boxes with at least one pixel in the frame; up to `margin` px of them outside."""
    x0, y0 = draw(st.integers(-margin, width - 1)), draw(st.integers(-margin, height - 1))
    x1 = draw(st.integers(max(x0, 0) + 1, width + margin))
    return Box(x0, y0, x1, draw(st.integers(max(y0, 0) + 1, height + margin)))


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_masks_hold_two_values_and_only_what_the_mode_names(mode: MaskMode) -> None:
    labels = noise(0, 64, 64).repeat(8, axis=0).repeat(8, axis=1) % 19
    mask = face_mask(labels, mode)
    assert mask.shape == (512, 512)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask).tolist()) == {0, 255}
    mouth = np.isin(labels, (11, 12, 13))
    assert mask[mouth].min() == 255
    if mode == "jaw":
        assert not mask[labels == 10].any(), "the nose is never redrawn"
    else:
        named = mouth | (labels == 1) | ((labels == 14) if mode == "neck" else False)
        assert np.array_equal(mask > 0, named)


@pytest.mark.parametrize("mode", MODES)
def test_no_face_gives_an_empty_mask(mode: MaskMode) -> None:
    assert not face_mask(np.full((512, 512), 17, np.uint8), mode).any()


def test_the_jaw_reaches_below_the_skin_where_the_cheeks_are_not() -> None:
    labels = skin_labels()
    grown, raw = face_mask(labels, "jaw") > 0, face_mask(labels, "raw") > 0
    middle = slice(256 - 89, 256 + 90)
    # Nothing of the raw mask between the cheeks is lost, and some rows are won below.
    assert not (raw & ~grown)[:, middle].any()
    assert np.flatnonzero(grown[:, 256])[-1] > np.flatnonzero(raw[:, 256])[-1]


@given(st.integers(0, 600), st.integers(0, 600))
@settings(deadline=None)
def test_cheeks_lie_outside_the_free_zone_its_ends_included(left: int, right: int) -> None:
    zone = cheek_zone(left, right)
    assert [bool(value) for value in zone] == [column <= 256 - left or column >= 256 + right for column in range(512)]


def test_cheek_widths_move_the_border_of_the_jaw() -> None:
    labels = skin_labels()
    narrow, wide = (face_mask(labels, "jaw", width, width) for width in (10, 200))
    assert int((wide > 0).sum()) > int((narrow > 0).sum())


@pytest.mark.parametrize("blur", [0.05, 0.1])
@settings(deadline=None, max_examples=60)
@given(
    box=st.builds(lambda x, y, w, h: Box(x, y, x + w, y + h), *[st.integers(-50, 50)] * 2, *[st.integers(1, 120)] * 2)
)
def test_the_soft_mask_stays_near_the_lower_half_of_the_box(blur: float, box: Box) -> None:
    around = blend_box(box)
    soft = blend_mask(FULL, box, around, blur=blur)
    assert soft.dtype == np.uint8
    assert soft.shape == (around.height, around.width)
    reach = int(blur * around.width // 2 * 2) // 2
    inner = box.shifted(-around.x0, -around.y0)
    top = max(inner.y0, around.height // 2)
    outside = np.ones(soft.shape, bool)
    outside[max(0, top - reach) : inner.y1 + reach, max(0, inner.x0 - reach) : inner.x1 + reach] = False
    assert not soft[outside].any()
    deep = soft[top + reach : inner.y1 - reach, inner.x0 + reach : inner.x1 - reach]
    assert (deep == 255).all()


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_tiny_boxes_have_masks(side: int) -> None:
    box = Box(10, 10, 10 + side, 10 + side)
    soft = blend_mask(FULL, box, blend_box(box))
    assert soft.shape == (blend_box(box).height, blend_box(box).width)
    if side == 1:
        assert soft.size == 0
    elif side > 2:
        assert soft.max() == 255


@pytest.mark.parametrize("around", [Box(5, 5, 5, 5), Box(5, 5, 3, 9), Box(5, 5, 9, 3)])
def test_an_empty_blend_box_has_an_empty_mask(around: Box) -> None:
    assert blend_mask(FULL, Box(4, 4, 8, 8), around).size == 0


def test_a_box_beside_its_blend_box_leaves_the_mask_empty() -> None:
    assert not blend_mask(FULL, Box(100, 100, 120, 120), Box(0, 0, 40, 40)).any()


def slow_soft_mask(labels: UInt8Array, box: Box, around: Box, mode: MaskMode, blur: float) -> UInt8Array:
    """All of the mask, resized and blurred as a whole."""
    mask = Image.fromarray(face_mask(labels, mode)).resize((around.width, around.height))
    kept = np.zeros((around.height, around.width), np.uint8)
    inner = box.shifted(-around.x0, -around.y0).clipped(around.width, around.height)
    rows, columns = slice(max(inner.y0, around.height // 2), inner.y1), slice(inner.x0, inner.x1)
    kept[rows, columns] = np.asarray(mask)[rows, columns]
    kernel = int(blur * around.width // 2 * 2) + 1
    return np.asarray(cv2.GaussianBlur(kept, (kernel, kernel), 0), np.uint8)


@given(st.integers(8, 420), st.integers(8, 420), st.integers(0, 99), st.sampled_from(MODES), st.floats(0.02, 0.3))
@settings(max_examples=40, deadline=None)
def test_the_soft_mask_of_a_part_equals_that_of_the_whole(
    width: int, height: int, seed: int, mode: MaskMode, blur: float
) -> None:
    cells = np.random.default_rng(seed).integers(0, 19, (24, 24), np.uint8)
    labels = np.asarray(cv2.resize(cells, (512, 512), interpolation=cv2.INTER_NEAREST), np.uint8)
    box = Box(seed, 10, seed + width, 10 + height)
    around = blend_box(box)
    got = blending.soft_mask(labels, box, around, mode, blur=blur)
    assert np.array_equal(got, slow_soft_mask(labels, box, around, mode, blur))


def test_an_empty_mask_stays_empty() -> None:
    box = Box(20, 20, 60, 70)
    assert not blend_mask(np.zeros_like(FULL), box, blend_box(box)).any()


@settings(deadline=None)
@given(boxes_in_frame(margin=40))
def test_the_picture_for_parsing_is_the_frame_and_black_beside_it(box: Box) -> None:
    frame, around = np.maximum(noise(1, HEIGHT, WIDTH, 3), 1), blend_box(box)
    square = crop_for_parsing(frame, around)
    assert square.shape == (max(1, around.height), max(1, around.width), 3)
    padded = np.zeros((HEIGHT + 400, WIDTH + 400, 3), np.uint8)
    padded[200 : 200 + HEIGHT, 200 : 200 + WIDTH] = frame
    wanted = padded[200 + around.y0 : 200 + around.y1, 200 + around.x0 : 200 + around.x1]
    if around.is_empty:
        assert not square.any()
    else:
        assert np.array_equal(square, wanted)


# -- mixing -----------------------------------------------------------------------------------------------------------


def test_mixing_in_place_equals_mixing_for_every_pair_and_weight() -> None:
    new, old = (np.ascontiguousarray(grid, np.uint8) for grid in np.mgrid[0:256, 0:256])
    for weight in range(256):
        weights = np.full((256, 256), weight, np.uint8)
        wanted, got = mix(new, old, weights), old.copy()
        blending._mix_into(got, new, weights)
        assert np.array_equal(got, wanted)
        exact = (new.astype(np.float64) * weight + old.astype(np.float64) * (255 - weight)) / 255
        assert np.abs(wanted - exact).max() <= 0.5 + 1e-9


def test_the_ends_of_the_scale_take_one_picture_whole() -> None:
    new, old = noise(0, 40, 50), noise(1, 40, 50)
    assert np.array_equal(mix(new, old, np.zeros((40, 50), np.uint8)), old)
    assert np.array_equal(mix(new, old, np.full((40, 50), 255, np.uint8)), new)
    assert np.array_equal(mix(old, old, noise(2, 40, 50)), old)


# -- pasting in BGR ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(boxes_in_frame(margin=40), st.integers(0, 1000))
def test_pixels_without_weight_keep_their_value_and_the_frame_is_not_changed(box: Box, seed: int) -> None:
    frame, around = noise(seed, HEIGHT, WIDTH, 3), blend_box(box)
    before = frame.copy()
    mask = noise(seed + 1, max(0, around.height), max(0, around.width)) * (
        noise(seed + 2, around.height, around.width) > 100
    )
    pasted = paste_reference(frame, noise(seed + 3, 256, 256, 3), box, mask, around)
    assert np.array_equal(frame, before)
    assert not np.shares_memory(pasted, frame)
    weight = np.zeros((HEIGHT, WIDTH), np.uint8)
    shown = around.clipped(WIDTH, HEIGHT)
    weight[shown.y0 : shown.y1, shown.x0 : shown.x1] = mask[
        shown.y0 - around.y0 : shown.y1 - around.y0, shown.x0 - around.x0 : shown.x1 - around.x0
    ]
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[max(0, box.y0) : max(0, box.y1), max(0, box.x0) : max(0, box.x1)] = True
    untouched = (weight == 0) | ~inside
    assert np.array_equal(pasted[untouched], frame[untouched])


def test_full_weight_shows_the_patch() -> None:
    box = Box(20, 10, 52, 42)
    around = blend_box(box)
    patch = noise(4, 32, 32, 3)
    mask = np.full((around.height, around.width), 255, np.uint8)
    pasted = paste_reference(noise(5, HEIGHT, WIDTH, 3), patch, box, mask, around)
    assert np.array_equal(pasted[10:42, 20:52], patch)


def test_pasting_a_frame_into_itself_changes_nothing() -> None:
    frame, box = noise(6, HEIGHT, WIDTH, 3), Box(11, 5, 60, 50)
    around = blend_box(box)
    mask = noise(7, around.height, around.width)
    assert np.array_equal(paste_reference(frame, frame[5:50, 11:60], box, mask, around), frame)


# -- the plan ---------------------------------------------------------------------------------------------------------


def soft_mask(seed: int, box: Box) -> tuple[UInt8Array, Box]:
    """A mask of blobs on the box's blend box, as parsing and blurring make it."""
    blobs = cv2.resize(noise(seed, 8, 8), (512, 512), interpolation=cv2.INTER_CUBIC)
    around = blend_box(box)
    return blend_mask(np.where(blobs > 90, 255, 0).astype(np.uint8), box, around), around


@settings(deadline=None)
@given(boxes_in_frame(margin=30), st.integers(0, 1000))
def test_a_plan_holds_every_weight_inside_the_box_and_no_other(box: Box, seed: int) -> None:
    mask, around = soft_mask(seed, box)
    plan = PastePlan.prepare(mask, box, around, WIDTH, HEIGHT)
    assert plan.box == box
    region = plan.region
    assert not any(edge % 2 for edge in region)
    assert region == region.clipped(WIDTH, HEIGHT)
    assert plan.luma.shape == (max(0, region.height), max(0, region.width))
    assert plan.chroma.shape == (plan.luma.shape[0] // 2, plan.luma.shape[1] // 2)
    wanted = np.zeros((HEIGHT, WIDTH), np.uint8)
    for y in range(max(0, box.y0, around.y0), min(HEIGHT, box.y1, around.y1)):
        for x in range(max(0, box.x0, around.x0), min(WIDTH, box.x1, around.x1)):
            wanted[y, x] = mask[y - around.y0, x - around.x0]
    got = np.zeros((HEIGHT, WIDTH), np.uint8)
    got[region.y0 : region.y1, region.x0 : region.x1] = plan.luma
    assert np.array_equal(got, wanted)
    if not region.is_empty:
        even = box.evened()
        assert even.x0 <= region.x0 < region.x1 <= even.x1
        assert even.y0 <= region.y0 < region.y1 <= even.y1
        means = plan.luma.reshape(plan.chroma.shape[0], 2, plan.chroma.shape[1], 2).mean(axis=(1, 3))
        assert np.abs(plan.chroma - means).max() <= 0.5


@settings(deadline=None, max_examples=40)
@given(boxes_in_frame(margin=30), st.integers(0, 1000))
def test_a_plan_comes_back_from_its_arrays(box: Box, seed: int) -> None:
    mask, around = soft_mask(seed, box)
    plan = PastePlan.prepare(mask, box, around, WIDTH, HEIGHT)
    back = PastePlan.from_arrays(plan.arrays())
    assert_equal_plans(back, plan)


def assert_equal_plans(got: PastePlan, wanted: PastePlan) -> None:
    assert (got.box, got.region) == (wanted.box, wanted.region)
    assert all(isinstance(edge, int) for edge in (*got.box, *got.region))
    assert np.array_equal(got.luma, wanted.luma)
    assert np.array_equal(got.chroma, wanted.chroma)


@pytest.mark.parametrize("box", [Box(10, 8, 61, 47), Box(200, 200, 230, 230)])
@pytest.mark.parametrize("memory_bytes", [0, 10**6])
def test_a_plan_comes_back_from_the_frame_store(tmp_path: Path, box: Box, memory_bytes: int) -> None:
    mask, around = soft_mask(3, box)
    plan = PastePlan.prepare(mask, box, around, WIDTH, HEIGHT)
    assert plan.region.is_empty == (box.x0 > WIDTH)
    with FrameStore(tmp_path, memory_bytes=memory_bytes, disk_bytes=10**6) as store:
        store.put(0, plan.arrays())
        assert_equal_plans(PastePlan.from_arrays(store.get(0)), plan)


# -- pasting in planes ------------------------------------------------------------------------------------------------


def slow_paste(planes: Planes, plan: PastePlan, patch: UInt8Array, matrix: Matrix) -> Planes:
    """The same over the whole picture: all of it to BGR, the patch in, all of it back, mixed by weights of its size."""
    bgr, box = planes_to_bgr(planes, matrix), plan.box
    face = cv2.resize(patch, (box.width, box.height), interpolation=cv2.INTER_LINEAR)
    shown = box.clipped(planes.width, planes.height)
    bgr[shown.y0 : shown.y1, shown.x0 : shown.x1] = face[
        shown.y0 - box.y0 : shown.y1 - box.y0, shown.x0 - box.x0 : shown.x1 - box.x0
    ]
    new, region = bgr_to_planes(bgr, matrix), plan.region
    luma, chroma = np.zeros_like(planes.y), np.zeros_like(planes.u)
    luma[region.y0 : region.y1, region.x0 : region.x1] = plan.luma
    chroma[region.y0 // 2 : region.y1 // 2, region.x0 // 2 : region.x1 // 2] = plan.chroma
    return Planes(mix(new.y, planes.y, luma), mix(new.u, planes.u, chroma), mix(new.v, planes.v, chroma))


def parts(planes: Planes) -> list[UInt8Array]:
    return [planes.y, planes.u, planes.v]


@every_matrix
@settings(deadline=None, max_examples=80)
@given(box=boxes_in_frame(margin=30), seed=st.integers(0, 1000))
def test_pasting_in_the_region_equals_pasting_in_the_whole_picture(matrix: Matrix, box: Box, seed: int) -> None:
    mask, around = soft_mask(seed, box)
    plan = PastePlan.prepare(mask, box, around, WIDTH, HEIGHT)
    planes, patch = noisy_planes(seed), noise(seed + 9, 32, 32, 3)
    pasted = planes.copy()
    paste_planes(pasted, plan, patch, matrix)
    for got, wanted in zip(parts(pasted), parts(slow_paste(planes, plan, patch, matrix)), strict=True):
        assert np.array_equal(got, wanted)


EDGE_BOXES = [
    Box(0, 0, 41, 33),
    Box(WIDTH - 41, HEIGHT - 33, WIDTH, HEIGHT),
    Box(0, 0, WIDTH, HEIGHT),
    Box(1, 1, WIDTH - 1, HEIGHT - 1),
    Box(33, 21, 34, 60),
    Box(20, 33, 80, 34),
    Box(31, 17, 62, 50),
]


@every_matrix
@pytest.mark.parametrize("box", EDGE_BOXES)
def test_samples_without_weight_are_bit_equal(matrix: Matrix, box: Box) -> None:
    mask, around = soft_mask(1, box)
    plan = PastePlan.prepare(mask, box, around, WIDTH, HEIGHT)
    # All samples differ from what conversion can give, so that one that went through it would show.
    planes = Planes(
        *(np.full_like(plane, value) for plane, value in zip(parts(noisy_planes(0)), (250, 2, 253), strict=True))
    )
    pasted = planes.copy()
    paste_planes(pasted, plan, noise(3, 64, 64, 3), matrix)
    region = plan.region
    for got, old, weights, step in zip(
        parts(pasted), parts(planes), (plan.luma, plan.chroma, plan.chroma), (1, 2, 2), strict=True
    ):
        weight = np.zeros_like(old)
        weight[region.y0 // step : region.y1 // step, region.x0 // step : region.x1 // step] = weights
        assert np.array_equal(got[weight == 0], old[weight == 0])
        assert (got[weight == 255] != old[weight == 255]).all()


def test_an_empty_plan_changes_nothing() -> None:
    box = Box(10, 10, 40, 40)
    around = blend_box(box)
    for mask, where in (
        (np.zeros((around.height, around.width), np.uint8), box),
        (np.full((around.height, around.width), 255, np.uint8), box.shifted(500, 0)),
    ):
        plan = PastePlan.prepare(mask, where, around.shifted(where.x0 - box.x0, 0), WIDTH, HEIGHT)
        assert plan.region.is_empty
        planes = noisy_planes(2)
        paste_planes(planes, plan, noise(3, 32, 32, 3), "bt709")
        assert all(
            np.array_equal(ours, theirs) for ours, theirs in zip(parts(planes), parts(noisy_planes(2)), strict=True)
        )


def test_the_patch_is_not_changed() -> None:
    box = Box(11, 9, 60, 50)
    mask, around = soft_mask(1, box)
    patch = noise(3, 49, 41, 3).transpose(1, 0, 2)
    before = patch.copy()
    paste_planes(noisy_planes(2), PastePlan.prepare(mask, box, around, WIDTH, HEIGHT), patch, "bt709")
    assert np.array_equal(patch, before)


PHOTO = (360, 640)


def photo_plan(seed: int, mode: MaskMode) -> tuple[Planes, PastePlan, UInt8Array, Box]:
    """A natural picture with a face box of its own size and place, its plan, mask and blend box."""
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(90, 240, 2))
    x0, y0 = int(random.integers(0, PHOTO[1] - width)), int(random.integers(0, PHOTO[0] - height))
    box = Box(x0, y0, x0 + width, y0 + height)
    around = blend_box(box)
    mask = blend_mask(face_mask(skin_labels(), mode), box, around)
    planes = bgr_to_planes(natural(seed, *PHOTO), MATRICES[seed % 2])
    return planes, PastePlan.prepare(mask, box, around, PHOTO[1], PHOTO[0]), mask, around


def differences(got: Planes, wanted: Planes, plan: PastePlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of luma and of both chroma planes, where there is weight."""
    first, second = got.region(plan.region), wanted.region(plan.region)
    luma, u, v = (ours.astype(np.int64) - theirs for ours, theirs in zip(parts(first), parts(second), strict=True))
    return luma[plan.luma > 0], np.concatenate([u[plan.chroma > 0], v[plan.chroma > 0]])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(6))
def test_planes_are_pasted_as_upstream_pastes_bgr(seed: int, mode: MaskMode) -> None:
    matrix = MATRICES[seed % 2]
    planes, plan, mask, around = photo_plan(seed, mode)
    patch = natural(seed + 100, 256, 256)
    reference = bgr_to_planes(paste_reference(planes_to_bgr(planes, matrix), patch, plan.box, mask, around), matrix)
    pasted = planes.copy()
    paste_planes(pasted, plan, patch, matrix)
    luma, chroma = differences(pasted, reference, plan)
    changed, _ = differences(pasted, planes, plan)
    assert np.abs(changed).max() > 20, "the patch is another picture"
    # Measured over 32 pastes: luma 1 step at most and 0.08 on average; chroma, whose weights are those of luma averaged
    # before mixing instead of after it, 3 steps at most and 0.10 on average.
    assert np.abs(luma).max() <= 1
    assert np.abs(luma).mean() < 0.12
    assert abs(float(luma.mean())) < 0.02
    assert np.abs(chroma).max() <= 4
    assert np.abs(chroma).mean() < 0.15


@pytest.mark.parametrize("seed", range(6))
def test_a_patch_cut_from_the_frame_itself_leaves_no_trace(seed: int) -> None:
    matrix = MATRICES[seed % 2]
    planes, plan, _, _ = photo_plan(seed, "jaw")
    bgr, box = planes_to_bgr(planes, matrix), plan.box
    pasted = planes.copy()
    paste_planes(pasted, plan, bgr[box.y0 : box.y1, box.x0 : box.x1], matrix)
    luma, chroma = differences(pasted, planes, plan)
    # Colours of these pictures can be shown, so the way to BGR and back gives every luma sample again.
    assert np.abs(luma).max() == 0
    assert np.abs(chroma).max() <= 1
    assert np.abs(chroma).mean() < 0.01
    # Through the network's size and back the picture is resampled, but grows no darker (measured: 0.024 of a step).
    crop = cv2.resize(bgr[box.y0 : box.y1, box.x0 : box.x1], (256, 256), interpolation=cv2.INTER_LANCZOS4)
    paste_planes(pasted, plan, np.asarray(crop, np.uint8), matrix)
    luma, chroma = differences(pasted, planes, plan)
    assert abs(float(luma.mean())) < 0.05
    assert abs(float(chroma.mean())) < 0.05
    assert np.abs(luma).max() <= 2


# -- colours of a small model -----------------------------------------------------------------------------------------


def test_a_patch_of_other_colours_gets_those_of_its_source() -> None:
    random = np.random.default_rng(3)
    source = np.asarray(np.clip(random.normal(120, 6, (96, 96, 3)), 0, 255), np.uint8)
    across = np.linspace(-12, 12, 96)[None, :, None] * np.array([1.0, 0.5, -1.0])
    strange = np.clip(source.astype(np.float64) + np.array([14.0, -9.0, 5.0]) + across, 0, 255).astype(np.uint8)
    # The mouth itself says something: that must not count.
    strange[60:] = 40
    matched = blending.match_colours(strange, blending.colour_band(source))
    kept = slice(29, 53)
    assert np.abs(matched[kept].astype(int) - source[kept].astype(int)).mean() < 0.8
    assert matched[60:].std() > 0
    again = blending.match_colours(source, blending.colour_band(source))
    assert np.array_equal(again, source)
