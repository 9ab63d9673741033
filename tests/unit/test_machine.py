"""Room and rights on the disk; whether there is a card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from musetalk.errors import DiskFullError
from worker.config import ROOT
from worker.machine import check_room, folder_problem, has_gpu_hardware
from worker.work_dir import FolderLock


def test_a_folder_is_made_and_fit(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    assert folder_problem(folder, "WORK_DIR", 1) is None
    assert list(folder.iterdir()) == []


def test_a_folder_with_too_little_room_says_how_much(tmp_path: Path) -> None:
    problem = folder_problem(tmp_path, "WORK_DIR", 2**40)
    assert problem is not None
    assert problem.startswith("WORK_DIR has ")
    with pytest.raises(DiskFullError) as caught:
        check_room(tmp_path / "not/there/yet", 2**40)
    assert caught.value.retryable
    check_room(tmp_path / "not/there/yet", 1)


def test_a_folder_that_cannot_be_made_is_named_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    problem = folder_problem(tmp_path / "file/below", "OUTPUT_DIR", 1)
    assert problem is not None
    assert problem.startswith("OUTPUT_DIR cannot be written")
    assert str(tmp_path) not in problem


def test_a_folder_is_locked_once_and_a_killed_process_gives_it_back(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    taking = (
        "from pathlib import Path; from worker.work_dir import FolderLock; "
        f"l = FolderLock(Path({str(folder)!r})); print(l.acquire(), flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", taking], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "True\n"
        mine = FolderLock(folder)
        assert not mine.acquire()
    finally:
        holder.kill()
        holder.communicate()
    assert mine.acquire()
    assert mine.acquire()
    assert not FolderLock(folder).acquire()


@pytest.mark.parametrize(("names", "expected"), [((), False), (("nvidiactl",), False), (("nvidia0", "null"), True)])
def test_a_card_is_seen_by_its_device_file(tmp_path: Path, names: tuple[str, ...], expected: bool) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert has_gpu_hardware(tmp_path) is expected
    assert has_gpu_hardware(tmp_path / "absent") is False
