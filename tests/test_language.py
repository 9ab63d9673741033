"""The word lint finds what it must find, and nothing else."""

from __future__ import annotations

import pytest

from tests.language import REFUSED, findings


@pytest.mark.parametrize(
    "text",
    [
        "the orchestrator is told",
        "def _told() -> None:",
        "it tells the caller",
        "Telling the log",
        "judged anew",
        "the fetch is gone on with",
        "a file is gone\n# on with at the next start",
        "plays it to and fro",
        "queries are blotted out",
        "jobs that are wanted no more",
        "a gauge read at each look",
        "the far side is down",
        "def far_side() -> None:",
        "def test_a_fetch_is_gone_on_with() -> None:",
        "a file that brings the decoder down",
    ],
)
def test_a_refused_phrase_is_found(text: str) -> None:
    assert list(findings(text))


@pytest.mark.parametrize(
    "text", ["retell", "intellect", "satellite", "manewver", "going on without", "sit down", "stored"]
)
def test_words_that_only_look_alike_pass(text: str) -> None:
    assert list(findings(text)) == []


def test_a_finding_names_its_line() -> None:
    assert list(findings("one\ntwo\nanew\n")) == [(3, "anew", REFUSED["anew"])]
