"""Real downloads from a loopback host that cuts, stalls, drips, announces wrong sizes and redirects."""

from __future__ import annotations

import errno
import gzip
import hashlib
import logging
import random
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import brotli
import pytest

from musetalk.errors import CancelledError, DiskFullError, DownloadError, ProcessingError
from tests.support.media_host import Answer, MediaHost
from worker.net.addresses import redact_text
from worker.net.downloads import DownloadSettings, fetch
from worker.net.input_part import InputPart

BODY = random.Random(7).randbytes(300_000)
ETAG = {"ETag": '"version-1"', "Content-Type": "video/mp4"}
SETTINGS = DownloadSettings(
    allow_private_networks=True, backoff_s=0.0, total_timeout_s=20.0, idle_timeout_s=5.0, connect_timeout_s=5.0
)


@pytest.fixture
def host() -> Iterator[MediaHost]:
    with MediaHost() as running:
        yield running


def limits(**changes: Any) -> DownloadSettings:
    return DownloadSettings(**{**SETTINGS.__dict__, **changes})


def get(url: str, folder: Path, settings: DownloadSettings = SETTINGS, **options: Any) -> bytes:
    """Fetch and read the file; the reported size and checksum must be right, and no other file may be there."""
    target = folder / "source"
    fetched = fetch(url, target, settings, kind="video", **options)
    content = target.read_bytes()
    assert fetched.n_bytes == len(content)
    assert fetched.sha256 == hashlib.sha256(content).hexdigest()
    assert [entry.name for entry in folder.iterdir()] == ["source"]
    return content


def fail(
    url: str,
    folder: Path,
    settings: DownloadSettings = SETTINGS,
    error: type[Exception] = DownloadError,
    **options: Any,
) -> Any:
    """Expect that fetching fails and leaves no file."""
    with pytest.raises(error) as caught:
        fetch(url, folder / "source", settings, kind="video", **options)
    assert list(folder.iterdir()) == []
    return caught.value


def test_a_plain_file_arrives_with_its_type_and_checksum(host: MediaHost, tmp_path: Path) -> None:
    url = host.serve("/clip.mp4", Answer(body=BODY, headers=ETAG))
    fetched = fetch(url, tmp_path / "clip", SETTINGS, kind="video", sha256=hashlib.sha256(BODY).hexdigest().upper())
    assert (tmp_path / "clip").read_bytes() == BODY
    assert fetched.content_type == "video/mp4"
    assert 0 < fetched.seconds < 20
    assert host.seen[0].headers["Accept-Encoding"] == "identity"
    assert "Range" not in host.seen[0].headers


@pytest.mark.parametrize("answer", [Answer(body=BODY, chunked=True), Answer(body=BODY, length="none")])
def test_a_body_without_length_is_read_to_its_end(host: MediaHost, tmp_path: Path, answer: Answer) -> None:
    assert get(host.serve("/x", answer), tmp_path) == BODY


def test_an_older_file_at_the_destination_is_replaced_only_by_a_whole_one(host: MediaHost, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"old")
    url = host.serve("/x", Answer(status=404), Answer(body=BODY))
    with pytest.raises(DownloadError):
        fetch(url, tmp_path / "source", SETTINGS, kind="video")
    assert (tmp_path / "source").read_bytes() == b"old"
    assert get(url, tmp_path) == BODY


