"""The orchestrator's client: replies read with care, progress throttled, the last update never dropped."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.errors import DownloadError, MediaError, ProcessingError
from tests.support.fake_orchestrator import Answer, Call, FakeOrchestrator, Times
from tests.support.server import wait_until
from worker.jobs import STAGES, error_body
from worker.orchestrator import (
    Orchestrator,
    OrchestratorSettings,
    Reply,
    claimed_job,
    failed_report,
    failed_update,
    is_reportable,
    stage_update,
)
from worker.progress_sender import ProgressSender, wait_for_last_reports


@pytest.fixture
def orchestrator() -> Iterator[FakeOrchestrator]:
    with FakeOrchestrator() as orchestrator:
        yield orchestrator


def client(url: str, **changes: Any) -> Orchestrator:
    values: dict[str, Any] = {
        "base_url": url,
        "buffer_base_url": url,
        "api_key": "the-key",  # pragma: allowlist secret
        "worker_id": "w/1",
        "gpu_class": "RTX",
    }
    return Orchestrator(OrchestratorSettings(**{**values, **changes}))


def test_the_key_is_shown_nowhere() -> None:
    assert "the-key" not in repr(client("http://127.0.0.1:1").settings)


def test_calls_reach_their_routes_with_the_key(orchestrator: FakeOrchestrator) -> None:
    caller = client(orchestrator.url)
    assert caller.heartbeat("idle", None).is_accepted
    assert caller.claim().body == {"job": None}
    assert caller.report("b 1/ü", {"status": "failed"}).is_accepted
    assert caller.progress("m?1#2", {"progress": 0.5}).is_accepted
    caller.close()
    seen = [(call.kind, call.id) for call in orchestrator.calls]
    assert seen == [("heartbeat", "w/1"), ("claim", ""), ("status", "b 1/ü"), ("progress", "m?1#2")]
    assert {call.key for call in orchestrator.calls} == {"the-key"}
    assert orchestrator.calls[3].body == {
        "progress": 0.5,
        "worker_id": "w/1",
        "config_label": "default",
        "batch_size": 8,
    }


def test_an_unreachable_orchestrator_gives_a_reply_and_no_exception() -> None:
    reply = client("http://127.0.0.1:1").claim()
    assert not reply.is_accepted
    assert "cannot be reached" in reply.describe()
    assert claimed_job(reply) == (None, reply.describe())


def test_a_redirect_is_not_followed(orchestrator: FakeOrchestrator) -> None:
    orchestrator.faults.append(Times("claim", 1, Answer(307, b"", (("Location", f"{orchestrator.url}/elsewhere"),))))
    caller = client(orchestrator.url)
    assert caller.claim().status == 307
    assert [call.kind for call in orchestrator.calls] == ["claim"]
    caller.close()


def test_an_endless_answer_is_cut(orchestrator: FakeOrchestrator) -> None:
    orchestrator.faults.append(Times("claim", 1, Answer(200, b" " * 3_000_000)))
    caller = client(orchestrator.url)
    assert caller.claim().problem == "the reply is too large"
    caller.close()


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
def test_a_reply_that_drips_in_is_cut_in_time_and_the_next_call_works(
    orchestrator: FakeOrchestrator, start: bytes
) -> None:
    """A byte now and then keeps every read alive, so the whole call needs a limit."""
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(start)
                while not stopped.wait(0.05):
                    connection.sendall(b"X")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        settings = OrchestratorSettings(url, url, "key", "w-1", "RTX", total_timeout_s=0.6)
        caller = Orchestrator(settings)
        begun = time.monotonic()
        reply = caller.claim()
        assert time.monotonic() - begun < 5
        assert reply.problem == "the reply took too long"
        # The connection is cut: the server notices.
        thread.join(10)
        assert not thread.is_alive()
        stopped.set()
        object.__setattr__(settings, "buffer_base_url", orchestrator.url)
        assert caller.claim().is_accepted
        caller.close()


def test_retry_after_is_read(orchestrator: FakeOrchestrator) -> None:
    orchestrator.faults += [
        Times("claim", 1, Answer(503, b"", (("Retry-After", "7"),))),
        Times("claim", 1, Answer(503, b"", (("Retry-After", "Mon, 01 Jan 2029 00:00:00 GMT"),))),
    ]
    caller = client(orchestrator.url)
    assert caller.claim().retry_after_s == 7
    assert caller.claim().retry_after_s is None
    caller.close()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(body=json_values | st.dictionaries(st.sampled_from(["job", "error"]), json_values), status=st.integers(200, 599))
def test_any_claim_is_a_job_or_a_problem_or_nothing(body: Any, status: int) -> None:
    job, problem = claimed_job(Reply(status, body=body))
    assert job is None or isinstance(job, dict)
    assert job is None or problem is None
    if status >= 300:
        assert problem is not None


def test_progress_rises_through_the_stages() -> None:
    updates = [
        stage_update(stage, done, 10) for stage in STAGES for done in ((0, 3, 10) if stage == "inference" else (0,))
    ]
    values = [update["progress"] for update in updates]
    assert values == sorted(values)  # type: ignore[type-var]
    assert all(0 <= value <= 1 for value in values)  # type: ignore[operator]
    assert updates[4]["metrics"] == {"frames_done": 3, "frames_total": 10}
    assert updates[4]["phase"] == "inferring"


def test_the_text_of_a_failure_names_type_and_stage() -> None:
    error = MediaError("no frame of the source shows a face")
    error.stage = "preprocessing"
    report = failed_report(error_body(error)[1])
    assert report["error"] == "media_error at preprocessing: no frame of the source shows a face"
    assert report["output_url"] is None
    assert failed_update(error_body(error)[1])["status"] == "failed"
    # Salad runs a retryable job again, so it is not finished.
    retryable = failed_update(error_body(ProcessingError("the GPU is gone"))[1])
    assert retryable["status"] == "running"
    assert "the GPU is gone" in str(retryable["error"])
    json.dumps(report, allow_nan=False)


def test_a_report_says_whether_a_later_retry_may_work() -> None:
    error = DownloadError("503 from media host", transient=True)
    error.stage = "download"
    assert failed_report(error_body(error)[1])["details"] == {"transient": True}


def test_only_the_newest_progress_is_sent(orchestrator: FakeOrchestrator) -> None:
    gate = threading.Event()

    def slow(call: Call) -> Answer | None:
        gate.wait(20)
        return None

    orchestrator.faults.append(slow)
    caller = client(orchestrator.url, read_timeout_s=30, total_timeout_s=30)
    sender = ProgressSender(caller, "job", interval_s=0.0)
    sender("download", 0, 1)
    orchestrator.wait_for(lambda: orchestrator.calls)
    for done in range(101):
        sender("inference", done, 100)
    gate.set()
    orchestrator.wait_for(lambda: len(orchestrator.calls) == 2)
    sender.close()
    caller.close()
    assert orchestrator.calls[1].body["metrics"] == {"frames_done": 100, "frames_total": 100}


def test_small_steps_are_not_sent_and_nothing_goes_back(orchestrator: FakeOrchestrator) -> None:
    caller = client(orchestrator.url)
    sender = ProgressSender(caller, "job", interval_s=0.0)
    for done in range(201):
        sender("inference", done, 200)
    sender("download", 0, 1)
    orchestrator.wait_for(lambda: orchestrator.calls and orchestrator.calls[-1].body["phase"] == "downloading")
    sender.close()
    caller.close()
    values = [call.body["progress"] for call in orchestrator.calls]
    assert values == sorted(values)
    inferring = [call.body["progress"] for call in orchestrator.calls if call.body["phase"] == "inferring"]
    assert all(b - a >= 0.049 for a, b in itertools.pairwise(inferring))


def test_the_last_update_is_retried_until_accepted_and_arrives_last(orchestrator: FakeOrchestrator) -> None:
    orchestrator.faults += [
        Times("progress", 1, Answer(503)),
        Times("progress", 1, Answer(None)),
    ]
    caller = client(orchestrator.url)
    sender = ProgressSender(caller, "job")
    assert sender.finish({"status": "succeeded", "progress": 1.0})
    caller.close()
    assert len(orchestrator.calls) == 3
    assert all(call.body["status"] == "succeeded" for call in orchestrator.calls)


def test_the_answer_waits_two_seconds_at_most_and_the_report_continues_behind_it(
    orchestrator: FakeOrchestrator,
) -> None:
    """With the orchestrator down a finished job's answer waited 17.5 s, with a silent one 26 s."""
    released = threading.Event()

    def fault(call: Call) -> Answer | None:
        released.wait(20)
        return Answer(503) if len(orchestrator.of("progress")) < 3 else None

    orchestrator.faults.append(fault)
    sender = ProgressSender(client(orchestrator.url), "job")
    begun = time.monotonic()
    assert not sender.finish({"status": "succeeded", "progress": 1.0})
    assert time.monotonic() - begun < 3
    released.set()
    assert wait_for_last_reports(20)
    assert [call.body["status"] for call in orchestrator.of("progress")] == ["succeeded"] * 3


