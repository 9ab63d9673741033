"""The frame store: what is read is what was written, under any budget, and no file is left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from musetalk.errors import DiskFullError
from musetalk.frame_store import FrameStore

Record = dict[str, NDArray[Any]]

dtypes = st.sampled_from([np.uint8, np.int64, np.float16, np.float32, np.float64, np.bool_])
arrays = hnp.arrays(dtype=dtypes, shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
# As they come from a crop, a transposition and a thinning: not contiguous.
views = arrays.flatmap(
    lambda array: st.sampled_from(
        [array, array.T, array[..., ::2] if array.ndim else array, array[::-1] if array.ndim else array]
    )
)
records = st.dictionaries(st.sampled_from(["y", "u", "v", "crop", "plan"]), views, max_size=4)
budgets = st.integers(0, 4000)


def same(got: Record, wanted: Record) -> bool:
    return got.keys() == wanted.keys() and all(
        got[name].shape == wanted[name].shape
        and got[name].dtype == wanted[name].dtype
        and got[name].tobytes() == wanted[name].tobytes()
        for name in wanted
    )


def n_bytes(record: Record) -> int:
    return sum(array.nbytes for array in record.values())


def picture(value: int, n: int = 1000) -> Record:
    return {"y": np.full(n, value, np.uint8)}


@settings(deadline=None)
@given(written=st.dictionaries(st.integers(0, 50), records, max_size=8), memory=budgets, data=st.data())
def test_every_record_is_read_as_it_was_written_in_any_order(
    written: dict[int, Record], memory: int, data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder, FrameStore(Path(folder), memory_bytes=memory, disk_bytes=10**6) as store:
        for number, record in written.items():
            store.put(number, record)
        assert len(store) == len(written)
        for number in data.draw(st.permutations(sorted(written) * 2)):
            assert same(store.get(number), written[number])


@settings(deadline=None)
@given(written=st.lists(records, max_size=8), memory=budgets, disk=budgets)
def test_both_budgets_are_kept_and_what_was_kept_stays_readable(written: list[Record], memory: int, disk: int) -> None:
    with TemporaryDirectory() as folder, FrameStore(Path(folder), memory_bytes=memory, disk_bytes=disk) as store:
        kept: dict[int, Record] = {}
        for number, record in enumerate(written):
            fits = n_bytes(record) <= memory - store.memory_used or n_bytes(record) <= disk - store.disk_used
            if fits:
                store.put(number, record)
                kept[number] = record
            else:
                with pytest.raises(DiskFullError) as caught:
                    store.put(number, record)
                assert caught.value.details == {"frames_kept": len(kept), "scratch_bytes": disk}
                assert not caught.value.retryable
                with pytest.raises(KeyError):
                    store.get(number)
            assert store.memory_used <= memory
            assert store.disk_used <= disk
        assert store.memory_used + store.disk_used == sum(n_bytes(record) for record in kept.values())
        assert len(store) == len(kept)
        assert all(same(store.get(number), record) for number, record in kept.items())


def test_memory_is_filled_before_the_disk(tmp_path: Path) -> None:
    with FrameStore(tmp_path, memory_bytes=2500, disk_bytes=10_000) as store:
        for number in range(5):
            store.put(number, picture(number))
        assert (store.memory_used, store.disk_used) == (2000, 3000)
        # A smaller one still finds room in memory.
        store.put(9, picture(9, 500))
        assert (store.memory_used, store.disk_used) == (2500, 3000)


def test_a_record_that_is_there_stays(tmp_path: Path) -> None:
    for memory in (0, 10_000):
        with FrameStore(tmp_path, memory_bytes=memory, disk_bytes=10_000) as store:
            store.put(3, picture(1))
            used = store.memory_used, store.disk_used
            store.put(3, picture(2))
            assert same(store.get(3), picture(1))
            assert (store.memory_used, store.disk_used) == used
            assert len(store) == 1


def test_what_is_read_from_disk_may_be_written_to(tmp_path: Path) -> None:
    with FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000) as store:
        store.put(0, picture(5))
        store.get(0)["y"][...] = 7
        assert same(store.get(0), picture(5))


def test_an_unknown_number_is_a_key_error(tmp_path: Path) -> None:
    with FrameStore(tmp_path, memory_bytes=0, disk_bytes=0) as store, pytest.raises(KeyError):
        store.get(0)


# -- the scratch file -------------------------------------------------------------------------------------------------


def open_files() -> set[str]:
    """What this process has open, by descriptor and target."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{descriptor} {os.readlink(f'/proc/self/fd/{descriptor}')}")
        except FileNotFoundError:
            continue
    return found


