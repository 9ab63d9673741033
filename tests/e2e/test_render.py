"""Local files in, local file out, with real codecs and tiny networks: length, order, sync, and what stays untouched."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from musetalk import media
from musetalk.errors import JobCancelledError, MediaError, NoFaceError, RequestError
from musetalk.frames import Planes
from musetalk.geometry import Box, ping_pong_index
from musetalk_core import Core
from tests.support import clips
from tests.support.rendering import (
    FACE,
    LIMITS,
    SIZE,
    SomeFaces,
    durations_of,
    frames_of,
    make_audio,
    make_source,
    render,
    with_faces,
)
from worker.jobs import JobParams, Stage

RATES = [
    Fraction(24000, 1001),
    Fraction(24),
    Fraction(25),
    Fraction(30000, 1001),
    Fraction(30),
    Fraction(50),
    Fraction(60000, 1001),
    Fraction(60),
]


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.3f}")
def test_output_is_as_long_as_the_sound_at_every_rate(core: Core, tmp_path: Path, rate: Fraction) -> None:
    seconds = 1.23
    source = make_source(tmp_path / "source.mp4", 20, rate)
    rendered = render(core, source, make_audio(tmp_path / "a.wav", seconds), tmp_path / "out.mp4")
    n_frames = rendered.summary.n_frames
    assert n_frames == -(-Fraction("1.23") * rate // 1)
    picture_s, sound_s = durations_of(tmp_path / "out.mp4")
    assert abs(picture_s - Fraction("1.23")) <= 1 / rate
    assert abs(sound_s - Fraction("1.23")) <= 1 / rate
    # Every output frame shows the source frame that the cycle says, also on the way back.
    numbers = [clips.read_number(frame.y) for frame in frames_of(tmp_path / "out.mp4", rate)]
    assert numbers == [ping_pong_index(index, 20) for index in range(n_frames)]


def test_a_source_longer_than_the_sound_is_cut(core: Core, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.mp4", 60)
    rendered = render(core, source, make_audio(tmp_path / "a.wav", 0.5), tmp_path / "out.mp4")
    assert rendered.summary.n_frames == 13
    assert rendered.summary.n_source_frames == 13
    assert [clips.read_number(frame.y) for frame in frames_of(tmp_path / "out.mp4")] == list(range(13))


@pytest.mark.parametrize("n_source", [1, 2, 7])
def test_a_short_source_goes_back_and_forth(core: Core, tmp_path: Path, n_source: int) -> None:
    source = make_source(tmp_path / "source.mp4", n_source)
    render(core, source, make_audio(tmp_path / "a.wav", 1.2), tmp_path / "out.mp4")
    numbers = [clips.read_number(frame.y) for frame in frames_of(tmp_path / "out.mp4")]
    assert numbers == [ping_pong_index(index, n_source) for index in range(30)]


def test_a_still_is_held(core: Core, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(clips.picture(7, *SIZE)[..., ::-1]).save(tmp_path / "still.png")
    rendered = render(core, tmp_path / "still.png", make_audio(tmp_path / "a.wav", 1.0), tmp_path / "out.mp4")
    assert rendered.summary.n_frames == 25
    assert {clips.read_number(frame.y) for frame in frames_of(tmp_path / "out.mp4")} == {7}


def test_a_variable_rate_source_is_shown_at_its_times(core: Core, tmp_path: Path) -> None:
    times = [Fraction(0), Fraction(1, 25), Fraction(4, 25), Fraction(5, 25), Fraction(10, 25), Fraction(11, 25)]
    source = make_source(tmp_path / "source.mp4", 6, timestamps=times, last_duration=Fraction(1, 25))
    render(core, source, make_audio(tmp_path / "a.wav", 0.44), tmp_path / "out.mp4")
    info = media.inspect_source(tmp_path / "out.mp4", LIMITS)
    shown = [clips.read_number(frame.y) for frame in frames_of(tmp_path / "out.mp4")]
    expected = [
        max(i for i, time in enumerate(times) if time <= Fraction(tick) / info.rate) for tick in range(len(shown))
    ]
    assert shown == expected


def test_sound_shorter_than_a_frame_gives_one_frame(core: Core, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.mp4", 5, Fraction(25))
    limits_message = "at least"
    with pytest.raises(MediaError, match=limits_message):
        render(core, source, make_audio(tmp_path / "a.wav", 0.02), tmp_path / "out.mp4")
    rendered = render(core, source, make_audio(tmp_path / "b.wav", 0.1), tmp_path / "out.mp4")
    assert rendered.summary.n_frames == 3


def untouched_psnr(source: Sequence[Planes], output: Sequence[Planes], face: Box) -> float:
    """Luma PSNR (dB) of all pixels outside the box that is redrawn."""
    outside = np.ones(source[0].y.shape, bool)
    outside[face.y0 : face.y1, face.x0 : face.x1] = False
    errors = [np.square(a.y.astype(float) - b.y)[outside].mean() for a, b in zip(source, output, strict=False)]
    return float(10 * np.log10(255**2 / np.mean(errors)))


def test_the_picture_outside_the_box_is_untouched_and_inside_is_redrawn(core: Core, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.mp4", 12)
    render(core, source, make_audio(tmp_path / "a.wav", 0.48), tmp_path / "out.mp4")
    before, after = frames_of(source), frames_of(tmp_path / "out.mp4")
    assert len(after) == 12
    box = Box(FACE[0], FACE[1], FACE[2], FACE[3] + 10)
    assert untouched_psnr(before, after, box) > 44
    inner = (slice(box.y1 - 40, box.y1 - 15), slice(box.x0 + 25, box.x1 - 25))
    changed = np.mean(
        [np.abs(a.y[inner].astype(float) - b.y[inner]).mean() for a, b in zip(before, after, strict=True)]
    )
    assert changed > 5


def test_batch_size_and_budget_do_not_change_the_picture(core: Core, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source.mp4", 9)
    audio = make_audio(tmp_path / "a.wav", 1.0)
    render(core, source, audio, tmp_path / "a.mp4", batch_size=8)
    render(core, source, audio, tmp_path / "b.mp4", batch_size=3)
    for first, second in zip(frames_of(tmp_path / "a.mp4"), frames_of(tmp_path / "b.mp4"), strict=True):
        # Batches differ in the last float digit, so a level may flip, and the encoder may spread that.
        assert np.abs(first.y.astype(int) - second.y).mean() < 0.05


def test_frames_that_do_not_fit_the_memory_come_back_from_disk_the_same(tiny_models: Path, tmp_path: Path) -> None:
    import torch

    from musetalk.models import load_models
    from musetalk.options import RenderOptions
    from musetalk.render import RenderSession

    models = load_models(tiny_models, "v15", device=torch.device("cpu"), dtype=torch.float32)
    source, audio = make_source(tmp_path / "source.mp4", 9), make_audio(tmp_path / "a.wav", 1.0)
    files = []
    for name, memory in (("memory", 2**30), ("disk", 0), ("both", 200_000)):
        output = tmp_path / f"{name}.mp4"
        options = RenderOptions(face_box=FACE, frame_memory_bytes=memory)
        with RenderSession(models, source, audio, output, options) as session:
            session.probe()
            session.prepare()
            session.generate()
            session.finish()
        files.append(output.read_bytes())
    assert files[0] == files[1] == files[2]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".mp4"] * 4 + [".wav"]


def test_the_same_job_twice_gives_the_same_file(core: Core, tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 5), make_audio(tmp_path / "a.wav", 0.4)
    render(core, source, audio, tmp_path / "a.mp4")
    render(core, source, audio, tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.fixture
def with_finder(core: Core) -> Any:
    """Replace the core's face finder for one test."""
    loaded = core.engine

    def use(finder: SomeFaces) -> Core:
        core.engine = with_faces(loaded, finder)
        return core

    yield use
    core.engine = loaded


