"""Whole jobs over a modelled card: which share of the card's rate is left when everything around it is real.

    .venv/bin/python -m benchmarks.modelled_card [--frame-ms 2.75] [--launch-ms 0.5] [--encode-ms 2.475]
        [--batches 8,16,32] [--seconds 20] [--rounds 3] [--real-encoder] [--json FILE]

The card is a clock: a chunk takes `--frame-ms` for each frame, one chunk at a time, and launching one holds the thread
for `--launch-ms`. Decoder process, threads, queues, speech windows, records and writing regions into frames are the
worker's own; the encoder sleeps for `--encode-ms` a frame, as one on a chip of its own would, unless the real one is
asked for. The source is smaller than usual, so that two cores do not become the ceiling.

"now" has a known (prepared) source. "before" has it too, with the queues of earlier versions: four frames between
threads, one chunk ahead, and a wait in each launch. "new" has a source that nobody has seen: face search, encoding and
parsing take the card's time by their arithmetic (benchmarks.costs), and search and masks run in the worker's threads.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    arguments.modelled_card(__doc__)

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.material import make_audio, make_clip
from benchmarks.networks import build, median
from musetalk import media, preparing, render
from musetalk.avatars import AvatarCache
from musetalk.faces import Detection, Pose
from musetalk.frames import Picture
from musetalk.geometry import Box
from musetalk.masking import Masking
from musetalk.models import Models
from musetalk.options import RenderOptions
from musetalk.render import RenderSession

_SIZE, _FACE = (640, 360), Box(231, 81, 411, 291)
# Frames of the source that is known; it plays back and forth.
_N_SOURCE, _RATE = 40, 25
# GFLOP of a frame of 1080p (benchmarks/RESULTS.md): what is generated, and what a new source needs besides.
_GENERATE, _SEARCH, _ENCODE, _PARSE = 800.0, 46.4, 545.4, 26.8
_NEW = (_GENERATE + _SEARCH + _ENCODE + _PARSE) / _GENERATE
WAYS = ("before", "now", "new")


class ModelledCard:
    """A device that computes for known times, one thing after the other."""

    def __init__(self, frame_s: float, launch_s: float, *, waits: bool) -> None:
        """`waits`: each launch waits for the work before it, as with indices in pageable memory."""
        self.frame_s, self.launch_s, self.waits = frame_s, launch_s, waits
        self._lock = threading.Lock()
        self._free = 0.0
        # Chunks that were launched and not fetched, whenever one is launched.
        self.ahead: list[int] = []
        self.n_under_way = 0

    def launch(self, n_frames: int) -> float:
        """Launch a chunk; returns the time when it is computed."""
        if self.waits:
            self.sleep_until(self._free)
        started = time.perf_counter()
        time.sleep(self.launch_s)
        self.n_under_way += 1
        self.ahead.append(self.n_under_way)
        return self._computed(started, n_frames * self.frame_s)

    def compute(self, n_frames: int, gflop: float) -> None:
        """Compute something of a source for `n_frames` frames, and wait for it, behind what was launched before."""
        self.sleep_until(self._computed(time.perf_counter(), n_frames * self.frame_s * gflop / _GENERATE))

    def _computed(self, started: float, seconds: float) -> float:
        with self._lock:
            # Nothing is computed before it is launched whole.
            self._free = max(max(self._free, started) + seconds, time.perf_counter())
            return self._free

    @staticmethod
    def sleep_until(when: float) -> None:
        """Wait for a time of the card."""
        if (left := when - time.perf_counter()) > 0:
            time.sleep(left)


class ModelledPatches:
    """A chunk on the modelled card."""

    def __init__(self, card: ModelledCard, done: float, patches: NDArray[np.uint8]) -> None:
        self._card, self._done, self._patches = card, done, patches

    @property
    def is_here(self) -> bool:
        """Whether `result` need not wait."""
        return time.perf_counter() >= self._done

    def result(self) -> NDArray[np.uint8]:
        """The patches; waits for them."""
        self._card.sleep_until(self._done)
        self._card.n_under_way -= 1
        return self._patches


class ModelledGenerator:
    """Generator on a modelled card: real shapes, grey pictures."""

    def __init__(self, generator: Any, card: ModelledCard) -> None:
        self._generator, self.card = generator, card
        self.crop_px, self.device = generator.crop_px, generator.device
        self._finished: dict[int, NDArray[np.uint8]] = {}

    def encode(self, crops: Any) -> Tensor:
        """Zeros for latents."""
        self.card.compute(len(crops), _ENCODE)
        return torch.zeros(len(crops), *self._generator.latent_shape)

    def start(self, latents: Tensor, _windows: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> Any:
        """As `Generator.start`; what `finish` computes on the card is computed once for each size of chunk."""
        n_frames = len(latents)
        if n_frames not in self._finished:
            grey = torch.full((n_frames, self.crop_px, self.crop_px, 3), 127, dtype=torch.uint8)
            self._finished[n_frames] = (grey if finish is None else finish(grey)).numpy()
        return ModelledPatches(self.card, self.card.launch(n_frames), self._finished[n_frames])


class ModelledFaces:
    """A finder whose landmarks are known; they take the card's time."""

    def __init__(self, card: ModelledCard) -> None:
        self._card = card
        points = np.zeros((68, 2))
        points[:, 0], points[:, 1] = np.linspace(_FACE.x0, _FACE.x1 - 1, 68), _FACE.y1 - 1
        # The box reaches as far above the bridge of the nose as the chin is below it.
        points[29, 1] = (_FACE.y0 + _FACE.y1) // 2
        self._pose = Pose(points, 0.9)

    def detect(self, pictures: Sequence[Picture]) -> list[Detection | None]:
        """A face in each; the time of the few that are looked at is part of the landmarks'."""
        return [(_FACE, 0.9)] * len(pictures)

    def poses(self, pictures: Sequence[Picture]) -> list[Pose]:
        """The same in each picture."""
        self._card.compute(len(pictures), _SEARCH)
        return [self._pose] * len(pictures)

    def confirms(self, _picture: Picture, _pose: Pose) -> float:
        """Always."""
        return 0.9


