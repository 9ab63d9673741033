"""Options and guards shared by all tests."""

from __future__ import annotations

import gc
import os

# Two threads at most, before torch is imported: small tensors on a busy machine spin with more.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
_UNTRACED = ("e2e", "golden", "gpu", "unit/test_claim_simulation.py", "unit/test_benchmarks.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", default=False, help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.timeout(3 * 3600))
        # Most of their code runs in other processes, or a million times: tracing them would only cost time.
        if any(item.path.is_relative_to(TESTS / name) for name in _UNTRACED):
            item.add_marker(pytest.mark.no_cover)
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow; run with --runslow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _everything_collected() -> Iterator[None]:
    """A worker that loads models in a test exempts all objects from collection; afterwards none is exempt."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _environment_restored() -> Iterator[None]:
    """A test that changes the environment without monkeypatch fails here instead of in its neighbour."""
    before = _environment()
    yield
    after = _environment()
    for name in after.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    assert after == before, "the test left the environment changed"


# Written by libraries when they are first imported.
_OF_LIBRARIES = ("PYTEST_CURRENT_TEST", "TORCH", "TRITON", "KMP_", "PYTORCH", "LD_LIBRARY_PATH", "QT_")


def _environment() -> dict[str, str]:
    """The environment without what pytest and imported libraries keep in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_LIBRARIES)}
