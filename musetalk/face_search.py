"""The face of each picture of a source, picture by picture: at every one, or at both ends of an interval.

The detector of the official networks only says whether there is a face, and costs more than all others together. Where
both ends of an interval show a face and the landmarks between them give no reason to doubt, it is not asked in between
(docs/model.md#interval-search). Knows planes and finders, no files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from musetalk.faces import (
    Detection,
    Face,
    FaceFinder,
    GatedFinder,
    Pose,
    box_from_landmarks,
    face_of,
    gated_faces,
)
from musetalk.frames import Matrix, Picture, Planes
from musetalk.geometry import Box
from musetalk.options import FaceSearchMode

# Pictures looked at together when each is looked at.
FIND_BATCH = 8
# Pictures from one end of an interval to the next; of pictures above 1080p fewer, because they wait in memory.
INTERVAL, LARGE_INTERVAL = 16, 8
_LARGE_PX = 1920 * 1088
# Doubts: landmarks that move by this share of the face's longer side from one picture to the next, on average, and
# scores below this share of those at the interval's begin.
_JUMP, _FALL = 0.2, 0.7


class FaceSearch(Protocol):
    """Finds faces in consecutive pictures; the answers come in order, some pictures later."""

    def add(self, planes: Planes) -> list[Face | None]:
        """Look at one more picture; returns the faces that became known."""

    def finish(self) -> list[Face | None]:
        """Faces of the remaining pictures; the source has no more."""


def start_search(
    finder: FaceFinder, mode: FaceSearchMode, size: tuple[int, int], matrix: Matrix, bbox_shift: int
) -> FaceSearch:
    """A search through pictures of `size` (width, height) px; a finder without a gate looks at every picture."""
    if mode == "interval" and isinstance(finder, GatedFinder):
        return IntervalSearch(finder, matrix, bbox_shift, interval_for(*size))
    return EveryFrameSearch(finder, matrix, bbox_shift)


def interval_for(width: int, height: int) -> int:
    """Pictures from one end of an interval to the next."""
    return INTERVAL if width * height <= _LARGE_PX else LARGE_INTERVAL


class EveryFrameSearch:
    """Asks the finder about every picture: upstream's way, and what golden vectors check."""

    def __init__(self, finder: FaceFinder, matrix: Matrix, bbox_shift: int) -> None:
        self._finder, self._matrix, self._shift = finder, matrix, bbox_shift
        self._waiting: list[Planes] = []

    def add(self, planes: Planes) -> list[Face | None]:
        """Look at one more picture; returns the faces that became known."""
        self._waiting.append(planes)
        return self.finish() if len(self._waiting) >= FIND_BATCH else []

    def finish(self) -> list[Face | None]:
        """Faces of the remaining pictures."""
        pictures = [Picture(planes, self._matrix) for planes in self._waiting]
        self._waiting.clear()
        if not pictures:
            return []
        if isinstance(self._finder, GatedFinder):
            return gated_faces(self._finder, pictures, self._shift)
        return self._finder.find([picture.bgr for picture in pictures], bbox_shift=self._shift)


