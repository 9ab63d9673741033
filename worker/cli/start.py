"""The running part of run_worker.sh: the server, and beside it Salad's queue binary in queue mode.

With WORKER_GPUS it is a server for each card and a summary of them (worker/cli/fleet.py).

Salad's binary cuts its request when it is stopped, and sends a refused job to the same worker again within a second,
four times in all. So nothing may refuse it: an idle worker stops the binary first; a worker in a job lets the server
finish it, waits until the binary has passed the answer on, and stops the binary while the server still holds new jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from types import FrameType
from typing import Any

from musetalk.errors import SettingsError
from worker.cli.cards import EVERY_CARD, CardWorker, card_workers, choose_cards
from worker.cli.fleet import Child, Fleet
from worker.config import ROOT, Settings, load_settings, port_problem
from worker.process_variables import SCRIPT_PID

_POLL_S = 0.1
_READY_POLL_S = 0.5
# /hc answers in milliseconds; on a machine whose cores are all busy it may take longer.
_HEALTH_TIMEOUT_S = 5.0
# The binary ends in half a second; after this time it is killed.
_BINARY_ENDS_S = 5.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def say(message: str) -> None:
    """Log one line as the server does."""
    print(json.dumps({"severity": "info", "message": f"run_worker: {message}"}), flush=True)


class Pair:
    """The server and the binary, from the start of the first to the end of both."""

    def __init__(self, server: list[str], binary: str, port: int) -> None:
        """`server` is its command line, `binary` the path of Salad's program, `port` the one of /hc."""
        self._server_command, self._binary_command, self._port = server, binary, port
        self._n_signals = self._n_sent = 0

    def run(self) -> int:
        """Start both and wait for their end; return the exit status of the server, or 1 if the binary ended first."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        variables = {**os.environ, SCRIPT_PID: str(os.getpid())}
        self._server = subprocess.Popen(self._server_command, cwd=ROOT, env=variables)  # noqa: S603 - our own command
        self._binary: subprocess.Popen[bytes] | None = None
        while self._continues() and self._health().get("status") != "ok":
            time.sleep(_READY_POLL_S)
        if self._continues():
            say("ready; starting Salad's queue binary")
            self._binary = subprocess.Popen([self._binary_command])  # noqa: S603 - named by the operator
        while self._continues() and self._is_binary_alive():
            time.sleep(_POLL_S)
        if self._continues():
            say("Salad's queue binary has ended; stopping the server")
            self._stop_server()
            self._wait_for_server()
            return 1
        if self._is_server_alive():
            self._stop_both()
        status = self._wait_for_server()
        # Without its parent, the serving process finishes its job.
        while self._is_binary_alive() and _has_work(self._health()):
            time.sleep(_POLL_S)
        self._end_binary()
        # A negative number is the signal that ended the server.
        return status if status >= 0 else 128 - status

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._n_signals += 1

    def _is_server_alive(self) -> bool:
        return self._server.poll() is None

    def _is_binary_alive(self) -> bool:
        return self._binary is not None and self._binary.poll() is None

    def _continues(self) -> bool:
        return self._is_server_alive() and not self._n_signals

    def _health(self) -> dict[str, Any]:
        """The answer of /hc, also one of 503; empty if there is none."""
        try:
            with _NO_PROXY.open(f"http://localhost:{self._port}/hc", timeout=_HEALTH_TIMEOUT_S) as answer:
                text = answer.read(100_000)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(100_000)
        except OSError:
            return {}
        try:
            body = json.loads(text)
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

    def _stop_both(self) -> None:
        health = self._health() if self._is_binary_alive() else {}
        if not _has_work(health):
            self._end_binary()
        # The whole process group may have got the signal already.
        if health.get("status") != "draining":
            self._stop_server()
        self._n_sent = 1
        while self._is_server_alive() and self._is_binary_alive() and _has_work(self._health()):
            self._pass_further_signals()
            time.sleep(_POLL_S)
        self._end_binary()

    def _stop_server(self) -> None:
        if self._is_server_alive():
            self._server.send_signal(signal.SIGTERM)

    def _pass_further_signals(self) -> None:
        """Pass on each signal after the first: the server then aborts its job."""
        while self._n_sent < self._n_signals:
            self._n_sent += 1
            self._stop_server()

    def _wait_for_server(self) -> int:
        while self._is_server_alive():
            if self._n_sent:
                self._pass_further_signals()
            time.sleep(_POLL_S)
        return self._server.returncode

    def _end_binary(self) -> None:
        if self._binary is None or not self._is_binary_alive():
            return
        self._binary.terminate()
        try:
            self._binary.wait(_BINARY_ENDS_S)
        except subprocess.TimeoutExpired:
            self._binary.kill()
            self._binary.wait()


def _has_work(health: dict[str, Any]) -> bool:
    """Whether the binary still waits for an answer, or passes one on."""
    return bool(health.get("busy") or health.get("delivering"))


def _configuration() -> str:
    """The file of Gunicorn's settings, from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m worker.cli.start",
        description="Start the worker, and in queue mode Salad's queue binary beside it; run_worker.sh calls this. "
        "Settings come from the environment and .env.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", default="gunicorn.conf.py", metavar="FILE", help="Gunicorn's configuration (gunicorn.conf.py)"
    )
    return str(parser.parse_args().config)


