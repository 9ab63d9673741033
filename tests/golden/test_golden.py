"""Every golden vector in GOLDEN_DIR through our code, by the family in its file name.

    GOLDEN_DIR=<dir> python -m pytest tests/golden [--runslow]

The default directory may be absent (a checkout alone): then one test is skipped and says so. A directory that was given
must hold vectors, and every file must belong to a known family.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.golden import families

ROOT = Path(__file__).resolve().parents[2]
GIVEN = os.environ.get("GOLDEN_DIR")
DIRECTORY = Path(GIVEN) if GIVEN else ROOT.parent / "shared" / "golden"
FILES = sorted(DIRECTORY.glob("*.npz"))


def _cases() -> list[object]:
    cases: list[object] = []
    for path in FILES:
        family = families.family_of(path.name)
        marks = [pytest.mark.slow] if family is not None and family.is_slow(path.name) else []
        cases.append(pytest.param(path, id=path.stem, marks=marks))
    return cases


def test_the_directory_holds_vectors() -> None:
    if not FILES and not GIVEN:
        pytest.skip("no golden vectors beside this checkout; set GOLDEN_DIR to run them")
    assert FILES, f"no .npz file in GOLDEN_DIR={GIVEN}"


@pytest.mark.parametrize("path", _cases())
def test_golden(path: Path) -> None:
    family = families.family_of(path.name)
    assert family is not None, f"{path.name} belongs to no known family: {', '.join(families.prefixes())}"
    family.check(path)
