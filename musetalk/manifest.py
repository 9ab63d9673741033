"""Manifest of the weight files: source, size and checksum of each; and the record of the files in a folder.

Layout and figures: docs/model.md#weight-files. Knows no tensors and makes no request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from musetalk.errors import WeightsError
from musetalk.files import replacing

# `demo` is the project's own small model: v1.5's files and code path, without the official face networks.
ModelVersion = Literal["v15", "v1", "demo"]
OFFICIAL: tuple[ModelVersion, ...] = ("v15", "v1")

# Precision of a converted file: float16, or float32 for the face networks, which run in it.
Precision = Literal["half", "full"]


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One file of the official layout; `n_bytes` and `sha256` (full, or its first digits) where they are known.

    `repo`, `repo_path` and `revision` (None: main) are its place on the hub, `url` its place on another site.
    `precision` is None for a file that is no checkpoint; `keeps` are the prefixes of the keys in use (empty: all).
    """

    name: str
    purpose: str
    repo: str = ""
    repo_path: str = ""
    revision: str | None = None
    url: str = ""
    site: str = ""
    n_bytes: int | None = None
    sha256: str | None = None
    versions: tuple[ModelVersion, ...] = ("v15", "v1", "demo")
    precision: Precision | None = None
    keeps: tuple[str, ...] = ()
    is_needed: bool = True

    @property
    def source(self) -> str:
        """Source of the file, for a person."""
        return f"Hugging Face {self.repo}" if self.repo else self.site

    @property
    def converted_name(self) -> str:
        """Name of the file after conversion; the loader prefers it to the official one."""
        return str(Path(self.name).with_suffix(".safetensors"))


_MUSETALK = "TMElyralab/MuseTalk"
_VAE = "stabilityai/sd-vae-ft-mse"
_WHISPER = "openai/whisper-tiny"
S3FD = "s3fd-619a316812.pth"

# No commit of these repositories is known, so `revision` stays None; sizes and checksums pin the content.
MANIFEST: tuple[WeightFile, ...] = (
    WeightFile(
        name="musetalkV15/unet.pth",
        purpose="UNet of MuseTalk v1.5",
        repo=_MUSETALK,
        repo_path="musetalkV15/unet.pth",
        n_bytes=3_400_074_924,
        sha256="7ebf6c98c181e20838e4c0054e96e944ac60d5d692cc01db42839fe11b787007",  # pragma: allowlist secret
        versions=("v15", "demo"),
        precision="half",
    ),
    WeightFile(
        name="musetalkV15/musetalk.json",
        purpose="configuration of the v1.5 UNet",
        repo=_MUSETALK,
        repo_path="musetalkV15/musetalk.json",
        n_bytes=748,
        sha256="5b6923aee04d7169",  # pragma: allowlist secret
        versions=("v15", "demo"),
    ),
    WeightFile(
        name="musetalk/pytorch_model.bin",
        purpose="UNet of MuseTalk v1.0",
        repo=_MUSETALK,
        repo_path="musetalk/pytorch_model.bin",
        versions=("v1",),
        precision="half",
    ),
    WeightFile(
        name="musetalk/musetalk.json",
        purpose="configuration of the v1.0 UNet",
        repo=_MUSETALK,
        repo_path="musetalk/musetalk.json",
        versions=("v1",),
    ),
    WeightFile(name="sd-vae/config.json", purpose="configuration of the VAE", repo=_VAE, repo_path="config.json"),
    WeightFile(
        name="sd-vae/diffusion_pytorch_model.bin",
        purpose="VAE",
        repo=_VAE,
        repo_path="diffusion_pytorch_model.bin",
        n_bytes=334_707_217,
        sha256="1b4889b6b1d4ce7a",  # pragma: allowlist secret
        precision="half",
    ),
    WeightFile(name="whisper/config.json", purpose="configuration of Whisper", repo=_WHISPER, repo_path="config.json"),
    WeightFile(
        name="whisper/pytorch_model.bin",
        purpose="Whisper (its encoder is used)",
        repo=_WHISPER,
        repo_path="pytorch_model.bin",
        n_bytes=151_095_027,
        sha256="9607f98a2b22d9e2",  # pragma: allowlist secret
        precision="half",
        keeps=("model.encoder.", "encoder."),
    ),
    WeightFile(
        # Optional: without the file its published values apply.
        name="whisper/preprocessor_config.json",
        purpose="sound parameters of Whisper",
        repo=_WHISPER,
        repo_path="preprocessor_config.json",
        is_needed=False,
    ),
    WeightFile(
        name="dwpose/dw-ll_ucoco_384.pth",
        purpose="landmarks (RTMPose-l, whole body)",
        repo="yzd-v/DWPose",
        repo_path="dw-ll_ucoco_384.pth",
        n_bytes=406_878_486,
        sha256="0d9408b13cd863c4",  # pragma: allowlist secret
        versions=OFFICIAL,
        precision="full",
    ),
    WeightFile(
        name="face-parse-bisent/79999_iter.pth",
        purpose="face parsing (BiSeNet)",
        repo="ManyOtherFunctions/face-parse-bisent",
        repo_path="79999_iter.pth",
        n_bytes=53_289_463,
        sha256="468e13ca13a9b43c",  # pragma: allowlist secret
        versions=OFFICIAL,
        precision="full",
    ),
    WeightFile(
        name=S3FD,
        purpose="face detection (S3FD)",
        url="https://www.adrianbulat.com/downloads/python-fan/s3fd-619a316812.pth",
        site="the face-alignment project's site (its S3FD detector)",
        sha256="619a316812",
        versions=OFFICIAL,
        precision="full",
    ),
)