def _workers(settings: Settings) -> list[CardWorker]:
    """The workers that WORKER_GPUS asks for; raises SettingsError."""
    if not settings.is_buffer_mode:
        raise SettingsError(
            "WORKER_GPUS needs buffer mode (WORKER_MODE=buffer): a queue knows one address and sends it one job at a "
            "time. For a queue start a container for each card"
        )
    if settings.device == "cpu" and settings.worker_gpus != EVERY_CARD:
        # No card is used, so the list only counts the workers.
        cards = list(settings.worker_gpus)
    else:
        cards = choose_cards(settings.worker_gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return card_workers(settings, cards, os.environ)


def _fleet(settings: Settings, workers: Sequence[CardWorker], configuration: str) -> Fleet:
    """A server for each worker and the summary of them, not started yet."""
    gunicorn = ["-m", "gunicorn", "--config"]
    cards = [Child(f"card {each.card}", [*gunicorn, configuration], each.variables) for each in workers]
    places = tuple((each.card, each.worker_id, each.port) for each in workers)
    arguments = [*gunicorn, "python:worker.cli.summary_conf", f"worker.cli.summary:create_app({places!r})"]
    summary = Child("summary", arguments, {}, own_group=True)
    return Fleet(cards, summary, graceful_s=settings.graceful_timeout_s, say=say)


def _run_fleet(settings: Settings, workers: Sequence[CardWorker], configuration: str) -> int:
    """Run a server for each card; return the exit status."""
    for port in (settings.port, *(each.port for each in workers)):
        if (problem := port_problem(settings.listen_host, port)) is not None:
            print(f"error: {problem}", file=sys.stderr)
            return 1
    say(
        f"starting {len(workers)} workers, on ports {workers[0].port} to {workers[-1].port}; summary on {settings.port}"
    )
    return _fleet(settings, workers, configuration).run()


def main() -> int:
    """Start what the settings ask for; return the exit status (2: wrong settings or arguments)."""
    configuration = _configuration()
    try:
        settings = load_settings()
        workers = _workers(settings) if settings.worker_gpus else []
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if workers:
        return _run_fleet(settings, workers, configuration)
    server = [sys.executable, "-m", "gunicorn", "--config", configuration]
    binary = None if settings.is_buffer_mode else shutil.which(settings.salad_queue_worker)
    if binary is None:
        if not settings.is_buffer_mode:
            say("Salad's queue binary not found; jobs arrive only at /generate")
        os.chdir(ROOT)
        # The server itself receives the signals.
        os.execv(sys.executable, server)  # noqa: S606 - our own command line
    return Pair(server, binary, settings.port).run()


if __name__ == "__main__":
    sys.exit(main())
