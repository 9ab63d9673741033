"""What pauses show: the mouth held shut, or the source; with a smooth way in and out, and speech as it was."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from demo.evaluate import avatar_reader, demo_models, read_frames, speak
from demo.make_pair import AVATAR, CLIP_S, FPS, POSE_SEED, SPEECH, natural_poses
from demo.make_pair import write_sound as write_flac
from musetalk import media
from musetalk.avatars import AvatarCache
from musetalk.frames import Planes
from musetalk.silence import FLOOR_DBFS, levels_dbfs, quiet_spans, speech_weights
from musetalk_core import Core
from tests.support import clips
from tests.support.rendering import (
    LIMITS,
    SOUND,
    SOUND_RATE,
    frames_of,
    make_source,
    pictures_of,
    render,
    write_speech,
)

Pictures = list[Planes]


@pytest.fixture
def pictures(core: Core, tmp_path: Path) -> Callable[..., Pictures]:
    """The pictures of a video before they are encoded."""
    source, audio = make_source(tmp_path / "source.mp4", 9), write_speech(tmp_path / "a.wav", SOUND)
    return partial(pictures_of, core.engine.models, source, audio, tmp_path / "out.mp4")


def weights() -> NDArray[np.float64]:
    spans = quiet_spans(SOUND)
    assert len(spans) == 1
    return speech_weights(spans, len(SOUND), 38, Fraction(25))


def apart(first: Planes, second: Planes) -> int:
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in ((first.y, second.y), (first.u, second.u)))


def source_pictures(tmp_path: Path) -> Pictures:
    from musetalk.geometry import ping_pong_index

    frames = frames_of(tmp_path / "source.mp4")
    return [frames[ping_pong_index(index, 9)] for index in range(38)]


def test_shut_changes_pauses_alone(pictures: Callable[..., Pictures]) -> None:
    plain, shut, left = pictures(), pictures(silence="closed"), weights()
    assert len(plain) == len(shut) == len(left) == 38
    for index, (before, after) in enumerate(zip(plain, shut, strict=True)):
        assert (apart(before, after) == 0) == (left[index] == 1), index


def test_shut_is_one_and_the_same_mouth(pictures: Callable[..., Pictures]) -> None:
    """Over a still picture (the last frame, held) nothing moves in the middle of a pause."""
    shut, left = pictures(silence="closed", loop_mode="hold"), weights()
    middle = [picture for index, picture in enumerate(shut) if left[index] == 0]
    assert len(middle) >= 9
    assert all(apart(picture, middle[0]) <= 1 for picture in middle)


def test_the_source_is_shown_untouched_and_handed_over_smoothly(
    pictures: Callable[..., Pictures], tmp_path: Path
) -> None:
    plain, bare, left = pictures(), pictures(silence="source"), weights()
    source = source_pictures(tmp_path)
    shares = []
    for index, (before, after) in enumerate(zip(plain, bare, strict=True)):
        changed, whole = (float(np.abs(p.y.astype(int) - source[index].y).sum()) for p in (after, before))
        if left[index] == 0:
            assert apart(after, source[index]) == 0
        elif left[index] == 1:
            # Other frames share its batch, so the last digit of a sum may fall on the other side of a half.
            assert apart(before, after) <= 1
            assert abs(changed - whole) < 0.01 * whole
        else:
            shares.append(changed / whole)
            assert abs(changed / whole - left[index]) < 0.03
    assert len(shares) >= 7


@pytest.mark.parametrize("mode", ["closed", "source"])
def test_the_device_fades_what_the_cpu_fades(pictures: Callable[..., Pictures], mode: str) -> None:
    cpu, device = pictures(silence=mode), pictures(silence=mode, device_pixels=True, overlap=True)
    assert len(cpu) == len(device) == 38
    for one, other in zip(cpu, device, strict=True):
        assert apart(one, other) <= 1


def test_nothing_is_generated_for_what_is_not_shown(
    core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, counts = core.engine.models.generator, list[int]()
    start = generator.start

    def counting(latents: Any, *args: Any) -> Any:
        counts.append(len(latents))
        return start(latents, *args)

    monkeypatch.setattr(generator, "start", counting)
    source, audio = make_source(tmp_path / "source.mp4", 9), write_speech(tmp_path / "a.wav", SOUND)
    render(core, source, audio, tmp_path / "out.mp4", silence="source")
    assert sum(counts) == int((weights() > 0).sum())


def test_all_silent_is_the_source(core: Core, tmp_path: Path) -> None:
    source, audio = (
        make_source(tmp_path / "source.mp4", 9),
        write_speech(tmp_path / "a.wav", np.zeros(5_760, np.float32)),
    )
    rendered = render(core, source, audio, tmp_path / "out.mp4", silence="source")
    assert (rendered.summary.n_frames, rendered.summary.n_without_face) == (9, 0)
    for before, after in zip(frames_of(source), frames_of(tmp_path / "out.mp4"), strict=True):
        assert clips.luma_psnr(before, after) > 44


@pytest.mark.parametrize("mode", ["closed", "source"])
def test_sound_without_a_pause_gives_the_same_file(core: Core, tmp_path: Path, mode: str) -> None:
    source = make_source(tmp_path / "source.mp4", 9)
    audio = write_speech(tmp_path / "a.wav", clips.tone(0.5, SOUND_RATE))
    render(core, source, audio, tmp_path / "plain.mp4")
    render(core, source, audio, tmp_path / "out.mp4", silence=mode)
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


# -- the demo speaks, pauses while somebody mutters behind, and speaks again -----------------------------------------

FACE_OF_DEMO = (166, 120, 346, 380)


def spoken() -> NDArray[np.float32]:
    return media.read_waveform(SPEECH, media.inspect_audio(SPEECH, LIMITS), LIMITS)


def muttered() -> NDArray[np.float32]:
    """Somebody else's speech, from far away: just below the floor."""
    part = spoken()[8_000:88_000]
    return np.asarray(part * np.float32(10 ** ((FLOOR_DBFS - 0.3 - levels_dbfs(part).max()) / 20)), np.float32)


