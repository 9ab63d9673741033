"""Outcomes on their way to the orchestrator: stored, scheduled, and found again by the next process.

The record of a job is one file at any time: `claimed.json` names the claimed job, then holds its outcome, then moves to
`outbox/`, and is removed when the orchestrator has accepted the outcome. When nothing can be written, the outcome stays
in memory and `problem` says so. Knows no HTTP and no orchestrator; safe to call from any thread.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from worker.clock import MAX_BACKOFF_S, Clock, pause_after
from worker.outcomes import (
    Outcome,
    claim_or_outcome,
    decode_outcome,
    decode_record,
    encode_outcome,
    encode_record,
    fitting_body,
)
from worker.records import QUARANTINE, BadRecordError, Disk, error_reason, printable
from worker.telemetry import logger

CLAIM = "claimed.json"
FOLDER = "outbox"
UNDELIVERED = "undelivered"
# An outcome that the orchestrator has not accepted after this time is moved to `undelivered/`.
LIFETIME_S = 24 * 3600.0
# An outcome that failed this often, over about three minutes, while others were accepted, is parked.
PARK_AFTER = 8
PARKED_PAUSE_S = 900.0
# Longer than a report takes that is under way.
WITHDRAW_LIMIT_S = 20.0
# Names that are kept in memory, about 300 bytes each; the rest stays on disk until these are sent.
MAX_LISTED = 20_000


@dataclass(eq=False, slots=True)
class Entry:
    """One outcome that the orchestrator has not accepted: where it is and how often it failed."""

    name: str
    place: str | None
    n_failures: int = 0
    # How many others had been accepted when this one failed first.
    n_accepted: int = 0
    is_tried: bool = False
    is_parked: bool = False
    is_settled: bool = False
    # Only while it could not be written.
    outcome: Outcome | None = None


def name_of(buffer_job_id: str) -> str:
    """The file of a job's outcome."""
    return f"{FOLDER}/{hashlib.sha256(buffer_job_id.encode()).hexdigest()[:32]}.json"


_Result = TypeVar("_Result")


def _locked(method: Callable[..., _Result]) -> Callable[..., _Result]:
    def call(self: Outbox, *args: Any, **kwargs: Any) -> _Result:
        with self._lock:
            return method(self, *args, **kwargs)

    call.__doc__ = method.__doc__
    return call


