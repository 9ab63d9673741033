"""Interval search against the exhaustive one: the same boxes, a fraction of the detector's work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from musetalk import faces
from musetalk.face_search import (
    EveryFrameSearch,
    FrameSearch,
    IntervalSearch,
    beside_no_face,
    interval_for,
    start_search,
)
from musetalk.faces import Face
from musetalk.frames import Picture, black_planes
from tests.support.rendering import SomeFaces
from tests.support.scripted_faces import (
    FLICKERING,
    SIZE,
    SOURCES,
    ScriptedFinder,
    Shown,
    absent,
    face_points,
    planes_of,
    present,
    searched,
)


def exhaustive(script: Sequence[Shown], shift: int = 0) -> list[Face | None]:
    return searched(EveryFrameSearch(ScriptedFinder(script), "bt709", shift), len(script))


def by_intervals(finder: ScriptedFinder, shift: int = 0, interval: int = 16) -> list[Face | None]:
    return searched(IntervalSearch(finder, "bt709", shift, interval), len(finder.script))


def assert_same(found: Face | None, wanted: Face | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert found.box == wanted.box
        assert np.array_equal(found.landmarks, wanted.landmarks)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("interval", [8, 16])
def test_the_interval_search_finds_the_boxes_of_the_exhaustive_one(name: str, interval: int) -> None:
    script = SOURCES[name]
    found = by_intervals(ScriptedFinder(script), 3, interval)
    assert len(found) == len(script)
    for one, wanted in zip(found, exhaustive(script, 3), strict=True):
        assert_same(one, wanted)


def test_a_face_that_the_detector_misses_for_a_frame_stays_where_its_landmarks_are() -> None:
    """The one difference: the exhaustive search has a gap there, which is bridged by guessing the box."""
    found = by_intervals(ScriptedFinder(FLICKERING))
    n_more = 0
    for shown, one, wanted in zip(FLICKERING, found, exhaustive(FLICKERING), strict=True):
        if wanted is not None:
            assert_same(one, wanted)
        elif one is not None:
            n_more += 1
            assert one.box == faces.box_from_landmarks(shown.points.astype(np.int32), one.box)
    assert n_more > 0


def test_the_detector_looks_at_a_face_at_rest_once_and_checks_it_every_sixteenth_picture() -> None:
    finder = ScriptedFinder([present()] * 97)
    assert None not in by_intervals(finder)
    assert finder.looked == [0]
    assert finder.checked == [16, 32, 48, 64, 80, 96]


def test_a_short_absence_is_looked_at_where_the_landmarks_jump() -> None:
    finder = ScriptedFinder(SOURCES["a cut to a room and back"])
    by_intervals(finder)
    assert set(range(33, 40)) <= set(finder.looked)
    assert len(finder.looked) < 25


def test_where_an_end_shows_no_face_every_picture_is_looked_at() -> None:
    finder = ScriptedFinder([present()] * 5 + [absent(number) for number in range(5, 60)])
    by_intervals(finder)
    assert set(range(5, 60)) <= set(finder.looked)
    # No landmarks, no doubt: both neighbours of a gap in the answers decide.
    assert beside_no_face({3: False, 15: True}) == [0, 1, 2, *range(4, 15)]
    assert beside_no_face({15: True}) == []
    assert beside_no_face({15: False}) == list(range(15))


def test_a_check_that_fails_is_decided_by_the_detector_itself() -> None:
    class Unsure(ScriptedFinder):
        def confirms(self, picture: Any, pose: Any) -> float:
            super().confirms(picture, pose)
            return 0.0

    finder = Unsure([present()] * 40)
    assert None not in by_intervals(finder)
    assert finder.looked == [0, 16, 32, 39]


_STATES = st.sampled_from(["face", "nothing", "missed", "guessed", "jump", "faint", "edge"])


def _shown(number: int, state: str) -> Shown:
    place = present(x=160 + number % 7)
    if state == "missed":
        return replace(place, is_detected=False)
    if state == "guessed":
        return replace(absent(number), is_detected=True)
    if state == "jump":
        return present(x=60 + 90 * (number % 2))
    if state == "faint":
        return replace(place, score=0.2)
    if state == "edge":
        return present(x=20)
    return place if state == "face" else absent(number)


@given(st.lists(st.tuples(_STATES, st.integers(1, 25)), min_size=1, max_size=8), st.sampled_from([2, 8, 16]))
@settings(max_examples=60, deadline=None)
def test_whatever_happens_a_face_of_the_exhaustive_search_has_the_same_box(
    runs: list[tuple[str, int]], interval: int
) -> None:
    states = [state for state, length in runs for _ in range(length)]
    script = [_shown(number, state) for number, state in enumerate(states)]
    finder = ScriptedFinder(script)
    found = by_intervals(finder, interval=interval)
    for number, (one, wanted) in enumerate(zip(found, exhaustive(script), strict=True)):
        if wanted is not None or number in finder.looked:
            assert_same(one, wanted)


# -- frames and pictures ----------------------------------------------------------------------------------------------


def test_frames_that_repeat_a_picture_share_its_face() -> None:
    finder = ScriptedFinder([present(x=100 + number) for number in range(40)])
    shown = [number // 3 for number in range(3 * 40)]
    search = FrameSearch(IntervalSearch(finder, "bt709", 0, 8))
    found: list[Face | None] = []
    for frame, number in enumerate(shown):
        found += search.add(planes_of(number), is_repeat=frame > 0 and shown[frame - 1] == number)
    found += search.finish()
    wanted = exhaustive(finder.script)
    assert len(found) == len(shown)
    for frame, number in enumerate(shown):
        assert_same(found[frame], wanted[number])


def test_a_search_that_resumes_gives_repeats_the_last_known_face() -> None:
    finder = ScriptedFinder([present()] * 3)
    known = exhaustive([present(x=70)])
    search = FrameSearch(IntervalSearch(finder, "bt709", 0, 8), known)
    assert search.add(planes_of(0), is_repeat=True) == known
    (face,) = search.add(planes_of(1), is_repeat=False)
    assert_same(face, exhaustive(finder.script)[0])


def test_a_source_without_pictures_has_no_faces() -> None:
    for search in (IntervalSearch(ScriptedFinder([]), "bt709", 0, 8), EveryFrameSearch(SomeFaces(), "bt709", 0)):
        assert search.finish() == []


def test_a_finder_of_one_part_looks_at_every_picture() -> None:
    assert isinstance(start_search(SomeFaces(), "interval", SIZE, "bt709", 0), EveryFrameSearch)
    finder = ScriptedFinder([])
    assert isinstance(start_search(finder, "interval", SIZE, "bt709", 0), IntervalSearch)
    assert isinstance(start_search(finder, "every_frame", SIZE, "bt709", 0), EveryFrameSearch)


def test_few_large_pictures_wait() -> None:
    assert interval_for(1920, 1080) == interval_for(1088, 1920) == 16
    assert interval_for(3840, 2160) == 8


# -- the official finder ----------------------------------------------------------------------------------------------


class BrightDetector(nn.Module):
    """A face of 64 px in the middle of every picture whose first pixel is bright; remembers the pictures' sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        self.sizes += [(x.shape[3], x.shape[2])] * len(x)
        heads = []
        for stride in (4, 8, 16, 32, 64, 128):
            rows, columns = max(1, x.shape[2] // stride), max(1, x.shape[3] // stride)
            conf = torch.tensor([9.0, -9.0])[None, :, None, None].repeat(len(x), 1, rows, columns)
            if stride == 16:
                conf[x[:, 0, 0, 0] > 0, :, rows // 2, columns // 2] = torch.tensor([-2.0, 2.0])
            heads += [conf, torch.zeros(len(x), 4, rows, columns)]
        return heads


class SteadyPose(nn.Module):
    """The 68 points at the same place of every picture."""

    def __init__(self, size: tuple[int, int], side: float) -> None:
        super().__init__()
        scale = np.array(faces.pose_scale(*size))
        points = face_points(size[0] / 2, size[1] / 2, side)
        everything = np.zeros((133, 2), int)
        everything[23:91] = ((points - np.array(size) / 2 + scale / 2) / scale * [576, 768]).round().astype(int)
        self.bins = [everything, everything[faces.flip_table()] * [-1, 1] + [575, 0]]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bins = torch.from_numpy(np.stack([self.bins[0]] * (len(x) // 2) + [self.bins[1]] * (len(x) // 2)))
        one_hot = nn.functional.one_hot
        return one_hot(bins[..., 0], 576).float(), one_hot(bins[..., 1], 768).float()


def official(size: tuple[int, int], side: float) -> tuple[BrightDetector, faces.PoseFaceFinder]:
    detector = BrightDetector()
    pose = SteadyPose(size, side)
    return detector, faces.PoseFaceFinder(pose, detector, device=torch.device("cpu"), dtype=torch.float32)


def find_in_bright(finder: faces.PoseFaceFinder, size: tuple[int, int], lit: Sequence[bool], mode: Any) -> list[Any]:
    search = start_search(finder, mode, size, "bt709", 0)
    found: list[Face | None] = []
    for is_lit in lit:
        planes = black_planes(*size)
        planes.y[:8, :8] = 235 if is_lit else 16
        found += search.add(planes)
    return [*found, *search.finish()]


def test_the_end_of_an_interval_is_checked_on_a_small_copy() -> None:
    size = (480, 360)
    detector, finder = official(size, 200)
    found = find_in_bright(finder, size, [True] * 33, "interval")
    # Landmarks of 200 px become 96 px large, within the steps of the pose network's bins.
    assert detector.sizes[0] == size
    assert len(detector.sizes) == 3
    assert all(abs(width - 480 * 96 / 200) <= 3 for width, _ in detector.sizes[1:])
    for one, wanted in zip(found, find_in_bright(finder, size, [True] * 33, "every_frame"), strict=True):
        assert_same(one, wanted)


def test_a_small_face_is_checked_in_the_picture_itself() -> None:
    detector, finder = official(SIZE, 60)
    assert None not in find_in_bright(finder, SIZE, [True] * 17, "interval")
    assert detector.sizes == [SIZE] * 2


def test_a_face_elsewhere_confirms_nothing() -> None:
    size = (480, 360)
    detector, finder = official(size, 200)
    pose = SteadyPose(size, 20)
    finder = faces.PoseFaceFinder(pose, detector, device=torch.device("cpu"), dtype=torch.float32)
    picture = Picture(None, bgr=np.full((360, 480, 3), 255, np.uint8))
    far = faces.Pose(face_points(90, 90, 160), 0.8)
    near = faces.Pose(face_points(240, 180, 160), 0.8)
    assert finder.confirms(picture, far) == 0
    assert finder.confirms(picture, near) > 0.9


def test_a_face_that_goes_dark_is_lost_where_the_exhaustive_search_loses_it() -> None:
    """The pose network of this test sees nothing unusual: the end of the interval decides."""
    size = (480, 360)
    _, finder = official(size, 200)
    lit = [True] * 20 + [False] * 20
    found = find_in_bright(finder, size, lit, "interval")
    assert [face is not None for face in found] == lit
