"""Download of weight files: resumed where they were cut, verified, and only then renamed.

The only module of the model that uses the network. Requests go through huggingface_hub, which handles the mirror
(HF_ENDPOINT), the login (HF_TOKEN), HF_HUB_OFFLINE and the HTTP client. The one file that is not on the hub uses
the same client, so one code path resumes and verifies. The hub's own download function is not used: it starts each file
again in every process, and an interrupted download of 3.4 GB should resume. No message contains a token, or an address,
whose query may be a signature.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url, utils
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from musetalk.errors import WeightsError
from musetalk.fetch_progress import Progress, Watcher
from musetalk.files import PartFile, is_disk_full
from musetalk.manifest import (
    MANIFEST,
    ModelVersion,
    Recorded,
    WeightFile,
    find,
    in_words,
    read_record,
    sha256_of,
    wanted,
    write_record,
)

# Attempts in a row without a new byte before a file is given up.
TRIES = 6
# Longest silence of a connection.
IDLE_S = 30.0
_MAX_PAUSE_S = 30.0
_BLOCK_BYTES = 2**20
_LOCK_NAME = ".fetch.lock"
# Its headers are documented but not declared as exported, which a type checker minds.
_hub_utils: Any = utils
# Answers that another try may change.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class _Remote:
    """A file as its host describes it: `sha256` and `git_sha1` (of a small file in git) where the hub states them."""

    entry: WeightFile
    url: str
    n_bytes: int | None
    # The login is in them.
    headers: Mapping[str, str] = field(repr=False)
    sha256: str | None = None
    git_sha1: str | None = None
    commit: str | None = None
    tag: str = "any"

    def part_path(self, models_dir: Path) -> Path:
        """Path of the unfinished file: in the final folder, so that a rename finishes it."""
        path = models_dir / self.entry.name
        return path.with_name(f".{path.name}.{self.tag}.part")


class _FaultError(Exception):
    """The host or the way to it failed; another try may work."""


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
    """Fetch the files of `version` that are missing in `models_dir`; return their names. Makes no request if none is.

    A file gets its name only after its size and SHA-256 have been verified; an unfinished one stays beside it and is
    resumed by the next call. `endpoint` is another hub than HF_ENDPOINT's, `pause` waits so many seconds.
    Raises WeightsError that names the file: unavailable, wrong size or checksum, cut repeatedly, or a full disk.
    """
    watcher = watcher or Watcher()
    if int(huggingface_hub.__version__.split(".")[0]) < 1:
        raise WeightsError(
            f"fetching needs huggingface_hub 1.0 or later, here is {huggingface_hub.__version__} (transformers 4 "
            "keeps it back); fetch with another environment, the folder then serves here as well"
        )
    _make_folder(models_dir)
    with _alone(models_dir, watcher.say):
        missing = [entry for entry in wanted(manifest, version) if not _is_there(models_dir, entry, watcher.say)]
        if not missing:
            return []
        remotes = _describe_all(missing, endpoint, watcher.say, pause)
        for remote in remotes:
            _refuse_another_file(remote)
        _check_room(models_dir, remotes, room_for_conversion)
        return _fetch_all(models_dir, remotes, watcher, pause)


def _fetch_all(
    models_dir: Path, remotes: Sequence[_Remote], watcher: Watcher, pause: Callable[[float], None]
) -> list[str]:
    n_done, n_total = 0, sum(remote.n_bytes or 0 for remote in remotes)
    for remote in remotes:
        entry, n_late = remote.entry, 0 if remote.n_bytes is not None else 1
        size = in_words(remote.n_bytes) if remote.n_bytes is not None else "size unknown"
        watcher.say(f"fetching {entry.name} ({size}) from {entry.source}")

        def report(
            n: int, name: str = entry.name, before: int = n_done, total: int = n_total, late: int = n_late
        ) -> None:
            watcher.on_progress(Progress(name, before + n, total + late * n))

        recorded = _Download(models_dir, remote, report, pause).run()
        # After each file, so that the record is right even if the next one fails.
        write_record(models_dir, {**read_record(models_dir), entry.name: recorded})
        n_done += recorded.n_bytes
        n_total += n_late * recorded.n_bytes
        watcher.say(f"{entry.name} is complete, SHA-256 {recorded.sha256[:16]}…")
    return [remote.entry.name for remote in remotes]


# -- existing files --------------------------------------------------------------------------------------------------


def _is_there(models_dir: Path, entry: WeightFile, say: Callable[[str], None]) -> bool:
    """Whether `entry` need not be fetched: its official file is right, or it exists in another format."""
    path = find(models_dir, entry.name)
    if path != models_dir / entry.name:
        return path is not None
    recorded, n_bytes = read_record(models_dir).get(entry.name), path.stat().st_size
    right = recorded.n_bytes if recorded is not None else entry.n_bytes
    if right is not None and n_bytes != right:
        say(f"{entry.name} has {n_bytes:,} bytes instead of {right:,} and is fetched again")
        return False
    if recorded is not None or entry.sha256 is None:
        return True
    say(f"checking {entry.name}, which was there before")
    found = sha256_of(path)
    if not found.startswith(entry.sha256):
        say(f"{entry.name} has the SHA-256 {found} instead of {entry.sha256} and is fetched again")
        return False
    facts = Recorded(n_bytes=n_bytes, sha256=found)
    # A folder that cannot be written to may still be used; it is then looked through again next time.
    with contextlib.suppress(WeightsError):
        write_record(models_dir, {**read_record(models_dir), entry.name: facts})
    return True


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"the models folder cannot be made ({error.strerror})") from None


@contextlib.contextmanager
def _alone(models_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One fetch at a time in a folder; a second one waits and then finds the files."""
    try:
        lock = (models_dir / _LOCK_NAME).open("w")
    except OSError:
        # Read-only: nothing can be written by two; whether that matters turns out when a file is missing.
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process fetches into this folder; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # Some network disks have no locks; two fetches there cost time, and checksums keep the files right.
            pass
        yield


