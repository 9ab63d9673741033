"""Installation of Salad's queue binary while the image is built, from a loopback release."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.support.loopback import LoopbackServer
from worker.cli import salad_binary
from worker.cli.salad_binary import ARCHIVE, BINARY, InstallError, checksum_in, install

CONTENT = b"#!/bin/sh\necho the binary\n"


def archive_with(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(CONTENT)
        archive.addfile(info, io.BytesIO(CONTENT))
    # Without the time of day: test processes compare the names of their tests, which contain the checksum.
    return gzip.compress(file.getvalue(), mtime=0)


GOOD = archive_with(BINARY)
SUM = hashlib.sha256(GOOD).hexdigest()


class Releases(LoopbackServer):
    """A release host: `files` by path; a status in `refusals` is answered first."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {
            f"/v0.6.0/{ARCHIVE}": GOOD,
            f"/v0.6.0/{ARCHIVE}.sha256": f"{SUM}  {ARCHIVE}\n".encode(),
        }
        self.refusals: list[int] = []
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                body = server.files.get(self.path)
                status = server.refusals.pop(0) if server.refusals else 404 if body is None else 200
                self.send_response(status)
                self.send_header("Content-Length", str(len(body or b"") if status == 200 else 0))
                self.end_headers()
                if status == 200:
                    self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def releases() -> Iterator[Releases]:
    host = Releases()
    host.start()
    yield host
    host.stop()


def test_without_a_given_checksum_the_releases_own_decides(releases: Releases, tmp_path: Path) -> None:
    path = install("0.6.0", tmp_path, releases=releases.url)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o755
    assert releases.asked == [f"/v0.6.0/{ARCHIVE}.sha256", f"/v0.6.0/{ARCHIVE}"]


def test_a_given_checksum_replaces_the_releases(releases: Releases, tmp_path: Path) -> None:
    releases.files[f"/v0.6.0/{ARCHIVE}.sha256"] = b"0" * 64
    assert install("0.6.0", tmp_path, sha256=f" {SUM.upper()} ", releases=releases.url).read_bytes() == CONTENT


def test_a_changed_archive_is_refused_and_nothing_installed(releases: Releases, tmp_path: Path) -> None:
    releases.files[f"/v0.6.0/{ARCHIVE}"] = GOOD + b"x"
    with pytest.raises(InstallError, match=f"expected {SUM}"):
        install("0.6.0", tmp_path, releases=releases.url)
    assert list(tmp_path.iterdir()) == []


def test_a_release_without_a_checksum_file_is_refused(releases: Releases, tmp_path: Path) -> None:
    del releases.files[f"/v0.6.0/{ARCHIVE}.sha256"]
    with pytest.raises(InstallError, match=r"\.sha256 cannot be downloaded: HTTP 404"):
        install("0.6.0", tmp_path, releases=releases.url)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_without_the_binary_is_refused(releases: Releases, tmp_path: Path) -> None:
    other = archive_with("README")
    releases.files[f"/v0.6.0/{ARCHIVE}"] = other
    with pytest.raises(InstallError, match=f"contains no file {BINARY}"):
        install("0.6.0", tmp_path, sha256=hashlib.sha256(other).hexdigest(), releases=releases.url)


def test_a_passing_fault_of_the_host_is_retried(releases: Releases, tmp_path: Path) -> None:
    releases.refusals = [503, 502]
    install("0.6.0", tmp_path, releases=releases.url, pause_s=0.0)
    assert len(releases.asked) == 4


def test_a_host_that_stays_away_is_given_up(releases: Releases, tmp_path: Path) -> None:
    releases.refusals = [500] * 100
    with pytest.raises(InstallError, match="HTTP 500"):
        install("0.6.0", tmp_path, releases=releases.url, pause_s=0.0)
    assert len(releases.asked) == salad_binary.TRIES


@pytest.mark.parametrize(
    "text",
    [
        SUM,
        f"{SUM}\n",
        f"{SUM.upper()}  {ARCHIVE}\n",
        f"{SUM} *{ARCHIVE}",
        f"{SUM}  build/worker.tar.gz\n",
        f"{'0' * 64}  other.tar.gz\n{SUM}  dist/{ARCHIVE}\n",
    ],
)
def test_each_form_of_a_checksum_file_is_read(text: str) -> None:
    assert checksum_in(text) == SUM


@pytest.mark.parametrize("text", ["", "<html>not found</html>", SUM[:-1], f"{SUM}  a.tar.gz\n{SUM}  b.tar.gz"])
def test_a_file_without_the_archives_checksum_is_refused(text: str) -> None:
    with pytest.raises(InstallError, match="SALAD_WORKER_SHA256"):
        checksum_in(text)


def test_the_file_runs_alone_as_in_the_build_of_the_image(releases: Releases, tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(Path(salad_binary.__file__))]
    options = ["--folder", str(tmp_path), "--releases", releases.url]
    done = subprocess.run([*command, "0.6.0", *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / BINARY).read_bytes() == CONTENT
    done = subprocess.run([*command, "none", *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0
    done = subprocess.run([*command, "9.9.9", *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
