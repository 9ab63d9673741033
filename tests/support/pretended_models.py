"""Every network at official size on the pretended card, and a finder that knows where the face is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from benchmarks import networks as sizes
from musetalk.audio import AudioEncoder
from musetalk.face_parsing import FaceParser
from musetalk.faces import Face, FaceFinder, PoseFaceFinder
from musetalk.frames import UInt8Array
from musetalk.generator import Generator
from musetalk.geometry import Box
from musetalk.models import FACE_DTYPE, Models
from musetalk.networks.bisenet import BiseNet
from musetalk.networks.rtmpose import RtmPose
from musetalk.networks.s3fd import S3fd
from musetalk.weights import ModelVersion
from tests.support.pretended_card import DEVICE


@dataclass(frozen=True)
class Networks:
    """The layers of all networks; those of both versions have the same sizes."""

    unet: nn.Module
    vae: nn.Module
    whisper: nn.Module
    detector: nn.Module
    pose: nn.Module
    parsing: nn.Module

    def models(self, dtype: torch.dtype, version: ModelVersion = "v15") -> Models:
        """The networks as a worker loads them; the ones of an earlier call change their precision."""
        unet: Any = self.unet
        vae: Any = self.vae
        whisper: Any = self.whisper
        return Models(
            version=version,
            device=DEVICE,
            dtype=dtype,
            audio=AudioEncoder(whisper, WhisperFeatureExtractor(), DEVICE, dtype),
            generator=Generator(unet, vae, device=DEVICE, dtype=dtype),
            faces=PoseFaceFinder(self.pose, self.detector, device=DEVICE, dtype=FACE_DTYPE),
            parser=FaceParser(self.parsing, device=DEVICE, dtype=FACE_DTYPE),
            fingerprint="pretended",
        )

    def parts(self) -> dict[str, nn.Module]:
        """Everything that a job runs, by name."""
        vae: Any = self.vae
        return {
            "unet": self.unet,
            "vae encoder": vae.encoder,
            "vae decoder": vae.decoder,
            "whisper": self.whisper,
            "detector": self.detector,
            "pose": self.pose,
            "parsing": self.parsing,
        }


def build_networks() -> Networks:
    """Networks on the device, without numbers; takes some seconds."""
    with torch.device(DEVICE):
        return Networks(
            unet=UNet2DConditionModel(**sizes.OFFICIAL_UNET),
            vae=AutoencoderKL(**sizes.OFFICIAL_VAE),
            whisper=WhisperEncoder(WhisperConfig(**sizes.OFFICIAL_WHISPER)),
            detector=S3fd().to(FACE_DTYPE).eval(),
            pose=RtmPose().to(FACE_DTYPE).eval(),
            parsing=BiseNet().to(FACE_DTYPE).eval(),
        )


class KnownFaces:
    """Runs the finder's networks and gives a box that moves by a pixel: its edges are odd as often as even."""

    def __init__(self, finder: FaceFinder, box: Box) -> None:
        self._finder, self._box = finder, box
        self._n_found = 0

    def find(self, frames: Sequence[UInt8Array], *, bbox_shift: int = 0) -> list[Face | None]:
        """The known box in each frame."""
        self._finder.find(frames, bbox_shift=bbox_shift)
        found: list[Face | None] = []
        for _ in frames:
            step = self._n_found % 4
            found.append(Face(self._box.shifted(step, step // 2), None, 1.0))
            self._n_found += 1
        return found