def test_a_cut_download_resumes_where_it_stopped(host: MediaHost, tmp_path: Path) -> None:
    answer = Answer(body=BODY, headers=ETAG, ranges=True)
    cut = Answer(body=BODY, headers=ETAG, length=len(BODY))
    url = host.serve("/x", _cut_orderly(cut, 200_000), answer)
    assert get(url, tmp_path) == BODY
    again = host.seen[1].headers
    assert again["If-Range"] == '"version-1"'
    start = int(again["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 200_000


def _cut_orderly(answer: Answer, n_bytes: int) -> Answer:
    """The same answer with a body that ends early, and with the length of the whole."""
    return Answer(**{**answer.__dict__, "body": answer.body[:n_bytes], "length": len(answer.body)})


def test_a_file_that_changed_meanwhile_is_fetched_from_the_start(host: MediaHost, tmp_path: Path) -> None:
    newer = Answer(body=BODY[::-1], headers={"ETag": '"version-2"'}, ranges=True)
    url = host.serve("/x", _cut_orderly(Answer(body=BODY, headers=ETAG), 200_000), newer)
    assert get(url, tmp_path) == BODY[::-1]


def test_a_host_without_ranges_is_fetched_from_the_start(host: MediaHost, tmp_path: Path) -> None:
    url = host.serve(
        "/x", _cut_orderly(Answer(body=BODY, headers=ETAG), 200_000), Answer(body=BODY, headers=ETAG, ranges=False)
    )
    assert get(url, tmp_path) == BODY


@pytest.mark.parametrize("lie", [{"wrong_range": True}, {"wrong_total": True}])
def test_a_wrong_content_range_is_not_appended(host: MediaHost, tmp_path: Path, lie: dict[str, bool]) -> None:
    url = host.serve(
        "/x",
        _cut_orderly(Answer(body=BODY, headers=ETAG), 200_000),
        Answer(body=BODY, headers=ETAG, ranges=True, **lie),
        Answer(body=BODY, headers=ETAG, ranges=True),
    )
    assert get(url, tmp_path) == BODY
    assert "Range" not in host.seen[2].headers


def test_without_a_validator_the_part_is_not_resumed(host: MediaHost, tmp_path: Path) -> None:
    url = host.serve("/x", _cut_orderly(Answer(body=BODY), 200_000), Answer(body=BODY))
    assert get(url, tmp_path) == BODY
    assert "Range" not in host.seen[1].headers


FAULTS = {
    "500": Answer(status=500),
    "503": Answer(status=503, headers={"Retry-After": "0"}),
    "429": Answer(status=429, headers={"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"}),
    "408": Answer(status=408),
    "reset": Answer(body=BODY, cut_after=0),
    "reset-later": Answer(body=BODY, cut_after=100_000),
    "short": Answer(body=BODY[:10], length=11),
    "chunk-cut": Answer(body=BODY, chunked=True, cut_after=70_000),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_two_transient_faults_are_retried(host: MediaHost, tmp_path: Path, fault: Answer) -> None:
    assert get(host.serve("/x", fault, fault, Answer(body=BODY)), tmp_path) == BODY
    assert len(host.seen) == 3


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_lasting_fault_fails_as_transient_after_three_attempts(
    host: MediaHost, tmp_path: Path, fault: Answer
) -> None:
    error = fail(host.serve("/x", fault), tmp_path)
    assert len(host.seen) == 3
    assert error.retryable is False
    assert error.details["transient"] is True
    assert error.details["tries"] == 3


def test_a_dead_port_is_dialled_three_times(tmp_path: Path) -> None:
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))  # bound but not listening: refused
        error = fail(f"http://127.0.0.1:{placeholder.getsockname()[1]}/x.mp4", tmp_path)
    assert error.details["transient"] is True
    assert "refused" in str(error)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416, 418, 451])
def test_a_final_status_is_not_retried(host: MediaHost, tmp_path: Path, status: int) -> None:
    error = fail(host.serve("/x", Answer(status=status)), tmp_path)
    assert len(host.seen) == 1
    assert error.details["status_code"] == status
    assert "transient" not in error.details
    assert f"{status} from media host" in str(error)


@pytest.mark.parametrize(
    "answer", [Answer(status=204), Answer(status=206, body=BODY), Answer(status=201, body=BODY), Answer(status=304)]
)
def test_a_success_status_without_the_file_fails(host: MediaHost, tmp_path: Path, answer: Answer) -> None:
    fail(host.serve("/x", answer), tmp_path)


