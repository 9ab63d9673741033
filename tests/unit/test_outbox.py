"""Outcomes on a real disk: full, broken, crowded; whatever is found there, the loop continues and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.small_disk import fill, small_disk
from worker import outbox as module
from worker.clock import Clock
from worker.outbox import CLAIM, Outbox, name_of
from worker.outcomes import Outcome, decode_outcome, decode_record, encode_outcome, fitting_body
from worker.records import READ_BYTES, RECORD_BYTES, WorkDisk

DONE = {"status": "succeeded", "error": None, "output_url": "https://host/a.mp4", "metrics": {"total_time": 1.0}}
KILLED = {"status": "failed", "error": "killed"}


class ManualClock(Clock):
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000.0 + self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def make(tmp_path: Path, clock: ManualClock) -> Callable[[], Outbox]:
    """Opens the outbox as a new process would."""

    def run() -> Outbox:
        outbox = Outbox(WorkDisk(tmp_path, min_free_mb=0), KILLED, clock=clock)
        outbox.open()
        return outbox

    return run


def ids(outbox: Outbox) -> list[str]:
    return [outcome.buffer_job_id for outcome in outbox.outcomes()]


def send_all(outbox: Outbox, refused: str | None = None) -> list[str]:
    """Take every outcome that is due; those of `refused` fail, all others are accepted."""
    sent: list[str] = []
    while (found := outbox.next_outcome()) is not None:
        entry, outcome = found
        sent.append(outcome.buffer_job_id)
        if outcome.buffer_job_id == refused:
            outbox.mark_failed(entry, outcome)
        else:
            outbox.mark_accepted(entry)
    return sent


# -- one job, one record ----------------------------------------------------------------------------------------------


def test_a_claim_becomes_its_outcome_and_then_nothing(make: Callable[[], Outbox], tmp_path: Path) -> None:
    outbox = make()
    assert outbox.check() is None
    outbox.write_claim("b/1")
    assert json.loads((tmp_path / CLAIM).read_text()) == {"id": "b/1"}
    outbox.add(Outcome("b/1", DONE, 1.0))
    assert not (tmp_path / CLAIM).exists()
    assert ids(make()) == ["b/1"]
    assert send_all(outbox) == ["b/1"]
    assert list((tmp_path / "outbox").iterdir()) == []
    assert ids(make()) == []


def test_a_process_that_is_killed_between_two_steps_leaves_one_outcome(
    make: Callable[[], Outbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def kill(*_args: object) -> None:
        raise KilledError

    outbox = make()
    outbox.write_claim("b")
    monkeypatch.setattr(WorkDisk, "move", kill)
    with pytest.raises(KilledError):
        outbox.add(Outcome("b", DONE, 1.0))
    monkeypatch.undo()
    (outcome,) = make().outcomes()
    assert outcome.body == DONE
    assert not (tmp_path / CLAIM).exists()


def test_a_stored_outcome_wins_over_the_claim_of_the_killed_process(make: Callable[[], Outbox], tmp_path: Path) -> None:
    make().add(Outcome("b", DONE, 1.0))
    (tmp_path / CLAIM).write_text('{"id": "b"}')
    (outcome,) = make().outcomes()
    assert outcome.body == DONE


def test_the_newest_outcome_of_a_job_counts(make: Callable[[], Outbox]) -> None:
    outbox = make()
    outbox.add(Outcome("b", KILLED, 1.0))
    outbox.add(Outcome("b", DONE, 2.0))
    assert send_all(outbox) == ["b"]
    assert send_all(make()) == []


def test_an_unsent_failure_is_withdrawn_when_the_job_is_claimed_again(make: Callable[[], Outbox]) -> None:
    outbox = make()
    outbox.add(Outcome("b", KILLED, 1.0))
    outbox.write_claim("b")
    assert send_all(outbox) == []


def test_a_new_claim_waits_for_the_report_of_the_old_one(make: Callable[[], Outbox]) -> None:
    outbox = make()
    outbox.add(Outcome("b", KILLED, 1.0))
    found = outbox.next_outcome()
    assert found is not None
    thread = threading.Thread(target=outbox.write_claim, args=("b",), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    outbox.mark_failed(*found)
    thread.join(10)
    assert not thread.is_alive()
    assert send_all(outbox) == []


# -- what the present version has stored ------------------------------------------------------------------------------


def test_outcomes_of_the_version_before_are_sent(make: Callable[[], Outbox], tmp_path: Path) -> None:
    folder = tmp_path / "outbox"
    folder.mkdir()
    (folder / f"{'0' * 32}.json").write_text(json.dumps({"id": "b-1", "body": DONE, "created": 1.5}))
    Path(tmp_path / name_of("b-2")).write_text(json.dumps({"id": "b-2", "body": KILLED, "created": 2}))
    (tmp_path / CLAIM).write_text(json.dumps({"id": "b-3"}))
    assert sorted(send_all(make())) == ["b-1", "b-2", "b-3"]
    assert list(folder.iterdir()) == []


# -- bad files --------------------------------------------------------------------------------------------------------

BAD = {
    "empty": b"",
    "cut": b'{"id": "b',
    "list": b"[]",
    "no id": b'{"body": {"status": "failed"}, "created": 1}',
    "no outcome": b'{"id": "b", "body": 3, "created": 1}',
    "another status": b'{"id": "b", "body": {"status": "odd"}, "created": 1}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"id":' * 100_000,
    "NaN": b'{"id": "b", "body": {"status": "failed", "metrics": NaN}, "created": 1}',
    "no finite time": b'{"id": "b", "body": {"status": "failed"}, "created": Infinity}',
    "time is a text": b'{"id": "b", "body": {"status": "failed"}, "created": "1"}',
    "giant integer": b'{"id": ' + b"9" * 100_000 + b"}",
    "surrogate": b'{"id": "\\ud800", "body": {"status": "failed"}, "created": 1}',
    "id is true": b'{"id": true, "body": {"status": "failed"}, "created": 1}',
    "long id": b'{"id": "' + b"x" * 500_000 + b'", "body": {"status": "failed"}, "created": 1}',
    "binary": bytes(range(256)),
    "huge": b" " * (READ_BYTES + 1),
}


def make_directory(path: Path) -> None:
    path.mkdir()
    (path / "inner").touch()


def make_socket(path: Path) -> None:
    # An address of a socket has 107 bytes at most, and temporary folders can be deep.
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


KINDS: dict[str, Callable[[Path], object]] = {
    "directory": make_directory,
    "pipe": os.mkfifo,
    "socket": make_socket,
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
    "huge hole": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**12),
    **{name: lambda path, data=data: path.write_bytes(data) for name, data in BAD.items()},  # type: ignore[misc]
}


@pytest.mark.parametrize("place", [CLAIM, f"outbox/{'0' * 32}.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_moved_to_quarantine_with_one_error_and_the_loop_goes_on(
    make: Callable[[], Outbox], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, place: str
) -> None:
    """The claim loop ended for ever, and so did that of every later process."""
    (tmp_path / "outbox").mkdir()
    KINDS[kind](tmp_path / place)
    outbox = make()
    outbox.add(Outcome("b-2", DONE, 2.0))
    assert send_all(outbox) == ["b-2"]
    assert outbox.check() is None
    outbox.write_claim("b-3")
    outbox.add(Outcome("b-3", DONE, 3.0))
    assert send_all(outbox) == ["b-3"]
    assert list((tmp_path / "outbox").iterdir()) == []
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "bad file moved to quarantine"
    ]
    caplog.clear()
    again = make()
    assert again.check() is None
    assert caplog.records == []


@pytest.mark.parametrize("name", ["outbox", "quarantine", ".reserve", "undelivered"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "dangling link", "binary"])
def test_something_else_under_a_name_of_ours_stops_nothing(
    make: Callable[[], Outbox], tmp_path: Path, name: str, kind: str
) -> None:
    KINDS[kind](tmp_path / name)
    (tmp_path / CLAIM).write_bytes(b"bad")
    outbox = make()
    assert outbox.check() is None
    outbox.write_claim("b")
    outbox.add(Outcome("b", DONE, 1.0))
    found = outbox.next_outcome()
    assert found is not None
    outbox.mark_refused(found[0])
    assert ids(make()) == []
    kept = [path for path in tmp_path.rglob("*-*") if path.parent.name == "undelivered" and path.is_file()]
    assert [json.loads(path.read_text())["id"] for path in kept] == ["b"]


def test_an_outcome_that_becomes_readable_is_sent(
    make: Callable[[], Outbox], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing read may pass, as with a network disk; the file is no bad file."""
    make().add(Outcome("b", DONE, 1.0))
    outbox = make()

    def fail(*_args: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(WorkDisk, "read", fail)
    assert send_all(outbox) == []
    monkeypatch.undo()
    clock.now += 100
    assert send_all(outbox) == ["b"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    details=json_values,
    error=st.text(st.characters(exclude_categories=()), max_size=100),
    identity=st.text(min_size=1, max_size=200),
)
def test_whatever_is_written_can_be_read_again(details: Any, error: str, identity: str) -> None:
    body = {"status": "failed", "error": error, "details": details, "huge": 10**5000}
    data = encode_outcome(Outcome(identity, fitting_body(Outcome(identity, body, 5.0)), 5.0))
    outcome = decode_outcome(decode_record(data), 10.0)
    assert (outcome.buffer_job_id, outcome.created) == (identity, 5.0)
    assert encode_outcome(outcome) == data
    json.dumps(outcome.body, allow_nan=False, ensure_ascii=False).encode()


def test_an_outcome_is_never_larger_than_its_record(make: Callable[[], Outbox], tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(10_000):
        deep = [deep]
    for number, details in enumerate([{"a": ["ü" * 8000] * 1000}, {"a": deep}, {"a": "😀" * 10**6}]):
        make().add(Outcome(str(number), {"status": "failed", "error": "e" * 2000, "details": details}, 1.0))
    assert all(path.stat().st_size <= RECORD_BYTES for path in (tmp_path / "outbox").iterdir())
    assert sorted(ids(make())) == ["0", "1", "2"]


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", mib=4) as folder:
        yield folder


def test_on_a_full_disk_the_outcome_of_the_claimed_job_is_stored_and_no_other_is_claimed(disk: Path) -> None:
    outbox = Outbox(WorkDisk(disk, min_free_mb=0), KILLED)
    assert outbox.check() is None
    outbox.write_claim("b")
    filler = fill(disk)
    outbox.add(Outcome("b", DONE, 1.0))
    assert outbox.n_in_memory == 0
    assert ids(Outbox(WorkDisk(disk, min_free_mb=0), KILLED)) == []
    again = Outbox(WorkDisk(disk, min_free_mb=0), KILLED)
    again.open()
    assert ids(again) == ["b"]
    assert "MiB free" in str(outbox.check()) or "room" in str(outbox.check())
    assert send_all(outbox) == ["b"]
    assert outbox.check() is not None
    filler.unlink()
    assert outbox.check() is None


def test_without_a_reserve_the_outcome_stays_in_memory_until_there_is_room(disk: Path) -> None:
    outbox = Outbox(WorkDisk(disk, min_free_mb=0), KILLED)
    outbox.open()
    filler = fill(disk)
    outbox.add(Outcome("b", DONE, 1.0))
    assert outbox.n_in_memory == 1
    assert "outcomes only in memory: 1" in str(outbox.problem)
    filler.unlink()
    assert outbox.check() is None
    assert (outbox.n_in_memory, outbox.problem) == (0, None)
    again = Outbox(WorkDisk(disk, min_free_mb=0), KILLED)
    again.open()
    assert ids(again) == ["b"]


def test_a_claim_is_not_written_with_the_bytes_kept_for_its_outcome(disk: Path) -> None:
    outbox = Outbox(WorkDisk(disk, min_free_mb=0), KILLED)
    assert outbox.check() is None
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        outbox.write_claim("b")
    outbox.add(Outcome("b", KILLED, 1.0))
    assert outbox.n_in_memory == 0


# -- many -------------------------------------------------------------------------------------------------------------


def test_20_000_stored_outcomes_take_little_memory_and_a_new_one_goes_first(
    make: Callable[[], Outbox], tmp_path: Path
) -> None:
    """600 MB of memory, and no new outcome was sent."""
    (tmp_path / "outbox").mkdir()
    body = {**DONE, "details": {"text": "x" * 2000}}
    for number in range(20_000):
        data = encode_outcome(Outcome(f"old-{number}", body, 1.0))
        (tmp_path / name_of(f"old-{number}")).write_bytes(data)
    tracemalloc.start()
    try:
        outbox = make()
        outbox.add(Outcome("new", DONE, 2.0))
        found = outbox.next_outcome()
        assert found is not None
        assert found[1].buffer_job_id == "new"
        outbox.mark_failed(*found)
        for _ in range(200):
            found = outbox.next_outcome()
            assert found is not None
            outbox.mark_failed(*found)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


def test_more_than_are_listed_are_sent_in_the_end(
    make: Callable[[], Outbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LISTED", 7)
    (tmp_path / "outbox").mkdir()
    for number in range(40):
        (tmp_path / name_of(str(number))).write_bytes(encode_outcome(Outcome(str(number), DONE, 1.0)))
    assert sorted(send_all(make()), key=int) == [str(number) for number in range(40)]


def test_each_outcome_waits_for_itself(make: Callable[[], Outbox], clock: ManualClock) -> None:
    outbox = make()
    for name in ("bad", "b-1", "b-2"):
        outbox.add(Outcome(name, DONE, clock.time()))
    assert send_all(outbox, "bad") == ["bad", "b-1", "b-2"]
    assert send_all(outbox, "bad") == []
    assert outbox.next_due_s() <= 1
    clock.now += 1
    assert send_all(outbox, "bad") == ["bad"]
    assert 1 < outbox.next_due_s() <= 2


def test_an_outcome_that_fails_while_others_are_accepted_is_parked_with_an_alert(
    make: Callable[[], Outbox], clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = make()
    outbox.add(Outcome("bad", DONE, clock.time()))
    for number in range(9):
        outbox.add(Outcome(f"b-{number}", DONE, clock.time()))
        send_all(outbox, "bad")
        clock.now += 60
    assert outbox.n_parked == 1
    assert len([record for record in caplog.records if record.message.startswith("outcome parked")]) == 1
    assert outbox.next_due_s() > 60
    clock.now += 900
    assert send_all(outbox) == ["bad"]
    assert outbox.n_parked == 0


def test_while_the_orchestrator_accepts_nothing_no_outcome_is_parked(
    make: Callable[[], Outbox], clock: ManualClock
) -> None:
    outbox = make()
    outbox.add(Outcome("b", DONE, clock.time()))
    for _ in range(50):
        send_all(outbox, "b")
        clock.now += 60
    assert outbox.n_parked == 0
    assert outbox.next_due_s() <= 60


def test_an_outcome_that_nobody_accepts_for_a_day_is_kept_for_a_person(
    make: Callable[[], Outbox], clock: ManualClock, tmp_path: Path
) -> None:
    outbox = make()
    outbox.add(Outcome("b", DONE, clock.time()))
    send_all(outbox, "b")
    clock.now += 25 * 3600
    send_all(outbox, "b")
    assert outbox.n_waiting == 0
    (kept,) = (tmp_path / "undelivered").iterdir()
    assert json.loads(kept.read_text())["id"] == "b"


def test_the_real_clock_runs() -> None:
    clock = Clock()
    assert clock.monotonic() <= time.monotonic()
    assert abs(clock.time() - time.time()) < 60
    assert clock.wait(threading.Event(), 0.0) is False
