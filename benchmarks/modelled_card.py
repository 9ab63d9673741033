"""Whole jobs over a modelled card: which share of the card's rate is left when everything around it is real.

    .venv/bin/python -m benchmarks.modelled_card [--frame-ms 2.75] [--launch-ms 0.5] [--encode-ms 2.475]
        [--batches 8,16,32] [--seconds 20] [--rounds 3] [--real-encoder] [--json FILE]

The card is a clock: a chunk takes `--frame-ms` for each frame, one chunk at a time, and launching one holds the thread
for `--launch-ms`. Decoder process, threads, queues, speech windows, records and writing regions into frames are the
worker's own; the encoder sleeps for `--encode-ms` a frame, as one on a chip of its own would, unless the real one is
asked for. The source is known (prepared) and smaller than usual, so that two cores do not become the ceiling.

"before" has the queues of earlier versions: four frames between threads, one chunk ahead, and a wait in each launch.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    arguments.modelled_card(__doc__)

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
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
from musetalk import media, render
from musetalk.avatars import AvatarCache
from musetalk.geometry import Box
from musetalk.models import Models
from musetalk.options import RenderOptions
from musetalk.render import RenderSession

_SIZE, _FACE = (640, 360), Box(231, 81, 411, 291)
# Frames of the source; it plays back and forth.
_N_SOURCE = 40


class ModelledCard:
    """A device that computes for known times, one thing after the other."""

    def __init__(self, frame_s: float, launch_s: float, *, waits: bool) -> None:
        """`waits`: each launch waits for the work before it, as with indices in pageable memory."""
        self.frame_s, self.launch_s, self.waits = frame_s, launch_s, waits
        self._free = 0.0
        self.busy_s = 0.0
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
        self._free = max(self._free, started) + n_frames * self.frame_s
        # Nothing is computed before it is launched whole.
        self._free = max(self._free, time.perf_counter())
        self.busy_s += n_frames * self.frame_s
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
        """Zeros for latents: preparing is no part of the measurement."""
        return torch.zeros(len(crops), *self._generator.latent_shape)

    def start(self, latents: Tensor, _windows: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> Any:
        """As `Generator.start`; what `finish` computes on the card is computed once for each size of chunk."""
        n_frames = len(latents)
        if n_frames not in self._finished:
            grey = torch.full((n_frames, self.crop_px, self.crop_px, 3), 127, dtype=torch.uint8)
            self._finished[n_frames] = (grey if finish is None else finish(grey)).numpy()
        return ModelledPatches(self.card, self.card.launch(n_frames), self._finished[n_frames])


class SleepingWriter:
    """Takes a known time for each frame without using a core."""

    frame_s = 0.0

    def __init__(self, _path: Path, **settings: Any) -> None:
        self._settings, self._n_frames = settings, 0

    def __enter__(self) -> SleepingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, _planes: Any) -> None:
        """One frame."""
        time.sleep(self.frame_s)
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
def way(name: str, encode_s: float | None) -> Iterator[None]:
    """The queues of one way; `encode_s` None: the real encoder."""
    with contextlib.ExitStack() as stack:
        if name == "before":
            stack.enter_context(mock.patch.object(render, "queue_depth", return_value=4))
            stack.enter_context(mock.patch.object(render, "MAX_CHUNKS_AHEAD", 1))
        if encode_s is not None:
            stack.enter_context(mock.patch.object(media, "VideoWriter", SleepingWriter))
            stack.enter_context(mock.patch.object(SleepingWriter, "frame_s", encode_s))
        yield


def measure(models: Models, files: tuple[Path, Path], name: str, batch: int, given: Any, cache: AvatarCache) -> Share:
    """Jobs in one way; the first, which prepares the source, does not count."""
    encode_s = None if given.real_encoder else given.encode_ms / 1000
    rates: list[float] = []
    ahead = 0
    for _ in range(given.rounds + 1):
        card = ModelledCard(given.frame_ms / 1000, given.launch_ms / 1000, waits=name == "before")
        modelled: Any = ModelledGenerator(models.generator, card)
        options = RenderOptions(face_box=_FACE, batch_size=batch, device_pixels=True, overlap=True)
        chosen = replace(models, generator=modelled)
        with (
            way(name, encode_s),
            RenderSession(chosen, *files, files[0].with_name("out.mp4"), options, avatars=cache) as session,
        ):
            session.probe()
            session.prepare()
            started = time.perf_counter()
            session.generate()
            summary = session.finish()
            rates.append(summary.n_frames / (time.perf_counter() - started))
        ahead = max(ahead, *card.ahead)
    return Share(name, batch, 1000 / given.frame_ms, median(rates[1:]), ahead)


def main() -> None:
    """Measure and print."""
    given = arguments.modelled_card(__doc__)
    models = build("tiny", torch.device("cpu"), torch.float32)
    encoder = "x264" if given.real_encoder else f"{given.encode_ms} ms a frame"
    print(f"card {given.frame_ms} ms a frame, launch {given.launch_ms} ms a chunk, encoder {encoder}")
    shares = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = folder / "source.mp4", folder / "speech.wav"
        make_clip(files[0], _SIZE, (_FACE.width, _FACE.height), _N_SOURCE)
        make_audio(files[1], Fraction(given.seconds))
        cache = AvatarCache(None, memory_bytes=2**30, disk_bytes=0)
        for batch in (int(part) for part in given.batches.split(",")):
            for one in ("before", "now"):
                share = measure(models, files, one, batch, given, cache)
                shares.append(share)
                print(
                    f"batch {batch:3d} {one:7s} {share.job_fps:6.1f} of {share.card_fps:6.1f} frames a second: "
                    f"{100 * share.share:5.1f} %, at most {share.most_ahead} chunks on the card"
                )
    if given.json:
        rows = [{**asdict(share), "share": share.share} for share in shares]
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
