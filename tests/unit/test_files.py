"""Files that appear whole or not at all, the growing file, and full disks."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from musetalk.files import PartFile, is_disk_full, part_path, replacing
from worker.config import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_recognised(number: int) -> None:
    assert is_disk_full(OSError(number, os.strerror(number)))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), OSError("x"), ValueError("x"), MemoryError()])
def test_other_errors_are_no_full_disk(error: BaseException) -> None:
    assert not is_disk_full(error)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with replacing(path) as part:
        assert part.parent == tmp_path
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise KeyError("in the block")

    with pytest.raises(KeyError), replacing(path) as part:
        fail(part)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.json"]


def test_a_block_that_writes_nothing_is_an_error_and_no_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


def test_a_name_of_the_greatest_length_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with replacing(path) as part:
        part.write_bytes(b"1")
    assert path.read_bytes() == b"1"


def test_the_permissions_are_set_before_the_file_gets_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path, mode=0o600) as part:
        part.write_bytes(b"1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "file") as part:
        part.write_bytes(b"1")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_disk_without_space_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_to_full_disk(part: Path) -> None:
        part.symlink_to("/dev/full")
        part.write_text("new")

    with pytest.raises(OSError, match="No space left") as caught, replacing(path) as part:
        write_to_full_disk(part)
    assert is_disk_full(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file", list[bool]()
    monkeypatch.setattr(os, "fsync", lambda _descriptor: synced.append(path.exists()))
    with replacing(path) as part:
        part.write_bytes(b"1")
    path.unlink()
    for is_durable in (True, False):
        with PartFile(part_path(path)) as growing:
            growing.write(b"1")
            growing.commit(path, is_durable=is_durable)
        path.unlink()
    assert synced == [False, False]


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(number: int) -> None:
        with replacing(path) as part:
            part.write_bytes(bytes([number]) * 100_000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    content = path.read_bytes()
    assert len(content) == 100_000
    assert len(set(content)) == 1
    assert names(tmp_path) == ["file"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from musetalk.files import PartFile, is_disk_full, replacing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
try:
    with replacing(folder / "a") as part:
        part.write_bytes(b"x" * 2000)
except OSError as error:
    assert is_disk_full(error), error
    print("replacing")
try:
    with PartFile(folder / "b.part") as growing:
        for _ in range(10):
            growing.write(b"y" * 150)
except OSError as error:
    assert is_disk_full(error), error
    print("part", growing.n_bytes)
"""


def test_a_full_disk_is_an_error_and_leaves_what_can_be_resumed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["replacing", "part", "900"], done.stderr
    assert names(tmp_path) == ["b.part"]


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(0, 8))
def test_a_resumed_file_has_the_bytes_and_checksum_of_one_written_at_once(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[bytes], n_first: int
) -> None:
    folder = tmp_path_factory.mktemp("part")
    path = folder / "x.part"
    for some in (blocks[:n_first], blocks[n_first:]):
        with PartFile(path) as part:
            for block in some:
                part.write(block)
    with PartFile(path) as part:
        whole = b"".join(blocks)
        assert (part.n_bytes, part.digest) == (len(whole), hashlib.sha256(whole).hexdigest())
        part.commit(folder / "x")
    assert (folder / "x").read_bytes() == whole
    assert names(folder) == ["x"]


def test_a_restarted_file_forgets_its_beginning(tmp_path: Path) -> None:
    path = part_path(tmp_path / "x")
    with PartFile(path) as part:
        part.write(b"wrong")
        part.restart()
        part.write(b"right")
        assert part.digest == hashlib.sha256(b"right").hexdigest()
        part.commit(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"right"
