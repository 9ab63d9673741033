"""Log lines and the stage clock."""

from __future__ import annotations

import json
import logging

import pytest

from musetalk.errors import JobCancelledError, MediaError, ShutdownError
from worker.jobs import STAGES
from worker.telemetry import JsonFormatter, Metrics, StageClock, job_logging, redact_values


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


def test_a_logged_exception_has_places_but_no_folders() -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError as error:
        record = logging.LogRecord(
            "musetalk", logging.ERROR, __file__, 1, "x", None, (type(error), error, error.__traceback__)
        )
    text = json.loads(JsonFormatter().format(record))["exception"]
    assert text.startswith("RuntimeError: broken (test_telemetry.py:")
    assert "/" not in text


def test_signatures_users_and_secrets_are_never_logged() -> None:
    redact_values(["very-secret-key", None, ""])
    entry = formatted(
        "fetching https://user:word@host.example/a/b.mp4?X-Signature=abc&x=1#part failed",  # pragma: allowlist secret
        url="https://host.example/c?token=abc",
        header="X-Internal-API-Key: very-secret-key",
    )
    text = json.dumps(entry)
    for hidden in ("abc", "word", "very-secret-key", "X-Signature"):
        assert hidden not in text
    assert "https://host.example/a/b.mp4?..." in text


def test_metrics_count_ends_by_result_and_stage() -> None:
    metrics = Metrics()
    clock = StageClock()
    with clock.stage("inference"):
        pass
    metrics.count_job(clock, None, 25)
    failed = MediaError("broken")
    failed.stage = "download"
    metrics.count_job(clock, failed)
    metrics.count_job(clock, JobCancelledError("the job was cancelled"))
    metrics.count_job(clock, ShutdownError("the worker ends"))
    metrics.count_rejection()
    metrics.set_build_info(version="1", model="v15", device="cpu", torch="2")
    metrics.register_gauge("musetalk_heartbeat_age_seconds", "Age.", lambda: 3.5)
    metrics.register_gpu_memory(lambda: {"used": 5.0})
    text = metrics.text().decode()
    for line in (
        'musetalk_jobs_total{result="succeeded"} 1.0',
        'musetalk_jobs_total{result="failed"} 1.0',
        'musetalk_jobs_total{result="cancelled"} 1.0',
        'musetalk_jobs_total{result="handed_back"} 1.0',
        'musetalk_jobs_total{result="rejected"} 1.0',
        'musetalk_job_errors_total{error_type="media_error",stage="download"} 1.0',
        "musetalk_frames_total 25.0",
        "musetalk_heartbeat_age_seconds 3.5",
        'musetalk_gpu_memory_bytes{kind="used"} 5.0',
        'musetalk_build_info{device="cpu",model="v15",torch="2",version="1"} 1.0',
        'musetalk_stage_duration_seconds_count{stage="inference"} 4.0',
    ):
        assert line in text.splitlines(), line
    assert "process_resident_memory_bytes" in text


def test_cancelled_and_handed_back_jobs_are_nobodys_error() -> None:
    metrics = Metrics()
    before = [line for line in metrics.text().decode().splitlines() if "musetalk_job_errors_total" in line]
    # Every kind and stage is there from the start, or no rule sees the first failure.
    assert len(before) > 3 * len(STAGES)
    for error in (JobCancelledError("not wanted"), ShutdownError("the worker ends")):
        error.stage = "inference"
        metrics.count_job(StageClock(), error)
    assert [line for line in metrics.text().decode().splitlines() if "musetalk_job_errors_total" in line] == before
