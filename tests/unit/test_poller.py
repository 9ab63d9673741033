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
from worker.config import load_settings
from worker.jobs import Job, JobResult
from worker.orchestrator import OrchestratorSettings
from worker.readiness import Readiness

JOB = {
    "buffer_job_id": "b-1",
    "musetalk_job_id": "m-1",
    "video_url": "https://host/a.mp4",
    "audio_url": "https://host/a.wav",
    "params": {"box_smoothing": 2},
}


class ScriptedCore(Core):
    """A real core whose work is replaced."""

    def __init__(self) -> None:
        super().__init__(load_settings({}, env_file=None))
        self.state = Readiness("ready", "v15")
        self.jobs: list[Job] = []
        self.outcome: BaseException | JobResult = a_result()

    @property
    def readiness(self) -> Readiness:
        return self.state

    def run_job(self, job: Job, **callbacks: Any) -> JobResult:
        self.jobs.append(job)
        callbacks["on_progress"]("download", 0, 1)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def far_side() -> Iterator[FakeOrchestrator]:
    with FakeOrchestrator() as far_side:
        yield far_side


@pytest.fixture
def core() -> ScriptedCore:
    return ScriptedCore()


@pytest.fixture
def poller(core: ScriptedCore, far_side: FakeOrchestrator, tmp_path: Path) -> Poller:
    """A loop that is not running: the test calls its steps."""
    return make_poller(core, far_side, tmp_path)


def make_poller(core: Core, far_side: FakeOrchestrator, folder: Path) -> Poller:
    settings = OrchestratorSettings(far_side.url, far_side.url, "key", "w-1", "RTX")
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
    poller: Poller, core: ScriptedCore, far_side: FakeOrchestrator
) -> None:
    poller.step()
    assert far_side.of("claim") == []
    poller.heartbeat.beat()
    for state in ("starting", "busy", "failed", "draining"):
        core.state = Readiness(state, None, "reason")
        poller.step()
        assert far_side.of("claim") == []
    core.state = Readiness("ready", "v15")
    poller.step()
    assert len(far_side.of("claim")) == 1


def test_a_job_is_run_with_all_its_fields_and_reported(
    poller: Poller, core: ScriptedCore, far_side: FakeOrchestrator
) -> None:
    poller.heartbeat.beat()
    far_side.jobs.append(JOB)
    assert poller.step() == 0.0
    assert core.jobs[0].params.box_smoothing == 2
    assert core.jobs[0].buffer_job_id == "b-1"
    (report,) = far_side.of("status", "b-1")
    assert report.body["status"] == "succeeded"
    assert poller.outbox.reports() == []
    assert 2.7 <= poller.step() <= 3.3


def test_a_failure_is_told_with_its_cause(poller: Poller, core: ScriptedCore, far_side: FakeOrchestrator) -> None:
    poller.heartbeat.beat()
    for number, (outcome, text) in enumerate(
        [(MediaError("no sound"), "media_error at unknown: no sound"), (KeyError("x"), "unknown_error at unknown: ")]
    ):
        core.outcome = outcome
        far_side.jobs.append({**JOB, "buffer_job_id": f"b-{number}"})
        poller.step()
        (report,) = far_side.of("status", f"b-{number}")
        assert report.body["error"].startswith(text)
        assert report.body["status"] == "failed"


def test_a_job_without_an_id_is_not_run(poller: Poller, core: ScriptedCore, far_side: FakeOrchestrator) -> None:
    poller.stop()
    poller.heartbeat.beat()
    identities: list[Any] = [None, "", True, [], {}]
    for identity in identities:
        far_side.jobs.append({**JOB, "buffer_job_id": identity})
        poller.step()
    assert core.jobs == []
    assert far_side.of("status") == []


def test_a_failed_job_that_is_handed_out_again_is_run_again(
    poller: Poller, core: ScriptedCore, far_side: FakeOrchestrator
) -> None:
    poller.heartbeat.beat()
    core.outcome = MediaError("no sound")
    far_side.jobs.extend([JOB, JOB])
    poller.step()
    core.outcome = a_result()
    poller.step()
    assert [call.body["status"] for call in far_side.of("status", "b-1")] == ["failed", "succeeded"]


@pytest.mark.parametrize("status", [404, 409, 400])
def test_an_end_that_nobody_wants_is_dropped(poller: Poller, far_side: FakeOrchestrator, status: int) -> None:
    poller.heartbeat.beat()
    far_side.faults.append(Times("status", 1, Answer(status)))
    far_side.jobs.append(JOB)
    poller.step()
    assert poller.outbox.reports() == []


def test_claims_go_on_while_an_end_waits(poller: Poller, far_side: FakeOrchestrator) -> None:
    poller.heartbeat.beat()
    far_side.faults.append(Times("status", 10**6, Answer(500)))
    far_side.jobs.extend([JOB, {**JOB, "buffer_job_id": "b-2"}])
    poller.step()
    poller.step()
    assert len(poller.outbox.reports()) == 2
    far_side.faults.clear()
    poller._deliver(force=True)
    assert poller.outbox.reports() == []


def test_the_job_of_a_killed_process_is_handed_back_once(
    core: ScriptedCore, far_side: FakeOrchestrator, tmp_path: Path
) -> None:
    (tmp_path / "claimed.json").write_text('{"id": "b-9"}', encoding="utf-8")

    def look() -> list[Any]:
        poller = make_poller(core, far_side, tmp_path)
        poller.hand_back_orphan()
        return poller.outbox.reports()

    ((_, report),) = look()
    assert report.buffer_job_id == "b-9"
    assert (report.body["status"], report.body["retryable"]) == ("failed", True)
    assert len(look()) == 1
    (tmp_path / "claimed.json").write_text("{", encoding="utf-8")
    look()
    assert not (tmp_path / "claimed.json").exists()


def test_the_end_that_was_reached_wins_over_the_process_that_died(
    core: ScriptedCore, far_side: FakeOrchestrator, tmp_path: Path
) -> None:
    Outbox(tmp_path / "outbox").put(Report("b-9", {"status": "succeeded"}, 1.0))
    (tmp_path / "claimed.json").write_text('{"id": "b-9"}', encoding="utf-8")
    poller = make_poller(core, far_side, tmp_path)
    poller.hand_back_orphan()
    ((_, report),) = poller.outbox.reports()
    assert report.body["status"] == "succeeded"


def test_a_heartbeat_tells_the_last_error_once(poller: Poller, far_side: FakeOrchestrator) -> None:
    poller.heartbeat.tell("something broke")
    poller.heartbeat.beat()
    poller.heartbeat.beat()
    assert [call.body["error"] for call in far_side.of("heartbeat")] == ["something broke", None]
