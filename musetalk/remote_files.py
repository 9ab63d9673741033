"""Weight files as their hosts describe them before they are fetched, and the errors of those hosts.

Uses the network through huggingface_hub; receives no file. No text contains a token or an address.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url, utils
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from musetalk.errors import WeightsError
from musetalk.manifest import WeightFile

# Consecutive attempts without a new byte before giving up.
TRIES = 6
# Longest silence of a connection.
IDLE_S = 30.0
MAX_PAUSE_S = 30.0
# `build_hf_headers` is documented, but not exported as type checkers require.
_hub_utils: Any = utils
# Statuses after which a retry may succeed.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
# Offsets count bytes of the file itself. Another host than the hub gets these headers alone, never the login.
NO_COMPRESSION: Mapping[str, str] = {"Accept-Encoding": "identity"}


@dataclass(frozen=True)
class RemoteFile:
    """File as its host describes it; `sha256`, or `git_sha1` of a small file kept in git, if the hub states it."""

    entry: WeightFile
    url: str
    n_bytes: int | None
    # They contain the login.
    headers: Mapping[str, str] = field(repr=False)
    sha256: str | None = None
    git_sha1: str | None = None
    commit: str | None = None
    tag: str = "any"

    def part_path(self, models_dir: Path) -> Path:
        """Return the path of the unfinished file: in the final folder, because a rename cannot leave its disk."""
        path = models_dir / self.entry.name
        return path.with_name(f".{path.name}.{self.tag}.part")


class TransientError(Exception):
    """The host or the connection failed; a retry may succeed."""


def describe_all(
    entries: Sequence[WeightFile], endpoint: str | None, say: Callable[[str], None], pause: Callable[[float], None]
) -> list[RemoteFile]:
    """Ask the hosts about all files first, so that a refusal is reported before gigabytes are fetched."""
    remotes: list[RemoteFile] = []
    for entry in entries:
        try:
            remotes.append(_describe_with_retries(entry, endpoint, pause))
        except WeightsError as error:
            if entry.is_needed:
                raise
            say(f"{error.message}; this file is optional")
    return remotes


def _describe_with_retries(entry: WeightFile, endpoint: str | None, pause: Callable[[float], None]) -> RemoteFile:
    for n_try in range(TRIES):
        try:
            return _describe(entry, endpoint)
        except TransientError as error:
            if n_try + 1 == TRIES:
                raise give_up_error(entry, error) from None
        pause(min(MAX_PAUSE_S, 2.0**n_try))
    raise AssertionError("the last attempt returns or raises")


def _describe(entry: WeightFile, endpoint: str | None) -> RemoteFile:
    """Ask for the size and checksum of a file."""
    with client_errors_of(entry):
        return _describe_on_hub(entry, endpoint) if entry.repo else _describe_elsewhere(entry)


def _describe_on_hub(entry: WeightFile, endpoint: str | None) -> RemoteFile:
    def address(revision: str | None) -> str:
        return hf_hub_url(entry.repo, entry.repo_path, revision=revision, endpoint=endpoint)

    try:
        metadata = get_hf_file_metadata(address(entry.revision), endpoint=endpoint)
    except HfHubHTTPError as error:
        raise status_error(entry, error.response.status_code) from None
    # The hub's ETag is the SHA-256 of a large file, or the git blob id of a small one.
    etag = (metadata.etag or "").lower()
    is_sha256, is_sha1 = (re.fullmatch(rf"[0-9a-f]{{{n}}}", etag) is not None for n in (64, 40))
    return RemoteFile(
        entry=entry,
        # The branch may move meanwhile, the described commit does not.
        url=address(metadata.commit_hash or entry.revision),
        n_bytes=metadata.size,
        headers=_hub_utils.build_hf_headers(),
        sha256=etag if is_sha256 else None,
        git_sha1=etag if is_sha1 else None,
        commit=metadata.commit_hash,
        tag=_version_tag(etag),
    )


def _describe_elsewhere(entry: WeightFile) -> RemoteFile:
    answer = get_session().head(entry.url, headers=NO_COMPRESSION, timeout=IDLE_S, follow_redirects=True)
    if answer.status_code in {403, 405, 501}:
        # A signed address may allow only GET; the checksum is then the only check.
        return RemoteFile(entry=entry, url=entry.url, n_bytes=entry.n_bytes, headers=NO_COMPRESSION)
    if answer.status_code != 200:
        raise status_error(entry, answer.status_code)
    size = answer.headers.get("Content-Length", "")
    return RemoteFile(
        entry=entry,
        url=entry.url,
        n_bytes=int(size) if size.isdigit() else entry.n_bytes,
        headers=NO_COMPRESSION,
        tag=_version_tag(answer.headers.get("ETag", "")),
    )


def _version_tag(etag: str) -> str:
    """Return a short name of one version of a file, so that a part of another version is not resumed."""
    return hashlib.sha256(etag.encode()).hexdigest()[:12] if etag else "any"


def check_description(remote: RemoteFile) -> None:
    """Raise WeightsError if the host describes another file than the manifest."""
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


def status_error(entry: WeightFile, status: int) -> Exception:
    """Return the error for a status other than success: TransientError or WeightsError."""
    if status in _TRANSIENT:
        return TransientError(f"the host answered {status}")
    if status in {401, 403}:
        advice = (
            "the file is gated, private or gone; set HF_TOKEN to a token that may read it" if entry.repo else "refused"
        )
        return WeightsError(f"{entry.name}: {entry.source} answered {status}: {advice}", file=entry.name, status=status)
    what = "there is no such file" if status == 404 else "unexpected status"
    return WeightsError(f"{entry.name}: {entry.source} answered {status}: {what}", file=entry.name, status=status)


@contextlib.contextmanager
def client_errors_of(entry: WeightFile) -> Iterator[None]:
    """Translate errors of the HTTP client into TransientError or WeightsError; its own texts contain addresses."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise WeightsError(
            f"{entry.name} is missing and cannot be fetched: HF_HUB_OFFLINE is set", file=entry.name
        ) from None
    except _client_errors() as error:
        raise TransientError(f"the connection failed ({type(error).__name__})") from None


def _client_errors() -> tuple[type[Exception], ...]:
    """Base class of the errors of the hub's HTTP client; the library depends on the hub's release."""
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    error: type[Exception] = library.RequestError
    return (error,)


def give_up_error(entry: WeightFile, error: TransientError) -> WeightsError:
    return WeightsError(
        f"{entry.name} could not be fetched from {entry.source}: {error}, {TRIES} attempts in a row; "
        "fetch again to resume after the received bytes",
        file=entry.name,
        retryable=True,
    )
