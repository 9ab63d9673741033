"""All networks of one version, loaded onto one device. Knows networks and weight files, nothing of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from errors import WeightsError
from musetalk import weights
from musetalk.audio import AudioEncoder
from musetalk.faces import FaceFinder, FaceParser, PoseFaceFinder
from musetalk.generator import Generator
from musetalk.networks.bisenet import bisenet_from_state
from musetalk.networks.rtmpose import rtmpose_from_state
from musetalk.networks.s3fd import s3fd_from_state

# Upstream's half-precision mode leaves the face networks in float32 as well; the detector's features, made from pixels
# that are not normalised, come near the largest number of half precision.
FACE_DTYPE = torch.float32

VERSIONS: tuple[weights.ModelVersion, ...] = ("v15", "v1")


@dataclass(frozen=True)
class Models:
    """Everything that holds weights, ready on `device`; shared by all jobs of the process."""

    version: weights.ModelVersion
    device: torch.device
    dtype: torch.dtype
    audio: AudioEncoder
    generator: Generator
    faces: FaceFinder
    parser: FaceParser


def find_version(models_dir: Path) -> weights.ModelVersion:
    """The newest version whose files are all in `models_dir`; raises WeightsError with what v1.5 lacks."""
    first_error: WeightsError | None = None
    for version in VERSIONS:
        try:
            weights.locate(models_dir, version)
        except WeightsError as error:
            first_error = first_error or error
        else:
            return version
    assert first_error is not None
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

    Raises WeightsError that names the file at fault.
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
    with weights.loading(files.pose.name):
        pose = rtmpose_from_state(weights.read_state(files.pose)).to(device, FACE_DTYPE)
    with weights.loading(files.detector.name):
        detector = s3fd_from_state(weights.read_state(files.detector)).to(device, FACE_DTYPE)
    with weights.loading(files.parsing.name):
        parsing = bisenet_from_state(weights.read_state(files.parsing)).to(device, FACE_DTYPE)
    return Models(
        version=version,
        device=device,
        dtype=dtype,
        audio=audio,
        generator=generator,
        faces=PoseFaceFinder(pose, detector, device=device, dtype=FACE_DTYPE),
        parser=FaceParser(parsing, device=device, dtype=FACE_DTYPE),
    )
