"""Whole videos, MP4 to MP4, with networks of official size on the pretended card."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from musetalk.acceleration import accelerator
from musetalk.avatars import AvatarCache
from musetalk.frames import Planes
from musetalk.geometry import Box
from musetalk.models import Models
from musetalk.options import version_defaults
from musetalk.render import RenderSession, RenderSummary
from musetalk.restoration import Restorer
from tests.support.pretended_card import Card, Wait
from tests.support.pretended_models import KnownFaces, Networks, build_networks
from tests.support.rendering import SOUND, make_source, write_speech

SIZE = (640, 360)
FACE = Box(230, 80, 410, 290)
BATCH = 8
N_FRAMES = 38


@dataclass
class Seen:
    """What happened in one session."""

    waits_in_launches: list[Wait] = field(default_factory=list)
    # By who pasted the frames: the device or the CPU.
    pasted: Counter[str] = field(default_factory=Counter)
    streams: list[Any] = field(default_factory=list)
    encoded_on: set[Any] = field(default_factory=set)
    bytes_up: int = 0
    bytes_down: int = 0


@pytest.fixture(scope="module")
def networks(card: Card) -> Networks:
    return build_networks()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pretended")
    return make_source(folder / "source.mp4", 20, size=SIZE), write_speech(folder / "speech.wav", SOUND)


@pytest.fixture
def seen(card: Card, monkeypatch: pytest.MonkeyPatch) -> Seen:
    noted = Seen()
    launch, paste = RenderSession._launch, RenderSession._picture

    def watched_launch(self: RenderSession, *args: Any) -> Any:
        with card.waits_of(noted.waits_in_launches):
            return launch(self, *args)

    def watched_paste(self: RenderSession, item: Any) -> Planes:
        noted.pasted["device" if item[2] else "cpu" if item[1] is not None else "nobody"] += 1
        return paste(self, item)

    monkeypatch.setattr(RenderSession, "_launch", watched_launch)
    monkeypatch.setattr(RenderSession, "_picture", watched_paste)
    return noted


def run(
    models: Models, files: tuple[Path, Path], output: Path, seen: Seen, card: Card, cache: AvatarCache, **options: Any
) -> RenderSummary:
    chosen = replace(version_defaults(models.version), batch_size=BATCH, device_pixels=True, overlap=True, **options)
    encode = models.generator.encode

    def watched_encode(crops: Any) -> Any:
        seen.encoded_on.add(card.stream)
        return encode(crops)

    models.generator.encode = watched_encode  # type: ignore[method-assign]
    with RenderSession(models, *files, output, chosen, avatars=cache) as session:
        session.probe()
        session.prepare()
        seen.streams.append(session._preparer._stream)
        up, down = card.bytes_up, card.bytes_down
        session.generate()
        seen.bytes_up, seen.bytes_down = card.bytes_up - up, card.bytes_down - down
        models.generator.encode = encode  # type: ignore[method-assign]
        return session.finish()


def doubled(pictures: torch.Tensor) -> torch.Tensor:
    """A restorer's network: pictures (n, 3, h, w) at twice the size."""
    return functional.interpolate(pictures, scale_factor=2)


@pytest.mark.parametrize(
    ("version", "dtype", "is_captured", "silence", "finer"),
    [
        ("v15", torch.float16, True, "closed", False),
        ("v1", torch.bfloat16, True, "source", False),
        ("v15", torch.float32, False, "generate", True),
    ],
    ids=["v15 float16 graphs", "v1 bfloat16 graphs", "v15 float32 plain, restored, with detail"],
)
def test_a_whole_video_on_the_card(
    version: Any,
    dtype: torch.dtype,
    is_captured: bool,
    silence: Any,
    finer: bool,
    networks: Networks,
    files: tuple[Path, Path],
    seen: Seen,
    card: Card,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = networks.models(dtype, version)
    models = replace(models, faces=KnownFaces(models.faces, FACE))
    options: dict[str, Any] = {"silence": silence}
    if finer:
        models = replace(models, restorer=Restorer("doubling", doubled, lambda side: side, models.device))
        options |= {"detail": 1.0, "restore": 1.0}
    if is_captured:
        monkeypatch.setattr("musetalk.acceleration._WARM_UP_ROUNDS", 1)
        latents = torch.zeros(BATCH, *models.generator.latent_shape, dtype=dtype, device=models.device)
        windows = torch.zeros(BATCH, 50, 384, dtype=dtype, device=models.device)
        models.generator.fixed_batch = BATCH
        models.generator.accelerate(accelerator("graphs", latents, windows))
    cache = AvatarCache(None, memory_bytes=2**30, disk_bytes=0)
    new = run(models, files, tmp_path / "new.mp4", seen, card, cache, **options)
    assert new.n_frames == N_FRAMES
    assert seen.waits_in_launches == [], "the host waited for the card inside a launch"
    assert seen.pasted["cpu"] == 0, "frames were pasted on the CPU"
    assert seen.pasted["device"] >= 20
    assert seen.encoded_on == {seen.streams[0]}
    assert card.default_stream not in seen.encoded_on

    if not is_captured:
        return
    # The same source again: everything is prepared, and little crosses the bus.
    seen.encoded_on.clear()
    prepared = run(models, files, tmp_path / "prepared.mp4", seen, card, cache, **options)
    assert prepared.n_reused == 20
    assert seen.encoded_on == set()
    assert seen.streams[0] is seen.streams[1], "every job would keep memory on a stream of its own"
    assert seen.waits_in_launches == []
    region = FACE.width * FACE.height * 3 / 2
    n_drawn = seen.pasted["device"] / 2
    # Down: the region. Up: the region and the weights of the mask, latents, places and weights of the samples.
    assert seen.bytes_down / n_drawn <= region
    assert seen.bytes_up / n_drawn <= 2.5 * region + 60_000
