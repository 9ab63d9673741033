"""Faces in frames: detection, landmarks, and the box that is regenerated.

The arithmetic is upstream's (docs/model.md#landmarks-rtmpose to docs/model.md#crop-box), batched. Of
several faces in a frame the detector's highest score counts, and of equal scores the first in the detector's order
(finest level first, rows, then columns); the landmarks come from the whole frame. Knows nothing of blending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from musetalk.batches import Batches
from musetalk.device_input import PictureInput, warped_bgr
from musetalk.errors import ProcessingError, RequestError
from musetalk.frames import Picture, UInt8Array
from musetalk.geometry import Box
from musetalk.networks.rtmpose import INPUT_HEIGHT, INPUT_WIDTH, SPLIT_RATIO

FloatArray = NDArray[np.floating[Any]]

# Keypoints 23..90 of the 133 are the usual 68: 0-16 jaw, 17-26 brows, 27-35 nose, 36-47 eyes, 48-67 mouth.
FACE_KEYPOINTS = slice(23, 91)
NOSE_MIDDLE = 29

_POSE_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_POSE_STD = np.array([58.395, 57.12, 57.375], np.float32)
_POSE_PADDING = 1.25
# Means in B, G, R order, subtracted from R, G, B pixels: the published detector was used this way, so we do the same.
_DETECTOR_MEAN = (104.0, 117.0, 123.0)
_CANDIDATE_SCORE, _FACE_SCORE, _NMS_OVERLAP = 0.05, 0.5, 0.3
# Largest exponent of a box's side: beyond it the side leaves float32, far beyond any picture.
_MAX_SIDE_EXPONENT = 80.0
# Pixels in one pass of the detector: its first layers have 64 channels of the full size (256 bytes a pixel).
_DETECTOR_BATCH_PX = 4_000_000
# The detector finds clear faces of this size best, at a fraction of the pixels (docs/model.md#interval-search).
CHECKED_FACE_PX, _SURE_SCORE = 96, 0.9
# A copy that is hardly smaller saves nothing: the picture itself is looked at.
_LARGEST_CHECK = 0.7

MIN_FACE_BOX_PX = 16


@dataclass(frozen=True)
class Face:
    """One face in one frame: crop box without margin, inside the frame; landmarks (68, 2) in px when known."""

    box: Box
    landmarks: NDArray[np.float32] | None
    score: float


class FaceFinder(Protocol):
    """Finds the face of each frame."""

    def find(self, frames: Sequence[UInt8Array], *, bbox_shift: int = 0) -> list[Face | None]:
        """BGR frames (H, W, 3) of any sizes -> one face or None each."""


@dataclass(frozen=True)
class Pose:
    """Landmarks that the pose network sees in a picture, (68, 2) float64 px, and the mean of their scores.

    The network answers for any picture; whether there is a face says the detector.
    """

    landmarks: NDArray[np.float64]
    score: float

    @property
    def points(self) -> NDArray[np.int32]:
        """The landmarks in whole px, as the box is made of them."""
        return self.landmarks.astype(np.int32)


# The detector's box of a picture and its score.
Detection = tuple[Box, float]


@runtime_checkable
class GatedFinder(Protocol):
    """A finder in two parts: the detector only says whether there is a face, the landmarks say where."""

    def detect(self, pictures: Sequence[Picture]) -> list[Detection | None]:
        """The detector's answer for each picture, seen at full size."""

    def poses(self, pictures: Sequence[Picture]) -> list[Pose]:
        """Landmarks for each picture, with a face or without."""

    def confirms(self, picture: Picture, pose: Pose) -> float:
        """Score of a clear face where the landmarks are, on a small copy of the picture; 0 when in doubt."""


def gated_faces(finder: GatedFinder, pictures: Sequence[Picture], bbox_shift: int = 0) -> list[Face | None]:
    """The face of each picture, or None; the detector looks at all of them."""
    detected = finder.detect(pictures)
    poses = iter(finder.poses([picture for picture, found in zip(pictures, detected, strict=True) if found]))
    return [
        None if found is None else face_of(next(poses), found, picture.size, bbox_shift)
        for picture, found in zip(pictures, detected, strict=True)
    ]