def test_an_empty_body_fails_at_once(host: MediaHost, tmp_path: Path) -> None:
    error = fail(host.serve("/x", Answer(body=b"")), tmp_path)
    assert "empty" in str(error)
    assert len(host.seen) == 1


@pytest.mark.parametrize(
    "answer",
    [Answer(body=b"", length=50_001), Answer(body=BODY, chunked=True), Answer(body=BODY, length="none")],
    ids=["header", "chunked", "no-length"],
)
def test_too_large_is_refused_by_header_and_while_streaming(host: MediaHost, tmp_path: Path, answer: Answer) -> None:
    error = fail(host.serve("/x", answer), tmp_path, limits(max_video_bytes=50_000))
    assert "too large" in str(error)
    assert len(host.seen) == 1


def test_the_limit_itself_is_allowed_and_audio_has_its_own(host: MediaHost, tmp_path: Path) -> None:
    settings = limits(max_video_bytes=len(BODY), max_audio_bytes=len(BODY) - 1)
    url = host.serve("/x", Answer(body=BODY))
    assert get(url, tmp_path, settings) == BODY
    with pytest.raises(DownloadError, match="the audio is too large"):
        fetch(url, tmp_path / "audio", settings, kind="audio")


def test_an_endless_body_ends_at_the_limit(host: MediaHost, tmp_path: Path) -> None:
    error = fail(host.serve("/x", Answer(endless=True, chunked=True)), tmp_path, limits(max_video_bytes=2_000_000))
    assert "too large" in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=BODY, drip_s=0.01),
        Answer(body=BODY, stall_after=1000),
        Answer(silent=True),
        Answer(drip_headers_s=0.01),
    ],
    ids=["drip", "stall", "silent", "header-drip"],
)
def test_the_total_limit_holds_against_a_slow_host(host: MediaHost, tmp_path: Path, answer: Answer) -> None:
    started = time.monotonic()
    error = fail(host.serve("/x", answer), tmp_path, limits(total_timeout_s=0.6))
    assert time.monotonic() - started < 4
    assert error.details["transient"] is True
    assert "within 0.6 s" in str(error)


def test_a_silent_connection_is_retried(host: MediaHost, tmp_path: Path) -> None:
    url = host.serve("/x", Answer(body=BODY, stall_after=1000), Answer(silent=True), Answer(body=BODY))
    assert get(url, tmp_path, limits(idle_timeout_s=0.3)) == BODY


@pytest.mark.parametrize(
    "answer",
    [Answer(body=BODY, stall_after=1000), Answer(silent=True), Answer(endless=True), Answer(status=503)],
    ids=["stall", "silent", "endless", "pause"],
)
def test_cancelling_ends_the_download_at_once(host: MediaHost, tmp_path: Path, answer: Answer) -> None:
    stopping = threading.Event()
    url = host.serve("/x", answer)

    def stop_once_reached() -> bool:
        if host.seen:
            stopping.set()
        return stopping.is_set()

    started = time.monotonic()
    settings = limits(backoff_s=20.0, max_video_bytes=2**40)
    error = fail(url, tmp_path, settings, CancelledError, should_stop=stop_once_reached)
    assert error.retryable is True
    assert time.monotonic() - started < 4


def test_cancelling_before_the_start_makes_no_connection(host: MediaHost, tmp_path: Path) -> None:
    fail(host.serve("/x", Answer(body=BODY)), tmp_path, error=CancelledError, should_stop=lambda: True)
    assert host.n_connections == 0


def test_retry_after_is_obeyed_up_to_a_limit(host: MediaHost, tmp_path: Path) -> None:
    url = host.serve("/x", Answer(status=503, headers={"Retry-After": "86400"}), Answer(body=BODY))
    started = time.monotonic()
    assert get(url, tmp_path, limits(max_pause_s=0.3)) == BODY
    assert 0.3 <= time.monotonic() - started < 4


