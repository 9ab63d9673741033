"""Sources to frames: each tick shows the right picture, and the picture is the right one."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from musetalk.errors import MediaError
from musetalk.frames import BT601_NTSC, BT709, Planes, bgr_to_planes, planes_to_bgr
from musetalk.media import MediaLimits, SourceFrame, SourceInfo, inspect_source, probe_source, read_source
from tests.support import clips
from tests.support.clips import Tags, picture, picture_planes, planes_frame, read_number, write_clip

LIMITS = MediaLimits()
NTSC = Fraction(30_000, 1001)
# A coded picture that loses nothing, for comparisons of single values.
LOSSLESS: dict[str, Any] = {"codec": "ffv1"}


def read(path: Path, **options: Any) -> tuple[SourceInfo, list[SourceFrame]]:
    info = inspect_source(path, LIMITS)
    return info, list(read_source(path, info, LIMITS, **options))


def numbers(frames: list[SourceFrame]) -> list[int | None]:
    return [read_number(frame.planes.y) for frame in frames]


def noise(width: int, height: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> np.ndarray[Any, Any]:
    """Smooth random values in [low, high], float64 (height, width, 3)."""
    coarse = np.random.default_rng(seed).random((8, 8, 3))
    smooth = np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    return np.asarray(low + (high - low) * smooth, np.float64)


def assert_unbiased(first: Planes, second: Planes, *, most: float = 0.1, mean_abs: float = 0.6) -> None:
    for name in ("y", "u", "v"):
        difference = getattr(first, name).astype(np.float64) - getattr(second, name)
        assert abs(difference.mean()) < most, name
        assert np.abs(difference).mean() < mean_abs, name


# -- time -------------------------------------------------------------------------------------------------------------

RATES = [Fraction(24_000, 1001), 24, 25, NTSC, 30, 50, Fraction(60_000, 1001), 60]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("suffix", "b_frames"), [("mp4", 0), ("mp4", 2), ("mkv", 2), ("mov", 0), ("ts", 2)])
def test_a_constant_rate_comes_out_picture_by_picture(
    tmp_path: Path, rate: Fraction, suffix: str, b_frames: int
) -> None:
    path = write_clip(tmp_path / f"clip.{suffix}", 50, rate=Fraction(rate), b_frames=b_frames)
    info, frames = read(path)
    assert info.rate == rate
    assert numbers(frames) == list(range(50))
    assert [frame.index for frame in frames] == list(range(50))
    assert not any(frame.is_repeat for frame in frames)
    assert info.n_frames == 50
    assert info.duration == pytest.approx(50 / Fraction(rate), abs=0.002)


def test_webm_and_avi_come_out_picture_by_picture(tmp_path: Path) -> None:
    webm = write_clip(tmp_path / "clip.webm", 30, codec="libvpx-vp9", rate=NTSC)
    avi = write_clip(tmp_path / "clip.avi", 30, codec="mpeg4", options={"b": "4000000"})
    for path in (webm, avi):
        _, frames = read(path)
        assert numbers(frames) == list(range(30))


def test_avi_with_pictures_out_of_order_falls_back_to_index_by_rate(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.avi", 30, b_frames=2)
    info, frames = read(path)
    assert not info.trusts_timestamps
    assert numbers(frames) == list(range(30))


@pytest.mark.slow
def test_ten_minutes_do_not_drift(tmp_path: Path) -> None:
    n_frames = 17_983
    path = write_clip(
        tmp_path / "clip.mkv",
        n_frames,
        size=(64, 64),
        rate=NTSC,
        draw=lambda index: clips.drawn_frame(index % clips.MAX_NUMBER, 64, 64),
    )
    info = inspect_source(path, LIMITS)
    assert info.n_frames == n_frames
    count = 0
    for frame in read_source(path, info, LIMITS):
        assert read_number(frame.planes.y) == frame.index % clips.MAX_NUMBER
        assert not frame.is_repeat
        count += 1
    assert count == n_frames


def test_a_variable_rate_shows_each_picture_at_its_time(tmp_path: Path) -> None:
    steps = [1, 1, 3, 2, 5, 1, 1, 10, 2, 1]
    times = [Fraction(sum(steps[:index]), 25) for index in range(len(steps))]
    path = write_clip(tmp_path / "clip.mp4", len(times), timestamps=times, last_duration=Fraction(4, 25))
    info, frames = read(path)
    assert info.rate == 25
    expected = [max(i for i, time in enumerate(times) if time <= Fraction(tick, 25)) for tick in range(len(frames))]
    assert numbers(frames) == expected
    assert len(frames) == sum(steps[:-1]) + 4 == info.n_frames
    assert [frame.is_repeat for frame in frames] == [
        tick > 0 and expected[tick] == expected[tick - 1] for tick in range(len(frames))
    ]


def test_repeats_share_their_picture_and_new_pictures_do_not(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 4, rate=Fraction(5))
    _, frames = read(path)
    for before, after in pairwise(frames):
        assert np.shares_memory(before.planes.y, after.planes.y) == after.is_repeat


def test_a_variable_rate_between_the_ticks(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    times = [Fraction(0)]
    for gap in rng.integers(300, 9000, 40):
        times.append(times[-1] + Fraction(int(gap), 90_000))
    path = write_clip(tmp_path / "clip.mp4", len(times), timestamps=times, last_duration=Fraction(1, 10))
    info, frames = read(path)
    late = Fraction(1, 1000)
    shown = numbers(frames)
    for tick, number in enumerate(shown):
        now = tick / info.rate
        strict = max(i for i, time in enumerate(times) if time <= now)
        assert number in {strict, max(i for i, time in enumerate(times) if time <= now + late)}
    assert len(frames) == pytest.approx(float((times[-1] + Fraction(1, 10)) * info.rate), abs=1)


def test_a_start_offset_is_left_out(tmp_path: Path) -> None:
    times = [Fraction(3) + Fraction(index, 25) for index in range(20)]
    path = write_clip(tmp_path / "clip.mp4", 20, timestamps=times, b_frames=2)
    info, frames = read(path)
    assert numbers(frames) == list(range(20))
    assert info.duration == pytest.approx(0.8)


def test_slow_sources_are_raised_and_fast_ones_resampled(tmp_path: Path) -> None:
    slow = write_clip(tmp_path / "slow.mp4", 10, rate=Fraction(5))
    info, frames = read(slow)
    assert info.rate == 25
    assert numbers(frames) == [tick // 5 for tick in range(50)]
    fast = write_clip(tmp_path / "fast.mp4", 240, rate=Fraction(120))
    info, frames = read(fast)
    assert info.rate == 30
    assert numbers(frames) == list(range(0, 240, 4))


def test_1000_pictures_a_second(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 500, size=(64, 64), rate=Fraction(1000))
    info, frames = read(path)
    assert info.rate <= 30
    assert numbers(frames) == [34 * tick for tick in range(len(frames))]
    assert len(frames) == info.n_frames == 15


def test_more_pictures_than_any_output_can_use_are_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 100, size=(64, 64), rate=Fraction(1000))
    info = inspect_source(path, LIMITS)
    with pytest.raises(MediaError, match="50 pictures"):
        list(read_source(path, info, replace(LIMITS, max_decoded_frames=50)))


def test_max_frames_ends_early_and_the_limit_refuses(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 30)
    info = inspect_source(path, LIMITS)
    assert len(list(read_source(path, info, LIMITS, max_frames=7))) == 7
    assert list(read_source(path, info, LIMITS, max_frames=0)) == []
    assert len(list(read_source(path, info, LIMITS, max_frames=99))) == 30
    with pytest.raises(MediaError, match="frames allowed"):
        list(read_source(path, info, replace(LIMITS, max_frames=29)))


def test_an_edit_list_leaves_out_what_it_cuts(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 30, b_frames=0, gop=10)
    data = bytearray(path.read_bytes())
    at = data.find(b"elst")
    assert at > 0
    # version 0: count at +8, then (duration, media time, rate); the media clock runs at 12,800 units a second.
    media_time = int.from_bytes(data[at + 16 : at + 20], "big") + 5 * 512
    data[at + 16 : at + 20] = media_time.to_bytes(4, "big")
    path.write_bytes(data)
    _, frames = read(path)
    assert numbers(frames)[0] == 5
    assert numbers(frames) == list(range(5, 5 + len(frames)))


def test_closing_early_releases_the_file(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 30)
    info = inspect_source(path, LIMITS)
    list(read_source(path, info, LIMITS))
    before = len(list(Path("/proc/self/fd").iterdir()))
    frames = read_source(path, info, LIMITS)
    next(frames)
    assert len(list(Path("/proc/self/fd").iterdir())) > before
    frames.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_planes_are_not_the_decoders_reference(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 30, gop=30, b_frames=2)
    info, frames = read(path)
    expected = [frame.planes.copy() for frame in frames]
    for frame, kept in zip(read_source(path, info, LIMITS), expected, strict=True):
        assert np.array_equal(frame.planes.y, kept.y)
        for plane in (frame.planes.y, frame.planes.u, frame.planes.v):
            assert (plane if plane.base is None else plane.base).flags.owndata
            assert plane.flags.c_contiguous
            plane[:] = 0


def test_probing_in_a_process_gives_the_same_answer(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 12, rate=NTSC, rotation=90, tags=Tags(1, 1, 1, False))
    assert probe_source(path, LIMITS) == inspect_source(path, LIMITS)


# -- pictures ---------------------------------------------------------------------------------------------------------


def exact_clip(path: Path, planes: Planes, **options: Any) -> Path:
    return write_clip(
        path,
        3,
        size=(planes.width, planes.height),
        draw=lambda _index: planes_frame(planes),
        **{**LOSSLESS, **options},
    )


def random_planes(width: int, height: int, seed: int = 5) -> Planes:
    rng = np.random.default_rng(seed)
    half = (height // 2, width // 2)
    return Planes(
        rng.integers(0, 256, (height, width), np.uint8),
        rng.integers(0, 256, half, np.uint8),
        rng.integers(0, 256, half, np.uint8),
    )


@pytest.mark.parametrize("size", [(160, 96), (98, 66), (720, 576)])
def test_limited_420_passes_bit_by_bit(tmp_path: Path, size: tuple[int, int]) -> None:
    planes = random_planes(*size)
    _, frames = read(exact_clip(tmp_path / "clip.mkv", planes))
    for frame in frames:
        assert np.array_equal(frame.planes.y, planes.y)
        assert np.array_equal(frame.planes.u, planes.u)
        assert np.array_equal(frame.planes.v, planes.v)


def test_odd_sizes_lose_a_row_and_a_column_and_nothing_else(tmp_path: Path) -> None:
    planes = random_planes(162, 98)
    path = write_clip(
        tmp_path / "clip.mkv", 2, size=(161, 97), draw=lambda _index: planes_frame(planes, 161, 97), **LOSSLESS
    )
    info, frames = read(path)
    assert (info.width, info.height) == (160, 96)
    assert np.array_equal(frames[0].planes.y, planes.y[:96, :160])
    assert np.array_equal(frames[0].planes.u, planes.u[:48, :80])
    assert np.array_equal(frames[0].planes.v, planes.v[:48, :80])


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_pictures_come_out_upright(tmp_path: Path, rotation: int, mirrored: bool) -> None:
    path = write_clip(tmp_path / "clip.mp4", 3, rotation=rotation, mirrored=mirrored)
    info, frames = read(path)
    assert (info.rotation, info.mirrored) == (rotation, mirrored)
    assert (info.width, info.height) == ((96, 160) if rotation % 180 else (160, 96))
    coded = clips.decode_luma(path)[0]
    shown = np.rot90(np.fliplr(coded) if mirrored else coded, rotation // 90)
    assert np.array_equal(frames[0].planes.y, shown)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_turning_agrees_with_opencv(tmp_path: Path, rotation: int) -> None:
    path = write_clip(tmp_path / "clip.mp4", 2, rotation=rotation)
    capture = cv2.VideoCapture(str(path))
    _, expected = capture.read()
    capture.release()
    _, frames = read(path)
    assert expected.shape[:2] == frames[0].planes.y.shape
    assert np.abs(planes_to_bgr(frames[0].planes, "bt601").astype(int) - expected).mean() < 4


def test_pixel_aspect_scales_the_width(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 5, size=(160, 96), sample_aspect=Fraction(32, 27))
    info, frames = read(path)
    assert (info.width, info.height, info.pixel_aspect) == (190, 96, Fraction(32, 27))
    assert numbers(frames) == list(range(5))


def test_pixel_aspect_and_rotation(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 2, size=(160, 96), sample_aspect=Fraction(32, 27), rotation=90)
    info, frames = read(path)
    assert (info.width, info.height) == (96, 190)
    assert read_number(np.rot90(frames[1].planes.y, -1)) == 1


@pytest.mark.parametrize("aspect", [Fraction(297, 304), Fraction(1000, 1), Fraction(1, 1000)])
def test_nearly_square_and_absurd_pixel_aspects_are_left_alone(tmp_path: Path, aspect: Fraction) -> None:
    info, frames = read(write_clip(tmp_path / "clip.mp4", 2, sample_aspect=aspect))
    assert (info.width, info.height, info.pixel_aspect) == (160, 96, Fraction(1))
    assert numbers(frames) == [0, 1]


def test_scaling_does_not_shift_the_levels(tmp_path: Path) -> None:
    planes = bgr_to_planes((noise(320, 192) * 255).astype(np.uint8), "bt601")
    path = exact_clip(tmp_path / "clip.mp4", planes, codec="libx264", options={"qp": "0"}, sample_aspect=Fraction(5, 4))
    _, frames = read(path)
    scaled = frames[0].planes
    assert scaled.width == 400
    for name in ("y", "u", "v"):
        assert abs(float(getattr(scaled, name).mean()) - float(getattr(planes, name).mean())) < 0.1


def plane_arrays(values: np.ndarray[Any, Any], form: str) -> av.VideoFrame:
    """Y, U, V in [0, 1] (h, w, 3) as a frame of a planar format: limited range, or full for "j" formats."""
    frame: Any = av.VideoFrame(values.shape[1], values.shape[0], form)
    depth = 10 if form.endswith("10le") else 8
    scale, is_full = 2 ** (depth - 8), "j" in form
    step_x, step_y = {"420": (2, 2), "422": (2, 1), "444": (1, 1)}[form.removeprefix("yuvj").removeprefix("yuv")[:3]]
    for index, plane in enumerate(frame.planes):
        part = values[..., index]
        if index:
            part = part.reshape(part.shape[0] // step_y, step_y, part.shape[1] // step_x, step_x).mean((1, 3))
        codes = part * (2**depth - 1) if is_full else scale * (16 + part * (224 if index else 219))
        dtype = np.uint16 if depth > 8 else np.uint8
        rows = np.zeros((plane.height, plane.line_size // np.dtype(dtype).itemsize), dtype)
        rows[:, : plane.width] = np.rint(codes)
        plane.update(rows.tobytes())
    return frame  # type: ignore[no-any-return]


def expected_planes(values: np.ndarray[Any, Any], *, is_full: bool = False) -> Any:
    """The same picture as exact limited-range values before rounding, as an object with y, u and v."""

    def half(part: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(part.reshape(part.shape[0] // 2, 2, part.shape[1] // 2, 2).mean((1, 3)))

    class Exact:
        y = 16 + 219 * values[..., 0]
        # 128 is code 128 of 255 in full range and the middle of 16..240 in limited range.
        u, v = (
            128 + 224 * ((half(values[..., index]) * 255 - 128) / 255 if is_full else half(values[..., index]) - 0.5)
            for index in (1, 2)
        )

    return Exact


FORMATS = ["yuv420p10le", "yuv422p", "yuv422p10le", "yuv444p", "yuv444p10le", "yuvj420p", "yuvj422p", "yuvj444p"]


@pytest.mark.parametrize("form", FORMATS)
def test_other_formats_become_420_of_8_bits_without_bias(tmp_path: Path, form: str) -> None:
    values = noise(256, 160)
    codec = "mjpeg" if "j" in form else "ffv1"
    options = {"qmin": "1", "qmax": "1", "q": "1"} if codec == "mjpeg" else {}
    path = write_clip(
        tmp_path / ("clip.avi" if codec == "mjpeg" else "clip.mkv"),
        2,
        size=(256, 160),
        codec=codec,
        pixel_format=form,
        draw=lambda _index: plane_arrays(values, form),
        tags=Tags(full_range=True if "j" in form else None),
        options=options,
    )
    _, frames = read(path)
    # Chroma is sited to the left in 4:2:0 and 4:2:2, between the columns in the plain mean: half a step at most here.
    assert_unbiased(frames[0].planes, expected_planes(values, is_full="j" in form), mean_abs=0.8)


def test_full_range_h264_is_stretched_exactly(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    planes = Planes(ramp, np.ascontiguousarray(ramp[:32, ::2]), np.ascontiguousarray(ramp[:32, ::-2]))
    path = exact_clip(
        tmp_path / "clip.mp4", planes, codec="libx264", options={"qp": "0"}, tags=Tags(1, 1, 1, full_range=True)
    )
    info, frames = read(path)
    assert info.colour == BT709
    luma = np.rint(16 + np.arange(256) * 219 / 255)
    chroma = np.rint(128 + (np.arange(256) - 128) * 224 / 255)
    assert np.array_equal(frames[0].planes.y[0], luma)
    assert np.array_equal(frames[0].planes.u[0], chroma[::2])
    assert np.array_equal(frames[0].planes.v[0], chroma[::-1][::2])


@pytest.mark.parametrize("form", ["rgb24", "bgr0", "gbrp", "bgra"])
def test_rgb_goes_through_our_own_matrix(tmp_path: Path, form: str) -> None:
    bgr = (noise(160, 96, seed=2) * 255).astype(np.uint8)

    def draw(_index: int) -> av.VideoFrame:
        return av.VideoFrame.from_ndarray(bgr, format="bgr24").reformat(format=form)

    codec, name = {"rgb24": ("qtrle", "clip.mov"), "gbrp": ("utvideo", "clip.avi")}.get(form, ("ffv1", "clip.mkv"))
    path = write_clip(tmp_path / name, 2, codec=codec, pixel_format=form, draw=draw)
    info, frames = read(path)
    assert info.colour == BT601_NTSC
    assert_unbiased(frames[0].planes, bgr_to_planes(bgr, "bt601"), most=0.01, mean_abs=0.01)


def test_alpha_in_video_shows_white(tmp_path: Path) -> None:
    bgra = np.zeros((96, 160, 4), np.uint8)
    bgra[..., 2], bgra[:, :80, 3], bgra[:, 80:120, 3] = 255, 255, 128

    def draw(_index: int) -> av.VideoFrame:
        return av.VideoFrame.from_ndarray(bgra, format="bgra")

    _, frames = read(write_clip(tmp_path / "clip.mkv", 2, pixel_format="bgra", draw=draw, **LOSSLESS))
    bgr = planes_to_bgr(frames[0].planes, "bt601")
    assert np.abs(bgr[40, 40].astype(int) - (0, 0, 255)).max() <= 2
    assert np.abs(bgr[40, 100].astype(int) - (127, 127, 255)).max() <= 2
    assert np.abs(bgr[40, 150].astype(int) - 255).max() <= 2


def test_alpha_in_yuv_shows_white(tmp_path: Path) -> None:
    def draw(_index: int) -> av.VideoFrame:
        frame: Any = av.VideoFrame(160, 96, "yuva420p")
        for plane, value in zip(frame.planes, (60, 128, 128, 0), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        return frame  # type: ignore[no-any-return]

    _, frames = read(write_clip(tmp_path / "clip.mkv", 2, pixel_format="yuva420p", draw=draw, **LOSSLESS))
    assert frames[0].planes.y.min() >= 234


@pytest.mark.parametrize("tags", [Tags(1, 1, 1, False), Tags(6, 6, 6, False), Tags(5, 5, 6, False), Tags(6, 1, 13)])
def test_tags_are_reported_and_pictures_untouched(tmp_path: Path, tags: Tags) -> None:
    planes = random_planes(160, 96)
    path = exact_clip(tmp_path / "clip.mp4", planes, codec="libx264", options={"qp": "0"}, tags=tags)
    info, frames = read(path)
    colour = info.colour
    assert (colour.matrix_code, colour.primaries, colour.transfer) == (tags.matrix, tags.primaries, tags.transfer)
    assert np.array_equal(frames[0].planes.u, planes.u)


def test_untagged_pictures_are_bt601_below_720_lines(tmp_path: Path) -> None:
    assert inspect_source(write_clip(tmp_path / "a.mp4", 1, size=(160, 718)), LIMITS).colour == BT601_NTSC
    assert inspect_source(write_clip(tmp_path / "b.mp4", 1, size=(160, 720)), LIMITS).colour == BT709


LUMA_WEIGHTS = {4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


def coded(rgb: np.ndarray[Any, Any], red: float, blue: float) -> np.ndarray[Any, Any]:
    y = red * rgb[..., 0] + (1 - red - blue) * rgb[..., 1] + blue * rgb[..., 2]
    return np.stack([y, 0.5 + (rgb[..., 2] - y) / (2 * (1 - blue)), 0.5 + (rgb[..., 0] - y) / (2 * (1 - red))], axis=-1)


@pytest.mark.parametrize(("code", "weights"), [(4, (0.299, 0.114)), (7, (0.2126, 0.0722))])
def test_old_matrices_are_converted_without_bias(tmp_path: Path, code: int, weights: tuple[float, float]) -> None:
    rgb = noise(256, 160, seed=4, low=0.2, high=0.8)
    path = write_clip(
        tmp_path / "clip.mkv",
        2,
        size=(256, 160),
        draw=lambda _index: plane_arrays(coded(rgb, *LUMA_WEIGHTS[code]), "yuv420p"),
        tags=Tags(matrix=code),
        codec="libx264",
        options={"qp": "0"},
    )
    info, frames = read(path)
    assert info.colour.matrix == ("bt709" if code == 7 else "bt601")
    assert_unbiased(frames[0].planes, expected_planes(coded(rgb, *weights)))


@pytest.mark.parametrize("form", ["yuv420p", "yuv420p10le"])
def test_wide_gamut_is_converted_to_bt709(tmp_path: Path, form: str) -> None:
    rgb = noise(256, 160, seed=4, low=0.4, high=0.6)
    path = write_clip(
        tmp_path / "clip.mkv",
        2,
        size=(256, 160),
        pixel_format=form,
        draw=lambda _index: plane_arrays(coded(rgb, *LUMA_WEIGHTS[9]), form),
        tags=Tags(9, 9, 14),
        codec="libx264",
        options={"qp": "0"},
    )
    info, frames = read(path)
    assert info.colour == BT709
    linear = np.where(rgb < 0.081, rgb / 4.5, ((rgb + 0.099) / 1.099) ** (1 / 0.45))
    # BT.2020 to BT.709 primaries: ITU-R BT.2087-0 section 2.2, inverted.
    to_709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    mapped = linear @ np.array(to_709).T
    shown = np.where(mapped < 0.018, mapped * 4.5, 1.099 * np.clip(mapped, 0, 1) ** 0.45 - 0.099)
    # Eight bits of wide chroma are coarser than eight bits of narrow.
    assert_unbiased(frames[0].planes, expected_planes(coded(shown, 0.2126, 0.0722)), mean_abs=0.8)


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_refused(tmp_path: Path, transfer: int) -> None:
    path = write_clip(tmp_path / "clip.mp4", 2, pixel_format="yuv420p10le", tags=Tags(9, 9, transfer))
    with pytest.raises(MediaError, match="HDR"):
        probe_source(path, LIMITS)


def test_fields_are_put_together(tmp_path: Path) -> None:
    width, height = 320, 192

    def draw(index: int) -> av.VideoFrame:
        # Each field shows a bar at another place: combed lines where nothing deinterlaces.
        planes = picture_planes(index, width, height)
        for field in (0, 1):
            x = 40 + 24 * (2 * index + field) % 240
            planes.y[120 + field : 180 : 2, :] = 60
            planes.y[120 + field : 180 : 2, x : x + 24] = 200
        return planes_frame(planes)  # type: ignore[no-any-return]

    path = write_clip(tmp_path / "clip.mp4", 10, size=(width, height), interlaced=True, draw=draw)
    info, frames = read(path)
    assert info.interlaced
    assert numbers(frames) == list(range(10))

    def combing(luma: np.ndarray[Any, Any]) -> float:
        rows = luma[120:180].astype(np.int32)
        return float(np.abs(2 * rows[1:-1] - rows[:-2] - rows[2:]).mean())

    assert combing(frames[5].planes.y) < combing(clips.decode_luma(path)[5]) / 4


def test_a_source_that_changes_its_size_is_shown_at_its_first_size(tmp_path: Path) -> None:
    parts = []
    for index, size in enumerate([(160, 96), (240, 144)]):
        path = write_clip(tmp_path / f"{index}.ts", 10, size=size, options={"x264-params": "repeat-headers=1"})
        parts.append(path.read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    info, frames = read(tmp_path / "both.ts")
    assert (info.width, info.height) == (160, 96)
    assert {frame.planes.y.shape for frame in frames} == {(96, 160)}
    shown = numbers(frames)
    assert shown[:10] == list(range(10))
    assert shown[-1] == 9


def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    path = write_clip(tmp_path / "clip.mp4", 900, size=(320, 192))
    info = inspect_source(path, LIMITS)
    process = psutil.Process()
    sizes: list[int] = []
    for frame in read_source(path, info, LIMITS):
        if frame.index in {300, 899}:
            sizes.append(process.memory_info().rss)
    assert sizes[1] - sizes[0] < 20 * 2**20


# -- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_pictures_are_counted_and_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 100, gop=50)
    clips.damage(path, 300)
    info = inspect_source(path, LIMITS)
    with pytest.raises(MediaError, match="damaged") as caught:
        list(read_source(path, info, LIMITS))
    assert int(str(caught.value.details["corrupt"])) > 5


def test_a_little_damage_is_accepted(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 200, gop=1)
    clips.damage(path, 2, start=0.5)
    _, frames = read(path)
    assert len(frames) == 200


def test_a_cut_file_gives_what_it_holds(tmp_path: Path) -> None:
    fast_start = write_clip(tmp_path / "clip.mp4", 100, container_options={"movflags": "faststart"})
    clips.cut(fast_start, 0.6)
    matroska = write_clip(tmp_path / "clip.mkv", 100)
    clips.cut(matroska, 0.6)
    stream = write_clip(tmp_path / "clip.ts", 100)
    clips.cut(stream, 0.6)
    for path in (fast_start, matroska, stream):
        _, frames = read(path)
        assert 30 < len(frames) < 80
        shown = numbers(frames)
        assert shown[:-1] == list(range(len(frames) - 1))


def test_a_film_of_one_picture(tmp_path: Path) -> None:
    info, frames = read(write_clip(tmp_path / "clip.mp4", 1))
    assert info.n_frames == 1
    assert numbers(frames) == [0]


def test_a_film_without_pictures_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 30, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: data.find(b"mdat") + 8])
    for look in (inspect_source, probe_source):
        with pytest.raises(MediaError):
            look(path, LIMITS)
    other = write_clip(tmp_path / "other.mp4", 30)
    with pytest.raises(MediaError, match="no picture"):
        list(read_source(path, inspect_source(other, LIMITS), LIMITS))


@pytest.fixture
def sound_only(tmp_path: Path) -> Path:
    return clips.write_sound(tmp_path / "sound.m4a", clips.Sound(clips.tone(1)))


def test_sound_alone_is_no_source(sound_only: Path) -> None:
    with pytest.raises(MediaError, match="no video"):
        probe_source(sound_only, LIMITS)


@pytest.mark.parametrize(("size", "is_allowed"), [((62, 40), False), ((64, 2), True), ((4098, 64), False)])
def test_sizes_outside_the_limits_are_refused(tmp_path: Path, size: tuple[int, int], is_allowed: bool) -> None:
    path = write_clip(tmp_path / "clip.mp4", 1, size=size, draw=lambda _index: av.VideoFrame(*size, "yuv420p"))
    if is_allowed:
        assert inspect_source(path, LIMITS).height == size[1]
    else:
        with pytest.raises(MediaError, match="px"):
            inspect_source(path, LIMITS)


def test_a_scaled_picture_must_keep_the_limits_too(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 1, size=(300, 200), sample_aspect=Fraction(2))
    with pytest.raises(MediaError, match="600x200"):
        inspect_source(path, replace(LIMITS, max_side=500))


def test_the_bar_code_can_be_read_back() -> None:
    for number in (0, 1, 77, 4095):
        grey = cv2.cvtColor(picture(number, 160, 96), cv2.COLOR_BGR2GRAY)
        assert read_number(np.asarray(grey)) == number
    assert read_number(np.full((96, 160), 90, np.uint8)) is None
