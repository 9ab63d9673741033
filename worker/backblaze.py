"""A bucket of Backblaze B2 as a store, through b2sdk. Knows no downloads, no jobs.

b2sdk renews authorizations, splits large files into parts and resumes them. It gives up on a burst of 503 within
milliseconds, and it limits no upload as a whole. This module adds back-off with a new upload URL for each attempt, and
a deadline. The upload runs in a thread of its own. When the deadline passes or the job is to stop, this module shuts
the thread's sockets and refuses its next call, so that the thread ends within a moment and the caller returns at once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import random
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import b2sdk.v3 as b2
import requests
from b2sdk.v3.exception import (
    AccessDenied,
    B2ConnectionError,
    B2Error,
    B2RequestTimeout,
    BucketIdNotFound,
    CapExceeded,
    ClockSkew,
    InvalidAuthToken,
    MaxRetriesExceeded,
    NonExistentBucket,
    NotAllowedByAppKeyError,
    RestrictedBucket,
    StorageCapExceeded,
    TooManyRequests,
    Unauthorized,
    UnusableFileName,
)

from musetalk.errors import CancelledError, DeadlineError, MuseTalkError, ProcessingError, SettingsError, StorageError
from worker.net.connections import CutSwitch, SwitchedAdapter, describe
from worker.stored import StoredObject, TimeLimit, object_name, sha1_of, sidecar_bytes

logger = logging.getLogger("musetalk.backblaze")
# Below this level b2sdk logs its calls with their arguments, tokens among them, and whole responses.
logging.getLogger("b2sdk").setLevel(logging.CRITICAL)

VIDEO_TYPE = "video/mp4"
SIDECAR_TYPE = "application/json"

_POLL_S = 0.05
_MAX_SIDECAR_S = 30.0
_CHECK_S = 20.0

# The longest that B2 grants: a week.
MAX_LINK_LIFETIME_S = 604_800

T = TypeVar("T")


@dataclass(frozen=True)
class B2Settings:
    """Credentials and limits for one bucket; `repr` leaves out key and key id. Times in seconds.

    `realm` is `production` or the address of another B2. Links to a private bucket contain a token that expires after
    `link_lifetime_s`; `is_private` says whether the bucket is one (None: ask B2).
    """

    key_id: str = field(repr=False)
    app_key: str = field(repr=False)
    bucket: str
    prefix: str = "avatar/outputs"
    realm: str = "production"
    is_private: bool | None = None
    link_lifetime_s: int = MAX_LINK_LIFETIME_S
    tries: int = 6
    backoff_s: float = 1.0
    max_backoff_s: float = 20.0
    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.link_lifetime_s <= MAX_LINK_LIFETIME_S:
            raise SettingsError(
                f"links cannot be valid for {self.link_lifetime_s} s; B2 allows 1 to {MAX_LINK_LIFETIME_S} s"
            )
        object_name(self.prefix, "x" * 1000)  # raises if the prefix leaves no room for a name


class _StoppedError(B2Error):  # type: ignore[misc]  # b2sdk carries no types
    """The upload was given up. Raised in b2sdk's threads, which pass a B2Error through unchanged."""


class _Connection:
    """One B2Api and its sockets, which another thread can close; used by one upload at a time."""

    def __init__(self, settings: B2Settings, account: Any) -> None:
        self.switch = CutSwitch()
        self.limit: TimeLimit | None = None
        self.session = _Session(self, settings)
        # Without decode_content b2sdk would replace the session's transport. Nothing is downloaded here.
        config = b2.B2HttpApiConfig(http_session_factory=lambda: self.session, decode_content=True)
        self.api = b2.B2Api(account_info=account, api_config=config, max_upload_workers=4)

    def check(self) -> None:
        """Raise if this connection was given up."""
        if self.switch.is_cut:
            raise _StoppedError("the upload was given up")

    def give_up(self) -> None:
        """End every call on this connection and refuse later ones."""
        self.switch.cut()
        self.session.close()


