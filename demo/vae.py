"""Stage `vae`: a small AutoencoderKL for faces of the size MuseTalk's crop has in the demo, sharpest at the mouth."""

from __future__ import annotations

from demo import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped arguments are answered at once.
    arguments.vae(__doc__)

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from demo.pictures import CROP_PX, N_HELD_OUT_OTHERS, Pictures, pictures
from demo.stages import random_of, train

SEED = 31
CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 1,
    # Four channels a group at least: with one channel a group a norm takes the picture's colour away.
    "norm_num_groups": 4,
    "sample_size": CROP_PX,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}
BATCH, PATCH_PX = 8, 128
# How much a decoder must bear: a share of the latents' own spread.
NOISE = 0.08


def new_vae() -> AutoencoderKL:
    """The network, drawn from its seed."""
    torch.manual_seed(SEED)
    return AutoencoderKL(**{key: value for key, value in CONFIG.items() if key[0] != "_"})


def as_input(crops: np.ndarray[Any, Any]) -> Tensor:
    """BGR uint8 (n, h, w, 3) -> RGB -1..1 (n, 3, h, w)."""
    rgb = torch.from_numpy(np.ascontiguousarray(crops[..., ::-1])).permute(0, 3, 1, 2)
    return rgb.float() / 127.5 - 1


def importance(height: int, width: int) -> Tensor:
    """Weight of an error by place in the crop: the upper half is never shown, viewers look at the mouth."""
    ys, xs = np.mgrid[0:height, 0:width]
    y, x = (ys + 0.5) / height, (xs + 0.5) / width
    weight = np.where(y < 0.46, 0.35, 1.0)
    mouth = np.exp(-(((x - 0.5) / 0.24) ** 2) - ((y - 0.74) / 0.15) ** 2)
    return torch.from_numpy((weight + 3.0 * mouth).astype(np.float32))


def reconstruction_loss(made: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """L1, L1 of the gradients, and L1 of blurred copies, which carry colour and light; weighted by place."""
    error = (made - wanted).abs()
    loss = (error * weight).mean()
    for axis in (2, 3):
        slope = (made.diff(dim=axis) - wanted.diff(dim=axis)).abs()
        loss = loss + 0.7 * (slope * weight[..., : slope.shape[2], : slope.shape[3]]).mean()
    for size in (8, 32):
        low = (F.avg_pool2d(made, size) - F.avg_pool2d(wanted, size)).abs()
        loss = loss + 0.6 * low.mean()
    return loss


def black_half(images: Tensor) -> Tensor:
    """The masked view: rows from half height on black, which is -1."""
    masked = images.clone()
    masked[:, :, images.shape[2] // 2 :] = -1.0
    return masked


def mouth_psnr(vae: AutoencoderKL, crops: np.ndarray[Any, Any]) -> tuple[float, float]:
    """PSNR in dB of whole crops' lower halves and of the mouth box, through the VAE's mode."""
    with torch.inference_mode():
        images = as_input(crops)
        parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in torch.split(images, 16)]
        error = (torch.cat(parts).clamp(-1, 1) - images) / 2
    high, wide = images.shape[2:]
    mouth = error[:, :, int(0.62 * high) : int(0.88 * high), int(0.26 * wide) : int(0.74 * wide)]
    return tuple(round(float(-10 * torch.log10((part**2).mean())), 2) for part in (error[:, :, high // 2 :], mouth))  # type: ignore[return-value]


def trained_on(data: Pictures) -> np.ndarray[Any, Any]:
    """Indices of the crops that training may see: the last avatar poses and some persons are held out."""
    avatar = np.flatnonzero(data.person < -1)
    others = np.flatnonzero(data.person >= N_HELD_OUT_OTHERS)
    return np.concatenate([avatar, others])


def run(n_steps: int, *, name: str = "vae", peak_rate: float = 2e-3) -> AutoencoderKL:
    """Train, or resume training; return the network."""
    data = pictures()
    vae = new_vae()
    avatar = np.flatnonzero(data.person < -1)
    others = np.flatnonzero(data.person >= N_HELD_OUT_OTHERS)
    held_out = np.flatnonzero(data.person == -1)[::9][:48]
    strangers = np.flatnonzero((data.person >= 0) & (data.person < N_HELD_OUT_OTHERS))[::3]
    whole = importance(CROP_PX, CROP_PX)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        random = random_of(SEED, step)
        n_avatar = round(BATCH * 0.7)
        chosen = np.concatenate([random.choice(avatar, n_avatar), random.choice(others, BATCH - n_avatar)])
        # Patches, so that a step is cheap; most contain the mouth.
        tops = random.integers(CROP_PX - PATCH_PX - 16, CROP_PX - PATCH_PX + 1, BATCH) // 8 * 8
        tops[random.random(BATCH) < 0.2] = 0
        lefts = random.integers(0, CROP_PX - PATCH_PX + 1, BATCH) // 8 * 8
        crops = np.stack(
            [
                data.crops[index][top : top + PATCH_PX, left : left + PATCH_PX]
                for index, top, left in zip(chosen, tops, lefts, strict=True)
            ]
        )
        weight = torch.stack(
            [whole[top : top + PATCH_PX, left : left + PATCH_PX] for top, left in zip(tops, lefts, strict=True)]
        )[:, None]
        images = as_input(crops)
        latents = vae.encode(images).latent_dist.mean
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED * 100_000 + step))
        made = vae.decode(latents + NOISE * noise).sample
        loss = reconstruction_loss(made, images, weight)
        # Keeps the latents near unit spread, so that the noise means the same all the time.
        spread = (latents**2).mean()
        total = loss + 0.02 * (spread - 1).clamp(min=0)
        return total, {"loss": loss.item(), "spread": spread.item()}

    def check(_step: int) -> dict[str, float]:
        lower, mouth = mouth_psnr(vae, data.crops[held_out])
        _, stranger = mouth_psnr(vae, data.crops[strangers])
        return {"lower_db": lower, "mouth_db": mouth, "stranger_mouth_db": stranger}

    train(name, vae, loss_of, n_steps=n_steps, peak_rate=peak_rate, on_check=check, check_every=250, average=0.995)
    return vae


def freeze(network: nn.Module) -> None:
    """No gradients for what is only used."""
    network.eval().requires_grad_(False)


if __name__ == "__main__":
    given = arguments.vae(__doc__)
    torch.set_num_threads(given.threads)
    run(given.steps)