def test_the_scratch_file_has_no_name_and_goes_with_the_store(tmp_path: Path) -> None:
    before = open_files()
    with FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000) as store:
        store.put(0, picture(1))
        store.put(1, picture(2))
        assert list(tmp_path.iterdir()) == []
        opened = open_files() - before
        assert len(opened) == 1
        assert "(deleted)" in opened.pop()
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_made_while_memory_is_enough(tmp_path: Path) -> None:
    before = open_files()
    with FrameStore(tmp_path / "missing", memory_bytes=10_000, disk_bytes=10_000) as store:
        store.put(0, picture(1))
        assert open_files() == before


def test_an_error_in_the_block_closes_the_store(tmp_path: Path) -> None:
    before = open_files()
    store = FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000)
    with pytest.raises(KeyError), store:
        put_and_fail(store)
    assert open_files() == before
    assert len(store) == 0


def put_and_fail(store: FrameStore) -> None:
    store.put(0, picture(1))
    store.get(1)


def test_closing_twice_closes_nothing_else(tmp_path: Path) -> None:
    store = FrameStore(tmp_path, memory_bytes=1000, disk_bytes=10_000)
    store.put(0, picture(1))
    store.put(1, picture(2))
    store.close()
    # The descriptor's number is given to somebody else now.
    with (tmp_path / "other").open("wb") as other:
        store.close()
        other.write(b"still open")
    assert (tmp_path / "other").read_bytes() == b"still open"
    assert (len(store), store.memory_used, store.disk_used) == (0, 0, 0)
    for number in (0, 1):
        with pytest.raises(KeyError):
            store.get(number)


def test_a_store_nothing_was_put_into_can_be_closed(tmp_path: Path) -> None:
    store = FrameStore(tmp_path, memory_bytes=0, disk_bytes=0)
    store.close()
    store.close()
    assert len(store) == 0


def test_two_stores_in_one_folder_keep_to_themselves(tmp_path: Path) -> None:
    with (
        FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000) as first,
        FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000) as second,
    ):
        first.put(0, picture(1))
        second.put(0, picture(2))
        assert same(first.get(0), picture(1))
        assert same(second.get(0), picture(2))


def test_reads_and_writes_in_small_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, bytes(data[:7]), offset))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: read(file, [buffers[0][:5]], offset))
    record: Record = {"y": np.arange(100, dtype=np.float32).reshape(10, 10), "u": np.arange(33, dtype=np.uint8)}
    with FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000) as store:
        store.put(0, record)
        store.put(1, picture(3))
        assert same(store.get(0), record)
        assert same(store.get(1), picture(3))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_reported_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000) as store:
        store.put(0, picture(1))
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", failing(number))
            with pytest.raises(DiskFullError, match="the disk is full") as caught:
                store.put(1, picture(2))
        assert str(tmp_path) not in str(caught.value)
        assert caught.value.retryable, "another worker may have room"
        assert len(store) == 1
        assert same(store.get(0), picture(1))
        store.put(1, picture(2))
        assert same(store.get(1), picture(2))


def test_a_disk_without_room_for_a_file_is_reported_as_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000) as store:
        monkeypatch.setattr("musetalk.frame_store.tempfile.mkstemp", failing(errno.ENOSPC))
        with pytest.raises(DiskFullError, match="the disk is full"):
            store.put(0, picture(1))
        assert len(store) == 0


def test_another_fault_of_the_disk_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000) as store:
        monkeypatch.setattr(os, "pwrite", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            store.put(0, picture(1))


def test_a_scratch_file_that_became_shorter_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FrameStore(tmp_path, memory_bytes=0, disk_bytes=10_000) as store:
        store.put(0, picture(1))
        monkeypatch.setattr(os, "preadv", lambda *_arguments: 0)
        with pytest.raises(OSError, match="shorter than what was written"):
            store.get(0)


def failing(number: int) -> Any:
    """A system call that fails."""

    def call(*_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    return call
