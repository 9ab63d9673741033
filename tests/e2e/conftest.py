"""Tiny models and clips, made once for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from musetalk_core import Core
from tests.support.outside import MEDIA_DIR
from tests.support.tiny_models import write_tiny_models
from worker.config import load_settings


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    """A worker that a test loads here chooses its threads for the whole process; its neighbours keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder in the official layout, with small networks."""
    return write_tiny_models(tmp_path_factory.mktemp("models"), crop_px=64)


@pytest.fixture(scope="session")
def core(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Core:
    """A loaded core on the CPU."""
    folder = tmp_path_factory.mktemp("core")
    settings = load_settings(
        {
            "MUSETALK_MODELS_DIR": str(tiny_models),
            "MUSETALK_DEVICE": "cpu",
            "MUSETALK_CPU_THREADS": "1",
            # In half precision a batch of one may differ from the same frame among others by more than rounding.
            "MUSETALK_DTYPE": "float32",
            "OUTPUT_DIR": str(folder / "outputs"),
            "WORK_DIR": str(folder / "work"),
            "BATCH_SIZE": "8",
            # What one test prepared must not serve another; tests/e2e/test_avatars.py switches it on.
            "AVATAR_MEMORY_MB": "0",
            "AVATAR_DISK_MB": "0",
        },
        env_file=None,
    )
    core = Core(settings)
    core.load()
    return core


@pytest.fixture
def real_clip() -> tuple[Path, Path]:
    """A real talking-head clip and a speech track, from MEDIA_DIR."""
    if MEDIA_DIR is None:
        pytest.skip("MEDIA_DIR is not set")
    return MEDIA_DIR / "yongen.mp4", MEDIA_DIR / "yongen.wav"