class Outbox:
    """All outcomes of this worker that are not accepted yet, and the claim of the running job."""

    def __init__(self, disk: Disk, orphan_body: Mapping[str, object], *, clock: Clock | None = None) -> None:
        """Touch nothing yet; see `open`. A job that an earlier process left without an outcome gets `orphan_body`."""
        self._disk, self._orphan_body, self._clock = disk, orphan_body, clock or Clock()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._entries: dict[str, Entry] = {}
        self._fresh: deque[Entry] = deque()
        self._waiting: list[tuple[float, int, Entry]] = []
        self._n_pushed = self._n_accepted = 0
        self._in_memory: dict[str, Entry] = {}
        self._in_flight: Entry | None = None
        self._may_have_more = False
        self._ignored: set[str] = set()
        # The entry whose file could not be moved away from the claim's place.
        self._holder: Entry | None = None
        self._is_claim_read = False
        self._is_listed = False
        # Why the folder could not be used when it was last tried.
        self._room: str | None = None
        # Read by /hc and heartbeats, without the lock.
        self.problem: str | None = None
        self.n_parked = 0

    @property
    def n_waiting(self) -> int:
        """Number of outcomes that are listed and not accepted."""
        return len(self._entries)

    @property
    def n_in_memory(self) -> int:
        """Number of outcomes that could not be written."""
        return len(self._in_memory)

    # -- start --

    @_locked
    def open(self) -> bool:
        """List what an earlier process left; its claimed job gets an outcome. What fails is tried again by `check`.

        Return whether there is something new to send.
        """
        n_before = len(self._entries)
        if not self._is_listed:
            self._list()
        if self._is_listed and not self._is_claim_read:
            self._read_claim()
        return len(self._entries) > n_before

    def _list(self) -> None:
        """List stored outcomes that are not listed yet, newest first."""
        try:
            names = self._disk.names(FOLDER, MAX_LISTED)
        except OSError as error:
            self._room = f"WORK_DIR/{FOLDER} cannot be read ({error_reason(error)})"
            return
        self._is_listed = True
        self._may_have_more = len(names) == MAX_LISTED
        now = self._clock.monotonic()
        for name in names:
            if name not in self._entries and name not in self._ignored:
                self._push(Entry(name, name), now)

    def _read_claim(self) -> None:
        """Turn the record of an earlier process's claim into an outcome."""
        self._is_claim_read = True
        try:
            record = self._read(CLAIM)
            if record is None:
                return
            outcome = claim_or_outcome(record, self._orphan_body, self._clock.time())
        except BadRecordError as reason:
            self._quarantine(CLAIM, str(reason))
            return
        except OSError as error:
            self._is_claim_read = False
            self._room = f"WORK_DIR/{CLAIM} cannot be read ({error_reason(error)})"
            return
        if "body" not in record and name_of(outcome.buffer_job_id) in self._entries:
            # The earlier process had stored the outcome already.
            self._remove_quietly(CLAIM)
            return
        self.add(outcome)

    # -- the claim of the running job --

    @_locked
    def check(self) -> str | None:
        """Reason why no job should be claimed, or None; first tries again what could not be done before."""
        self._room = None
        self.open()
        self._store_again()
        if self._holder is not None:
            self._move_from_claim(self._holder)
        self._room = self._disk.problem() or self._room
        self._update_problem()
        return self.problem

    @_locked
    def write_claim(self, buffer_job_id: str) -> None:
        """Write down that this job was claimed. Raises OSError; the job must then not run.

        An earlier outcome of the job that was not accepted is dropped: the job has been given out again.
        """
        self._disk.write(CLAIM, encode_record({"id": buffer_job_id}))
        name = name_of(buffer_job_id)
        if (entry := self._entries.get(name)) is None:
            return
        # Sent after the new claim, it would look like the outcome of that.
        self._changed.wait_for(lambda: self._in_flight is not entry, WITHDRAW_LIMIT_S)
        if self._entries.get(name) is entry:
            self._disk.remove(name)
            self._unlist(entry)
            logger.warning("unsent outcome withdrawn: job claimed again", extra={"buffer_job_id": buffer_job_id})

    @_locked
    def add(self, outcome: Outcome) -> Entry:
        """Store an outcome in place of the claim, to be sent before all others; keep it in memory if that fails."""
        outcome = replace(outcome, body=fitting_body(outcome))
        name = name_of(outcome.buffer_job_id)
        entry = Entry(name, None, outcome=outcome)
        if (earlier := self._entries.get(name)) is not None:
            self._unlist(earlier)
        self._entries[name] = self._in_memory[name] = entry
        self._fresh.append(entry)
        self._store(entry)
        if entry.outcome is not None:
            logger.error("outcome only in memory", extra={"buffer_job_id": outcome.buffer_job_id, "reason": self._room})
        self._update_problem()
        return entry

    # -- storing --

    def _store(self, entry: Entry) -> None:
        """Write the outcome over the claim, in one step, and move it to its place."""
        assert entry.outcome is not None
        holder = self._holder
        if holder is not None and holder is not entry:
            self._move_from_claim(holder)
        try:
            place = CLAIM if self._holder is None else entry.name
            self._disk.write(place, encode_outcome(entry.outcome), may_use_reserve=True)
        except OSError as error:
            self._room = f"WORK_DIR cannot be written ({error_reason(error)})"
            return
        entry.place, entry.outcome = place, None
        self._in_memory.pop(entry.name, None)
        if place == CLAIM:
            self._holder = entry
            self._move_from_claim(entry)

    def _move_from_claim(self, entry: Entry) -> None:
        try:
            self._disk.move(CLAIM, entry.name)
        except OSError as error:
            logger.warning("outcome not moved", extra={"reason": error_reason(error)})
            return
        entry.place, self._holder = entry.name, None

    def _store_again(self) -> None:
        for entry in list(self._in_memory.values()):
            self._store(entry)
            if entry.outcome is not None:
                return
            logger.info("outcome stored", extra={"file": entry.name})

    def _update_problem(self) -> None:
        problem = self._room
        if self._holder is not None:
            problem = problem or f"WORK_DIR/{CLAIM} cannot be moved to {FOLDER}"
        if self._in_memory:
            problem = f"outcomes only in memory: {len(self._in_memory)}; {problem or 'WORK_DIR cannot be written'}"
        self.problem = problem

    # -- sending --

    @_locked
    def next_outcome(self, *, only_fresh: bool = False) -> tuple[Entry, Outcome] | None:
        """The outcome to send now, or None: new ones first, then those whose time has come.

        Call `mark_accepted`, `mark_refused` or `mark_failed` afterwards.
        """
        while (entry := self._pop(only_fresh)) is not None:
            if entry.is_settled:
                self._forget(entry)
                continue
            outcome = entry.outcome or self._load(entry)
            if outcome is not None:
                self._in_flight = entry
                return entry, outcome
        return None

    def _pop(self, only_fresh: bool) -> Entry | None:
        while self._fresh:
            entry = self._fresh.popleft()
            if self._entries.get(entry.name) is entry:
                return entry
        if only_fresh:
            return None
        if not self._waiting and self._may_have_more:
            # All that were listed are gone.
            self._list()
        while self._waiting and self._waiting[0][0] <= self._clock.monotonic():
            entry = heapq.heappop(self._waiting)[2]
            if self._entries.get(entry.name) is entry:
                return entry
        return None

    @_locked
    def next_due_s(self) -> float:
        """Seconds until the next outcome is due; 0 when one is, infinite when there is none."""
        if self._fresh:
            return 0.0
        if not self._waiting:
            return 1.0 if self._may_have_more else math.inf
        return max(0.0, self._waiting[0][0] - self._clock.monotonic())

    @_locked
    def mark_accepted(self, entry: Entry) -> None:
        """The orchestrator has accepted the outcome, or has another one: remove it."""
        self._n_accepted += 1
        if self._entries.get(entry.name) is entry:
            self._forget(entry)
        self._end_flight()

    @_locked
    def mark_refused(self, entry: Entry) -> None:
        """The orchestrator will never accept the outcome: keep it in `undelivered/`, for a person."""
        self._end_flight()
        if self._entries.get(entry.name) is not entry:
            return
        self._store_again()
        if entry.place is not None:
            try:
                self._disk.set_aside(entry.place, UNDELIVERED)
                if self._holder is entry:
                    self._holder = None
                self._unlist(entry)
                self._update_problem()
                return
            except OSError as error:
                logger.error("outcome not moved", extra={"file": entry.name, "reason": error_reason(error)})
        self._push(entry, self._clock.monotonic() + PARKED_PAUSE_S)

    @_locked
    def mark_failed(self, entry: Entry, outcome: Outcome) -> None:
        """The report failed: schedule another one, with growing pauses; after a day give up.

        An outcome that keeps failing while others are accepted is parked: tried rarely, and counted for an alert.
        """
        self._end_flight()
        if self._entries.get(entry.name) is not entry:
            return
        if self._clock.time() - outcome.created > LIFETIME_S:
            logger.error(
                "outcome not accepted in time; moved to undelivered", extra={"buffer_job_id": outcome.buffer_job_id}
            )
            self.mark_refused(entry)
            return
        if entry.n_failures == 0:
            entry.n_accepted = self._n_accepted
        pause = pause_after(entry.n_failures)
        entry.n_failures += 1
        if entry.n_failures >= PARK_AFTER and self._n_accepted > entry.n_accepted:
            pause = PARKED_PAUSE_S * pause_after(0)
            self._park(entry, outcome)
        self._push(entry, self._clock.monotonic() + pause)

    def _park(self, entry: Entry, outcome: Outcome) -> None:
        if not entry.is_parked:
            entry.is_parked = True
            self.n_parked += 1
            logger.error(
                "outcome parked: the orchestrator fails on it",
                extra={"buffer_job_id": outcome.buffer_job_id, "n_failures": entry.n_failures},
            )

    @_locked
    def outcomes(self) -> list[Outcome]:
        """All listed outcomes, oldest first."""
        found = [entry.outcome or self._load(entry) for entry in list(self._entries.values()) if not entry.is_settled]
        return sorted((outcome for outcome in found if outcome is not None), key=lambda outcome: outcome.created)

    def _push(self, entry: Entry, due: float) -> None:
        self._entries[entry.name] = entry
        self._n_pushed += 1
        heapq.heappush(self._waiting, (due, self._n_pushed, entry))

    @_locked
    def wait_tried(self, entry: Entry, limit_s: float) -> None:
        """Wait until the outcome was reported once, successfully or not, for `limit_s` seconds at most."""
        self._changed.wait_for(lambda: entry.is_tried, limit_s)

    def _end_flight(self) -> None:
        if self._in_flight is not None:
            self._in_flight.is_tried = True
        self._in_flight = None
        self._changed.notify_all()

    def _forget(self, entry: Entry) -> None:
        """Remove an outcome that needs no more reports, or try that again later."""
        is_in_memory = entry.name in self._in_memory
        self._unlist(entry)
        try:
            self._disk.remove(entry.place or entry.name)
            if is_in_memory:
                # It never reached the disk, so the claim is still there.
                self._remove_claim_of(entry)
        except OSError as error:
            # Sent again only if this process ends before the file can be removed.
            logger.warning("accepted outcome not removed", extra={"file": entry.name, "reason": error_reason(error)})
            entry.is_settled, entry.outcome = True, None
            self._push(entry, self._clock.monotonic() + MAX_BACKOFF_S)
            return
        if self._holder is entry:
            self._holder = None
        self._update_problem()

    def _unlist(self, entry: Entry) -> None:
        """Forget what is in memory about an outcome."""
        self._entries.pop(entry.name, None)
        self._in_memory.pop(entry.name, None)
        self.n_parked -= entry.is_parked
        entry.is_parked = False

    def _remove_claim_of(self, entry: Entry) -> None:
        record = self._read(CLAIM)
        if record is not None and isinstance(record.get("id"), str) and name_of(record["id"]) == entry.name:
            self._disk.remove(CLAIM)

    # -- reading --

    def _load(self, entry: Entry) -> Outcome | None:
        """Read a stored outcome; None when it is gone, unusable (then quarantined), or cannot be read now."""
        assert entry.place is not None
        try:
            record = self._read(entry.place)
            if record is None:
                self._unlist(entry)
                return None
            outcome = decode_outcome(record, self._clock.time())
            self._adopt(entry, outcome)
        except BadRecordError as reason:
            self._quarantine(entry.place, str(reason))
            self._unlist(entry)
            return None
        except OSError as error:
            if entry.n_failures == 0:
                logger.error("stored outcome unreadable", extra={"file": entry.name, "reason": error_reason(error)})
            entry.n_failures += 1
            self._push(entry, self._clock.monotonic() + pause_after(entry.n_failures))
            return None
        return outcome

    def _adopt(self, entry: Entry, outcome: Outcome) -> None:
        """Give a file of another name the one of its job, so that a job has one outcome."""
        name = name_of(outcome.buffer_job_id)
        if entry.name == name:
            return
        if name in self._entries:
            raise BadRecordError("another file has the outcome of this job")
        self._disk.move(entry.name, name)
        self._entries.pop(entry.name)
        entry.name = entry.place = name
        self._entries[name] = entry

    def _read(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file, None when there is none; a bad one is quarantined. Raises OSError."""
        try:
            data = self._disk.read(name)
            return None if data is None else decode_record(data)
        except BadRecordError as reason:
            if name != CLAIM:
                raise
            self._quarantine(name, str(reason))
            return None

    def _quarantine(self, name: str, reason: str) -> None:
        extra = {"file": printable(name), "reason": reason}
        try:
            self._disk.set_aside(name, QUARANTINE)
            logger.error("bad file moved to quarantine", extra=extra)
        except OSError as error:
            if name not in self._ignored:
                logger.error("bad file cannot be moved", extra={**extra, "problem": error_reason(error)})
            self._ignored.add(name)
            if name == CLAIM:
                # The next claim needs this name.
                self._is_claim_read = False
                self._room = f"WORK_DIR/{CLAIM} is no claim and cannot be moved ({error_reason(error)})"

    def _remove_quietly(self, name: str) -> None:
        try:
            self._disk.remove(name)
        except OSError as error:
            logger.warning("file not removed", extra={"file": name, "reason": error_reason(error)})


# -- records as JSON --------------------------------------------------------------------------------------------------