def test_redirects_are_followed_five_times_and_no_further(host: MediaHost, tmp_path: Path) -> None:
    for i in range(6):
        host.serve(f"/{i}", Answer(status=302 + i % 2, headers={"Location": f"/{i + 1}"}))
    host.serve("/6", Answer(body=BODY))
    assert get(host.url("/1"), tmp_path) == BODY
    (tmp_path / "source").unlink()
    assert "redirects" in str(fail(host.url("/0"), tmp_path))


def test_a_redirect_without_address_fails(host: MediaHost, tmp_path: Path) -> None:
    fail(host.serve("/x", Answer(status=302)), tmp_path)
    assert len(host.seen) == 1


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "//metadata.example/computeMetadata/v1/",
        "http://[::ffff:169.254.169.254]/",
        "http://user@media.example/",
        "file:///etc/passwd",
        "ftp://media.example/x",
        "http://[::1",
        "http://0x7f000001/",
    ],
)
def test_a_redirect_to_a_refused_address_is_not_dialled(
    host: MediaHost, tmp_path: Path, location: str, dialled: list[Any]
) -> None:
    url = host.serve("/x", Answer(status=302, headers={"Location": location}))
    names = {"metadata.example": ["169.254.169.254"], "media.example": ["127.0.0.1"]}
    fail(url, tmp_path, resolve=lambda name, port: names[name])
    assert dialled == [("127.0.0.1", host.port)]


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address that any socket of this process connects to."""
    reached: list[Any] = []
    connect = socket.socket.connect

    def record(self: socket.socket, address: Any) -> None:
        reached.append(address[:2])
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", record)
    return reached


def test_the_name_is_resolved_once_and_the_checked_address_dialled(
    host: MediaHost, tmp_path: Path, dialled: list[Any]
) -> None:
    host.serve("/x", Answer(body=BODY))
    answers = iter([["127.0.0.1"], ["127.0.0.9"]])
    assert get(host.url("/x", "media.example"), tmp_path, resolve=lambda name, port: next(answers)) == BODY
    assert dialled == [("127.0.0.1", host.port)]
    assert host.seen[0].headers["Host"] == f"media.example:{host.port}"


def test_a_dead_address_of_a_name_is_skipped(host: MediaHost, tmp_path: Path) -> None:
    host.serve("/x", Answer(body=BODY))
    resolve = lambda name, port: ["127.0.0.2", "127.0.0.1"]  # noqa: E731
    assert get(host.url("/x", "media.example"), tmp_path, resolve=resolve) == BODY
    assert host.n_connections == 1


def test_one_private_address_among_public_ones_refuses_the_name(
    host: MediaHost, tmp_path: Path, dialled: list[Any]
) -> None:
    settings = limits(allow_private_networks=False)
    fail("http://media.example/x", tmp_path, settings, resolve=lambda name, port: ["93.184.215.14", "127.0.0.1"])
    assert dialled == []


def test_proxies_of_the_environment_are_not_used(
    host: MediaHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialled: list[Any]
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get(host.serve("/x", Answer(body=BODY)), tmp_path) == BODY
    assert dialled == [("127.0.0.1", host.port)]


def test_a_name_that_does_not_resolve_is_a_transient_fault(tmp_path: Path) -> None:
    calls: list[str] = []

    def resolve(name: str, port: int) -> list[str]:
        calls.append(name)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    error = fail("http://media.example/x", tmp_path, resolve=resolve)
    assert calls == ["media.example"] * 3
    assert error.details["transient"] is True
    assert "resolved" in str(error)


def test_a_resolver_that_hangs_does_not_hang_the_download(tmp_path: Path) -> None:
    release = threading.Event()
    try:
        started = time.monotonic()
        fail(
            "http://media.example/x",
            tmp_path,
            limits(connect_timeout_s=0.1),
            resolve=lambda name, port: [str(release.wait(30))],
        )
        assert time.monotonic() - started < 4
    finally:
        release.set()


def test_signatures_reach_the_host_but_no_log_and_no_error(
    host: MediaHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    host.serve("/token-in-path/x.mp4", Answer(status=503))
    error = fail(host.url("/token-in-path/x.mp4?Signature=s3cret&Key=k3y"), tmp_path)
    assert len(host.seen) == 3
    assert host.seen[0].path.endswith("?Signature=s3cret&Key=k3y")
    logged = caplog.text + "".join(str(vars(record)) for record in caplog.records)
    assert logged.count("download attempt failed") >= 3
    for text in (logged, str(error), repr(error.details)):
        assert "s3cret" not in text
        assert "k3y" not in text
        assert "token-in-path" not in text
    assert error.details["url"] == f"http://127.0.0.1:{host.port}/…/x.mp4"


@pytest.mark.parametrize(
    ("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("br", brotli.compress)]
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_host_that_compresses_whatever_is_asked_is_read(
    host: MediaHost, tmp_path: Path, coding: str, pack: Any, chunked: bool
) -> None:
    answer = Answer(body=pack(BODY), headers={"Content-Encoding": coding, **ETAG}, chunked=chunked)
    assert get(host.serve("/x", answer), tmp_path) == BODY


def test_a_compressed_body_is_limited_by_what_it_becomes(host: MediaHost, tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    url = host.serve("/x", Answer(body=bomb, headers={"Content-Encoding": "gzip"}))
    assert "more than 1000000 bytes" in str(fail(url, tmp_path, limits(max_video_bytes=1_000_000)))


def test_a_compressed_body_that_is_cut_is_fetched_again_from_its_beginning(host: MediaHost, tmp_path: Path) -> None:
    answer = Answer(body=gzip.compress(BODY), headers={"Content-Encoding": "gzip", **ETAG}, ranges=True)
    assert get(host.serve("/x", replace(answer, cut_after=100_000), answer), tmp_path) == BODY
    assert "Range" not in host.seen[1].headers


def test_codings_that_cannot_be_read_are_refused_and_unknown_ones_ignored(host: MediaHost, tmp_path: Path) -> None:
    fail(host.serve("/x", Answer(body=BODY, headers={"Content-Encoding": "zstd"})), tmp_path)
    fail(host.serve("/z", Answer(body=BODY, headers={"Content-Encoding": "gzip"})), tmp_path)
    assert get(host.serve("/y", Answer(body=BODY, headers={"Content-Encoding": "aws-chunked"})), tmp_path) == BODY


@pytest.mark.parametrize("total", [str(len(BODY)), "*"])
def test_a_whole_file_sent_as_a_range_is_used(host: MediaHost, tmp_path: Path, total: str) -> None:
    headers = {"Content-Range": f"bytes 0-{len(BODY) - 1}/{total}"}
    assert get(host.serve("/x", Answer(status=206, body=BODY, headers=headers)), tmp_path) == BODY


@pytest.mark.parametrize("span", ["bytes 0-299999/300001", "bytes 1-300000/300001", "bytes 0-9/300000", "pages 0-1/2"])
def test_a_part_sent_as_a_range_fails(host: MediaHost, tmp_path: Path, span: str) -> None:
    fail(host.serve("/x", Answer(status=206, body=BODY, headers={"Content-Range": span})), tmp_path)


def test_a_file_that_a_proxy_has_changed_is_used(host: MediaHost, tmp_path: Path) -> None:
    assert get(host.serve("/x", Answer(status=203, body=BODY)), tmp_path) == BODY


PAGES = {
    "a web page (text/html)": (
        b"<!DOCTYPE html>\n<html><head><title>Virus scan warning</title>",
        "text/html; charset=utf-8",
    ),
    "JSON (application/json)": (b'{"detail": "voice not found", "id": 7}', "application/json"),
    "an XML document (application/xml)": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "application/xml",
    ),
    "a Git LFS pointer, which": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", None),
    "a text (text/plain)": ("Bitte melden Sie sich zuerst an, möglichst bald.".encode(), "text/plain"),
}


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_in_place_of_the_file_is_named_and_shown(host: MediaHost, tmp_path: Path, kind: str) -> None:
    body, content_type = PAGES[kind]
    headers = {} if content_type is None else {"Content-Type": content_type}
    error = fail(host.serve("/clip.mp4", Answer(body=body, headers=headers)), tmp_path)
    assert f"the address returned {kind}" in str(error)
    assert ", not a video or picture: " in str(error)
    beginning = str(error.details["beginning"])
    assert beginning == redact_text(" ".join(body.decode().split()))
    assert error.details.get("content_type") == content_type
    assert len(host.seen) == 1


def test_a_page_that_quotes_a_signed_address_shows_nothing_secret(host: MediaHost, tmp_path: Path) -> None:
    secret = hashlib.sha256(b"signature").hexdigest()
    body = f"<html>see https://host/a.mp4?X-Amz-Signature={secret} or token {secret}" + "x" * 9000
    error = fail(host.serve("/x", Answer(body=body.encode())), tmp_path)
    assert secret not in f"{error} {error.details}"
    assert "https://host/a.mp4" in str(error)
    assert len(str(error.details["beginning"])) <= 200


def test_a_login_page_behind_a_redirect_is_named(host: MediaHost, tmp_path: Path) -> None:
    host.serve("/login", Answer(body=b"<html>Sign in", headers={"Content-Type": "text/html"}))
    url = host.serve("/x", Answer(status=302, headers={"Location": "/login"}))
    assert "a web page" in str(fail(url, tmp_path))


def test_a_refusal_shows_what_the_storage_says(host: MediaHost, tmp_path: Path) -> None:
    body = b"<?xml version='1.0'?><Error><Message>Request has expired</Message></Error>"
    error = fail(host.serve("/x", Answer(status=403, body=body)), tmp_path)
    assert "Request has expired" in str(error.details["beginning"])


TARGETS = [
    "/a%2fb%e4%bd%a0.mp4?sig=abc%2bdef%3d&tok=st%7eexp",
    "/%7Euser/%41%2E%2e/../b//c.mp4;v=1?a=b?c=/d&e=%zz",
    "/x?",
    "/x?a+b=c%20d&e=[1]&f='q'!*(),:@$~",
    "?q=1",
]


def sent_for(target: str) -> str:
    """The request line's text for a target: as given, but for a missing slash and a percent sign of its own."""
    return (target if target.startswith("/") else f"/{target}").replace("%zz", "%25zz")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("through", ["directly", "a redirect"])
