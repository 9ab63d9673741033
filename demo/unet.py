"""Stage `unet`: source latents and audio tokens -> the latents of a face that says it; MuseTalk's task, small.

Distilled, not regressed: a drawn mouth is paired with windows of sound whose mouths, as the trained encoder hears them
and with their spread given back, are the nearest. So the target is a function of the input and nothing is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from demo import encoder as hearing
from demo import vae as seeing
from demo.pictures import CROP_PX, N_HELD_OUT_OTHERS, Pictures, pictures
from demo.stages import BUILD, random_of, train
from musetalk.audio import CONTEXT_LEFT, WINDOW_ROWS
from musetalk.generator import positional_encoding

SEED = 41
CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": CROP_PX // 8,
    "in_channels": 32,
    "out_channels": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [48, 96, 128],
    "layers_per_block": 1,
    "cross_attention_dim": hearing.CONFIG["d_model"],
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "norm_eps": 1e-5,
    "act_fn": "silu",
}
BATCH = 16
NEIGHBOURS = 12
# Found with the encoder's own ears these count by how much they are seen.
_VISIBLE = np.array([3.0, 1.6, 0.8, 0.9, 0.6], np.float32)

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Heard:
    """The encoder's output for the training speech: states (clips, n, layers, d), calibrated mouths (clips, n, 5)."""

    states: NDArray[np.float16]
    mouths: FloatArray


def load_listener() -> hearing.Listener:
    """The trained encoder with its head."""
    listener = hearing.Listener()
    listener.load_state_dict(torch.load(BUILD / "listener.pt", weights_only=True))
    seeing.freeze(listener)
    return listener


@torch.inference_mode()
def states_of(encoder: WhisperEncoder, mel: Tensor) -> Tensor:
    """All states as the worker takes them, (n, 80, 500) -> (n, 250, layers + 1, d)."""
    output = encoder(mel, output_hidden_states=True)
    states = list(output.hidden_states)
    states[-1] = output.last_hidden_state
    return torch.stack(states, dim=2)


