"""The demo job alone and beside a busy process: what tensor threads that wait for each other cost, by their setting.

    .venv/bin/python -m benchmarks.neighbour [--rounds 5] [--settings fixed,own,passive,4000]
        [--seconds 0] [--json FILE]

`fixed` keeps the number of threads, `own` is the worker's way (fewer while others want the cores), `passive` is `fixed`
with threads that never wait by spinning, a number is `fixed` with that count of spins. Each round loads the demo model
once for each setting and runs the demo pair, as a new source, twice: alone, and beside one process that keeps a core
busy. The order changes with every round. Run it on a machine that does nothing else: the medians are compared.
"""

from __future__ import annotations

from benchmarks import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped options are answered at once.
    arguments.neighbour(__doc__)

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine
from musetalk.cores import thread_count
from worker.config import ROOT

# Of the OpenMP library that torch's Linux wheels contain (GNU's): how long its threads wait by spinning.
_SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_MEDIA = ROOT / "demo/media"
SITUATIONS = ("alone", "beside")
# Goals: a job beside a neighbour over a lone one whose threads are fixed (24 s over 14 s where they were set), and the
# share by which a lone job may be slower.
_BESIDE, _SLOWER = 24 / 14, 0.03


@dataclass(frozen=True)
class Run:
    """One job: the setting, the situation, seconds by the clock and of the processor."""

    setting: str
    situation: str
    wall_s: float
    cpu_s: float


def variables_of(setting: str) -> dict[str, str]:
    """The environment of a child process with this setting."""
    environment = {name: value for name, value in os.environ.items() if name not in _SPINNING}
    # The number of threads is the worker's choice here, whatever the caller of this benchmark has.
    environment.pop("OMP_NUM_THREADS", None)
    if setting == "passive":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    elif setting not in ("fixed", "own"):
        environment["GOMP_SPINCOUNT"] = str(int(setting))
    return environment


@contextlib.contextmanager
def neighbour(is_there: bool) -> Iterator[None]:
    """Keep a core busy with another process inside the block."""
    if not is_there:
        yield
        return
    process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run_setting(setting: str, situations: tuple[str, ...], given: argparse.Namespace) -> list[Run]:
    """Load the demo model with this setting and run the job once in each situation."""
    # A number that is given stays; 0 lets the worker choose, and choose again.
    threads = 0 if setting == "own" else given.threads or thread_count()
    options = ["--threads", str(threads), "--seconds", str(given.seconds)]
    command = [sys.executable, "-m", "benchmarks.neighbour", "--child", *options]
    child = subprocess.Popen(
        command, cwd=ROOT, env=variables_of(setting), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    runs = []
    try:
        _expect(child.stdout.readline(), "ready")
        for situation in situations:
            with neighbour(situation == "beside"):
                child.stdin.write("run\n")
                child.stdin.flush()
                runs.append(Run(setting, situation, **json.loads(_expect(child.stdout.readline(), "{"))))
    finally:
        child.stdin.close()
        child.wait()
    return runs


def _expect(line: str, start: str) -> str:
    if not line.startswith(start):
        raise SystemExit("error: the process that runs the job has ended; see its error above")
    return line


def be_child(threads: int, seconds: float) -> None:
    """Load the model, then run a job and print its seconds for each line of the standard input."""
    from benchmarks.job import start_core
    from benchmarks.material import make_audio
    from benchmarks.measuring import cpu_seconds
    from worker.jobs import JobParams

    with tempfile.TemporaryDirectory(prefix="neighbour-") as name:
        folder = Path(name)
        speech = _MEDIA / "speech.flac"
        if seconds > 0:
            speech = folder / "speech.wav"
            make_audio(speech, Fraction(seconds))
        given = argparse.Namespace(device="cpu", threads=threads, dtype="", batch=8, model="demo", acceleration="none")
        core = start_core(given, folder)
        # Every job is about a new source.
        core.engine = replace(core.engine, avatars=None)
        print("ready", flush=True)
        for _ in sys.stdin:
            wall, cpu = time.perf_counter(), cpu_seconds()
            core.render(_MEDIA / "avatar.mp4", speech, folder / "output.mp4", JobParams())
            spent = {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}
            print(json.dumps(spent), flush=True)
            (folder / "output.mp4").unlink()


def medians(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Setting -> situation -> median seconds by the clock."""
    settings = dict.fromkeys(run.setting for run in runs)
    return {
        setting: {
            situation: statistics.median(
                run.wall_s for run in runs if (run.setting, run.situation) == (setting, situation)
            )
            for situation in SITUATIONS
        }
        for setting in settings
    }


def table(runs: list[Run]) -> str:
    """The medians as text, each with its ratio to the first setting's, and the single runs."""
    found = medians(runs)
    first = next(iter(found.values()))
    lines = [f"{'setting':<10}{'alone s':>9}{'':>8}{'beside s':>10}{'':>8}  single runs: alone | beside"]
    for setting, seconds in found.items():
        shown = f"{setting:<10}"
        for situation, width in zip(SITUATIONS, (9, 10), strict=True):
            shown += f"{seconds[situation]:>{width}.2f}{seconds[situation] / first[situation] - 1:>+8.1%}"
        singles = [
            " ".join(f"{run.wall_s:.1f}" for run in runs if (run.setting, run.situation) == (setting, situation))
            for situation in SITUATIONS
        ]
        lines.append(f"{shown}  {' | '.join(singles)}")
    return "\n".join(lines)


def main() -> None:
    """Run all rounds and print the medians."""
    given = arguments.neighbour(__doc__)
    if given.child:
        be_child(given.threads, given.seconds)
        return
    # The processes that it starts must end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = given.settings.split(",")
    runs: list[Run] = []
    for number in range(given.rounds):
        order = settings[number % len(settings) :] + settings[: number % len(settings)]
        situations = SITUATIONS if number % 2 == 0 else SITUATIONS[::-1]
        for setting in order:
            made = run_setting(setting, situations, given)
            runs += made
            print(f"{setting}: " + ", ".join(f"{run.situation} {run.wall_s:.2f} s" for run in made), flush=True)
    print(table(sorted(runs, key=lambda run: settings.index(run.setting))))
    print(f"goals: beside at most {_BESIDE:.2f} times as long as alone, alone at most {_SLOWER:.0%} slower than fixed")
    if given.json is not None:
        facts: dict[str, Any] = {"machine": machine(), "runs": [asdict(run) for run in runs], "medians": medians(runs)}
        given.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
