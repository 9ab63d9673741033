"""Download of weight files: resumed where they were cut, verified, and only then given their names.

With `remote_files` the only module of the model that uses the network. Requests go through huggingface_hub, which
handles the mirror (HF_ENDPOINT), the login (HF_TOKEN), HF_HUB_OFFLINE and the HTTP client. The one file that is not on
the hub uses the same client, so that one code path resumes and verifies all files. The hub's own download function is
not used: with it each process starts a file from the beginning, and an interrupted download of 3.4 GB should resume.
No message contains a token or an address, because its query may be a signature.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import get_session

from musetalk.errors import WeightsError
from musetalk.fetch_progress import Progress, Watcher
from musetalk.files import PartFile, is_disk_full
from musetalk.manifest import (
    MANIFEST,
    ModelVersion,
    Recorded,
    WeightFile,
    files_of,
    find_file,
    read_record,
    readable_size,
    sha256_of,
    write_record,
)
from musetalk.remote_files import (
    IDLE_S,
    MAX_PAUSE_S,
    NO_COMPRESSION,
    TRIES,
    RemoteFile,
    TransientError,
    check_description,
    client_errors_of,
    describe_all,
    give_up_error,
    status_error,
)

_LOCK_NAME = ".fetch.lock"


def fetch(
    models_dir: Path,
    version: ModelVersion,
    *,
    manifest: Sequence[WeightFile] = MANIFEST,
    watcher: Watcher | None = None,
    endpoint: str | None = None,
    room_for_conversion: bool = False,
    pause: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Fetch the files of `version` that are missing in `models_dir`; return their names.

    Makes no request if all exist. A file gets its name only after its size and SHA-256 have been verified. The next
    call resumes an unfinished file, which stays in the same folder. `endpoint` replaces HF_ENDPOINT; `pause` waits so
    many seconds. Raises WeightsError that names the file: unavailable, wrong, cut repeatedly, or a full disk.
    """
    watcher = watcher or Watcher()
    if int(huggingface_hub.__version__.split(".")[0]) < 1:
        raise WeightsError(
            f"fetching needs huggingface_hub 1.0 or later, but {huggingface_hub.__version__} is installed "
            "(transformers 4 requires an older one); fetch the folder in another environment and use it here"
        )
    _make_folder(models_dir)
    with _folder_lock(models_dir, watcher.say):
        missing = [entry for entry in files_of(manifest, version) if not _is_complete(models_dir, entry, watcher.say)]
        if not missing:
            return []
        remotes = describe_all(missing, endpoint, watcher.say, pause)
        for remote in remotes:
            check_description(remote)
        # Only after all descriptions: the room depends on the sizes that the hosts announce.
        _check_room(models_dir, remotes, room_for_conversion)
        return _fetch_all(models_dir, remotes, watcher, pause)


def _fetch_all(
    models_dir: Path, remotes: Sequence[RemoteFile], watcher: Watcher, pause: Callable[[float], None]
) -> list[str]:
    n_done, n_total = 0, sum(remote.n_bytes or 0 for remote in remotes)
    for remote in remotes:
        entry, is_size_known = remote.entry, remote.n_bytes is not None
        size = readable_size(remote.n_bytes) if remote.n_bytes is not None else "size unknown"
        watcher.say(f"fetching {entry.name} ({size}) from {entry.source}")

        # Defaults, because a closure would see the variables of later rounds.
        def report(
            n: int, name: str = entry.name, before: int = n_done, total: int = n_total, is_known: bool = is_size_known
        ) -> None:
            watcher.on_progress(Progress(name, before + n, total if is_known else total + n))

        recorded = _Download(models_dir, remote, report, pause).run()
        # After each file, so that the record is complete even if the next one fails.
        write_record(models_dir, {**read_record(models_dir), entry.name: recorded})
        n_done += recorded.n_bytes
        n_total += 0 if is_size_known else recorded.n_bytes
        watcher.say(f"{entry.name} is complete, SHA-256 {recorded.sha256[:16]}…")
    return [remote.entry.name for remote in remotes]


# -- existing files --------------------------------------------------------------------------------------------------


