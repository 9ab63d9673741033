"""All networks of one version, loaded onto one device. Knows networks and weight files, nothing of pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from errors import OutOfMemoryError, WeightsError
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


def choose_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; raises WeightsError when CUDA is wanted and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise WeightsError("a GPU was asked for, but torch sees no CUDA device", retryable=True)
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Precision of the networks: `auto` is what the weights were published for.

    On a GPU that is float16 (upstream's real-time path runs it); on a CPU float32, where half precision is slower.
    """
    named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if wanted in named:
        return named[wanted]
    return torch.float16 if device.type == "cuda" else torch.float32


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


def configure_threads(wanted: int, device: torch.device) -> int:
    """Set and return the number of CPU threads for tensor work; 0 chooses.

    With a GPU one thread is right: what is left on the CPU is small, and more threads only spin (spec media.md 2.2).
    """
    n_threads = wanted or (1 if device.type == "cuda" else len(os.sched_getaffinity(0)))
    torch.set_num_threads(n_threads)
    return n_threads


@contextmanager
def gpu_errors() -> Iterator[None]:
    """Turns torch's out-of-memory error, where no smaller batch is left to try, into ours (retryable elsewhere)."""
    try:
        yield
    except torch.OutOfMemoryError:
        # The traceback is dropped: it holds the tensors that did not fit.
        raise OutOfMemoryError("the GPU's memory is too small for this job", is_oom=True) from None


def reset_peak_memory(device: torch.device) -> None:
    """Start counting the peak of GPU memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Largest GPU memory held since `reset_peak_memory`, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**20
