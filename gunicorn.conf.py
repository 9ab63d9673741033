"""Gunicorn: one worker process (one GPU, one set of models), threads so that /hc answers while a job runs.

Every value that Gunicorn would take from its own environment variables (PORT, WEB_CONCURRENCY) is set here.
"""

from __future__ import annotations

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
