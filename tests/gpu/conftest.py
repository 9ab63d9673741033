"""One pretended card for the tests of a file; without a C++ compiler they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.pretended_card import Card, missing_compiler, pretended_card


@pytest.fixture(scope="module")
def card() -> Iterator[Card]:
    if (reason := missing_compiler()) is not None:
        pytest.skip(reason)
    with pretended_card() as made:
        yield made