class SleepingWriter:
    """Takes a known time for each frame without using a core."""

    frame_s = 0.0

    def __init__(self, _path: Path, **settings: Any) -> None:
        self._settings, self._n_frames, self._free = settings, 0, 0.0

    def __enter__(self) -> SleepingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, _planes: Any) -> None:
        """One frame."""
        # By the clock, like the card: that this thread wakes late does not slow down a chip.
        self._free = max(self._free, time.perf_counter()) + self.frame_s
        ModelledCard.sleep_until(self._free)
        self._n_frames += 1

    def close(self) -> Any:
        """What a finished file would say."""
        rate = self._settings["rate"]
        return SimpleNamespace(
            width=self._settings["width"],
            height=self._settings["height"],
            rate=rate,
            n_frames=self._n_frames,
            duration=self._n_frames / rate,
            n_bytes=0,
            codec="sleep",
        )


@dataclass(frozen=True)
class Share:
    """One way to run: medians over the rounds."""

    way: str
    batch: int
    card_fps: float
    job_fps: float
    most_ahead: int

    @property
    def share(self) -> float:
        """Of the card's own rate."""
        return self.job_fps / self.card_fps


@contextlib.contextmanager
def way(name: str, encode_s: float | None, card: ModelledCard) -> Iterator[None]:
    """The queues of one way, and no pixels made on the card; `encode_s` None: the real encoder."""
    labels = np.zeros((512, 512), np.uint8)
    labels[256:400, 156:356] = 1

    def parsed(_masking: Masking, frames: Sequence[Any], *_: Any) -> Iterator[NDArray[np.uint8]]:
        card.compute(len(frames), _PARSE)
        return iter([labels] * len(frames))

    def cut(frames: Sequence[Any], _boxes: Sequence[Box], size_px: int, *_: Any) -> Tensor:
        return torch.zeros(len(frames), size_px, size_px, 3, dtype=torch.uint8)

    with contextlib.ExitStack() as stack:
        if name == "new":
            stack.enter_context(mock.patch.object(Masking, "reads_planes", return_value=True))
            stack.enter_context(mock.patch.object(Masking, "labels", parsed))
            stack.enter_context(mock.patch.object(preparing, "crop_patches", cut))
        if name == "before":
            stack.enter_context(mock.patch.object(render, "queue_depth", return_value=4))
            stack.enter_context(mock.patch.object(render, "MAX_CHUNKS_AHEAD", 1))
        if encode_s is not None:
            stack.enter_context(mock.patch.object(media, "VideoWriter", SleepingWriter))
            stack.enter_context(mock.patch.object(SleepingWriter, "frame_s", encode_s))
        yield