def _check_room(models_dir: Path, remotes: Sequence[_Remote], room_for_conversion: bool) -> None:
    """Raises WeightsError when a disk has less room than what still comes to it."""
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
                f"the disk of the models folder has {in_words(free)} free, and the weights need "
                f"{in_words(needed[device])}",
                free_bytes=free,
                needed_bytes=needed[device],
                kind="disk",
            )


# -- what the hosts say -----------------------------------------------------------------------------------------------


def _describe_all(
    entries: Sequence[WeightFile], endpoint: str | None, say: Callable[[str], None], pause: Callable[[float], None]
) -> list[_Remote]:
    """Ask about all files before a large one is fetched, so that a refusal is reported at once."""
    remotes: list[_Remote] = []
    for entry in entries:
        try:
            remotes.append(_patiently(entry, endpoint, pause))
        except WeightsError as error:
            if entry.is_needed:
                raise
            say(f"{error.message}; it is not needed")
    return remotes


def _patiently(entry: WeightFile, endpoint: str | None, pause: Callable[[float], None]) -> _Remote:
    for n_try in range(TRIES):
        try:
            return _describe(entry, endpoint)
        except _FaultError as fault:
            if n_try + 1 == TRIES:
                raise _gave_up(entry, fault) from None
        pause(min(_MAX_PAUSE_S, 2.0**n_try))
    raise AssertionError("every try ends")


def _describe(entry: WeightFile, endpoint: str | None) -> _Remote:
    """Ask for size and sum of a file without its content."""
    with _named_errors(entry):
        return _describe_on_hub(entry, endpoint) if entry.repo else _describe_elsewhere(entry)


def _describe_on_hub(entry: WeightFile, endpoint: str | None) -> _Remote:
    def address(revision: str | None) -> str:
        return hf_hub_url(entry.repo, entry.repo_path, revision=revision, endpoint=endpoint)

    try:
        facts = get_hf_file_metadata(address(entry.revision), endpoint=endpoint)
    except HfHubHTTPError as error:
        raise _refusal(entry, error.response.status_code) from None
    etag = (facts.etag or "").lower()
    is_sha256, is_sha1 = (re.fullmatch(rf"[0-9a-f]{{{n}}}", etag) is not None for n in (64, 40))
    return _Remote(
        entry=entry,
        # The commit that was described, in case the branch moves in the meantime.
        url=address(facts.commit_hash or entry.revision),
        n_bytes=facts.size,
        headers=_hub_utils.build_hf_headers(),
        sha256=etag if is_sha256 else None,
        git_sha1=etag if is_sha1 else None,
        commit=facts.commit_hash,
        tag=_tag(etag),
    )