def spoken_with_a_pause() -> NDArray[np.float32]:
    return np.concatenate([spoken()[4_000:16_000], muttered()[24_000:42_000], spoken()[24_000:32_000]])


@pytest.fixture(scope="module")
def prepared() -> AvatarCache:
    """Keeps the avatar's faces and latents, which are the same in every video here."""
    return AvatarCache(None, memory_bytes=2**30, disk_bytes=0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, prepared: AvatarCache) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    write_flac(folder / "a.flac", spoken_with_a_pause())
    files = {}
    for mode in ("generate", "closed", "source"):
        files[mode] = folder / f"{mode}.mp4"
        speak_as(mode, folder / "a.flac", files[mode], prepared)
    return files


def speak_as(mode: str, audio: Path, output: Path, prepared: AvatarCache) -> None:
    speak(demo_models(), AVATAR, audio, output, avatars=prepared, silence=mode, face_box=FACE_OF_DEMO)


def demo_weights() -> NDArray[np.float64]:
    sound = spoken_with_a_pause()
    return speech_weights(quiet_spans(sound), len(sound), -(-len(sound) * FPS // SOUND_RATE), Fraction(FPS))


def opening_of(path: Path) -> NDArray[np.float64]:
    frames = read_frames(path)
    poses = natural_poses(round(CLIP_S * FPS), POSE_SEED)[: len(frames)]
    opening: NDArray[np.float64] = avatar_reader().read(frames, poses)[:, 0]
    return opening


def test_the_mouth_stays_shut_while_somebody_else_mutters(demo: dict[str, Path]) -> None:
    left = demo_weights()
    pause, speech = left == 0, left == 1
    assert pause.sum() > 15
    follows, shut = opening_of(demo["generate"]), opening_of(demo["closed"])
    assert shut[pause].max() < 0.12
    assert shut[pause].std() < 0.02
    assert np.abs(shut - follows)[speech].max() < 0.05
    assert shut[speech].max() > 0.5
    # No jump on the way in or out larger than those of speech.
    assert np.abs(np.diff(shut))[left[1:] < 1].max() <= np.abs(np.diff(follows)).max()


def test_muttering_alone_is_no_speech(tmp_path: Path, prepared: AvatarCache) -> None:
    """The model hears it where it fills a whole pass of the encoder; closed, the mouth does not follow."""
    write_flac(tmp_path / "a.flac", muttered())
    opening = {}
    for mode in ("generate", "closed"):
        speak_as(mode, tmp_path / "a.flac", tmp_path / "o.mp4", prepared)
        opening[mode] = opening_of(tmp_path / "o.mp4")
    assert opening["generate"].max() > 0.4
    assert opening["closed"].max() < 0.12
    assert opening["closed"].std() < 0.02


def test_the_pause_shows_the_source_and_speech_what_it_did(demo: dict[str, Path]) -> None:
    left = demo_weights()
    plain, bare = frames_of(demo["generate"]), frames_of(demo["source"])
    source = frames_of(AVATAR)[: len(bare)]
    assert len(plain) == len(bare) == len(left)
    for index, weight in enumerate(left):
        if weight == 0:
            assert clips.luma_psnr(source[index], bare[index]) > 44
        if weight == 1:
            assert clips.luma_psnr(plain[index], bare[index]) > 44
