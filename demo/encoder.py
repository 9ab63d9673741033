"""Stage `encoder`: a small Whisper encoder that learns to hear mouth shapes, with a head that is thrown away later.

Sound is kept as mel power (80 bins at 100 Hz, Whisper's own filters) and spoiled there: noise, rooms, filters, babble,
silence. Five-second pieces at 50 states a second are the encoder's window here, where Whisper's is thirty seconds.
"""

from __future__ import annotations

from demo import arguments

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and mistyped arguments are answered at once.
    arguments.none("encoder", __doc__)

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.audio_utils import spectrogram, window_function
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from demo import speech, visemes
from demo.stages import BUILD, random_of, train

SEED = 11
WINDOW_S = 5
POSITIONS = WINDOW_S * visemes.RATE
CONFIG: dict[str, Any] = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": 96,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 256,
    "num_mel_bins": 80,
    "max_source_positions": POSITIONS,
    "torch_dtype": "float16",
}
EXTRACTOR: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 80,
    "sampling_rate": speech.RATE,
    "hop_length": 160,
    "chunk_length": WINDOW_S,
    "n_fft": 400,
    "padding_value": 0.0,
}
CLIP_S = 30.0
N_CLIPS, N_HELD_OUT = 320, 24
BATCH = 16
# What the head's error counts for each viseme: the opening is what one sees.
IMPORTANCE = (3.0, 1.5, 1.0, 1.0, 0.7)

FloatArray = NDArray[np.float32]


def mel_power(waveform: FloatArray) -> FloatArray:
    """Sound at 16 kHz (n,) -> mel power (n // 160, 80), before any logarithm."""
    extractor = WhisperFeatureExtractor(**{key: value for key, value in EXTRACTOR.items() if "type" not in key})
    power = spectrogram(
        waveform,
        window_function(400, "hann"),
        frame_length=400,
        hop_length=160,
        power=2.0,
        mel_filters=extractor.mel_filters,
    )
    rows: FloatArray = power[:, :-1].T.astype(np.float32)
    return rows


def whisper_input(power: Tensor) -> Tensor:
    """Mel power (n, frames, 80) -> what Whisper's extractor gives, (n, 80, frames)."""
    log = power.clamp(min=1e-10).log10()
    log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0)
    return ((log + 4.0) / 4.0).transpose(1, 2)


def _make_clip(number: int) -> tuple[FloatArray, FloatArray]:
    made = speech.clip(random_of(SEED, number), CLIP_S)
    return mel_power(made.waveform), visemes.track(made.phones, CLIP_S)


