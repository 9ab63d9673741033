"""WORK_DIR: its lock, a folder per job, and the leftovers of a killed process. Knows no jobs and no settings."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.records import QUARANTINE, WorkDisk

logger = logging.getLogger("musetalk.work_dir")

# Only folders with this prefix are removed at start; whatever else is in WORK_DIR is not ours.
WORK_PREFIX = "job-"
LOCK_NAME = ".lock"
_POLL_S = 1.0


class FolderLock:
    """Exclusive use of a folder by one process; the system releases it when the process ends or is killed."""

    def __init__(self, folder: Path) -> None:
        """Create the folder if it does not exist; raises OSError where that is impossible."""
        folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, self._fd)

    def acquire(self) -> bool:
        """Lock the folder without waiting; return whether it is ours. File systems without locks always grant it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        return True


class WorkDir:
    """The folder of one worker; two workers in one folder would remove each other's running jobs as leftovers."""

    def __init__(self, folder: Path) -> None:
        """Touch nothing yet; see `take`."""
        self.folder = folder
        # The reason why `take` has not returned, for the readiness.
        self.waiting_for: str | None = None
        self._lock: FolderLock | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this process holds the lock, so that files in the folder are its own to use and to remove."""
        return self._lock is not None

    def take(self, problem: Callable[[], str | None] = lambda: None) -> None:
        """Wait until no other worker uses the folder, remove what a killed one left, then wait for `problem` to pass.

        `problem()` is the reason why no job can use the folder, or None. The leftovers may be what fills the disk.
        """
        self._wait_while(self._lock_problem)
        remove_leftovers(self.folder)
        self._wait_while(problem)

    def _wait_while(self, problem: Callable[[], str | None]) -> None:
        """Ask every second until there is no problem; log each one, and keep it for the readiness."""
        while (reason := problem()) is not None:
            if reason != self.waiting_for:
                logger.error(reason)
            self.waiting_for = reason
            time.sleep(_POLL_S)
        self.waiting_for = None

    def _lock_problem(self) -> str | None:
        """Lock the folder, or return the reason why it is not ours."""
        if self._lock is not None:
            # Loading has begun again after an error.
            return None
        try:
            lock = FolderLock(self.folder)
            if not lock.acquire():
                return "another worker uses WORK_DIR; each needs a folder of its own"
        except IsADirectoryError:
            WorkDisk(self.folder, min_free_mb=0).set_aside(LOCK_NAME, QUARANTINE)
            logger.error("bad file moved to quarantine", extra={"file": LOCK_NAME, "reason": "not a regular file"})
            return "WORK_DIR had a folder in place of its lock"
        except OSError as error:
            return f"WORK_DIR cannot be used ({error.strerror or type(error).__name__})"
        self._lock = lock
        return None

    @contextmanager
    def job_folder(self) -> Iterator[Path]:
        """A folder for the files of one job, removed in any case."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=self.folder))
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
