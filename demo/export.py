"""Stage `export`: the trained networks as half-precision safetensors in the official layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from demo import encoder as hearing
from demo import unet as speaking
from demo import vae as seeing
from demo.stages import MODELS

MAX_BYTES = 20_000_000


def _save(path: Path, state: Mapping[str, Tensor], prefix: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + key: value.detach().half().contiguous() for key, value in state.items()}, path)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def export(encoder: WhisperEncoder, vae: AutoencoderKL, unet: UNet2DConditionModel, models_dir: Path = MODELS) -> None:
    """Write all files and say how large they are; raises ValueError when the bundle is over its limit."""
    _save(models_dir / "musetalkV15/unet.safetensors", unet.state_dict())
    _write_json(models_dir / "musetalkV15/musetalk.json", speaking.CONFIG)
    _save(models_dir / "sd-vae/diffusion_pytorch_model.safetensors", vae.state_dict())
    _write_json(models_dir / "sd-vae/config.json", seeing.CONFIG)
    _save(models_dir / "whisper/model.safetensors", encoder.state_dict(), "model.encoder.")
    _write_json(models_dir / "whisper/config.json", hearing.CONFIG)
    _write_json(models_dir / "whisper/preprocessor_config.json", hearing.EXTRACTOR)
    total = 0
    for path in sorted(models_dir.rglob("*.safetensors")):
        total += path.stat().st_size
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.relative_to(models_dir)}: {path.stat().st_size:,} bytes, SHA-256 {digest}")
    if total > MAX_BYTES:
        raise ValueError(f"the bundle has {total:,} bytes, more than {MAX_BYTES:,}")


def as_stored(network: torch.nn.Module) -> torch.nn.Module:
    """The network with its numbers rounded as in the files."""
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(value.half())
    return network
