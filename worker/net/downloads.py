"""Download of an address to a file, with limits in bytes and seconds. Knows no storage, no jobs and no media formats.

`fetch` writes to a temporary name and renames at the end; a failure leaves no file. It retries transient failures
(refused connections, resets, cut bodies, 408, 429, 5xx) and resumes if the host allows it; other failures are final. A
page in place of a file is named as such.
`addresses` checks each redirect, and the connection goes to the address that was checked, so no second lookup leads
elsewhere. Proxies, cookies and credentials of the environment are not used. Logs and errors contain no signed address.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import urllib3

from musetalk.errors import CancelledError, DownloadError
from musetalk.foreign_files import describe_text, shown_text
from worker.net.addresses import (
    Resolver,
    Target,
    check_addresses,
    check_target,
    parse_target,
    redact_text,
    redact_url,
    resolve_host,
)
from worker.net.connections import (
    CutSwitch,
    PinnedAdapter,
    describe,
    is_bad_certificate,
    is_unreachable,
    resolve_within,
)
from worker.net.headers import content_length, is_whole, redirect_url, retry_after_s, version_validator
from worker.net.input_part import InputPart, Kind
from worker.net.local_files import copy_local

logger = logging.getLogger("musetalk.downloads")

# As in the worker before this one; anything smaller is an empty upload or an error text.
MIN_MEDIA_BYTES = 1000
BLOCK_BYTES = 64 * 1024

_POLL_S = 0.1
# Each dead address costs the connect time-out, in every attempt.
_MAX_DIALLED = 4
_TRANSIENT_STATUSES = {408, 425, 429}
_REDIRECTS = {301, 302, 303, 307, 308}
# Other codings are ignored: S3 keeps `aws-chunked` in the header although the body is plain.
_DECODED = {"gzip", "x-gzip", "deflate", "br"}
_NOT_DECODED = {"zstd", "compress"}
_NAMES: dict[Kind, str] = {"video": "a video or picture", "audio": "sound"}
# Of a page that arrives in place of a file; enough to recognise it.
_HEAD_BYTES = 4096
_TRANSPORT_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)


@dataclass(frozen=True)
class DownloadSettings:
    """Limits and permissions of downloads; times in seconds.

    `allowed_hosts` (`host`, `host:port`, `*.suffix`), when set, are the only hosts that are dialled, and they may have
    private addresses. `file_url_roots` are the folders that `file:` addresses may point into. `ca_bundle` replaces the
    public certificate authorities.
    """

    max_video_bytes: int = 500 * 2**20
    max_audio_bytes: int = 100 * 2**20
    total_timeout_s: float = 300.0
    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 30.0
    tries: int = 3
    backoff_s: float = 1.0
    max_pause_s: float = 30.0
    max_redirects: int = 5
    allow_private_networks: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allow_file_urls: bool = False
    file_url_roots: tuple[Path, ...] = ()
    ca_bundle: Path | None = None
    user_agent: str = "musetalk-worker"

    def max_bytes(self, kind: Kind) -> int:
        """Return the byte limit of a source or an audio file."""
        return self.max_video_bytes if kind == "video" else self.max_audio_bytes


@dataclass(frozen=True)
class FetchedFile:
    """A downloaded file: size, SHA-256 (hex), the content type of the host, and the seconds it took."""

    n_bytes: int
    sha256: str
    content_type: str | None
    seconds: float


def fetch(
    url: str,
    destination: Path,
    settings: DownloadSettings,
    *,
    kind: Kind,
    should_stop: Callable[[], bool] = lambda: False,
    sha256: str | None = None,
    resolve: Resolver = resolve_host,
) -> FetchedFile:
    """Download `url` to `destination`; `should_stop` is also called from a helper thread.

    A given `sha256` is compared; a mismatch is retried like a cut connection. Raises DownloadError (`transient` in its
    details if a later attempt could succeed), DiskFullError, or CancelledError once `should_stop()` is true.
    """
    started = time.monotonic()
    is_local = url[:5].lower() == "file:"
    if not is_local:
        parse_target(url)  # a refused address creates no file and no thread
    try:
        with (
            _Watch(settings.total_timeout_s, should_stop) as watch,
            InputPart(destination, kind, settings.max_bytes(kind), url) as part,
        ):
            if is_local:
                roots = settings.file_url_roots if settings.allow_file_urls else None
                content_type = copy_local(url, part, roots, watch.check)
            else:
                content_type = _Download(url, part, settings, watch, resolve, sha256).run()
            _check_head(part, kind, url, content_type)
            if part.n_bytes == 0:
                raise DownloadError(f"the {kind} is empty", url=redact_url(url))
            if sha256 is not None and part.digest != sha256.lower():
                raise DownloadError(f"the {kind} does not have the expected checksum", url=redact_url(url))
            watch.check()
            # A job's inputs are useless after a crash: fsync of hundreds of megabytes would only delay the job.
            part.commit(destination, is_durable=False)
            return FetchedFile(part.n_bytes, part.digest, content_type, time.monotonic() - started)
    except _TimeUpError:
        text = f"the {kind} could not be fetched: it did not arrive within {settings.total_timeout_s:g} s"
        raise DownloadError(text, url=redact_url(url), transient=True) from None


def _check_head(part: InputPart, kind: Kind, url: str, content_type: str | None) -> None:
    """Raise DownloadError for a page or another text in place of a media file."""
    head = part.head(_HEAD_BYTES)
    found = describe_text(head)
    if found is None:
        return
    of_type = f" ({content_type.split(';')[0].strip()[:60]})" if content_type else ""
    beginning = redact_text(shown_text(head))
    raise DownloadError(
        f"the address returned {found}{of_type}, not {_NAMES[kind]}: {beginning}",
        url=redact_url(url),
        content_type=content_type and content_type[:100],
        beginning=beginning,
    )


def fetch_together(
    wanted: Sequence[tuple[str, Path, Kind]], settings: DownloadSettings, should_stop: Callable[[], bool]
) -> list[FetchedFile]:
    """Fetch several files at the same time, each (url, destination, kind); raises as `fetch`.

    The first failure stops the others; if several fail, the error of the first one in `wanted` is raised.
    """
    failed = threading.Event()

    def fetch_one(one: tuple[str, Path, Kind]) -> FetchedFile:
        url, destination, kind = one
        try:
            return fetch(url, destination, settings, kind=kind, should_stop=lambda: should_stop() or failed.is_set())
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(len(wanted), thread_name_prefix="download") as pool:
        # Each thread gets a copy of the context: the logs take the job's id from it.
        parts = [pool.submit(contextvars.copy_context().run, fetch_one, one) for one in wanted]
    errors = [error for part in parts if (error := part.exception()) is not None]
    if errors:
        # CancelledError of a download that was stopped because another one failed is not the cause.
        raise next((error for error in errors if not isinstance(error, CancelledError)), errors[0])
    return [part.result() for part in parts]


class _TimeUpError(Exception):
    """The download exceeded its total time."""


class _TransientError(Exception):
    """An attempt failed in a way that a retry can fix; the text contains no address."""

    def __init__(self, why: str, *, pause_s: float = 0.0, status: int | None = None) -> None:
        super().__init__(why)
        self.pause_s = pause_s
        self.status = status


class _Watch:
    """Thread that cuts the connections of one download when its time is up or the job is to stop."""

    def __init__(self, seconds: float, should_stop: Callable[[], bool]) -> None:
        self.switch = CutSwitch()
        self._deadline = time.monotonic() + seconds
        self._should_stop = should_stop
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="download-watch", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_POLL_S):
            if self.remaining_s() <= 0 or self._should_stop():
                self.switch.cut()
                return

    def remaining_s(self) -> float:
        """Seconds until the total limit."""
        return self._deadline - time.monotonic()

    def check(self) -> None:
        """Raise CancelledError if the job is to stop, _TimeUpError if the time is up."""
        if self._should_stop():
            raise CancelledError("the job was stopped during the download")
        if self.remaining_s() <= 0:
            raise _TimeUpError

    def pause(self, seconds: float) -> None:
        """Wait; raises as `check` as soon as the download has to end."""
        until = time.monotonic() + seconds
        self.check()
        while (rest := min(until - time.monotonic(), self.remaining_s())) > 0:
            self._done.wait(min(rest, _POLL_S))
            self.check()


class _Download:
    """One http(s) download with its retries, redirects and resumed attempts."""

    def __init__(
        self,
        url: str,
        part: InputPart,
        settings: DownloadSettings,
        watch: _Watch,
        resolve: Resolver,
        sha256: str | None,
    ) -> None:
        self.url = url
        self.part = part
        self.settings = settings
        self.watch = watch
        self.resolve = resolve
        self.sha256 = sha256
        self.validator: str | None = None
        self.total: int | None = None

    def run(self) -> str | None:
        """Fetch with retries and return the Content-Type; raises DownloadError after the last attempt."""
        n_try = 0
        while True:
            n_try += 1
            self.watch.check()
            try:
                return self._attempt()
            except _TransientError as error:
                self.watch.check()  # after a cut of our own the host is not to blame
                logger.warning(
                    "download attempt failed", extra={"kind": self.part.kind, "n_try": n_try, "reason": str(error)}
                )
                if n_try >= self.settings.tries:
                    raise self._failure(str(error), transient=True, status=error.status, tries=n_try) from None
                backoff = self.settings.backoff_s * 2 ** (n_try - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
                self.watch.pause(min(max(backoff, error.pause_s), self.settings.max_pause_s))

    def _attempt(self) -> str | None:
        # Without a validator nothing proves that the host still has the same file, so the part is dropped.
        start = self.part.n_bytes if self.validator is not None else 0
        if self.part.n_bytes and not start:
            self.part.restart()
        headers = {"Range": f"bytes={start}-", "If-Range": self.validator or ""} if start else {}
        with self._transport_errors(), self._follow_redirects(headers) as response:
            self._check_response(response, start)
            self._receive(response)
        if self.sha256 is not None and self.part.n_bytes and self.part.digest != self.sha256.lower():
            self.validator = None
            raise _TransientError("the checksum differs from the expected one")
        return response.headers.get("Content-Type")

    @contextlib.contextmanager
    def _follow_redirects(self, headers: Mapping[str, str]) -> Iterator[requests.Response]:
        """Response to a GET after its redirects; the address of every redirect is checked."""
        url = self.url
        for _ in range(self.settings.max_redirects + 1):
            target = parse_target(url)
            with self._connect(target, headers) as response:
                if response.status_code not in _REDIRECTS:
                    yield response
                    return
                location = response.headers.get("Location")
            if not location:
                raise self._failure("the media host redirects without an address", status=response.status_code)
            url = redirect_url(target.url, location)
            if target.scheme == "https" and url[:5].lower() == "http:":
                raise self._failure("the media host redirects from https to http")
        raise self._failure(f"more than {self.settings.max_redirects} redirects")

    @contextlib.contextmanager
    def _connect(self, target: Target, headers: Mapping[str, str]) -> Iterator[requests.Response]:
        """Response of the first address of the target that accepts a connection."""
        # The connection requests `target.path` itself: preparing rewrites percent-escapes.
        request = requests.Request(
            "GET",
            target.url,
            headers={
                "Host": target.authority,
                "User-Agent": self.settings.user_agent,
                "Accept": "*/*",
                "Accept-Encoding": "identity",  # offsets and limits count bytes of the file itself
                **headers,
            },
        ).prepare()
        verify = str(self.settings.ca_bundle) if self.settings.ca_bundle else True
        refusals: list[Exception] = []
        for address in self._addresses(target)[:_MAX_DIALLED]:
            adapter = PinnedAdapter(target, address, self.watch.switch)
            timeout = (self._capped_s(self.settings.connect_timeout_s), self._capped_s(self.settings.idle_timeout_s))
            try:
                response = adapter.send(request, stream=True, timeout=timeout, verify=verify, proxies={})
            except requests.ConnectionError as problem:
                adapter.close()
                if not is_unreachable(problem):
                    raise
                refusals.append(problem)
                self.watch.check()
                continue
            try:
                yield response
            finally:
                response.close()
                adapter.close()
            return
        raise refusals[-1]

    def _addresses(self, target: Target) -> list[str]:
        """Addresses to dial; all of them are checked."""
        may_be_private = check_target(
            target, allow_private=self.settings.allow_private_networks, allowed_hosts=self.settings.allowed_hosts
        )
        if target.is_literal:
            addresses = [target.host]
        else:
            addresses = resolve_within(self.resolve, target, self._capped_s(self.settings.connect_timeout_s))
        check_addresses(target, addresses, allow_private=may_be_private)
        return addresses

    def _capped_s(self, seconds: float) -> float:
        """Cap a time-out by the remaining total time; never 0, which sockets take as non-blocking."""
        self.watch.check()
        return max(min(seconds, self.watch.remaining_s()), 0.01)

    def _check_response(self, response: requests.Response, start: int) -> None:
        """Check status and headers, and restart the part file unless the body continues it at `start`."""
        status, headers = response.status_code, response.headers
        # 412 and 416: the file has changed, or is shorter than the part.
        if start and status in {200, 206, 412, 416}:
            if status == 206 and self._is_continuation(headers, start):
                length = content_length(headers)
                self.total = self.total if length is None else start + length
                return self._check_length(headers)
            self.validator = self.total = None
            if status != 200:
                raise _TransientError("the media host did not resume the file", status=status)
            self.part.restart()
        # 203: a proxy changed it on the way. 206 to a request for everything: some hosts send no other.
        if status not in {200, 203} and not (status == 206 and not start and is_whole(headers)):
            self._raise_for(response)
        codings = {coding.strip().lower() for coding in headers.get("Content-Encoding", "").split(",")}
        if codings & _NOT_DECODED:
            raise self._failure("the media host sent it compressed although the request excludes that")
        self.validator, self.total = version_validator(headers), content_length(headers)
        if codings & _DECODED:
            # Lengths and ranges count compressed bytes, so nothing can be resumed; urllib3 checks the length.
            self.validator = self.total = None
            return None
        return self._check_length(headers)

    def _is_continuation(self, headers: Mapping[str, str], start: int) -> bool:
        """Whether a 206 continues the part file: same version, same size, starting at `start`."""
        # Wrong bytes after a right beginning would pass as a complete file unless the job has a checksum.
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            return False
        if self.total is not None and match[3] != "*" and int(match[3]) != self.total:
            return False
        length = content_length(headers)
        if length is not None and length != int(match[2]) - start + 1:
            return False
        return version_validator(headers) in {None, self.validator}

    def _check_length(self, headers: Mapping[str, str]) -> None:
        length = content_length(headers)
        if length is not None:
            self.part.check_room(length)

    def _raise_for(self, response: requests.Response) -> None:
        status, headers = response.status_code, response.headers
        if status in _TRANSIENT_STATUSES or 500 <= status < 600:
            pause = retry_after_s(headers.get("Retry-After"), self.settings.max_pause_s)
            raise _TransientError(f"{status} from media host", pause_s=pause, status=status)
        details = {}
        if 400 <= status < 500:
            # Storage services say in the body what is wrong with a signed address.
            head = next(response.iter_content(_HEAD_BYTES), b"")
            if describe_text(head) is not None:
                details["beginning"] = redact_text(shown_text(head))
        raise self._failure(f"{status} from media host", status=status, **details)

    def _receive(self, response: requests.Response) -> None:
        for block in response.iter_content(BLOCK_BYTES):
            self.watch.check()
            self.part.write(block)
        self.watch.check()
        # urllib3 1 accepts a body that ends early as complete.
        if self.total is not None and self.part.n_bytes != self.total:
            raise _TransientError("the connection was cut")

    @contextlib.contextmanager
    def _transport_errors(self) -> Iterator[None]:
        """Translate what requests, urllib3 and the system raise into errors whose texts contain no address."""
        try:
            yield
        except _TRANSPORT_ERRORS as problem:
            if is_bad_certificate(problem):
                raise self._failure("the media host's certificate does not prove its name") from None
            raise _TransientError(f"the media host's {describe(problem)}") from None

    def _failure(self, why: str, *, status: int | None = None, **details: Any) -> DownloadError:
        if status is not None:
            details["status_code"] = status
        return DownloadError(f"the {self.part.kind} could not be fetched: {why}", url=redact_url(self.url), **details)
