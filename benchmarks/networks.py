"""Networks for the benchmarks, three sizes: speed does not depend on the weights, so random ones are used.

    tiny   a generator and a Whisper that cost next to nothing, to measure everything around them
    demo   the bundled demo model
    full   the official sizes, filled with random numbers

Full and tiny have no detector (a random one finds nothing): benchmarks give the face box. Full parses with a BiSeNet.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from benchmarks import measuring
from benchmarks.arguments import Size
from musetalk.audio import AudioEncoder
from musetalk.face_parsing import FaceParser
from musetalk.faces import Face
from musetalk.frames import UInt8Array
from musetalk.generator import Generator
from musetalk.mesh_faces import JawParser
from musetalk.models import FACE_DTYPE, Models, load_models
from musetalk.networks.bisenet import BiseNet
from worker.config import ROOT

OFFICIAL_UNET = {
    "sample_size": 64,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 384,
    "attention_head_dim": 8,
}
OFFICIAL_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 256,
}
OFFICIAL_WHISPER = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
_SMALL_UNET = {"block_out_channels": [8, 8, 8, 8], "cross_attention_dim": 32, "attention_head_dim": 2}
# Crops of 64 px instead of 256.
_SMALL_VAE = {"block_out_channels": [4, 4, 4, 4], "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 64}
_SMALL_WHISPER = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}


class NoFaces:
    """Stand-in for the detector; benchmarks give the box to both sides."""

    def find(self, frames: Sequence[UInt8Array], *, bbox_shift: int = 0) -> list[Face | None]:  # noqa: ARG002
        """No face anywhere."""
        return [None] * len(frames)


def build(size: Size, device: torch.device, dtype: torch.dtype) -> Models:
    """All networks of one size on `device`."""
    if size == "demo":
        return load_models(ROOT / "demo/models", "demo", device=device, dtype=dtype)
    torch.manual_seed(1)
    small = size == "tiny"
    unet = UNet2DConditionModel(
        **{**OFFICIAL_UNET, **(_SMALL_UNET if small else {}), "norm_num_groups": 4 if small else 32}
    )
    vae = AutoencoderKL(**{**OFFICIAL_VAE, **(_SMALL_VAE if small else {})})
    whisper = WhisperEncoder(WhisperConfig(**{**OFFICIAL_WHISPER, **(_SMALL_WHISPER if small else {})}))
    parser: Any = JawParser()
    if not small:
        bisenet = BiseNet().to(device, FACE_DTYPE).eval().requires_grad_(False)
        parser = FaceParser(bisenet, device=device, dtype=FACE_DTYPE)
    return Models(
        version="v15",
        device=device,
        dtype=dtype,
        audio=AudioEncoder(whisper, WhisperFeatureExtractor(), device, dtype),
        generator=Generator(unet, vae, device=device, dtype=dtype),
        faces=NoFaces(),
        parser=parser,
        fingerprint=f"random {size}",
    )


def n_parameters(network: nn.Module) -> int:
    """Number of a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_tflops(device: torch.device, dtype: torch.dtype, time_of: Callable[[Callable[[], object]], float]) -> float:
    """Speed of the device in a large product of matrices: the ceiling for all shares."""
    side = 8192 if device.type == "cuda" else 1536
    one = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / time_of(lambda: one @ one) / 1e12


def machine(device: torch.device) -> dict[str, Any]:
    """Machine and versions of a measurement."""
    facts = measuring.machine()
    for name in ("torch", "diffusers", "transformers"):
        facts[name] = importlib.metadata.version(name)
    facts["threads"] = torch.get_num_threads()
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["vram_mib"] = torch.cuda.mem_get_info(device)[1] >> 20
    return facts


def dtype_of(name: str) -> torch.dtype:
    """`float16` and the like as torch's type."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def median(values: list[float]) -> float:
    """The middle of some measurements."""
    return float(np.median(values))