class _Session(requests.Session):
    """Session for b2sdk: time-outs within the deadline, no call after giving up, bounded `Retry-After`."""

    def __init__(self, connection: _Connection, settings: B2Settings) -> None:
        super().__init__()
        self._connection = connection
        self._settings = settings
        adapter = SwitchedAdapter(connection.switch)
        self.mount("http://", adapter)
        self.mount("https://", adapter)

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a request with our time-outs; b2sdk's own ones are two to twenty minutes."""
        self._connection.check()
        left = self._connection.limit.remaining_s() if self._connection.limit else self._settings.idle_timeout_s
        # urllib3 applies the first one to each block that it sends as well, which detects a server that stops reading.
        kwargs["timeout"] = tuple(
            max(min(own, left), 0.05) for own in (self._settings.connect_timeout_s, self._settings.idle_timeout_s)
        )
        try:
            response = super().request(*args, **kwargs)
        except Exception:  # whatever it is: b2sdk would take our own cut for a fault, and retry
            self._connection.check()
            raise
        asked = response.headers.pop("Retry-After", "")
        if asked.isdecimal():
            # b2sdk sleeps that long, however long it is; `_with_retries` makes the longer pauses.
            longest = int(max(min(self._settings.max_backoff_s, left / 4), 1))
            response.headers["Retry-After"] = str(min(int(asked), longest))
        return response


