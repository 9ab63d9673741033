"""Inputs that are already on this machine: samples that ship with the project, and uploads kept for the next jobs.

A job names them by addresses of their own, `sample:portrait` and `upload:<id>`. Knows no jobs and no HTTP.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from musetalk.errors import MediaError
from worker.config import ROOT
from worker.work_dir import WORK_PREFIX

SAMPLES_DIR = ROOT / "demo/media"
# An upload that no job or preview has used for this long is removed.
KEPT_S = 3600.0
# A face and a speech for each of a few people at the page.
MAX_KEPT = 8

_KEPT_PREFIX = f"{WORK_PREFIX}kept-"
_NAME = "upload.bin"
_SAMPLE = re.compile(r"sample:([a-z0-9-]{1,40})")
_UPLOAD = re.compile(r"upload:([0-9a-f]{32})")


@dataclass(frozen=True)
class Sample:
    """A file that ships with the project; `kind` is the input it is made for."""

    name: str
    kind: str
    file: str
    title: str
    picture: str = ""


SAMPLES: tuple[Sample, ...] = (
    Sample("portrait", "video", "avatar.mp4", "Clip", "samples/portrait.jpg"),
    Sample("photo", "video", "samples/photo-full.jpg", "Photo", "samples/photo.jpg"),
    Sample("evening", "video", "samples/evening.mp4", "Evening", "samples/evening.jpg"),
    Sample("hello", "audio", "speech.flac", "Welcome", "samples/hello.svg"),
    Sample("short", "audio", "samples/short.flac", "Short", "samples/short.svg"),
    Sample("scottish", "audio", "samples/scottish.flac", "Scottish", "samples/scottish.svg"),
    Sample("american", "audio", "samples/american.flac", "American", "samples/american.svg"),
)


class OwnFiles:
    """The samples, and the uploads that are kept in the work folder."""

    # One for the process, however many uploads there are.
    _timer: ClassVar[threading.Timer | None] = None
    _timer_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir

    def find(self, url: str, field: str) -> Path | None:
        """The file of a `sample:` or `upload:` address; None for any other address.

        Raises MediaError that names `field` when there is no such file.
        """
        if url.startswith("sample:"):
            match = _SAMPLE.fullmatch(url)
            found = next((sample for sample in SAMPLES if match and sample.name == match[1]), None)
            if found is None:
                names = ", ".join(sample.name for sample in SAMPLES)
                raise MediaError(f"{field} names no sample; there are {names}", field=field)
            return SAMPLES_DIR / found.file
        if url.startswith("upload:"):
            return self._upload(url, field)
        return None

    def _upload(self, url: str, field: str) -> Path:
        match = _UPLOAD.fullmatch(url)
        folder = self._work_dir / f"{_KEPT_PREFIX}{match[1]}" if match else None
        if folder is None or not (folder / _NAME).is_file():
            raise MediaError(f"the upload of {field} is no longer here; upload the file again", field=field)
        # Its time of modification is that of its last use.
        os.utime(folder)
        return folder / _NAME

    def keep(self, folder: Path, *, max_bytes: int) -> str:
        """Keep an uploaded file with its folder, and return its address.

        Others are removed, those that were not used for the longest time first, while there are too many of them, or
        more than `max_bytes` in all.
        """
        name = secrets.token_hex(16)
        folder.rename(self._work_dir / f"{_KEPT_PREFIX}{name}")
        self._prune_in_time(max_bytes)
        return f"upload:{name}"

    def _prune_in_time(self, max_bytes: int) -> None:
        """Remove what is too much now, and again each time when the oldest upload left has become too old."""
        self.prune(max_bytes)
        with self._timer_lock:
            if OwnFiles._timer is not None:
                OwnFiles._timer.cancel()
                OwnFiles._timer = None
            if not (kept := self._kept()):
                return
            wait_s = min(used for used, _ in kept) + KEPT_S - time.time()
            OwnFiles._timer = threading.Timer(max(0.0, wait_s) + 1, self._prune_in_time, (max_bytes,))
            OwnFiles._timer.daemon = True
            OwnFiles._timer.start()

    def prune(self, max_bytes: int) -> None:
        """Remove uploads that are old, too many, or too large together; the newest one always stays."""
        n_kept = n_bytes = 0
        for used, folder in sorted(self._kept(), reverse=True):
            n_bytes += _size(folder / _NAME)
            is_too_much = n_kept > 0 and (n_kept >= MAX_KEPT or n_bytes > max_bytes)
            if is_too_much or time.time() - used > KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                n_kept += 1

    def _kept(self) -> list[tuple[float, Path]]:
        found = []
        for folder in self._work_dir.glob(f"{_KEPT_PREFIX}*"):
            try:
                found.append((folder.stat().st_mtime, folder))
            except OSError:
                continue  # removed meanwhile
        return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, which outlives the first one; copy it where the system has no such links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