# -- landmarks ----------------------------------------------------------------------------------------------------


def flip_table() -> NDArray[np.int64]:
    """Partner of each keypoint in the mirrored picture, int64 (133,), in COCO-WholeBody's order."""
    table = np.arange(133)

    def swap(first: int, second: int) -> None:
        table[first], table[second] = second, first

    for left in range(1, 17, 2):  # eyes, ears, shoulders to ankles: left, right, left, right
        swap(left, left + 1)
    for offset in range(3):  # three points of each foot
        swap(17 + offset, 20 + offset)
    mirrored_runs = (
        (23, 39),  # jaw
        (40, 49),  # brows
        (54, 58),  # nostrils
        (71, 77),  # upper lip, outer
        (78, 82),  # lower lip, outer
        (83, 87),  # upper lip, inner
        (88, 90),  # lower lip, inner
    )
    for first, last in mirrored_runs:
        table[first : last + 1] = np.arange(last, first - 1, -1)
    for left, right in ((59, 68), (60, 67), (61, 66), (62, 65), (63, 70), (64, 69)):  # eyelids
        swap(left, right)
    for offset in range(21):  # hands
        swap(91 + offset, 112 + offset)
    return table


def pose_scale(width: int, height: int) -> tuple[float, float]:
    """Width and height in frame px that the pose network's input shows: the frame, padded to its aspect.

    Specified in docs/model.md#pose-input.
    """
    scale_w, scale_h = _POSE_PADDING * width, _POSE_PADDING * height
    aspect = INPUT_WIDTH / INPUT_HEIGHT
    if scale_w > aspect * scale_h:
        return scale_w, scale_w / aspect
    return scale_h * aspect, scale_h


def pose_factor(width: int, height: int) -> float:
    """Size of a frame in the pose network's input, as a share of its own."""
    return INPUT_WIDTH / pose_scale(width, height)[0]


def warp_for_pose(frame: UInt8Array) -> UInt8Array:
    """BGR frame -> what the pose network sees of it, BGR uint8 (384, 288, 3), black around the frame."""
    height, width = frame.shape[:2]
    factor = pose_factor(width, height)
    matrix = np.array(
        [
            [factor, 0.0, INPUT_WIDTH / 2 - factor * width / 2],
            [0.0, factor, INPUT_HEIGHT / 2 - factor * height / 2],
        ]
    )
    return np.asarray(cv2.warpAffine(frame, matrix, (INPUT_WIDTH, INPUT_HEIGHT), flags=cv2.INTER_LINEAR), np.uint8)


def pose_input(warped: UInt8Array) -> NDArray[np.float32]:
    """Warped BGR picture (384, 288, 3) -> normalised RGB (3, 384, 288)."""
    rgb = (warped[..., ::-1].astype(np.float32) - _POSE_MEAN) / _POSE_STD
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


