"""Buffer mode on real processes: full disks, bad files, an orchestrator that fails on one job, broken threads."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.support.buffer_mode import claimed, prepare, start_worker
from tests.support.fake_orchestrator import Answer, Call, FakeOrchestrator
from tests.support.server import Server, wait_until
from tests.support.small_disk import fill, small_disk

Pair = tuple[Server, FakeOrchestrator]
# Downloads leave 64 MiB free.
DISK_MIB = 160


@contextmanager
def worker(folder: Path, models: Path, **environment: Any) -> Iterator[Pair]:
    """A worker with deliberate faults, and its orchestrator."""
    with FakeOrchestrator() as orchestrator:
        server = start_worker(folder, models, orchestrator, faulty=True, **environment)
        try:
            yield server, orchestrator
        finally:
            server.stop()


def outcomes(orchestrator: FakeOrchestrator, number: int) -> list[Any]:
    return [call.body for call in orchestrator.of("status", f"buffer/{number}")]


def serving_process(server: Server) -> psutil.Process:
    (child,) = psutil.Process(server.process.pid).children()
    return child


# -- one worker: its disk is full, then the orchestrator fails on one job, then its threads break ---------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Pair]:
    folder = prepare(tmp_path_factory.mktemp("lost"))
    with (
        small_disk(folder / "work", mib=DISK_MIB),
        worker(folder, tiny_models, MIN_FREE_DISK_MB="0", AVATAR_DISK_MB="0") as pair,
    ):
        pair[0].wait_for(200)
        yield pair


def test_on_a_full_disk_no_job_is_claimed_and_the_reason_is_said_everywhere(pair: Pair) -> None:
    """Three jobs were claimed one after the other, none was ever reported, and the heartbeat said idle."""
    server, orchestrator = pair
    filler = fill(server.folder / "work")
    # A claim that was under way when the disk became full is reported.
    body = server.wait_for(503)
    assert "WORK_DIR" in body["reason"]
    n_claims = len(orchestrator.of("claim"))
    orchestrator.jobs.extend(claimed(server, number) for number in (1, 2, 3))
    orchestrator.wait_for(lambda: "WORK_DIR" in (orchestrator.of("heartbeat")[-1].body["error"] or ""))
    n_beats = len(orchestrator.of("heartbeat"))
    orchestrator.wait_for(lambda: len(orchestrator.of("heartbeat")) > n_beats)
    assert len(orchestrator.of("claim")) == n_claims
    assert server.health()[0] == 503
    filler.unlink()
    server.wait_for(200)
    orchestrator.wait_for(lambda: all(outcomes(orchestrator, number) for number in (1, 2, 3)))
    assert [outcomes(orchestrator, number)[0]["status"] for number in (1, 2, 3)] == ["succeeded"] * 3


@pytest.mark.parametrize("ending", ["finished", "killed"])
def test_the_outcome_of_a_job_whose_disk_became_full_is_reported_once(pair: Pair, ending: str) -> None:
    server, orchestrator = pair
    number = 10 if ending == "finished" else 11
    server.wait_for(200)
    server.command("hold-upload")
    orchestrator.jobs.append(claimed(server, number))
    server.wait_held("upload")
    (server.faults / "held-upload").unlink()
    filler = fill(server.folder / "work")
    if ending == "killed":
        os.kill(serving_process(server).pid, signal.SIGKILL)
    server.release("hold-upload")
    orchestrator.wait_for(lambda: outcomes(orchestrator, number))
    (body,) = outcomes(orchestrator, number)
    assert (body["status"], body.get("retryable")) == (
        ("succeeded", None) if ending == "finished" else ("failed", True)
    )
    filler.unlink()
    server.wait_for(200)
    orchestrator.jobs.append(claimed(server, number + 10))
    orchestrator.wait_for(lambda: outcomes(orchestrator, number + 10))
    assert len(outcomes(orchestrator, number)) == 1


def test_an_orchestrator_that_fails_on_one_outcome_gets_all_others(pair: Pair) -> None:
    """The next three outcomes were made and not sent, for up to 24 hours."""
    server, orchestrator = pair
    server.wait_for(200)

    def fault(call: Call) -> Answer | None:
        return Answer(500) if (call.kind, call.id) == ("status", "buffer/30") else None

    orchestrator.faults.append(fault)
    orchestrator.jobs.extend(claimed(server, number, video_url="ftp://host/a") for number in (30, 31, 32, 33))
    orchestrator.wait_for(lambda: all(outcomes(orchestrator, number) for number in (31, 32, 33)))
    wait_until(lambda: metric(server, "musetalk_outcomes_waiting") == 1, 30)
    orchestrator.faults.clear()
    orchestrator.wait_for(lambda: metric(server, "musetalk_outcomes_waiting") == 0)
    assert len({json.dumps(body) for body in outcomes(orchestrator, 30)}) == 1


@pytest.mark.parametrize(("thread", "number"), [("heartbeat", 40), ("poller", 50)])
def test_a_thread_that_ends_by_an_unforeseen_error_is_restarted_and_the_third_time_the_process(
    pair: Pair, thread: str, number: int
) -> None:
    server, orchestrator = pair
    server.wait_for(200)
    process = serving_process(server)
    n_beats = len(orchestrator.of("heartbeat"))
    break_thread(server, thread)
    wait_until(lambda: metric(server, f'musetalk_restarts_total{{part="{thread}"}}') == 1, 60)
    orchestrator.wait_for(lambda: len(orchestrator.of("heartbeat")) > n_beats)
    orchestrator.jobs.append(claimed(server, number))
    orchestrator.wait_for(lambda: outcomes(orchestrator, number))
    assert server.health()[0] == 200
    break_thread(server, thread)
    break_thread(server, thread)
    body = server.wait_for(503)
    assert body["reason"] == f"the {thread} failed 3 times in ten minutes"
    wait_until(lambda: not process.is_running(), 60)
    orchestrator.jobs.append(claimed(server, number + 1))
    orchestrator.wait_for(lambda: outcomes(orchestrator, number + 1), limit_s=90)
    assert outcomes(orchestrator, number + 1)[0]["status"] == "succeeded"


def break_thread(server: Server, thread: str) -> None:
    """Make the next step of a thread raise, and wait until it has."""
    server.command(f"break-{thread}")
    wait_until(lambda: not (server.faults / f"break-{thread}").exists(), 60)


def metric(server: Server, name: str) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


# -- another worker: WORK_DIR cannot be made, and then it is full of things -------------------------------------------


def test_a_worker_starts_with_whatever_it_finds_in_its_folder(tmp_path: Path, tiny_models: Path) -> None:
    """The claim loop was dead or failed for ever, and every restart as well; many outcomes held up a new one."""
    folder = prepare(tmp_path)
    (folder / "work").write_text("a file in place of the folder")
    with worker(folder, tiny_models) as (server, orchestrator):
        orchestrator.wait_for(
            lambda: any("WORK_DIR cannot be used" in (c.body["error"] or "") for c in orchestrator.of("heartbeat"))
        )
        body = server.wait_for(503)
        while body["reason"] == "the models are loading":
            body = server.wait_for(503)
        assert body["reason"].startswith("WORK_DIR cannot be used")
        assert orchestrator.of("claim") == []
        make_mess(folder / "work")
        orchestrator.faults.append(lambda call: Answer(500) if call.id.startswith("old-") else None)
        server.wait_for(200)
        orchestrator.jobs.append(claimed(server, 1))
        orchestrator.wait_for(lambda: outcomes(orchestrator, 1))
        orchestrator.faults.clear()
        orchestrator.wait_for(lambda: len({call.id for call in orchestrator.of("status")}) == 2001)
        wait_until(lambda: list((folder / "work/outbox").iterdir()) == [], 30)
        assert outcomes(orchestrator, 1)[0]["status"] == "succeeded"
        assert len(server.entries("bad file moved to quarantine")) == 6
        assert len(list((folder / "work/quarantine").iterdir())) == 6
        assert server.health()[0] == 200


def make_mess(work: Path) -> None:
    """Replace the file by a folder with bad files and 2,000 outcomes of the version before."""
    prepared = work.with_name("prepared")
    outbox = prepared / "outbox"
    outbox.mkdir(parents=True)
    (prepared / "claimed.json").mkdir()
    (prepared / ".lock").mkdir()
    (outbox / "0.json").write_bytes(b"[" * 100_000)
    (outbox / "1.json").write_bytes(b'{"id": "\\ud800", "body": {"status": "failed"}, "created": 1}')
    (outbox / "2.json").write_bytes(b'{"id": "b", "body": {"status": "failed", "metrics": NaN}, "created": 1}')
    os.mkfifo(outbox / "3.json")
    for number in range(2000):
        report = {"id": f"old-{number}", "body": {"status": "failed", "error": "e"}, "created": 1.0 + number}
        (outbox / f"{number:032x}.json").write_text(json.dumps(report))
    work.unlink()
    prepared.rename(work)
