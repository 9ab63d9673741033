"""Log-mel, Whisper's states and the windows of output frames."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from musetalk import audio
from tests.golden.compare import absolute, every
from tests.support.seeded import seeded_tensor

CPU = torch.device("cpu")
WHISPER_TINY = {
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}


@lru_cache(maxsize=2)
def whisper(seed: int, config: str = json.dumps(WHISPER_TINY)) -> audio.AudioEncoder:
    """An encoder with the weights of the recipe; keys as in the full model, `encoder.` in front."""
    encoder = WhisperEncoder(WhisperConfig(**json.loads(config)))
    state = {
        key: seeded_tensor(f"encoder.{key}", tuple(value.shape), seed, 1.0)
        for key, value in encoder.state_dict().items()
    }
    encoder.load_state_dict(state)
    extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    return audio.AudioEncoder(encoder, extractor, CPU, torch.float32)


def waveform_of(pcm: NDArray[Any]) -> NDArray[Any]:
    """16-bit samples as float32."""
    waveform: NDArray[Any] = pcm.astype(np.float32) / np.float32(32768)
    return waveform


def check_whisper(path: Path) -> None:
    """Spectrogram and states of the last piece, and the windows of some frames at several rates."""
    data = np.load(path)
    encoder, waveform = whisper(int(data["seed"])), waveform_of(data["pcm"])
    pieces = [waveform[start : start + 480_000] for start in range(0, len(waveform), 480_000)]
    assert len(pieces) == int(data["nseg"])
    mels = {"mel_first": encoder.mel(pieces[0]), "mel_last": encoder.mel(pieces[-1])}
    for name, mel in mels.items():
        assert absolute(every(mel.numpy(), data[name]), data[name]) < 1e-4
    assert absolute(mels["mel_first"][:, : data["mel_head"].shape[1]].numpy(), data["mel_head"]) < 1e-4
    states = encoder.states(mels["mel_last"][None])[0].numpy()
    assert absolute(states[[0, 1, 7, 60, 700, 1499]], data["hidden_last_seg"]) < 2e-3
    # Upstream's pieces share no sound.
    features = encoder.features(waveform, overlap_s=0)
    for name in (name for name in data.files if name.startswith("chunks_")):
        rate = name.removeprefix("chunks_")
        rows = audio.upstream_window_rows(len(waveform), float(rate))
        assert len(rows) == int(data[f"T_{rate}"])
        windows = audio.gather_windows(features, rows[data[f"idx_{rate}"]])
        assert absolute(every(windows.numpy(), data[name]), data[name]) < 2e-3
        if is_production_rate(float(rate)):
            # Here our own windows must be the same.
            for position, index in enumerate(data[f"idx_{rate}"].tolist()):
                ours = audio.audio_windows(features, index, 1, Fraction(rate))
                assert torch.equal(ours[0], windows[position]) or starts_early(index, int(float(rate)))


def is_production_rate(fps: float) -> bool:
    """Whether upstream's windows are ours at this rate (docs/model.md#windows-of-the-original)."""
    return float(fps).is_integer() and 25 <= fps <= 49


def starts_early(index: int, fps: int) -> bool:
    """Whether upstream's product of floats falls just below the whole row where this frame's window begins."""
    return math.floor(index * (50 / fps)) != index * 50 // fps


def check_audio_windows(path: Path) -> None:
    """The feature rows of every frame, for each case of length, rate and padding."""
    data = np.load(path)
    for number, (n_samples, fps, left, right, n_frames) in enumerate(data["cases"].tolist()):
        arguments = int(n_samples), fps, int(left), int(right)
        if n_frames < 0:
            # Upstream leaves the process or raises; ours goes on, but the copy of its rule says so.
            refused = False
            try:
                audio.upstream_window_rows(*arguments)
            except ValueError:
                refused = True
            assert refused, f"case {number}"
            continue
        rows = audio.upstream_window_rows(*arguments)
        wanted = data[f"win{number}"]
        assert len(rows) == int(n_frames)
        assert np.array_equal(rows, wanted), f"case {number}"
        if (left, right) == (2, 2) and is_production_rate(fps):
            assert_same_as_production(int(n_samples), int(fps), wanted)


def assert_same_as_production(n_samples: int, fps: int, wanted: NDArray[Any]) -> None:
    """Our windows at this rate read the same rows."""
    n_rows = audio.n_feature_rows(n_samples)
    # Features that carry their own index, from 1: zero stays free for the rows outside.
    features = torch.arange(1, n_rows + 1, dtype=torch.float32)[:, None, None]
    ours = audio.audio_windows(features, 0, len(wanted), Fraction(fps))[:, :, 0].numpy().astype(np.int64) - 1
    early = np.array([starts_early(index, fps) for index in range(len(wanted))])
    assert np.array_equal(ours[~early], wanted[~early])
    # One row apart where the rounding differs: shifted by one row, the windows agree.
    assert np.array_equal(ours[early][:, :-1], wanted[early][:, 1:])
    assert audio.n_output_frames(n_samples, Fraction(fps)) in (len(wanted), len(wanted) + 1)
