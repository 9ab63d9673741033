"""All networks of one version, loaded onto one device. Knows networks and weight files, nothing of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from musetalk import weights
from musetalk.audio import AudioEncoder
from musetalk.errors import WeightsError
from musetalk.face_parsing import FaceParser, FaceParserLike
from musetalk.faces import FaceFinder, PoseFaceFinder
from musetalk.generator import Generator
from musetalk.mesh_faces import MESH_IDENTITY, JawParser, MeshFaceFinder, NoFaceFinder, find_files
from musetalk.networks.bisenet import bisenet_from_state
from musetalk.networks.rtmpose import rtmpose_from_state
from musetalk.networks.s3fd import s3fd_from_state
from musetalk.restoration import Restorer

# Upstream's half-precision mode leaves the face networks in float32 as well; the detector's features, made from pixels
# that are not normalised, come near the largest number of half precision.
FACE_DTYPE = torch.float32

VERSIONS: tuple[weights.ModelVersion, ...] = ("v15", "v1")


@dataclass(frozen=True)
class Models:
    """All networks with their weights on `device`; shared by all jobs of the process."""

    version: weights.ModelVersion
    device: torch.device
    dtype: torch.dtype
    audio: AudioEncoder
    generator: Generator
    faces: FaceFinder
    parser: FaceParserLike
    # Of everything that prepares a source; empty: nothing is kept for later jobs.
    fingerprint: str = ""
    restorer: Restorer | None = None

    @cached_property
    def preparing_stream(self) -> Any:
        """The CUDA stream on which sources are prepared beside generating; None on a CPU.

        One for the life of the process: torch keeps freed memory by stream.
        """
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]


def find_version(models_dir: Path, demo_dir: Path | None = None) -> tuple[weights.ModelVersion, Path]:
    """The newest official version whose files are all in `models_dir`, else the demo in `demo_dir`; and its folder.

    The demo is used only when no official file exists at all: a folder that lacks some is a mistake to report.
    Raises WeightsError with what v1.5 lacks.
    """
    first_error: WeightsError | None = None
    for version in VERSIONS:
        try:
            weights.locate(models_dir, version)
        except WeightsError as error:
            first_error = first_error or error
        else:
            return version, models_dir
    assert first_error is not None
    if demo_dir is not None and demo_dir.is_dir() and not weights.has_any(models_dir):
        return "demo", demo_dir
    raise first_error


def load_models(
    models_dir: Path,
    version: weights.ModelVersion,
    *,
    device: torch.device,
    dtype: torch.dtype,
    unet_path: Path | None = None,
    unet_config_path: Path | None = None,
) -> Models:
    """Load every network of `version` from `models_dir` onto `device`.

    Raises WeightsError that names the wrong file.
    """
    files = weights.locate(models_dir, version)
    unet_path, unet_config_path = unet_path or files.unet, unet_config_path or files.unet_config
    generator = Generator.load(
        weights.read_config(unet_config_path),
        weights.read_state(unet_path),
        files.vae_dir,
        device=device,
        dtype=dtype,
        unet_name=f"{unet_path.parent.name}/{unet_path.name}",
    )
    audio = AudioEncoder.load(files.whisper_dir, device=device, dtype=dtype)
    generator.check_audio_width(audio.d_model)
    faces, parser, preparing = _load_faces(files, device)
    return Models(
        version=version,
        device=device,
        dtype=dtype,
        audio=audio,
        generator=generator,
        faces=faces,
        parser=parser,
        fingerprint=fingerprint(*generator.encoding_modules(), *preparing),
    )


def fingerprint(*parts: nn.Module | str) -> str:
    """64 hex digits that change with any weight of the networks and with any of the texts among `parts`."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_faces(
    files: weights.ModelFiles, device: torch.device
) -> tuple[FaceFinder, FaceParserLike, Sequence[nn.Module | str]]:
    """The official face networks, or, where a version has none, what stands for them; and what identifies them."""
    if files.pose is None or files.detector is None or files.parsing is None:
        try:
            finder, identity = MeshFaceFinder(*find_files()), MESH_IDENTITY
        except WeightsError as error:
            # A job that names its face box can still be done.
            return NoFaceFinder(error.message), JawParser(), ["no faces"]
        return finder, JawParser(), [identity]
    with weights.loading(files.pose.name):
        pose = rtmpose_from_state(weights.read_state(files.pose)).to(device, FACE_DTYPE)
    with weights.loading(files.detector.name):
        detector = s3fd_from_state(weights.read_state(files.detector)).to(device, FACE_DTYPE)
        if device.type == "cuda":
            # The layout in which tensor cores convolve: cuDNN would transpose every map there and back.
            detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with weights.loading(files.parsing.name):
        parsing = bisenet_from_state(weights.read_state(files.parsing)).to(device, FACE_DTYPE)
    parser = FaceParser(parsing, device=device, dtype=FACE_DTYPE)
    return PoseFaceFinder(pose, detector, device=device, dtype=FACE_DTYPE), parser, [pose, detector, parsing]
