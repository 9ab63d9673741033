"""Faces: each fast function against a slow one, the finder with scripted networks, boxes over time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from musetalk import face_parsing, face_track, faces
from musetalk.errors import MediaError, ProcessingError
from musetalk.faces import Face
from musetalk.geometry import Box
from musetalk.networks.bisenet import BiseNet
from musetalk.networks.rtmpose import RtmPose
from musetalk.networks.s3fd import S3fd
from tests.support.outside import GOLDEN_DIR
from tests.support.seeded import GAIN_CONV, fill

CPU = torch.device("cpu")
STRIDES = (4, 8, 16, 32, 64, 128)


def random_frame(width: int, height: int, seed: int = 0) -> NDArray[Any]:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


# -- landmarks --------------------------------------------------------------------------------------------------------


def test_the_flip_table_is_its_own_inverse_and_keeps_the_middle_of_the_body() -> None:
    table = faces.flip_table()
    assert np.array_equal(table[table], np.arange(133))
    middle = np.flatnonzero(table == np.arange(133)).tolist()
    # Nose; then of the face's 68: chin, nose bridge and tip, middle of the nostrils, of the four edges of the lips.
    assert middle == [0, *(23 + point for point in (8, 27, 28, 29, 30, 33, 51, 57, 62, 66))]


@pytest.mark.skipif(GOLDEN_DIR is None, reason="GOLDEN_DIR is not set")
def test_the_flip_table_is_the_published_one() -> None:
    assert GOLDEN_DIR is not None
    stored = json.loads((GOLDEN_DIR / "wholebody133_flip_indices.json").read_text(encoding="utf-8"))
    wanted = stored if isinstance(stored, list) else next(value for value in stored.values() if len(value) == 133)
    assert faces.flip_table().tolist() == wanted


@given(st.integers(16, 4000), st.integers(16, 4000))
@settings(max_examples=40)
def test_the_pose_input_shows_the_frame_with_a_margin_in_the_networks_aspect(width: int, height: int) -> None:
    scale_w, scale_h = faces.pose_scale(width, height)
    assert scale_w / scale_h == pytest.approx(288 / 384)
    assert scale_w >= 1.25 * width * (1 - 1e-12)
    assert scale_h >= 1.25 * height * (1 - 1e-12)
    assert math.isclose(scale_w, 1.25 * width) or math.isclose(scale_h, 1.25 * height)


@pytest.mark.parametrize(("width", "height"), [(640, 360), (180, 320), (333, 444), (101, 57)])
def test_a_spot_in_the_frame_is_found_again_through_the_pose_input(width: int, height: int) -> None:
    frame = np.zeros((height, width, 3), np.uint8)
    x, y = width // 3, height // 4
    frame[y - 4 : y + 5, x - 4 : x + 5] = 255
    warped = faces.warp_for_pose(frame)[..., 0].astype(np.float64)
    rows, columns = np.mgrid[: warped.shape[0], : warped.shape[1]]
    centre = np.array([(warped * columns).sum(), (warped * rows).sum()]) / warped.sum()
    back = faces.keypoints_in_frame(centre, width, height)
    assert back.dtype == np.float64
    assert np.abs(back - [x, y]).max() < 0.25


def test_the_pose_input_is_black_around_the_frame() -> None:
    warped = faces.warp_for_pose(np.full((100, 300, 3), 200, np.uint8))
    assert warped.shape == (384, 288, 3)
    assert (warped[[0, -1]] == 0).all()
    assert (warped[:, [0, -1]] == 0).all()
    assert (warped[192, 144] == 200).all()


def test_pose_pixels_are_turned_to_rgb_and_normalised() -> None:
    warped = random_frame(288, 384)
    x = faces.pose_input(warped)
    assert x.shape == (3, 384, 288)
    assert x.dtype == np.float32
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for row, column in ((0, 0), (17, 200), (383, 287)):
        for channel in range(3):
            wanted = (int(warped[row, column, 2 - channel]) - mean[channel]) / std[channel]
            assert x[channel, row, column] == pytest.approx(wanted, abs=1e-5)


def test_bins_become_keypoints_one_at_a_time_or_all_at_once() -> None:
    random = np.random.RandomState(1)
    simcc_x = random.standard_normal((2, 133, 576)).astype(np.float32)
    simcc_y = random.standard_normal((2, 133, 768)).astype(np.float32)
    simcc_x[0, 5] = -1.0  # nothing is seen of this one
    simcc_y[1, 7, [30, 500]] = 9.0  # of two equal bins the first counts
    keypoints, scores = faces.decode_simcc(simcc_x, simcc_y)
    for index in np.ndindex(2, 133):
        column, row = simcc_x[index].argmax(), simcc_y[index].argmax()
        score = min(simcc_x[index][column], simcc_y[index][row])
        assert scores[index] == score
        assert keypoints[index].tolist() == ([column / 2, row / 2] if score > 0 else [-0.5, -0.5])
    assert keypoints[0, 5].tolist() == [-0.5, -0.5]
    assert keypoints[1, 7, 1] == 15.0


def test_the_flip_test_averages_each_keypoint_with_its_mirrored_partner() -> None:
    network = fill(RtmPose(widen=1 / 16), 3, GAIN_CONV)
    finder = build_finder(network)
    batch = torch.from_numpy(np.stack([faces.pose_input(random_frame(288, 384, seed)) for seed in (1, 2)]))
    together_x, together_y = finder.simcc(batch)
    table = faces.flip_table()
    with torch.inference_mode():
        for index in range(2):
            plain_x, plain_y = network(batch[index : index + 1])
            flipped_x, flipped_y = network(torch.flip(batch[index : index + 1], [3]))
            for keypoint in (0, 1, 5, 30, 60, 90, 100):
                partner = int(table[keypoint])
                wanted_x = (plain_x[0, keypoint] + torch.flip(flipped_x[0, partner], [0])) / 2
                wanted_y = (plain_y[0, keypoint] + flipped_y[0, partner]) / 2
                # Bins of these weights reach a thousand, and a sum of another order differs with them.
                assert (together_x[index, keypoint] - wanted_x).abs().max() < 1e-4 * wanted_x.abs().max()
                assert (together_y[index, keypoint] - wanted_y).abs().max() < 1e-4 * wanted_y.abs().max()


# -- detection --------------------------------------------------------------------------------------------------------


def test_the_detector_takes_rgb_minus_the_means_of_bgr() -> None:
    frames = np.stack([random_frame(9, 7, 1), random_frame(9, 7, 2)])
    x = faces.detector_input(torch.from_numpy(frames))
    assert x.shape == (2, 3, 7, 9)
    assert x.is_contiguous()
    means = (104, 117, 123)
    for n, row, column, channel in np.ndindex(2, 7, 9, 3):
        assert x[n, channel, row, column] == int(frames[n, row, column, 2 - channel]) - means[channel]


def random_heads(n_frames: int, width: int, height: int, seed: int) -> list[Tensor]:
    """Maps of a detector for frames of this size, a few cells of which are candidates."""
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for stride in STRIDES:
        rows, columns = max(1, height // stride), max(1, width // stride)
        conf = torch.randn((n_frames, 2, rows, columns), generator=generator) * 2
        conf[:, 0] += 5
        heads += [conf, torch.randn((n_frames, 4, rows, columns), generator=generator)]
    return heads


def slow_candidates(heads: Sequence[Tensor], frame: int) -> list[list[float]]:
    """Candidates cell by cell, as docs/model.md#face-detection-s3fd says it."""
    found = []
    for level in range(6):
        conf, loc = heads[2 * level][frame].double(), heads[2 * level + 1][frame].double()
        stride, anchor = 4 * 2**level, 16 * 2**level
        for row in range(conf.shape[1]):
            for column in range(conf.shape[2]):
                score = 1 / (1 + math.exp(float(conf[0, row, column] - conf[1, row, column])))
                if score <= 0.05:
                    continue
                dx, dy, dw, dh = (float(value) for value in loc[:, row, column])
                width, height = anchor * math.exp(0.2 * dw), anchor * math.exp(0.2 * dh)
                x0 = stride / 2 + column * stride + dx * 0.1 * anchor - width / 2
                y0 = stride / 2 + row * stride + dy * 0.1 * anchor - height / 2
                found.append([x0, y0, x0 + width, y0 + height, score])
    return found


