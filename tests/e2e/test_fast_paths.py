"""What a GPU does by default, on the CPU: the same video whichever way it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter as clock
from typing import Any

import numpy as np
import pytest
import torch

from musetalk import crowding
from musetalk.errors import CancelledError, MediaError, OutOfMemoryError
from musetalk.options import RenderOptions
from musetalk.render import RenderSession, RenderSummary
from musetalk_core import Core
from tests.support import clips
from tests.support.rendering import FACE, frames_of, make_audio, make_source
from worker.config import load_settings

Make = Callable[..., RenderSummary]


@pytest.fixture
def make(core: Core, tmp_path: Path) -> Make:
    """Render a short source into `name` with options; the networks are those of all tests."""
    source, audio = make_source(tmp_path / "source.mp4", 14), make_audio(tmp_path / "a.wav", 0.9)

    def run(name: str, should_stop: Callable[[], bool] = lambda: False, **options: Any) -> RenderSummary:
        chosen = RenderOptions(face_box=FACE, batch_size=4, **options)
        with RenderSession(core.engine.models, source, audio, tmp_path / name, chosen) as session:
            session.probe()
            session.prepare(should_stop)
            session.generate(should_stop=should_stop)
            return session.finish()

    return run


def test_preparing_in_a_thread_changes_no_byte(make: Make, tmp_path: Path) -> None:
    make("plain.mp4")
    make("overlap.mp4", overlap=True)
    assert (tmp_path / "overlap.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()


def test_a_job_that_gives_cores_to_others_makes_the_same_video_and_takes_them_back(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(3)
    make("plain.mp4")
    numbers = []
    # Every piece of work waits for a core all the time.
    monkeypatch.setattr(crowding, "_MIN_PIECE_S", 0.0)
    starved = {"look": lambda: {"1": (0.0, clock())}, "clock": clock}
    monkeypatch.setattr(crowding.ThreadsByCrowding.__init__, "__kwdefaults__", starved)
    launch = RenderSession._launch

    def watched(self: RenderSession, *args: Any) -> Any:
        numbers.append(torch.get_num_threads())
        return launch(self, *args)

    monkeypatch.setattr(RenderSession, "_launch", watched)
    make("yielding.mp4", yields_cores=True)
    assert numbers[:3] == [3, 2, 1]
    assert set(numbers[2:]) == {1}
    assert torch.get_num_threads() == 3
    for one, other in zip(frames_of(tmp_path / "plain.mp4"), frames_of(tmp_path / "yielding.mp4"), strict=True):
        assert np.abs(one.y.astype(int) - other.y).max() <= 2


def test_pixels_where_the_networks_are_stay_within_one_level(make: Make, tmp_path: Path) -> None:
    """The files differ by what two encodes of nearly the same pictures differ."""
    make("cpu.mp4")
    make("device.mp4", device_pixels=True)
    pairs = list(zip(frames_of(tmp_path / "cpu.mp4"), frames_of(tmp_path / "device.mp4"), strict=True))
    assert len(pairs) == 23
    for one, other in pairs:
        assert clips.luma_psnr(one, other) > 48
    source = frames_of(tmp_path / "source.mp4")
    assert any(np.abs(one.y.astype(int) - source[0].y).max() > 30 for one, _ in pairs), "nothing was pasted"


def test_the_device_pastes_what_the_cpu_pastes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures on their way to the encoder, compared before it: at most one level, almost everywhere none."""
    from musetalk import media

    seen: dict[str, list[Any]] = {"cpu": [], "device": []}
    fit = media.fit_planes
    for name, options in (("cpu", {}), ("device", {"device_pixels": True})):
        kept = seen[name]

        def remember(planes: Any, *args: Any, kept: list[Any] = kept) -> Any:
            kept.append(planes.copy())
            return fit(planes, *args)

        monkeypatch.setattr(media, "fit_planes", remember)
        make(f"{name}.mp4", **options)
    assert len(seen["cpu"]) == len(seen["device"]) == 23
    for one, other in zip(seen["cpu"], seen["device"], strict=True):
        for first, second in ((one.y, other.y), (one.u, other.u), (one.v, other.v)):
            apart = np.abs(first.astype(int) - second)
            assert apart.max() <= 1
            assert (apart > 0).mean() < 0.01


def test_an_error_in_the_preparing_thread_is_the_jobs_error(
    make: Make, core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def encode(_crops: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(core.engine.models.generator, "encode", encode)
    with pytest.raises(OutOfMemoryError):
        make("out.mp4", overlap=True)
    assert not (tmp_path / "out.mp4").exists()


def test_a_broken_source_is_reported_with_overlap_too(core: Core, tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 40), make_audio(tmp_path / "a.wav", 1.6)
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 6 // 10])
    chosen = RenderOptions(face_box=FACE, overlap=True)

    def run() -> None:
        with RenderSession(core.engine.models, source, audio, tmp_path / "o.mp4", chosen) as session:
            session.probe()
            session.prepare()
            session.generate()
            session.finish()

    with pytest.raises(MediaError):
        run()
    assert not (tmp_path / "o.mp4").exists()


def test_a_cancel_ends_the_preparing_thread(make: Make, tmp_path: Path) -> None:
    import threading

    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > 4

    with pytest.raises(CancelledError):
        make("out.mp4", should_stop, overlap=True)
    assert not [
        thread for thread in threading.enumerate() if thread.name in ("preparer", "decoder", "paster", "encoder")
    ]
    assert not (tmp_path / "out.mp4").exists()


def test_the_settings_reach_the_options(core: Core) -> None:
    from worker.jobs import JobParams

    engine = core.engine
    plain = engine.options(JobParams(), None, None)
    assert (plain.device_pixels, plain.overlap) == (False, False)
    on_gpu = replace(engine, models=replace(engine.models, device=torch.device("cuda")))
    options = on_gpu.options(JobParams(), None, None)
    assert (options.device_pixels, options.overlap) == (True, True)
    asked = replace(engine, settings=load_settings({"DEVICE_PIXELS": "1"}, env_file=None))
    assert asked.options(JobParams(), None, None).device_pixels
    # A number of threads that somebody chose is kept.
    engines = engine, asked, replace(asked, models=on_gpu.models)
    assert [one.options(JobParams(), None, None).yields_cores for one in engines] == [False, True, False]
