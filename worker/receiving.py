"""One connection of the server: what it has sent so far, how long it may take, and the bounds of its next request.

Knows Gunicorn's reader of bodies; nothing of Flask, jobs or the main loop (`worker.server`).
"""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import SocketUnreader

# The head of a request must be complete after this time, and its body after this time more.
HEAD_S = 10.0
BODY_S = 30.0
# A client that takes no byte of its answer for this long is disconnected.
SEND_S = 30.0
# A closed connection is read for this long, so that the client gets the answer before a reset.
LINGER_S = 2.0
# Heads beyond this size go to Gunicorn's parser as they are, which refuses them with the right status.
MAX_HEAD_BYTES = 65_536
# Bodies up to this size are received by the main loop, so that no thread waits for a slow one.
MAX_BUFFERED_BODY_BYTES = 65_536
# Read and dropped of a body that nobody wanted, before the connection is cut.
MAX_DROPPED_BYTES = 8_000_000

_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,18})[ \t]*\r$", re.IGNORECASE | re.MULTILINE)
# A body whose length is unknown, or one whose sender waits for our word first.
_STREAMED = re.compile(rb"^(?:transfer-encoding|expect):", re.IGNORECASE | re.MULTILINE)
# A request begins with the letters of its method; an empty line before it is allowed.
_FIRST_BYTE = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~\r-]")


class DeadlineReader(SocketUnreader):  # type: ignore[misc]  # Gunicorn has no types
    """Reader of a body that gives up at a point in time, however slowly the bytes arrive."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection.sock)
        self._connection = connection
        self.deadline = math.inf

    def chunk(self, size_hint: int | None = None) -> bytes:
        """Return the next bytes; raises TimeoutError at the deadline."""
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the body took too long")
        self.sock.settimeout(min(left_s, 3600.0))
        try:
            with self._connection.waiting():
                data: bytes = super().chunk(size_hint)
                return data
        finally:
            self.sock.settimeout(SEND_S)


class Connection:
    """A client's connection, in the main loop while it sends and in a thread while its request is handled."""

    def __init__(self, cfg: Any, sock: socket.socket, client: Any, server: Any) -> None:
        self.sock, self.client, self.server = sock, client, server
        self.parser = RequestParser(cfg, sock, client)
        self.reader = DeadlineReader(self)
        self.parser.unreader = self.reader
        self.buffer = bytearray()
        self.deadline = time.monotonic() + HEAD_S
        self.is_closing = False
        self.n_dropped = 0
        self.forget_request()

    def forget_request(self) -> None:
        """Expect the next request."""
        self._searched = 0
        # Bytes of the request that the main loop collects; None until the head is complete.
        self._n_needed: int | None = None
        # Whether a thread has to read the body, because it is large or of unknown length.
        self.is_streamed = False
        self.is_probe = False
        self.is_started = False
        self.is_waiting = False
        self.answered: float | None = None

    @property
    def has_begun(self) -> bool:
        """Whether a byte of the next request has arrived."""
        return bool(self.buffer)

    @property
    def is_malformed(self) -> bool:
        """Whether the bytes so far cannot begin a request of HTTP/1."""
        return _FIRST_BYTE.match(self.buffer) is None

    @property
    def path(self) -> bytes:
        """The path in the first line of the request, without its query."""
        words = bytes(self.buffer[:2048]).lstrip(b"\r\n").split(b"\r\n", 1)[0].split(b" ")
        return words[1].partition(b"?")[0] if len(words) > 1 else b""

    def is_complete(self) -> bool:
        """Whether a thread can handle the request now, from the bytes received so far."""
        if self._n_needed is None:
            end = self.buffer.find(_HEAD_END, max(0, self._searched - 3))
            self._searched = len(self.buffer)
            if end < 0:
                self.is_streamed = len(self.buffer) > MAX_HEAD_BYTES
                return self.is_streamed
            self._n_needed = end + len(_HEAD_END) + self._buffered_body(bytes(self.buffer[: end + 2]))
            self.deadline = time.monotonic() + BODY_S
        return len(self.buffer) >= self._n_needed

    def _buffered_body(self, head: bytes) -> int:
        """Bytes of the body that the main loop collects; 0 for none, and for one that a thread reads."""
        length = _LENGTH.search(head)
        n_bytes = int(length[1]) if length else 0
        self.is_streamed = n_bytes > MAX_BUFFERED_BODY_BYTES or _STREAMED.search(head) is not None
        return 0 if self.is_streamed else n_bytes

    def start(self) -> None:
        """Pass the received bytes to the parser and prepare the socket for a thread."""
        self.is_started = True
        self.sock.settimeout(SEND_S)
        self.reader.unread(bytes(self.buffer))
        self.buffer.clear()
        # A head that is still incomplete has what is left of its time.
        self.reader.deadline = self.deadline

    def take_leftover(self) -> None:
        """Fetch back what the client has sent after its request."""
        self.buffer = bytearray(self.reader.take_buffered())

    def is_body_read(self) -> bool:
        """Whether the whole body has been read, so that the next bytes begin another request."""
        # Long enough for bytes that have arrived, too short to wait for a client.
        self.reader.deadline = time.monotonic() + 0.05
        return bool(self.parser.finish_body(deadline=self.reader.deadline))

    def allow_body(self, seconds: float = BODY_S) -> None:
        """Give the body of this request `seconds` from now on."""
        self.reader.deadline = time.monotonic() + seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark that the thread waits for its client inside the block; a stopping server does not wait for it."""
        before, self.is_waiting = self.is_waiting, True
        try:
            yield
        finally:
            self.is_waiting = before

    def close(self) -> None:
        """Close the socket; a thread that reads from it or writes to it continues with an error."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self.sock.close()
