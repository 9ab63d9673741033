"""Chunks between card and encoder: the thread that launches is not held up by either."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from musetalk.frames import Planes
from musetalk.generator import Generator
from musetalk.mesh_faces import JawParser
from musetalk.models import Models
from musetalk.options import RenderOptions
from musetalk.render import RenderSession
from tests.support.rendering import FACE, make_audio, make_source
from tests.support.small_generators import CPU, CROP_PX, small_generator

BATCH, N_CHUNKS, LIMIT_S = 4, 8, 20.0


class Slow:
    """Patches that are never there before somebody waits for them."""

    is_here = False

    def __init__(self, counter: Counter, n_frames: int) -> None:
        self._counter, self._n_frames = counter, n_frames

    def result(self) -> NDArray[np.uint8]:
        self._counter.under_way -= 1
        return np.zeros((self._n_frames, CROP_PX, CROP_PX, 3), np.uint8)


class Counter:
    """Counts chunks; `reached` is set when `wanted` of them have been launched."""

    def __init__(self, wanted: int) -> None:
        self.launched = self.under_way = self.most_under_way = 0
        self.wanted, self.reached = wanted, threading.Event()

    def launch(self, latents: Tensor, _windows: Tensor, _finish: Any = None) -> Slow:
        self.launched += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        if self.launched >= self.wanted:
            self.reached.set()
        return Slow(self, len(latents))


class Hearing:
    """Features without a network."""

    def features(self, waveform: NDArray[np.float32]) -> Tensor:
        return torch.zeros(len(waveform) // 320, 5, 8)


@pytest.fixture
def session(tmp_path: Path) -> RenderSession:
    source = make_source(tmp_path / "source.mp4", 8)
    audio = make_audio(tmp_path / "speech.wav", BATCH * N_CHUNKS / 25)
    hearing: Any = Hearing()
    faces: Any = None
    models = Models("v15", CPU, torch.float32, hearing, small_generator(), faces, JawParser())
    options = RenderOptions(face_box=FACE, batch_size=BATCH, overlap=True)
    return RenderSession(models, source, audio, tmp_path / "out.mp4", options)


def test_a_slow_encoder_does_not_keep_the_card_from_its_next_chunks(
    session: RenderSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(wanted=4)
    monkeypatch.setattr(Generator, "start", lambda _self, *args: counter.launch(*args))
    usual = RenderSession._picture
    arrived: list[bool] = []

    def paste(self: RenderSession, item: Any) -> Planes:
        if not arrived:
            # The encoder takes its first frame, and no more until four chunks have been launched.
            arrived.append(counter.reached.wait(LIMIT_S))
        return usual(self, item)

    monkeypatch.setattr(RenderSession, "_picture", paste)
    with session:
        session.probe()
        session.prepare()
        session.generate()
        assert session.finish().n_frames == BATCH * N_CHUNKS
    assert arrived == [True]


def test_two_chunks_wait_on_the_card_while_the_next_is_launched(
    session: RenderSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(wanted=1)
    monkeypatch.setattr(Generator, "start", lambda _self, *args: counter.launch(*args))
    with session:
        session.probe()
        session.prepare()
        session.generate()
        session.finish()
    assert counter.launched == N_CHUNKS
    assert counter.most_under_way == 3
    assert counter.under_way == 0
