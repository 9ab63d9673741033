"""What is shown when the speech is longer than the source, frame by frame, and sound that ends with the picture."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from musetalk import media
from musetalk.frame_store import FrameStore
from musetalk.geometry import source_index
from musetalk.options import LoopMode
from musetalk_core import Core
from tests.support import clips
from tests.support.rendering import (
    FACE,
    LIMITS,
    CountingWorker,
    durations_of,
    frames_of,
    make_audio,
    make_source,
    render,
)

MODES: list[LoopMode] = ["loop", "hold", "trim"]
N_SOURCE = 7
RATES = [Fraction(24000, 1001), Fraction(25), Fraction(60000, 1001)]


def numbers_of(path: Path) -> list[int | None]:
    return [clips.read_number(frame.y) for frame in frames_of(path)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.3f}")
def test_the_frames_come_in_the_order_that_was_asked_for(
    core: Core, tmp_path: Path, mode: LoopMode, rate: Fraction
) -> None:
    source, audio = make_source(tmp_path / "source.mp4", N_SOURCE, rate), make_audio(tmp_path / "a.wav", 0.53)
    rendered = render(core, source, audio, tmp_path / "out.mp4", loop_mode=mode)
    n_audio = -(-Fraction("0.53") * rate // 1)
    n_frames = N_SOURCE if mode == "trim" else n_audio
    assert rendered.summary.n_frames == n_frames
    assert numbers_of(tmp_path / "out.mp4") == [source_index(mode, index, N_SOURCE) for index in range(n_frames)]
    picture_s, sound_s = durations_of(tmp_path / "out.mp4")
    wanted_s = N_SOURCE / rate if mode == "trim" else Fraction("0.53")
    assert abs(picture_s - wanted_s) <= 1 / rate
    # AAC comes in frames of 1,024 samples; the file says where the sound ends inside the last.
    assert abs(sound_s - wanted_s) <= 1 / rate
    assert [w for w in rendered.summary.warnings if "cut" in w] == (
        [
            f"the speech was cut: {float(N_SOURCE / rate):.2f} of its 0.53 s are in the video, as the source ends",
        ]
        if mode == "trim"
        else []
    )


def test_trimming_counts_frames_that_were_searched_for_faces(core: Core, tmp_path: Path) -> None:
    worker = CountingWorker(core, tmp_path)
    source, audio = make_source(tmp_path / "source.mp4", N_SOURCE), make_audio(tmp_path / "a.wav", 0.6)
    rendered = worker.render(source, audio, tmp_path / "out.mp4", loop_mode="trim")
    assert worker.faces.seen == list(range(N_SOURCE))
    assert numbers_of(tmp_path / "out.mp4") == list(range(N_SOURCE))
    assert rendered.summary.n_frames == N_SOURCE


def test_trimming_a_source_longer_than_the_speech_cuts_nothing(core: Core, tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 12), make_audio(tmp_path / "a.wav", 0.4)
    rendered = render(core, source, audio, tmp_path / "trim.mp4", loop_mode="trim")
    render(core, source, audio, tmp_path / "plain.mp4")
    assert not [warning for warning in rendered.summary.warnings if "cut" in warning]
    assert (tmp_path / "trim.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def test_trimmed_sound_is_the_beginning_of_the_speech(core: Core, tmp_path: Path) -> None:
    sound = clips.Sound(
        clips.clicks(1.0, [0.05, 0.15, 0.6], 16_000), rate=16_000, codec="pcm_s16le", sample_format="s16"
    )
    audio = clips.write_sound(tmp_path / "a.wav", sound)
    render(core, make_source(tmp_path / "source.mp4", N_SOURCE), audio, tmp_path / "out.mp4", loop_mode="trim")
    info = media.inspect_audio(tmp_path / "out.mp4", LIMITS)
    heard = media.read_waveform(tmp_path / "out.mp4", info, LIMITS)
    assert np.allclose(clips.click_times(heard, 16_000), [0.05, 0.15], atol=0.002)


@pytest.mark.parametrize("mode", MODES)
def test_a_still_is_shown_throughout(core: Core, tmp_path: Path, mode: LoopMode) -> None:
    Image.fromarray(clips.picture(7, 192, 256)[..., ::-1]).save(tmp_path / "still.png")
    rendered = render(
        core, tmp_path / "still.png", make_audio(tmp_path / "a.wav", 0.5), tmp_path / "o.mp4", loop_mode=mode
    )
    assert rendered.summary.n_frames == 13
    assert set(numbers_of(tmp_path / "o.mp4")) == {7}
    assert not [warning for warning in rendered.summary.warnings if "cut" in warning]


def test_a_video_of_one_frame_is_trimmed_to_it(core: Core, tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 1), make_audio(tmp_path / "a.wav", 0.5)
    assert render(core, source, audio, tmp_path / "out.mp4", loop_mode="trim").summary.n_frames == 1
    for mode in ("loop", "hold"):
        rendered = render(core, source, audio, tmp_path / f"{mode}.mp4", loop_mode=mode)
        assert rendered.summary.n_frames == 13
        assert set(numbers_of(tmp_path / f"{mode}.mp4")) == {0}


def test_repeated_pictures_of_a_slow_source_loop_as_they_were_shown(core: Core, tmp_path: Path) -> None:
    times = [Fraction(0), Fraction(1, 25), Fraction(4, 25), Fraction(5, 25)]
    source = make_source(tmp_path / "source.mp4", 4, timestamps=times, last_duration=Fraction(1, 25))
    audio = make_audio(tmp_path / "a.wav", 0.6)
    render(core, source, audio, tmp_path / "once.mp4", loop_mode="trim")
    once = numbers_of(tmp_path / "once.mp4")
    for mode in ("loop", "hold"):
        render(core, source, audio, tmp_path / f"{mode}.mp4", loop_mode=mode)
        shown = numbers_of(tmp_path / f"{mode}.mp4")
        assert shown == [once[source_index(mode, index, len(once))] for index in range(len(shown))]


@pytest.mark.parametrize(("mode", "n_kept"), [("ping_pong", N_SOURCE), ("loop", N_SOURCE), ("hold", 0), ("trim", 0)])
def test_only_pictures_that_come_back_are_kept(
    core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, n_kept: int
) -> None:
    kept: list[int] = []
    put = FrameStore.put

    def counting(store: FrameStore, number: int, arrays: Any) -> None:
        kept.append(number)
        put(store, number, arrays)

    monkeypatch.setattr(FrameStore, "put", counting)
    source, audio = make_source(tmp_path / "source.mp4", N_SOURCE), make_audio(tmp_path / "a.wav", 0.5)
    render(core, source, audio, tmp_path / "out.mp4", loop_mode=mode)
    assert len(kept) == n_kept


def test_a_prepared_source_serves_every_mode(core: Core, tmp_path: Path) -> None:
    worker = CountingWorker(core, tmp_path)
    source, audio = make_source(tmp_path / "source.mp4", N_SOURCE), make_audio(tmp_path / "a.wav", 0.5)
    worker.render(source, audio, tmp_path / "first.mp4")
    for mode in MODES:
        rendered = worker.render(source, audio, tmp_path / f"{mode}.mp4", loop_mode=mode)
        assert (worker.faces.seen, worker.n_encoded, rendered.summary.n_reused) == ([], 0, N_SOURCE)


def test_a_header_that_promises_too_much_still_loops(
    core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    probe = media.probe_source
    monkeypatch.setattr(media, "probe_source", lambda *given: replace(probe(*given), n_frames=500))
    source, audio = make_source(tmp_path / "source.mp4", N_SOURCE), make_audio(tmp_path / "a.wav", 0.6)
    for mode in MODES:
        rendered = render(core, source, audio, tmp_path / "out.mp4", loop_mode=mode, face_box=FACE)
        n_frames = rendered.summary.n_frames
        assert numbers_of(tmp_path / "out.mp4") == [source_index(mode, index, N_SOURCE) for index in range(n_frames)]