def measure(models: Models, folder: Path, name: str, batch: int, given: Any, cache: AvatarCache) -> Share:
    """Jobs in one way; the first, which prepares a source that is to be known, does not count."""
    is_new = name == "new"
    source, speech = folder / ("new.mp4" if is_new else "source.mp4"), folder / "speech.wav"
    encode_s = None if given.real_encoder else given.encode_ms / 1000
    rates: list[float] = []
    ahead = 0
    for _ in range(given.rounds + 1):
        card = ModelledCard(given.frame_ms / 1000, given.launch_ms / 1000, waits=name == "before")
        modelled: Any = ModelledGenerator(models.generator, card)
        face_box = None if is_new else _FACE
        options = RenderOptions(face_box=face_box, batch_size=batch, device_pixels=True, overlap=True)
        faces: Any = ModelledFaces(card) if is_new else models.faces
        chosen = replace(models, generator=modelled, faces=faces)
        known = None if is_new else cache
        with (
            way(name, encode_s, card),
            RenderSession(chosen, source, speech, folder / "out.mp4", options, avatars=known) as session,
        ):
            session.probe()
            started = time.perf_counter()
            session.prepare()
            session.generate()
            summary = session.finish()
            rates.append(summary.n_frames / (time.perf_counter() - started))
        ahead = max(ahead, *card.ahead)
    return Share(name, batch, 1000 / (given.frame_ms * (_NEW if is_new else 1)), median(rates[1:]), ahead)


def main() -> None:
    """Measure and print."""
    given = arguments.modelled_card(__doc__)
    models = build("tiny", torch.device("cpu"), torch.float32)
    encoder = "x264" if given.real_encoder else f"{given.encode_ms} ms a frame"
    print(f"card {given.frame_ms} ms a frame, launch {given.launch_ms} ms a chunk, encoder {encoder}")
    shares = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, n_frames in (("source.mp4", _N_SOURCE), ("new.mp4", given.seconds * _RATE)):
            make_clip(folder / file, _SIZE, (_FACE.width, _FACE.height), n_frames)
        make_audio(folder / "speech.wav", Fraction(given.seconds))
        cache = AvatarCache(None, memory_bytes=2**30, disk_bytes=0)
        for batch in (int(part) for part in given.batches.split(",")):
            for one in WAYS:
                share = measure(models, folder, one, batch, given, cache)
                shares.append(share)
                print(
                    f"batch {batch:3d} {one:7s} {share.job_fps:6.1f} of {share.card_fps:6.1f} frames a second: "
                    f"{100 * share.share:5.1f} %, at most {share.most_ahead} chunks on the card"
                )
            print(f"batch {batch:3d} new against known: {shares[-1].job_fps / shares[-2].job_fps:.0%}")
    if given.json:
        rows = [{**asdict(share), "share": share.share} for share in shares]
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
