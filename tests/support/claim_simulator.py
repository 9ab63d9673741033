"""A small world around the real claim loop: virtual time, an orchestrator, a disk and a core that fail on demand.

`simulate` runs one schedule: events at their times, and faults that a chooser puts into single operations. The claim
loop is the main thread of the world; heartbeats and reports are steps that take no time of the others. A kill ends the
process between two operations, as SIGKILL does: the disk stays, the memory is gone. Violations of the invariant raise
AssertionError.
"""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import poller as poller_module
from musetalk.errors import MediaError, ShutdownError, UnavailableError
from poller import Poller
from tests.support.results import a_result
from worker.clock import Clock
from worker.jobs import Job, JobResult
from worker.orchestrator import OrchestratorSettings, Reply
from worker.outbox import CLAIM, name_of
from worker.readiness import Readiness
from worker.supervision import Supervisor
from worker.work_dir import WorkDir

Event = Literal[
    "job", "again", "down", "silent", "broken", "locked", "up", "full", "free", "term", "kill", "post", "wait"
]
Choice = TypeVar("Choice")

MAX_HEARTBEAT_GAP_S = 12.0
# Shorter rounds than these only cost time.
IDLE_S = 5.0
# A new process loads its models; a job through the other door takes as long.
LOADING_S = 2.0
POSTED_S = 15.0
HEALED_S = 2000.0
_RESULT = a_result()
_SETTINGS = OrchestratorSettings("", "", "key", "w-1", "RTX")


class KilledError(BaseException):
    """The process was killed."""


class Chooser:
    """Chooses what an operation does; the first option is that it works."""

    def pick(self, options: Sequence[Choice]) -> Choice:
        return options[0]


class RandomChooser(Chooser):
    """Faults at random, `share` of all operations."""

    def __init__(self, rng: random.Random, share: float) -> None:
        self._rng, self._share = rng, share

    def pick(self, options: Sequence[Choice]) -> Choice:
        if self._rng.random() >= self._share:
            return options[0]
        return self._rng.choice(options)


class PlannedChooser(Chooser):
    """Faults at given operations: `plan` maps the number of an operation to the number of an option."""

    def __init__(self, plan: Mapping[int, int]) -> None:
        self._plan = plan
        # Number of options of each operation so far.
        self.counts: list[int] = []

    def pick(self, options: Sequence[Choice]) -> Choice:
        number = len(self.counts)
        self.counts.append(len(options))
        return options[min(self._plan.get(number, 0), len(options) - 1)]


@dataclass
class SimJob:
    """A job as the orchestrator sees it; lists have one item for each time it was handed out."""

    id: str
    bodies: list[list[str]] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    is_known: bool = False
    is_written: bool = False
    # A disk fault left the record of this job where a kill can make a second outcome of it, or none.
    is_excused: bool = False

    @property
    def is_done(self) -> bool:
        return bool(self.accepted) and self.accepted[-1]


