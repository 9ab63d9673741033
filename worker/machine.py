"""The machine: room and rights in folders, whether it has a GPU, freed memory returned. Knows no jobs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import tempfile
from pathlib import Path

from musetalk.errors import DiskFullError

_MIB = 2**20


def folder_problem(folder: Path, name: str, min_free_mb: int) -> str | None:
    """Reason why `folder` (the setting `name`) cannot take a job's files, or None; creates a missing folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
            probe.flush()
        free_mb = shutil.disk_usage(folder).free // _MIB
    except OSError as error:
        return f"{name} cannot be written ({error.strerror or type(error).__name__})"
    if free_mb < min_free_mb:
        return f"{name} has {free_mb} MiB free, MIN_FREE_DISK_MB asks for {min_free_mb}"
    return None


def check_room(folder: Path, min_free_mb: int) -> None:
    """Raises DiskFullError when less than `min_free_mb` MiB are free where `folder` is."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free_mb = shutil.disk_usage(folder).free // _MIB
    if free_mb < min_free_mb:
        raise DiskFullError(
            "the disk has too little room for a job", free_mb=free_mb, min_free_mb=min_free_mb, kind="disk"
        )


def has_gpu_hardware(dev: Path = Path("/dev")) -> bool:
    """Whether an NVIDIA card was given to this machine, whatever torch makes of it."""
    try:
        return any(name.removeprefix("nvidia").isdigit() for name in os.listdir(dev) if name.startswith("nvidia"))
    except OSError:
        return False


def exempt_loaded() -> None:
    """Let later collections pass over everything that exists now; call it after one, or garbage is kept as well.

    For a process that keeps its models to its end: a collection through the objects of libraries and networks takes
    tenths of a second, and each job ends with one.
    """
    gc.freeze()


def release_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Frames of a megabyte and arrays of some kilobytes pass through the same heap; what is free in its middle otherwise
    stays with a process that lives for weeks.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
