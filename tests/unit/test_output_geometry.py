"""Size and crop of the output: strict grammar, even numbers, the face never cut."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from errors import RequestError
from musetalk.geometry import Box
from musetalk.output_geometry import MAX_SIDE, parse_aspect_ratio, parse_resolution, plan_output


@pytest.mark.parametrize("text", [None, "", "source"])
def test_the_source_is_kept_when_nothing_is_asked(text: str | None) -> None:
    plan = plan_output(704, 1216, Box(200, 300, 480, 600), text, text)
    assert (plan.crop, plan.width, plan.height, plan.warnings) == (Box(0, 0, 704, 1216), 704, 1216, ())


@pytest.mark.parametrize(
    "text",
    [
        *("720", "720P", "p720", "720 p", " 720p", "+720p", "72O p", "1280*720", "1280x720x3", "-512x512", "512.0x512"),
        *(
            "x",
            "0p",
            "127p",
            "721p",
            "3842p",
            "126x512",
            "512x3842",
            "513x512",
            "99999p",
            "\u0667\u0662\u0660p",
            "720p\n",
        ),
    ],
)
def test_a_resolution_is_not_guessed(text: str) -> None:
    with pytest.raises(RequestError, match="resolution") as caught:
        parse_resolution(text)
    assert caught.value.details["field"] == "resolution"


@pytest.mark.parametrize(
    "text", ["16/9", "16:0", "0:9", "101:1", "16:9:1", "1.5:1", "-1:1", " 1:1", "square", ":", "1:1\n", "١:١"]
)
def test_an_aspect_ratio_is_not_guessed(text: str) -> None:
    with pytest.raises(RequestError, match="aspect_ratio"):
        parse_aspect_ratio(text)


@pytest.mark.parametrize(
    ("source", "aspect", "resolution", "size"),
    [
        ((1280, 720), None, "360p", (640, 360)),
        ((720, 1280), None, "360p", (360, 640)),
        ((1280, 720), "1:1", None, (720, 720)),
        ((1280, 720), "9:16", None, (404, 720)),
        ((704, 1216), "9:16", "720p", (720, 1280)),
        ((1920, 1080), "16:9", None, (1920, 1080)),
        ((704, 1216), None, "512x512", (512, 512)),
    ],
)
def test_usual_requests(
    source: tuple[int, int], aspect: str | None, resolution: str | None, size: tuple[int, int]
) -> None:
    plan = plan_output(*source, Box(300, 300, 420, 420), aspect, resolution)
    assert (plan.width, plan.height) == size


def test_a_size_wins_over_another_shape_and_says_so() -> None:
    plan = plan_output(1280, 720, None, "1:1", "640x360")
    assert (plan.width, plan.height) == (640, 360)
    assert len(plan.warnings) == 1
    assert plan_output(1280, 720, None, "16:9", "854x480").warnings == ()


def test_more_than_double_size_is_refused() -> None:
    assert plan_output(320, 240, None, None, "480p").width == 640
    with pytest.raises(RequestError, match="resolution"):
        plan_output(320, 240, None, None, "482p")


def test_a_face_too_wide_for_the_shape_gets_black_instead_of_a_cut() -> None:
    face = Box(100, 200, 1100, 500)
    plan = plan_output(1280, 720, face, "9:16", None)
    assert plan.crop.x0 <= face.x0
    assert plan.crop.x1 >= face.x1
    assert plan.crop.height > 720


even = st.integers(32, 1900).map(lambda number: number * 2)


@settings(max_examples=300, deadline=None)
@given(
    width=even,
    height=even,
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    aspect=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    side=st.none() | st.integers(64, 1920).map(lambda number: number * 2),
)
def test_any_accepted_request_keeps_the_promises(
    width: int,
    height: int,
    corners: tuple[float, float, float, float],
    aspect: tuple[int, int] | None,
    side: int | None,
) -> None:
    xs, ys = sorted((corners[0], corners[2])), sorted((corners[1], corners[3]))
    face = Box(int(xs[0] * (width - 1)), int(ys[0] * (height - 1)), int(xs[1] * width) + 1, int(ys[1] * height) + 1)
    face = face.clipped(width, height)
    assume(not face.is_empty)
    try:
        plan = plan_output(
            width,
            height,
            face,
            None if aspect is None else f"{aspect[0]}:{aspect[1]}",
            None if side is None else f"{side}p",
        )
    except RequestError:
        assume(False)
    crop = plan.crop
    assert all(number % 2 == 0 for number in (*crop, plan.width, plan.height))
    assert 0 < max(plan.width, plan.height) <= MAX_SIDE
    # The face is inside.
    assert crop.x0 <= face.x0
    assert crop.y0 <= face.y0
    assert crop.x1 >= face.x1
    assert crop.y1 >= face.y1
    # Never larger than the frame in both directions: black is added on one axis only.
    assert crop.width <= width or crop.height <= height or aspect is None
    # The picture is not stretched by more than rounding to even numbers explains.
    stretch = Fraction(plan.width, plan.height) / Fraction(crop.width, crop.height)
    slack = Fraction(4, min(plan.width, plan.height)) + Fraction(4, min(crop.width, crop.height))
    assert abs(stretch - 1) <= slack
    if aspect is not None:
        assert abs(Fraction(plan.width, plan.height) / Fraction(*aspect) - 1) <= slack
    if side is not None:
        assert min(plan.width, plan.height) == side
