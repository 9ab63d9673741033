"""The decoder server: imports the decoders once and forks a process for each file that is to be read.

Started as a file by an isolated interpreter, so that neither the working directory nor the environment decides what it
imports. It never looks at a file itself, so no file can crash it. `musetalk.media.decoder` is its other end.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable

_MESSAGE_BYTES = 2**16


def main() -> int:
    """Serve the control socket whose descriptor is the first argument until it is closed; return the exit status."""
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = json.loads(control.recv(_MESSAGE_BYTES))["sys_path"]
    from musetalk.media.decoder_work import work

    # Objects that are never collected share their memory with the forked processes.
    gc.freeze()
    _Server(control, work).run()
    return 0


class _Server:
    """Forks, ends and reaps the processes that decode."""

    def __init__(self, control: socket.socket, work: Callable[[socket.socket, int | None], None]) -> None:
        self._control, self._work = control, work
        # Process id to (number of the task, pipe for its exit status).
        self._running: dict[int, tuple[int, int]] = {}

    def run(self) -> None:
        """Serve until the control socket is closed; then end what still runs."""
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        while True:
            readable, _, _ = select.select([self._control.fileno(), woken], [], [])
            if woken in readable:
                os.read(woken, _MESSAGE_BYTES)
                self._reap()
            if self._control.fileno() in readable and not self._serve():
                break
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)

    def _serve(self) -> bool:
        """Obey one message; return False at the end of the control socket."""
        data, descriptors, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES, 3)
        if not data:
            return False
        order, number = data.decode("ascii").split()
        if order == "run":
            self._fork(int(number), descriptors)
        else:
            self._kill(int(number))
        return True

    def _fork(self, number: int, descriptors: list[int]) -> None:
        channel, status, *shared = descriptors
        try:
            pid = os.fork()
        except OSError:
            # The other end sees that nobody answers.
            for descriptor in descriptors:
                os.close(descriptor)
            return
        if pid == 0:
            self._become_worker(channel, shared[0] if shared else None)
        self._running[pid] = (number, status)
        for descriptor in (channel, *shared):
            os.close(descriptor)

    def _become_worker(self, channel: int, shared: int | None) -> None:
        """Run one task in the forked process, which ends here."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            for _, pipe in self._running.values():
                os.close(pipe)
            self._work(socket.socket(fileno=channel), shared)
            status = 0
        finally:
            # Whatever was raised: the server's loop must not run twice.
            os._exit(status)

    def _kill(self, number: int) -> None:
        for pid, (task, _) in self._running.items():
            if task == number:
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            _, pipe = self._running.pop(pid)
            with contextlib.suppress(OSError):
                os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode("ascii"))
            os.close(pipe)


if __name__ == "__main__":
    sys.exit(main())
