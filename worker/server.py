"""Gunicorn's threaded worker, in which a slow client holds no thread and a stopping process still answers /hc.

Gunicorn's `gthread` gives each new connection a thread and reads its request there, so that sixteen unfinished requests
silence the server. Here the main loop receives each head, and a small body with it; a thread gets complete requests
only. /hc has threads of its own. At SIGTERM the server continues to accept connections until its work is done: probes
get the reason, and the app holds new jobs. Knows Gunicorn and sockets; nothing of Flask and jobs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from gunicorn.http.errors import NoMoreData
from gunicorn.workers.gthread import ThreadWorker

from worker.receiving import HEAD_S, LINGER_S, MAX_DROPPED_BYTES, Connection

# The running job, other requests, and a few that wait for their turn.
REQUEST_THREADS = 16
# For bodies that are too large for the main loop; each waits for its client.
STREAM_THREADS = 8
PROBE_THREADS = 4
PROBE_PATH = b"/hc"
# Requests that wait for a thread; beyond it the server refuses, so that /hc keeps a place.
MAX_UNANSWERED = 256
# Above 1024 descriptors a library that calls select() would fail, and 700 clients are more than any worker has.
MAX_CONNECTIONS = 700
# For the job's files, its child processes, the orchestrator, the bucket.
RESERVED_DESCRIPTORS = 256
WANTED_DESCRIPTORS = 65_536
# A stopping process that has finished a job stays this long, so that Salad's binary can be stopped before its port is
# closed; one that was idle ends sooner.
AFTER_WORK_S = 3.0
AFTER_NOTHING_S = 0.3
# Time from SIGTERM for clients to fetch answers that were ready before.
FETCH_S = 2.0

_ACCEPTED_AT_ONCE = 64
_PAUSE_WITHOUT_DESCRIPTORS_S = 0.2
_REFUSALS = {
    400: b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    408: b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    503: b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
}


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files as far as the system allows; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, WANTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return WANTED_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def connection_limit(n_descriptors: int) -> int:
    """Connections that may be open at once, so that `n_descriptors` also suffice for a job."""
    return max(8, min(MAX_CONNECTIONS, n_descriptors - min(RESERVED_DESCRIPTORS, n_descriptors // 2)))


class Pool:
    """Daemon threads that work off a queue; at the end of the process nothing waits for them.

    The interpreter waits for the threads of an executor, so one silent client would keep the process alive.
    """

    def __init__(self, name: str, n_threads: int) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for number in range(n_threads):
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` in the next free thread; it must not raise."""
        self._work.put(work)

    def shutdown(self, wait: bool = True) -> None:
        """Do nothing; Gunicorn calls it before the process ends."""

    def _run(self) -> None:
        while True:
            self._work.get()()


