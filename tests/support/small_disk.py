"""A disk of a few megabytes that a test can fill."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, *, mib: int) -> Iterator[Path]:
    """Mount a disk in memory at `folder`; skips the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0755", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # A process of the test may still be ending.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def write_until_full(folder: Path) -> Path:
    """Write a file until nothing fits on the disk for a moment; return its path."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return path


def fill(folder: Path) -> Path:
    """Write a file until nothing fits on a disk that nobody else uses any more; return its path."""
    path = write_until_full(folder)
    assert shutil.disk_usage(folder).free < 2**16
    return path
