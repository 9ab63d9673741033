"""Connections pinned to a checked address, which another thread can cut; plain texts for their errors. Knows no jobs.

A socket's timeout restarts with every byte, so a peer that sends slowly, or stops reading, can block a thread for ever.
Shutting the socket down from another thread ends the call at once and so enforces a total limit.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import ssl
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from worker.net.addresses import Resolver, Target

# At debug level urllib3 writes every path with its query, and the query is where signatures are.
logging.getLogger("urllib3").setLevel(logging.INFO)


class CutSwitch:
    """Switch that ends all sockets of one transfer, also those opened later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Weak, so that the switch does not keep the sockets of closed connections open.
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._is_cut = False

    @property
    def is_cut(self) -> bool:
        """Whether `cut` was called."""
        return self._is_cut

    def add(self, new_socket: socket.socket) -> None:
        """Register a connected socket; after `cut` it is shut down at once."""
        with self._lock:
            self._sockets.add(new_socket)
            # `cut` was called while this socket was connecting.
            if self._is_cut:
                _shut(new_socket)

    def cut(self) -> None:
        """End every read and write on the registered sockets now, and on later ones when they are registered."""
        with self._lock:
            self._is_cut = True
            for open_socket in self._sockets:
                _shut(open_socket)


def _shut(open_socket: socket.socket) -> None:
    # Not SSLSocket.shutdown: it drops the TLS layer, and a read under way would continue on the encrypted bytes.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(open_socket, socket.SHUT_RDWR)


def _registering_class(connection_class: Any, switch: CutSwitch, path: str | None = None) -> Any:
    """Return a subclass of a urllib3 connection class that registers its socket with `switch`.

    It requests `path`, if given, in place of what requests and urllib3 make of it: both rewrite percent-escapes.
    """

    def connect(self: Any) -> None:
        connection_class.connect(self)
        switch.add(self.sock)

    def putrequest(self: Any, method: str, url: str, *args: Any, **named: Any) -> None:
        connection_class.putrequest(self, method, path or url, *args, **named)

    return type(connection_class.__name__, (connection_class,), {"connect": connect, "putrequest": putrequest})


class SwitchedAdapter(HTTPAdapter):
    """Transport that registers its sockets with a switch."""

    def __init__(self, switch: CutSwitch) -> None:
        self._pools = {}
        for scheme, pool in (("http", urllib3.HTTPConnectionPool), ("https", urllib3.HTTPSConnectionPool)):
            connection = _registering_class(pool.ConnectionCls, switch)
            self._pools[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": connection})
        super().__init__(pool_maxsize=8)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Create the pool manager, with our connection classes."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        """Create the pool manager of a proxy, with our connection classes."""
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager


class PinnedAdapter(HTTPAdapter):
    """Transport to one checked address; Host header, server name and certificate check use the name."""

    def __init__(self, target: Target, address: str, switch: CutSwitch) -> None:
        # The caller retries, because a retry has to resolve and check the name again.
        super().__init__(max_retries=0)
        host = f"[{address}]" if ":" in address else address
        if target.scheme == "https":
            self._pool: urllib3.HTTPConnectionPool = urllib3.HTTPSConnectionPool(
                host, target.port, server_hostname=target.host
            )
        else:
            self._pool = urllib3.HTTPConnectionPool(host, target.port)
        # Set on the instance, as urllib3 documents; the class attribute serves every other pool of the process.
        self._pool.ConnectionCls = _registering_class(self._pool.ConnectionCls, switch, target.path)

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> urllib3.HTTPConnectionPool:
        """Return the one pool for every request (requests 2.32 and later)."""
        return self._pool

    def get_connection(self, *_: Any, **__: Any) -> urllib3.HTTPConnectionPool:
        """Return the one pool for every request (requests before 2.32)."""
        return self._pool

    def close(self) -> None:
        """Close the connection."""
        self._pool.close()
        super().close()


def resolve_within(resolve: Resolver, target: Target, seconds: float) -> list[str]:
    """Resolve a name within a time limit. Raises OSError if there is no answer.

    The system's resolver has no limit, so it runs in a thread that is abandoned when the time is up.
    """
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(list(resolve(target.host, target.port)))
        except Exception as problem:  # noqa: BLE001 - raised in the caller's thread
            answers.put(problem)

    threading.Thread(target=work, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise socket.gaierror(socket.EAI_AGAIN, "no answer in time") from None
    if isinstance(answer, UnicodeError) or answer == []:
        raise socket.gaierror(socket.EAI_NONAME, "no address")
    if isinstance(answer, Exception):
        raise answer
    return answer


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes (requests and urllib3 nest them in `args` and `reason`)."""
    todo: list[object] = [error]
    seen: set[int] = set()
    while todo:
        item = todo.pop()
        if not isinstance(item, BaseException) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        todo += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]


# With urllib3 2 OpenSSL compares the names; urllib3 1 compares them itself and raises a ValueError: CertificateError.
_CERTIFICATE_ERRORS = {"SSLCertVerificationError", "CertificateError"}

# The first match counts, so that narrow classes come before the classes that they derive from.
_TEXTS: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((socket.gaierror,), "name could not be resolved"),
    ((ConnectionRefusedError,), "connection was refused"),
    ((requests.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError), "connection was not answered in time"),
    ((requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError), "connection went silent"),
    ((ConnectionError, urllib3.exceptions.ProtocolError, urllib3.exceptions.IncompleteRead), "connection was cut"),
    (
        (requests.exceptions.ContentDecodingError, urllib3.exceptions.DecodeError),
        "body is not compressed as its header says",
    ),
    ((ssl.SSLError, requests.exceptions.SSLError), "secure connection failed"),
    ((requests.exceptions.ChunkedEncodingError,), "connection was cut"),
)


def describe(error: BaseException) -> str:
    """Describe a transport error without addresses; the libraries' own texts contain whole URLs."""
    chain = list(causes(error))
    for classes, text in _TEXTS:
        if any(isinstance(cause, classes) for cause in chain):
            return text
    return "connection failed"


def is_bad_certificate(error: BaseException) -> bool:
    """Whether the peer could not prove its name; a retry would fail again."""
    return any(type(cause).__name__ in _CERTIFICATE_ERRORS for cause in causes(error))


def is_unreachable(error: BaseException) -> bool:
    """Whether no connection was established, so that another address of the name is worth trying."""
    classes = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError, requests.ConnectTimeout)
    return any(isinstance(cause, classes) for cause in causes(error))
