"""Gunicorn: one worker process (one GPU, one set of models), threads so that /hc answers while a job runs.

Every value that Gunicorn would take from its own environment variables (PORT, WEB_CONCURRENCY) is set here. The hooks
start and stop the claim loop of buffer mode, of which Gunicorn itself knows nothing.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

# Gunicorn runs this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from config import load_settings

_settings = load_settings()

wsgi_app = "app:create_app()"
bind = f"{_settings.host}:{_settings.port}"
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
loglevel = "warning"

# Left for the last reports after the running job was told to stop, before Gunicorn kills the process.
_LAST_WORDS_S = 5.0


def post_fork(_server: Any, _worker: Any) -> None:
    """In the worker process, before the app is imported: start the claim loop in buffer mode."""
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
        core.refuse(f"buffer mode needs {' and '.join(missing)}")
        return
    poller.start(core)


def post_worker_init(_worker: Any) -> None:
    """Stop claiming with the first SIGTERM; Gunicorn calls worker_exit only when no request is left."""
    # Imported here and not in the handler: a second signal would come in the middle of the first one's import.
    from musetalk_core import shared_core
    from poller import running

    core, previous = shared_core(), signal.getsignal(signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        core.drain()
        if (loop := running()) is not None:
            loop.stop()
        if callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, stop)


def worker_exit(_server: Any, _worker: Any) -> None:
    """Let the running job end, or hand it back as retryable when the time is over."""
    from poller import running

    loop = running()
    if loop is None:
        return
    loop.stop()
    if not loop.join(max(0.0, _settings.graceful_timeout_s - 2 * _LAST_WORDS_S)):
        loop.abandon()
        loop.join(_LAST_WORDS_S)
