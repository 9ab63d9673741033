"""Fine detail under the patch: what comes back, what must not, and that a device computes the same."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from musetalk.blending import PastePlan, blend_mask, paste_planes
from musetalk.detail import agreement, enlarged_planes, paste_detailed, plan_detail
from musetalk.device_detail import paste_regions_detailed
from musetalk.device_pixels import can_paste, write_region
from musetalk.frames import Planes, bgr_to_planes, planes_to_bgr
from musetalk.generator import crop_patch
from musetalk.geometry import Box, blend_box

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
PATCH_PX = 64
SIZE = 256
BOX = Box(70, 60, 170, 184)
# Where the mouth is in the box, in px of the frame.
MOUTH = (slice(138, 164), slice(100, 140))


def grey(levels: NDArray[np.float64]) -> Planes:
    """A picture without colour, BGR 0..255."""
    return bgr_to_planes(np.repeat(np.clip(levels, 0, 255).astype(np.uint8)[..., None], 3, axis=2), "bt709")


def skin(seed: int = 1, noise: float = 0.0, texture: float = 8.0) -> NDArray[np.float64]:
    """Slow shading with a texture of some px and noise of one."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    fine = cv2.GaussianBlur(rng.normal(0, 1, (SIZE, SIZE)), (0, 0), 0.8)
    shaded: NDArray[np.float64] = (
        150 + 20 * np.sin(x / 40) + 10 * np.cos(y / 35) + texture * fine / fine.std() + rng.normal(0, noise, x.shape)
    )
    return shaded


def plan_for(box: Box = BOX, *, seed: int | None = None) -> PastePlan:
    """The paste of a face at `box`, its mask soft at the edge, or noise."""
    around = blend_box(box)
    mask = blend_mask(np.full((512, 512), 255, np.uint8), box, around)
    if seed is not None:
        mask = np.random.default_rng(seed).integers(0, 256, mask.shape, np.uint8)
    return PastePlan.prepare(mask, box, around, SIZE, SIZE)


def soft_patch(planes: Planes, box: Box = BOX) -> NDArray[np.uint8]:
    """The patch of a network that gives the frame back without anything fine."""
    return softened(crop_patch(planes_to_bgr(planes, "bt709"), box, PATCH_PX), 1.5)


def softened(picture: NDArray[np.uint8], sigma_px: float) -> NDArray[np.uint8]:
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma_px), np.uint8)


def pasted(planes: Planes, plan: PastePlan, patch: NDArray[np.uint8], detail: float | None = None) -> Planes:
    result = planes.copy()
    if detail is None:
        paste_planes(result, plan, patch, "bt709")
    else:
        paste_detailed(result, plan, patch, "bt709", detail)
    return result


def fine(levels: NDArray[np.uint8]) -> NDArray[np.float64]:
    picture = levels.astype(np.float64)
    return picture - cv2.GaussianBlur(picture, (0, 0), 2.0)


def inside(plan: PastePlan) -> tuple[slice, slice]:
    """The middle of the pasted region, where the mask is full."""
    region = plan.region
    return slice(region.y0 + 14, region.y1 - 14), slice(region.x0 + 14, region.x1 - 14)


def test_the_skin_comes_back_where_the_patch_only_lost_it() -> None:
    planes, plan = grey(skin()), plan_for()
    patch = soft_patch(planes)
    place = inside(plan)
    energies = [(fine(picture.y)[place] ** 2).mean() for picture in (planes, pasted(planes, plan, patch))]
    assert energies[1] < 0.3 * energies[0]
    detailed = pasted(planes, plan, patch, 1.0)
    assert 0.9 < (fine(detailed.y)[place] ** 2).mean() / energies[0] < 1.1
    assert np.abs(detailed.y[place].astype(float) - planes.y[place]).mean() < 1.0


def test_half_the_strength_gives_half_the_skin_back() -> None:
    planes, plan = grey(skin()), plan_for()
    patch = soft_patch(planes)
    none, half, whole = (pasted(planes, plan, patch, detail).y.astype(float) for detail in (0.0, 0.5, 1.0))
    place = inside(plan)
    assert np.abs((none + whole) / 2 - half)[place].max() <= 1


def test_nothing_of_a_mouth_that_moved_shows() -> None:
    with_teeth = skin(texture=2.0)
    with_teeth[MOUTH] = 60
    with_teeth[MOUTH[0], 100:140:6] = 235
    planes, plan = grey(with_teeth), plan_for()
    opened = skin(texture=2.0)
    opened[MOUTH[0].start - 4 : MOUTH[0].stop + 6, MOUTH[1]] = 30
    patch = soft_patch(grey(opened))
    plain, detailed = pasted(planes, plan, patch), pasted(planes, plan, patch, 1.0)
    apart = detailed.y.astype(float)[MOUTH] - plain.y[MOUTH]
    # Noise as strong as the skin's, and no trace of the columns of teeth.
    assert np.abs(apart).max() <= 8
    teeth = np.where(np.arange(40) % 6 == 0, 1.0, -0.2)
    assert abs(np.corrcoef(apart.mean(axis=0), teeth)[0, 1]) < 0.4


def test_closed_lips_do_not_show_under_an_open_mouth() -> None:
    closed, opened = skin(texture=0.5), skin(texture=0.5)
    closed[148:151, 100:140] = 50
    opened[140:162, 104:136] = 45
    planes, plan = grey(closed), plan_for()
    patch = soft_patch(grey(opened))
    line = (slice(146, 153), slice(106, 134))
    plain, detailed = pasted(planes, plan, patch), pasted(planes, plan, patch, 1.0)
    assert np.abs(detailed.y[line].astype(float) - plain.y[line]).max() <= 2


