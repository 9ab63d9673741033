"""The processor cores that this process may really use: affinity, and the CPU quota of its control group.

A container with `--cpus 4` on a machine of 64 cores sees 64. Sixty threads there are stopped together, again and again,
and the thread that feeds the GPU with them. Knows no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Encoding and tensor work gain next to nothing from more threads, and each costs memory.
MAX_THREADS = 16
_PROC = Path("/proc/self")


def usable_cores(proc: Path = _PROC) -> int:
    """Cores for this process, at least 1: those it may run on, fewer by the quota; a part of a core counts whole."""
    n_cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(proc)
    return n_cores if quota is None else max(1, min(n_cores, math.ceil(quota)))


def thread_count(proc: Path = _PROC) -> int:
    """Threads that are worth starting for one piece of work: the usable cores, at most MAX_THREADS."""
    return min(usable_cores(proc), MAX_THREADS)


def cpu_quota(proc: Path = _PROC) -> float | None:
    """CPU seconds a second that the control groups (v1 and v2) grant this process; None: no limit, or none is known.

    A group above may grant less, so every folder up to the mounted one counts.
    """
    try:
        groups = (proc / "cgroup").read_text(encoding="utf-8", errors="replace")
        mounts = (proc / "mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    quotas = [quota for folder in _folders(groups, mounts) if (quota := _quota_in(folder)) is not None]
    return min(quotas, default=None)


def _folders(groups: str, mounts: str) -> Iterator[Path]:
    """Folders of this process's group and of those above it, in each hierarchy that is mounted."""
    paths = dict(_group_paths(groups))
    for line in mounts.splitlines():
        # ... root mount-point options ... - kind device super-options
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(kinds) < 3:
            continue
        is_first = kinds[0] == "cgroup" and "cpu" in kinds[2].split(",")
        path = paths.get("cgroup2" if kinds[0] == "cgroup2" else "cpu" if is_first else "")
        if path is not None:
            yield from _up_to_mount(Path(_unescaped(fields[4])), PurePosixPath(_unescaped(fields[3])), path)


def _group_paths(groups: str) -> Iterator[tuple[str, PurePosixPath]]:
    """(`cpu` or `cgroup2`, path of the group in its hierarchy) from the lines of /proc/self/cgroup."""
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "cgroup2", PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            yield "cpu", PurePosixPath(path)


def _up_to_mount(mount: Path, root: PurePosixPath, path: PurePosixPath) -> Iterator[Path]:
    """The group's folder and those above it, down to the mount's own; `root` is what of the hierarchy is mounted."""
    inside = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
    # A container without a namespace for its groups has the host's path, which is not mounted there.
    if ".." in inside.parts or not (mount / inside).is_dir():
        inside = PurePosixPath()
    folder = mount / inside
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder


def _quota_in(folder: Path) -> float | None:
    """The quota that a group's own files state, in cores."""
    try:
        if (folder / "cpu.max").exists():
            quota, _, period = (folder / "cpu.max").read_text(encoding="ascii").strip().partition(" ")
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
            )
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):
        return None


def _unescaped(path: str) -> str:
    """A path of mountinfo, where spaces and the like are octal."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
