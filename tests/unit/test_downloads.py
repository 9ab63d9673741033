"""Addresses are checked before a connection is made, and `file:` addresses stay in their folders."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musetalk.errors import CancelledError, DownloadError
from worker.net.addresses import Target, is_listed, parse_target, redact_url, refusal, resolve_host
from worker.net.downloads import DownloadSettings, fetch
from worker.net.headers import retry_after_s

PUBLIC = "93.184.215.14"

# Answers of a DNS server that an attacker controls.
NAMES = {
    "media.example": [PUBLIC],
    "rebind.example": ["127.0.0.1"],
    "mixed.example": [PUBLIC, "10.0.0.8"],
    "mixed6.example": ["2606:2800:21f:cb07::1", "fe80::1%eth0"],
    "localhost": ["127.0.0.1", "::1"],
    "metadata.example": ["169.254.169.254"],
    "nat64.example": ["64:ff9b::a00:1"],
    "garbage.example": ["not an address"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
    "xn--localhost-example": ["127.0.0.1"],
}

HOSTILE = [
    # loopback and its spellings
    "http://127.0.0.1/x",
    "http://127.8.9.10/x",
    "http://127.1/x",
    "http://127.0.1/x",
    "http://2130706433/x",
    "http://0x7f000001/x",
    "http://0x7f.0.0.1/x",
    "http://0x7F.1/x",
    "http://017700000001/x",
    "http://0177.0.0.1/x",
    "http://127.0.0.01/x",
    "http://127.0.0.1./x",
    "http://0/x",
    "http://0.0.0.0/x",
    "http://0x/x",
    "http://１２７.０.０.１/x",
    "http://127。0。0。1/x",
    "http://①②⑦.⓪.⓪.①/x",
    "http://localhost/x",
    "http://LOCALHOST./x",
    "http://rebind.example/x",
    "http://127.0.0.1.nip.example/x",
    # private, shared, special
    "http://10.0.0.1/x",
    "http://172.16.0.1/x",
    "http://172.31.255.255/x",
    "http://192.168.1.1/x",
    "http://100.64.0.1/x",
    "http://100.100.100.200/x",
    "http://168.63.129.16/x",
    "http://169.254.169.254/latest/meta-data/",
    "http://192.0.0.192/x",
    "http://192.0.2.1/x",
    "http://198.18.0.1/x",
    "http://198.51.100.1/x",
    "http://203.0.113.1/x",
    "http://192.88.99.1/x",
    "http://224.0.0.1/x",
    "http://240.0.0.1/x",
    "http://255.255.255.255/x",
    # IPv6
    "http://[::1]/x",
    "http://[::]/x",
    "http://[0:0:0:0:0:0:0:1]/x",
    "http://[::ffff:127.0.0.1]/x",
    "http://[::ffff:7f00:1]/x",
    "http://[::ffff:169.254.169.254]/x",
    "http://[::127.0.0.1]/x",
    "http://[::ffff:0:127.0.0.1]/x",
    "http://[64:ff9b::127.0.0.1]/x",
    "http://[64:ff9b::a9fe:a9fe]/x",
    "http://[64:ff9b:1::a00:1]/x",
    "http://[2002:7f00:1::]/x",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/x",
    "http://[2001:db8::1]/x",
    "http://[3fff::1]/x",
    "http://[fe80::1]/x",
    "http://[fe80::1%25eth0]/x",
    "http://[2606:2800:21f::1%25eth0]/x",
    "http://[fec0::1]/x",
    "http://[fc00::1]/x",
    "http://[fd00:ec2::254]/x",
    "http://[ff02::1]/x",
    "http://[100::1]/x",
    "http://[2606:4700::5efe:7f00:1]/x",
    "http://[::1/x",
    "http://[v1.fe]/x",
    "http://[127.0.0.1]/x",
    # names with a refused address among public ones
    "http://mixed.example/x",
    "http://mixed6.example/x",
    "http://metadata.example/x",
    "http://nat64.example/x",
    "http://garbage.example/x",
    # spellings that two parsers read as different hosts
    "http://media.example@127.0.0.1/x",
    "http://127.0.0.1@media.example/x",
    "http://user:secret@media.example/x",  # pragma: allowlist secret
    "http://media.example\\@127.0.0.1/x",
    "http://media.example%00.127.0.0.1/x",
    "http://%31%32%37.0.0.1/x",
    "http://media.example:80:22/x",
    "http://media.exam\tple/x",
    "http://media.example/x\r\nHost: 127.0.0.1",
    "http://media.example\x00/x",
    "http://media.example:0/x",
    "http://media.example:65536/x",
    "http://media.example:-80/x",
    "http://media.example:８０/x",
    "http://media.example:22/x",
    "http://media.example:25/x",
    "http://media..example/x",
    "http://.media.example/x",
    "http://media.example../x",
    "http://-media.example/x",
    "http://media example/x",
    "http:///x",
    "http:/media.example/x",
    "http:media.example/x",
    "http://" + "a" * 64 + ".example/x",
    "http://" + "a." * 130 + "example/x",
    "http://media.example/" + "x" * 9000,
    "http://\ud800.example/x",
    # other schemes
    "ftp://media.example/x",
    "gopher://media.example/x",
    "data:video/mp4;base64,AAAA",
    "dict://media.example:11211/x",
    "jar:http://media.example!/x",
    "//media.example/x",
    "media.example/x",
    "",
    "file:///etc/passwd",
    "FILE:/etc/passwd",
    "file://media.example/etc/passwd",
]


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address that a socket was asked to connect to; each connection is refused."""
    reached: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        reached.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return reached


