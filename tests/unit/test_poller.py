"""The claim loop's parts, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from musetalk.errors import MediaError
from musetalk_core import Core
from poller import Backoff, Outbox, Poller, Report
from tests.support.fake_orchestrator import Answer, FakeOrchestrator, Times
from tests.support.results import a_result
from tests.support.scripted_core import ScriptedCore
from worker.orchestrator import OrchestratorSettings
from worker.readiness import Readiness

JOB = {
    "buffer_job_id": "b-1",
    "musetalk_job_id": "m-1",
    "video_url": "https://host/a.mp4",
    "audio_url": "https://host/a.wav",
    "params": {"box_smoothing": 2},
}


@pytest.fixture
def orchestrator() -> Iterator[FakeOrchestrator]:
    with FakeOrchestrator() as orchestrator:
        yield orchestrator


@pytest.fixture
def core(tmp_path: Path) -> ScriptedCore:
    return ScriptedCore(tmp_path / "core")


@pytest.fixture
def poller(core: ScriptedCore, orchestrator: FakeOrchestrator, tmp_path: Path) -> Poller:
    """A loop that is not running: the test calls its steps."""
    return make_poller(core, orchestrator, tmp_path)


def make_poller(core: Core, orchestrator: FakeOrchestrator, folder: Path) -> Poller:
    settings = OrchestratorSettings(orchestrator.url, orchestrator.url, "key", "w-1", "RTX")
    return Poller(core, settings, folder, poll_interval_s=3.0)


def test_pauses_grow_to_a_minute_and_start_again() -> None:
    backoff = Backoff()
    pauses = [backoff.next_s() for _ in range(12)]
    for pause, top in zip(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60, 60], strict=True):
        assert 0.75 * top <= pause <= top
    assert backoff.next_s(retry_after_s=3600) == 60
    backoff.reset()
    assert backoff.next_s() <= 1
    assert backoff.next_s(retry_after_s=9) == 9


def test_reports_lie_in_order_and_the_newest_about_a_job_counts(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.put(Report("b/ü", {"status": "failed"}, 2.0))
    outbox.put(Report("a", {"status": "succeeded"}, 1.0))
    outbox.put(Report("b/ü", {"status": "succeeded"}, 3.0))
    again = Outbox(tmp_path / "outbox").reports()
    assert [(report.buffer_job_id, report.body["status"]) for _, report in again] == [
        ("a", "succeeded"),
        ("b/ü", "succeeded"),
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 1}', '{"id": "a", "body": 3, "created": 1}'])
def test_a_stored_report_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path, content: str) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(Report("a", {"status": "failed"}, 1.0))
    (tmp_path / "broken.json").write_text(content, encoding="utf-8")
    assert [report.buffer_job_id for _, report in outbox.reports()] == ["a"]
    assert not (tmp_path / "broken.json").exists()


def test_nothing_is_claimed_while_loading_busy_or_unheard(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator
) -> None:
    poller.step()
    assert orchestrator.of("claim") == []
    poller.heartbeat.beat()
    for state in ("starting", "busy", "failed", "draining"):
        core.state = Readiness(state, None, "reason")
        poller.step()
        assert orchestrator.of("claim") == []
    core.state = Readiness("ready", "v15")
    poller.step()
    assert len(orchestrator.of("claim")) == 1


def test_a_job_is_run_with_all_its_fields_and_reported(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator
) -> None:
    poller.heartbeat.beat()
    orchestrator.jobs.append(JOB)
    assert poller.step() == 0.0
    assert core.jobs[0].params.box_smoothing == 2
    assert core.jobs[0].buffer_job_id == "b-1"
    (report,) = orchestrator.of("status", "b-1")
    assert report.body["status"] == "succeeded"
    assert poller.outbox.reports() == []
    assert 2.7 <= poller.step() <= 3.3


def test_a_failure_is_reported_with_a_cause(poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator) -> None:
    poller.heartbeat.beat()
    for number, (outcome, text) in enumerate(
        [(MediaError("no sound"), "media_error at unknown: no sound"), (KeyError("x"), "unknown_error at unknown: ")]
    ):
        core.outcome = outcome
        orchestrator.jobs.append({**JOB, "buffer_job_id": f"b-{number}"})
        poller.step()
        (report,) = orchestrator.of("status", f"b-{number}")
        assert report.body["error"].startswith(text)
        assert report.body["status"] == "failed"


def test_a_job_without_an_id_is_not_run(poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator) -> None:
    poller.stop()
    poller.heartbeat.beat()
    identities: list[Any] = [None, "", True, [], {}]
    for identity in identities:
        orchestrator.jobs.append({**JOB, "buffer_job_id": identity})
        poller.step()
    assert core.jobs == []
    assert orchestrator.of("status") == []


def test_a_failed_job_that_is_handed_out_again_is_run_again(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator
) -> None:
    poller.heartbeat.beat()
    core.outcome = MediaError("no sound")
    orchestrator.jobs.extend([JOB, JOB])
    poller.step()
    core.outcome = a_result()
    poller.step()
    assert [call.body["status"] for call in orchestrator.of("status", "b-1")] == ["failed", "succeeded"]


@pytest.mark.parametrize("status", [404, 409, 400])
def test_a_rejected_outcome_is_dropped(poller: Poller, orchestrator: FakeOrchestrator, status: int) -> None:
    poller.heartbeat.beat()
    orchestrator.faults.append(Times("status", 1, Answer(status)))
    orchestrator.jobs.append(JOB)
    poller.step()
    assert poller.outbox.reports() == []


def test_claims_continue_while_an_outcome_waits(poller: Poller, orchestrator: FakeOrchestrator) -> None:
    poller.heartbeat.beat()
    orchestrator.faults.append(Times("status", 10**6, Answer(500)))
    orchestrator.jobs.extend([JOB, {**JOB, "buffer_job_id": "b-2"}])
    poller.step()
    poller.step()
    assert len(poller.outbox.reports()) == 2
    orchestrator.faults.clear()
    poller._deliver(force=True)
    assert poller.outbox.reports() == []


def test_the_job_of_a_killed_process_is_handed_back_once(
    core: ScriptedCore, orchestrator: FakeOrchestrator, tmp_path: Path
) -> None:
    (tmp_path / "claimed.json").write_text('{"id": "b-9"}', encoding="utf-8")

    def look() -> list[Any]:
        poller = make_poller(core, orchestrator, tmp_path)
        poller.report_orphan()
        return poller.outbox.reports()

    ((_, report),) = look()
    assert report.buffer_job_id == "b-9"
    assert (report.body["status"], report.body["retryable"]) == ("failed", True)
    assert len(look()) == 1
    (tmp_path / "claimed.json").write_text("{", encoding="utf-8")
    look()
    assert not (tmp_path / "claimed.json").exists()


def test_the_end_that_was_reached_wins_over_the_process_that_died(
    core: ScriptedCore, orchestrator: FakeOrchestrator, tmp_path: Path
) -> None:
    Outbox(tmp_path / "outbox").put(Report("b-9", {"status": "succeeded"}, 1.0))
    (tmp_path / "claimed.json").write_text('{"id": "b-9"}', encoding="utf-8")
    poller = make_poller(core, orchestrator, tmp_path)
    poller.report_orphan()
    ((_, report),) = poller.outbox.reports()
    assert report.body["status"] == "succeeded"


def test_a_heartbeat_carries_the_last_error_once(poller: Poller, orchestrator: FakeOrchestrator) -> None:
    poller.heartbeat.send_now("something broke")
    poller.heartbeat.beat()
    poller.heartbeat.beat()
    assert [call.body["error"] for call in orchestrator.of("heartbeat")] == ["something broke", None]
