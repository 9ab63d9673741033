"""Buffer mode: the real server, a loopback orchestrator, real signals; nothing is lost or reported twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.buffer_mode import KEY, WORKER, claimed, prepare, start_worker
from tests.support.fake_orchestrator import Answer, Call, FakeOrchestrator, Times
from tests.support.rendering import make_audio
from tests.support.server import Server, wait_until

StartServer = Callable[..., Server]


@pytest.fixture
def orchestrator() -> Iterator[FakeOrchestrator]:
    with FakeOrchestrator() as orchestrator:
        yield orchestrator


@pytest.fixture
def start(tmp_path: Path, tiny_models: Path, orchestrator: FakeOrchestrator) -> Iterator[StartServer]:
    """Starts the worker in buffer mode, as often as a test needs it, always in the same folder."""
    servers: list[Server] = []
    prepare(tmp_path)

    def run(*, faulty: bool = False, **environment: str) -> Server:
        servers.append(start_worker(tmp_path, tiny_models, orchestrator, faulty=faulty, **environment))
        return servers[-1]

    yield run
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[tuple[Server, FakeOrchestrator]]:
    """A worker and its orchestrator for the tests that leave both as they were; each uses job numbers of its own."""
    folder = prepare(tmp_path_factory.mktemp("buffer"))
    with FakeOrchestrator() as orchestrator:
        server = start_worker(folder, tiny_models, orchestrator)
        try:
            yield server, orchestrator
        finally:
            server.stop()


def long_job(server: Server, number: int) -> dict[str, Any]:
    return claimed(server, number, audio_url=(server.folder / "media/long.wav").as_uri())


def wait_until_running(orchestrator: FakeOrchestrator, number: int) -> None:
    orchestrator.wait_for(
        lambda: any(call.body.get("phase") == "inferring" for call in orchestrator.of("progress", f"muse {number}"))
    )


Pair = tuple[Server, FakeOrchestrator]


def test_jobs_are_claimed_run_and_reported(pair: Pair) -> None:
    server, orchestrator = pair
    orchestrator.jobs.extend([claimed(server, 1, surplus=True), claimed(server, 2)])
    orchestrator.wait_for(lambda: len(orchestrator.of("status")) == 2)
    # Registered by a heartbeat before anything is claimed.
    assert orchestrator.calls[0].kind == "heartbeat"
    assert orchestrator.calls[0].body == {
        "status": "idle",
        "gpu_class": "RTX 3080 (10 GB)",
        "capacity": 1,
        "error": "the models are loading",
    }
    assert {call.id for call in orchestrator.of("heartbeat")} == {WORKER}
    assert all(call.key == KEY for call in orchestrator.calls)
    for number, call in enumerate(orchestrator.of("status"), 1):
        assert call.id == f"buffer/{number}"
        assert call.body["status"] == "succeeded"
        assert call.body["output_url"].endswith(".mp4")
        assert call.body["metrics"]["GENERATION_TIME_SEC"] > 0
        assert call.body["metrics"]["gpu_class"] == "RTX 3080 (10 GB)"
    # Heartbeats said busy while the job ran, and idle after it.
    orchestrator.wait_for(lambda: orchestrator.of("heartbeat")[-1].body["status"] == "idle")
    assert any(call.body["status"] == "busy" for call in orchestrator.of("heartbeat"))
    progress = [call.body["progress"] for call in orchestrator.of("progress", "muse 1")]
    assert progress == sorted(progress)
    assert all(0 <= value <= 1 for value in progress)
    assert not list((server.folder / "work" / "outbox").iterdir())


def test_a_job_that_cannot_be_run_fails_with_its_reason(pair: Pair) -> None:
    server, orchestrator = pair
    cases: list[tuple[dict[str, Any], str]] = [
        ({"video_url": None}, "media_error at validation: video_url"),
        ({"video_url": "ftp://host/a.mp4"}, "media_error at download"),
        ({"params": {"face_box": [1]}}, "media_error at validation: params.face_box"),
        ({"musetalk_job_id": ""}, "media_error at validation: musetalk_job_id"),
    ]
    for number, (fields, reason) in enumerate(cases, 10):
        orchestrator.jobs.append(claimed(server, number, **fields))
        orchestrator.wait_for(lambda number=number: orchestrator.of("status", f"buffer/{number}"))  # type: ignore[misc]
        (call,) = orchestrator.of("status", f"buffer/{number}")
        assert call.body["status"] == "failed"
        assert call.body["error"].startswith(reason)
        assert call.body["output_url"] is None
        assert call.body["retryable"] is False


def test_answers_that_make_no_sense_are_survived(pair: Pair) -> None:
    server, orchestrator = pair
    answers = [
        Answer(204, b""),
        Answer(200, b""),
        Answer(200, b"[]"),
        Answer(200, b'"text"'),
        Answer(200, b'{"job": "text"}'),
        Answer(200, b'{"job": null, "error": "database_unavailable"}'),
        Answer(200, b'{"job": {}}'),
        Answer(200, b"[" * 100_000),
        Answer(502, b"<html>bad gateway</html>"),
        Answer(None),
        Answer(307, b"", (("Location", "http://127.0.0.1:9/"),)),
    ]
    # One at a time, so that back-off does not add up.
    for number, answer in enumerate(answers, 20):
        fault = Times("claim", 1, answer)
        orchestrator.faults.append(fault)
        orchestrator.wait_for(lambda fault=fault: fault.left == 0, limit_s=90)  # type: ignore[misc]
        orchestrator.faults.clear()
        orchestrator.jobs.append(claimed(server, number, video_url="ftp://host/a.mp4"))
        orchestrator.wait_for(
            lambda number=number: orchestrator.of("status", f"buffer/{number}"),  # type: ignore[misc]
            limit_s=90,
        )
    assert server.health()[0] == 200


def test_the_outcome_is_retried_until_accepted(pair: Pair) -> None:
    server, orchestrator = pair
    orchestrator.faults += [
        Times("status", 1, Answer(503, b"busy")),
        Times("status", 1, Answer(None)),
        Times("status", 1, Answer(401)),
    ]
    orchestrator.jobs.append(claimed(server, 40))
    orchestrator.wait_for(lambda: len(orchestrator.of("status", "buffer/40")) == 4, limit_s=90)
    bodies = [call.body for call in orchestrator.of("status", "buffer/40")]
    assert all(body == bodies[0] for body in bodies)
    orchestrator.wait_for(lambda: not list((server.folder / "work" / "outbox").iterdir()))


def test_fields_that_are_not_understood_are_left_out(pair: Pair) -> None:
    server, orchestrator = pair
    orchestrator.faults.append(Times("status", 1, Answer(422, b'{"detail": []}')))
    orchestrator.jobs.append(claimed(server, 50, video_url="ftp://host/a.mp4"))
    orchestrator.wait_for(lambda: len(orchestrator.of("status", "buffer/50")) == 2)
    assert set(orchestrator.of("status", "buffer/50")[1].body) == {"status", "error", "output_url", "metrics"}


def test_a_job_handed_out_again_is_answered_from_its_end(pair: Pair) -> None:
    server, orchestrator = pair
    before = server.log_text().count('"job_done"')
    orchestrator.jobs.extend([claimed(server, 60), claimed(server, 60)])
    orchestrator.wait_for(lambda: len(orchestrator.of("status", "buffer/60")) == 2)
    first, second = orchestrator.of("status", "buffer/60")
    assert first.body == second.body
    assert server.log_text().count('"job_done"') == before + 1


def test_nothing_is_claimed_before_a_heartbeat_is_accepted(start: StartServer, orchestrator: FakeOrchestrator) -> None:
    refused = Times("heartbeat", 10**6, Answer(401))
    orchestrator.faults.append(refused)
    server = start()
    server.wait_for(200)
    orchestrator.wait_for(lambda: len(orchestrator.of("heartbeat")) >= 2)
    assert orchestrator.of("claim") == []
    refused.left = 0
    orchestrator.jobs.append(claimed(server, 1))
    orchestrator.wait_for(lambda: orchestrator.of("status"))


@pytest.mark.slow
def test_heartbeats_go_on_during_a_long_job(start: StartServer, orchestrator: FakeOrchestrator) -> None:
    server = start()
    make_audio(server.folder / "media/long.wav", 60)
    orchestrator.jobs.append(long_job(server, 1))
    orchestrator.wait_for(lambda: orchestrator.of("status"), limit_s=400)
    times = [call.time for call in orchestrator.of("heartbeat")]
    assert max(b - a for a, b in zip(times, [*times[1:], orchestrator.of("status")[0].time], strict=True)) <= 12


def test_sigterm_finishes_the_job_and_claims_no_other(start: StartServer, orchestrator: FakeOrchestrator) -> None:
    server = start()
    orchestrator.jobs.extend([long_job(server, 1), claimed(server, 2)])
    wait_until_running(orchestrator, 1)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 0
    assert [(call.id, call.body["status"]) for call in orchestrator.of("status")] == [("buffer/1", "succeeded")]
    assert len(orchestrator.jobs) == 1


def test_sigterm_hands_a_job_back_that_does_not_end_in_time(start: StartServer, orchestrator: FakeOrchestrator) -> None:
    server = start(GRACEFUL_TIMEOUT_SEC="11")
    orchestrator.jobs.append({**long_job(server, 1), "params": {"face_box": [50, 100, 142, 216], "batch_size": 1}})
    wait_until_running(orchestrator, 1)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    (report,) = orchestrator.of("status")
    if report.body["status"] == "failed":
        assert report.body["retryable"] is True
        assert "shut down" in report.body["error"]
    assert [path.name for path in (server.folder / "work").glob("job-*")] == []


def test_a_killed_process_hands_its_job_back_at_the_next_start(
    start: StartServer, orchestrator: FakeOrchestrator
) -> None:
    server = start()
    orchestrator.jobs.append(long_job(server, 1))
    wait_until_running(orchestrator, 1)
    (worker,) = psutil.Process(server.process.pid).children()
    os.kill(worker.pid, signal.SIGKILL)
    # Gunicorn starts a new worker, which reports the job as failed and continues.
    orchestrator.wait_for(lambda: orchestrator.of("status", "buffer/1"), limit_s=90)
    body = orchestrator.of("status")[0].body
    assert (body["status"], body["retryable"]) == ("failed", True)
    orchestrator.jobs.append(claimed(server, 2))
    orchestrator.wait_for(lambda: orchestrator.of("status", "buffer/2"), limit_s=90)
    assert orchestrator.of("status", "buffer/2")[0].body["status"] == "succeeded"
    assert [path.name for path in (server.folder / "work").glob("job-*")] == []


def test_a_report_that_could_not_be_sent_survives_the_end_of_the_process(
    start: StartServer, orchestrator: FakeOrchestrator
) -> None:
    refused = Times("status", 10**6, Answer(503))
    orchestrator.faults.append(refused)
    server = start()
    orchestrator.jobs.append(claimed(server, 1))
    orchestrator.wait_for(lambda: orchestrator.of("status"), limit_s=90)
    assert server.stop() == 0
    first = orchestrator.of("status")[0].body
    refused.left = 0
    before = len(orchestrator.of("status"))
    start()
    orchestrator.wait_for(lambda: len(orchestrator.of("status")) > before, limit_s=90)
    assert orchestrator.of("status")[-1].body == first


def test_health_names_the_missing_settings_of_buffer_mode(start: StartServer) -> None:
    server = start(INTERNAL_API_KEY="")
    body = server.wait_for(503)
    while body["status"] == "starting":
        body = server.wait_for(503)
    assert body["reason"] == "buffer mode needs INTERNAL_API_KEY"
    (line,) = server.entries("no job can be claimed")
    assert (line["severity"], line["reason"]) == ("error", "buffer mode needs INTERNAL_API_KEY")


def test_queue_mode_reports_progress_and_outcome(
    tmp_path: Path, start: StartServer, orchestrator: FakeOrchestrator
) -> None:
    server = start(BUFFER_WORKER_ID="", WORKER_ID="w-1", CONFIG_LABEL="label")
    server.wait_for(200)
    assert server.post(server.job("first")).status_code == 200
    calls = orchestrator.of("progress", "first")
    assert [call.body["phase"] for call in calls][-1] == "completed"
    last = calls[-1].body
    assert (last["status"], last["progress"]) == ("succeeded", 1.0)
    assert last["output_url"].endswith("first.mp4")
    assert {"b2_bucket", "b2_file_name", "total_time"} <= set(last["metrics"])
    assert all(call.body["worker_id"] == "w-1" and call.body["config_label"] == "label" for call in calls)
    assert server.post(server.job("second", video_url="ftp://host/x")).status_code == 422
    failed = orchestrator.of("progress", "second")[-1].body
    assert failed["status"] == "failed"
    assert failed["error"].startswith("media_error at download")
    assert orchestrator.of("claim") == orchestrator.of("heartbeat") == []


# -- the orchestrator is not what it should be ------------------------------------------------------------------------


def test_an_orchestrator_that_starts_late_is_served_and_logged_once(tmp_path: Path, tiny_models: Path) -> None:
    prepare(tmp_path)
    late = FakeOrchestrator()
    server = start_worker(tmp_path, tiny_models, late)
    try:
        server.wait_for(200)
        wait_until(lambda: server.entries("heartbeat rejected"))
        with late:
            late.jobs.append(claimed(server, 1))
            late.wait_for(lambda: late.of("status"), limit_s=90)
            assert late.of("status")[0].body["status"] == "succeeded"
            assert late.calls[0].kind == "heartbeat"
        # One line for each change and not for each try.
        assert len(server.entries("heartbeat rejected")) == 1
        assert len(server.entries("heartbeat accepted")) == 1
    finally:
        server.stop()


def test_an_orchestrator_that_hangs_stretches_neither_heartbeats_nor_the_job(pair: Pair) -> None:
    """Every progress call and some heartbeat accepted and never answered while a job runs."""
    server, orchestrator = pair
    released = threading.Event()

    def hang(call: Call) -> Answer | None:
        if call.kind == "progress" or (call.kind == "heartbeat" and call.body["status"] == "busy"):
            released.wait(20)
            return Answer(None)
        return None

    orchestrator.faults.append(hang)
    begun = time.monotonic()
    orchestrator.jobs.append(claimed(server, 70))
    orchestrator.wait_for(lambda: orchestrator.of("status", "buffer/70"), limit_s=90)
    taken = time.monotonic() - begun
    orchestrator.faults.clear()
    released.set()
    assert orchestrator.of("status", "buffer/70")[0].body["status"] == "succeeded"
    # Only the sender's last call, whose time is limited, may be waited for.
    assert taken < 30
    times = [call.time for call in orchestrator.of("heartbeat") if call.time >= begun]
    assert all(later - earlier <= 12 for earlier, later in pairwise(times))


def test_an_end_that_nobody_wants_any_more_is_dropped_after_one_line(pair: Pair) -> None:
    server, orchestrator = pair
    for number, status in ((80, 404), (81, 409)):
        orchestrator.faults.append(Times("status", 1, Answer(status)))
        orchestrator.jobs.append(claimed(server, number, video_url="ftp://host/x"))
        orchestrator.wait_for(lambda number=number: orchestrator.of("status", f"buffer/{number}"))  # type: ignore[misc]
        orchestrator.jobs.append(claimed(server, number + 5, video_url="ftp://host/x"))
        orchestrator.wait_for(lambda number=number: orchestrator.of("status", f"buffer/{number + 5}"))  # type: ignore[misc]
        assert len(orchestrator.of("status", f"buffer/{number}")) == 1
        orchestrator.faults.clear()
    assert len(server.entries("outcome rejected by the orchestrator; dropped")) == 2


def test_a_worker_without_weights_never_claims(tmp_path: Path, orchestrator: FakeOrchestrator) -> None:
    prepare(tmp_path)
    (tmp_path / "empty").mkdir()
    server = start_worker(tmp_path, tmp_path / "empty", orchestrator, MUSETALK_MODEL="v15")
    try:
        orchestrator.wait_for(
            lambda: any("unet.pth" in (call.body["error"] or "") for call in orchestrator.of("heartbeat")), limit_s=60
        )
        assert orchestrator.of("claim") == []
    finally:
        server.stop()


# -- two doors, one GPU -----------------------------------------------------------------------------------------------


def test_one_job_at_a_time_whichever_door_it_came_through(start: StartServer, orchestrator: FakeOrchestrator) -> None:
    server = start(faulty=True)
    server.wait_for(200)
    server.command("hold-inference")
    orchestrator.jobs.append(claimed(server, 1))
    server.wait_held("inference")
    n_claims = len(orchestrator.of("claim"))
    refused = server.post(server.job("posted"))
    assert (refused.status_code, refused.json()["retryable"]) == (503, True)
    assert server.health()[0] == 200
    # Not one claim while the job runs, though jobs are there.
    orchestrator.jobs.append(claimed(server, 2))
    orchestrator.wait_for(lambda: len([c for c in orchestrator.of("heartbeat") if c.body["status"] == "busy"]) >= 1)
    assert len(orchestrator.of("claim")) == n_claims
    server.release("hold-inference")
    orchestrator.wait_for(lambda: orchestrator.of("status", "buffer/2"), limit_s=90)
    assert [call.body["status"] for call in orchestrator.of("status")] == ["succeeded", "succeeded"]


def test_a_claimed_job_is_cancelled_by_the_answer_to_a_heartbeat(
    start: StartServer, orchestrator: FakeOrchestrator
) -> None:
    server = start(faulty=True)
    server.wait_for(200)
    server.command("slow")
    # However fast the machine is, the job runs until the heartbeat is answered.
    server.command("hold-inference")
    orchestrator.jobs.append(long_job(server, 1))
    server.wait_held("inference")
    n_heartbeats = len(orchestrator.of("heartbeat"))
    orchestrator.faults.append(Times("heartbeat", 1, Answer(200, b'{"detail": "ok", "cancel": ["buffer/1"]}')))
    orchestrator.wait_for(lambda: len(orchestrator.of("heartbeat")) > n_heartbeats, limit_s=60)
    server.release("hold-inference")
    orchestrator.wait_for(lambda: orchestrator.of("status"), limit_s=60)
    body = orchestrator.of("status")[0].body
    assert (body["status"], body["retryable"]) == ("failed", False)
    assert "the job was cancelled" in body["error"]
    assert server.leftovers() == []


def test_a_lost_gpu_is_reported_and_the_next_process_goes_on(
    start: StartServer, orchestrator: FakeOrchestrator
) -> None:
    server = start(faulty=True)
    server.wait_for(200)
    server.command("fail-lost")
    orchestrator.jobs.append(claimed(server, 1))
    orchestrator.wait_for(lambda: orchestrator.of("status", "buffer/1"), limit_s=90)
    body = orchestrator.of("status", "buffer/1")[0].body
    assert (body["status"], body["retryable"], body["stage"]) == ("failed", True, "inference")
    orchestrator.jobs.append(claimed(server, 2))
    orchestrator.wait_for(lambda: orchestrator.of("status", "buffer/2"), limit_s=90)
    assert orchestrator.of("status", "buffer/2")[0].body["status"] == "succeeded"
    assert any("GPU" in (call.body["error"] or "") for call in orchestrator.of("heartbeat"))
    assert len(orchestrator.of("status", "buffer/1")) == 1


def test_a_second_sigterm_ends_at_once_and_the_job_is_handed_back_by_the_next_process(
    start: StartServer, orchestrator: FakeOrchestrator
) -> None:
    server = start(faulty=True)
    server.wait_for(200)
    server.command("hold-inference")
    orchestrator.jobs.append(claimed(server, 1))
    server.wait_held("inference")
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.entries("Handling signal: term"))
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(10)
    assert orchestrator.of("status") == []
    server.release("hold-inference")
    start(faulty=True)
    orchestrator.wait_for(lambda: orchestrator.of("status"), limit_s=90)
    body = orchestrator.of("status")[0].body
    assert (body["status"], body["retryable"]) == ("failed", True)


def test_a_stop_in_the_first_moments_is_not_lost(start: StartServer, orchestrator: FakeOrchestrator) -> None:
    """The signal came while the new process was still importing: it ended only when its time was over."""
    server = start()
    orchestrator.wait_for(lambda: orchestrator.of("heartbeat"))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