def lookup(name: str, port: int) -> list[str]:
    return NAMES[name]


@pytest.mark.parametrize("url", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_address_is_refused_without_a_connection(url: str, tmp_path: Path, dialled: list[Any]) -> None:
    with pytest.raises(DownloadError) as caught:
        fetch(url, tmp_path / "x", DownloadSettings(), kind="video", resolve=lookup)
    assert dialled == []
    assert list(tmp_path.iterdir()) == []
    assert "transient" not in caught.value.details
    assert "secret" not in repr(caught.value.details)


@pytest.mark.parametrize(
    ("url", "address", "port"),
    [
        ("http://media.example/x", PUBLIC, 80),
        ("https://MEDIA.example./x", PUBLIC, 443),
        ("https://media.example:8443/x", PUBLIC, 8443),
        (f"http://{PUBLIC}/x", PUBLIC, 80),
        ("http://[2606:2800:21f::1]:8080/x", "2606:2800:21f::1", 8080),
        ("http://[64:ff9b::5db8:d70e]/x", "64:ff9b::5db8:d70e", 80),
        (f"http://[::ffff:{PUBLIC}]/x", "::ffff:5db8:d70e", 80),
    ],
)
def test_the_checked_public_address_is_dialled(
    url: str, address: str, port: int, tmp_path: Path, dialled: list[Any]
) -> None:
    with pytest.raises(DownloadError) as caught:
        fetch(url, tmp_path / "x", DownloadSettings(tries=1), kind="video", resolve=lookup)
    assert caught.value.details["transient"] is True
    assert [(ipaddress.ip_address(to[0]), to[1]) for to in dialled] == [(ipaddress.ip_address(address), port)]


@settings(max_examples=300, deadline=None)
@given(st.ip_addresses())
def test_addresses_that_the_standard_library_calls_special_are_refused(address: Any) -> None:
    if not address.is_global and (address.version == 4 or address.ipv4_mapped is None):
        assert refusal(str(address)) is not None


@settings(max_examples=200, deadline=None)
@given(st.ip_addresses(v=4))
def test_ipv4_has_one_verdict_in_all_its_translated_forms(address: ipaddress.IPv4Address) -> None:
    plain = refusal(str(address))
    assert refusal(f"::ffff:{address}") == plain
    assert refusal(f"64:ff9b::{address}") == plain
    assert refusal(f"::{address}") is not None
    assert refusal(str(ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80)))) is not None


@settings(max_examples=200, deadline=None)
@given(st.ip_addresses())
def test_allowing_private_networks_only_lifts_refusals(address: Any) -> None:
    if refusal(str(address)) is None:
        assert refusal(str(address), allow_private=True) is None


@pytest.mark.parametrize(
    ("url", "hint"),
    [("http://127.0.0.1:8000/x", True), ("http://10.0.0.8/x", True), ("http://169.254.169.254/x", False)],
)
def test_a_refused_private_address_names_the_settings_that_permit_it(url: str, hint: bool, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="its host leads to a") as caught:
        fetch(url, tmp_path / "x", DownloadSettings(), kind="video")
    assert ("DOWNLOAD_ALLOWED_HOSTS or ALLOW_PRIVATE_NETWORKS=1" in str(caught.value)) is hint


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "100.64.1.1", "::1", "fd12::1", "::ffff:10.0.0.1"])
def test_private_networks_can_be_allowed(address: str) -> None:
    assert refusal(address) is not None
    assert refusal(address, allow_private=True) is None


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "0.0.0.0", "fe80::1", "224.0.0.1"],
)
def test_metadata_is_refused_even_where_private_networks_are_allowed(address: str) -> None:
    assert refusal(address, allow_private=True) is not None