def test_frames_without_a_face_show_the_source_and_keep_the_rest_in_step(with_finder: Any, tmp_path: Path) -> None:
    without = {3, *range(8, 30)}
    core = with_finder(SomeFaces(without))
    source, audio = make_source(tmp_path / "source.mp4", 40), make_audio(tmp_path / "a.wav", 1.6)
    rendered = render(core, source, audio, tmp_path / "out.mp4", face_box=None, max_gap_frames=2)
    assert rendered.summary.n_frames == 40
    assert rendered.summary.n_interpolated == 1
    assert rendered.summary.n_without_face == 22
    before, after = frames_of(source), frames_of(tmp_path / "out.mp4")
    assert [clips.read_number(frame.y) for frame in after] == list(range(40))
    inner = (slice(186, 210), slice(75, 117))
    change = [np.abs(a.y[inner].astype(float) - b.y[inner]).mean() for a, b in zip(before, after, strict=True)]
    for index, amount in enumerate(change):
        if index in range(8, 30):
            assert amount < 2, f"frame {index} has no face and was changed by {amount}"
        else:
            assert amount > 5, f"frame {index} has a face and was left by {amount}"


def test_a_source_without_a_face_fails_before_anything_is_generated(with_finder: Any, tmp_path: Path) -> None:
    core = with_finder(SomeFaces(set(range(100))))
    source, audio = make_source(tmp_path / "source.mp4", 10), make_audio(tmp_path / "a.wav", 0.4)
    with pytest.raises(NoFaceError) as caught:
        render(core, source, audio, tmp_path / "out.mp4", face_box=None)
    assert caught.value.stage == "preprocessing"
    assert not (tmp_path / "out.mp4").exists()


