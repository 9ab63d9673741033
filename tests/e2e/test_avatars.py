"""A source seen before: the same video to the byte, and nothing of it is searched or encoded a second time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from musetalk.avatars import SUFFIX, read_avatar
from musetalk_core import Core
from tests.support.rendering import FACE, CountingWorker, frames_of, make_audio, make_source


@pytest.fixture
def start(core: Core, tmp_path: Path) -> Callable[..., CountingWorker]:
    def make(name: str = "worker", **variables: str) -> CountingWorker:
        return CountingWorker(core, tmp_path / name, **variables)

    return make


@pytest.fixture
def media_of(tmp_path: Path) -> tuple[Path, Path]:
    return make_source(tmp_path / "source.mp4", 9), make_audio(tmp_path / "a.wav", 0.6)


def same_within_one_level(first: Path, second: Path) -> bool:
    return all(
        int(np.abs(a.y.astype(int) - b.y).max()) <= 1 for a, b in zip(frames_of(first), frames_of(second), strict=True)
    )


def test_the_second_video_is_the_first_to_the_byte_without_searching_or_encoding(
    start: Callable[..., CountingWorker], media_of: tuple[Path, Path], tmp_path: Path
) -> None:
    worker = start()
    cold = worker.render(*media_of, tmp_path / "cold.mp4")
    assert worker.faces.seen == list(range(9))
    assert (worker.n_encoded, cold.summary.n_reused) == (9, 0)
    warm = worker.render(*media_of, tmp_path / "warm.mp4")
    assert (worker.faces.seen, worker.n_encoded, warm.summary.n_reused) == ([], 0, 9)
    off = start("off", AVATAR_MEMORY_MB="0", AVATAR_DISK_MB="0")
    off.render(*media_of, tmp_path / "off.mp4")
    assert off.core.engine.avatars is None
    assert (tmp_path / "warm.mp4").read_bytes() == (tmp_path / "cold.mp4").read_bytes()
    assert (tmp_path / "off.mp4").read_bytes() == (tmp_path / "cold.mp4").read_bytes()


def test_the_same_bytes_under_another_name_and_another_speech_are_the_same_source(
    start: Callable[..., CountingWorker], media_of: tuple[Path, Path], tmp_path: Path
) -> None:
    worker = start()
    worker.render(*media_of, tmp_path / "cold.mp4")
    renamed = tmp_path / "other.bin"
    renamed.write_bytes(media_of[0].read_bytes())
    worker.render(renamed, make_audio(tmp_path / "b.wav", 0.4), tmp_path / "warm.mp4")
    assert (worker.faces.seen, worker.n_encoded) == ([], 0)


def test_a_restarted_worker_still_knows_the_source(
    start: Callable[..., CountingWorker], media_of: tuple[Path, Path], tmp_path: Path
) -> None:
    start().render(*media_of, tmp_path / "cold.mp4")
    restarted = start()
    restarted.render(*media_of, tmp_path / "warm.mp4")
    assert (restarted.faces.seen, restarted.n_encoded) == ([], 0)
    assert (tmp_path / "warm.mp4").read_bytes() == (tmp_path / "cold.mp4").read_bytes()


def test_a_broken_file_is_prepared_again_and_replaced(
    start: Callable[..., CountingWorker], media_of: tuple[Path, Path], tmp_path: Path
) -> None:
    start().render(*media_of, tmp_path / "cold.mp4")
    (path,) = (tmp_path / "worker/avatars").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    restarted = start()
    restarted.render(*media_of, tmp_path / "again.mp4")
    assert restarted.n_encoded == 9
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "cold.mp4").read_bytes()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "params",
    [
        {"extra_margin": 3},
        {"parsing_mode": "raw"},
        {"left_cheek_width": 60},
        {"right_cheek_width": 60},
        {"box_smoothing": 1.5},
        {"max_gap_frames": 0},
        {"face_box": FACE},
    ],
    ids=lambda params: next(iter(params)),
)
def test_a_choice_that_changes_pixels_is_prepared_for_itself(
    start: Callable[..., CountingWorker], media_of: tuple[Path, Path], tmp_path: Path, params: dict[str, Any]
) -> None:
    worker = start()
    worker.render(*media_of, tmp_path / "plain.mp4")
    assert worker.render(*media_of, tmp_path / "warm.mp4", **params).summary.n_reused == 0
    other = start("other")
    other.render(*media_of, tmp_path / "cold.mp4", **params)
    assert (tmp_path / "warm.mp4").read_bytes() == (tmp_path / "cold.mp4").read_bytes()


def test_other_weights_are_another_avatar(
    start: Callable[..., CountingWorker], media_of: tuple[Path, Path], tmp_path: Path
) -> None:
    worker = start()
    worker.render(*media_of, tmp_path / "cold.mp4")
    loaded = worker.core.engine
    worker.core.engine = replace(loaded, models=replace(loaded.models, fingerprint="of other weights"))
    assert worker.render(*media_of, tmp_path / "other.mp4").summary.n_reused == 0


@pytest.mark.parametrize("params", [{}, {"box_smoothing": 1.5}, {"max_gap_frames": 4}], ids=["plain", "smooth", "gaps"])
def test_only_what_the_sound_reaches_is_prepared_and_a_longer_speech_adds_the_rest(
    start: Callable[..., CountingWorker], tmp_path: Path, params: dict[str, Any]
) -> None:
    """Boxes near the old end look at frames behind it: where one changes, the frame is prepared again."""
    source = make_source(tmp_path / "source.mp4", 30)
    short, long = make_audio(tmp_path / "a.wav", 0.4), make_audio(tmp_path / "b.wav", 1.0)
    worker = start()
    worker.faces.without = frozenset({9, 10})
    worker.render(source, short, tmp_path / "short.mp4", **params)
    assert worker.faces.seen == list(range(10))
    worker.render(source, long, tmp_path / "long.mp4", **params)
    assert worker.faces.seen == list(range(10, 25))
    assert worker.n_encoded < 25
    (path,) = (tmp_path / "worker/avatars").glob(f"*{SUFFIX}")
    avatar = read_avatar(path)
    assert len(avatar.found) == 25
    assert not avatar.is_whole
    cold = start("cold")
    cold.faces.without = frozenset({9, 10})
    cold.render(source, long, tmp_path / "cold.mp4", **params)
    assert same_within_one_level(tmp_path / "long.mp4", tmp_path / "cold.mp4")
    worker.render(source, short, tmp_path / "again.mp4", **params)
    assert same_within_one_level(tmp_path / "again.mp4", tmp_path / "short.mp4")


def test_a_source_that_ended_is_not_read_again_for_a_longer_speech(
    start: Callable[..., CountingWorker], media_of: tuple[Path, Path], tmp_path: Path
) -> None:
    worker = start()
    worker.render(*media_of, tmp_path / "short.mp4")
    worker.render(media_of[0], make_audio(tmp_path / "b.wav", 1.4), tmp_path / "long.mp4")
    assert (worker.faces.seen, worker.n_encoded) == ([], 0)


def test_a_failed_job_leaves_no_avatar(
    start: Callable[..., CountingWorker], media_of: tuple[Path, Path], tmp_path: Path
) -> None:
    worker = start()

    def progress(stage: str, done: int, _total: int) -> None:
        if stage == "inference" and done > 0:
            worker.core.stop_running("cancelled")

    from musetalk.errors import CancelledError
    from worker.jobs import JobParams

    with pytest.raises(CancelledError):
        worker.core.render(*media_of, tmp_path / "out.mp4", JobParams(), on_progress=progress)
    assert list((tmp_path / "worker/avatars").iterdir()) == []


def test_a_source_beyond_the_budget_is_rendered_and_not_kept(
    start: Callable[..., CountingWorker], tmp_path: Path
) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 60), make_audio(tmp_path / "a.wav", 2.4)
    worker = start(AVATAR_MEMORY_MB="1", AVATAR_DISK_MB="1")
    worker.render(source, audio, tmp_path / "out.mp4")
    assert worker.n_encoded == 60
    assert list((tmp_path / "worker/avatars").iterdir()) == []
    assert worker.render(source, audio, tmp_path / "again.mp4").summary.n_reused == 0
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "out.mp4").read_bytes()