def test_candidates_of_a_batch_are_those_of_each_cell() -> None:
    heads = random_heads(3, 100, 60, seed=4)
    together = faces.decode_detections(heads)
    for frame, candidates in enumerate(together):
        wanted = slow_candidates(heads, frame)
        assert 5 < len(wanted) < 300
        assert candidates.shape == (len(wanted), 5)
        assert np.allclose(candidates, wanted, rtol=1e-4, atol=1e-3)


def test_an_absurd_offset_gives_no_warning_and_no_broken_box() -> None:
    heads = random_heads(1, 64, 64, seed=5)
    heads[0][0, :, 3, 3] = torch.tensor([-9.0, 9.0])
    heads[1][0, 2:, 3, 3] = 60_000.0
    heads[1][0, 2:, 3, 4] = -60_000.0
    heads[0][0, :, 3, 4] = torch.tensor([-8.0, 8.0])
    candidates = faces.decode_detections(heads)[0]
    assert np.isfinite(candidates).all()
    assert len(faces.nms(candidates)) >= 1
    best = faces.best_detection(candidates)
    assert best is not None
    assert best[0].clipped(64, 64) == (0, 0, 64, 64)


@pytest.mark.parametrize(("head", "value"), [(0, math.nan), (4, math.inf), (1, math.nan), (1, -math.inf)])
def test_a_detector_that_overflows_is_an_error_and_not_a_frame_without_a_face(head: int, value: float) -> None:
    heads = random_heads(1, 64, 64, seed=5)
    heads[0][0, 1] = 9.0
    heads[head][0, 0, 0, 0] = value
    with pytest.raises(ProcessingError, match="detector"):
        faces.decode_detections(heads)