def calibrate(read: FloatArray, true: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
    """For each viseme the quantiles of what was read and of what was true: a table that gives the spread back."""
    shares = np.linspace(0, 1, 201)
    return [
        (np.quantile(read[:, index], shares).astype(np.float32), np.quantile(true[:, index], shares).astype(np.float32))
        for index in range(read.shape[1])
    ]


def hear_everything(listener: hearing.Listener) -> Heard:
    """States and calibrated mouths of the training clips, some pieces spoiled as in training."""
    power, true = hearing.corpus()
    power, true = power[: -hearing.N_HELD_OUT], true[: -hearing.N_HELD_OUT]
    n_windows = power.shape[1] // (2 * hearing.POSITIONS)
    pieces = power.reshape(-1, 2 * hearing.POSITIONS, power.shape[2])
    random = random_of(SEED, 10**6)
    states, read = [], []
    for first in range(0, len(pieces), 32):
        chosen = pieces[first : first + 32].copy()
        for index in range(len(chosen)):
            if random.random() < 0.5:
                chosen[index] = hearing.spoil(chosen[index], pieces[random.integers(len(pieces))], random)
            if random.random() < 0.08:
                chosen[index] = 10 ** random.uniform(-12, -7) * random.gamma(2.0, 0.5, chosen[index].shape)
        heard = states_of(listener.encoder, hearing.whisper_input(torch.from_numpy(chosen)))
        states.append(heard.numpy().astype(np.float16))
        read.append(listener.head(heard[:, :, -1]).numpy())
    shape = (len(power), n_windows * hearing.POSITIONS)
    mouths = np.concatenate(read).reshape(-1, true.shape[-1])
    table = calibrate(mouths, true.reshape(-1, true.shape[-1]))
    for index, (given, wanted) in enumerate(table):
        mouths[:, index] = np.interp(mouths[:, index], given, wanted)
    all_states = np.concatenate(states)
    return Heard(all_states.reshape(*shape, *all_states.shape[2:]), mouths.reshape(*shape, -1))


def standardise(listener: hearing.Listener) -> None:
    """Fold mean and spread of the last state into the encoder's final norm, so that the tokens that matter are heard.

    Cross-attention has no norm of its own: a state with a quarter of the others' spread is ignored for long.
    """
    power, _ = hearing.corpus()
    pieces = power[:24].reshape(-1, 2 * hearing.POSITIONS, power.shape[2])
    with torch.inference_mode():
        last = states_of(listener.encoder, hearing.whisper_input(torch.from_numpy(pieces)))[:, :, -1].reshape(-1, 96)
        mean, spread = last.mean(0), last.std(0) + 1e-5
        norm = listener.encoder.layer_norm
        # The head reads the same as before.
        listener.head.bias.add_(listener.head.weight @ mean)
        listener.head.weight.mul_(spread)
        norm.weight.div_(spread)
        norm.bias.copy_((norm.bias - mean) / spread)


def window_tokens(states: NDArray[np.float16], middles: NDArray[np.int64]) -> Tensor:
    """Tokens of frames whose first own row is `middles`, as the worker gathers them: (n, 10 * layers, d)."""
    rows = middles[:, None] - CONTEXT_LEFT + np.arange(WINDOW_ROWS)
    inside = (rows >= 0) & (rows < len(states))
    tokens = states[np.clip(rows, 0, len(states) - 1)].astype(np.float32) * inside[:, :, None, None]
    return torch.from_numpy(tokens.reshape(len(middles), -1, states.shape[-1]))


class Pairs:
    """Drawn mouths and windows of sound that say them."""

    def __init__(self, heard: Heard) -> None:
        self._states = heard.states
        # A frame at 25 fps covers two rows.
        framed = (heard.mouths[:, :-1] + heard.mouths[:, 1:]) / 2
        self._n_rows = framed.shape[1]
        self._tree = cKDTree(framed.reshape(-1, framed.shape[-1]) * _VISIBLE)

    def tokens(self, mouths: FloatArray, random: np.random.Generator) -> Tensor:
        """One window for each mouth (n, 5), a random one of its nearest."""
        _, found = self._tree.query(mouths * _VISIBLE, k=NEIGHBOURS)
        picked = found[np.arange(len(mouths)), random.integers(0, NEIGHBOURS, len(mouths))]
        parts = [
            window_tokens(self._states[index // self._n_rows], np.array([index % self._n_rows])) for index in picked
        ]
        return torch.cat(parts)


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, crops: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Latents of all crops, whole and with the lower half black, half precision."""
    whole, masked = [], []
    for first in range(0, len(crops), 32):
        images = seeing.as_input(crops[first : first + 32])
        whole.append(vae.encode(images).latent_dist.mode().half())
        masked.append(vae.encode(seeing.black_half(images)).latent_dist.mode().half())
    return torch.cat(whole), torch.cat(masked)


def latent_importance(side: int) -> Tensor:
    """Weight of an error by place: the lower half, most of all the mouth."""
    return seeing.importance(side, side)[None, None] * 1.0


def new_unet() -> UNet2DConditionModel:
    """The network, drawn from its seed."""
    torch.manual_seed(SEED)
    return UNet2DConditionModel(**{key: value for key, value in CONFIG.items() if key[0] != "_"})


@dataclass(frozen=True)
class Material:
    """Everything a step draws from."""

    data: Pictures
    whole: Tensor
    masked: Tensor
    pairs: Pairs


def material(vae: AutoencoderKL, listener: hearing.Listener) -> Material:
    """Latents and sound, made once and kept."""
    data = pictures()
    path = BUILD / "latents.pt"
    if not path.is_file():
        whole, masked = encode_all(vae, data.crops)
        torch.save({"whole": whole, "masked": masked}, path)
    saved = torch.load(path, weights_only=True)
    return Material(data, saved["whole"], saved["masked"], Pairs(hear_everything(listener)))


def run(
    vae: AutoencoderKL, listener: hearing.Listener, n_steps: int, *, pixel_steps: int = 0, share_avatar: float = 0.8
) -> UNet2DConditionModel:
    """Train in the latents for `n_steps`, then `pixel_steps` more with the picture's own error through the decoder."""
    unet = new_unet()
    stuff = material(vae, listener)
    data = stuff.data
    spread = float(stuff.whole.float().std())
    targets = data.reference != np.arange(len(data.reference))
    avatar = np.flatnonzero(data.person < -1)
    others = np.flatnonzero(data.person >= N_HELD_OUT_OTHERS)
    held_out = np.flatnonzero((data.person == -1) & targets)[::7][:64]
    positions = positional_encoding(WINDOW_ROWS * (CONFIG_LAYERS + 1), hearing.CONFIG["d_model"])
    weight = latent_importance(CONFIG["sample_size"])
    pixel_weight = seeing.importance(CROP_PX, CROP_PX)[None, None]

    def predict(chosen: NDArray[np.int64], random: np.random.Generator) -> Tensor:
        reference = data.reference[chosen].copy()
        # Now and then the reference says something itself, as a talking source does.
        talking = random.random(len(chosen)) < 0.25
        offset = random.integers(0, 5, len(chosen))
        same = np.minimum(reference + offset, len(data.reference) - 1)
        swap = talking & (data.reference[same] == reference)
        reference[swap] = same[swap]
        latents = torch.cat([stuff.masked[reference], stuff.whole[reference]], dim=1).float()
        tokens = stuff.pairs.tokens(data.mouths[chosen], random) + positions
        return torch.as_tensor(unet(latents, torch.zeros((), dtype=torch.long), tokens, return_dict=False)[0])

    def choose(random: np.random.Generator) -> NDArray[np.int64]:
        n_avatar = round(BATCH * share_avatar)
        return np.concatenate([random.choice(avatar, n_avatar), random.choice(others, BATCH - n_avatar)])

    def latent_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random = random_of(SEED + 1, step)
        chosen = choose(random)
        error = (predict(chosen, random) - stuff.whole[chosen].float()) / spread
        loss = ((error.abs() + 0.5 * error**2) * weight).mean()
        return loss, {"loss": loss.item()}

    def pixel_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random = random_of(SEED + 2, step)
        chosen = choose(random)[:8]
        made = vae.decode(predict(chosen, random)).sample
        loss = seeing.reconstruction_loss(made, seeing.as_input(data.crops[chosen]), pixel_weight)
        return loss, {"loss": loss.item()}

    def check(_step: int) -> dict[str, float]:
        random = random_of(SEED + 3, 0)
        with torch.inference_mode():
            made = predict_closed(unet, stuff, held_out, positions, random)
            true = stuff.whole[held_out].float()
            copied = stuff.whole[data.reference[held_out]].float()
            weights = (weight > 2).float()
            scale = weights.sum() / weights.numel() * spread
            own = ((made - true).abs() * weights).mean() / scale
            lazy = ((copied - true).abs() * weights).mean() / scale
        return {"mouth": round(float(own), 4), "copying": round(float(lazy), 4)}

    train("unet", unet, latent_loss, n_steps=n_steps, peak_rate=1e-3, on_check=check, average=0.998)
    if pixel_steps:
        seeing.freeze(vae)
        train("unet-pixels", unet, pixel_loss, n_steps=pixel_steps, peak_rate=2e-4, on_check=check, average=0.99)
    return unet


CONFIG_LAYERS = int(hearing.CONFIG["encoder_layers"])


def predict_closed(
    unet: UNet2DConditionModel,
    stuff: Material,
    chosen: NDArray[np.int64],
    positions: Tensor,
    random: np.random.Generator,
) -> Tensor:
    """Predictions with the shut mouth as the reference."""
    reference = stuff.data.reference[chosen]
    latents = torch.cat([stuff.masked[reference], stuff.whole[reference]], dim=1).float()
    tokens = stuff.pairs.tokens(stuff.data.mouths[chosen], random) + positions
    return torch.as_tensor(unet(latents, torch.zeros((), dtype=torch.long), tokens, return_dict=False)[0])