class World:
    """Everything around the process, and the process."""

    def __init__(self, events: Sequence[tuple[float, Event]], chooser: Chooser) -> None:
        self.now, self.local, self.is_side = 0.0, 0.0, False
        self.events = list(events)
        self.chooser = chooser
        self.mode: Event = "up"
        self.jobs: dict[str, SimJob] = {}
        self.offered: list[SimJob] = []
        self.is_full = False
        self.files: dict[str, bytes] = {}
        self.has_reserve = False
        self.posted_until = 0.0
        self.process: Process | None = None
        self.is_kill_due = False
        self.is_healed = False
        self.seen: set[str] = set()

    # -- time --

    def spend(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass; in the main thread the other threads and the events have their turn."""
        if self.is_side:
            self.local += seconds
            return
        end = self.now + seconds
        while not until():
            process = self.process
            turns = (
                [] if process is None else [(side.due(self.now), number) for number, side in enumerate(process.sides)]
            )
            next_s, number = min(turns, default=(end + 1, 0))
            if self.events and self.events[0][0] <= min(next_s, end):
                time_s, event = self.events.pop(0)
                self.now = max(self.now, time_s)
                self.apply(event)
                continue
            if next_s > end or process is None:
                self.now = end
                return
            self.now = max(self.now, next_s)
            process.sides[number].step()

    def operation(self, options: Sequence[Choice]) -> Choice:
        """One access of the process to the world: it may be killed before, and the chooser says what happens."""
        process = self.process
        if process is None or process.is_dead:
            raise KilledError
        choice = self.chooser.pick(options) if not self.is_healed else options[0]
        if choice == "kill" or self.is_kill_due:
            self.is_kill_due = False
            process.is_dead = True
            raise KilledError
        return choice

    def die_after(self) -> None:
        process = self.process
        assert process is not None
        process.is_dead = True
        raise KilledError

    # -- events --

    def apply(self, event: Event) -> None:
        if event == "job":
            job = SimJob(f"b-{len(self.jobs)}")
            self.jobs[job.id] = job
            self.offered.append(job)
        elif event == "again":
            self.offered += [job for job in self.jobs.values() if job not in self.offered and not job.is_done][:1]
        elif event in ("down", "silent", "broken", "locked", "up"):
            self.mode = event
        elif event in ("full", "free"):
            self.is_full = event == "full"
        elif event == "kill":
            self.is_kill_due = True
        elif event == "post":
            self.posted_until = self.now + POSTED_S
        elif event == "term" and self.process is not None:
            self.process.core.is_stopping = True
            self.process.poller.stop()

    # -- the invariant --

    def is_stored(self, job: SimJob) -> bool:
        """Whether the disk has the job's claim or its outcome."""
        claim = self.files.get(CLAIM)
        if claim is not None and json.loads(claim)["id"] == job.id:
            return True
        return name_of(job.id) in self.files or any(
            name.startswith("undelivered/") and f'"{job.id}"'.encode() in data for name, data in self.files.items()
        )

    def check_death(self, was_killed: bool) -> None:
        """After the end of a process: nothing that it knew is lost."""
        for job in self.jobs.values():
            if not job.is_known or job.is_done or self.is_stored(job):
                continue
            if was_killed and not job.is_written:
                # Killed between the reply and the record: the orchestrator's own limit gives the job to another worker.
                job.is_known = False
                self.seen.add("killed before the record")
                continue
            assert job.is_excused or self.is_full, f"{job.id} is lost"
            job.is_known = False
            self.seen.add("lost with the memory")

    def check_end(self) -> None:
        for job in self.jobs.values():
            if job.is_known:
                assert job.is_done, f"{job.id} has no outcome"
        assert not [name for name in self.files if name.startswith("outbox/")]
        assert CLAIM not in self.files


class VirtualClock(Clock):
    """The world's time."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.now + self._world.local

    def time(self) -> float:
        return 1_700_000_000.0 + self.monotonic()

    def wait(self, event: Any, seconds: float) -> bool:
        self._world.spend(seconds)
        return bool(event.is_set())


class Side:
    """A thread beside the claim loop: its steps happen at once, and the time they take is its own."""

    def __init__(self, world: World, loop: Any) -> None:
        self._world, self._loop, self._due = world, loop, world.now

    def due(self, now: float) -> float:
        return now if self._loop._wake.is_set() and self._due > now else max(now, self._due)

    def step(self) -> None:
        world = self._world
        self._loop._wake.clear()
        world.is_side = True
        try:
            pause = self._loop.step()
            self._due = world.now + world.local + pause
        finally:
            world.is_side, world.local = False, 0.0


class SimOrchestrator:
    """The orchestrator as one thread of the process reaches it."""

    def __init__(self, world: World) -> None:
        self._world = world

    def close(self) -> None:
        """Nothing to close."""

    def _away(self) -> Reply | None:
        """The reply of an orchestrator that is not there."""
        world = self._world
        if world.mode == "down":
            return Reply(None, problem="down")
        if world.mode == "silent":
            world.spend(8.0)
            return Reply(None, problem="silent")
        return Reply(401) if world.mode == "locked" else None

    def heartbeat(self, status: str, error: str | None) -> Reply:
        world, process = self._world, self._world.process
        assert process is not None
        fault = world.operation(("ok", "500", "kill"))
        gap = world.now - process.last_heartbeat
        assert gap <= MAX_HEARTBEAT_GAP_S, f"no heartbeat for {gap:.1f} s"
        process.last_heartbeat = world.now
        if process.poller.outbox.n_in_memory:
            world.seen.add("in memory")
            assert "only in memory" in (error or ""), "the heartbeat hides an outcome that is only in memory"
        return self._away() or (Reply(500) if fault == "500" else Reply(200))

    def claim(self) -> Reply:
        world, process = self._world, self._world.process
        assert process is not None
        fault = world.operation(("ok", "500", "lost", "kill"))
        core = process.core
        assert not core.is_stopping, "a claim while draining"
        assert not core.is_busy, "a claim while busy"
        assert core.readiness.state == "ready", "a claim while not ready"
        assert not world.is_full, "a claim without room"
        assert process.poller.outbox.n_in_memory == 0, "a claim while an outcome is only in memory"
        world.spend(0.1)
        if (away := self._away()) is not None:
            return away
        if fault == "500":
            return Reply(500)
        if not world.offered:
            return Reply(200, body={"job": None})
        job = world.offered.pop(0)
        job.is_known = job.is_known and not job.is_done
        job.bodies.append([])
        job.accepted.append(False)
        job.is_written = False
        if fault == "lost":
            # Whoever still reports an earlier outcome reports it for this claim.
            return Reply(None, problem="lost")
        job.is_known = True
        fields = {
            "buffer_job_id": job.id,
            "musetalk_job_id": job.id,
            "video_url": "https://h/v",
            "audio_url": "https://h/a",
        }
        return Reply(200, body={"job": fields})

    def report(self, buffer_job_id: str, body: Mapping[str, object]) -> Reply:
        world = self._world
        fault = world.operation(("ok", "500", "lost", "429", "kill"))
        world.spend(0.1)
        if (away := self._away()) is not None:
            return away
        if world.mode == "broken" or fault in ("500", "429"):
            return Reply(429 if fault == "429" else 500)
        job = world.jobs[buffer_job_id]
        text = json.dumps(body, sort_keys=True)
        received = job.bodies[-1]
        assert job.is_excused or all(text == other for other in received), (
            f"two outcomes of {job.id}: {received} {text}"
        )
        received.append(text)
        job.accepted[-1] = True
        return Reply(None, problem="lost") if fault == "lost" else Reply(200)


class SimDisk:
    """WORK_DIR as names and bytes."""

    def __init__(self, world: World) -> None:
        self._world = world

    def problem(self) -> str | None:
        world = self._world
        world.operation(("ok",))
        if world.is_full:
            return "WORK_DIR is full"
        world.has_reserve = True
        return None

    def names(self, folder: str, limit: int) -> list[str]:
        self._access(None)
        return [name for name in self._world.files if name.startswith(f"{folder}/")][:limit]

    def read(self, name: str) -> bytes | None:
        self._access(name)
        return self._world.files.get(name)

    def write(self, name: str, data: bytes, *, may_use_reserve: bool = False) -> None:
        world = self._world
        fault = self._access(name, data)
        if world.is_full:
            if not (may_use_reserve and world.has_reserve):
                self._excuse(data)
                raise OSError(errno.ENOSPC, "No space left on device")
            world.seen.add("reserve used")
            world.has_reserve = False
        world.files[name] = data
        for job in world.jobs.values():
            job.is_written = job.is_written or json.loads(data)["id"] == job.id
        if fault == "kill after":
            world.die_after()

    def move(self, name: str, to: str) -> None:
        fault = self._access(name)
        self._world.files[to] = self._world.files.pop(name)
        if fault == "kill after":
            self._world.die_after()

    def remove(self, name: str) -> None:
        fault = self._access(name, self._world.files.get(name))
        self._world.files.pop(name, None)
        if fault == "kill after":
            self._world.die_after()

    def set_aside(self, name: str, folder: str) -> None:
        self._access(name)
        self._world.files[f"{folder}/{name}"] = self._world.files.pop(name)

    def _access(self, name: str | None, data: bytes | None = None) -> str:
        fault = self._world.operation(("ok", "error", "kill", "kill after"))
        if fault == "error":
            self._world.seen.add("disk error")
            if data is not None:
                self._excuse(data)
            raise OSError(errno.EIO, "Input/output error")
        return fault

    def _excuse(self, data: bytes) -> None:
        if (job := self._world.jobs.get(json.loads(data)["id"])) is not None:
            job.is_excused = True


class SimCore:
    """A core that runs jobs in virtual time."""

    def __init__(self, world: World, supervisor: Supervisor) -> None:
        self._world, self.supervisor = world, supervisor
        self.work_dir = WorkDir(Path("/nowhere"))
        self.is_running = self.is_stopping = False
        self.n_runs = 0
        self.ready_at = world.now + LOADING_S

    @property
    def is_busy(self) -> bool:
        return self.is_running or self._world.now < self._world.posted_until

    @property
    def readiness(self) -> Readiness:
        process = self._world.process
        if self._world.now < self.ready_at:
            return Readiness("starting", None, "the models are loading")
        if self.is_stopping:
            return Readiness("draining", "v15", "the worker is shutting down")
        if process is not None and process.poller.outbox.problem is not None:
            return Readiness("failed", "v15", process.poller.outbox.problem)
        return Readiness("busy" if self.is_busy else "ready", "v15")

    def cancel(self, _job_id: str) -> bool:
        return False

    def run_job(self, job: Job, *, on_progress: Callable[[Any, int, int], None]) -> JobResult:
        world = self._world
        if self.readiness.state != "ready":
            raise UnavailableError("not ready", state=self.readiness.state)
        outcome = world.operation(("success", "media", "odd", "taken", "kill"))
        if outcome == "taken":
            world.spend(3.0)
            raise UnavailableError("busy", state="busy")
        self.is_running = True
        try:
            on_progress("download", 0, 1)
            world.spend(25.0, until=lambda: self.is_stopping)
            if self.is_stopping and world.chooser.pick(("stopped", "finished")) == "stopped":
                world.seen.add("stopped")
                raise ShutdownError("the worker shut down before the job was finished")
            if outcome != "success":
                raise MediaError("no face") if outcome == "media" else KeyError("odd")
            self.n_runs += 1
            return replace(_RESULT, output_url=f"https://h/{job.job_id}/{world.now}/{self.n_runs}")
        finally:
            self.is_running = False


class Process:
    """One process of the worker, from its start to its end."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.is_dead = False
        self.last_heartbeat = world.now
        self.core = SimCore(world, Supervisor(_NoStatus(), _no_count))
        connect: Any = lambda _settings: SimOrchestrator(world)  # noqa: E731
        self.poller = Poller(
            self.core,
            _SETTINGS,
            Path("/nowhere"),
            poll_interval_s=IDLE_S,
            connect=connect,
            disk=SimDisk(world),
            clock=VirtualClock(world),
        )
        self.sides = [Side(world, self.poller.heartbeat), Side(world, self.poller.sender)]

    def run(self, ends: float, is_done: Callable[[], bool] = lambda: False) -> bool:
        """Run until the process ends or time is over; return whether it was killed."""
        world, loop = self._world, self.poller._loop
        try:
            while not self.poller.is_stopping and world.now < ends and not is_done():
                loop._wake.clear()
                world.spend(max(0.01, self.poller.step()), until=loop._wake.is_set)
            self.core.is_stopping = True
            self.poller.stop()
            self.poller.end()
            self.poller.heartbeat.beat()
        except KilledError:
            return True
        return False


class _NoStatus:
    def fail(self, reason: str) -> None:
        raise AssertionError(reason)

    def mark_lost(self, reason: str) -> None:
        raise AssertionError(reason)


def _no_count(_part: str) -> None:
    """Nothing is counted."""


def simulate(events: Sequence[tuple[float, Event]], chooser: Chooser, *, ends: float) -> World:
    """Run one schedule to its end, then without faults until every job has its outcome; raise AssertionError."""
    world = World(events, chooser)
    while world.now < ends:
        _run_process(world, ends)
    for event in ("up", "free"):
        world.apply(event)
    world.is_healed, world.is_kill_due, world.events = True, False, []
    deadline = world.now + HEALED_S

    def is_done() -> bool:
        settled = all(job.is_done or not job.is_known for job in world.jobs.values())
        return settled and not world.offered and CLAIM not in world.files and len(world.files) == 0

    _run_process(world, deadline, is_done)
    world.check_end()
    return world


def _run_process(world: World, ends: float, is_done: Callable[[], bool] = lambda: False) -> None:
    world.process = Process(world)
    was_killed = world.process.run(ends, is_done)
    world.seen.add("killed" if was_killed else "ended")
    if world.process.poller.outbox.n_in_memory:
        world.seen.add("ended with an outcome in memory")
    assert world.now - world.process.last_heartbeat <= MAX_HEARTBEAT_GAP_S
    world.process = None
    world.is_side, world.local = False, 0.0
    world.check_death(was_killed)
    # The start of a process takes a moment.
    world.spend(1.0)


def random_schedule(seed: int) -> tuple[list[tuple[float, Event]], Chooser, float]:
    """Events, faults and length of a schedule, from a seed."""
    rng = random.Random(seed)
    kinds: list[Event] = [
        *("job", "job", "job", "job", "again", "again", "down", "silent", "broken", "locked", "up", "up", "up", "full"),
        *("free", "free", "term", "kill", "kill", "post"),
    ]
    time_s, events = 0.0, []
    for _ in range(rng.randint(3, 12)):
        time_s += rng.choice((0.0, 0.3, 2.0, 7.0, 20.0))
        events.append((time_s, rng.choice(kinds)))
    random.seed(seed)
    return events, RandomChooser(rng, rng.choice((0.0, 0.03, 0.1))), time_s + rng.choice((0.0, 1.0, 30.0))


ALPHABET: tuple[Event, ...] = ("job", "again", "down", "up", "full", "free", "term", "kill", "wait")
# Each of these undoes the other; where its state is reached already it is the same as waiting.
_OPPOSITES: Mapping[Event, Event] = {"down": "up", "up": "down", "full": "free", "free": "full"}


def event_schedules(depth: int) -> Iterator[list[tuple[float, Event]]]:
    """Every sequence of `depth` events, seven seconds apart; the first is a job.

    Sequences that differ only in events without an effect (a full disk becomes full) are one.
    """

    def sequences(length: int, states: frozenset[Event]) -> Iterator[tuple[Event, ...]]:
        if length == 0:
            yield ()
            return
        for event in ALPHABET:
            if event in states:
                continue
            after = states - {_OPPOSITES[event]} | {event} if event in _OPPOSITES else states
            for rest in sequences(length - 1, after):
                yield event, *rest

    for sequence in sequences(depth - 1, frozenset(("up", "free"))):
        yield [(7.0 * number, event) for number, event in enumerate(("job", *sequence))]


def quick_rounds() -> dict[str, float]:
    """Values for the pauses of the claim loop, so that a schedule has few idle rounds."""
    return {name: IDLE_S for name in ("NOT_READY_S", "NO_ROOM_S") if hasattr(poller_module, name)}
