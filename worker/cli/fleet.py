"""The workers of one machine as one program: a server for each card, and a summary of them on WORKER_PORT.

A server that ends is started again. Signals go to all, and the program ends when all have ended. Knows processes and
signals; nothing of cards, settings and HTTP.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from worker.config import ROOT
from worker.process_variables import SCRIPT_PID

_POLL_S = 0.1
# The first restart is quick; a server that cannot start must not keep a core busy.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
# A server that ran so long did not fail at its start.
_LONG_RUN_S = 600.0
# Gunicorn kills its worker at the end of the graceful time, and then has to end itself.
_AFTER_GRACEFUL_S = 20.0
_SUMMARY_ENDS_S = 10.0
# Asks the system for SIGTERM when this program is killed, then becomes the server: nobody else would stop it, and it
# has the port, the folder and the card.
_END_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Child:
    """One server: its name in the log, its command line without the interpreter, and what its environment adds."""

    def __init__(self, name: str, arguments: Sequence[str], variables: Mapping[str, str], *, own_group: bool = False):
        """`own_group`: signals to the group of this program do not reach it."""
        self.name = name
        self._arguments, self._variables, self._own_group = list(arguments), dict(variables), own_group
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._starts_at = 0.0
        self._n_failures = 0

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The id of its process; None while it waits for its start."""
        return None if self._process is None else self._process.pid

    @property
    def status(self) -> int:
        """The exit status as a shell reports it: 128 and the number for a signal; 0 while it runs or waits."""
        code = self._process.returncode if self._process is not None else 0
        return 0 if code is None else code if code >= 0 else 128 - code

    def start(self) -> None:
        """Start the process."""
        self._started = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-c", _END_WITH_PARENT, str(os.getpid()), *self._arguments],
            cwd=ROOT,
            env={**os.environ, **self._variables, SCRIPT_PID: str(os.getpid())},
            start_new_session=self._own_group,
        )

    def revive(self, say: Callable[[str], None]) -> None:
        """Start a process that has ended again, after a pause that doubles while it fails at once."""
        now = time.monotonic()
        if self.is_alive:
            return
        if self._process is not None:
            self._n_failures = 1 if now - self._started > _LONG_RUN_S else self._n_failures + 1
            pause = min(_FIRST_PAUSE_S * 2 ** (self._n_failures - 1), _LONGEST_PAUSE_S)
            say(f"{self.name}: the server ended with status {self.status}; it starts again in {pause:g} s")
            self._process, self._starts_at = None, now + pause
        if now >= self._starts_at:
            self.start()

    def signal(self, number: int) -> None:
        """Send a signal if the process runs."""
        if self._process is not None and self.is_alive:
            self._process.send_signal(number)

    def end(self, limit_s: float) -> None:
        """Stop the process, by force after `limit_s`."""
        self.signal(signal.SIGTERM)
        if self._process is not None:
            try:
                self._process.wait(limit_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class Fleet:
    """All servers, from the start of the first to the end of the last."""

    def __init__(
        self, cards: Sequence[Child], summary: Child, *, graceful_s: float, say: Callable[[str], None]
    ) -> None:
        """`graceful_s` is the time that a server takes at most for its end; `say` logs a line."""
        self._cards, self._summary = list(cards), summary
        self._graceful_s, self._say = graceful_s, say
        self._n_signals = 0

    def run(self) -> int:
        """Start all, restart what ends until a signal comes, stop all; return the highest exit status of a card."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, self._on_signal)
        while not self._n_signals:
            for child in (*self._cards, self._summary):
                child.revive(self._say)
            time.sleep(_POLL_S)
        status = self._stop()
        # The last: it answers probes while the others finish their jobs.
        self._summary.end(_SUMMARY_ENDS_S)
        return status

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._n_signals += 1

    def _stop(self) -> int:
        """Pass on every signal, the second one too, which aborts jobs; wait for the end of all cards."""
        waiting = [child for child in self._cards if child.is_alive]
        n_sent, ends = 0, time.monotonic() + self._graceful_s + _AFTER_GRACEFUL_S
        while any(child.is_alive for child in waiting):
            while n_sent < self._n_signals:
                n_sent += 1
                for child in waiting:
                    child.signal(signal.SIGTERM)
            if time.monotonic() > ends:
                for child in waiting:
                    child.end(0)
            time.sleep(_POLL_S)
        # A server that the signal met before it had its handlers ended by it.
        asked = 128 + signal.SIGTERM
        return max((child.status for child in waiting if child.status != asked), default=0)
