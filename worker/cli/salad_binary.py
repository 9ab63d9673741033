"""Install Salad's queue binary from its release, checked against a SHA-256. Needs the standard library only.

Dockerfile.worker runs this file while the image is built, before any package is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

RELEASES = "https://github.com/SaladTechnologies/salad-cloud-job-queue-worker/releases/download"
ARCHIVE = "salad-http-job-queue-worker_x86_64.tar.gz"
BINARY = "salad-http-job-queue-worker"
TRIES = 5


class InstallError(Exception):
    """The binary cannot be installed; the text says why and what to do."""


def fetch(url: str, *, pause_s: float = 2.0) -> bytes:
    """Download `url` with up to five tries; raises InstallError. A refusal (4xx) is not tried again."""
    fault = ""
    for n_try in range(TRIES):
        if n_try:
            time.sleep(pause_s * n_try)
        try:
            with urllib.request.urlopen(url, timeout=60) as response:  # noqa: S310 - an https release, or the test's server
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            fault = f"HTTP {error.code}"
            if error.code < 500:
                break
        except OSError as error:
            fault = str(getattr(error, "reason", None) or error)
    raise InstallError(f"{url} cannot be downloaded: {fault}")


def checksum_in(text: str) -> str:
    """Read the archive's SHA-256 from a `.sha256` file: bare, or in lines `checksum  file`; raises InstallError.

    A single checksum counts under any name: the release may have built the archive under another one.
    """
    lines = [re.fullmatch(r"([0-9A-Fa-f]{64})(?:\s+\*?(?:.*/)?(\S+))?", line.strip()) for line in text.splitlines()]
    # A release may list the checksums of several files in one.
    found = [match for match in lines if match]
    for match in found:
        if len(found) == 1 or match[2] in (None, ARCHIVE):
            return match[1].lower()
    raise InstallError(f"{ARCHIVE}.sha256 names no SHA-256 of {ARCHIVE}; give one with SALAD_WORKER_SHA256")


def install(version: str, folder: Path, *, sha256: str = "", releases: str = RELEASES, pause_s: float = 2.0) -> Path:
    """Install the binary of a release into `folder`; without `sha256`, the release's own checksum file decides.

    Raises InstallError, and leaves `folder` as it was.
    """
    address = f"{releases}/v{version}/{ARCHIVE}"
    wanted = sha256.strip().lower() or checksum_in(
        fetch(f"{address}.sha256", pause_s=pause_s).decode("ascii", "replace")
    )
    archive = fetch(address, pause_s=pause_s)
    found = hashlib.sha256(archive).hexdigest()
    if found != wanted:
        raise InstallError(f"{ARCHIVE} of version {version} has SHA-256 {found}, expected {wanted}")
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
            member = files.extractfile(BINARY)
            content = member.read() if member is not None else b""
    except (KeyError, tarfile.TarError, OSError, EOFError):
        content = b""
    if not content:
        raise InstallError(f"{ARCHIVE} of version {version} contains no file {BINARY}")
    path = folder / BINARY
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status (0 installed or not wanted, 1 failed)."""
    parser = argparse.ArgumentParser(description="Install Salad's queue binary, checked against its SHA-256.")
    parser.add_argument("version", help="version of the release, for example 0.6.0; `none` installs nothing")
    parser.add_argument("--sha256", default="", help="expected SHA-256 of the archive instead of the release's own")
    parser.add_argument("--folder", type=Path, default=Path("/usr/local/bin"))
    parser.add_argument("--releases", default=RELEASES, help="address of the releases")
    given = parser.parse_args(arguments)
    if given.version == "none":
        print("no queue binary: SALAD_WORKER_VERSION is none")
        return 0
    try:
        print(f"installed {install(given.version, given.folder, sha256=given.sha256, releases=given.releases)}")
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