class _Progress(b2.AbstractProgressListener):  # type: ignore[misc]  # b2sdk carries no types
    """Progress listener that stops sending a body after the upload was given up."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__()
        self._connection = connection

    def set_total_bytes(self, total_byte_count: int) -> None:
        """Do nothing: the size is known."""

    def bytes_completed(self, byte_count: int) -> None:  # noqa: ARG002 - b2sdk's signature
        """Raise if the upload was given up; b2sdk calls this for each block that it reads for sending."""
        self._connection.check()


class B2Store:
    """Bucket of Backblaze B2. One instance serves the process; it authorizes once, and again when B2 requires it."""

    def __init__(self, settings: B2Settings) -> None:
        self.settings = settings
        self._account = b2.InMemoryAccountInfo()
        self._connections: list[_Connection] = []
        self._lock = threading.Lock()
        self._is_private = settings.is_private

    def check(self) -> None:
        """Authorize, find the bucket and check that the key may write under the prefix; see Store.check."""
        try:
            self._attempt(self._check_rights, TimeLimit(_CHECK_S, lambda: False))
        except Exception as problem:  # noqa: BLE001 - b2sdk raises AssertionError, KeyError, ValueError as well
            self._renew_after(problem)
            reason = str(problem) if isinstance(problem, MuseTalkError) else self._describe(problem)
            if isinstance(problem, (*_WRONG_SETTINGS, SettingsError)):
                raise SettingsError(f"B2 refuses uploads: {reason}; check {_VARIABLES}") from None
            logger.warning("B2 check failed; starting anyway", extra={"reason": reason})

    def _check_rights(self, connection: _Connection) -> None:
        self._bucket(connection)
        allowed = self._account.get_allowed() or {}
        if "writeFiles" not in allowed.get("capabilities", ["writeFiles"]):
            raise SettingsError("the key may not write files")
        if not object_name(self.settings.prefix, "x").startswith(allowed.get("namePrefix") or ""):
            raise SettingsError("the key may not write names that begin with B2_PREFIX")

    def upload(
        self,
        path: Path,
        job_id: str | None,
        sidecar: Mapping[str, object],
        *,
        deadline_s: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> StoredObject:
        """Upload the MP4, then the sidecar; see Store.upload."""
        limit = TimeLimit(deadline_s, should_stop)
        name = object_name(self.settings.prefix, job_id)
        sha1, n_bytes = sha1_of(path, limit)

        def send(connection: _Connection) -> None:
            version = self._bucket(connection).upload_local_file(
                str(path), name, content_type=VIDEO_TYPE, sha1_sum=sha1, progress_listener=_Progress(connection)
            )
            # b2sdk only asserts this, which `python -O` skips; a large file has no SHA-1 of its own.
            if version.content_sha1 not in {None, "none", sha1}:
                raise AssertionError("SHA-1 differs")  # as b2sdk does, so that both are retried alike

        self._with_retries(send, limit)
        url = self._with_retries(lambda connection: self._download_url(connection, name), limit)
        stored = StoredObject(name, url, n_bytes, sha1, self.settings.bucket)
        self._upload_sidecar(sidecar, stored, TimeLimit(min(limit.remaining_s(), _MAX_SIDECAR_S), should_stop))
        return stored

    def close(self) -> None:
        """End all connections; the store can still be used afterwards."""
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.give_up()

    def _upload_sidecar(self, sidecar: Mapping[str, object], stored: StoredObject, limit: TimeLimit) -> None:
        name = stored.name.removesuffix(".mp4") + ".json"
        # The video is stored: a job must not run again for its sidecar.
        try:
            body = sidecar_bytes(sidecar, stored)
            self._with_retries(
                lambda connection: self._bucket(connection).upload_bytes(
                    body, name, content_type=SIDECAR_TYPE, progress_listener=_Progress(connection)
                ),
                limit,
            )
        except (ProcessingError, TypeError, ValueError) as problem:
            logger.warning("sidecar not stored", extra={"reason": str(problem)})

    def _with_retries(self, work: Callable[[_Connection], T], limit: TimeLimit) -> T:
        """Repeat `work` until it succeeds, with growing pauses.

        Raises StorageError if B2 refuses or after the last attempt, and as `TimeLimit.check`.
        """
        n_try = 0
        while True:
            n_try += 1
            try:
                return self._attempt(work, limit)
            except (CancelledError, DeadlineError):
                raise
            except Exception as problem:  # noqa: BLE001 - b2sdk raises AssertionError, KeyError, ValueError as well
                self._renew_after(problem)
                reason = self._describe(problem)
                limit.last_fault = reason
                logger.warning("upload attempt failed", extra={"n_try": n_try, "reason": reason})
                if not _is_transient(problem) or n_try >= self.settings.tries:
                    raise StorageError(f"B2 did not store the file: {reason}", tries=n_try) from None
                asked_s = getattr(problem, "retry_after_seconds", None) or 0
            backoff = self.settings.backoff_s * 2 ** (n_try - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
            limit.pause(min(max(backoff, asked_s), self.settings.max_backoff_s))

    def _attempt(self, work: Callable[[_Connection], T], limit: TimeLimit) -> T:
        """Call `work` in a thread of its own, which is abandoned when the deadline passes or the job is to stop."""
        limit.check()
        with self._lock:
            connection = self._connections.pop() if self._connections else _Connection(self.settings, self._account)
        connection.limit = limit
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                outcome.set_result(work(connection))
            except BaseException as problem:  # noqa: BLE001 - raised in the caller's thread
                outcome.set_exception(problem)

        thread = threading.Thread(target=run, name="b2-upload", daemon=True)
        thread.start()
        try:
            while not outcome.done():
                limit.check()
                concurrent.futures.wait([outcome], timeout=max(min(_POLL_S, limit.remaining_s()), 0.001))
        except BaseException:
            connection.give_up()
            thread.join(1.0)
            raise
        error = outcome.exception()
        if error is not None:
            connection.give_up()  # other threads of b2sdk may still send parts of a large file on it
            raise error
        with self._lock:
            self._connections.append(connection)
        return outcome.result()

    def _bucket(self, connection: _Connection) -> Any:
        """Return the bucket; authorize first if that was not done yet."""
        try:
            self._account.get_account_auth_token()
        except b2.exception.MissingAccountData:
            connection.api.authorize_account(
                realm=self.settings.realm,
                application_key_id=self.settings.key_id,
                application_key=self.settings.app_key,
            )
        bucket = connection.api.get_bucket_by_name(self.settings.bucket)
        if self._is_private is None and bucket.type_ is not None:
            self._is_private = bucket.type_ == "allPrivate"
        return bucket

    def _download_url(self, connection: _Connection, name: str) -> str:
        """Return the object's address on the account's download host, with a token if the bucket is private."""
        bucket = self._bucket(connection)
        url: str = bucket.get_download_url(name)
        if self._is_private is None:
            self._is_private = self._is_bucket_private(connection, url)
        if not self._is_private:
            return url
        token = bucket.get_download_authorization(name, self.settings.link_lifetime_s)
        return f"{url}?Authorization={quote(token, safe='')}"

    def _is_bucket_private(self, connection: _Connection, url: str) -> bool:
        """Ask for the bucket's type; if the key may not list buckets, test whether anyone can read the object."""
        with contextlib.suppress(Unauthorized):
            return any(bucket.type_ == "allPrivate" for bucket in connection.api.list_buckets(self.settings.bucket))
        return connection.session.request("HEAD", url).status_code in {401, 403}

    def _renew_after(self, problem: Exception) -> None:
        """Drop the upload URL, so that the next attempt gets a new one; after a refusal also the authorization."""
        bucket_id = self._account.get_bucket_id_or_none_from_bucket_name(self.settings.bucket)
        if bucket_id is not None:
            self._account.clear_bucket_upload_data(bucket_id)
        if not _is_transient(problem) or isinstance(problem, InvalidAuthToken):
            self._account.clear()

    def _describe(self, problem: BaseException) -> str:
        """Describe a failed attempt for a person: what B2 answered, without keys, tokens and addresses."""
        if isinstance(problem, MaxRetriesExceeded) and problem.exception_info_list:
            return self._describe(problem.exception_info_list[-1])
        for kind, text in _REASONS:
            if isinstance(problem, kind):
                return text
        if isinstance(problem, (B2ConnectionError, B2RequestTimeout, OSError)):
            return f"the {describe(problem)}"  # its own text contains whole URLs
        if isinstance(problem, AssertionError):
            return "B2 reports another SHA-1 for the stored file"
        if not isinstance(problem, B2Error):
            return f"B2 sent an unreadable answer ({type(problem).__name__})"
        text = str(problem)
        for secret in (self.settings.app_key, self.settings.key_id, *self._tokens()):
            text = text.replace(secret, "…") if secret else text
        for pattern, instead in _SECRETS:
            text = pattern.sub(instead, text)
        return f"{type(problem).__name__}: {' '.join(text.split())[:200]}"

    def _tokens(self) -> list[str]:
        """The authorization token in use, if there is one."""
        try:
            return [str(self._account.get_account_auth_token())]
        except b2.exception.MissingAccountData:
            return []


