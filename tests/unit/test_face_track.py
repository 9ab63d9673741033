"""Faces over time, frame by frame against all at once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.face_track import FaceTrack, fill_gaps, smooth_boxes, smoothing_reach
from musetalk.faces import Face
from musetalk.geometry import Box


def face(x: int) -> Face:
    return Face(Box(x, 20, x + 40 + x % 7, 90), None, 0.9)


_RUNS = st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 100)), max_size=14)


@given(_RUNS, st.integers(0, 6), st.sampled_from([0.0, 0.4, 1.0, 2.5]), st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_faces_that_settled_are_those_of_the_whole_source(
    runs: list[tuple[bool, int, int]], max_gap: int, sigma: float, step: int
) -> None:
    found = [face(x + 3 * n) if is_face else None for is_face, length, x in runs for n in range(length)]
    wanted = smooth_boxes(fill_gaps(found, max_gap), sigma)
    track = FaceTrack(max_gap, sigma)
    for first in range(0, len(found), step):
        track.extend(found[first : first + step])
        assert [track.face(index) for index in range(track.n_settled)] == wanted[: track.n_settled]
        # Bounded: what waits is in the reach of a gap and of the smoothing.
        assert len(track.found) - track.n_settled <= max_gap + smoothing_reach(sigma)
    track.complete()
    assert [track.face(index) for index in range(len(found))] == wanted
    assert track.face(len(found)) is None
    assert track.boxes() == [one.box for one in wanted if one is not None]
    assert track.n_interpolated == sum(one is not None for one in wanted) - sum(one is not None for one in found)


def test_a_face_without_smoothing_is_known_at_once() -> None:
    track = FaceTrack(12, 0)
    track.extend([None, None])
    assert track.n_settled == 2
    track.extend([face(1), face(2)])
    assert track.n_settled == 4
    assert track.has_face
    track.extend([None] * 12)
    assert track.n_settled == 4
    track.extend([None])
    assert track.n_settled == 17
