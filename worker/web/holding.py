"""Requests that wait instead of being refused: while the models load, and while the process stops.

Salad's queue gives a job four attempts within seconds, and every refusal costs one. A request that waits costs nothing,
and one that is cut by the end of the process costs a single attempt. Knows the WSGI environment; no jobs, no core.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

_POLL_S = 0.1
# Salad's binary passes our answer to its queue; meanwhile it must not be stopped.
DELIVERY_S = 1.0
_CLOSED = select.POLLERR | select.POLLHUP | select.POLLNVAL | getattr(select, "POLLRDHUP", 0)


class CallerGoneError(Exception):
    """The caller closed its connection while its request waited."""


def is_caller_gone(environ: Mapping[str, Any]) -> bool:
    """Whether the caller has closed its connection; False where the server does not show it."""
    sock = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    if sock is None:
        return False
    watch = select.poll()
    try:
        watch.register(sock, getattr(select, "POLLRDHUP", 0))
    except (OSError, ValueError):
        return True
    return any(events & _CLOSED for _, events in watch.poll(0))


def wait_while(condition: Callable[[], bool], environ: Mapping[str, Any], limit_s: float) -> None:
    """Wait until `condition()` is false or `limit_s` is over; raises CallerGoneError when the caller goes away."""
    connection = environ.get("musetalk.connection")
    ends = time.monotonic() + limit_s
    with connection.waiting() if connection is not None else nullcontext():
        while condition() and time.monotonic() < ends:
            if is_caller_gone(environ):
                raise CallerGoneError
            time.sleep(_POLL_S)


class Deliveries:
    """Answers of `POST /generate` on their way, so that nobody stops Salad's binary before it has passed them on."""

    def __init__(self) -> None:
        self._changed = threading.Lock()
        self._n_open = self._n_held = 0
        self._last_answer = float("-inf")

    def begin(self) -> None:
        """Note that a request has arrived."""
        with self._changed:
            self._n_open += 1

    def end(self) -> None:
        """Note that the last byte of a request's answer was sent."""
        with self._changed:
            self._n_open -= 1
            self._last_answer = time.monotonic()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A request that will not be answered any more, inside the block."""
        with self._changed:
            self._n_held += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_held -= 1

    @property
    def is_busy(self) -> bool:
        """Whether an answer is still to be sent."""
        return self._n_open > self._n_held

    @property
    def is_delivering(self) -> bool:
        """Whether the caller may still be passing on the last answer; not once it has sent another request."""
        return self._n_held == 0 and time.monotonic() - self._last_answer < DELIVERY_S