# B2 may quote in its own words what it was sent: a token in use is known by value, all others by these patterns.
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # Whatever the name of a secret introduces, up to the end of the sentence; a signature may be several words.
    (
        re.compile(
            r"(\b\w*(?:token|signature|authorization|credential|secret|password)\w*)[\"']?\s*[:=][^.;]*", re.IGNORECASE
        ),
        r"\1: …",
    ),
    (re.compile(r"\"[^\"]*\"|'[^']*'|`[^`]*`"), "…"),
    # Addresses, long words, file ids and tokens.
    (re.compile(r"https?://\S+|\burl: \S+|\S{40,}|\b\d_\S+"), "…"),
    # Words of letters and digits, as a shorter token or a part of one is.
    (re.compile(r"(?=\S*[A-Za-z])(?=\S*\d)[^\s(]{8,}"), "…"),
)

_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (NonExistentBucket, "the bucket does not exist"),
    (BucketIdNotFound, "the bucket does not exist"),
    (RestrictedBucket, "the key is for another bucket"),
    (StorageCapExceeded, "the account's storage cap is exceeded"),
    (CapExceeded, "the account's cap on calls is exceeded"),
    (TooManyRequests, "B2 throttles this account (too many requests)"),
)
# The settings that can cause the errors below.
_VARIABLES = "B2_KEY_ID, B2_APP_KEY, B2_BUCKET_NAME and B2_PREFIX"
# Errors that only other settings can fix.
_WRONG_SETTINGS = (
    Unauthorized,
    NonExistentBucket,
    BucketIdNotFound,
    RestrictedBucket,
    AccessDenied,
    NotAllowedByAppKeyError,
)
_REFUSALS = (*_WRONG_SETTINGS, CapExceeded, ClockSkew, UnusableFileName)


def _is_transient(problem: BaseException) -> bool:
    """Whether a retry may succeed: not if B2 refuses the key, the bucket, the name or the amount."""
    if isinstance(problem, MaxRetriesExceeded):
        return any(_is_transient(inner) for inner in problem.exception_info_list)
    if isinstance(problem, InvalidAuthToken):
        return True
    return not isinstance(problem, (*_REFUSALS, ProcessingError))
