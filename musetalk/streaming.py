"""A thread before and a thread behind the model, joined by bounded queues: memory does not grow with the clip's length.

An exception in either thread is raised where its results are awaited, and closing always joins the thread.
Knows nothing of pictures.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

# How often a thread that waits on a full or empty queue looks at the stop flag; only seen when something went wrong.
_POLL_S = 0.1


class _End:
    """Marks the end of a stream; carries the exception that ended it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class BackgroundReader(Generic[T]):
    """Iterates `source` in a thread of its own, at most `depth` items ahead of the consumer."""

    def __init__(self, source: Generator[T, None, None], *, depth: int, name: str) -> None:
        """Start reading `source`; it is closed in its own thread, where its resources were opened."""
        self._source = source
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        end = _End()
        try:
            for item in self._source:
                if not self._put(item):
                    break
        except BaseException as error:  # noqa: BLE001 - handed to the consumer as it is
            end = _End(error)
        finally:
            try:
                self._source.close()
            except Exception as error:  # noqa: BLE001 - handed to the consumer, unless an earlier error is on its way
                end = end if end.error else _End(error)
            self._put(end)

    def _put(self, item: T | _End) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, _End):
            self._ended = True
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    def close(self) -> None:
        """Stop reading ahead and join the thread; safe to call twice."""
        self._stop.set()
        self._ended = True
        self._thread.join()

    def __enter__(self) -> BackgroundReader[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BackgroundWriter(Generic[T]):
    """Calls `consume` for each item in a thread of its own; at most `depth` items wait."""

    def __init__(self, consume: Callable[[T], None], *, depth: int, name: str) -> None:
        self._consume = consume
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._failed = threading.Event()
        self._abandoned = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, _End) or self._abandoned.is_set():
                return
            try:
                self._consume(item)
            except BaseException as error:  # noqa: BLE001 - raised in put() or close()
                self._error = error
                self._failed.set()
                return

    def put(self, item: T) -> None:
        """Hand over one item; waits while the queue is full. Raises what `consume` raised for an earlier item."""
        self._send(item)

    def close(self) -> None:
        """Wait until every item is consumed and join the thread; raises what `consume` raised."""
        if self._closed:
            return
        self._closed = True
        try:
            self._send(_End())
        finally:
            self._thread.join()
        self._raise()

    def abort(self) -> None:
        """Drop what is waiting and join the thread; raises nothing."""
        self._closed = True
        self._abandoned.set()
        # The thread may be waiting on an empty queue; any item wakes it, and it sees the flag first.
        while self._thread.is_alive():
            try:
                self._queue.put(_End(), timeout=_POLL_S)
            except queue.Full:
                continue
            break
        self._thread.join()

    def _send(self, item: T | _End) -> None:
        while True:
            self._raise()
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            self._raise()
            return

    def _raise(self) -> None:
        if self._failed.is_set() and self._error is not None:
            raise self._error

    def __enter__(self) -> BackgroundWriter[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