def test_a_list_of_hosts_admits_only_its_hosts_and_permits_their_private_addresses(
    tmp_path: Path, dialled: list[Any]
) -> None:
    listed = DownloadSettings(tries=1, allowed_hosts=("rebind.example", "*.cdn.example", "10.0.0.5:81"))
    names = {"a.cdn.example": ["10.1.1.1"], "cdn.example": [PUBLIC], **NAMES}
    outcome = {}
    for url in (
        "http://rebind.example:82/x",
        "http://a.cdn.example/x",
        "http://10.0.0.5:81/x",
        "http://10.0.0.5/x",
        "http://cdn.example/x",
        "http://evilcdn.example/x",
        "http://media.example/x",
    ):
        dialled.clear()
        with pytest.raises(DownloadError):
            fetch(url, tmp_path / "x", listed, kind="video", resolve=lambda name, port: names[name])
        outcome[url.split("/")[2]] = list(dialled)
    assert outcome == {
        "rebind.example:82": [("127.0.0.1", 82)],
        "a.cdn.example": [("10.1.1.1", 80)],
        "10.0.0.5:81": [("10.0.0.5", 81)],
        "10.0.0.5": [],
        "cdn.example": [],
        "evilcdn.example": [],
        "media.example": [],
    }


@pytest.mark.parametrize(
    ("entry", "host", "port", "listed"),
    [
        ("Media.Example", "media.example", 443, True),
        ("media.example:443", "media.example", 443, True),
        ("media.example:443", "media.example", 8443, False),
        ("*.example", "a.b.example", 443, True),
        ("*.example", "example", 443, False),
        ("*.", "media.example", 443, False),
        ("*", "media.example", 443, False),
        ("", "media.example", 443, False),
        ("[fd00::1]:9000", "fd00::1", 9000, True),
        ("[fd00::1]", "fd00::1", 443, True),
        ("fd00::1", "fd00::1", 443, True),
    ],
)
def test_entries_of_the_host_list(entry: str, host: str, port: int, listed: bool) -> None:
    assert is_listed(Target("https", host, port, "/"), [entry]) is listed


@pytest.mark.parametrize(
    ("url", "host", "sent"),
    [
        ("HTTPS://Media.Example/a b?x=1#frag", "media.example", "https://media.example/a%20b?x=1"),
        ("https://media.example", "media.example", "https://media.example/"),
        ("https://media.example:443/a", "media.example", "https://media.example/a"),
        ("http://media.example:443/a", "media.example", "http://media.example:443/a"),
        ("http://bücher.example/ü", "xn--bcher-kva.example", "http://xn--bcher-kva.example/%C3%BC"),
        ("http://FAß.example/", "xn--fa-hia.example", "http://xn--fa-hia.example/"),
        ("http://under_score.example/", "under_score.example", "http://under_score.example/"),
        ("http://[2606:2800:021F:0::1]/", "2606:2800:21f::1", "http://[2606:2800:21f::1]/"),
    ],
)
def test_each_address_has_one_spelling(url: str, host: str, sent: str) -> None:
    target = parse_target(url)
    assert target.host == host
    assert target.url == sent
    assert parse_target(target.url) == target


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_as_host_is_refused_or_normalised(text: str) -> None:
    try:
        target = parse_target(f"http://{text}/x")
    except DownloadError:
        return
    assert target.host.isascii()
    assert target.host == target.host.lower()
    assert not set("@/\\%?# ") & set(target.host)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@media.example:8443/a/b/clip.mp4?sig=1#f", "https://media.example:8443/…/clip.mp4"),
        ("https://media.example/clip.mp4", "https://media.example/clip.mp4"),
        ("https://media.example/s3cret-token", "https://media.example/…/"),
        ("https://media.example/s3cret/", "https://media.example/…/"),
        ("https://media.example", "https://media.example/"),
        ("http://[2606::1]:81/x.wav", "http://[2606::1]:81/x.wav"),
        ("file:///home/me/clip.mp4", "file:…"),
        ("data:text/plain,secret", "data:…"),
        ("http://[::1", "(malformed address)"),
        ("secret", "(malformed address)"),
    ],
)
def test_addresses_are_shown_without_their_secrets(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_the_resolver_lists_each_address_once() -> None:
    assert resolve_host("127.0.0.1", 80) == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, 0), ("7", 7), ("99999", 30), ("-1", 0), ("soon", 0), ("Mon, 01 Jan 2001 00:00:00 GMT", 0), ("", 0)],
)
def test_retry_after_is_parsed_and_capped(value: str | None, seconds: float) -> None:
    assert retry_after_s(value, 30.0) == seconds


def test_retry_after_may_be_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    assert retry_after_s("Sun, 09 Sep 2001 01:46:50 GMT", 30.0) == 10.0


# ---- file: addresses


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """An allowed folder and one beside it, each with a clip."""
    for name in ("allowed", "allowed-not", "work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip é.mp4").write_bytes(b"\0" + name.encode() * 1000)
    (tmp_path / "work" / "clip é.mp4").unlink()
    return tmp_path / "allowed", tmp_path / "work"