# Optional, for `params.restore`; none of the versions needs it.
RESTORER = WeightFile(
    name="restorer/GFPGANv1.4.pth",
    purpose="face restorer (GFPGAN v1.4)",
    url="https://github.com/TencentARC/GFPGAN/releases/download/v1.3.0/GFPGANv1.4.pth",
    site="the GFPGAN project's releases",
    n_bytes=348_632_874,
    sha256="e2cd4703ab14f4d01fd1383a8a8b266f9a5833dacee8e6a79d3bf21a1b6be5ad",  # pragma: allowlist secret
)

# Other names under which the same file is found, tried in this order after the official one.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "sd-vae/diffusion_pytorch_model.bin": ("sd-vae/diffusion_pytorch_model.safetensors",),
    "whisper/pytorch_model.bin": ("whisper/model.safetensors",),
    S3FD: (
        "s3fd/s3fd-619a316812.pth",
        "s3fd/s3fd.pth",
        "s3fd.pth",
        "face_detection/s3fd.pth",
        "hub/checkpoints/s3fd-619a316812.pth",
    ),
    "musetalkV15/unet.pth": ("musetalkV15/diffusion_pytorch_model.safetensors",),
    "musetalk/pytorch_model.bin": ("musetalk/diffusion_pytorch_model.safetensors",),
}


def candidate_paths(models_dir: Path, name: str) -> list[Path]:
    """Return every path from which `name` of the official layout may be loaded, the preferred one first."""
    official = models_dir / name
    candidates = [official]
    if official.suffix != ".json":
        candidates.insert(0, official.with_suffix(".safetensors"))
    return list(dict.fromkeys([*candidates, *(models_dir / other for other in OTHER_NAMES.get(name, ()))]))


def find_file(models_dir: Path, name: str) -> Path | None:
    """Return the path from which `name` of the official layout is loaded; None if there is no file."""
    return next((path for path in candidate_paths(models_dir, name) if path.is_file()), None)


def files_of(manifest: Sequence[WeightFile], version: ModelVersion) -> list[WeightFile]:
    """Return the manifest's entries of one version."""
    return [entry for entry in manifest if version in entry.versions]


def with_s3fd_url(manifest: Sequence[WeightFile], url: str) -> tuple[WeightFile, ...]:
    """Return the manifest with another address of S3FD, the one file outside the hub; an empty `url` keeps it."""
    if not url:
        return tuple(manifest)
    return tuple(replace(entry, url=url) if entry.name == S3FD else entry for entry in manifest)


# -- the record of a folder ------------------------------------------------------------------------------------------

RECORD_NAME = "weights.json"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Record of one file in a folder: size, SHA-256, and source.

    `commit` is the hub's; `made_from` is the SHA-256 of the checkpoint from which a converted file was made.
    """

    n_bytes: int
    sha256: str
    commit: str | None = None
    made_from: str | None = None


def read_record(models_dir: Path) -> dict[str, Recorded]:
    """Read the record of `models_dir` by file name; empty if there is none or it is damaged."""
    try:
        raw = json.loads((models_dir / RECORD_NAME).read_text(encoding="utf-8"))
        known = {field.name for field in fields(Recorded)}
        return {
            # Unknown keys may come from a later version of this project.
            str(name): Recorded(**{key: value for key, value in stats.items() if key in known})
            for name, stats in raw["files"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def write_record(models_dir: Path, record: Mapping[str, Recorded]) -> None:
    """Replace the record as a whole; raises WeightsError if the folder cannot be written to."""
    files = {
        name: {key: value for key, value in asdict(recorded).items() if value is not None}
        for name, recorded in sorted(record.items())
    }
    try:
        with replacing(models_dir / RECORD_NAME) as part:
            part.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"{RECORD_NAME} cannot be written ({error.strerror})", file=RECORD_NAME) from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def readable_size(n_bytes: int) -> str:
    """Format a size for a person: `3.40 GB`, `53.3 MB`, `748 bytes`."""
    if n_bytes >= 10**9:
        return f"{n_bytes / 10**9:.2f} GB"
    return f"{n_bytes / 10**6:.1f} MB" if n_bytes >= 10**6 else f"{n_bytes:,} bytes"