def _describe_elsewhere(entry: WeightFile) -> _Remote:
    answer = get_session().head(entry.url, headers=_PLAIN_HEADERS, timeout=IDLE_S, follow_redirects=True)
    if answer.status_code in {403, 405, 501}:
        # A signed address may allow only GET; then the checksum is the only check.
        return _Remote(entry=entry, url=entry.url, n_bytes=entry.n_bytes, headers=_PLAIN_HEADERS)
    if answer.status_code != 200:
        raise _refusal(entry, answer.status_code)
    size = answer.headers.get("Content-Length", "")
    return _Remote(
        entry=entry,
        url=entry.url,
        n_bytes=int(size) if size.isdigit() else entry.n_bytes,
        headers=_PLAIN_HEADERS,
        tag=_tag(answer.headers.get("ETag", "")),
    )


# Offsets count bytes of the file itself. Never the hub's login: this is another host.
_PLAIN_HEADERS: Mapping[str, str] = {"Accept-Encoding": "identity"}


def _tag(etag: str) -> str:
    """A short name for one version of a file, so that a part of another version is not resumed."""
    return hashlib.sha256(etag.encode()).hexdigest()[:12] if etag else "any"


def _refuse_another_file(remote: _Remote) -> None:
    """Raises WeightsError when the host's own description says that it is not the file of the manifest."""
    entry = remote.entry
    if entry.n_bytes is not None and remote.n_bytes is not None and remote.n_bytes != entry.n_bytes:
        raise WeightsError(
            f"{entry.name}: {entry.source} has another file of {remote.n_bytes:,} bytes, expected {entry.n_bytes:,}",
            file=entry.name,
        )
    if entry.sha256 is not None and remote.sha256 is not None and not remote.sha256.startswith(entry.sha256):
        raise WeightsError(
            f"{entry.name}: {entry.source} has another file, SHA-256 {remote.sha256}, expected {entry.sha256}",
            file=entry.name,
        )


def _refusal(entry: WeightFile, status: int) -> Exception:
    """The error for an answer that is not the file."""
    if status in _TRANSIENT:
        return _FaultError(f"the host answered {status}")
    if status in {401, 403}:
        advice = (
            "it is gated, private or gone; HF_TOKEN must contain a token that may read it" if entry.repo else "refused"
        )
        return WeightsError(f"{entry.name}: {entry.source} answered {status}: {advice}", file=entry.name, status=status)
    what = "there is no such file" if status == 404 else "that is no answer to a download"
    return WeightsError(f"{entry.name}: {entry.source} answered {status}: {what}", file=entry.name, status=status)


@contextlib.contextmanager
def _named_errors(entry: WeightFile) -> Iterator[None]:
    """Turn errors of the HTTP client into a fault or a WeightsError, without its texts, which contain addresses."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise WeightsError(
            f"{entry.name} is missing and cannot be fetched: HF_HUB_OFFLINE is set", file=entry.name
        ) from None
    except _client_errors() as error:
        raise _FaultError(f"the connection failed ({type(error).__name__})") from None


def _client_errors() -> tuple[type[Exception], ...]:
    """Base class of what the hub's HTTP client raises; which library that is depends on the hub's release."""
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    error: type[Exception] = library.RequestError
    return (error,)


def _gave_up(entry: WeightFile, fault: _FaultError) -> WeightsError:
    return WeightsError(
        f"{entry.name} could not be fetched from {entry.source}: {fault}, {TRIES} tries in a row; "
        "received bytes are kept and resumed next time",
        file=entry.name,
        retryable=True,
    )


# -- one file ---------------------------------------------------------------------------------------------------------


class _WeightsPart(PartFile):
    """The growing file of one weight file; resumed where an earlier call stopped. Raises WeightsError."""

    def __init__(self, path: Path, name: str, n_total: int | None) -> None:
        super().__init__(path)
        self._name, self._n_total = name, n_total

    def __enter__(self) -> _WeightsPart:
        with self.disk_errors():
            for other in self._path.parent.glob(f".{Path(self._name).name}.*.part"):
                if other != self._path:
                    other.unlink()
        super().__enter__()
        return self

    def git_sha1(self) -> str:
        """The checksum by which git knows a file; the hub keeps small files in git."""
        with self.disk_errors():
            content = self._path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn errors of the disk into WeightsError that names the file."""
        try:
            yield
        except OSError as error:
            if not is_disk_full(error):
                reason = error.strerror or type(error).__name__
                raise WeightsError(f"{self._name} cannot be written ({reason})", file=self._name) from None
            n_total = "an unknown size" if self._n_total is None else in_words(self._n_total)
            raise WeightsError(
                f"the disk is full: {self._name} needs {n_total}, of which {in_words(self.n_bytes)} have arrived",
                file=self._name,
                needed_bytes=None if self._n_total is None else self._n_total - self.n_bytes,
                kind="disk",
            ) from None


