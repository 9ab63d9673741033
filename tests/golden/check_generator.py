"""Positional encoding, UNet, VAE and the resizes around them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from musetalk.generator import Generator, crop_patch, positional_encoding, to_bgr
from musetalk.geometry import Box
from tests.golden.check_networks import check_keys
from tests.golden.compare import absolute, every, relative
from tests.support.seeded import fill

CPU = torch.device("cpu")
SMALLEST_UNET = {
    "cross_attention_dim": 8,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
SMALLEST_VAE = {"block_out_channels": (8,), "norm_num_groups": 4, "sample_size": 256}


def build(unet: UNet2DConditionModel | None = None, vae: AutoencoderKL | None = None) -> Generator:
    """A generator around one network under test, with the smallest partner that fits."""
    channels = vae.config.latent_channels if vae else unet.config.out_channels if unet else 4
    unet = unet or UNet2DConditionModel(**{**SMALLEST_UNET, "in_channels": 2 * channels, "out_channels": channels})
    vae = vae or AutoencoderKL(**{**SMALLEST_VAE, "latent_channels": channels})
    return Generator(unet, vae, device=CPU, dtype=torch.float32)


def check_posenc(path: Path) -> None:
    """The table, and what comes of adding it in single and half precision."""
    data = np.load(path)
    n_tokens, d_model = data["table"].shape
    table = positional_encoding(n_tokens, d_model)
    assert absolute(table.numpy(), data["table"]) < 1e-5
    part = every(table.numpy()[None], data["x"][:1])
    assert absolute(data["x"] + part, data["y"]) < 1e-5
    half = data["x"][: len(data["y_half"])].astype(np.float16) + part.astype(np.float16)
    # One unit in the last place at these magnitudes, where the order of rounding differs.
    assert absolute(half.astype(np.float32), data["y_half"].astype(np.float32)) <= 2e-3


def check_unet(path: Path) -> None:
    """One pass of the UNet with positions added to the tokens."""
    data = np.load(path)
    unet = UNet2DConditionModel(**json.loads(str(data["config"])))
    check_keys(unet, path.with_name(f"{path.stem}.keys.json"))
    fill(unet, int(data["seed"]), float(data["gain"]))
    predicted = build(unet=unet).predict(torch.from_numpy(data["latents"]), torch.from_numpy(data["audio"]))
    assert relative(predicted.numpy(), data["pred"]) < 1e-4


def check_vae(path: Path) -> None:
    """Both views of a crop, their moments and latents, and the way back to a picture."""
    data = np.load(path)
    vae = AutoencoderKL(**json.loads(str(data["config"])))
    check_keys(vae, path.with_name(f"{path.stem}.keys.json"))
    fill(vae, int(data["seed"]), float(data["gain"]))
    generator = build(vae=vae)
    crops = data["image_bgr"][None]
    views, (mean, logvar) = generator.views(crops), generator.moments(crops)
    for index, view in enumerate(("masked", "ref")):
        if f"{view}_sub" in data:
            assert absolute(every(views[index, 0].numpy(), data[f"{view}_sub"]), data[f"{view}_sub"]) < 1e-6
        if f"mean_{view}" in data:
            assert relative(mean[index].numpy(), data[f"mean_{view}"]) < 1e-4
            assert relative(logvar[index].numpy(), data[f"logvar_{view}"]) < 1e-4
    if "latents_mode" in data:
        assert relative(generator.encode(crops).numpy(), data["latents_mode"]) < 1e-4
    if "latents_sampled" in data:
        noise = np.split(data["noise"], 2, axis=1)
        drawn = [mean[i].numpy() + np.exp(0.5 * logvar[i].numpy()) * noise[i] for i in range(2)]
        scaled = np.concatenate(drawn, axis=1) * vae.config.scaling_factor
        assert relative(scaled, data["latents_sampled"]) < 1e-4
    decoded = generator.decode(torch.from_numpy(data["z"]))
    raw = (decoded.numpy() - 0.5) * 2
    assert relative(every(raw, data["decoded_raw_sub"]), data["decoded_raw_sub"]) < 1e-4
    levels = to_bgr(decoded)
    assert absolute(every(levels, data["decoded_bgr"]), data["decoded_bgr"]) <= 1


def check_resize(path: Path) -> None:
    """Crops stretched to the network's size, and its pictures stretched back."""
    data = np.load(path)
    names = [name for name in data.files if name.startswith("src")]
    assert names
    for name in names:
        case = name.removeprefix("src")
        source, generated = data[name], data[f"gen{case}"]
        height, width = source.shape[:2]
        patch = crop_patch(source, Box(0, 0, width, height), data[f"lanczos{case}"].shape[0])
        assert absolute(patch, data[f"lanczos{case}"]) <= 1
        assert absolute(cv2.resize(generated, (width, height)), data[f"bilinear{case}"]) <= 1
