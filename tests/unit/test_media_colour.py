"""What colour tags mean and which are converted."""

from __future__ import annotations

import pytest

from musetalk.errors import MediaError
from musetalk.frames import BT601_NTSC, BT601_PAL, BT709, Colour
from musetalk.media.colour import Tags, plan_colour


@pytest.mark.parametrize(
    ("n_lines", "colour"), [(480, BT601_NTSC), (576, BT601_PAL), (719, BT601_NTSC), (720, BT709), (1080, BT709)]
)
@pytest.mark.parametrize("is_rgb", [False, True])
def test_without_tags_the_size_decides(n_lines: int, colour: Colour, is_rgb: bool) -> None:
    assert plan_colour(Tags(), n_lines, is_rgb=is_rgb).colour == colour


@pytest.mark.parametrize("code", [1, 5, 6])
@pytest.mark.parametrize("n_lines", [480, 1080])
def test_tagged_pictures_keep_their_matrix_whatever_their_size(code: int, n_lines: int) -> None:
    plan = plan_colour(Tags(matrix=code), n_lines)
    assert plan.colour.matrix_code == code
    assert plan.colour.matrix == ("bt709" if code == 1 else "bt601")
    assert not plan.converts_matrix
    assert not plan.converts_gamut


def test_primaries_and_transfer_pass_through() -> None:
    assert plan_colour(Tags(1, 12, 13), 1080).colour == Colour("bt709", 12, 13, 1)
    assert plan_colour(Tags(6, 1, 1), 480).colour == Colour("bt601", 1, 1, 6)


def test_the_matrix_follows_the_primaries_when_only_they_are_named() -> None:
    assert plan_colour(Tags(primaries=1), 480).colour.matrix == "bt709"
    assert plan_colour(Tags(primaries=6), 1080).colour.matrix == "bt601"
    assert plan_colour(Tags(primaries=9), 1080).converts_gamut


@pytest.mark.parametrize(("code", "matrix"), [(4, "bt601"), (7, "bt709")])
def test_old_matrices_are_converted(code: int, matrix: str) -> None:
    plan = plan_colour(Tags(matrix=code), 1080)
    assert plan.converts_matrix
    assert plan.colour.matrix == matrix


def test_wide_gamut_becomes_bt709() -> None:
    plan = plan_colour(Tags(9, 9, 14), 2160)
    assert plan.converts_gamut
    assert plan.colour == BT709


@pytest.mark.parametrize("transfer", [16, 18])
@pytest.mark.parametrize("is_rgb", [False, True])
def test_hdr_is_refused(transfer: int, is_rgb: bool) -> None:
    with pytest.raises(MediaError, match="HDR"):
        plan_colour(Tags(9, 9, transfer), 2160, is_rgb=is_rgb)


@pytest.mark.parametrize("matrix", [8, 10, 11, 14, 15, 99])
def test_matrices_that_cannot_be_read_are_refused(matrix: int) -> None:
    with pytest.raises(MediaError):
        plan_colour(Tags(matrix=matrix), 1080)


def test_the_matrix_of_rgb_pictures_means_nothing() -> None:
    assert plan_colour(Tags(matrix=8), 1080, is_rgb=True).colour == BT709
    assert plan_colour(Tags(matrix=0), 480).colour == BT601_NTSC
