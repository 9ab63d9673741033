"""Faces of consecutive frames over time, as far as later frames can no longer change them.

Gaps end at a later face and smoothing looks ahead, both by a bounded number of frames; so a source can be drawn while
it is searched. Knows no pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

from musetalk.faces import Face, fill_gaps, smooth_boxes, smoothing_reach
from musetalk.geometry import Box


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
