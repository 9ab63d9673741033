"""Size and crop of the output: strict grammar, even numbers, the face never cut."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from musetalk.errors import RequestError
from musetalk.geometry import Box
from musetalk.output_geometry import (
    MAX_SIDE,
    OutputPlan,
    Resolution,
    parse_aspect_ratio,
    parse_request,
    parse_resolution,
    plan_output,
)

FACE = Box(300, 300, 420, 420)


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
            "512X512",
            "512x",
            "1e3p",
            "Source",
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
    with pytest.raises(RequestError, match="aspect_ratio") as caught:
        parse_aspect_ratio(text)
    assert caught.value.details["field"] == "aspect_ratio"


def test_a_request_is_judged_before_any_source_is_known() -> None:
    assert parse_request(None, "source") == (None, None)
    assert parse_request("9:16", "720p") == (Fraction(9, 16), Resolution(short_side=720))
    assert parse_request("1:1", "640x360") == (Fraction(1), Resolution(size=(640, 360)))
    for aspect, resolution, field in [("9:16", "720", "resolution"), ("9/16", "720p", "aspect_ratio")]:
        with pytest.raises(RequestError) as caught:
            parse_request(aspect, resolution)
        assert caught.value.details["field"] == field
    # 2160 px high and four times as wide is more than any output may be.
    with pytest.raises(RequestError, match="8640 px") as caught:
        parse_request("4:1", "2160p")
    assert caught.value.details["field"] == "resolution"


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
    plan = plan_output(*source, FACE, aspect, resolution)
    assert (plan.width, plan.height) == size


def test_a_size_wins_over_another_shape_and_says_so() -> None:
    plan = plan_output(1280, 720, None, "1:1", "640x360")
    assert (plan.width, plan.height) == (640, 360)
    assert len(plan.warnings) == 1
    assert plan_output(1280, 720, None, "16:9", "854x480").warnings == ()


def test_more_than_double_size_is_refused() -> None:
    assert plan_output(320, 240, None, None, "480p").width == 640
    with pytest.raises(RequestError, match="2 times") as caught:
        plan_output(320, 240, None, None, "482p")
    assert caught.value.details["field"] == "resolution"
    with pytest.raises(RequestError, match="2 times"):
        plan_output(320, 240, None, None, "644x480")


def test_exactly_double_size_is_made_whatever_the_rounding() -> None:
    # 16:9 of 132 lines is 234.67 px wide, of 264 lines 469.33: the even numbers are 234 and 470.
    for height in range(130, 500, 2):
        plan = plan_output(1900, height, None, "16:9", f"{2 * height}p")
        assert plan.height == 2 * height


def test_a_face_too_wide_for_the_shape_gets_black_instead_of_a_cut() -> None:
    face = Box(100, 200, 1100, 500)
    plan = plan_output(1280, 720, face, "9:16", None)
    assert plan.crop.x0 <= face.x0
    assert plan.crop.x1 >= face.x1
    assert plan.crop.height > 720
    # As much above as below.
    assert abs(plan.crop.y0 + (plan.crop.y1 - 720)) <= 2


@pytest.mark.parametrize(
    ("source", "face", "aspect", "resolution", "field"),
    [
        # A strip of the picture.
        ((1280, 720), FACE, "1:100", None, "aspect_ratio"),
        ((1280, 720), None, None, "128x2000", "resolution"),
        # A tall face in a flat shape: almost nothing but black.
        ((144, 904), Box(20, 60, 140, 860), "19:1", None, "aspect_ratio"),
    ],
)
def test_a_shape_that_shows_next_to_nothing_is_refused(
    source: tuple[int, int], face: Box | None, aspect: str | None, resolution: str | None, field: str
) -> None:
    with pytest.raises(RequestError) as caught:
        plan_output(*source, face, aspect, resolution)
    assert caught.value.details["field"] == field


@pytest.mark.parametrize("size", [(66, 40), (4096, 2160)])
def test_a_source_outside_the_sizes_of_requests_may_stay_as_it_is(size: tuple[int, int]) -> None:
    assert plan_output(*size, None, None, None) == OutputPlan(Box(0, 0, *size), *size)


def test_a_window_longer_than_any_output_is_shrunk() -> None:
    plan = plan_output(1280, 2000, Box(0, 0, 1280, 2000), "16:1", None)
    assert (plan.width, plan.height) == (3840, 240)


def test_the_window_is_centred_on_the_face_and_stays_inside_the_frame() -> None:
    for x, start in [(0, 0), (600, 458), (1180, 876)]:
        crop = plan_output(1280, 720, Box(x, 300, x + 100, 400), "9:16", None).crop
        # 404 px wide: 458 + 202 = 660, within an even step of the face's middle at 650 + margin.
        assert crop.height == 720
        assert 0 <= crop.x0 <= 1280 - crop.width
        assert crop.x0 == start or abs((crop.x0 + crop.x1) // 2 - (x + 50)) <= 2


def test_an_odd_frame_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="even"):
        plan_output(1279, 720, None, None, None)


even = st.integers(32, 1900).map(lambda number: number * 2)
aspects = st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda pair: f"{pair[0]}:{pair[1]}")
sides = st.integers(64, 1920).map(lambda number: number * 2)
resolutions = st.none() | sides.map(lambda side: f"{side}p") | st.tuples(sides, sides).map("{0[0]}x{0[1]}".format)


@settings(max_examples=300, deadline=None)
@given(width=even, height=even, corners=st.tuples(*[st.floats(0, 1)] * 4), aspect_ratio=aspects, resolution=resolutions)
def test_any_accepted_request_keeps_the_promises(
    width: int,
    height: int,
    corners: tuple[float, float, float, float],
    aspect_ratio: str | None,
    resolution: str | None,
) -> None:
    xs, ys = sorted((corners[0], corners[2])), sorted((corners[1], corners[3]))
    face = Box(int(xs[0] * (width - 1)), int(ys[0] * (height - 1)), int(xs[1] * width) + 1, int(ys[1] * height) + 1)
    face = face.clipped(width, height)
    assume(not face.is_empty)
    try:
        plan = plan_output(width, height, face, aspect_ratio, resolution)
    except RequestError:
        assume(False)
    crop = plan.crop
    aspect, wanted = parse_request(aspect_ratio, resolution)
    assert all(number % 2 == 0 for number in (*crop, plan.width, plan.height))
    assert 0 < max(plan.width, plan.height) <= MAX_SIDE
    # The face is inside, with a quarter of its size around it as far as the frame goes.
    margin_x, margin_y = face.width // 4, face.height // 4
    around = Box(face.x0 - margin_x, face.y0 - margin_y, face.x1 + margin_x, face.y1 + margin_y).clipped(width, height)
    assert crop.x0 <= around.x0
    assert crop.y0 <= around.y0
    assert crop.x1 >= around.x1
    assert crop.y1 >= around.y1
    # Black is added on one axis only, the same on both sides.
    assert crop.width <= width or crop.height <= height
    if crop.width <= width:
        assert crop.x0 >= 0
        assert crop.x1 <= width
    # No window is smaller than the largest one inside the frame.
    shape = Fraction(*wanted.size) if wanted is not None and wanted.size is not None else aspect
    if shape is not None:
        assert crop.height >= min(Fraction(height), width / shape) - 1
        assert abs(crop.width - crop.height * shape) <= 1 + shape
    # At most twice as large, and not stretched by more than rounding to even numbers explains.
    assert min(plan.width, plan.height) <= 2 * min(crop.width, crop.height)
    assert abs(plan.width * crop.height - plan.height * crop.width) <= 2 * (plan.width + plan.height) + 2 * (
        crop.width + crop.height
    )
    if wanted is not None and wanted.size is not None:
        assert (plan.width, plan.height) == wanted.size
    elif wanted is not None:
        assert min(plan.width, plan.height) == wanted.short_side
    assert bool(plan.warnings) <= (aspect is not None and wanted is not None and wanted.size is not None)
    # What was made is what the same request would keep.
    assert plan_output(plan.width, plan.height, None, aspect_ratio, resolution) == OutputPlan(
        Box(0, 0, plan.width, plan.height), plan.width, plan.height, plan.warnings
    )


@settings(max_examples=50, deadline=None)
@given(width=even, height=even, text=st.sampled_from([None, "", "source"]))
def test_source_and_source_is_the_identity(width: int, height: int, text: str | None) -> None:
    plan = plan_output(width, height, FACE, text, text)
    assert plan == OutputPlan(Box(0, 0, width, height), width, height)


@given(st.text(max_size=12))
def test_any_text_is_parsed_or_refused_by_name(text: str) -> None:
    for field, parse in [("aspect_ratio", parse_aspect_ratio), ("resolution", parse_resolution)]:
        try:
            parse(text)
            refused = field
        except RequestError as error:
            refused = str(error.details["field"])
        assert refused == field