def test_the_noise_of_the_source_is_matched_where_the_mouth_moved() -> None:
    planes, plan = grey(skin(noise=5.0, texture=0.0)), plan_for()
    opened = skin(texture=0.0)
    opened[MOUTH] = 40
    result = pasted(planes, plan, soft_patch(grey(opened)), 1.0)
    place = (slice(144, 158), slice(106, 134))
    assert 0.7 < fine(result.y)[place].std() / fine(planes.y)[16:60, 90:150].std() < 1.1


def test_what_is_added_is_as_steady_as_the_source() -> None:
    planes, plan = grey(skin(noise=3.0)), plan_for()
    steady = [pasted(planes, plan, soft_patch(planes), 1.0) for _ in range(2)]
    np.testing.assert_array_equal(steady[0].y, steady[1].y)
    frames = [grey(skin(noise=0.0) + np.random.default_rng(seed).normal(0, 2, (SIZE, SIZE))) for seed in range(6)]
    results = [pasted(frame, plan, soft_patch(frame), 1.0) for frame in frames]
    place = inside(plan)

    def flicker(pictures: list[Planes]) -> float:
        levels = np.stack([picture.y[place].astype(float) for picture in pictures])
        return float(np.abs(np.diff(levels, axis=0)).mean())

    assert flicker(results) <= 1.02 * flicker(frames)


def test_samples_without_weight_stay_as_they_are() -> None:
    planes, plan = grey(skin()), plan_for()
    result = pasted(planes, plan, soft_patch(planes), 1.0)
    weights = np.zeros((SIZE, SIZE), np.uint8)
    region = plan.region
    weights[region.y0 : region.y1, region.x0 : region.x1] = plan.luma
    np.testing.assert_array_equal(result.y[weights == 0], planes.y[weights == 0])


def test_a_crop_larger_than_the_patch_is_enlarged_by_lanczos() -> None:
    rng = np.random.default_rng(2)
    patch = softened(rng.integers(0, 256, (PATCH_PX, PATCH_PX, 3), np.uint8), 0.8)
    plan = plan_for()
    luma, u, v = enlarged_planes(patch, plan, "bt709")
    larger = cv2.resize(patch, (BOX.width, BOX.height), interpolation=cv2.INTER_LANCZOS4)
    place = plan.region.shifted(-BOX.x0, -BOX.y0)
    wanted = bgr_to_planes(np.ascontiguousarray(larger[place.y0 : place.y1, place.x0 : place.x1]), "bt709")
    assert np.abs(luma - wanted.y).max() < 2
    assert np.abs(u.astype(int) - wanted.u).mean() < 3
    assert np.abs(v.astype(int) - wanted.v).mean() < 3


def test_agreement_is_the_same_wherever_the_grid_of_cells_begins() -> None:
    """A face that moves by a pixel must not flicker."""
    difference = (skin(3)[:150, :160] - skin(4)[:150, :160]).astype(np.float32)
    difference[50:80, 60:100] += 60
    plan = plan_for()

    def weight(shift: int) -> NDArray[np.float32]:
        box = Box(0, 0, 140, 130)
        detail = plan_detail(PastePlan(box, box, plan.luma, plan.chroma), 140, SIZE, SIZE)
        part = np.ascontiguousarray(difference[shift : shift + 130, shift : shift + 140])
        return agreement(part, detail)[1]

    first, second = weight(0), weight(1)
    assert np.abs(first[21:101, 21:101] - second[20:100, 20:100]).mean() < 0.05


@st.composite
def chunks(draw: st.DrawFn) -> list[tuple[Box, int]]:
    def box() -> Box:
        x0, y0 = draw(st.integers(0, 60)), draw(st.integers(0, 60))
        return Box(x0, y0, x0 + draw(st.integers(24, 180)), y0 + draw(st.integers(24, 180)))

    return [(box(), draw(st.integers(0, 99))) for _ in range(draw(st.integers(1, 3)))]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@settings(deadline=None, max_examples=25)
@example(chunk=[(Box(0, 0, 24, 70), 0), (Box(0, 0, 24, 24), 0)], strength=0.3)
@example(chunk=[(Box(31, 33, 80, 84), 0), (Box(31, 33, 140, 164), 1)], strength=1.0)
@given(chunk=chunks(), strength=st.sampled_from([0.3, 1.0]))
def test_a_device_pastes_the_same_detail(device: torch.device, chunk: list[tuple[Box, int]], strength: float) -> None:
    rng = np.random.default_rng(chunk[0][1])
    frames = [grey(skin(seed, noise=4.0)) for _, seed in chunk]
    plans = [plan_for(box, seed=seed) for box, seed in chunk]
    chosen = [index for index, plan in enumerate(plans) if can_paste(plan)]
    if not chosen:
        return
    frames, plans = [frames[index] for index in chosen], [plans[index] for index in chosen]
    patches = np.stack([softened(rng.integers(0, 256, (64, 64, 3), np.uint8), 2) for _ in plans])
    packed = paste_regions_detailed(torch.from_numpy(patches).to(device), plans, frames, "bt709", strength).cpu()
    for planes, plan, patch, part in zip(frames, plans, patches, packed.numpy(), strict=True):
        here, there = planes.copy(), planes.copy()
        paste_detailed(here, plan, patch, "bt709", strength)
        write_region(there, plan.region, part)
        for mine, other in ((here.y, there.y), (here.u, there.u), (here.v, there.v)):
            assert np.abs(mine.astype(int) - other).max() <= 1