def decode_simcc(simcc_x: FloatArray, simcc_y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Bins (..., k, 576) and (..., k, 768) -> keypoints (..., k, 2) in input px and scores (..., k).

    The score is the smaller of the two maxima; where it is not positive both coordinates are -1 before scaling
    (docs/model.md#pose-decoding).
    """
    scores = np.minimum(simcc_x.max(-1), simcc_y.max(-1))
    keypoints = np.stack([simcc_x.argmax(-1), simcc_y.argmax(-1)], axis=-1).astype(np.float32)
    keypoints[scores <= 0] = -1
    return keypoints / SPLIT_RATIO, scores


def keypoints_in_frame(keypoints: FloatArray, width: int, height: int) -> NDArray[np.float64]:
    """Keypoints in input px -> frame px, float64."""
    scale = np.array(pose_scale(width, height))
    size = np.array([INPUT_WIDTH, INPUT_HEIGHT], np.float64)
    centre = np.array([width / 2, height / 2])
    points: NDArray[np.float64] = keypoints.astype(np.float64) / size * scale + centre - scale / 2
    return points


# -- detection --------------------------------------------------------------------------------------------------------


def detector_input(frames: Tensor) -> Tensor:
    """BGR frames uint8 (n, H, W, 3) -> RGB minus means, float32 (n, 3, H, W), on the frames' device.

    Specified in docs/model.md#face-detection-s3fd.
    """
    rgb = frames.flip(3).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return rgb.sub_(torch.tensor(_DETECTOR_MEAN, device=frames.device)[:, None, None])


def decode_detections(heads: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    """The detector's 12 maps for n frames -> per frame candidates (m, 5): x0, y0, x1, y1, score, score > 0.05.

    Specified in docs/model.md#face-detection-s3fd. In the order of levels, rows and columns. Raises ProcessingError
    when they are not finite: that is not a frame without a face.
    """
    n_frames = heads[0].shape[0]
    found: list[list[NDArray[np.float32]]] = [[] for _ in range(n_frames)]
    for level in range(len(heads) // 2):
        scores = heads[2 * level].float().softmax(dim=1)[:, 1].cpu().numpy()
        _check_finite(scores, "detector")
        offsets = heads[2 * level + 1].float().cpu().numpy()
        stride = 2.0 ** (level + 2)
        anchor = stride * 4
        for index in range(n_frames):
            rows, columns = np.nonzero(scores[index] > _CANDIDATE_SCORE)
            chosen = offsets[index][:, rows, columns]
            _check_finite(chosen, "detector")
            dx, dy, dw, dh = chosen
            centre_x = stride / 2 + columns * stride + dx * 0.1 * anchor
            centre_y = stride / 2 + rows * stride + dy * 0.1 * anchor
            width, height = (anchor * np.exp(np.minimum(d * 0.2, _MAX_SIDE_EXPONENT)) for d in (dw, dh))
            x0, y0 = centre_x - width / 2, centre_y - height / 2
            candidates = np.stack([x0, y0, x0 + width, y0 + height, scores[index][rows, columns]], axis=1)
            found[index].append(candidates.astype(np.float32))
    return [np.concatenate(levels) for levels in found]


def overlaps(box: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of one box (>= 4,) with others (m, >= 4); edges count as pixels (+1).

    Specified in docs/model.md#face-detection-s3fd.
    """
    # Areas of absurd boxes leave float32; their share is then 0, or no number, which counts as overlapping.
    with np.errstate(over="ignore", invalid="ignore"):
        width = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0]) + 1
        height = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1]) + 1
        shared = np.maximum(0.0, width) * np.maximum(0.0, height)
        area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
        areas = (others[:, 2] - others[:, 0] + 1) * (others[:, 3] - others[:, 1] + 1)
        shares: NDArray[np.float32] = shared / (area + areas - shared)
    return shares


def nms(
    candidates: NDArray[np.float32], limit: float = _NMS_OVERLAP, *, max_kept: int | None = None
) -> NDArray[np.int64]:
    """Greedy non-maximum suppression of (m, 5) candidates: the first `max_kept` kept indices, by falling score.

    Of equal scores the earlier candidate comes first; upstream leaves that to an unstable sort.
    """
    order = np.argsort(-candidates[:, 4], kind="stable")
    kept: list[int] = []
    while len(order) and len(kept) != max_kept:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        order = rest[overlaps(candidates[best], candidates[rest]) <= limit]
    return np.asarray(kept, np.int64)


def best_detection(candidates: NDArray[np.float32]) -> tuple[Box, float] | None:
    """The frame's face among its candidates (m, 5), negatives cut to 0 and truncated; None without one above 0.5."""
    # Only the first is looked at: comparing thousands of candidates with each other takes seconds.
    kept = candidates[nms(candidates, max_kept=1)]
    if len(kept) == 0 or kept[0, 4] <= _FACE_SCORE:
        return None
    best = kept[0]
    x0, y0, x1, y1 = (int(max(0.0, float(edge))) for edge in best[:4])
    return Box(x0, y0, x1, y1), float(best[4])


