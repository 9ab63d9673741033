"""Rendering in tests: small clips in, files read back, face finders that know their answer, cores that count."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from musetalk import media
from musetalk.faces import Face
from musetalk.frames import Planes
from musetalk.geometry import Box
from musetalk.models import Models
from musetalk.options import RenderOptions
from musetalk.render import RenderSession
from musetalk_core import Core
from tests.support import clips
from worker.config import load_settings
from worker.engine import Engine, Rendered, engine_around
from worker.jobs import JobParams

SIZE = (192, 256)
FACE = (50, 100, 142, 216)
LIMITS = media.MediaLimits()
# Speech, a pause of 0.7 s, and speech again.
SOUND_RATE = 16_000
SOUND = np.concatenate(
    [clips.tone(0.5, SOUND_RATE), np.zeros(SOUND_RATE * 7 // 10, np.float32), clips.tone(0.3, SOUND_RATE)]
)


def make_source(path: Path, n_frames: int, rate: Fraction = Fraction(25), **options: Any) -> Path:
    return clips.write_clip(path, n_frames, size=options.pop("size", SIZE), rate=rate, **options)


def make_audio(path: Path, seconds: float, rate: int = 16_000) -> Path:
    sound = clips.Sound(clips.tone(seconds, rate), rate=rate, codec="pcm_s16le", sample_format="s16")
    return clips.write_sound(path, sound)


def write_speech(path: Path, samples: NDArray[np.float32]) -> Path:
    return clips.write_sound(path, clips.Sound(samples, rate=SOUND_RATE, codec="pcm_s16le", sample_format="s16"))


def render(core: Core, source: Path, audio: Path, output: Path, **params: Any) -> Rendered:
    aspect_ratio, resolution = params.pop("aspect_ratio", None), params.pop("resolution", None)
    given = JobParams(**{"face_box": FACE, **params})
    return core.render(source, audio, output, given, aspect_ratio=aspect_ratio, resolution=resolution)


def frames_of(path: Path, rate: Fraction | None = None) -> list[Planes]:
    info = media.inspect_source(path, LIMITS)
    if rate is not None:
        assert info.rate == rate
    return [frame.planes for frame in media.read_source(path, info, LIMITS)]


def pictures_of(models: Models, source: Path, audio: Path, output: Path, **options: Any) -> list[Planes]:
    """The pictures of a video before they are encoded, with the face at FACE."""
    seen: list[Planes] = []
    fit = media.fit_planes

    def remember(planes: Planes, *args: Any) -> Planes:
        seen.append(planes.copy())
        return fit(planes, *args)

    chosen = RenderOptions(**{"face_box": FACE, "batch_size": 4, **options})
    with (
        mock.patch.object(media, "fit_planes", remember),
        RenderSession(models, source, audio, output, chosen) as session,
    ):
        session.probe()
        session.prepare()
        session.generate()
        session.finish()
    return seen


def durations_of(path: Path) -> tuple[Fraction, Fraction]:
    """Length of the picture (last time stamp plus one frame) and of the sound, in seconds, by counting packets."""
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        times = sorted(p.pts * p.time_base for p in container.demux(video) if p.pts is not None)
    assert times[0] == 0
    with av.open(str(path)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
        sound_s = Fraction(samples, container.streams.audio[0].rate)
    step = times[-1] / (len(times) - 1) if len(times) > 1 else Fraction(0)
    assert sound is not None
    return times[-1] + step, sound_s


class SomeFaces:
    """Finds the box in all frames but some, recognised by the number they show."""

    def __init__(self, without: Collection[int] = ()) -> None:
        self.without = without
        self.seen: list[int] = []

    def box(self, _number: int) -> Box:
        """Where the face is in the frame that shows this number."""
        return Box(*FACE)

    def find(self, frames: Sequence[Any], *, bbox_shift: int = 0) -> list[Face | None]:
        found: list[Face | None] = []
        for frame in frames:
            number = clips.read_number(frame.mean(axis=2))
            assert number is not None
            self.seen.append(number)
            found.append(None if number in self.without else Face(self.box(number), None, 1.0))
        return found


class MovingFaces(SomeFaces):
    """The box moves with the number a frame shows."""

    def box(self, number: int) -> Box:
        return super().box(number).shifted(number % 3, number % 2)


def with_faces(loaded: Engine, finder: SomeFaces) -> Engine:
    """`loaded` with another face finder."""
    return replace(loaded, models=replace(loaded.models, faces=finder))


class CountingWorker:
    """A core with its own avatars and the loaded networks of another, which counts their calls."""

    def __init__(self, loaded: Core, folder: Path, **variables: str) -> None:
        settings = {
            "MUSETALK_DEVICE": "cpu",
            "WORK_DIR": str(folder / "work"),
            "OUTPUT_DIR": str(folder / "outputs"),
            "AVATAR_DIR": str(folder / "avatars"),
            "BATCH_SIZE": "4",
        }
        self.core = Core(load_settings({**settings, **variables}, env_file=None))
        self.faces = MovingFaces()
        models = replace(loaded.engine.models, faces=self.faces)
        self.core.engine = engine_around(self.core.settings, models, self.core.settings.batch_size)
        self.n_encoded = 0

    def render(self, source: Path, audio: Path, output: Path, **params: Any) -> Rendered:
        """A job; the detector's and encoder's counts start again."""
        self.faces.seen.clear()
        self.n_encoded = 0
        generator = self.core.engine.models.generator
        encode = generator.encode

        def counting(crops: Any) -> Any:
            self.n_encoded += len(crops)
            return encode(crops)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generator, "encode", counting)
            rendered = render(self.core, source, audio, output, **{"face_box": None, **params})
        cache = self.core.engine.avatars
        if cache is not None:
            cache.flush()
        return rendered