def test_only_the_frames_the_sound_reaches_are_looked_at(with_finder: Any, tmp_path: Path) -> None:
    finder = SomeFaces(set())
    source, audio = make_source(tmp_path / "source.mp4", 60), make_audio(tmp_path / "a.wav", 0.4)
    render(with_finder(finder), source, audio, tmp_path / "out.mp4", face_box=None)
    assert finder.seen == list(range(10))


def test_the_real_detectors_run_on_any_picture(core: Core, tmp_path: Path) -> None:
    """Networks of noise find noise; what counts is that the way through them holds."""
    source, audio = make_source(tmp_path / "source.mp4", 4), make_audio(tmp_path / "a.wav", 0.2)
    try:
        rendered = render(core, source, audio, tmp_path / "out.mp4", face_box=None)
    except NoFaceError:
        assert not (tmp_path / "out.mp4").exists()
    else:
        assert rendered.summary.n_frames == 5


def test_cancelling_stops_between_batches_and_leaves_nothing(core: Core, tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 30), make_audio(tmp_path / "a.wav", 4.0)
    seen: list[int] = []
    threads = threading.active_count()

    def progress(stage: Stage, done: int, total: int) -> None:
        if stage == "inference":
            seen.append(done)
            core.stop_running("cancelled")

    with pytest.raises(JobCancelledError):
        core.render(
            source,
            audio,
            tmp_path / "out.mp4",
            JobParams(face_box=FACE),
            on_progress=progress,
        )
    assert seen == [8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "source.mp4"]
    assert threading.active_count() == threads
    assert core.readiness.state == "ready"