class _Download:
    """One file from its host to its place."""

    def __init__(
        self, models_dir: Path, remote: _Remote, report: Callable[[int], None], pause: Callable[[float], None]
    ) -> None:
        self._destination = models_dir / remote.entry.name
        self._part_path = remote.part_path(models_dir)
        self._remote, self._report, self._pause = remote, report, pause

    def run(self) -> Recorded:
        """Receive, check, move; raises WeightsError."""
        remote = self._remote
        _make_folder(self._destination.parent)
        with _WeightsPart(self._part_path, remote.entry.name, remote.n_bytes) as part:
            was_begun = part.n_bytes > 0
            self._receive_all(part)
            problem = self._problem(part)
            if problem is not None and was_begun:
                # The beginning of an earlier call may be what is wrong.
                part.restart()
                self._receive_all(part)
                problem = self._problem(part)
            if problem is not None:
                part.remove()
                raise WeightsError(f"{remote.entry.name} {problem}; the file was removed", file=remote.entry.name)
            part.commit(self._destination)
            return Recorded(n_bytes=part.n_bytes, sha256=part.digest, commit=remote.commit)

    def _problem(self, part: _WeightsPart) -> str | None:
        """Return the problem of the whole file, or None."""
        remote, found = self._remote, part.digest
        for expected in (remote.entry.sha256, remote.sha256):
            if expected is not None and not found.startswith(expected):
                begins = "" if len(expected) == len(found) else " at the beginning"
                return f"has the SHA-256 {found}, expected {expected}{begins}"
        if remote.git_sha1 is not None and (sha1 := part.git_sha1()) != remote.git_sha1:
            return f"has the git checksum {sha1}, expected {remote.git_sha1}"
        return None

    def _receive_all(self, part: _WeightsPart) -> None:
        """Retry until all bytes have arrived; raises WeightsError when no new byte arrives any more."""
        n_most, n_in_vain = part.n_bytes, 0
        while True:
            try:
                self._receive(part)
                return
            except _FaultError as fault:
                n_in_vain = 0 if part.n_bytes > n_most else n_in_vain + 1
                n_most = max(n_most, part.n_bytes)
                if n_in_vain == TRIES:
                    raise _gave_up(self._remote.entry, fault) from None
            self._pause(min(_MAX_PAUSE_S, 2.0**n_in_vain))

    def _receive(self, part: _WeightsPart) -> None:
        """One connection; raises _FaultError when it ends too early."""
        remote, n_total = self._remote, self._remote.n_bytes
        if n_total is not None and part.n_bytes > n_total:
            part.restart()
        if n_total is not None and part.n_bytes == n_total:
            self._report(part.n_bytes)
            return
        headers = {**remote.headers, **_PLAIN_HEADERS}
        if part.n_bytes:
            headers["Range"] = f"bytes={part.n_bytes}-"
        with (
            _named_errors(remote.entry),
            get_session().stream("GET", remote.url, headers=headers, timeout=IDLE_S, follow_redirects=True) as answer,
        ):
            self._begin(part, answer)
            # As it comes: with a block size the client would keep, and lose at a cut, what is less than a block.
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
            raise _FaultError(f"the connection ended after {part.n_bytes:,} of {n_total:,} bytes")

    def _begin(self, part: _WeightsPart, answer: Any) -> None:
        """Check status and headers; afterwards the part is where the body continues."""
        status = answer.status_code
        if status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {part.n_bytes}-"):
            return
        if status in {200, 206, 416}:
            # The host does not resume where we stopped, so the file starts again.
            part.restart()
        if status == 200:
            return
        if status in {206, 416}:
            raise _FaultError("the host cannot resume where the part ends")
        raise _refusal(self._remote.entry, status)
