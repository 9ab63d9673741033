"""Log lines and the stage clock."""

from __future__ import annotations

import json
import logging

import pytest

from errors import MediaError
from telemetry import JsonFormatter, StageClock, job_logging


def formatted(message: str, **extra: object) -> dict[str, object]:
    record = logging.LogRecord("musetalk", logging.WARNING, __file__, 1, message, None, None)
    vars(record).update(extra)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert isinstance(entry, dict)
    return entry


def test_a_record_is_one_line_of_json_with_the_job() -> None:
    with job_logging("job-1"):
        entry = formatted("job_done", stage="upload", odd={1, 2})
    assert entry["severity"] == "warning"
    assert entry["job_id"] == "job-1"
    assert entry["stage"] == "upload"
    assert "job_id" not in formatted("outside")


def test_the_clock_adds_up_and_marks_the_first_stage_an_error_left() -> None:
    clock = StageClock()

    def fail() -> None:
        with clock.stage("preprocessing"), clock.stage("validation"):
            raise MediaError("broken")

    with pytest.raises(MediaError) as caught:
        fail()
    assert caught.value.stage == "validation"
    assert set(clock.seconds) == {"validation", "preprocessing"}
    before = clock.seconds["validation"]
    with clock.stage("validation"):
        pass
    assert clock.seconds["validation"] >= before
    assert clock.total_s >= clock.seconds["preprocessing"]


def test_an_unforeseen_error_says_where_it_happened() -> None:
    clock = StageClock()

    def fail() -> None:
        with clock.stage("upload"):
            raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        fail()
    assert caught.value.stage == "upload"  # type: ignore[attr-defined]


def test_an_exception_is_told_with_places_but_without_folders() -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError as error:
        record = logging.LogRecord(
            "musetalk", logging.ERROR, __file__, 1, "x", None, (type(error), error, error.__traceback__)
        )
    text = json.loads(JsonFormatter().format(record))["exception"]
    assert text.startswith("RuntimeError: broken (test_telemetry.py:")
    assert "/" not in text
