"""Python programs in processes that have imported the large libraries already: each start saves ten seconds of a core.

A helper process imports them once and forks a process for each program, which then runs as if it were started by its
command line: arguments, environment, folder, output, signals and exit status are its own. Our own modules are imported
in the program, never before. Tests of the start itself use real commands.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_MESSAGE_BYTES = 2**16
_POLL_S = 0.01


class WarmProcess:
    """A program of the helper, used as a `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stdout: int) -> None:
        """`arguments` are those behind the interpreter: `-m`, module and its arguments."""
        self.args = list(arguments)
        self.returncode: int | None = None
        self._status, status = os.pipe()
        os.set_blocking(self._status, False)
        request = json.dumps({"arguments": self.args, "cwd": str(cwd), "env": dict(env)}).encode()
        control = _helper()
        socket.send_fds(control, [request], [stdout, status])
        os.close(status)
        self.pid = int(control.recv(64))

    def poll(self) -> int | None:
        """The exit status (negative: a signal), None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                news = os.read(self._status, 16)
                self.returncode = int(news) if news else -signal.SIGKILL
                os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises TimeoutExpired."""
        ends = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if ends is not None and time.monotonic() > ends:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(_POLL_S)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


_started: list[tuple[subprocess.Popen[bytes], socket.socket]] = []


def _helper() -> socket.socket:
    if not _started:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.warm_start", str(theirs.fileno())],
                cwd=ROOT,
                env={**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        _started.append((process, ours))
        atexit.register(_stop)
    return _started[0][1]


def _stop() -> None:
    process, control = _started[0]
    control.close()
    process.wait()


# -- in the helper ----------------------------------------------------------------------------------------------------


def _import_libraries() -> None:
    import av
    import cv2
    import diffusers
    import flask
    import gunicorn.app.wsgiapp
    import PIL.Image
    import prometheus_client
    import requests
    import scipy.signal
    import torch
    import transformers.models.whisper.modeling_whisper
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import WhisperConfig, WhisperFeatureExtractor

    del av, cv2, diffusers, flask, gunicorn, PIL, prometheus_client, requests, scipy, torch, transformers
    del AutoencoderKL, UNet2DConditionModel, WhisperConfig, WhisperFeatureExtractor


def main() -> None:
    """Serve the control socket until it is closed; then end what still runs."""
    control = socket.socket(fileno=int(sys.argv[1]))
    _import_libraries()
    # A collection in a program would touch, and so copy, the memory of all that was imported here.
    gc.collect()
    gc.freeze()
    running: dict[int, int] = {}
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    while True:
        readable, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in readable:
            os.read(woken, _MESSAGE_BYTES)
            _reap(running)
        if control.fileno() in readable:
            data, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 2)
            if not data:
                break
            output, status = descriptors
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for descriptor in (control.fileno(), woken, wakes, status, *running.values()):
                    os.close(descriptor)
                control.detach()
                _become(json.loads(data), output)
            os.close(output)
            running[pid] = status
            control.send(str(pid).encode())
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _reap(running: dict[int, int]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            pipe = running.pop(pid)
            with contextlib.suppress(OSError):
                os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(pipe)


def _become(request: dict[str, Any], output: int) -> None:
    """Run the program in this forked process, which ends with it."""
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), line_buffering=True) for n in (1, 2))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    arguments = request["arguments"]
    status = 1
    try:
        if arguments[0] == "-m":
            sys.path[0], sys.argv = request["cwd"], arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(arguments[0]).resolve().parent), arguments
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # Forked processes of the program end here as well.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