def local(allowed: Path, **changes: Any) -> DownloadSettings:
    return DownloadSettings(allow_file_urls=True, file_url_roots=(allowed,), **changes)


def test_a_local_file_is_copied(folders: tuple[Path, Path]) -> None:
    allowed, work = folders
    clip = allowed / "clip é.mp4"
    for url in (clip.as_uri(), f"file:{clip.as_uri()[7:]}", f"FILE://localhost{clip.as_uri()[7:]}"):
        fetched = fetch(url, work / "source", local(allowed), kind="video")
        assert (work / "source").read_bytes() == clip.read_bytes()
        assert fetched.n_bytes == 7001
        assert fetched.sha256 == hashlib.sha256(clip.read_bytes()).hexdigest()
        assert fetched.content_type == "video/mp4"
    (work / "source").write_bytes(b"changed")
    assert clip.read_bytes() == b"\0" + b"allowed" * 1000


def test_a_link_inside_the_folder_to_a_file_inside_is_followed(folders: tuple[Path, Path]) -> None:
    allowed, work = folders
    (allowed / "link.mp4").symlink_to("clip é.mp4")
    assert fetch((allowed / "link.mp4").as_uri(), work / "x", local(allowed), kind="video").n_bytes == 7001


def test_files_outside_the_allowed_folders_are_refused(folders: tuple[Path, Path]) -> None:
    allowed, work = folders
    outside = allowed.parent / "allowed-not"
    (allowed / "link.mp4").symlink_to(outside / "clip é.mp4")
    (allowed / "up").symlink_to(outside)
    for url in (
        (outside / "clip é.mp4").as_uri(),
        (allowed / "link.mp4").as_uri(),
        (allowed / "up" / "clip é.mp4").as_uri(),
        f"file://{allowed}/../allowed-not/clip%20%C3%A9.mp4",
        f"file://{allowed}/%2e%2e/allowed-not/clip%20%C3%A9.mp4",
        "file:///etc/passwd",
        "file:///proc/self/environ",
        "file:///no/such/file",
    ):
        with pytest.raises(DownloadError, match="outside the folders of FILE_URL_ROOTS") as caught:
            fetch(url, work / "x", local(allowed), kind="video")
        assert str(allowed.parent) not in str(caught.value) + repr(caught.value.details)
    assert list(work.iterdir()) == []


def test_odd_file_addresses_are_refused(folders: tuple[Path, Path]) -> None:
    allowed, work = folders
    os.mkfifo(allowed / "pipe")
    (allowed / "empty").touch()
    for url, said in {
        f"file://host{allowed}/clip.mp4": "not a plain",
        f"file://{allowed}/clip.mp4?x=1": "not a plain",
        f"file://{allowed}/clip.mp4#x": "not a plain",
        f"file://{allowed}/%00": "not a plain",
        f"file://{allowed}/%ff": "not a plain",
        "file:clip.mp4": "not a plain",
        "file:": "not a plain",
        "file://[::1": "not a plain",
        f"file://{allowed}/missing.mp4": "does not exist",
        f"file://{allowed}/{'x' * 300}": "does not exist|outside",
        f"file://{allowed}/clip%20%C3%A9.mp4/x": "does not exist",
        f"file://{allowed}/pipe": "does not name a regular file",
        f"file://{allowed}": "does not name a regular file",
        f"file://{allowed}/empty": "empty",
    }.items():
        with pytest.raises(DownloadError, match=said):
            fetch(url, work / "x", local(allowed), kind="video")
    assert list(work.iterdir()) == []


def test_file_addresses_obey_limits_cancellation_and_the_setting(folders: tuple[Path, Path]) -> None:
    allowed, work = folders
    url = (allowed / "clip é.mp4").as_uri()
    with pytest.raises(DownloadError, match="too large"):
        fetch(url, work / "x", local(allowed, max_audio_bytes=6999), kind="audio")
    with pytest.raises(CancelledError):
        fetch(url, work / "x", local(allowed), kind="video", should_stop=lambda: True)
    with pytest.raises(DownloadError, match="within 0 s"):
        fetch(url, work / "x", local(allowed, total_timeout_s=0.0), kind="video")
    with pytest.raises(DownloadError, match="checksum"):
        fetch(url, work / "x", local(allowed), kind="video", sha256="0" * 64)
    with pytest.raises(DownloadError, match="need ALLOW_FILE_URLS=1"):
        fetch(url, work / "x", DownloadSettings(file_url_roots=(allowed,)), kind="video")
    with pytest.raises(DownloadError, match="outside"):
        fetch(url, work / "x", DownloadSettings(allow_file_urls=True), kind="video")
    assert list(work.iterdir()) == []