def corpus() -> tuple[FloatArray, FloatArray]:
    """Mel power (clips, 3000, 80) and mouths (clips, 1500, 5); the last N_HELD_OUT clips are not trained on."""
    path = BUILD / "speech.npz"
    if not path.is_file():
        BUILD.mkdir(exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            made = pool.map(_make_clip, range(N_CLIPS + N_HELD_OUT), chunksize=8)
        # The logarithm in half precision keeps the order of the power to five digits.
        logs = np.stack([np.log10(np.maximum(power, 1e-10)) for power, _ in made]).astype(np.float16)
        np.savez(path, logs=logs, mouths=np.stack([mouth for _, mouth in made]))
    with np.load(path) as data:
        return np.power(10.0, data["logs"].astype(np.float32)), data["mouths"]


class Listener(nn.Module):
    """The encoder with its throw-away head: mel input (n, 80, 500) -> mouths (n, 250, 5)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.encoder = WhisperEncoder(WhisperConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"}))
        self.head = nn.Linear(CONFIG["d_model"], len(visemes.NAMES))

    def forward(self, mel: Tensor) -> Tensor:
        """The head's reading of the last state."""
        return torch.as_tensor(self.head(self.encoder(mel).last_hidden_state))


def spoil(power: FloatArray, others: FloatArray, random: np.random.Generator) -> FloatArray:
    """One piece of mel power (500, 80), as another microphone, room and street would have it."""
    piece = power * 10 ** random.uniform(-1.5, 1.0)
    if random.random() < 0.4:  # a room: every frame rings on
        decay = np.exp(-1 / (100 * random.uniform(0.03, 0.25)))
        ringing = np.zeros_like(piece)
        level = np.zeros(piece.shape[1], np.float32)
        for index, row in enumerate(piece):
            level = level * decay + row
            ringing[index] = level
        piece = piece + ringing * (1 - decay) * random.uniform(0.1, 0.8)
    if random.random() < 0.7:  # a microphone: a smooth gain over the bins
        knots = random.normal(0, 5, 7)
        gain = np.interp(np.linspace(0, 6, piece.shape[1]), np.arange(7), knots)
        piece = piece * 10 ** (gain / 10)
    loudness = float(np.sqrt((piece.sum(axis=1) ** 2).mean())) / piece.shape[1] + 1e-12
    if random.random() < 0.3:
        piece = piece + others * (loudness * piece.shape[1] / (others.sum(axis=1).mean() + 1e-9)) * 10 ** (
            -random.uniform(8, 25) / 10
        )
    if random.random() < 0.8:  # noise with a colour of its own
        colour = 10 ** (np.interp(np.linspace(0, 4, piece.shape[1]), np.arange(5), random.normal(0, 4, 5)) / 10)
        noise = random.gamma(2.0, 0.5, piece.shape) * colour
        piece = piece + noise * loudness * 10 ** (-random.uniform(5, 45) / 10)
    if random.random() < 0.2:  # a telephone
        low, high = int(random.integers(0, 10)), int(random.integers(50, 80))
        piece[:, :low] *= 1e-4
        piece[:, high:] *= 1e-4
    return piece.astype(np.float32)


def batch(power: FloatArray, mouths: FloatArray, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Spoiled pieces and what the mouth does in them; where the sound is muted the mouth is shut."""
    pieces, targets = [], []
    for _ in range(BATCH):
        clip, other = random.integers(0, len(power) - N_HELD_OUT, 2)
        row = int(random.integers(0, mouths.shape[1] - POSITIONS))
        piece = spoil(
            power[clip, 2 * row : 2 * (row + POSITIONS)],
            power[other, 2 * row : 2 * (row + POSITIONS)],
            random,
        )
        target = mouths[clip, row : row + POSITIONS].copy()
        if random.random() < 0.25:
            begin, length = int(random.integers(0, POSITIONS)), int(random.integers(10, POSITIONS))
            floor = 10 ** random.uniform(-12, -7)
            piece[2 * begin : 2 * (begin + length)] = floor
            target[begin : begin + length] = 0
        if random.random() < 0.04:
            piece[:] = 10 ** random.uniform(-12, -6) * random.gamma(2.0, 0.5, piece.shape)
            target[:] = 0
        pieces.append(piece)
        targets.append(target)
    return whisper_input(torch.from_numpy(np.stack(pieces))), torch.from_numpy(np.stack(targets))


@torch.inference_mode()
def listen(listener: Listener, power: FloatArray) -> FloatArray:
    """The head's mouths over whole clips, in windows that do not overlap: (clips, 2 n, 80) -> (clips, n, 5)."""
    n_windows = power.shape[1] // (2 * POSITIONS)
    pieces = power[:, : n_windows * 2 * POSITIONS].reshape(-1, 2 * POSITIONS, power.shape[2])
    parts = [listener(whisper_input(torch.from_numpy(pieces[i : i + 32]))).numpy() for i in range(0, len(pieces), 32)]
    read: FloatArray = np.concatenate(parts).reshape(len(power), n_windows * POSITIONS, len(visemes.NAMES))
    return read


def run(n_steps: int = 4000) -> Listener:
    """Train, or resume training; return the network."""
    power, mouths = corpus()
    listener = Listener()
    importance = torch.tensor(IMPORTANCE)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        mel, wanted = batch(power, mouths, random_of(SEED + 1, step))
        error = ((listener(mel) - wanted) ** 2 * importance).mean()
        return error, {"loss": error.item()}

    def check(_step: int) -> dict[str, float]:
        read = listen(listener, power[-N_HELD_OUT:])
        true = mouths[-N_HELD_OUT:, : read.shape[1]]
        return {
            name: round(float(np.corrcoef(read[..., index].ravel(), true[..., index].ravel())[0, 1]), 3)
            for index, name in enumerate(visemes.NAMES)
        }

    train("encoder", listener, loss_of, n_steps=n_steps, peak_rate=3e-3, on_check=check, average=0.998)
    return listener


def save_trained(listener: Listener, path: Path) -> None:
    """Keep the averaged weights."""
    torch.save(listener.state_dict(), path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_trained(run(), BUILD / "listener.pt")
