"""The threads around the model: order kept, memory bounded, errors come out, threads always end."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest

from musetalk.streaming import BackgroundReader, BackgroundWriter


@pytest.fixture(autouse=True)
def _no_thread_left() -> Generator[None, None, None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def count(n: int, produced: list[int], closed: threading.Event) -> Generator[int, None, None]:
    try:
        for number in range(n):
            produced.append(number)
            yield number
    finally:
        closed.set()


def test_reader_keeps_the_order_and_closes_its_source() -> None:
    closed = threading.Event()
    with BackgroundReader(count(50, [], closed), depth=3, name="reader") as reader:
        assert list(reader) == list(range(50))
        assert list(reader) == []
    assert closed.is_set()


def test_reader_is_never_far_ahead() -> None:
    produced: list[int] = []
    with BackgroundReader(count(1000, produced, threading.Event()), depth=3, name="reader") as reader:
        for number in reader:
            # What was taken, what the queue holds, and the one that waits to get in.
            assert len(produced) <= number + 1 + 3 + 1
            if number == 100:
                break


def test_closing_early_closes_the_source() -> None:
    closed = threading.Event()
    reader = BackgroundReader(count(1000, [], closed), depth=2, name="reader")
    assert next(reader) == 0
    reader.close()
    assert closed.is_set()
    with pytest.raises(StopIteration):
        next(reader)


def test_an_error_of_the_source_comes_out_in_its_place() -> None:
    def broken() -> Generator[int, None, None]:
        yield 1
        raise OSError("broken file")

    with BackgroundReader(broken(), depth=2, name="reader") as reader:
        assert next(reader) == 1
        with pytest.raises(OSError, match="broken file"):
            next(reader)


def test_writer_consumes_all_in_order_before_close_returns() -> None:
    seen: list[int] = []
    with BackgroundWriter(seen.append, depth=2, name="writer") as writer:
        for number in range(100):
            writer.put(number)
    assert seen == list(range(100))


def test_an_error_of_the_consumer_stops_the_producer() -> None:
    def consume(number: int) -> None:
        if number == 3:
            raise OSError("disk full")

    produced: list[int] = []

    def produce() -> None:
        with BackgroundWriter(consume, depth=2, name="writer") as writer:
            for number in range(10_000):
                writer.put(number)
                produced.append(number)

    with pytest.raises(OSError, match="disk full"):
        produce()
    assert len(produced) <= 3 + 2 + 2


def test_an_error_on_the_last_item_comes_out_of_close() -> None:
    def consume(_number: int) -> None:
        raise OSError("disk full")

    def produce() -> None:
        with BackgroundWriter(consume, depth=2, name="writer") as writer:
            writer.put(1)

    with pytest.raises(OSError, match="disk full"):
        produce()


def test_an_error_of_the_producer_drops_what_waits() -> None:
    gate, entered = threading.Event(), threading.Event()
    seen: list[int] = []

    def consume(number: int) -> None:
        entered.set()
        gate.wait()
        seen.append(number)

    def produce() -> None:
        with BackgroundWriter(consume, depth=4, name="writer") as writer:
            for number in range(4):
                writer.put(number)
            entered.wait()
            # Released while the block is being left: the item at work is finished, the waiting ones are dropped.
            timer = threading.Timer(0.05, gate.set)
            timer.start()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        produce()
    gate.wait()
    assert seen == [0]