def slow_overlap(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Intersection over union where a box from 3 to 5 is three pixels wide."""
    shared_w = max(0.0, min(first[2], second[2]) - max(first[0], second[0]) + 1)
    shared_h = max(0.0, min(first[3], second[3]) - max(first[1], second[1]) + 1)
    areas = sum((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (first, second))
    return float(shared_w * shared_h / (areas - shared_w * shared_h))


def slow_nms(candidates: NDArray[Any], limit: float) -> list[int]:
    kept: list[int] = []
    for index in sorted(range(len(candidates)), key=lambda index: (-candidates[index, 4], index)):
        if all(slow_overlap(candidates[index], candidates[other]) <= limit for other in kept):
            kept.append(index)
    return kept


@st.composite
def candidate_lists(draw: st.DrawFn) -> NDArray[Any]:
    """Boxes of whole px close together, scores of few values: many overlaps and many ties."""
    edge, side = st.integers(0, 20), st.integers(0, 12)
    score = st.sampled_from([0.1, 0.4, 0.5, 0.6, 0.9, 1.0])
    rows = draw(st.lists(st.tuples(edge, edge, side, side, score), max_size=12))
    return np.array([[x, y, x + w, y + h, s] for x, y, w, h, s in rows], np.float32).reshape(-1, 5)


@given(candidate_lists(), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_suppression_keeps_what_comparing_every_pair_keeps(candidates: NDArray[Any], max_kept: int) -> None:
    # A limit that single precision holds exactly, so that rounding decides nothing.
    wanted = slow_nms(candidates.astype(np.float64), 0.3125)
    assert faces.nms(candidates, 0.3125).tolist() == wanted
    assert faces.nms(candidates, 0.3125, max_kept=max_kept).tolist() == wanted[:max_kept]


def test_an_overlap_of_just_the_limit_is_kept() -> None:
    # 21 px each, 10 of them shared: 10 / 32.
    candidates = np.array([[0, 0, 20, 0, 0.9], [11, 0, 31, 0, 0.8], [10, 0, 30, 0, 0.7]], np.float32)
    assert faces.nms(candidates, 0.3125).tolist() == [0, 1]


@given(candidate_lists())
@settings(max_examples=60, deadline=None)
def test_the_face_of_a_frame_is_the_best_that_suppression_leaves(candidates: NDArray[Any]) -> None:
    left = candidates[faces.nms(candidates)]
    left = left[left[:, 4] > 0.5]
    best = faces.best_detection(candidates)
    if len(left) == 0:
        assert best is None
    else:
        assert best == (tuple(int(edge) for edge in left[0, :4]), left[0, 4])


def test_a_detected_box_is_cut_at_zero_and_truncated() -> None:
    candidates = np.array([[-3.7, 2.9, 20.99, 30.2, 0.51], [50, 50, 60, 60, 0.5]], np.float32)
    best = faces.best_detection(candidates)
    assert best is not None
    assert best[0] == (0, 2, 20, 30)
    assert best[1] == pytest.approx(0.51)
    assert faces.best_detection(candidates[1:]) is None
    assert faces.best_detection(np.zeros((0, 5), np.float32)) is None


# -- the box ----------------------------------------------------------------------------------------------------------

DETECTED = Box(1, 2, 3, 4)


@st.composite
def points_68(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Points to the right of an edge that is seldom outside; the nose may be anywhere above the chin."""
    left, right = draw(st.integers(-3, 20)), draw(st.integers(0, 200))
    top, chin = draw(st.integers(-40, 60)), draw(st.integers(60, 200))
    nose = draw(st.integers(-20, chin))
    random = np.random.RandomState(draw(st.integers(0, 99)))
    columns, rows = random.randint(left, left + right + 1, 68).tolist(), random.randint(top, chin + 1, 68).tolist()
    points = list(zip(columns, rows, strict=True))
    points[29], points[8] = (left, nose), (left + right, chin)
    return points


@given(points_68(), st.integers(-20, 20))
@settings(max_examples=100, deadline=None)
def test_the_box_reaches_as_far_above_the_nose_as_the_chin_is_below(points: list[tuple[int, int]], shift: int) -> None:
    landmarks = np.array(points, np.int32)
    before = landmarks.copy()
    box = faces.box_from_landmarks(landmarks, DETECTED, shift)
    assert np.array_equal(landmarks, before)
    ys = [y + shift * (index == 29) for index, (_, y) in enumerate(points)]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    bottom = max(ys)
    top = max(0, 2 * ys[29] - bottom)
    if left < 0 or right <= left or bottom <= top:
        assert box == DETECTED
    else:
        assert box == (left, top, right, bottom)


def test_shifting_the_nose_down_makes_the_box_less_high_at_the_top() -> None:
    landmarks = np.array([[100 + index, 100 + index] for index in range(68)], np.int32)
    assert faces.box_from_landmarks(landmarks, DETECTED) == (100, 2 * 129 - 167, 167, 167)
    assert faces.box_from_landmarks(landmarks, DETECTED, 9) == (100, 2 * 138 - 167, 167, 167)
    assert faces.box_from_landmarks(landmarks, DETECTED, -9) == (100, 2 * 120 - 167, 167, 167)


def test_landmarks_that_make_no_box_give_the_detectors() -> None:
    same = np.full((68, 2), 50, np.int32)
    assert faces.box_from_landmarks(same, DETECTED) == DETECTED
    outside = np.array([[index - 1, index] for index in range(68)], np.int32)
    assert faces.box_from_landmarks(outside, DETECTED) == DETECTED


# -- the finder, with scripted networks -------------------------------------------------------------------------------


class ToldDetector(nn.Module):
    """Sees a face of side 64 about the middle of frames whose first pixel is not black; keeps the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        self.batches.append(tuple(x.shape))
        heads = []
        for stride in STRIDES:
            rows, columns = max(1, x.shape[2] // stride), max(1, x.shape[3] // stride)
            conf = torch.tensor([9.0, -9.0])[None, :, None, None].repeat(len(x), 1, rows, columns)
            if stride == 16:
                seen = x[:, 0, 0, 0] > 0.5 - 104
                conf[seen, :, rows // 2, columns // 2] = torch.tensor([-2.0, 2.0])
            heads += [conf, torch.zeros(len(x), 4, rows, columns)]
        return heads


class ToldPose(nn.Module):
    """Puts the 68 points at given places of the frame, given its size; the mirrored pass mirrors them."""

    def __init__(self, points: NDArray[Any], width: int, height: int) -> None:
        super().__init__()
        scale = np.array(faces.pose_scale(width, height))
        bins = ((points - np.array([width, height]) / 2 + scale / 2) / scale * [576, 768]).round().astype(int)
        everything = np.zeros((133, 2), int)
        everything[23:91] = bins
        self.plain = everything
        self.mirrored = everything[faces.flip_table()] * [-1, 1] + [575, 0]
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(len(x))
        half = len(x) // 2
        bins = torch.from_numpy(np.stack([self.plain] * half + [self.mirrored] * half))
        one_hot = nn.functional.one_hot
        return one_hot(bins[..., 0], 576).float(), one_hot(bins[..., 1], 768).float()


def build_finder(pose: nn.Module, detector: nn.Module | None = None, batch_size: int = 8) -> faces.PoseFaceFinder:
    return faces.PoseFaceFinder(
        pose, detector or ToldDetector(), device=CPU, dtype=torch.float32, batch_size=batch_size
    )


def face_points(x: float, y: float, side: float) -> NDArray[Any]:
    """68 points on a spiral about (x, y), point 29 in the middle of the height."""
    turn = np.linspace(0, 20, 68)
    points = np.stack([x + side / 2 * np.sin(turn), y + side / 2 * np.cos(turn)], axis=1)
    points[29] = x, y
    return points


def lit(width: int, height: int, seed: int = 0) -> NDArray[Any]:
    frame = random_frame(width, height, seed)
    frame[0, 0] = 255
    return frame


def dark(width: int, height: int) -> NDArray[Any]:
    return np.zeros((height, width, 3), np.uint8)


def test_each_frame_gets_its_own_face_or_none() -> None:
    points = face_points(120, 90, 60)
    finder = build_finder(ToldPose(points, 240, 180))
    found = finder.find([lit(240, 180), dark(240, 180), lit(240, 180, 1)])
    assert found[1] is None
    for face in (found[0], found[2]):
        assert face is not None
        assert face.landmarks is not None
        assert face.landmarks.dtype == np.float32
        assert face.landmarks.shape == (68, 2)
        # Bins are 1.25 * 240 / 576 px apart, and the rest of a px is cut off.
        assert np.abs(face.landmarks - points).max() < 1.6
        assert face.box == faces.box_from_landmarks(face.landmarks.astype(np.int32), DETECTED)
        assert face.score == pytest.approx(1 / (1 + math.exp(-4)), abs=1e-6)


def test_the_box_is_clipped_to_the_frame() -> None:
    finder = build_finder(ToldPose(face_points(225, 160, 80), 240, 180))
    (face,) = finder.find([lit(240, 180)])
    assert face is not None
    assert (face.box.x1, face.box.y1) == (240, 180)
    assert not face.box.is_empty


def test_a_face_beyond_the_right_edge_is_none_and_one_beyond_the_left_the_detectors() -> None:
    right = build_finder(ToldPose(face_points(256, 90, 12), 240, 180))
    assert right.find([lit(240, 180)]) == [None]
    left = build_finder(ToldPose(face_points(0, 90, 12), 240, 180))
    (face,) = left.find([lit(240, 180)])
    assert face is not None
    # Cell (7, 5) of stride 16: its centre is (120, 88), and 64 px are the anchor's side.
    assert face.box == (120 - 32, 88 - 32, 120 + 32, 88 + 32)


@pytest.mark.parametrize("side", [1.0, 3.0, 9.0])
def test_a_face_of_a_few_pixels_is_found_with_a_box_that_holds_pixels(side: float) -> None:
    (face,) = build_finder(ToldPose(face_points(120, 90, side), 240, 180)).find([lit(240, 180)])
    assert face is not None
    assert not face.box.is_empty
    assert face.box == face.box.clipped(240, 180)


def test_bbox_shift_moves_only_the_top() -> None:
    finder = build_finder(ToldPose(face_points(120, 90, 60), 240, 180))
    frame = lit(240, 180)
    (plain,), (shifted,) = finder.find([frame]), finder.find([frame], bbox_shift=5)
    assert plain is not None
    assert shifted is not None
    assert shifted.box == plain.box._replace(y0=plain.box.y0 + 10)
    assert np.array_equal(shifted.landmarks, plain.landmarks)  # type: ignore[arg-type]


def test_batches_hold_frames_of_one_size_and_no_more_than_allowed() -> None:
    detector, pose = ToldDetector(), ToldPose(face_points(60, 45, 20), 120, 90)
    finder = build_finder(pose, detector, batch_size=3)
    frames = [lit(120, 90)] * 4 + [dark(120, 90)] + [lit(90, 120)] * 2
    found = finder.find(frames)
    assert [face is not None for face in found] == [True] * 4 + [False] + [True] * 2
    assert detector.batches == [(3, 3, 90, 120), (2, 3, 90, 120), (2, 3, 120, 90)]
    # Twice each frame with a face: as it is and mirrored.
    assert pose.batches == [6, 6]


def test_large_frames_go_through_the_detector_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "_DETECTOR_BATCH_PX", 2 * 120 * 90 + 1)
    detector = ToldDetector()
    finder = build_finder(ToldPose(face_points(60, 45, 20), 120, 90), detector)
    finder.find([lit(120, 90)] * 5 + [lit(240, 180)] * 2)
    assert [batch[0] for batch in detector.batches] == [2, 2, 1, 1, 1]


def real_networks() -> tuple[nn.Module, nn.Module]:
    return fill(RtmPose(widen=1 / 16), 3, GAIN_CONV), fill(S3fd(2), 5, GAIN_CONV)


def test_the_batch_size_changes_no_answer_of_real_networks() -> None:
    frames = [random_frame(64, 64, 1), random_frame(97, 131, 2), random_frame(97, 131, 3), random_frame(128, 66, 4)]
    one, many = (build_finder(*real_networks(), batch_size=size).find(frames, bbox_shift=3) for size in (1, 4))
    for first, second, frame in zip(one, many, frames, strict=True):
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert first.box == second.box == first.box.clipped(frame.shape[1], frame.shape[0])
            assert np.array_equal(first.landmarks, second.landmarks)  # type: ignore[arg-type]
    assert any(face is not None for face in one)


def test_frames_that_are_views_or_read_only_are_taken_as_they_are() -> None:
    finder = build_finder(*real_networks())
    whole = random_frame(200, 160, 7)
    view, mirrored = whole[10:110, 20:140], whole[10:110, 20:140][:, ::-1]
    view.setflags(write=False)
    copies = finder.find([view.copy(), np.ascontiguousarray(mirrored)])
    for face, wanted in zip(finder.find([view, mirrored]), copies, strict=True):
        assert (face and (face.box, face.score)) == (wanted and (wanted.box, wanted.score))


def test_no_frames_give_no_faces() -> None:
    assert build_finder(*real_networks()).find([]) == []


def test_a_pose_network_that_overflows_is_an_error() -> None:
    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.full((len(x), 133, 576), math.nan), torch.ones(len(x), 133, 768)

    with pytest.raises(ProcessingError, match="pose network") as caught:
        build_finder(Overflow()).find([lit(120, 90)])
    assert not caught.value.retryable


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_faces() -> None:
    pose, detector = real_networks()
    frames = [random_frame(128, 96, seed) for seed in range(3)]
    wanted = build_finder(pose, detector).find(frames)
    device = torch.device("cuda")
    found = faces.PoseFaceFinder(pose.to(device), detector.to(device), device=device, dtype=torch.float32).find(frames)
    for face, on_cpu in zip(found, wanted, strict=True):
        assert (face is None) == (on_cpu is None)
        if face is not None and on_cpu is not None:
            assert np.abs(np.subtract(face.box, on_cpu.box)).max() <= 2


# -- a box named by the job -------------------------------------------------------------------------------------------


def test_a_named_box_is_clipped_to_the_frame() -> None:
    face = faces.fixed_face((-10, 20, 50, 500), 100, 80)
    assert face.box == (0, 20, 50, 80)
    assert face.landmarks is None


@pytest.mark.parametrize(
    "box", [(200, 10, 300, 90), (85, 0, 300, 80), (0, 65, 100, 90), (50, 50, 40, 40), (-50, -50, 15, 15)]
)
def test_a_named_box_with_too_little_of_the_frame_is_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(MediaError, match="face_box"):
        faces.fixed_face(box, 100, 80)


def test_sixteen_pixels_are_enough() -> None:
    assert faces.fixed_face((84, 64, 100, 80), 100, 80).box == (84, 64, 100, 80)


# -- over time --------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 40, 30


@st.composite
def some_faces(draw: st.DrawFn) -> Face:
    x0, y0 = draw(st.integers(0, WIDTH - 1)), draw(st.integers(0, HEIGHT - 1))
    box = Box(x0, y0, draw(st.integers(x0 + 1, WIDTH)), draw(st.integers(y0 + 1, HEIGHT)))
    landmarks = np.full((68, 2), draw(st.integers(0, 9)), np.float32) if draw(st.booleans()) else None
    return Face(box, landmarks, draw(st.sampled_from([0.6, 0.9])))


tracks = st.lists(st.none() | some_faces(), max_size=12)


def lies_inside(box: Box) -> bool:
    return not box.is_empty and box == box.clipped(WIDTH, HEIGHT)


@given(tracks, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_only_short_gaps_between_faces_are_filled(track: list[Face | None], max_gap: int) -> None:
    filled = face_track.fill_gaps(track, max_gap)
    assert len(filled) == len(track)
    for index, (face, was) in enumerate(zip(filled, track, strict=True)):
        if was is not None:
            assert face is was
            continue
        before = next((i for i in range(index, -1, -1) if track[i] is not None), None)
        after = next((i for i in range(index, len(track)) if track[i] is not None), None)
        inside = before is not None and after is not None and after - before - 1 <= max_gap
        assert (face is not None) == inside
        if face is not None and before is not None and after is not None:
            first, second = track[before], track[after]
            assert first is not None
            assert second is not None
            share = (index - before) / (after - before)
            for edge, a, b in zip(face.box, first.box, second.box, strict=True):
                assert abs(edge - (a + (b - a) * share)) <= 0.5 + 1e-9
            assert lies_inside(face.box)
            assert face.score == min(first.score, second.score)
            assert (face.landmarks is not None) == (first.landmarks is not None and second.landmarks is not None)


def test_landmarks_are_interpolated_too() -> None:
    zeros, nines = (Face(Box(0, 0, 9, 9), np.full((68, 2), value, np.float32), 0.9) for value in (0, 9))
    filled = face_track.fill_gaps([zeros, None, None, nines], 2)
    values = [face.landmarks[0, 0] for face in filled if face is not None and face.landmarks is not None]
    assert values == pytest.approx([0, 3, 6, 9])
    assert all(
        face is not None and face.landmarks is not None and face.landmarks.dtype == np.float32 for face in filled
    )


@given(tracks, st.floats(0.1, 20))
@settings(max_examples=80, deadline=None)
def test_smoothing_keeps_boxes_in_the_frame_and_gaps_empty(track: list[Face | None], sigma: float) -> None:
    smoothed = face_track.smooth_boxes(track, sigma)
    assert [face is None for face in smoothed] == [face is None for face in track]
    for face, was in zip(smoothed, track, strict=True):
        if face is not None and was is not None:
            assert lies_inside(face.box)
            assert face.landmarks is was.landmarks
            assert face.score == was.score


@given(some_faces(), st.integers(1, 30), st.floats(0.1, 50))
@settings(max_examples=40, deadline=None)
def test_a_face_that_does_not_move_keeps_its_box(face: Face, length: int, sigma: float) -> None:
    assert [smoothed.box for smoothed in face_track.smooth_boxes([face] * length, sigma) if smoothed] == [
        face.box
    ] * length


def test_sigma_zero_is_the_identity() -> None:
    track = [Face(Box(index % 3, 0, 10, 10), None, 1.0) for index in range(9)]
    assert face_track.smooth_boxes(track, 0) == track


def test_smoothing_is_the_gaussian_mean_of_the_run() -> None:
    lefts, sigma = [0, 100, 20, 60, 61, 62, 10], 1.0
    track = [Face(Box(left, 0, 500, 10), None, 1.0) for left in lefts]
    smoothed = face_track.smooth_boxes(track, sigma)
    for index, face in enumerate(smoothed):
        reach = range(index - 4, index + 5)
        weights = [math.exp(-((other - index) ** 2) / (2 * sigma**2)) for other in reach]
        values = [lefts[min(max(other, 0), len(lefts) - 1)] for other in reach]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert face is not None
        assert abs(face.box.x0 - mean) <= 0.5 + 1e-9
        assert face.box[1:] == (0, 500, 10)


def test_runs_on_both_sides_of_a_gap_do_not_touch_each_other() -> None:
    near, far = Face(Box(0, 0, 10, 10), None, 1.0), Face(Box(20, 20, 40, 30), None, 1.0)
    track = [near] * 4 + [None] + [far] * 4
    assert face_track.smooth_boxes(track, 3.0) == track


def test_smoothing_takes_the_jitter_out_of_a_still_face() -> None:
    random = np.random.RandomState(3)
    track = [Face(Box(100 + int(dx), 50, 200 + int(dx), 150), None, 1.0) for dx in random.randint(-4, 5, 100)]
    steps = [
        np.abs(np.diff([face.box.x0 for face in boxes if face])).mean()
        for boxes in (track, face_track.smooth_boxes(track, 3.0))
    ]
    assert steps[1] < steps[0] / 4


# -- parsing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 30, 512, 700])
def test_a_crop_is_resized_by_pillow_and_normalised(side: int) -> None:
    crop = random_frame(side, side)
    x = face_parsing.parse_input(crop)
    resized = np.asarray(Image.fromarray(crop).resize((512, 512), Image.Resampling.BILINEAR), np.float64)[..., ::-1]
    wanted = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert x.dtype == np.float32
    assert np.abs(x - wanted.transpose(2, 0, 1)).max() < 1e-5


class Brightness(nn.Module):
    """Class 1 where red is brighter than half, class 0 elsewhere; all others never."""

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.full((len(x), 19, *x.shape[2:]), -100.0)
        scores[:, 0], scores[:, 1] = 0.0, x[:, 0] - (0.5 - 0.485) / 0.229
        return scores


def test_labels_are_the_strongest_class_of_each_pixel_of_crops_of_any_size() -> None:
    small, large = np.zeros((64, 64, 3), np.uint8), np.zeros((600, 600, 3), np.uint8)
    small[:32, :, 2], large[:, 300:, 2] = 255, 255
    labels = build_parser(Brightness()).labels([small, large])
    assert labels.dtype == np.uint8
    assert labels.shape == (2, 512, 512)
    assert labels[0, :250].all()
    assert not labels[0, 262:].any()
    assert labels[1, :, 258:].all()
    assert not labels[1, :, :254].any()


class Steps(nn.Module):
    """Scores of four levels only: several classes share the highest in most pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.randint(0, 4, (len(x), 19, *x.shape[2:]), generator=torch.Generator().manual_seed(5)).float()


def test_of_equally_strong_classes_the_first_is_the_label() -> None:
    labels = build_parser(Steps()).labels([np.zeros((512, 512, 3), np.uint8)])
    scores = Steps()(torch.zeros(1, 3, 512, 512)).numpy()
    assert (labels == scores.argmax(1)).all()


def test_crops_together_get_the_labels_of_crops_alone() -> None:
    parser = build_parser(fill(BiseNet(4), 6, GAIN_CONV))
    crops = [random_frame(side, side, side) for side in (40, 90)]
    together = parser.labels(crops)
    alone = np.concatenate([parser.labels([crop]) for crop in crops])
    assert (together == alone).mean() > 0.9999
    assert len(np.unique(together)) > 1


def test_no_crops_give_no_labels() -> None:
    labels = build_parser(Brightness()).labels([])
    assert labels.shape == (0, 512, 512)
    assert labels.dtype == np.uint8


def build_parser(network: nn.Module) -> face_parsing.FaceParser:
    return face_parsing.FaceParser(network, device=CPU, dtype=torch.float32)


def test_nothing_is_recorded_for_gradients() -> None:
    pose, detector = real_networks()
    seen: list[bool] = []
    for network in (pose, detector):
        network.register_forward_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    build_finder(pose, detector).find([random_frame(97, 131, 2), random_frame(97, 131, 3)])
    assert seen
    assert all(seen)
