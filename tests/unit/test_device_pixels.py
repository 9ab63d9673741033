"""Cutting and pasting by tensor operations against the same by OpenCV: never more than one level apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.blending import PastePlan, paste_planes
from musetalk.device_pixels import can_paste, crop_patches, paste_regions, write_region
from musetalk.frames import Matrix, Planes, bgr_to_planes, planes_to_bgr
from musetalk.generator import crop_patch
from musetalk.geometry import Box

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
WIDTH, HEIGHT = 160, 120


def noisy(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Planes:
    """A frame of noise: the hardest case for rounding."""
    rng = np.random.default_rng(seed)
    half = (height // 2, width // 2)
    return Planes(
        rng.integers(0, 256, (height, width), np.uint8),
        rng.integers(0, 256, half, np.uint8),
        rng.integers(0, 256, half, np.uint8),
    )


def smooth(seed: int) -> Planes:
    """A frame as cameras give it, without numbers outside the limits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    picture = np.stack([127 + 100 * np.sin(x / a + y / b) for a, b in rng.uniform(5, 40, (3, 2))], -1)
    return bgr_to_planes(picture.astype(np.uint8), "bt709")


def apart(first: Any, second: Any) -> int:
    return int(np.abs(first.astype(int) - second).max()) if first.size else 0


def boxes(least_px: int, most_px: int) -> st.SearchStrategy[Box]:
    """Boxes inside the frame with sides of `least_px` to `most_px`."""
    sides = st.integers(least_px, most_px)
    corners = (st.integers(0, WIDTH - most_px), st.integers(0, HEIGHT - most_px))
    return st.builds(lambda x, y, w, h: Box(x, y, x + w, y + h), *corners, sides, sides)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@settings(deadline=None, max_examples=40)
@given(
    chosen=st.lists(boxes(1, 40), min_size=1, max_size=4),
    matrix=st.sampled_from(["bt601", "bt709"]),
    size=st.sampled_from([16, 33, 64]),
    draw=st.sampled_from([noisy, smooth]),
)
def test_crops_are_those_of_the_cpu(
    device: torch.device, chosen: list[Box], matrix: Matrix, size: int, draw: Any
) -> None:
    frames = [draw(seed) for seed in range(len(chosen))]
    crops = crop_patches(frames, chosen, size, matrix, device).cpu().numpy()
    for frame, box, crop in zip(frames, chosen, crops, strict=True):
        wanted = crop_patch(planes_to_bgr(frame, matrix), box, size)
        assert apart(crop, wanted) <= 1
        assert (crop != wanted).mean() < 0.001


@pytest.mark.parametrize("box", [Box(0, 0, WIDTH, HEIGHT), Box(0, 0, 5, 7), Box(WIDTH - 9, HEIGHT - 3, WIDTH, HEIGHT)])
def test_crops_at_the_frames_edges(box: Box) -> None:
    frame = noisy(3)
    wanted = crop_patch(planes_to_bgr(frame, "bt709"), box, 256)
    assert apart(crop_patches([frame], [box], 256, "bt709", DEVICES[0])[0].numpy(), wanted) <= 1


@pytest.mark.parametrize("box", [Box(4, 4, 4, 9), Box(-1, 0, 9, 9), Box(0, 0, WIDTH + 1, 9)])
def test_a_box_that_is_empty_or_outside_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match="empty or outside"):
        crop_patches([noisy(1)], [box], 16, "bt709", DEVICES[0])


