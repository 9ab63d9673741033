"""Verification of the weight files in a folder, file by file. Reads only; makes no request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from musetalk import weights
from musetalk.errors import WeightsError
from musetalk.manifest import (
    MANIFEST,
    ModelVersion,
    Recorded,
    WeightFile,
    candidate_paths,
    files_of,
    read_record,
    readable_size,
    sha256_of,
)

Verdict = Literal["ok", "absent", "missing", "cut short", "too long", "wrong", "unreadable"]


@dataclass(frozen=True)
class Finding:
    """Result for one file: `verdict`, and `text` with the reason; `absent` is an optional file that does not exist."""

    name: str
    verdict: Verdict
    text: str

    @property
    def is_fine(self) -> bool:
        """Whether this file does not prevent the version from loading."""
        return self.verdict in ("ok", "absent")


def verify(models_dir: Path, version: ModelVersion, *, manifest: Sequence[WeightFile] = MANIFEST) -> list[Finding]:
    """Check each file of `version` in every format that exists; one finding each, in the order of the manifest.

    Sizes and checksums are compared with the published ones and with those that this project recorded when it wrote the
    file. A file without either is read instead.
    """
    record = read_record(models_dir)
    findings: list[Finding] = []
    for entry in files_of(manifest, version):
        present = [path for path in candidate_paths(models_dir, entry.name) if path.is_file()]
        findings += [_check(models_dir, path, entry, record) for path in present]
        if not present:
            findings.append(_not_there(models_dir, entry))
    return findings


def _not_there(models_dir: Path, entry: WeightFile) -> Finding:
    if not entry.is_needed:
        return Finding(entry.name, "absent", f"not needed: {entry.purpose}")
    path = models_dir / entry.name
    # The names that `RemoteFile.part_path` gives to unfinished files.
    parts = [part.stat().st_size for part in path.parent.glob(f".{path.name}.*.part")]
    begun = f"; {readable_size(parts[0])} have arrived; fetch resumes there" if parts else ""
    return Finding(entry.name, "missing", f"expected {weights.expected(entry)}{begun}")


def _check(models_dir: Path, path: Path, entry: WeightFile, record: dict[str, Recorded]) -> Finding:
    name = path.relative_to(models_dir).as_posix()
    is_official = path.name == Path(entry.name).name
    recorded = record.get(name)
    n_bytes = path.stat().st_size
    # The manifest describes the official file; only the record knows a converted one.
    right = entry.n_bytes if is_official and entry.n_bytes is not None else recorded.n_bytes if recorded else None
    if right is not None and n_bytes != right:
        text = f"{n_bytes:,} bytes, expected {right:,}{_recognised(path)}"
        return Finding(name, "cut short" if n_bytes < right else "too long", text)
    published = entry.sha256 if is_official else None
    if published is None and recorded is None:
        return _check_by_reading(path, name)
    try:
        found = sha256_of(path)
    except OSError as error:
        return Finding(name, "unreadable", error.strerror or type(error).__name__)
    for expected, source in ((published, "published"), (recorded.sha256 if recorded else None, "recorded")):
        if expected is not None and not found.startswith(expected):
            text = f"SHA-256 {found}, expected {expected} ({source}){_recognised(path)}"
            return Finding(name, "wrong", text)
    known = "as published" if published is not None else "as recorded"
    if published is not None and len(published) < len(found) and recorded is None:
        known = f"begins as published ({published})"
    return Finding(name, "ok", f"{readable_size(n_bytes)}, SHA-256 {known}")


def _check_by_reading(path: Path, name: str) -> Finding:
    """Check a file without a known checksum: it must at least be readable."""
    try:
        if path.suffix == ".json":
            weights.read_config(path)
        else:
            weights.read_state(path)
    except WeightsError as error:
        return Finding(name, "unreadable", error.message)
    return Finding(name, "ok", f"{readable_size(path.stat().st_size)}, readable; its checksum is not known")


def _recognised(path: Path) -> str:
    """Describe what a wrong file is instead, if that can be recognised."""
    try:
        weights.reject_non_checkpoint(path)
    except WeightsError as error:
        return f"; {error.message}"
    return ""
