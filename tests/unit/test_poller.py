"""The claim loop's parts, one step at a time."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from musetalk.errors import MediaError
from musetalk_core import Core
from poller import Poller, start
from tests.support.fake_orchestrator import Answer, FakeOrchestrator, Times
from tests.support.results import a_result
from tests.support.scripted_core import ScriptedCore
from tests.support.server import wait_until
from worker.orchestrator import OrchestratorSettings
from worker.outcomes import Outcome
from worker.readiness import Readiness
from worker.records import WorkDisk

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


def work(poller: Poller) -> float:
    """One round of the claim loop, then all reports that are due; returns the pause of the round in seconds."""
    pause = poller.step()
    while poller.sender.step() == 0.0:
        pass
    return pause


def test_nothing_is_claimed_while_loading_busy_or_unheard(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator
) -> None:
    work(poller)
    assert orchestrator.of("claim") == []
    poller.heartbeat.beat()
    for state in ("starting", "busy", "failed", "draining"):
        core.state = Readiness(state, None, "reason")
        work(poller)
        assert orchestrator.of("claim") == []
    core.state = Readiness("ready", "v15")
    work(poller)
    assert len(orchestrator.of("claim")) == 1


def test_a_job_is_run_with_all_its_fields_and_reported(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator
) -> None:
    poller.heartbeat.beat()
    orchestrator.jobs.append(JOB)
    assert work(poller) == 0.0
    assert core.jobs[0].params.box_smoothing == 2
    assert core.jobs[0].buffer_job_id == "b-1"
    (report,) = orchestrator.of("status", "b-1")
    assert report.body["status"] == "succeeded"
    assert poller.outbox.outcomes() == []
    assert 2.7 <= work(poller) <= 3.3


def test_a_failure_is_reported_with_a_cause(poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator) -> None:
    poller.heartbeat.beat()
    for number, (outcome, text) in enumerate(
        [(MediaError("no sound"), "media_error at unknown: no sound"), (KeyError("x"), "unknown_error at unknown: ")]
    ):
        core.outcome = outcome
        orchestrator.jobs.append({**JOB, "buffer_job_id": f"b-{number}"})
        work(poller)
        (report,) = orchestrator.of("status", f"b-{number}")
        assert report.body["error"].startswith(text)
        assert report.body["status"] == "failed"


def test_a_job_without_an_id_is_not_run(poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator) -> None:
    poller.stop()
    poller.heartbeat.beat()
    identities: list[Any] = [None, "", True, [], {}]
    for identity in identities:
        orchestrator.jobs.append({**JOB, "buffer_job_id": identity})
        work(poller)
    assert core.jobs == []
    assert orchestrator.of("status") == []


def test_a_failed_job_that_is_handed_out_again_is_run_again(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator
) -> None:
    poller.heartbeat.beat()
    core.outcome = MediaError("no sound")
    orchestrator.jobs.extend([JOB, JOB])
    work(poller)
    core.outcome = a_result()
    work(poller)
    assert [call.body["status"] for call in orchestrator.of("status", "b-1")] == ["failed", "succeeded"]


@pytest.mark.parametrize(("status", "kept"), [(404, 0), (409, 0), (410, 0), (400, 1), (413, 1)])
def test_a_rejected_outcome_is_not_sent_again_and_a_refused_one_is_kept_for_a_person(
    poller: Poller, orchestrator: FakeOrchestrator, tmp_path: Path, status: int, kept: int
) -> None:
    poller.heartbeat.beat()
    orchestrator.faults.append(Times("status", 1, Answer(status)))
    orchestrator.jobs.append(JOB)
    work(poller)
    assert poller.outbox.outcomes() == []
    assert len(list(tmp_path.glob("undelivered/*"))) == kept


def test_one_outcome_that_fails_holds_up_no_other(poller: Poller, orchestrator: FakeOrchestrator) -> None:
    poller.heartbeat.beat()
    orchestrator.faults.append(lambda call: Answer(500) if (call.kind, call.id) == ("status", "b-1") else None)
    orchestrator.jobs.extend([JOB, *({**JOB, "buffer_job_id": f"b-{number}"} for number in (2, 3, 4))])
    for _ in range(4):
        work(poller)
    assert [call.id for call in orchestrator.of("status")][:4] == ["b-1", "b-2", "b-3", "b-4"]
    assert [outcome.buffer_job_id for outcome in poller.outbox.outcomes()] == ["b-1"]
    orchestrator.faults.clear()
    poller.sender.finish(10)
    wait_until(lambda: poller.sender.step() >= 0 and poller.outbox.outcomes() == [], 10)


def test_the_job_of_a_killed_process_is_reported_once(
    core: ScriptedCore, orchestrator: FakeOrchestrator, tmp_path: Path
) -> None:
    (tmp_path / "claimed.json").write_text('{"id": "b-9"}', encoding="utf-8")

    def left() -> list[Outcome]:
        poller = make_poller(core, orchestrator, tmp_path)
        poller.outbox.open()
        return poller.outbox.outcomes()

    (outcome,) = left()
    assert outcome.buffer_job_id == "b-9"
    assert (outcome.body["status"], outcome.body["retryable"]) == ("failed", True)
    assert left() == [outcome]
    assert not (tmp_path / "claimed.json").exists()


@pytest.mark.parametrize(
    "identity",
    [".", "..", "\ud800", "x" * 1_000_000, "ü" * 2000, 10**4000],
    ids=["dot", "dots", "surrogate", "long", "long when quoted", "giant number"],
)
def test_a_job_whose_id_leaves_its_path_is_logged_and_not_run(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator, identity: Any
) -> None:
    poller.heartbeat.beat()
    orchestrator.jobs.append({**JOB, "buffer_job_id": identity})
    work(poller)
    poller.heartbeat.beat()
    assert core.jobs == []
    assert {call.kind for call in orchestrator.calls} == {"heartbeat", "claim"}
    assert orchestrator.of("heartbeat")[-1].body["error"] == "a claimed job has no usable buffer_job_id"


@pytest.mark.parametrize("identity", ["line\nbreak", "\x00", "x" * 2000, "\x7f"])
def test_a_job_whose_id_is_refused_but_reportable_is_reported_as_failed(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator, identity: str
) -> None:
    poller.heartbeat.beat()
    orchestrator.jobs.append({**JOB, "buffer_job_id": identity})
    work(poller)
    (report,) = orchestrator.of("status", identity)
    assert report.body["error"].startswith("media_error at validation: buffer_job_id must not")
    assert core.jobs == []


@pytest.mark.parametrize("identity", [".", "..", "\ud800", "x" * 1_000_000])
def test_a_job_whose_progress_would_leave_its_path_is_reported_as_failed(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator, identity: str
) -> None:
    poller.heartbeat.beat()
    orchestrator.jobs.append({**JOB, "musetalk_job_id": identity})
    work(poller)
    (report,) = orchestrator.of("status", "b-1")
    assert report.body["error"].startswith("media_error at validation: musetalk_job_id must not")
    assert core.jobs == []


def test_a_claim_that_cannot_be_written_fails_the_job_and_reports_it(
    poller: Poller, core: ScriptedCore, orchestrator: FakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WORK_DIR's disk was full: the job was claimed, and nobody heard of it again."""
    poller.heartbeat.beat()
    orchestrator.jobs.extend([JOB, {**JOB, "buffer_job_id": "b-2"}])

    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WorkDisk, "write", full)
    orchestrator.faults.append(Times("status", 2, Answer(503)))
    work(poller)
    assert core.jobs == []
    assert poller.outbox.n_in_memory == 1
    # Nothing more is claimed while the outcome is only in memory.
    work(poller)
    assert len(orchestrator.of("claim")) == 1
    assert "only in memory" in str(poller.outbox.problem)
    monkeypatch.undo()
    orchestrator.faults.clear()
    work(poller)
    poller.sender.open()
    wait_until(lambda: work(poller) >= 0 and poller.outbox.problem is None and len(core.jobs) == 1, 20)
    poller.sender.finish(5)
    bodies = {call.id: call.body for call in orchestrator.of("status")}
    assert "the claim could not be written to WORK_DIR (No space left on device)" in bodies["b-1"]["error"]
    assert (bodies["b-1"]["retryable"], bodies["b-2"]["status"]) == (True, "succeeded")


def test_buffer_mode_without_a_key_logs_an_error_that_names_the_variable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    core = ScriptedCore(tmp_path, WORKER_MODE="buffer")
    assert start(core) is None
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert vars(record)["reason"] == "buffer mode needs ORCHESTRATOR_BASE_URL and INTERNAL_API_KEY"


def test_a_heartbeat_carries_the_last_error_once(poller: Poller, orchestrator: FakeOrchestrator) -> None:
    poller.heartbeat.send_now("something broke")
    poller.heartbeat.beat()
    poller.heartbeat.beat()
    assert [call.body["error"] for call in orchestrator.of("heartbeat")] == ["something broke", None]
