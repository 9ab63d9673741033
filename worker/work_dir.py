"""WORK_DIR: its lock, a folder per job, and the leftovers of a killed process. Knows no jobs and no settings."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Only folders with this prefix are ever removed at start.
WORK_PREFIX = "job-"


class FolderLock:
    """The sole use of a folder by one process for as long as it lives; a killed one's ends with it."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if it is absent; raises OSError where that cannot be."""
        folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, self._fd)

    def acquire(self) -> bool:
        """Take the folder at once or not at all; whether it is ours. Where the file system has no locks it is."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        return True


@contextmanager
def job_folder(work_dir: Path) -> Iterator[Path]:
    """A folder in `work_dir` for the files of one job, removed in any case."""
    work_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=work_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(work_dir: Path) -> int:
    """Remove the job folders that a killed process left behind and return their number; touch nothing else."""
    stale = [path for path in work_dir.glob(f"{WORK_PREFIX}*") if path.is_dir() and not path.is_symlink()]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return len(stale)