class IntervalSearch:
    """Asks the detector at the ends of intervals, and inside only where there is a doubt.

    An interval begins behind the last picture that was looked at. Without a face there, every picture is looked at.
    """

    def __init__(self, finder: GatedFinder, matrix: Matrix, bbox_shift: int, interval: int) -> None:
        self._finder, self._matrix, self._shift, self._interval = finder, matrix, bbox_shift, interval
        self._waiting: list[Planes] = []
        self._is_first = True
        # Landmarks of the last end and its score; None when it shows no face.
        self._end: tuple[Pose, float] | None = None

    def add(self, planes: Planes) -> list[Face | None]:
        """Look at one more picture; returns the faces that became known."""
        self._waiting.append(planes)
        # The first picture is an end by itself.
        wanted = 1 if self._is_first else self._interval
        return self.finish() if len(self._waiting) >= wanted else []

    def finish(self) -> list[Face | None]:
        """Faces of the remaining pictures, of which the last is an end."""
        pictures = [Picture(planes, self._matrix) for planes in self._waiting]
        self._waiting.clear()
        if not pictures:
            return []
        self._is_first = False
        faces, self._end = self._at_each(pictures) if self._end is None else self._between(pictures, *self._end)
        return faces

    def _at_each(self, pictures: Sequence[Picture]) -> tuple[list[Face | None], tuple[Pose, float] | None]:
        """Behind a picture without a face: the detector's answer for each picture."""
        detected = self._finder.detect(pictures)
        with_face = [index for index, found in enumerate(detected) if found is not None]
        poses = dict(zip(with_face, self._finder.poses([pictures[index] for index in with_face]), strict=True))
        return self._faces(pictures, poses, dict(enumerate(detected)), 1.0)

    def _between(
        self, pictures: Sequence[Picture], first: Pose, score: float
    ) -> tuple[list[Face | None], tuple[Pose, float] | None]:
        """Behind a picture with a face: landmarks everywhere, the detector where they leave a doubt."""
        poses = self._finder.poses(pictures)
        last = len(pictures) - 1
        doubtful = doubts(first, poses, [picture.size for picture in pictures], self._shift)
        sure = 0.0 if last in doubtful else self._finder.confirms(pictures[last], poses[last])
        looked = self._look(pictures, sorted(doubtful if sure else {*doubtful, last}))
        is_face = {index: found is not None for index, found in looked.items()} | ({last: True} if sure else {})
        looked |= self._look(pictures, beside_no_face(is_face))
        return self._faces(pictures, dict(enumerate(poses)), looked, min(score, sure or score))

    def _look(self, pictures: Sequence[Picture], indices: Sequence[int]) -> dict[int, Detection | None]:
        """The detector's answers for some of the pictures, by their index."""
        found = self._finder.detect([pictures[index] for index in indices]) if indices else []
        return dict(zip(indices, found, strict=True))

    def _faces(
        self,
        pictures: Sequence[Picture],
        poses: dict[int, Pose],
        looked: dict[int, Detection | None],
        trusted_score: float,
    ) -> tuple[list[Face | None], tuple[Pose, float] | None]:
        """Faces by what was seen; a picture that was not looked at has a face with a box from its landmarks."""
        faces: list[Face | None] = []
        # Never used: a picture whose landmarks give no box is looked at.
        trusted = (Box(0, 0, 0, 0), trusted_score)
        for index, picture in enumerate(pictures):
            found = looked.get(index, trusted)
            faces.append(None if found is None else face_of(poses[index], found, picture.size, self._shift))
        last = len(pictures) - 1
        end = looked.get(last, trusted)
        return faces, None if end is None else (poses[last], end[1])


def doubts(first: Pose, poses: Sequence[Pose], sizes: Sequence[tuple[int, int]], bbox_shift: int) -> set[int]:
    """Indices of the poses behind `first`, which shows a face, that the detector has to look at.

    Specified in docs/model.md#interval-search.
    """
    doubtful: set[int] = set()
    previous = first
    for index, (pose, size) in enumerate(zip(poses, sizes, strict=True)):
        if _moved(previous, pose) > _JUMP:
            # What jumps may be wrong on either side of the jump.
            doubtful |= {index, max(0, index - 1)}
        # Also true of a score that is no larger than zero, which says nothing.
        if not pose.score > _FALL * first.score > 0 or not _gives_box(pose, size, bbox_shift):
            doubtful.add(index)
        previous = pose
    return doubtful


def _moved(before: Pose, after: Pose) -> float:
    """Mean way of the landmarks as a share of the face's longer side."""
    side = max(float(np.ptp(before.landmarks, axis=0).max()), 1.0)
    return float(np.hypot(*(after.landmarks - before.landmarks).T).mean()) / side


def _gives_box(pose: Pose, size: tuple[int, int], bbox_shift: int) -> bool:
    """Whether the crop box comes from the landmarks alone and is inside the picture."""
    nothing = Box(0, 0, 0, 0)
    return not box_from_landmarks(pose.points, nothing, bbox_shift).clipped(*size).is_empty


def beside_no_face(is_face: dict[int, bool]) -> list[int]:
    """Indices that are still to be looked at, given the answers for some of them and a face at -1.

    Those between two neighbours among the answers of which one is no face.
    """
    known = sorted({-1: True, **is_face}.items())
    return [
        index
        for (first, at_first), (second, at_second) in pairwise(known)
        if not (at_first and at_second)
        for index in range(first + 1, second)
    ]


class FrameSearch:
    """Turns the faces of pictures into those of frames: frames that repeat a picture share its face."""

    def __init__(self, search: FaceSearch, known: Sequence[Face | None] = ()) -> None:
        """`known` are the faces of the frames before, which were searched earlier."""
        self._search = search
        self._has_begun = bool(known)
        self._last = known[-1] if known else None
        # How many frames show each picture whose face is not known yet.
        self._counts: deque[int] = deque()

    def add(self, planes: Planes, *, is_repeat: bool) -> list[Face | None]:
        """Look at one more frame; returns the faces that became known, a frame each."""
        if is_repeat and self._has_begun:
            if not self._counts:
                return [self._last]
            self._counts[-1] += 1
            return []
        self._has_begun = True
        self._counts.append(1)
        return self._of_frames(self._search.add(planes))

    def finish(self) -> list[Face | None]:
        """Faces of the remaining frames."""
        return self._of_frames(self._search.finish())

    def _of_frames(self, found: Sequence[Face | None]) -> list[Face | None]:
        faces: list[Face | None] = []
        for face in found:
            faces += [face] * self._counts.popleft()
            self._last = face
        return faces
