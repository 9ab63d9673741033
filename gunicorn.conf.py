"""Gunicorn: one worker process (one GPU, one set of models), with a worker class that keeps /hc answering.

Every value that Gunicorn would read from its own environment variables (PORT, WEB_CONCURRENCY) is set here. The hooks
start and stop the claim loop of buffer mode, which Gunicorn knows nothing of.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

# Gunicorn runs this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from musetalk.errors import SettingsError
from worker.config import bind_addresses, exposure_problem, load_settings, port_problem
from worker.process_variables import card_of_process, is_started_by_script
from worker.telemetry import add_to_every_line, gunicorn_logging

try:
    _settings = load_settings()
except SettingsError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

wsgi_app = "app:create_app()"
bind = bind_addresses(_settings.listen_host, _settings.port)
workers = 1
# Derived from Gunicorn's `gthread`; it has its own numbers of threads and connections.
worker_class = "worker.server.Server"
# Watchdog of the process, not a limit on requests (gthread): loading and compiling may hold the interpreter.
timeout = 300
graceful_timeout = int(_settings.graceful_timeout_s)
keepalive = 5
# Importing the app in the parent would initialise CUDA before the fork, which CUDA does not survive.
preload_app = False
# The control socket lets anyone with this user id stop the server.
control_socket_disable = True
accesslog = None
errorlog = "-"
loglevel = "info"
logconfig_dict = gunicorn_logging("INFO")

# The parent sends this to the worker after a second SIGTERM.
_ABORT = signal.SIGUSR2
# An idle worker ends within five seconds, also when the orchestrator is away.
LAST_PROGRESS_S = 3.0
# run_worker.sh passes on a signal that the process group has received as well; within this time the two are one.
_PASSED_ON_S = 2.0
_is_started_by_script = is_started_by_script()
# The servers of several cards write to one output.
if (_card := card_of_process()) is not None:
    add_to_every_line(card=_card)


def on_starting(server: Any) -> None:
    """In the parent, before it listens: end the start in one line when the port cannot be used."""
    # After SIGUSR2 the new parent inherits the sockets of the old one.
    if server.master_pid:
        return
    problem = port_problem(_settings.listen_host, _settings.port)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)


def when_ready(server: Any) -> None:
    """In the parent, after its signal handlers: make a second SIGTERM, which Gunicorn ignores, an abort."""
    previous = signal.getsignal(signal.SIGTERM)
    n_signals, last = 0, 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal n_signals, last
        now = time.monotonic()
        if n_signals and _is_started_by_script and now - last < _PASSED_ON_S:
            return
        n_signals, last = n_signals + 1, now
        if n_signals > 1:
            for pid in list(server.WORKERS):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, _ABORT)
        if callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, stop)


def post_fork(_server: Any, _worker: Any) -> None:
    """In the worker process, before the app is imported: start the claim loop in buffer mode."""
    # Until Gunicorn installs the worker's handlers, those of the parent would swallow the signal here.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not _settings.is_buffer_mode:
        return
    import poller
    from musetalk_core import shared_core

    poller.start(shared_core())


def post_worker_init(worker: Any) -> None:
    """Stop claiming at the first SIGTERM; Gunicorn calls worker_exit only when no request is left."""
    from musetalk_core import shared_core
    from poller import running
    from worker.lifecycle import Lifecycle
    from worker.telemetry import logger

    if (problem := exposure_problem(_settings, _settings.listen_host)) is not None:
        logger.warning(problem)
    if _settings.worker_gpus and _card is None:
        logger.warning("WORKER_GPUS has no effect here; start the worker with run_worker.sh")
    # /hc answers while the claim loop finishes its job.
    worker.still_working = lambda: (loop := running()) is not None and not loop.join(0)
    lifecycle = Lifecycle(
        shared_core(), running, graceful_s=_settings.graceful_timeout_s, end_process=worker.end_for_successor
    )
    lifecycle.start()
    previous = signal.getsignal(signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        lifecycle.request("stop")
        if callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(_ABORT, lambda _number, _frame: lifecycle.request("abort"))


def worker_exit(_server: Any, _worker: Any) -> None:
    """Wait for the claim loop: the lifecycle stops its running job in time, its last report is sent here."""
    from poller import running
    from worker.progress_sender import wait_for_last_reports

    # The answers of queue mode do not wait for these.
    wait_for_last_reports(LAST_PROGRESS_S)
    loop = running()
    if loop is None:
        return
    loop.stop()
    loop.join(_settings.graceful_timeout_s)