def plan_of(seed: int, box: Box, *, only_inside: bool = True) -> PastePlan:
    """A plan with random weights everywhere in the box but, if only_inside, its outermost two px."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((box.height, box.width), np.uint8)
    inner = slice(2, -2) if only_inside else slice(None)
    weights[inner, inner] = rng.integers(0, 256, weights[inner, inner].shape, np.uint8)
    return PastePlan.prepare(weights, box, box, WIDTH, HEIGHT)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@settings(deadline=None, max_examples=40)
@given(
    chosen=st.lists(boxes(8, 60), min_size=1, max_size=4),
    matrix=st.sampled_from(["bt601", "bt709"]),
    draw=st.sampled_from([noisy, smooth]),
)
def test_a_pasted_region_is_that_of_the_cpu(device: torch.device, chosen: list[Box], matrix: Matrix, draw: Any) -> None:
    frames = [draw(seed) for seed in range(len(chosen))]
    plans = [plan_of(seed, box) for seed, box in enumerate(chosen)]
    assert all(can_paste(plan) for plan in plans)
    patches = np.random.default_rng(9).integers(0, 256, (len(chosen), 64, 64, 3), np.uint8)
    packed = paste_regions(torch.from_numpy(patches).to(device), plans, frames, matrix).cpu().numpy()
    for frame, plan, patch, region in zip(frames, plans, patches, packed, strict=True):
        wanted, got = frame.copy(), frame.copy()
        paste_planes(wanted, plan, patch, matrix)
        write_region(got, plan.region, region)
        for one, other in ((got.y, wanted.y), (got.u, wanted.u), (got.v, wanted.v)):
            assert apart(one, other) <= 1
            assert (one != other).mean() < 0.02


def test_what_has_no_weight_keeps_its_samples_exactly() -> None:
    frame, box = noisy(5), Box(20, 10, 61, 52)
    plan = plan_of(5, box)
    packed = paste_regions(torch.full((1, 64, 64, 3), 7, dtype=torch.uint8), [plan], [frame], "bt709").numpy()
    after = frame.copy()
    write_region(after, plan.region, packed[0])
    untouched = np.ones(frame.y.shape, bool)
    region = plan.region
    untouched[region.y0 : region.y1, region.x0 : region.x1] = plan.luma == 0
    np.testing.assert_array_equal(after.y[untouched], frame.y[untouched])
    assert (after.y != frame.y).any()


@pytest.mark.parametrize("device", DEVICES, ids=str)
@settings(deadline=None, max_examples=40)
@given(
    chosen=st.lists(boxes(8, 60), min_size=1, max_size=4),
    matrix=st.sampled_from(["bt601", "bt709"]),
    draw=st.sampled_from([noisy, smooth]),
)
def test_boxes_with_odd_edges_are_pasted_on_the_device_too(
    device: torch.device, chosen: list[Box], matrix: Matrix, draw: Any
) -> None:
    """A mask that reaches the box's edges: chroma at odd ones is mixed with the frame's own pixels."""
    frames = [draw(seed) for seed in range(len(chosen))]
    plans = [plan_of(seed, box, only_inside=False) for seed, box in enumerate(chosen)]
    assert all(can_paste(plan) for plan in plans)
    patches = np.random.default_rng(9).integers(0, 256, (len(chosen), 64, 64, 3), np.uint8)
    packed = paste_regions(torch.from_numpy(patches).to(device), plans, frames, matrix).cpu().numpy()
    for frame, plan, patch, region in zip(frames, plans, patches, packed, strict=True):
        wanted, got = frame.copy(), frame.copy()
        paste_planes(wanted, plan, patch, matrix)
        write_region(got, plan.region, region)
        for one, other in ((got.y, wanted.y), (got.u, wanted.u), (got.v, wanted.v)):
            assert apart(one, other) <= 1
            assert (one != other).mean() < 0.02


@pytest.mark.parametrize("box", [Box(0, 0, 31, 33), Box(WIDTH - 31, HEIGHT - 33, WIDTH, HEIGHT), Box(1, 1, 40, 40)])
def test_odd_boxes_at_the_frames_edges_are_pasted_as_on_the_cpu(box: Box) -> None:
    frame, plan = noisy(7), plan_of(7, box, only_inside=False)
    patch = np.random.default_rng(9).integers(0, 256, (64, 64, 3), np.uint8)
    packed = paste_regions(torch.from_numpy(patch)[None], [plan], [frame], "bt709").numpy()
    wanted, got = frame.copy(), frame.copy()
    paste_planes(wanted, plan, patch, "bt709")
    write_region(got, plan.region, packed[0])
    assert max(apart(got.y, wanted.y), apart(got.u, wanted.u), apart(got.v, wanted.v)) <= 1


def test_only_an_empty_region_is_not_pasted_on_the_device() -> None:
    rng = np.random.default_rng(1)
    for seed in range(64):
        x, y, width, height = (int(edge) for edge in rng.integers((0, 0, 20, 20), (80, 60, 60, 60)))
        assert can_paste(plan_of(seed, Box(x, y, x + width, y + height), only_inside=False))
    empty = PastePlan.prepare(np.zeros((20, 20), np.uint8), Box(20, 20, 40, 40), Box(20, 20, 40, 40), WIDTH, HEIGHT)
    assert not can_paste(empty)
