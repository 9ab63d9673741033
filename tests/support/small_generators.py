"""Generators of seeded tiny networks on the CPU, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from musetalk.generator import Generator
from tests.support.seeded import fill

CPU = torch.device("cpu")
D_MODEL, N_TOKENS, CROP_PX = 12, 20, 64
UNET_CONFIG: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": D_MODEL,
    "attention_head_dim": 4,
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": CROP_PX,
}


def build_unet(seed: int = 1, **changes: Any) -> UNet2DConditionModel:
    return fill(UNet2DConditionModel(**{**UNET_CONFIG, **changes}), seed)


def build_vae(seed: int = 2, **changes: Any) -> AutoencoderKL:
    return fill(AutoencoderKL(**{**VAE_CONFIG, **changes}), seed)


def overflowing_unet() -> UNet2DConditionModel:
    """Weights that float16 holds, and activations that it does not."""
    unet = build_unet()
    with torch.no_grad():
        unet.conv_in.weight.mul_(30_000)
    return unet.half().float()


def small_generator(
    dtype: torch.dtype = torch.float32,
    *,
    unet: UNet2DConditionModel | None = None,
    vae: AutoencoderKL | None = None,
) -> Generator:
    return Generator(unet or build_unet(), vae or build_vae(), device=CPU, dtype=dtype)


def inputs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Source latents and audio windows for the tiny networks."""
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn((count, 8, CROP_PX // 2, CROP_PX // 2), generator=random)
    return latents, torch.randn((count, N_TOKENS, D_MODEL), generator=random)
