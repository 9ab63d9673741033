"""The cores that a process may use: affinity, and the quota of both kinds of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from musetalk.cores import MAX_THREADS, cpu_quota, thread_count, usable_cores
from musetalk.media import EncoderSettings

V1, V2 = "cpu.cfs_quota_us", "cpu.max"


def machine(folder: Path, groups: str, *mounts: tuple[str, str, str], **files: str) -> Path:
    """A pretended /proc/self: its group, its mounts (kind, super options, root) at `folder/0`, and files under them."""
    lines = [
        f"{30 + n} 24 0:{n} {root} {folder}/{n} rw,nosuid shared:9 - {kind} none {options}"
        for n, (kind, options, root) in enumerate(mounts)
    ]
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="ascii")
    (folder / "cgroup").write_text(groups, encoding="ascii")
    (folder / "mountinfo").write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    return folder


def second(folder: Path, path: str, files: dict[str, str], root: str = "/") -> Path:
    return machine(folder, f"0::{path}\n", ("cgroup2", "rw", root), **files)


def first(folder: Path, path: str, files: dict[str, str], root: str = "/") -> Path:
    return machine(folder, f"4:cpu,cpuacct:{path}\n0::/\n", ("cgroup", "rw,cpu,cpuacct", root), **files)


@pytest.mark.parametrize(
    ("limit", "quota"),
    [("400000 100000", 4.0), ("150000 100000", 1.5), ("max 100000", None), ("", None), ("-1 x", None), ("1 0", None)],
)
def test_a_container_of_the_second_kind_with_a_quota(tmp_path: Path, limit: str, quota: float | None) -> None:
    assert cpu_quota(second(tmp_path, "/", {"0/cpu.max": limit})) == quota


@pytest.mark.parametrize(("limit", "quota"), [("400000", 4.0), ("50000", 0.5), ("-1", None), ("0", None)])
def test_a_container_of_the_first_kind_with_a_quota(tmp_path: Path, limit: str, quota: float | None) -> None:
    files = {"0/cpu.cfs_quota_us": limit, "0/cpu.cfs_period_us": "100000"}
    assert cpu_quota(first(tmp_path, "/docker/1f", files, root="/docker/1f")) == quota


def test_the_smallest_quota_of_the_groups_above_counts(tmp_path: Path) -> None:
    files = {"0/a/b/cpu.max": "800000 100000", "0/a/cpu.max": "200000 100000", "0/cpu.max": "max 100000"}
    assert cpu_quota(second(tmp_path, "/a/b", files)) == 2.0


def test_a_container_that_sees_the_path_of_its_host(tmp_path: Path) -> None:
    files = {"0/cpu.cfs_quota_us": "300000", "0/cpu.cfs_period_us": "100000"}
    assert cpu_quota(first(tmp_path, "/docker/1f", files)) == 3.0
    assert cpu_quota(second(tmp_path, "/../../other", {"0/cpu.max": "500000 100000"})) == 5.0


def test_a_quota_of_the_memory_or_of_nothing_is_none(tmp_path: Path) -> None:
    files = {"0/cpu.cfs_quota_us": "300000", "0/cpu.cfs_period_us": "100000"}
    groups = "3:cpuset:/\n4:memory:/\n"
    assert cpu_quota(machine(tmp_path, groups, ("cgroup", "rw,memory", "/"), **files)) is None
    assert cpu_quota(tmp_path / "nowhere") is None


def test_four_cores_of_a_large_machine_get_four_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen as 63 encoder threads in a container of four cores, stopped together with the thread that feeds the GPU."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    limited = second(tmp_path, "/", {"0/cpu.max": "400000 100000"})
    assert (usable_cores(limited), thread_count(limited)) == (4, 4)
    unlimited = second(tmp_path, "/", {"0/cpu.max": "max 100000"})
    assert (usable_cores(unlimited), thread_count(unlimited)) == (64, MAX_THREADS)
    part = second(tmp_path, "/", {"0/cpu.max": "20000 100000"})
    assert usable_cores(part) == 1


def test_the_encoder_leaves_a_core_and_takes_no_more_than_it_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for n_cores, n_threads in ((1, 1), (2, 1), (8, 7), (16, 15), (64, MAX_THREADS)):
        monkeypatch.setattr("musetalk.media.writing.usable_cores", lambda n=n_cores: n)
        assert EncoderSettings().n_threads() == n_threads
    assert EncoderSettings(threads=3).n_threads() == 3


def test_tensor_work_takes_the_cores_that_the_quota_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2
    import torch

    from musetalk import devices

    before = torch.get_num_threads(), cv2.getNumThreads()
    monkeypatch.setattr(devices, "thread_count", lambda: 3)
    try:
        cv2.setNumThreads(8)
        assert devices.configure_threads(0, torch.device("cpu")) == torch.get_num_threads() == 3
        assert cv2.getNumThreads() == 3
        assert devices.configure_threads(0, torch.device("cuda")) == 1
        assert devices.configure_threads(5, torch.device("cpu")) == 5
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
