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
    in_words,
    places,
    read_record,
    sha256_of,
    wanted,
)

Verdict = Literal["ok", "absent", "missing", "cut short", "too long", "wrong", "unreadable"]


@dataclass(frozen=True)
class Finding:
    """One file: `verdict` in a word, `text` the reason; `absent` is a file that the version can do without."""

    name: str
    verdict: Verdict
    text: str

    @property
    def is_fine(self) -> bool:
        """Whether the version can be loaded as far as this file goes."""
        return self.verdict in ("ok", "absent")


def verify(models_dir: Path, version: ModelVersion, *, manifest: Sequence[WeightFile] = MANIFEST) -> list[Finding]:
    """Check each file of `version` in every format that exists; one finding each, in the order of the manifest.

    Sizes and checksums are compared with what was published and with what this project recorded when it wrote the file;
    where neither says anything the file is opened.
    """
    record = read_record(models_dir)
    findings: list[Finding] = []
    for entry in wanted(manifest, version):
        present = [path for path in places(models_dir, entry.name) if path.is_file()]
        findings += [_judge(models_dir, path, entry, record) for path in present]
        if not present:
            findings.append(_absent(models_dir, entry))
    return findings


def _absent(models_dir: Path, entry: WeightFile) -> Finding:
    if not entry.is_needed:
        return Finding(entry.name, "absent", f"not needed: {entry.purpose}")
    path = models_dir / entry.name
    parts = [part.stat().st_size for part in path.parent.glob(f".{path.name}.*.part")]
    begun = f"; {in_words(parts[0])} of it arrived; fetch resumes there" if parts else ""
    return Finding(entry.name, "missing", f"expected {weights.expected(entry)}{begun}")


def _judge(models_dir: Path, path: Path, entry: WeightFile, record: dict[str, Recorded]) -> Finding:
    name = path.relative_to(models_dir).as_posix()
    is_official = path.name == Path(entry.name).name
    recorded = record.get(name)
    n_bytes = path.stat().st_size
    right = entry.n_bytes if is_official and entry.n_bytes is not None else recorded.n_bytes if recorded else None
    if right is not None and n_bytes != right:
        text = f"{n_bytes:,} bytes, expected {right:,}{_what_else(path)}"
        return Finding(name, "cut short" if n_bytes < right else "too long", text)
    published = entry.sha256 if is_official else None
    if published is None and recorded is None:
        return _opened(path, name)
    try:
        found = sha256_of(path)
    except OSError as error:
        return Finding(name, "unreadable", error.strerror or type(error).__name__)
    for expected, source in ((published, "published"), (recorded.sha256 if recorded else None, "recorded")):
        if expected is not None and not found.startswith(expected):
            text = f"SHA-256 {found}, expected {expected} ({source}){_what_else(path)}"
            return Finding(name, "wrong", text)
    known = "as published" if published is not None else "as recorded"
    if published is not None and len(published) < len(found) and recorded is None:
        known = f"begins as published ({published})"
    return Finding(name, "ok", f"{in_words(n_bytes)}, SHA-256 {known}")


def _opened(path: Path, name: str) -> Finding:
    """A file nobody knows a sum of: it must at least be readable."""
    try:
        if path.suffix == ".json":
            weights.read_config(path)
        else:
            weights.read_state(path)
    except WeightsError as error:
        return Finding(name, "unreadable", error.message)
    return Finding(name, "ok", f"{in_words(path.stat().st_size)}, readable; no sum of it is known")


def _what_else(path: Path) -> str:
    """The kind of a wrong file, where it can be recognised."""
    try:
        weights.refuse_what_is_no_checkpoint(path)
    except WeightsError as error:
        return f"; {error.message}"
    return ""
