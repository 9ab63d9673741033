"""One picture of a video without the rest of it: the same as in the whole."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from musetalk import media
from musetalk.errors import NoFaceError, RequestError
from musetalk.frames import Planes, planes_to_bgr
from musetalk.render import Preview
from musetalk_core import Core
from tests.support import clips
from tests.support.commands import run_core
from tests.support.rendering import (
    FACE,
    SIZE,
    SOUND,
    CountingWorker,
    MovingFaces,
    make_audio,
    make_source,
    render,
    with_faces,
    write_speech,
)
from worker.jobs import JobParams

Whole = Callable[..., list[Planes]]


@pytest.fixture
def whole(core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Whole:
    """All pictures of a video before they are encoded."""
    fit = media.fit_planes

    def make(source: Path, audio: Path, **params: Any) -> list[Planes]:
        seen: list[Planes] = []

        def remember(planes: Planes, *args: Any) -> Planes:
            seen.append(fit(planes, *args).copy())
            return seen[-1]

        with monkeypatch.context() as patch:
            patch.setattr(media, "fit_planes", remember)
            render(core, source, audio, tmp_path / "whole.mp4", **params)
        return seen

    return make


def preview(core: Core, source: Path, audio: Path, time_s: float, **params: Any) -> Preview:
    shape = {name: params.pop(name, None) for name in ("aspect_ratio", "resolution")}
    return core.preview(source, audio, time_s, JobParams(**{"face_box": FACE, **params}), **shape)


def assert_same(one: Planes, other: Planes) -> None:
    """Equal but for the last digit of sums that a batch of one takes in another order."""
    for first, second in ((one.y, other.y), (one.u, other.u), (one.v, other.v)):
        off = np.abs(first.astype(int) - second)
        assert off.max() <= 1
        assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("mode", ["ping_pong", "loop", "hold", "trim"])
def test_it_is_the_picture_of_the_whole_video(core: Core, whole: Whole, tmp_path: Path, mode: str) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 9), make_audio(tmp_path / "a.wav", 0.8)
    pictures = whole(source, audio, loop_mode=mode)
    for index in {0, 5, 8, min(13, len(pictures) - 1), len(pictures) - 1}:
        made = preview(core, source, audio, (index + 0.5) / 25, loop_mode=mode)
        assert (made.index, made.time_s) == (index, index / 25)
        assert clips.read_number(made.planes.y) == clips.read_number(pictures[index].y)
        assert_same(made.planes, pictures[index])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "source.mp4", "whole.mp4"]


@pytest.mark.parametrize("silence", ["closed", "source"])
def test_pauses_look_as_in_the_whole_video(core: Core, whole: Whole, tmp_path: Path, silence: str) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 9), write_speech(tmp_path / "a.wav", SOUND)
    pictures = whole(source, audio, silence=silence)
    for index in (2, 14, 20, 29):
        assert_same(preview(core, source, audio, index / 25 + 0.01, silence=silence).planes, pictures[index])


def test_shape_and_odd_rates_too(core: Core, whole: Whole, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.mp4", 9, Fraction(30000, 1001))
    audio = make_audio(tmp_path / "a.wav", 0.5)
    pictures = whole(source, audio, aspect_ratio="1:1", resolution="256x256")
    made = preview(core, source, audio, 0.28, aspect_ratio="1:1", resolution="256x256")
    assert made.index == 8
    assert made.planes.y.shape == (256, 256)
    assert_same(made.planes, pictures[8])


def test_a_repeated_picture_is_prepared_where_it_appeared(core: Core, whole: Whole, tmp_path: Path) -> None:
    times = [Fraction(0), Fraction(1, 25), Fraction(4, 25), Fraction(5, 25)]
    source = make_source(tmp_path / "source.mp4", 4, timestamps=times, last_duration=Fraction(1, 25))
    audio = make_audio(tmp_path / "a.wav", 0.4)
    pictures = whole(source, audio)
    for index in (2, 3, 7, 9):
        assert_same(preview(core, source, audio, (index + 0.5) / 25).planes, pictures[index])


def test_only_near_frames_are_searched_and_the_box_is_that_of_the_whole(
    core: Core, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = MovingFaces({4, 5, 9, 10, 20})
    monkeypatch.setattr(core, "_engine", with_faces(core.engine, finder))
    source, audio = make_source(tmp_path / "source.mp4", 40), make_audio(tmp_path / "a.wav", 1.6)
    asked: dict[str, Any] = {"face_box": None, "box_smoothing": 1.5, "max_gap_frames": 3}
    pictures = whole(source, audio, **asked)
    for index in (3, 5, 11, 30):
        finder.seen.clear()
        assert_same(preview(core, source, audio, (index + 0.5) / 25, **asked).planes, pictures[index])
        assert finder.seen == list(range(min(40, index + 1 + 6 + 3 + 1)))


def test_a_face_that_comes_later_is_no_reason_to_refuse(core: Core, tmp_path: Path, monkeypatch: Any) -> None:
    loaded = core.engine
    source, audio = make_source(tmp_path / "source.mp4", 30), make_audio(tmp_path / "a.wav", 1.2)
    monkeypatch.setattr(core, "_engine", with_faces(loaded, MovingFaces(range(25))))
    info = media.inspect_source(source, media.MediaLimits())
    first = next(iter(media.read_source(source, info, media.MediaLimits()))).planes
    made = preview(core, source, audio, 0.0, face_box=None, max_gap_frames=0)
    assert np.array_equal(made.planes.y, first.y)
    monkeypatch.setattr(core, "_engine", with_faces(loaded, MovingFaces(range(30))))
    with pytest.raises(NoFaceError):
        preview(core, source, audio, 0.0, face_box=None, max_gap_frames=0)


def test_what_a_preview_searched_a_video_need_not_and_stays_the_same_to_the_byte(core: Core, tmp_path: Path) -> None:
    worker, other = CountingWorker(core, tmp_path / "one"), CountingWorker(core, tmp_path / "two")
    source, audio = make_source(tmp_path / "source.mp4", 9), make_audio(tmp_path / "a.wav", 0.36)
    worker.core.preview(source, audio, 0.3, JobParams())
    worker.render(source, audio, tmp_path / "after.mp4")
    assert (worker.faces.seen, worker.n_encoded) == ([], 9)
    other.render(source, audio, tmp_path / "without.mp4")
    assert (tmp_path / "after.mp4").read_bytes() == (tmp_path / "without.mp4").read_bytes()


def test_an_option_that_moves_no_face_searches_none_again(core: Core, tmp_path: Path) -> None:
    worker, other = CountingWorker(core, tmp_path / "one"), CountingWorker(core, tmp_path / "two")
    source, audio = make_source(tmp_path / "source.mp4", 9), make_audio(tmp_path / "a.wav", 0.36)
    worker.core.preview(source, audio, 0.3, JobParams())
    worker.faces.seen.clear()
    for params in (JobParams(extra_margin=7), JobParams(parsing_mode="raw"), JobParams(box_smoothing=1.0)):
        worker.core.preview(source, audio, 0.3, params)
    assert worker.faces.seen == []
    worker.render(source, audio, tmp_path / "after.mp4", extra_margin=7)
    assert worker.faces.seen == []
    other.render(source, audio, tmp_path / "without.mp4", extra_margin=7)
    assert (tmp_path / "after.mp4").read_bytes() == (tmp_path / "without.mp4").read_bytes()


def test_a_preview_says_where_the_face_is_and_how_long_the_video_will_be(core: Core, tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 9), make_audio(tmp_path / "a.wav", 0.8)
    made = preview(core, source, audio, 0.2, extra_margin=12)
    assert made.face_box == FACE
    assert made.source_size == SIZE
    assert made.duration_s == 0.8


@pytest.mark.parametrize("time_s", [-0.01, 0.41, float("nan"), float("inf")])
def test_a_time_outside_the_video_is_refused(core: Core, tmp_path: Path, time_s: float) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 5), make_audio(tmp_path / "a.wav", 0.4)
    with pytest.raises(RequestError, match=r"from 0 to 0.400 s"):
        preview(core, source, audio, time_s)
    assert preview(core, source, audio, 0.4).index == 9
    assert core.readiness.state == "ready"


def test_the_reported_start_time_of_a_frame_means_that_frame(core: Core, tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 5, Fraction(30000, 1001)), make_audio(tmp_path / "a.wav", 0.4)
    for index in (1, 3, 7):
        assert preview(core, source, audio, round(float(index * Fraction(1001, 30000)), 3)).index == index


def test_the_command_line_writes_a_picture(core: Core, tmp_path: Path, tiny_models: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 6), make_audio(tmp_path / "a.wav", 0.4)
    output = tmp_path / "out.png"
    box = f"face_box={list(FACE)}"
    done = run_core(tiny_models, str(source), str(audio), str(output), "--param", box, "--preview", "0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{output}: frame 2, shown at 0.080 s"
    made = preview(core, source, audio, 0.1)
    drawn = cv2.imread(str(output))
    assert drawn is not None
    assert np.abs(drawn.astype(int) - planes_to_bgr(made.planes, made.matrix)).mean() < 0.1
    made.save(tmp_path / "out.JPG")
    photo = cv2.imread(str(tmp_path / "out.JPG"))
    assert photo is not None
    assert photo.shape == drawn.shape


def test_the_command_line_refuses_another_kind_of_file(tmp_path: Path, tiny_models: Path) -> None:
    done = run_core(tiny_models, "a.mp4", "a.wav", str(tmp_path / "out.mp4"), "--preview", "1")
    assert done.returncode == 2
    assert ".png" in done.stderr
    assert not (tmp_path / "out.mp4").exists()