def _is_complete(models_dir: Path, entry: WeightFile, say: Callable[[str], None]) -> bool:
    """Whether `entry` need not be fetched: its official file is right, or it exists in another format.

    A file without a record is hashed once and then recorded.
    """
    path = find_file(models_dir, entry.name)
    if path != models_dir / entry.name:
        return path is not None
    recorded, n_bytes = read_record(models_dir).get(entry.name), path.stat().st_size
    right = recorded.n_bytes if recorded is not None else entry.n_bytes
    if right is not None and n_bytes != right:
        say(f"{entry.name} has {n_bytes:,} bytes instead of {right:,} and is fetched again")
        return False
    if recorded is not None or entry.sha256 is None:
        return True
    say(f"checking {entry.name}, which exists already")
    found = sha256_of(path)
    if not found.startswith(entry.sha256):
        say(f"{entry.name} has the SHA-256 {found} instead of {entry.sha256} and is fetched again")
        return False
    recorded = Recorded(n_bytes=n_bytes, sha256=found)
    # A read-only folder can be used as well; its files are then checked again next time.
    with contextlib.suppress(WeightsError):
        write_record(models_dir, {**read_record(models_dir), entry.name: recorded})
    return True


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"the models folder cannot be created ({error.strerror})") from None


@contextlib.contextmanager
def _folder_lock(models_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock of the folder: a second fetch waits and then finds the files."""
    try:
        lock = (models_dir / _LOCK_NAME).open("w")
    except OSError:
        # A read-only folder needs no lock. If a file is missing, the attempt to write it reports the problem.
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching into this folder; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # Some network disks have no locks. Two fetches there waste time, but checksums still guard the files.
            pass
        yield


def _check_room(models_dir: Path, remotes: Sequence[RemoteFile], room_for_conversion: bool) -> None:
    """Raise WeightsError if a disk has less room than the rest of its files needs.

    Folders of `models_dir` may be links to several disks, so that the room is counted for each.
    """
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for remote in remotes:
        folder = (models_dir / remote.entry.name).parent
        _make_folder(folder)
        device = folder.stat().st_dev
        folders.setdefault(device, folder)
        size, part = remote.n_bytes or 0, remote.part_path(models_dir)
        needed[device] = needed.get(device, 0) + size - min(size, part.stat().st_size if part.is_file() else 0)
        if room_for_conversion and remote.entry.precision is not None:
            needed[device] += size // 2 if remote.entry.precision == "half" else size
    for device, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if free < needed[device]:
            raise WeightsError(
                f"the disk of the models folder has {readable_size(free)} free, but the weights need "
                f"{readable_size(needed[device])}",
                free_bytes=free,
                needed_bytes=needed[device],
                kind="disk",
            )


# -- one file ---------------------------------------------------------------------------------------------------------


class _WeightsPart(PartFile):
    """Growing file of one weight file; continues the part of an earlier call. Raises WeightsError."""

    def __init__(self, path: Path, name: str, n_total: int | None) -> None:
        super().__init__(path)
        self._name, self._n_total = name, n_total

    def __enter__(self) -> _WeightsPart:
        with self.disk_errors():
            # Parts of other versions of the file can never be finished.
            for other in self._path.parent.glob(f".{Path(self._name).name}.*.part"):
                if other != self._path:
                    other.unlink()
        super().__enter__()
        return self

    def git_sha1(self) -> str:
        """Return the git blob id of the file, by which the hub describes its small files."""
        with self.disk_errors():
            content = self._path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Translate OSError into WeightsError that names the file."""
        try:
            yield
        except OSError as error:
            if not is_disk_full(error):
                reason = error.strerror or type(error).__name__
                raise WeightsError(f"{self._name} cannot be written ({reason})", file=self._name) from None
            n_total = "an unknown size" if self._n_total is None else readable_size(self._n_total)
            raise WeightsError(
                f"the disk is full: {self._name} needs {n_total}, of which {readable_size(self.n_bytes)} have arrived",
                file=self._name,
                needed_bytes=None if self._n_total is None else self._n_total - self.n_bytes,
                kind="disk",
            ) from None


class _Download:
    """Download of one file to its final path."""

    def __init__(
        self, models_dir: Path, remote: RemoteFile, report: Callable[[int], None], pause: Callable[[float], None]
    ) -> None:
        self._destination = models_dir / remote.entry.name
        self._part_path = remote.part_path(models_dir)
        self._remote, self._report, self._pause = remote, report, pause

    def run(self) -> Recorded:
        """Receive, check and rename; return the entry for the record. Raises WeightsError."""
        remote = self._remote
        _make_folder(self._destination.parent)
        with _WeightsPart(self._part_path, remote.entry.name, remote.n_bytes) as part:
            was_begun = part.n_bytes > 0
            self._receive_all(part)
            problem = self._mismatch(part)
            if problem is not None and was_begun:
                # The part of an earlier call may be damaged, so one attempt starts from the beginning.
                part.restart()
                self._receive_all(part)
                problem = self._mismatch(part)
            if problem is not None:
                part.remove()
                raise WeightsError(f"{remote.entry.name} {problem}; the file was removed", file=remote.entry.name)
            part.commit(self._destination)
            return Recorded(n_bytes=part.n_bytes, sha256=part.digest, commit=remote.commit)

    def _mismatch(self, part: _WeightsPart) -> str | None:
        """Describe how the checksum of the whole file differs from the expected one; None if it does not."""
        remote, found = self._remote, part.digest
        for expected in (remote.entry.sha256, remote.sha256):
            if expected is not None and not found.startswith(expected):
                begins = "" if len(expected) == len(found) else "one that begins with "
                return f"has the SHA-256 {found}, expected {begins}{expected}"
        if remote.git_sha1 is not None and (sha1 := part.git_sha1()) != remote.git_sha1:
            return f"has the git checksum {sha1}, expected {remote.git_sha1}"
        return None

    def _receive_all(self, part: _WeightsPart) -> None:
        """Retry until all bytes have arrived; raises WeightsError after TRIES attempts without a new byte."""
        # Not `part.n_bytes`: a host that cannot resume makes the part start again.
        n_most, n_in_vain = part.n_bytes, 0
        while True:
            try:
                self._receive(part)
                return
            except TransientError as error:
                n_in_vain = 0 if part.n_bytes > n_most else n_in_vain + 1
                n_most = max(n_most, part.n_bytes)
                if n_in_vain == TRIES:
                    raise give_up_error(self._remote.entry, error) from None
            self._pause(min(MAX_PAUSE_S, 2.0**n_in_vain))

    def _receive(self, part: _WeightsPart) -> None:
        """Receive over one connection; raises TransientError if it ends too early."""
        remote, n_total = self._remote, self._remote.n_bytes
        if n_total is not None and part.n_bytes > n_total:
            part.restart()
        if n_total is not None and part.n_bytes == n_total:
            self._report(part.n_bytes)
            return
        headers = {**remote.headers, **NO_COMPRESSION}
        if part.n_bytes:
            headers["Range"] = f"bytes={part.n_bytes}-"
        with (
            client_errors_of(remote.entry),
            get_session().stream("GET", remote.url, headers=headers, timeout=IDLE_S, follow_redirects=True) as answer,
        ):
            self._check_response(part, answer)
            # Without a block size: the client would hold back less than a block, and lose it if the connection is cut.
            for block in answer.iter_bytes():
                if n_total is not None and part.n_bytes + len(block) > n_total:
                    part.remove()
                    raise WeightsError(
                        f"{remote.entry.name} has more than the {n_total:,} announced bytes; the file was removed",
                        file=remote.entry.name,
                    )
                part.write(block)
                self._report(part.n_bytes)
        if n_total is not None and part.n_bytes < n_total:
            raise TransientError(f"the connection ended after {part.n_bytes:,} of {n_total:,} bytes")

    def _check_response(self, part: _WeightsPart, answer: Any) -> None:
        """Check status and headers, and restart the part unless the body continues it."""
        status = answer.status_code
        if status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {part.n_bytes}-"):
            return
        if status in {200, 206, 416}:
            # The host does not resume where we stopped, so the file starts again.
            part.restart()
        if status == 200:
            return
        if status in {206, 416}:
            raise TransientError("the host did not resume the file")
        raise status_error(self._remote.entry, status)
