"""Log lines and the stage clock."""

from __future__ import annotations

import io
import json
import logging
import threading

import pytest

from musetalk.errors import JobCancelledError, MediaError, ShutdownError
from worker.jobs import STAGES
from worker.telemetry import JsonFormatter, Metrics, StageClock, configure_logging, job_logging, redact_values


def refuse(name: str) -> object:
    raise AssertionError(f"{name} is not JSON")


def formatted(message: str, *arguments: object, **extra: object) -> dict[str, object]:
    record = logging.LogRecord("musetalk", logging.WARNING, __file__, 1, message, arguments, None)
    vars(record).update(extra)
    line = JsonFormatter().format(record)
    assert line.splitlines() == [line]
    assert line.encode("ascii")
    entry = json.loads(line, parse_constant=refuse)
    assert isinstance(entry, dict)
    return entry


def test_a_record_is_one_line_of_json_with_the_job() -> None:
    with job_logging("job-1"):
        entry = formatted("job_done", stage="upload", odd={1, 2})
    assert entry["severity"] == "warning"
    assert entry["job_id"] == "job-1"
    assert entry["stage"] == "upload"
    assert "job_id" not in formatted("outside")


def test_the_colours_of_a_terminal_are_left_out() -> None:
    assert formatted("\x1b[31m\x1b[1m%s\x1b[0m 422", "POST /generate")["message"] == "POST /generate 422"


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


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


HOSTILE = [
    'https://host.example/a?x="b"',
    "https://host.example/a?x='b'&c=\\",
    '"\\"\\\\',
    "line\nbreak\r\u2028\x85\x00",
    "half a pair \ud800",
    "Zürich 日本",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_line_is_one_json_object_whatever_a_job_is_called(text: str) -> None:
    """A job id like an address with quotes: the query was cut out of the finished line, with its closing quote."""
    with job_logging(text):
        entry = formatted(text, reason=text, more={text: [text, (text,)]}, error=ValueError(text))
    assert isinstance(entry["job_id"], str)
    assert set(entry) >= {"time", "severity", "message", "reason", "more", "error"}


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), b"\xff", {1, 2}, {(1, 2): {3: object()}}, Unprintable(), 10**400]
)
def test_every_value_can_be_logged(value: object) -> None:
    formatted("event", value=value, inside=[value])


def test_a_text_and_arguments_that_do_not_fit_are_logged_all_the_same() -> None:
    assert formatted("%d of %d", "three")["message"] == "%d of %d"


def test_a_value_that_contains_itself_is_logged() -> None:
    endless: dict[str, object] = {}
    endless["again"] = endless
    formatted("event", value=endless)


@pytest.mark.parametrize(
    "secret", ['quote"inside', "back\\slash", "tab\there", "ümlaut-key", "https://user.example/path?signed"]
)
def test_a_secret_that_json_would_escape_is_redacted(secret: str) -> None:
    redact_values([secret])
    entry = formatted(f"key {secret}.", value=secret, deep={"list": [f"x{secret}x"], secret: 1})
    assert secret not in str(entry)
    assert json.dumps(secret)[1:-1] not in json.dumps(entry)


@pytest.mark.parametrize(
    "text",
    [
        'https://host.example/a?X-Signature=hidden"part"hidden',
        "Authorization: Bearer hidden-1 was refused",
        "bad request: token=hidden",
        "{'authorizationToken': 'hidden words of it'}",
        'api_key = "hidden words"',  # pragma: allowlist secret
    ],
)
def test_a_value_that_its_name_calls_a_secret_is_redacted(text: str) -> None:
    assert "hidden" not in str(formatted(text, reason=text))


def test_an_error_that_ends_a_thread_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("first line\nsecond line")

    hook, handlers = threading.excepthook, logging.getLogger().handlers[:]
    threading.excepthook = threading.__excepthook__
    stream = io.StringIO()
    try:
        configure_logging("info", stream)
        thread = threading.Thread(target=fail, name="worn-out")
        thread.start()
        thread.join()
    finally:
        threading.excepthook = hook
        logging.getLogger().handlers[:] = handlers
        logging.captureWarnings(False)
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["thread_name"] == "worn-out"
    assert capsys.readouterr().err == ""


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