def test_progress_never_goes_back_and_ends_at_all_frames(core: Core, tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 30), make_audio(tmp_path / "a.wav", 0.9)
    seen: list[tuple[Stage, int, int]] = []
    core.render(
        source,
        audio,
        tmp_path / "out.mp4",
        JobParams(face_box=FACE),
        on_progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    stages = [stage for stage, _, _ in seen]
    assert list(dict.fromkeys(stages)) == ["validation", "preprocessing", "inference", "postprocessing"]
    done = [number for stage, number, _ in seen if stage == "inference"]
    assert done == sorted(done)
    assert done[-1] == 23


@pytest.mark.parametrize(
    ("aspect_ratio", "resolution", "size"),
    [(None, "128p", (128, 170)), ("1:1", None, (192, 192)), ("1:1", "256x256", (256, 256)), ("9:16", None, (144, 256))],
)
def test_shape_and_size_of_the_output_can_be_chosen(
    core: Core, tmp_path: Path, aspect_ratio: str | None, resolution: str | None, size: tuple[int, int]
) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 4), make_audio(tmp_path / "a.wav", 0.16)
    rendered = render(core, source, audio, tmp_path / "out.mp4", aspect_ratio=aspect_ratio, resolution=resolution)
    assert (rendered.summary.width, rendered.summary.height) == size
    info = media.inspect_source(tmp_path / "out.mp4", LIMITS)
    assert (info.width, info.height) == size


def test_a_shift_that_has_no_effect_is_refused(core: Core, tmp_path: Path) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 4), make_audio(tmp_path / "a.wav", 0.2)
    with pytest.raises(RequestError, match="bbox_shift"):
        render(core, source, audio, tmp_path / "out.mp4", bbox_shift=3)


@pytest.mark.parametrize("box", [(0, 0, 15, 100), (500, 500, 600, 600), (-50, -50, 10, 10)])
def test_a_face_box_outside_the_picture_is_refused(core: Core, tmp_path: Path, box: tuple[int, int, int, int]) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 4), make_audio(tmp_path / "a.wav", 0.2)
    with pytest.raises(RequestError, match="face_box") as caught:
        render(core, source, audio, tmp_path / "out.mp4", face_box=box)
    assert caught.value.stage == "validation"


@pytest.mark.parametrize("box", [(0, 0, 192, 256), (0, 200, 60, 256), (150, 0, 192, 80), (-40, 60, 90, 300)])
def test_a_face_at_the_edge_of_the_picture_is_rendered(
    core: Core, tmp_path: Path, box: tuple[int, int, int, int]
) -> None:
    source, audio = make_source(tmp_path / "source.mp4", 3), make_audio(tmp_path / "a.wav", 0.12)
    assert render(core, source, audio, tmp_path / "out.mp4", face_box=box).summary.n_frames == 3


def test_version_one_runs_with_its_own_defaults(tmp_path: Path) -> None:
    from tests.support.tiny_models import write_tiny_models
    from worker.config import load_settings

    models_dir = write_tiny_models(tmp_path / "models", "v1", as_safetensors=True)
    environment = {"MUSETALK_MODELS_DIR": str(models_dir), "MUSETALK_DEVICE": "cpu", "MUSETALK_CPU_THREADS": "1"}
    settings = load_settings(environment, env_file=None)
    core = Core(settings)
    core.load()
    source, audio = make_source(tmp_path / "source.mp4", 3), make_audio(tmp_path / "a.wav", 0.12)
    rendered = render(core, source, audio, tmp_path / "out.mp4", face_box=FACE, bbox_shift=5)
    assert rendered.summary.model == "v1"


def test_a_real_clip(core: Core, tmp_path: Path, real_clip: tuple[Path, Path]) -> None:
    source, audio = real_clip
    box = (195, 330, 480, 645)
    rendered = render(core, source, audio, tmp_path / "out.mp4", face_box=box)
    assert rendered.summary.n_frames == 200
    picture_s, sound_s = durations_of(tmp_path / "out.mp4")
    assert abs(picture_s - 8) <= Fraction(1, 25)
    assert abs(sound_s - 8) <= Fraction(1, 25)
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert tuple(int(tag) for tag in tags) == (1, 1, 1, 1)
    before = [f.planes for f in media.read_source(source, media.inspect_source(source, LIMITS), LIMITS, max_frames=200)]
    after = frames_of(tmp_path / "out.mp4", Fraction(25))
    assert untouched_psnr(before, after, Box(box[0], box[1], box[2], box[3] + 10)) >= 47
    data = (tmp_path / "out.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
