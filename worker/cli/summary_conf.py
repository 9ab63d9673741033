"""Gunicorn's configuration of the summary: one process on WORKER_PORT with the server class of the worker."""

from __future__ import annotations

from worker.config import bind_addresses, load_settings
from worker.telemetry import gunicorn_logging

_settings = load_settings()

bind = bind_addresses(_settings.listen_host, _settings.port)
workers = 1
# Slow clients hold none of its threads.
worker_class = "worker.server.Server"
timeout = 60
graceful_timeout = 5
keepalive = 5
preload_app = False
# The control socket lets anyone with this user id stop the server.
control_socket_disable = True
accesslog = None
errorlog = "-"
loglevel = "warning"
logconfig_dict = gunicorn_logging("WARNING")
