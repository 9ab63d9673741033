"""Pictures as strangers bring them: jittered clocks, absurd rates, alpha, colour profiles, large photos, missing ends.

Specified in docs/media.md#cadence, docs/media.md#colour and docs/media.md#colours-of-stills.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from musetalk.errors import MediaError
from musetalk.frames import planes_to_bgr
from musetalk.media import MediaLimits, SourceFrame, SourceInfo, probe_source, read_source
from musetalk.media.cadence import measured_cadence, on_beat, steady_rate
from musetalk.media.timing import Timed
from tests.support import clips
from tests.support.clips import drawn_frame, picture, read_number, write_clip
from tests.support.strangers import joined

LIMITS = MediaLimits()


def read(path: Path, **options: Any) -> tuple[SourceInfo, list[SourceFrame]]:
    info = probe_source(path, LIMITS)
    return info, list(read_source(path, info, LIMITS, **options))


def numbers(frames: Sequence[SourceFrame]) -> list[int | None]:
    return [read_number(frame.planes.y) for frame in frames]


# -- cadence ----------------------------------------------------------------------------------------------------------

CLOCKS = {"90 kHz": Fraction(1, 90_000), "1/600 s": Fraction(1, 600), "1 ms": Fraction(1, 1000)}
NTSC = [Fraction(24_000, 1001), Fraction(30_000, 1001)]
RATES = [*NTSC, Fraction(24), Fraction(25), Fraction(30), Fraction(50), Fraction(60)]


def jittered(
    rate: Fraction, jitter_s: float, clock: Fraction, seed: int, *, n: int = 90, without: Sequence[int] = ()
) -> list[Fraction]:
    """Time stamps (s) of a camera that leaves out the pictures `without`: increasing, on `clock`, from 0."""
    rng = np.random.default_rng(seed)
    kept = np.array([index for index in range(n) if index not in without])
    times = kept / float(rate) + rng.normal(0, jitter_s, len(kept))
    ticks = np.rint(times / float(clock)).astype(int)
    for index in range(1, len(ticks)):
        ticks[index] = max(ticks[index], ticks[index - 1] + 1)
    return [int(tick - ticks[0]) * clock for tick in ticks]


def beats(times: Sequence[Fraction]) -> tuple[Fraction | None, list[int]]:
    """The rate behind the stamps, and the beat of each."""
    cadence = measured_cadence([float(time) for time in times])
    if cadence is None:
        return None, []
    rate = steady_rate(cadence, [])
    on = on_beat((Timed(time, 1 / rate, None) for time in times), rate)
    return rate, [int(timed.time * rate) for timed in on]


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.2f}")
def test_jitter_drops_and_repeats_nothing(rate: Fraction, clock: str) -> None:
    # As a share of the period; 6 ms at 30 pictures a second are 0.18.
    for share in (0, 0.03, 0.09, 0.18):
        for seed in range(10):
            found, on = beats(jittered(rate, share / float(rate), CLOCKS[clock], seed))
            assert found is not None
            assert abs(float(found / rate) - 1) < 0.006
            assert on == list(range(90)), (share, seed)


@pytest.mark.parametrize("seed", range(10))
def test_pictures_the_camera_left_out_are_the_only_repeats(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    without = sorted(int(index) for index in rng.choice(np.arange(12, 280, 7), 5, replace=False))
    without += [index + 1 for index in without[:2]]
    times = jittered(Fraction(30), 0.004, CLOCKS["90 kHz"], seed, n=300, without=without)
    found, on = beats(times)
    assert found == 30
    assert len(set(on)) == len(on)
    missing = sorted(set(range(on[-1] + 1)) - set(on))
    # One picture of doubt: the one beside the gap may stand on either side of it.
    assert len(missing) == len(without)
    assert all(abs(a - b) <= 1 for a, b in zip(missing, sorted(without), strict=True))


def test_ten_minutes_of_jitter_do_not_drift() -> None:
    times = jittered(Fraction(30_000, 1001), 0.005, CLOCKS["1 ms"], 3, n=18_000)
    found, on = beats(times)
    assert found == Fraction(30_000, 1001)
    assert on == list(range(18_000))


@pytest.mark.parametrize("seed", range(20))
def test_slides_and_random_times_have_no_cadence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.01, 0.4, 60))
    assert measured_cadence(times.tolist()) is None


@pytest.mark.parametrize(
    ("name", "clock", "codec"),
    [("phone.mov", "1/600 s", "libx264"), ("android.mp4", "90 kHz", "libx264"), ("browser.webm", "1 ms", "libvpx")],
)
def test_a_jittered_recording_keeps_all_its_pictures(tmp_path: Path, name: str, clock: str, codec: str) -> None:
    times = jittered(Fraction(30), 0.006, CLOCKS[clock], 5)
    path = write_clip(tmp_path / name, 90, rate=Fraction(30), timestamps=times, time_base=CLOCKS[clock], codec=codec)
    info, frames = read(path)
    assert info.rate == 30
    assert numbers(frames) == list(range(90))


def test_a_rate_of_a_thousand_that_a_browser_declares_gives_way_to_the_measured_one(tmp_path: Path) -> None:
    path = write_clip(
        tmp_path / "a.webm",
        40,
        rate=Fraction(1000),
        timestamps=[Fraction(round(index * 1000 / 24), 1000) for index in range(40)],
        time_base=Fraction(1, 1000),
        codec="libvpx",
    )
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        declared = [stream.base_rate, stream.average_rate, stream.guessed_rate]
        assert max(rate for rate in declared if rate is not None) > 500
    info, frames = read(path)
    assert info.rate == 24
    assert numbers(frames) == list(range(40))


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_film_whose_end_is_missing_is_used_and_both_lengths_are_named(tmp_path: Path, name: str) -> None:
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    path = write_clip(tmp_path / name, 100, codec=codec, container_options=options)
    assert read(path)[0].warnings == ()
    clips.cut(path, 0.5)
    info, frames = read(path)
    (warning,) = info.warnings
    assert "the source is incomplete: its header promises 4.0" in warning
    assert 20 < len(frames) < 70
    assert float(warning.split(", ")[1].split(" s")[0]) == pytest.approx(len(frames) / 25, abs=0.05)


def test_an_mp4_without_its_end_is_refused_as_incomplete(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 40)
    clips.cut(path, 0.6)
    with pytest.raises(MediaError, match="is incomplete: its end is missing"):
        probe_source(path, LIMITS)


SHOWN_OF_THREE = {"mp4": 25, "mov": 25, "flv": 25, "mkv": 50, "webm": 50, "avi": 75, "ts": 75, "mpg": 75}


@pytest.mark.parametrize(("kind", "n_shown"), SHOWN_OF_THREE.items())
def test_films_that_were_joined_are_shown_or_both_lengths_are_named(tmp_path: Path, kind: str, n_shown: int) -> None:
    name = f"a.{kind}"
    codec = {"webm": "libvpx", "avi": "mpeg4", "flv": "flv", "mpg": "mpeg2video"}.get(kind, "libx264")
    parts = [write_clip(tmp_path / f"{index}-{name}", 25, codec=codec) for index in range(3)]
    info, frames = read(joined(tmp_path / name, parts))
    assert len(frames) == n_shown
    named = f"the source is 3 files joined in one: only the first {n_shown / 25:.2f} s are used; 3.00 s are there"
    assert info.warnings == (() if n_shown == 75 else (named,))


def test_a_film_with_something_else_behind_its_end_is_whole(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 25)
    path.write_bytes(path.read_bytes() + b"\0\0\0\x10ftypisom\0\0\0\0" + bytes(5000))
    assert read(path)[0].warnings == ()


@pytest.mark.parametrize("size", [2**40, 2**63, 2**64 - 1])
def test_a_box_larger_than_any_file_is_the_files_fault(tmp_path: Path, size: int) -> None:
    path = write_clip(tmp_path / "a.mp4", 25)
    path.write_bytes(path.read_bytes()[:32] + struct.pack(">I4sQ", 1, b"mdat", size) + bytes(2000))
    with pytest.raises(MediaError, match="is incomplete: its end is missing"):
        probe_source(path, LIMITS)


TEXTS = {
    "a web page": b"<!doctype html><html><body>Sorry</body></html>",
    "JSON": b'{"detail": "not found"}',
    "an XML document": b"<?xml version='1.0'?><Error/>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "a text": b"this is no film at all\n" * 50,
    "zeros": bytes(5000),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_is_no_media_file_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.mp4").write_bytes(TEXTS[kind])
    with pytest.raises(MediaError, match=kind):
        probe_source(tmp_path / "a.mp4", LIMITS)


# -- transparency -----------------------------------------------------------------------------------------------------


def bgr_of(frame: SourceFrame, info: SourceInfo) -> Any:
    return planes_to_bgr(frame.planes, info.colour.matrix)


def cut_out(index: int) -> Any:
    """A drawn picture whose right half is transparent."""
    rgba = np.dstack([picture(index, 160, 96)[..., ::-1], np.full((96, 160), 255, np.uint8)])
    rgba[:, 80:, 3] = 0
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(rgba), format="rgba")


BACKGROUNDS = {None: (255, 255, 255), "#00ff00": (0, 255, 0), "#204060": (32, 64, 96)}


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize(
    ("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.mkv", "libvpx"), ("a.mov", "qtrle"), ("a.png", "")]
)
def test_behind_a_cut_out_is_the_background(tmp_path: Path, name: str, codec: str, background: str | None) -> None:
    path = tmp_path / name
    if codec:
        form = "argb" if codec == "qtrle" else "yuva420p"
        draw = lambda index: cut_out(index).reformat(format=form)  # noqa: E731
        options = {"auto-alt-ref": "0", "crf": "10", "b": "1M"} if codec == "libvpx" else None
        write_clip(path, 4, codec=codec, pixel_format=form, draw=draw, options=options)
    else:
        Image.fromarray(cut_out(0).to_ndarray(format="rgba")).save(path)
    chosen = {} if background is None else {"background": BACKGROUNDS[background]}
    info, frames = read(path, **chosen)
    shown = bgr_of(frames[-1], info)
    assert np.abs(shown[8:-8, 96:-8].astype(int) - BACKGROUNDS[background][::-1]).max() <= 6
    # The opaque half is the picture.
    drawn = picture(len(frames) - 1 if codec else 0, 160, 96)
    assert np.abs(shown[30:, :70].astype(int) - drawn[30:, :70]).mean() < 8


# -- colours of stills ------------------------------------------------------------------------------------------------


def matrix_profile(places: Sequence[float], gamma: float = 2.2) -> bytes:
    """A small ICC profile of RGB with these primaries (CIE xy of red, green, blue; D65)."""
    from musetalk.media.still_colour import _BRADFORD, _D65, _to_xyz, _white

    d50 = np.array([0.9642, 1.0, 0.8249])
    gains = (_BRADFORD @ d50) / (_BRADFORD @ _white((*_D65,)))
    columns = (np.linalg.inv(_BRADFORD) @ np.diag(gains) @ _BRADFORD @ _to_xyz((*_D65, *places))).T

    def xyz(values: Any) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(float(v) * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(12 + 67)
    tags = {b"desc": text, b"wtpt": xyz(d50), b"cprt": b"text\0\0\0\0none\0"}
    tags.update({name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)})
    tags.update(dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))
    table, data = b"", b""
    at = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = bytearray(128)
    head[4:8], head[8:12], head[12:24] = b"test", b"\x02\x10\0\0", b"mntrRGB XYZ "
    head[36:40] = b"acsp"
    head[68:80] = xyz(d50)[8:]
    profile = bytes(head) + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(profile)) + profile[4:]


P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
COLOURS = [(200, 40, 40), (40, 160, 60), (70, 90, 200), (128, 128, 128), (220, 180, 150)]


def in_profile(colour: tuple[int, int, int], profile: bytes) -> tuple[int, int, int]:
    """The values by which a file with this profile shows an sRGB colour."""
    made = ImageCms.profileToProfile(
        Image.new("RGB", (1, 1), colour),
        ImageCms.createProfile("sRGB"),
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    assert made is not None
    return made.getpixel((0, 0))  # type: ignore[return-value]


@pytest.mark.parametrize("places", [P3, ADOBE], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff", "alpha.png", "palette.png"])
def test_a_photo_with_a_colour_profile_keeps_its_colours(tmp_path: Path, name: str, places: tuple[float, ...]) -> None:
    profile = matrix_profile(places)
    for colour in COLOURS:
        image = Image.new("RGB", (96, 96), in_profile(colour, profile))
        if name == "alpha.png":
            image.putalpha(255)
        if name == "palette.png":
            image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        options: dict[str, Any] = {"quality": 98, "subsampling": 0} if name.endswith("jpg") else {}
        image.save(tmp_path / name, icc_profile=profile, **({"lossless": True} if name.endswith("webp") else options))
        info, frames = read(tmp_path / name)
        shown = bgr_of(frames[0], info)[48, 48][::-1].astype(int)
        assert np.abs(shown - colour).max() <= 4, colour
        assert info.warnings == ()


def test_a_picture_in_srgb_is_not_touched(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(np.ascontiguousarray(picture(3, 160, 96)[..., ::-1]))
    image.save(tmp_path / "with.png", icc_profile=srgb)
    image.save(tmp_path / "without.png")
    (_, with_profile), (_, without) = read(tmp_path / "with.png"), read(tmp_path / "without.png")
    assert np.array_equal(with_profile[0].planes.y, without[0].planes.y)


def test_a_broken_profile_is_ignored_with_a_warning(tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), (200, 40, 40)).save(tmp_path / "a.png", icc_profile=b"no profile at all" * 20)
    info, frames = read(tmp_path / "a.png")
    assert np.abs(bgr_of(frames[0], info)[48, 48][::-1].astype(int) - (200, 40, 40)).max() <= 2
    assert info.warnings == ("the colour profile of the source cannot be used; its colours were taken for sRGB",)


def with_chunks(path: Path, colour: tuple[int, int, int], chunks: dict[bytes, bytes]) -> Path:
    """A PNG of one colour with these chunks behind its header."""
    held = io.BytesIO()
    Image.new("RGB", (96, 96), colour).save(held, "png")
    data = held.getvalue()
    extra = b""
    for kind, content in chunks.items():
        extra += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(data[:33] + extra + data[33:])
    return path


def chromaticities(places: Sequence[float]) -> bytes:
    return b"".join(struct.pack(">I", round(value * 100_000)) for value in (0.3127, 0.3290, *places))


CHUNKS: dict[str, tuple[dict[bytes, bytes], Any]] = {
    "gamma 1.0": ({b"gAMA": struct.pack(">I", 100_000)}, matrix_profile((0.64, 0.33, 0.30, 0.60, 0.15, 0.06), 1.0)),
    "gamma 1.8": ({b"gAMA": struct.pack(">I", 55_556)}, matrix_profile((0.64, 0.33, 0.30, 0.60, 0.15, 0.06), 1.8)),
    "P3 primaries": ({b"gAMA": struct.pack(">I", 45_455), b"cHRM": chromaticities(P3)}, "srgb curve"),
    "cICP P3": ({b"cICP": bytes((12, 13, 0, 1))}, "srgb curve"),
    "cICP before gAMA": ({b"cICP": bytes((12, 13, 0, 1)), b"gAMA": struct.pack(">I", 100_000)}, "srgb curve"),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_what_a_png_says_about_its_colours_is_followed(tmp_path: Path, name: str) -> None:
    chunks, profile = CHUNKS[name]
    for colour in COLOURS:
        stored = _p3_values(colour) if profile == "srgb curve" else in_profile(colour, profile)
        info, frames = read(with_chunks(tmp_path / "a.png", stored, chunks))
        shown = bgr_of(frames[0], info)[48, 48][::-1].astype(int)
        assert np.abs(shown - colour).max() <= 4, (colour, stored)


def _p3_values(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """An sRGB colour in Display P3: other primaries, the same curve."""
    from musetalk.media.still_colour import _D65, _linear_to_srgb, _srgb_to_linear, _to_srgb_matrix

    light = _srgb_to_linear(np.array(colour) / 255)
    red, green, blue = np.rint(255 * _linear_to_srgb(np.linalg.inv(_to_srgb_matrix((*_D65, *P3))) @ light))
    return int(red), int(green), int(blue)


@pytest.mark.parametrize("chunk", [b"cICP", b"cHRM", b"gAMA"])
def test_chunks_that_make_no_sense_are_ignored(tmp_path: Path, chunk: bytes) -> None:
    content = {b"cICP": bytes((77, 99, 0, 1)), b"cHRM": bytes(32), b"gAMA": bytes(4)}[chunk]
    info, frames = read(with_chunks(tmp_path / "a.png", (200, 40, 40), {chunk: content}))
    assert np.abs(bgr_of(frames[0], info)[48, 48][::-1].astype(int) - (200, 40, 40)).max() <= 2
    assert len(info.warnings) == 1


def test_an_hdr_png_is_refused(tmp_path: Path) -> None:
    path = with_chunks(tmp_path / "a.png", (200, 40, 40), {b"cICP": bytes((9, 16, 0, 1))})
    with pytest.raises(MediaError, match="HDR"):
        probe_source(path, LIMITS)


def test_a_cmyk_photo_shows_its_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (96, 96), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=98)
    info, frames = read(tmp_path / "a.jpg")
    blue, green, red = bgr_of(frames[0], info)[48, 48]
    assert red > 200
    assert max(blue, green) < 60


# -- large pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("a.jpg", (3024, 4032)), ("b.jpg", (8160, 6120)), ("c.png", (4000, 3000)), ("d.webp", (6000, 4000))],
)
def test_a_phones_photo_is_scaled_down_and_both_sizes_are_named(
    tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    small = Image.fromarray(np.ascontiguousarray(picture(77, 320, 240)[..., ::-1]))
    small.resize(size).save(tmp_path / name)
    info, frames = read(tmp_path / name)
    assert info.width * info.height <= LIMITS.max_pixels
    assert max(info.width, info.height) <= LIMITS.max_side
    assert info.width / info.height == pytest.approx(size[0] / size[1], rel=0.002)
    assert f"{size[0]}x{size[1]} px" in info.warnings[0]
    assert f"{info.width}x{info.height} px" in info.warnings[0]
    assert numbers(frames) == [77]


def test_a_photo_beyond_all_limits_is_refused(tmp_path: Path) -> None:
    Image.new("1", (9000, 7000)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="9000x7000 px; at most 60 million pixels"):
        probe_source(tmp_path / "a.png", LIMITS)


@pytest.mark.parametrize("size", [(3840, 2160), (2160, 3840), (4096, 2160), (2160, 4096)])
def test_4k_film_is_accepted_in_both_orientations(tmp_path: Path, size: tuple[int, int]) -> None:
    frame = drawn_frame(1, *size)
    path = write_clip(tmp_path / "a.mp4", 2, size=size, draw=lambda _index: frame)
    info, frames = read(path)
    assert (info.width, info.height) == size
    assert numbers(frames)[0] == 1


def test_an_animation_that_takes_minutes_to_decode_is_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (300, 400, 3), np.uint8)) for i in range(40)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=40)
    info = probe_source(tmp_path / "a.webp", LIMITS)
    short = MediaLimits(max_animation_s=0.05)
    with pytest.raises(MediaError, match=r"takes more than 0\.05 s to decode"):
        list(read_source(tmp_path / "a.webp", info, short))
