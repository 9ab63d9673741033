"""Picture files: every mode and orientation becomes upright 8-bit BGR over white; animations keep their times."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from musetalk.errors import MediaError, ProcessingError
from musetalk.frames import BT601_NTSC, BT709, bgr_to_planes, planes_to_bgr
from musetalk.media import MediaLimits, SourceInfo, inspect_source, probe_source, read_source
from tests.support.clips import picture, read_number

LIMITS = MediaLimits()


def shown(path: Path) -> tuple[SourceInfo, np.ndarray[Any, Any]]:
    """What a still shows, as BGR."""
    info = inspect_source(path, LIMITS)
    frames = list(read_source(path, info, LIMITS))
    assert len(frames) == 1
    assert info.kind == "still"
    assert (frames[0].planes.width, frames[0].planes.height) == (info.width, info.height)
    return info, planes_to_bgr(frames[0].planes, info.colour.matrix)


def lossless(name: str) -> dict[str, Any]:
    return {"lossless": True} if name.endswith("webp") else {}


def as_image(number: int = 5, size: tuple[int, int] = (160, 96)) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(picture(number, *size)[..., ::-1]))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp"])
def test_lossless_stills_come_out_as_they_are(tmp_path: Path, name: str) -> None:
    as_image().save(tmp_path / name, **lossless(name))
    info = inspect_source(tmp_path / name, LIMITS)
    frame = next(read_source(tmp_path / name, info, LIMITS))
    expected = bgr_to_planes(picture(5, 160, 96), "bt601")
    assert np.array_equal(frame.planes.y, expected.y)
    assert np.array_equal(frame.planes.u, expected.u)
    assert np.array_equal(frame.planes.v, expected.v)
    assert (info.rate, info.n_frames, info.colour) == (Fraction(25), 1, BT601_NTSC)


def test_the_name_of_a_file_says_nothing(tmp_path: Path) -> None:
    as_image().save(tmp_path / "still.jpg", quality=95)
    (tmp_path / "still.jpg").rename(tmp_path / "film.mp4")
    info = probe_source(tmp_path / "film.mp4", LIMITS)
    assert (info.kind, info.codec) == ("still", "jpeg")
    assert read_number(next(read_source(tmp_path / "film.mp4", info, LIMITS)).planes.y) == 5


def test_large_stills_are_tagged_bt709(tmp_path: Path) -> None:
    as_image(size=(160, 720)).save(tmp_path / "a.png")
    info, bgr = shown(tmp_path / "a.png")
    assert info.colour == BT709
    assert np.abs(bgr.astype(int) - picture(5, 160, 720)).mean() < 1


def test_odd_sizes_lose_a_row_and_a_column(tmp_path: Path) -> None:
    as_image(size=(161, 97)).save(tmp_path / "a.png")
    info, _ = shown(tmp_path / "a.png")
    assert (info.width, info.height) == (160, 96)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    image = as_image()
    upright = np.asarray(image)
    # How the camera would have to store the upright picture for each value of the tag (Exif 2.3, tag 0x0112).
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(upright))).save(tmp_path / "a.jpg", exif=exif, quality=98)
    info, bgr = shown(tmp_path / "a.jpg")
    assert (info.width, info.height) == (160, 96)
    assert read_number(bgr[..., 1]) == 5


def test_transparent_pixels_show_white(tmp_path: Path) -> None:
    rgba = np.zeros((96, 160, 4), np.uint8)
    rgba[..., 0] = 255
    rgba[:, 40:80, 3], rgba[:, 80:, 3] = 128, 255
    for name in ("a.png", "a.webp", "a.tiff"):
        Image.fromarray(rgba).save(tmp_path / name, **lossless(name))
        _, bgr = shown(tmp_path / name)
        assert np.abs(bgr[40, 10].astype(int) - 255).max() <= 1
        assert np.abs(bgr[40, 60].astype(int) - (127, 127, 255)).max() <= 2
        assert np.abs(bgr[40, 120].astype(int) - (0, 0, 255)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "I;16"])
def test_other_modes_show_the_same_picture(tmp_path: Path, mode: str) -> None:
    image = as_image()
    name = "a.tiff" if mode == "CMYK" else "a.png"
    if mode == "I;16":
        converted = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        converted = image.convert(mode)
    converted.save(tmp_path / name)
    _, bgr = shown(tmp_path / name)
    assert read_number(bgr[..., 1]) == 5
    grey = np.asarray(image.convert("L")).astype(int)
    if mode in {"L", "LA", "I;16"}:
        assert np.abs(bgr - grey[..., None]).max() <= 1


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat([[0, 1]], 64, axis=0).astype(np.uint8).repeat(40, axis=1), "P")
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 750)
    image.save(tmp_path / "a.png", transparency=0)
    _, bgr = shown(tmp_path / "a.png")
    assert np.abs(bgr[30, 10].astype(int) - 255).max() <= 1
    assert np.abs(bgr[30, 60].astype(int) - (255, 0, 0)).max() <= 2


def test_greys_in_floating_point(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 160, dtype=np.float32), (96, 1))
    for scale in (1, 255):
        Image.fromarray(ramp * scale).save(tmp_path / "a.tiff")
        _, bgr = shown(tmp_path / "a.tiff")
        assert np.abs(bgr[..., 1] - ramp * 255).max() <= 1.5


def test_only_the_first_page_of_a_tiff_is_shown(tmp_path: Path) -> None:
    as_image(1).save(tmp_path / "a.tiff", save_all=True, append_images=[as_image(2)])
    _, bgr = shown(tmp_path / "a.tiff")
    assert read_number(bgr[..., 1]) == 1


# -- animations -------------------------------------------------------------------------------------------------------


def save_animation(path: Path, durations: list[int], size: tuple[int, int] = (160, 96)) -> Path:
    images = [as_image(index, size) for index in range(len(durations))]
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)
    return path


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_keep_their_times(tmp_path: Path, suffix: str) -> None:
    path = save_animation(tmp_path / f"a.{suffix}", [40, 40, 120, 40, 80])
    info = probe_source(path, LIMITS)
    assert (info.kind, info.rate, info.n_frames) == ("video", Fraction(25), 8)
    assert info.duration == Fraction(320, 1000)
    frames = list(read_source(path, info, LIMITS))
    assert [read_number(frame.planes.y) for frame in frames] == [0, 1, 2, 2, 2, 3, 4, 4]
    assert [frame.is_repeat for frame in frames] == [False, False, False, True, True, False, False, True]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_slow_animations_are_raised(tmp_path: Path, suffix: str) -> None:
    path = save_animation(tmp_path / f"a.{suffix}", [200] * 4)
    info = inspect_source(path, LIMITS)
    assert (info.rate, info.source_rate) == (Fraction(25), Fraction(5))
    numbers = [read_number(frame.planes.y) for frame in read_source(path, info, LIMITS)]
    assert numbers == [tick // 5 for tick in range(20)]


def test_frames_of_no_duration_last_a_tenth_of_a_second(tmp_path: Path) -> None:
    path = save_animation(tmp_path / "a.gif", [0] * 5)
    info = inspect_source(path, LIMITS)
    assert (info.rate, info.n_frames) == (Fraction(10), 5)


def test_one_frame_is_a_still(tmp_path: Path) -> None:
    for name in ("a.gif", "a.webp", "a.png"):
        as_image().save(tmp_path / name)
        assert inspect_source(tmp_path / name, LIMITS).kind == "still"


def test_transparent_animations_show_white(tmp_path: Path) -> None:
    clear, red = np.zeros((96, 160, 4), np.uint8), np.zeros((96, 160, 4), np.uint8)
    red[..., 0], red[:, :80, 3] = 255, 255
    images = [Image.fromarray(red), Image.fromarray(clear)]
    images[0].save(
        tmp_path / "a.webp",
        save_all=True,
        append_images=images[1:],
        duration=40,
        lossless=True,
        background=(0, 0, 0, 0),
    )
    info = inspect_source(tmp_path / "a.webp", LIMITS)
    frames = [planes_to_bgr(frame.planes, "bt601") for frame in read_source(tmp_path / "a.webp", info, LIMITS)]
    assert np.abs(frames[0][40, 120].astype(int) - 255).max() <= 1
    assert np.abs(frames[0][40, 20].astype(int) - (0, 0, 255)).max() <= 2
    assert np.abs(frames[1].astype(int) - 255).max() <= 1


def test_a_cut_animation_gives_what_it_holds(tmp_path: Path) -> None:
    path = save_animation(tmp_path / "a.gif", [40] * 20)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    info = inspect_source(path, LIMITS)
    numbers = [read_number(frame.planes.y) for frame in read_source(path, info, LIMITS)]
    assert 5 < len(numbers) < 20
    assert numbers[:-1] == list(range(len(numbers) - 1))


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_cut_still_is_refused(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        as_image().save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(MediaError, match="cannot be decoded"):
            probe_source(tmp_path / name, LIMITS)


@pytest.mark.parametrize("size", [(63, 60), (8000, 7600)])
def test_sizes_outside_the_limits(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match=f"{size[0]}x{size[1]} px"):
        inspect_source(tmp_path / "a.png", LIMITS)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif"])
def test_photographs_of_phones_are_refused_by_name(tmp_path: Path, brand: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0" * 100)
    with pytest.raises(MediaError, match="HEIC or AVIF"):
        probe_source(tmp_path / "a.jpg", LIMITS)


def test_what_is_not_a_file_is_the_workers_fault(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.png", Path("/dev/zero")):
        with pytest.raises(ProcessingError) as caught:
            probe_source(path, LIMITS)
        assert str(tmp_path) not in str(caught.value)