def test_the_end_of_a_claimed_job_does_not_wait_for_a_silent_progress_call(orchestrator: FakeOrchestrator) -> None:
    released = threading.Event()
    orchestrator.faults.append(lambda call: Answer(None) if released.wait(20) else None)
    sender = ProgressSender(client(orchestrator.url), "job")
    sender("download", 0, 1)
    orchestrator.wait_for(lambda: orchestrator.calls)
    begun = time.monotonic()
    sender.close(0.2)
    assert time.monotonic() - begun < 2
    # The call is cut, so that it cannot arrive after the outcome.
    sender._thread.join(2)
    assert not sender._thread.is_alive()
    released.set()


def test_progress_continues_after_an_unforeseen_error(
    orchestrator: FakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[str] = []

    def on_error(part: str, error: BaseException) -> float:
        errors.append(f"{part}: {type(error).__name__}")
        monkeypatch.undo()
        return 0.0

    def fail(*_args: object) -> Reply:
        raise KeyError("odd")

    monkeypatch.setattr(Orchestrator, "progress", fail)
    sender = ProgressSender(client(orchestrator.url), "job", on_error=on_error)
    sender("download", 0, 1)
    wait_until(lambda: errors, 10)
    assert sender.finish({"status": "succeeded", "progress": 1.0})
    assert errors == ["progress-sender: KeyError"]


def test_neither_a_stored_login_nor_the_proxy_of_the_environment_is_used(
    orchestrator: FakeOrchestrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls sent a login from .netrc, and the key to a proxy."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret-of-netrc\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with FakeOrchestrator() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        caller = client(orchestrator.url)
        assert caller.claim().is_accepted
        caller.close()
        assert proxy.calls == []
        (call,) = orchestrator.calls
        assert call.headers.get("Authorization") is None
        through = client(orchestrator.url, proxy_url=proxy.url)
        assert through.claim().is_accepted
        through.close()
        assert len(proxy.calls) == 1
        assert len(orchestrator.calls) == 1


@pytest.mark.parametrize(
    ("identity", "expected"),
    [("b-1", True), ("a/b", True), ("..", False), (".", False), ("", False), ("\ud800", False), ("ü" * 2000, False)],
)
def test_only_ids_that_stay_on_their_route_are_reportable(identity: str, expected: bool) -> None:
    assert is_reportable(identity) is expected


def test_a_reply_that_is_too_large_is_no_answer_without_a_job(orchestrator: FakeOrchestrator) -> None:
    orchestrator.faults.append(Times("claim", 1, Answer(200, b'{"job": "' + b"x" * 3_000_000 + b'"}')))
    caller = client(orchestrator.url)
    assert claimed_job(caller.claim()) == (None, "the reply is too large")
    caller.close()
