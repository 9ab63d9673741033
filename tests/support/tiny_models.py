"""Small seeded networks in the official file layout, so that the whole path runs without any download.

The pictures they draw are noise; sizes, keys, file formats and the way through the code are the real ones.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from musetalk.networks.bisenet import BiseNet
from musetalk.networks.rtmpose import RtmPose
from musetalk.networks.s3fd import S3fd
from tests.support.seeded import GAIN_CONV, seeded_state

D_MODEL = 32
UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0.dev0",
    "sample_size": 64,
    "in_channels": 8,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 4,
    "norm_eps": 1e-05,
    "cross_attention_dim": D_MODEL,
    "attention_head_dim": 4,
}
VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [4, 4, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 256,
}
WHISPER_CONFIG: dict[str, Any] = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": D_MODEL,
    "encoder_layers": 4,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "torch_dtype": "float32",
}
EXTRACTOR_CONFIG: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 80,
    "sampling_rate": 16000,
    "hop_length": 160,
    "chunk_length": 30,
    "n_fft": 400,
    "padding_value": 0.0,
}
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def write_tiny_models(
    models_dir: Path, version: str = "v15", *, seed: int = 0, as_safetensors: bool = False, crop_px: int = 256
) -> Path:
    """Write all files of `version` under `models_dir` and return it; `as_safetensors` writes the converted forms.

    A smaller `crop_px` than MuseTalk's makes long runs affordable.
    """
    folder = "musetalkV15" if version == "v15" else "musetalk"
    unet = UNet2DConditionModel(**{key: value for key, value in UNET_CONFIG.items() if key[0] != "_"})
    name = "unet.pth" if version == "v15" else "pytorch_model.bin"
    _save(models_dir / folder / name, seeded_state(unet, seed), as_safetensors)
    _write_json(models_dir / folder / "musetalk.json", UNET_CONFIG)

    vae = AutoencoderKL(**{key: value for key, value in VAE_CONFIG.items() if key[0] != "_"})
    vae_state = seeded_state(vae, seed + 1)
    _save(models_dir / "sd-vae/diffusion_pytorch_model.bin", old_vae_keys(vae_state), as_safetensors)
    _write_json(models_dir / "sd-vae/config.json", {**VAE_CONFIG, "sample_size": crop_px})

    encoder = WhisperEncoder(WhisperConfig(**{k: v for k, v in WHISPER_CONFIG.items() if k != "torch_dtype"}))
    whisper = {f"model.encoder.{key}": value for key, value in seeded_state(encoder, seed + 2).items()}
    whisper["model.decoder.layer_norm.weight"] = torch.ones(D_MODEL)
    _save(models_dir / "whisper/pytorch_model.bin", whisper, as_safetensors)
    _write_json(models_dir / "whisper/config.json", WHISPER_CONFIG)
    _write_json(models_dir / "whisper/preprocessor_config.json", EXTRACTOR_CONFIG)

    pose = seeded_state(RtmPose(widen=1 / 16), seed + 3, GAIN_CONV)
    _save(models_dir / "dwpose/dw-ll_ucoco_384.pth", pose, as_safetensors, wrapped=True)
    _save(models_dir / "face-parse-bisent/79999_iter.pth", _parser_state(seed + 4), as_safetensors)
    _save(models_dir / "s3fd-619a316812.pth", seeded_state(S3fd(2), seed + 5, GAIN_CONV), as_safetensors)
    return models_dir


def _parser_state(seed: int) -> dict[str, Tensor]:
    """A parser that sees skin everywhere, so that the mask is the whole lower half of the crop."""
    state = seeded_state(BiseNet(4), seed, GAIN_CONV)
    # The last layer reads values that are positive with this bias, so that one positive row wins everywhere.
    state["conv_out.conv.bn.bias"] = torch.full_like(state["conv_out.conv.bn.bias"], 3.0)
    last = state["conv_out.conv_out.weight"].abs()
    state["conv_out.conv_out.weight"] = torch.where(torch.arange(len(last))[:, None, None, None] == 1, last, -last)
    return state


def old_vae_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VAE tensors under the attention names of the official checkpoint's time."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        old = key
        if ".attentions." in key:
            for new_name, old_name in _OLD_NAMES.items():
                old = old.replace(f".{new_name}.", f".{old_name}.")
        renamed[old] = value
    return renamed


class HistoryBuffer:
    """Stands for the objects of a training library that a checkpoint drags along; loading must not need it."""

    def __init__(self) -> None:
        self.values = [1.0]


def _save(path: Path, state: Mapping[str, Tensor], as_safetensors: bool, *, wrapped: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.contiguous() for key, value in state.items()}
    if as_safetensors:
        save_file(contiguous, path.with_suffix(".safetensors"))
    elif wrapped:
        import numpy as np

        meta = {
            "epoch": 1,
            "dataset_meta": {"sigmas": np.ones(3, np.float32), "names": OrderedDict(a=1)},
            "hooks": HistoryBuffer(),
            "scalar": np.float64(0.5),
        }
        moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
        torch.save({"meta": meta, "state_dict": contiguous, "optimizer": moments}, path)
    else:
        torch.save(contiguous, path)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
