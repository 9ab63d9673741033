"""Boxes and frame order: what clipping, evening and growing promise, for any whole numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.geometry import Box, blend_box, ping_pong_index, source_index
from musetalk.options import LoopMode

edges = st.integers(-300, 300)
boxes = st.builds(Box, edges, edges, edges, edges)
full_boxes = st.builds(
    lambda x0, y0, width, height: Box(x0, y0, x0 + width, y0 + height),
    edges,
    edges,
    st.integers(1, 200),
    st.integers(1, 200),
)
sizes = st.integers(1, 200)


def pixels(box: Box) -> set[tuple[int, int]]:
    """Every pixel of a small box."""
    return {(x, y) for x in range(box.x0, box.x1) for y in range(box.y0, box.y1)}


@settings(deadline=None)
@given(boxes)
def test_a_box_is_empty_exactly_when_it_holds_no_pixel(box: Box) -> None:
    assert box.is_empty == (max(0, box.width) * max(0, box.height) == 0)
    assert (box.width, box.height) == (box.x1 - box.x0, box.y1 - box.y0)


@settings(deadline=None)
@given(boxes, edges, edges)
def test_shifting_keeps_the_size_and_goes_back(box: Box, dx: int, dy: int) -> None:
    moved = box.shifted(dx, dy)
    assert (moved.width, moved.height) == (box.width, box.height)
    assert (moved.x0 - box.x0, moved.y0 - box.y0) == (dx, dy)
    assert moved.shifted(-dx, -dy) == box


small = st.integers(-12, 12)


@settings(deadline=None)
@given(st.builds(Box, small, small, small, small), st.integers(1, 9), st.integers(1, 9))
def test_clipping_keeps_exactly_the_pixels_inside_the_picture(box: Box, width: int, height: int) -> None:
    clipped = box.clipped(width, height)
    assert pixels(clipped) == pixels(box) & pixels(Box(0, 0, width, height))


@settings(deadline=None)
@given(boxes, sizes, sizes)
def test_a_clipped_box_can_index_the_picture(box: Box, width: int, height: int) -> None:
    clipped = box.clipped(width, height)
    assert 0 <= clipped.x0 <= clipped.x1 <= width
    assert 0 <= clipped.y0 <= clipped.y1 <= height
    assert clipped.clipped(width, height) == clipped


@settings(deadline=None)
@given(sizes, sizes)
def test_the_picture_itself_is_not_clipped(width: int, height: int) -> None:
    assert Box(0, 0, width, height).clipped(width, height) == Box(0, 0, width, height)


@settings(deadline=None)
@given(full_boxes)
def test_evening_gives_the_smallest_even_box_around(box: Box) -> None:
    even = box.evened()
    assert not any(edge % 2 for edge in even)
    for outer, inner in ((even.x0, box.x0), (even.y0, box.y0)):
        assert 0 <= inner - outer <= 1
    for outer, inner in ((even.x1, box.x1), (even.y1, box.y1)):
        assert 0 <= outer - inner <= 1
    assert even.evened() == even


@settings(deadline=None)
@given(full_boxes, st.integers(1, 100), st.integers(1, 100))
def test_evening_stays_inside_an_even_picture(box: Box, half_width: int, half_height: int) -> None:
    width, height = 2 * half_width, 2 * half_height
    even = box.clipped(width, height).evened()
    assert even == even.clipped(width, height)


@settings(deadline=None)
@given(full_boxes, st.integers(0, 100), st.integers(300, 600))
def test_the_margin_grows_only_the_bottom_and_not_beyond_the_picture(box: Box, margin: int, height: int) -> None:
    box = box.clipped(600, height)
    grown = box.with_bottom_margin(margin, height)
    assert grown[:3] == box[:3]
    assert grown.y1 == min(box.y1 + margin, height)
    assert box.y1 <= grown.y1


@settings(deadline=None)
@given(full_boxes, st.floats(1.0, 3.0))
def test_the_blend_box_is_an_even_square_about_the_same_middle(box: Box, expand: float) -> None:
    around = blend_box(box, expand)
    assert around.width == around.height
    assert around.width % 2 == 0
    assert (around.x0 + around.x1) // 2 == (box.x0 + box.x1) // 2
    assert (around.y0 + around.y1) // 2 == (box.y0 + box.y1) // 2
    even = max(box.width, box.height) // 2 * 2
    assert expand * even - 2 < around.width <= expand * even


@settings(deadline=None)
@given(st.builds(lambda x, y, w, h: Box(x, y, x + w, y + h), edges, edges, st.integers(4, 200), st.integers(4, 200)))
def test_the_blend_box_holds_the_crop_box(box: Box) -> None:
    around = blend_box(box)
    assert around.x0 <= box.x0 < box.x1 <= around.x1
    assert around.y0 <= box.y0 < box.y1 <= around.y1


def test_a_box_of_one_pixel_has_an_empty_blend_box() -> None:
    assert blend_box(Box(5, 7, 6, 8)).is_empty


# -- order of frames --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 500))
def test_a_cycle_goes_there_and_back_with_both_ends_twice(length: int) -> None:
    there = list(range(length))
    assert [ping_pong_index(index, length) for index in range(2 * length)] == there + there[::-1]


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_the_order_repeats_and_never_jumps(index: int, length: int) -> None:
    here, later = ping_pong_index(index, length), ping_pong_index(index + 1, length)
    assert 0 <= here < length
    assert abs(later - here) <= 1
    assert ping_pong_index(index + 2 * length, length) == here


@pytest.mark.parametrize(("index", "length"), [(0, 0), (0, -1), (-1, 5)])
def test_there_is_no_frame_of_an_empty_source_or_before_the_first(index: int, length: int) -> None:
    with pytest.raises(ValueError, match="no frame"):
        ping_pong_index(index, length)


def test_each_mode_has_its_own_order() -> None:
    orders: dict[LoopMode, list[int]] = {
        "ping_pong": [0, 1, 2, 2, 1, 0, 0, 1],
        "loop": [0, 1, 2, 0, 1, 2, 0, 1],
        "hold": [0, 1, 2, 2, 2, 2, 2, 2],
        "trim": [0, 1, 2, 2, 2, 2, 2, 2],
    }
    for mode, order in orders.items():
        assert [source_index(mode, index, 3) for index in range(8)] == order


@pytest.mark.parametrize("mode", ["ping_pong", "loop", "hold", "trim"])
@given(st.integers(1, 500), st.data())
def test_every_mode_begins_with_the_source_and_stays_inside_it(
    mode: LoopMode, length: int, data: st.DataObject
) -> None:
    assert [source_index(mode, index, length) for index in (0, length - 1)] == [0, length - 1]
    assert 0 <= source_index(mode, data.draw(st.integers(0, 5_000)), length) < length


@pytest.mark.parametrize(("index", "length"), [(0, 0), (-1, 3), (2, -1)])
@pytest.mark.parametrize("mode", ["ping_pong", "loop", "hold", "trim"])
def test_no_mode_has_a_frame_outside(mode: LoopMode, index: int, length: int) -> None:
    with pytest.raises(ValueError, match="no frame"):
        source_index(mode, index, length)
