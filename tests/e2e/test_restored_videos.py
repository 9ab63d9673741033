"""A whole video with a restorer: what it adds is inside the mask, by its strength; at strength 0 nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from musetalk.geometry import Box
from musetalk.restoration import Restorer
from musetalk_core import Core
from tests.support.rendering import FACE, make_audio, make_source, pictures_of

N_FRAMES = 10


def luma(core: Core, folder: Path, restore: float, detail: float = 0.0) -> NDArray[np.int16]:
    """All pictures (n, h, w) of a video whose restorer brightens by a fifth."""
    brighter = Restorer("brighter", lambda pictures: pictures + 0.2, lambda side: side, torch.device("cpu"))
    models = replace(core.engine.models, restorer=brighter)
    source, audio = folder / "source.mp4", folder / "a.wav"
    if not source.exists():
        make_source(source, N_FRAMES)
        make_audio(audio, N_FRAMES / 25)
    pictures = pictures_of(models, source, audio, folder / "out.mp4", restore=restore, detail=detail)
    return np.stack([planes.y for planes in pictures]).astype(np.int16)


@pytest.mark.parametrize("detail", [0.0, 1.0])
def test_what_a_restorer_adds_is_in_the_mask_alone_and_follows_its_strength(
    core: Core, tmp_path: Path, detail: float
) -> None:
    plain, half, whole = (luma(core, tmp_path, restore, detail) for restore in (0.0, 0.5, 1.0))
    assert len(plain) == N_FRAMES
    box = Box(*FACE)
    outside = np.ones(plain.shape[1:], bool)
    outside[box.y0 - 1 : box.y1 + 12, box.x0 - 1 : box.x1 + 1] = False
    assert np.array_equal(whole[:, outside], plain[:, outside])
    added, half_added = (np.mean([p.sum() for p in made - plain]) for made in (whole, half))
    assert added > 50_000
    assert half_added == pytest.approx(added / 2, rel=0.15)


def test_without_strength_a_worker_with_a_restorer_makes_the_video_of_one_without(core: Core, tmp_path: Path) -> None:
    with_restorer = luma(core, tmp_path, 0.0)
    without = pictures_of(
        core.engine.models, tmp_path / "source.mp4", tmp_path / "a.wav", tmp_path / "o.mp4", restore=0.0
    )
    assert np.array_equal(with_restorer, np.stack([planes.y for planes in without]))
