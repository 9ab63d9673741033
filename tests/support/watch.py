"""What a program under test touched: files opened (inotify, any process) and connections made to a loopback server."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from pathlib import Path

_IN_ACCESS, _IN_OPEN, _IN_NONBLOCK = 0x1, 0x20, os.O_NONBLOCK
_EVENT = struct.Struct("iIII")


class OpenWatch:
    """Counts how often files are opened or read, by whichever process (Linux). Raises OSError where that cannot be."""

    def __init__(self, *paths: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(self._libc, "inotify_init1"):
            raise OSError("this system has no inotify")
        self._descriptor = self._libc.inotify_init1(_IN_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify is not available")
        for path in paths:
            if self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_OPEN | _IN_ACCESS) < 0:
                raise OSError(ctypes.get_errno(), "a file cannot be watched")

    def n_events(self) -> int:
        """Opens and reads since the last call."""
        count = 0
        while True:
            try:
                data = os.read(self._descriptor, 4096)
            except BlockingIOError:
                return count
            position = 0
            while position < len(data):
                position += _EVENT.size + _EVENT.unpack_from(data, position)[3]
                count += 1

    def close(self) -> None:
        """Stop watching."""
        os.close(self._descriptor)


class CountingServer:
    """A loopback TCP server that counts connections and hangs up."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._n_connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                # Our own last one says who it is.
                if connection.recv(4) == b"stop":
                    return
            self._n_connections += 1

    def close(self) -> int:
        """Stop; returns how many connections there were. Earlier ones are all counted by then."""
        with socket.create_connection(("127.0.0.1", self.port)) as last:
            last.sendall(b"stop")
            self._thread.join()
        self._socket.close()
        return self._n_connections
