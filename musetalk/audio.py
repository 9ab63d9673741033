"""Sound to what the UNet listens to: waveform -> Whisper states -> one window per output frame.

Specified in docs/model.md#audio-features and docs/model.md#audio-windows. Knows nothing of files but the model's own
folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from musetalk import weights
from musetalk.batches import Batches
from musetalk.devices import sent
from musetalk.errors import MediaError, ProcessingError, WeightsError

SAMPLE_RATE = 16_000
FEATURE_RATE = 50  # Whisper states per second
SAMPLES_PER_FEATURE = SAMPLE_RATE // FEATURE_RATE
CONTEXT_LEFT = 4  # rows before the frame's own two
WINDOW_ROWS = 10  # 2 * (2 + 2 + 1)
# Sound longer than one window (Whisper's 30 s) is encoded in windows that share a fifth with the next one. Each gives
# up half of that: every state is computed with at least 3 s of sound on either side (upstream has none at its joints).
OVERLAP_DIVISOR = 5
# Windows in one pass of the encoder.
ENCODER_BATCH = 4


def n_output_frames(n_samples: int, rate: Fraction) -> int:
    """Output frames for `n_samples` at 16 kHz: the picture never ends before the sound (docs/model.md#audio-windows).

    Raises MediaError when there is no sound.
    """
    if n_samples <= 0:
        raise MediaError("the audio contains no sound")
    return max(1, math.ceil(Fraction(n_samples, SAMPLE_RATE) * rate))


def n_feature_rows(n_samples: int) -> int:
    """Whisper states that belong to `n_samples`: one for each whole 20 ms, at least one (docs/model.md#feature-rows).

    In upstream's floating-point arithmetic: at some lengths it rounds to one row less, 0.58 s is the first.
    """
    return max(1, _upstream_feature_rows(n_samples))


def _upstream_feature_rows(n_samples: int) -> int:
    return math.floor(n_samples / SAMPLE_RATE * FEATURE_RATE)


def window_start(index: int, rate: Fraction) -> int:
    """First feature row of output frame `index` (may be negative): four rows before the frame's own time.

    Exact for any rate, and upstream's at every whole rate from 25 to 49 (docs/model.md#windows-of-the-original). Where
    the time is a whole row, upstream's floating-point product may fall just below it and start one row earlier; that
    happens at 29 and 31 frames a second, first after 5 s.
    """
    return math.floor(index * FEATURE_RATE / rate) - CONTEXT_LEFT


def audio_windows(features: Tensor, first: int, count: int, rate: Fraction) -> Tensor:
    """Windows of output frames `first` .. `first + count - 1`: (T, layers, d) -> (count, 10 * layers, d).

    Time-major: token = layers * row + layer. Rows before the start and after the end of the sound are zero.
    """
    return windows_of(features, range(first, first + count), rate)


def windows_of(features: Tensor, indices: Sequence[int], rate: Fraction) -> Tensor:
    """`audio_windows` of the output frames `indices` alone, which need not follow each other."""
    starts = [window_start(index, rate) for index in indices]
    rows = np.asarray(starts)[:, None] + np.arange(WINDOW_ROWS)[None, :]
    return gather_windows(features, rows)


@torch.inference_mode()
def hushed(windows: Tensor, silent: Tensor, weights: NDArray[np.float64]) -> Tensor:
    """Blend windows (n, tokens, d) with the silent one (1, tokens, d); `weights` (n,) is their own share, 0..1."""
    left = sent(torch.from_numpy(weights), windows.device).to(windows.dtype)[:, None, None]
    return windows * left + silent * (1 - left)


@torch.inference_mode()
def gather_windows(features: Tensor, rows: NDArray[np.integer[Any]]) -> Tensor:
    """Feature rows by index: (T, layers, d) and (count, w) -> (count, w * layers, d); rows outside 0..T-1 are zero.

    Waits for nothing that the device computes.
    """
    n_rows, n_layers, d_model = features.shape
    inside = np.where((rows < 0) | (rows >= n_rows), -1, rows).astype(np.int64)
    index = sent(torch.from_numpy(inside), features.device)
    windows = features[index.clamp(min=0)].masked_fill((index < 0)[:, :, None, None], 0)
    return windows.reshape(rows.shape[0], rows.shape[1] * n_layers, d_model)


def upstream_window_rows(n_samples: int, fps: float, pad_left: int = 2, pad_right: int = 2) -> NDArray[np.int64]:
    """The rows upstream reads for each frame, (T, 2 * (left + right + 1)), -1 for a zero row.

    Specified in docs/model.md#windows-of-the-original. For comparison only: it truncates fps, shifts its left context
    with it and gives out at 50 fps. Raises ValueError where upstream exits or raises.
    """
    whole_fps = int(fps)
    n_features = _upstream_feature_rows(n_samples)
    n_frames = math.floor(n_samples / SAMPLE_RATE * whole_fps)
    if n_frames < 1:
        raise ValueError("the sound is shorter than one frame")
    per_frame = FEATURE_RATE / whole_fps
    step = math.ceil(per_frame)
    n_before, n_after, width = step * pad_left, step * 3 * pad_right, 2 * (pad_left + pad_right + 1)
    starts = np.array([math.floor(index * per_frame) for index in range(n_frames)])
    padded = starts[:, None] + np.arange(width)[None, :]
    if padded.max() >= n_before + n_features + n_after:
        raise ValueError(f"upstream runs out of rows at {fps} fps")
    rows = padded - n_before
    return np.where((rows >= 0) & (rows < n_features), rows, -1)


class AudioEncoder:
    """Whisper's encoder with all its states; of any size, as its configuration says. For one thread at a time."""

    def __init__(
        self, encoder: WhisperEncoder, extractor: WhisperFeatureExtractor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._encoder = encoder.to(device=device, dtype=dtype).eval()
        self._extractor = extractor
        self._device, self._dtype = device, dtype
        config = encoder.config
        if extractor.feature_size != config.num_mel_bins:
            raise WeightsError(
                f"Whisper's spectrogram has {extractor.feature_size} bins by its preprocessor configuration, "
                f"{config.num_mel_bins} by that of its encoder"
            )
        self.d_model = int(config.d_model)
        self.n_layers = int(config.encoder_layers) + 1
        self._n_positions = int(config.max_source_positions)
        self._silent: Tensor | None = None

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> AudioEncoder:
        """Read `config.json`, the weights and, where present, `preprocessor_config.json` from `folder`.

        The file may contain the whole Whisper model (`model.encoder.*`) or only the encoder. Raises WeightsError.
        """
        raw = weights.read_config(folder / "config.json")
        with weights.loading("whisper/config.json"):
            encoder = WhisperEncoder(WhisperConfig(**{key: raw[key] for key in raw if key != "torch_dtype"}))
        path = weights.find_weights(folder, ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin"))
        weights.load_strictly(encoder, _encoder_state(weights.read_state(path), path.name), f"whisper/{path.name}")
        return cls(encoder, _read_extractor(folder, encoder.config.num_mel_bins), device, dtype)

    @property
    def window_samples(self) -> int:
        """Samples the encoder takes in one pass: 480,000 (30 s) for Whisper."""
        return self._n_positions * SAMPLES_PER_FEATURE

    def mel(self, waveform: NDArray[np.float32]) -> Tensor:
        """Log-mel spectrogram of at most one window of sound, zero-padded to it: (n,) -> (bins, 2 * positions)."""
        extracted = self._extractor(
            waveform, sampling_rate=SAMPLE_RATE, padding="max_length", max_length=self.window_samples
        )
        return torch.from_numpy(np.asarray(extracted["input_features"][0], dtype=np.float32))

    @torch.inference_mode()
    def states(self, mels: Tensor) -> Tensor:
        """All states of the encoder: (n, bins, 2 * positions) -> (n, positions, layers + 1, d_model).

        The last state follows the final layer norm, the first is the convolutions' output plus positions.
        """
        output = self._encoder(mels.to(self._device, self._dtype), output_hidden_states=True)
        states = list(output.hidden_states)
        # Older and newer releases differ in whether the last entry went through the final norm; this one did.
        states[-1] = output.last_hidden_state
        return torch.stack(states, dim=2)

    @torch.inference_mode()
    def features(
        self, waveform: NDArray[np.float32], *, overlap_s: float | None = None, batch_size: int = ENCODER_BATCH
    ) -> Tensor:
        """Feature rows of a whole waveform, 50 per second: (n,) at 16 kHz -> (T, layers + 1, d_model).

        Sound of at most one window is encoded as upstream does it. Longer sound is cut into windows that overlap by
        `overlap_s` (a fifth of the window unless given; 0 gives upstream's pieces), `batch_size` of them in one pass.
        Raises MediaError when there is no sound, ProcessingError when the states are not finite, OutOfMemoryError.
        """
        if waveform.ndim != 1:
            raise ValueError(f"the waveform must have one channel, not the shape {waveform.shape}")
        if len(waveform) == 0:
            raise MediaError("the audio contains no sound")
        n_rows = n_feature_rows(len(waveform))
        overlap = self._n_positions // OVERLAP_DIVISOR if overlap_s is None else round(overlap_s * FEATURE_RATE)
        starts = window_starts(n_rows, self._n_positions, overlap)
        bounds = kept_bounds(starts, n_rows, self._n_positions)
        features = torch.empty((n_rows, self.n_layers, self.d_model), device=self._device, dtype=self._dtype)

        def encode(part: slice) -> None:
            mels = [self.mel(waveform[start * SAMPLES_PER_FEATURE :][: self.window_samples]) for start in starts[part]]
            for number, states in enumerate(self.states(torch.stack(mels)), start=part.start):
                begin, end = bounds[number], bounds[number + 1]
                features[begin:end] = states[begin - starts[number] : end - starts[number]]

        Batches(batch_size).run(encode, len(starts))
        if not bool(torch.isfinite(features).all()):
            raise ProcessingError("Whisper gave values that are not finite", retryable=False)
        return features

    def silent_window(self) -> Tensor:
        """The window of a frame in the midst of digital silence, (1, 10 * layers, d); computed once.

        One and the same for all frames: a mouth that is to keep still must not follow positions in the encoder's pass.
        """
        if self._silent is None:
            features = self.features(np.zeros(self.window_samples, np.float32))
            rows = np.arange(WINDOW_ROWS)[None, :] + len(features) // 2 - CONTEXT_LEFT
            self._silent = gather_windows(features, rows)
        return self._silent


def window_starts(n_rows: int, n_positions: int, overlap: int) -> list[int]:
    """First rows of the encoder's windows over `n_rows` rows; consecutive ones share at least `overlap` rows.

    With overlap the last window is moved back to end with the sound, so that it never has only a few rows.
    """
    if n_rows <= n_positions:
        return [0]
    hop = n_positions - overlap
    if hop <= 0:
        raise ValueError(f"an overlap of {overlap} rows leaves nothing of windows of {n_positions}")
    starts = list(range(0, n_rows - overlap, hop))
    if overlap:
        starts[-1] = min(starts[-1], n_rows - n_positions)
    return starts


def kept_bounds(starts: Sequence[int], n_rows: int, n_positions: int) -> list[int]:
    """Bounds between windows: window k gives rows bounds[k] .. bounds[k + 1] - 1.

    Each bound is the middle of the overlap; the first window keeps its start and the last its end.
    """
    joints = [(before + n_positions + after) // 2 for before, after in pairwise(starts)]
    return [0, *joints, n_rows]


def _encoder_state(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The encoder's tensors of a full or an encoder-only checkpoint, without their prefix."""
    for prefix in ("model.encoder.", "encoder."):
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if found:
            return found
    raise WeightsError(f"{name} contains no Whisper encoder (no key starts with model.encoder. or encoder.)", file=name)


def _read_extractor(folder: Path, n_bins: int) -> WhisperFeatureExtractor:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return WhisperFeatureExtractor(feature_size=n_bins)
    raw = weights.read_config(path)
    rate, hop = raw.get("sampling_rate", SAMPLE_RATE), raw.get("hop_length", SAMPLES_PER_FEATURE // 2)
    if (rate, hop) != (SAMPLE_RATE, SAMPLES_PER_FEATURE // 2):
        raise WeightsError("whisper/preprocessor_config.json is not for 16 kHz and 100 frames a second")
    # The file may contain the mel filters; they follow from the sizes, so only the sizes are read.
    names = ("feature_size", "chunk_length", "n_fft", "padding_value")
    sizes = {"feature_size": n_bins, **{name: raw[name] for name in names if name in raw}}
    with weights.loading("whisper/preprocessor_config.json"):
        return WhisperFeatureExtractor(**sizes)