class Server(ThreadWorker):  # type: ignore[misc]  # Gunicorn has no types
    """The worker process of Gunicorn; `still_working` says whether work outside of requests is left at a stop."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.still_working: Callable[[], bool] = lambda: False
        self._current = threading.local()
        self._receiving: set[Connection] = set()
        self._handling: set[Connection] = set()
        self._accept_after = 0.0
        self._stop_began: float | None = None
        self._last_work = 0.0
        self._is_orphan = self._has_successor = False
        self._n_quits = 0

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """End the start when TLS is configured, which this worker does not speak."""
        if cfg.is_ssl:
            log.error("this server speaks plain HTTP only; put a proxy in front of it for TLS")
            sys.exit(1)

    def init_process(self) -> None:
        """Raise the limit of open files, start the threads, then serve until the process is stopped."""
        self.worker_connections = connection_limit(raise_descriptor_limit())
        super().init_process()

    def get_thread_pool(self) -> Pool:
        """Start all threads; return those of usual requests."""
        self._probes = Pool("probe", PROBE_THREADS)
        self._streams = Pool("stream", STREAM_THREADS)
        return Pool("request", REQUEST_THREADS)

    def load_wsgi(self) -> None:
        """Import the app; each request finds its connection in the WSGI environment."""
        super().load_wsgi()
        app: Any = self.wsgi  # type: ignore[has-type]  # set by Gunicorn

        def with_connection(environ: dict[str, Any], start_response: Any) -> Any:
            connection: Connection = self._current.connection
            environ["musetalk.connection"] = connection

            def start(*given: Any) -> Any:
                # Gunicorn decided before the request was handled, and a job takes minutes.
                if not self.alive:
                    start_response.__self__.force_close()
                return start_response(*given)

            answer = app(environ, start)
            connection.answered = time.monotonic()
            return answer

        self.wsgi = with_connection

    # -- signals ------------------------------------------------------------------------------------------------------

    def handle_quit(self, number: int, frame: FrameType | None) -> None:
        """Stop as at SIGTERM at the first Ctrl-C, which also comes from the parent; end at once at a later one."""
        self._n_quits += 1
        if self._n_quits > 2:
            super().handle_quit(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)

    def end_for_successor(self) -> None:
        """Stop this process so that Gunicorn starts another; new connections wait for that one."""
        self._has_successor = True
        os.kill(os.getpid(), signal.SIGTERM)

    # -- the main loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until SIGTERM, then until the work is done or the graceful time is over."""
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        self.set_accept_enabled(True)
        while self.alive or not self._is_done():
            self.notify()
            self._follow_parent()
            self._resume_accepting()
            self.wait_for_and_dispatch_events(timeout=1.0 if self.alive and self._accepting else 0.1)
            self._close_overdue()
        for listener in self.sockets:
            listener.close()
        # Threads that wait for a client continue with an error.
        for connection in (*self._receiving, *self._handling):
            connection.close()

    def _follow_parent(self) -> None:
        """Stop when the parent process has died: nobody else would stop this one, and it holds port, folder and GPU."""
        if self._is_orphan or self.is_parent_alive():
            return
        self._is_orphan = True
        os.kill(os.getpid(), signal.SIGTERM)
        timer = threading.Timer(self.cfg.graceful_timeout, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def _is_done(self) -> bool:
        """Whether a stopping process may end; a request that waits for its own client does not keep it."""
        now = time.monotonic()
        if self._stop_began is None:
            self._stop_began = now
            self._last_work = now - AFTER_WORK_S + AFTER_NOTHING_S
        if now - self._stop_began > self.cfg.graceful_timeout:
            return True
        work = [each for each in self._handling if each.is_started and not each.is_waiting and not each.is_probe]
        if self.still_working() or any(each.answered is None for each in work):
            self._last_work = now
        if work and now - self._stop_began < FETCH_S:
            return False
        return now - self._last_work > (AFTER_NOTHING_S if self._has_successor else AFTER_WORK_S)

    # -- connections --------------------------------------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        """Accept waiting connections; without room, the oldest one that has sent no whole request is closed."""
        for _ in range(_ACCEPTED_AT_ONCE):
            if self.nr_conns >= self.worker_connections and not self._close_oldest():
                self._pause_accepting()
                return
            try:
                sock, client = listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                # No descriptor or no memory is left. The connections that are open must not end with the process.
                self.log.warning("connections refused: %s", error.strerror)
                self._close_oldest()
                self._pause_accepting()
                return
            self.nr_conns += 1
            self._receive(Connection(self.cfg, sock, client, listener.getsockname()))

    def _pause_accepting(self) -> None:
        self._accept_after = time.monotonic() + _PAUSE_WITHOUT_DESCRIPTORS_S
        self.set_accept_enabled(False)

    def _resume_accepting(self) -> None:
        if self._has_successor:
            self.set_accept_enabled(False)
        elif not self._accepting and time.monotonic() >= self._accept_after:
            self.set_accept_enabled(True)

    def _close_oldest(self) -> bool:
        """Close the connection that has waited longest without a whole request; return whether there was one."""
        if not self._receiving:
            return False
        self._drop(min(self._receiving, key=lambda connection: connection.deadline))
        return True

    def _close_overdue(self) -> None:
        now = time.monotonic()
        for connection in [each for each in self._receiving if each.deadline < now]:
            if connection.has_begun and not connection.is_closing:
                self._refuse(connection, 408)
            else:
                self._drop(connection)

    def _receive(self, connection: Connection) -> None:
        """Read from the connection in the main loop."""
        connection.sock.setblocking(False)
        self._receiving.add(connection)
        self.poller.register(connection.sock, selectors.EVENT_READ, partial(self._on_readable, connection))

    def _stop_receiving(self, connection: Connection) -> None:
        self._receiving.discard(connection)
        with contextlib.suppress(OSError, KeyError, ValueError):
            self.poller.unregister(connection.sock)

    def _on_readable(self, connection: Connection, _sock: Any) -> None:
        # Another one may have been closed for want of room since the event.
        if connection not in self._receiving:
            return
        try:
            self._read(connection)
        except Exception:  # any error here would end the process, and the running job with it
            self.log.exception("connection failed")
            self._drop(connection)

    def _read(self, connection: Connection) -> None:
        """Take what the client has sent."""
        try:
            data = connection.sock.recv(65_536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        connection.n_dropped += len(data) if connection.is_closing else 0
        if not data or connection.n_dropped > MAX_DROPPED_BYTES:
            self._drop(connection)
        elif not connection.is_closing:
            if not connection.has_begun:
                connection.deadline = time.monotonic() + HEAD_S
            connection.buffer += data
            self._advance(connection)

    def _advance(self, connection: Connection) -> None:
        """Pass a complete request to a thread."""
        if connection.is_malformed:
            self._refuse(connection, 400)
            return
        if not connection.is_complete():
            return
        connection.is_probe = connection.path == PROBE_PATH and not connection.is_streamed
        if len(self._handling) >= MAX_UNANSWERED and not connection.is_probe:
            self._refuse(connection, 503)
            return
        self._stop_receiving(connection)
        self._handling.add(connection)
        pool = self._streams if connection.is_streamed else self._probes if connection.is_probe else self.tpool
        pool.submit(partial(self._handle, connection))

    def _refuse(self, connection: Connection, status: int) -> None:
        """Answer without the app, and close."""
        with contextlib.suppress(OSError):
            connection.sock.send(_REFUSALS[status])
        self._linger(connection)

    def _linger(self, connection: Connection) -> None:
        """Close the connection once the client has read its answer; a reset could overtake the answer."""
        connection.is_closing = True
        connection.deadline = time.monotonic() + LINGER_S
        try:
            connection.sock.shutdown(socket.SHUT_WR)
            if connection not in self._receiving:
                self._receive(connection)
        except (OSError, ValueError):
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._stop_receiving(connection)
        connection.close()
        self.nr_conns -= 1

    # -- requests, in a thread ----------------------------------------------------------------------------------------

    def _handle(self, connection: Connection) -> None:
        is_kept = False
        try:
            is_kept = self._answer(connection)
        finally:
            self.method_queue.defer(self._on_answered, connection, is_kept)

    def _answer(self, connection: Connection) -> bool:
        """Answer one request; return whether the connection is kept for another one."""
        request = None
        self._current.connection = connection
        try:
            connection.start()
            request = next(connection.parser)
            connection.allow_body()
            return bool(self.handle_request(request, connection)) and connection.is_body_read()
        except (NoMoreData, StopIteration, OSError) as error:
            self.log.debug("connection ended early: %s", error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one request may fail, the thread must continue
            self.handle_error(request, connection.sock, connection.client, error)
        return False

    def _on_answered(self, connection: Connection, is_kept: bool) -> None:
        """Expect the next request of a kept connection, or close it; called in the main loop."""
        self._handling.discard(connection)
        connection.forget_request()
        if not is_kept:
            self._linger(connection)
            return
        connection.take_leftover()
        connection.deadline = time.monotonic() + (HEAD_S if connection.has_begun else self.cfg.keepalive)
        try:
            self._receive(connection)
        except (OSError, ValueError):
            self._drop(connection)
            return
        if connection.has_begun:
            self._advance(connection)
