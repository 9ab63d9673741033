"""Faces of consecutive frames over time, as far as later frames can no longer change them.

Gaps end at a later face and smoothing looks ahead, both by a bounded number of frames; so a source can be drawn while
it is searched. Knows no pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter1d

from musetalk.faces import Face
from musetalk.geometry import Box

# A Gaussian ends here, in sigmas (scipy's own choice).
_GAUSSIAN_REACH = 4.0


class FaceTrack:
    """Faces as found, and as they are used: short gaps filled, boxes smoothed (docs/model.md#gaps-and-smoothing)."""

    def __init__(self, max_gap: int, sigma_frames: float) -> None:
        """Gaps of at most `max_gap` frames are filled; boxes are smoothed with a Gaussian of `sigma_frames`."""
        self._max_gap, self._sigma = max_gap, sigma_frames
        self._reach = smoothing_reach(sigma_frames)
        self.found: list[Face | None] = []
        self._settled: list[Face | None] = []
        self._last_face: int | None = None
        self.is_complete = False

    @property
    def has_face(self) -> bool:
        """Whether any frame so far shows a face."""
        return self._last_face is not None

    @property
    def n_settled(self) -> int:
        """Frames from the first on whose face will not change."""
        return len(self._settled)

    @property
    def n_interpolated(self) -> int:
        """Settled frames whose face was not found but lies in a short gap."""
        return sum(face is not None and found is None for face, found in zip(self._settled, self.found, strict=False))

    def extend(self, faces: Sequence[Face | None]) -> None:
        """Add the faces of the next frames."""
        for face in faces:
            if face is not None:
                self._last_face = len(self.found)
            self.found.append(face)
        self._settle()

    def complete(self) -> None:
        """Settle every frame: there are no others."""
        self.is_complete = True
        self._settle()

    def face(self, index: int) -> Face | None:
        """The face of a settled frame; None also behind the last one."""
        return self._settled[index] if index < len(self._settled) else None

    def boxes(self) -> list[Box]:
        """Boxes of the settled frames that have one."""
        return [face.box for face in self._settled if face is not None]

    def _settle(self) -> None:
        start, end = len(self._settled), self._end_of_settled()
        if end <= start:
            return
        # From where on the last face before a gap, and then the smoothing's window, are complete.
        first = max(0, start - self._reach - self._max_gap - 2)
        filled = fill_gaps(self.found[first:], self._max_gap)
        self._settled += smooth_boxes(filled, self._sigma)[start - first : end - first]

    def _end_of_settled(self) -> int:
        n_found = len(self.found)
        if self.is_complete:
            return n_found
        if self._last_face is None or n_found - 1 - self._last_face > self._max_gap:
            n_filled = n_found
        else:
            # The frames behind the last face may be in a gap that will be filled.
            n_filled = self._last_face + 1
        return n_filled - self._reach


def fill_gaps(faces: Sequence[Face | None], max_gap: int) -> list[Face | None]:
    """Interpolate gaps of at most `max_gap` frames between two found faces; longer ones and the ends stay None."""
    filled = list(faces)
    previous: int | None = None
    for index, face in enumerate(faces):
        if face is None:
            continue
        if previous is not None and 1 < index - previous <= max_gap + 1:
            before = faces[previous]
            assert before is not None
            for between in range(previous + 1, index):
                filled[between] = _between(before, face, between - previous, index - previous)
        previous = index
    return filled


def _between(first: Face, second: Face, step: int, n_steps: int) -> Face:
    # Halves go up, in whole numbers: rounding to even can leave a box of 1 px with none.
    edges = [
        (2 * (a * (n_steps - step) + b * step) + n_steps) // (2 * n_steps)
        for a, b in zip(first.box, second.box, strict=True)
    ]
    landmarks = None
    if first.landmarks is not None and second.landmarks is not None:
        landmarks = first.landmarks + (second.landmarks - first.landmarks) * np.float32(step / n_steps)
    return Face(Box(*edges), landmarks, min(first.score, second.score))


def smoothing_reach(sigma_frames: float) -> int:
    """Frames before and behind one that its smoothed box depends on."""
    return int(_GAUSSIAN_REACH * sigma_frames + 0.5) if sigma_frames > 0 else 0


def smooth_boxes(faces: Sequence[Face | None], sigma_frames: float) -> list[Face | None]:
    """Boxes averaged over time with a Gaussian, each unbroken run for itself; 0 leaves all as it is.

    A run's ends repeat their outermost box, so a face that does not move keeps its box exactly.
    """
    smoothed = list(faces)
    if sigma_frames <= 0:
        return smoothed
    first = 0
    while first < len(faces):
        if faces[first] is None:
            first += 1
            continue
        last = first
        run: list[Face] = []
        while last < len(faces) and (face := faces[last]) is not None:
            run.append(face)
            last += 1
        edges = np.array([face.box for face in run], np.float64)
        means = np.floor(
            gaussian_filter1d(edges, sigma_frames, axis=0, mode="nearest", truncate=_GAUSSIAN_REACH) + 0.5
        ).astype(int)
        for offset, (face, row) in enumerate(zip(run, means, strict=True)):
            smoothed[first + offset] = replace(face, box=Box(*(int(edge) for edge in row)))
        first = last
    return smoothed