def test_the_request_line_has_the_text_of_the_address(
    host: MediaHost, tmp_path: Path, target: str, through: str
) -> None:
    sent = sent_for(target)
    host.answers[sent.partition("?")[0]] = [Answer(body=BODY)]
    url = host.url(target)
    if through == "a redirect":
        url = host.serve("/from", Answer(status=307, headers={"Location": url}))
    assert get(url, tmp_path) == BODY
    assert host.seen[-1].path == sent


def test_only_what_a_request_line_cannot_have_is_escaped(host: MediaHost, tmp_path: Path) -> None:
    sent = "/%C3%BC%20%22%3C%7C%60.mp4?q=%E4%BD%A0%5E"
    host.answers[sent.partition("?")[0]] = [Answer(body=BODY)]
    assert get(host.url('/ü "<|`.mp4?q=你^'), tmp_path) == BODY
    assert host.seen[-1].path == sent


def test_the_request_line_is_exact_over_https_too(certificate: tuple[str, str], tmp_path: Path) -> None:
    with MediaHost(certificate) as secure:
        secure.answers[TARGETS[0].partition("?")[0]] = [Answer(body=BODY)]
        url = f"https://media.example:{secure.port}{TARGETS[0]}"
        settings = limits(ca_bundle=Path(certificate[0]))
        assert get(url, tmp_path, settings, resolve=lambda _host, _port: ["127.0.0.1"]) == BODY
        assert secure.seen[-1].path == TARGETS[0]