def box_from_landmarks(landmarks: NDArray[np.integer[Any]], detected: Box, bbox_shift: int = 0) -> Box:
    """The box upstream makes of 68 int landmarks (68, 2) and the detector's box; not yet clipped to the frame.

    Specified in docs/model.md#crop-box. Symmetric about nose point 29 (moved by `bbox_shift` px) unless cut at 0; the
    detector's box where that is no box.
    """
    points = landmarks.copy()
    points[NOSE_MIDDLE, 1] += bbox_shift
    middle = int(points[NOSE_MIDDLE, 1])
    half = int(points[:, 1].max()) - middle
    box = Box(int(points[:, 0].min()), max(0, middle - half), int(points[:, 0].max()), int(points[:, 1].max()))
    return detected if box.is_empty or box.x0 < 0 else box


def face_of(pose: Pose, detected: Detection, size: tuple[int, int], bbox_shift: int = 0) -> Face | None:
    """The face of a picture of `size` (width, height) px; None when nothing of its box is inside."""
    points = pose.points
    box = box_from_landmarks(points, detected[0], bbox_shift).clipped(*size)
    return None if box.is_empty else Face(box, points.astype(np.float32), detected[1])


class PoseFaceFinder:
    """Upstream's rule: S3FD says whether there is a face, RTMPose's landmarks say where its box is."""

    def __init__(
        self,
        pose: nn.Module,
        detector: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 8,
        device_input: bool | None = None,
    ) -> None:
        self._pose, self._detector = pose, detector
        self._device, self._dtype, self._batch_size = device, dtype, batch_size
        self._pose_batches = Batches(batch_size)
        self._input = PictureInput(device, device.type == "cuda" if device_input is None else device_input)
        self._batch_px = _DETECTOR_BATCH_PX
        self._flip = torch.from_numpy(flip_table()).to(device)
        self._mean, self._std = (torch.from_numpy(v).to(device)[:, None, None] for v in (_POSE_MEAN, _POSE_STD))

    def find(self, frames: Sequence[UInt8Array], *, bbox_shift: int = 0) -> list[Face | None]:
        """BGR frames uint8 (H, W, 3) of any sizes -> one face or None each; boxes in px, clipped to their frame.

        Raises ProcessingError when a network gives values that are not finite.
        """
        return gated_faces(self, [Picture(None, bgr=frame) for frame in frames], bbox_shift)

    def detect(self, pictures: Sequence[Picture]) -> list[Detection | None]:
        """The detector's face of each picture, or None.

        Raises ProcessingError for values that are not finite, OutOfMemoryError when one picture does not fit.
        """
        results: list[Detection | None] = []
        for _, alike in groupby(pictures, key=lambda picture: picture.size):
            results += self._detect_alike(list(alike))
        return results

    def _detect_alike(self, pictures: Sequence[Picture]) -> list[Detection | None]:
        """`detect` for pictures of one size, as many together as the detector takes."""
        picture_px = pictures[0].size[0] * pictures[0].size[1]
        n_together = max(1, min(self._batch_size, self._batch_px // picture_px))
        batches = Batches(n_together)
        found = batches.run(lambda part: self._detect(self._input.bgr(pictures[part])), len(pictures))
        if batches.size < n_together:
            # For pictures of every size: the next search knows.
            self._batch_px = batches.size * picture_px
        return [face for batch in found for face in batch]

    def _warped(self, pictures: Sequence[Picture]) -> Tensor:
        """What the pose network sees of pictures of any sizes, BGR uint8 (n, 384, 288, 3) on the device."""
        size = pictures[0].size
        uploaded = self._input.uploaded(pictures) if all(picture.size == size for picture in pictures) else None
        if uploaded is not None:
            return warped_bgr(uploaded, pictures[0].matrix, (INPUT_WIDTH, INPUT_HEIGHT), pose_factor(*size))
        return torch.from_numpy(np.stack([warp_for_pose(picture.bgr) for picture in pictures])).to(self._device)

    def confirms(self, picture: Picture, pose: Pose) -> float:
        """Score of a clear face where the landmarks are, on a copy in which it is `CHECKED_FACE_PX` large.

        0 when the face is not that much larger, or the detector is not sure.
        """
        points = pose.points
        around = Box(*points.min(axis=0).tolist(), *points.max(axis=0).tolist())
        share = CHECKED_FACE_PX / max(around.width, around.height, 1)
        if share > _LARGEST_CHECK:
            return 0.0
        (found,) = self._detect(self._input.reduced(picture, share))
        if found is None or found[1] < _SURE_SCORE:
            return 0.0
        box = np.array(found[0], np.float32) / np.float32(share)
        return found[1] if overlaps(box, np.array([around], np.float32))[0] >= _NMS_OVERLAP else 0.0

    @torch.inference_mode()
    def _detect(self, batch: Tensor) -> list[Detection | None]:
        """The best face in each of the BGR pictures uint8 (n, H, W, 3) on the device."""
        heads = self._detector(detector_input(batch).to(self._dtype))
        return [best_detection(candidates) for candidates in decode_detections(heads)]

    def poses(self, pictures: Sequence[Picture]) -> list[Pose]:
        """Landmarks for each picture.

        Raises ProcessingError for values that are not finite, OutOfMemoryError when one picture does not fit.
        """
        found = self._pose_batches.run(lambda part: self._poses(pictures[part]), len(pictures))
        return [pose for batch in found for pose in batch]

    def _poses(self, pictures: Sequence[Picture]) -> list[Pose]:
        simcc_x, simcc_y = self.simcc(self._normalised(self._warped(pictures)).to(self._dtype))
        keypoints, scores = decode_simcc(simcc_x.float().cpu().numpy(), simcc_y.float().cpu().numpy())
        _check_finite(scores, "pose network")
        results: list[Pose] = []
        for picture, points, certain in zip(pictures, keypoints, scores, strict=True):
            landmarks = keypoints_in_frame(points, *picture.size)[FACE_KEYPOINTS]
            results.append(Pose(landmarks, float(certain[FACE_KEYPOINTS].mean())))
        return results

    def run_once(self, pictures: Sequence[Picture]) -> None:
        """Run both networks over `pictures`, with a face or without, so that the first job finds them warm."""
        self.detect(pictures)
        self.poses(pictures)

    @torch.inference_mode()
    def _normalised(self, warped: Tensor) -> Tensor:
        """`pose_input` of BGR pictures uint8 (n, 384, 288, 3) on the device, equal to the last bit."""
        rgb = warped.flip(3).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return rgb.sub_(self._mean).div_(self._std)

    @torch.inference_mode()
    def simcc(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Pose bins of normalised pictures (n, 3, 384, 288), averaged with those of the mirrored pictures.

        Specified in docs/model.md#pose-decoding.
        """
        simcc_x, simcc_y = self._pose(torch.cat([batch, batch.flip(3)]))
        n_frames = len(batch)
        mirrored_x = simcc_x[n_frames:, self._flip].flip(2)
        mirrored_y = simcc_y[n_frames:, self._flip]
        return (simcc_x[:n_frames] + mirrored_x) * 0.5, (simcc_y[:n_frames] + mirrored_y) * 0.5


def _check_finite(scores: FloatArray, network: str) -> None:
    if not np.isfinite(scores).all():
        raise ProcessingError(f"the {network} gave values that are not finite", retryable=False)


def fixed_face(face_box: tuple[int, int, int, int], width: int, height: int) -> Face:
    """The face a job names itself, the same in every frame, clipped to a frame of `width` x `height` px.

    Raises RequestError when less than 16 x 16 px of it lie inside the frame.
    """
    box = Box(*face_box).clipped(width, height)
    if box.width < MIN_FACE_BOX_PX or box.height < MIN_FACE_BOX_PX:
        raise RequestError(
            f"params.face_box must contain at least {MIN_FACE_BOX_PX} x {MIN_FACE_BOX_PX} px of the {width} x {height} "
            "picture",
            field="params.face_box",
        )
    return Face(box, None, 1.0)
