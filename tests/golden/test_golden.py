"""Every golden vector in GOLDEN_DIR through our code, by the family in its file name.

    GOLDEN_DIR=<dir> python -m pytest tests/golden [--runslow]

Without GOLDEN_DIR one test is skipped and says so. The directory must contain vectors, and every file must belong to a
known family.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import families
from tests.support.outside import GOLDEN_DIR

FILES = sorted(GOLDEN_DIR.glob("*.npz")) if GOLDEN_DIR else []


def _cases() -> list[object]:
    cases: list[object] = []
    for path in FILES:
        family = families.family_of(path.name)
        marks = [pytest.mark.slow] if family is not None and family.is_slow(path.name) else []
        cases.append(pytest.param(path, id=path.stem, marks=marks))
    return cases


def test_the_directory_contains_vectors() -> None:
    if GOLDEN_DIR is None:
        pytest.skip("GOLDEN_DIR is not set")
    assert FILES, f"no .npz file in {GOLDEN_DIR}"


@pytest.mark.parametrize("path", _cases())
def test_golden(path: Path) -> None:
    family = families.family_of(path.name)
    assert family is not None, f"{path.name} belongs to no known family: {', '.join(families.prefixes())}"
    family.check(path)