def test_a_wrong_checksum_is_retried(host: MediaHost, tmp_path: Path) -> None:
    right = hashlib.sha256(BODY).hexdigest()
    url = host.serve("/x", Answer(body=BODY[::-1], headers=ETAG, ranges=True), Answer(body=BODY))
    assert get(url, tmp_path, sha256=right) == BODY
    (tmp_path / "source").unlink()
    assert "checksum" in str(fail(host.serve("/y", Answer(body=BODY[:5])), tmp_path, sha256=right))


def test_a_full_disk_is_reported_before_writing(
    host: MediaHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    url = host.serve("/x", Answer(body=BODY))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 0, 1000))
    error = fail(url, tmp_path, error=DiskFullError)
    assert error.retryable is True
    assert str(tmp_path) not in str(error)


def test_a_disk_that_fills_up_leaves_nothing(host: MediaHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = InputPart.__enter__

    class Full:
        def write(self, block: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    def enter(self: Any) -> Any:
        original(self)
        self._file.close()
        self._file = Full()
        return self

    monkeypatch.setattr(InputPart, "__enter__", enter)
    error = fail(host.serve("/x", Answer(body=BODY)), tmp_path, error=DiskFullError)
    assert str(tmp_path) not in str(error)


def test_a_missing_folder_is_the_workers_error_and_its_path_is_not_shown(host: MediaHost, tmp_path: Path) -> None:
    with pytest.raises(ProcessingError) as caught:
        fetch(host.serve("/x", Answer(body=BODY)), tmp_path / "no" / "x", SETTINGS, kind="video")
    assert str(tmp_path) not in str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate for media.example; generated for each run, so no key is kept in the repository."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    pem, key = folder / "cert.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=media.example"
    )
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=DNS:media.example", "-keyout", str(key), "-out", str(pem)],
        check=True,
        capture_output=True,
    )
    return str(pem), str(key)


