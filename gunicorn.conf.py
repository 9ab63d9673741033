"""Gunicorn: one worker process (one GPU, one set of models), threads so that /hc answers while a job runs.

Every value that Gunicorn would take from its own environment variables (PORT, WEB_CONCURRENCY) is set here. The hooks
start and stop the claim loop of buffer mode, of which Gunicorn itself knows nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

# Gunicorn runs this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from musetalk.errors import SettingsError
from worker.config import bind_addresses, load_settings

try:
    _settings = load_settings()
except SettingsError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

wsgi_app = "app:create_app()"
bind = bind_addresses(_settings.host, _settings.port)
workers = 1
worker_class = "gthread"
# One thread is held by the running job; silent connections hold a thread for up to 5 s each.
threads = 16
# Sign of life of the process, not a limit on requests (gthread): loading and compiling may hold the interpreter.
timeout = 300
graceful_timeout = int(_settings.graceful_timeout_s)
keepalive = 5
# Importing the app in the parent would put CUDA on the wrong side of the fork.
preload_app = False
# The control socket lets anyone with this user id stop the server.
control_socket_disable = True
accesslog = None
errorlog = "-"
loglevel = "info"
# Gunicorn's own lines in the form of ours.
logconfig_dict = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "worker.telemetry.JsonFormatter"}},
    "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}},
    "root": {"level": "WARNING", "handlers": ["stdout"]},
    "loggers": {"gunicorn.error": {"level": "INFO", "handlers": ["stdout"], "propagate": False}},
}

# The parent tells the worker with this one that a second SIGTERM came.
_ABORT = signal.SIGUSR2


def when_ready(server: Any) -> None:
    """In the parent, with its signal handlers in place: a second SIGTERM, which Gunicorn ignores, means abort."""
    previous = signal.getsignal(signal.SIGTERM)
    n_signals = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal n_signals
        n_signals += 1
        if n_signals > 1:
            for pid in list(server.WORKERS):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, _ABORT)
        if callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, stop)


def post_fork(_server: Any, _worker: Any) -> None:
    """In the worker process, before the app is imported: start the claim loop in buffer mode."""
    # Until Gunicorn sets the worker's own handlers the parent's would take the signal here and do nothing with it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not _settings.is_buffer_mode:
        return
    import poller
    from musetalk_core import shared_core

    core = shared_core()
    missing = [
        name
        for name, value in (
            ("ORCHESTRATOR_BASE_URL", _settings.orchestrator_url or _settings.buffer_orchestrator_url),
            ("INTERNAL_API_KEY", _settings.internal_api_key),
        )
        if not value
    ]
    if missing:
        core.status.fail(f"buffer mode needs {' and '.join(missing)}")
        return
    poller.start(core)


def post_worker_init(_worker: Any) -> None:
    """Stop claiming with the first SIGTERM; Gunicorn calls worker_exit only when no request is left."""
    from musetalk_core import shared_core
    from poller import running
    from worker.lifecycle import Lifecycle

    lifecycle = Lifecycle(shared_core(), running, graceful_s=_settings.graceful_timeout_s)
    lifecycle.start()
    previous = signal.getsignal(signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        lifecycle.say("stop")
        if callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(_ABORT, lambda _number, _frame: lifecycle.say("abort"))


def worker_exit(_server: Any, _worker: Any) -> None:
    """Let the claim loop end: its running job is stopped in time by the lifecycle, its last report goes out here."""
    from poller import running

    loop = running()
    if loop is None:
        return
    loop.stop()
    loop.join(_settings.graceful_timeout_s)
