"""Ten minutes of video in flat memory, back and forth over a source that does not fit the budget."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from musetalk.geometry import ping_pong_index
from musetalk_core import Core
from tests.support import clips
from tests.support.rendering import durations_of, frames_of, make_audio, make_source
from tests.support.tiny_models import write_tiny_models
from worker.config import load_settings
from worker.jobs import JobParams, Stage

RATE = Fraction(30000, 1001)


@pytest.mark.slow
def test_ten_minutes_stay_in_step_and_in_flat_memory(tmp_path: Path) -> None:
    models_dir = write_tiny_models(tmp_path / "models", crop_px=64)
    settings = {"MUSETALK_MODELS_DIR": str(models_dir), "MUSETALK_DEVICE": "cpu", "MUSETALK_CPU_THREADS": "1"}
    core = Core(load_settings({**settings, "FRAME_MEMORY_MB": "16"}, env_file=None))
    core.load()
    source = make_source(tmp_path / "source.mp4", 600, RATE, size=(96, 128))
    audio = make_audio(tmp_path / "a.wav", 600)
    process, resident = psutil.Process(), []

    def progress(stage: Stage, done: int, total: int) -> None:
        if stage == "inference":
            resident.append((done, process.memory_info().rss))

    rendered = core.render(
        source, audio, tmp_path / "out.mp4", JobParams(face_box=(24, 48, 72, 104)), on_progress=progress
    )
    assert rendered.summary.n_frames == 17_983
    picture_s, sound_s = durations_of(tmp_path / "out.mp4")
    assert abs(picture_s - 600) <= 1 / RATE
    assert abs(sound_s - 600) <= 1 / RATE
    numbers = [clips.read_number(frame.y) for frame in frames_of(tmp_path / "out.mp4", RATE)]
    assert numbers == [ping_pong_index(index, 600) for index in range(17_983)]
    # After the first minute everything that is kept is there.
    after_a_minute = next(rss for done, rss in resident if done >= 1800)
    assert max(rss for done, rss in resident if done >= 1800) - after_a_minute < 50 * 2**20