def test_the_certificate_must_match_the_name_although_an_address_is_dialled(
    certificate: tuple[str, str], tmp_path: Path
) -> None:
    settings = limits(ca_bundle=Path(certificate[0]))
    local = lambda name, port: ["127.0.0.1"]  # noqa: E731
    with MediaHost(certificate) as secure:
        secure.serve("/x", Answer(body=BODY))
        assert get(secure.url("/x", "media.example"), tmp_path, settings, resolve=local) == BODY
        assert secure.server_names == ["media.example"]
        (tmp_path / "source").unlink()
        error = fail(secure.url("/x", "other.example"), tmp_path, settings, resolve=local)
        assert "certificate" in str(error)
        assert "transient" not in error.details
        assert "certificate" in str(fail(secure.url("/x", "media.example"), tmp_path, resolve=local))
        assert len(secure.seen) == 1


def test_a_redirect_from_https_to_http_is_refused(
    certificate: tuple[str, str], host: MediaHost, tmp_path: Path
) -> None:
    with MediaHost(certificate) as secure:
        secure.serve("/x", Answer(status=301, headers={"Location": host.serve("/y", Answer(body=BODY))}))
        settings = limits(ca_bundle=Path(certificate[0]))
        error = fail(secure.url("/x", "media.example"), tmp_path, settings, resolve=lambda name, port: ["127.0.0.1"])
    assert "https" in str(error)
    assert host.n_connections == 0


def test_a_slow_tls_host_is_cut_as_well(certificate: tuple[str, str], tmp_path: Path) -> None:
    settings = limits(ca_bundle=Path(certificate[0]), total_timeout_s=0.8)
    with MediaHost(certificate) as secure:
        secure.serve("/x", Answer(body=BODY, drip_s=0.01))
        started = time.monotonic()
        fail(secure.url("/x", "media.example"), tmp_path, settings, resolve=lambda name, port: ["127.0.0.1"])
        assert time.monotonic() - started < 4
