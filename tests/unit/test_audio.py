"""Waveform -> Whisper's states -> windows of output frames, on a tiny encoder with windows of one second."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from musetalk import audio
from musetalk.errors import MediaError, ProcessingError, WeightsError
from tests.support.seeded import fill

CPU = torch.device("cpu")
N_POSITIONS = 50
CONFIG: dict[str, Any] = {
    "d_model": 12,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 20,
    "decoder_layers": 1,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 20,
    "num_mel_bins": 20,
    "max_source_positions": N_POSITIONS,
    "max_target_positions": 16,
    "vocab_size": 60,
    "pad_token_id": 50,
    "bos_token_id": 51,
    "eos_token_id": 52,
    "decoder_start_token_id": 53,
}
rates = st.fractions(min_value=5, max_value=120, max_denominator=1001)


@pytest.fixture(scope="module")
def encoder() -> audio.AudioEncoder:
    network = fill(WhisperEncoder(WhisperConfig(**CONFIG)), seed=3)
    return audio.AudioEncoder(network, WhisperFeatureExtractor(feature_size=20), CPU, torch.float32)


def noise(n_samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Noise whose loudness wanders, so that windows differ in level."""
    random = np.random.default_rng(seed)
    loudness = 0.3 + 0.25 * np.sin(np.arange(n_samples) / 9000)
    samples: NDArray[np.float32] = (loudness * random.standard_normal(n_samples)).astype(np.float32)
    return samples


# -- how many frames, which rows --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 14_400_000), rates)
def test_the_picture_ends_with_the_sound_or_less_than_a_frame_later(n_samples: int, rate: Fraction) -> None:
    n_frames = audio.n_output_frames(n_samples, rate)
    duration = Fraction(n_samples, 16_000)
    assert (n_frames - 1) / rate < duration <= n_frames / rate


def test_ten_minutes_at_29_97_have_as_many_frames_as_they_last() -> None:
    assert audio.n_output_frames(600 * 16_000, Fraction(30_000, 1001)) == 17_983


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(32), Fraction(40), Fraction(24_000, 1001), Fraction(125, 3)])
def test_sound_of_a_whole_number_of_frames_gets_exactly_these(rate: Fraction) -> None:
    # Every so many frames last a whole number of samples.
    step = (Fraction(16_000) / rate).denominator
    for n_frames in range(step, 15_000, step):
        n_samples = n_frames * 16_000 / rate
        assert n_samples.denominator == 1
        assert audio.n_output_frames(int(n_samples), rate) == n_frames
        assert audio.n_output_frames(int(n_samples) + 1, rate) == n_frames + 1


def test_a_sound_shorter_than_a_frame_gives_one_frame() -> None:
    assert audio.n_output_frames(1, Fraction(25)) == 1
    assert audio.n_feature_rows(1) == 1


@pytest.mark.parametrize("n_samples", [0, -1])
def test_no_sound_is_the_inputs_fault(n_samples: int) -> None:
    with pytest.raises(MediaError, match="no sound"):
        audio.n_output_frames(n_samples, Fraction(25))


@settings(deadline=None)
@given(st.integers(320, 14_400_000))
def test_a_feature_row_belongs_to_each_whole_20_ms(n_samples: int) -> None:
    # Upstream's rounding may lose the last one where the sound ends exactly with it.
    n_rows = audio.n_feature_rows(n_samples)
    assert n_rows == n_samples // 320 or (n_samples % 320 == 0 and n_rows == n_samples // 320 - 1)


def test_the_lengths_at_which_upstream_rounds_to_a_row_less_are_kept() -> None:
    less = [n_rows for n_rows in range(1, 200) if audio.n_feature_rows(n_rows * 320) == n_rows - 1]
    assert less[:3] == [29, 57, 58]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 100_000), rates)
def test_a_window_begins_four_rows_before_its_frame_at_any_rate(index: int, rate: Fraction) -> None:
    row = audio.window_start(index, rate) + 4
    # Row j stands for j / 50 s: it is the last one that has begun when the frame is shown.
    assert Fraction(row, 50) <= index / rate < Fraction(row + 1, 50)


@settings(deadline=None)
@given(st.integers(1, 70), rates, st.integers(0, 200), st.integers(0, 9))
def test_windows_equal_rows_taken_one_by_one(n_rows: int, rate: Fraction, first: int, count: int) -> None:
    features = torch.arange(1.0, 1 + n_rows * 2 * 3).reshape(n_rows, 2, 3)
    windows = audio.audio_windows(features, first, count, rate)
    assert windows.shape == (count, 20, 3)
    for frame in range(count):
        start = math.floor((first + frame) * 50 / rate) - 4
        for row in range(10):
            for layer in range(2):
                inside = 0 <= start + row < n_rows
                wanted = features[start + row, layer] if inside else torch.zeros(3)
                assert torch.equal(windows[frame, 2 * row + layer], wanted)


def test_windows_do_not_depend_on_where_a_chunk_begins() -> None:
    features, rate = torch.randn(90, 3, 4), Fraction(24_000, 1001)
    whole = audio.audio_windows(features, 0, 40, rate)
    parts = [audio.audio_windows(features, first, min(7, 40 - first), rate) for first in range(0, 40, 7)]
    assert torch.equal(torch.cat(parts), whole)


def test_rows_outside_are_zero_also_beside_broken_values() -> None:
    features = torch.full((1, 1, 2), torch.nan)
    windows = audio.audio_windows(features, 0, 1, Fraction(25))
    assert torch.isnan(windows[0, 4]).all()
    assert (windows[0, [0, 1, 2, 3, 5, 6, 7, 8, 9]] == 0).all()


@pytest.mark.parametrize("fps", range(25, 50))
def test_windows_are_upstreams_at_every_whole_rate_it_was_made_for(fps: int) -> None:
    n_samples = 20 * 16_000
    wanted = audio.upstream_window_rows(n_samples, fps)
    starts = np.array([audio.window_start(index, Fraction(fps)) for index in range(len(wanted))])
    ours = starts[:, None] + np.arange(10)
    ours[(ours < 0) | (ours >= audio.n_feature_rows(n_samples))] = -1
    # Upstream's product of floats falls just below a whole row here, so that it starts one row early.
    early = np.array([math.floor(index * (50 / fps)) < index * 50 // fps for index in range(len(wanted))])
    assert early.any() == (fps in (29, 31))
    assert np.array_equal(ours[~early], wanted[~early])
    assert np.array_equal(ours[early][:, :-1], wanted[early][:, 1:])


def slow_upstream_rows(n_samples: int, fps: float, left: int, right: int) -> list[list[int]]:
    """The rule of docs/model.md#windows-of-the-original, on lists that are really padded and really cut."""
    whole = int(fps)
    n_rows, n_frames = math.floor(n_samples / 16_000 * 50), math.floor(n_samples / 16_000 * whole)
    step = math.ceil(50 / whole)
    padded = [-1] * (step * left) + list(range(n_rows)) + [-1] * (step * 3 * right)
    width = 2 * (left + right + 1)
    windows = []
    for index in range(n_frames):
        begin = math.floor(index * (50 / whole))
        windows.append(padded[begin : begin + width])
    if not windows or len(windows[-1]) < width:
        raise ValueError("upstream gives up")
    return windows


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 200_000), st.floats(1, 120), st.integers(0, 3), st.integers(0, 3))
def test_upstreams_rule_equals_padding_and_cutting(n_samples: int, fps: float, left: int, right: int) -> None:
    try:
        wanted = slow_upstream_rows(n_samples, fps, left, right)
    except ValueError:
        with pytest.raises(ValueError, match=r"shorter than one frame|runs out of rows"):
            audio.upstream_window_rows(n_samples, fps, left, right)
    else:
        assert audio.upstream_window_rows(n_samples, fps, left, right).tolist() == wanted


# -- spectrogram and states -------------------------------------------------------------------------------------------


def slow_log_mel(waveform: NDArray[np.float32], n_samples: int, n_bins: int) -> NDArray[np.float64]:
    """The spectrogram of docs/model.md#log-mel-spectrogram in plain NumPy."""
    padded: NDArray[np.float64] = np.zeros(n_samples)
    padded[: len(waveform)] = waveform
    padded = np.pad(padded, 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([padded[start : start + 400] * window for start in range(0, n_samples, 160)])
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2

    def to_mel(hertz: float) -> float:
        return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) * 27 / math.log(6.4)

    def to_hertz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp(math.log(6.4) / 27 * (mel - 15))

    edges = [to_hertz(mel) for mel in np.linspace(0, to_mel(8000), n_bins + 2)]
    hertz = np.arange(201) * 40.0
    bins = []
    for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
        slope = np.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre))
        bins.append(power @ np.maximum(slope, 0) * 2 / (high - low))
    levels = np.log10(np.maximum(np.stack(bins), 1e-10))
    result: NDArray[np.float64] = (np.maximum(levels, levels.max() - 8) + 4) / 4
    return result


@pytest.mark.parametrize("n_samples", [1, 5_000, 16_000])
def test_the_spectrogram_equals_its_definition(encoder: audio.AudioEncoder, n_samples: int) -> None:
    waveform = noise(n_samples)
    mel = encoder.mel(waveform)
    assert mel.shape == (20, 2 * N_POSITIONS)
    assert np.abs(mel.numpy() - slow_log_mel(waveform, 16_000, 20)).max() < 1e-4


def test_silence_is_encoded_like_any_sound(encoder: audio.AudioEncoder) -> None:
    features = encoder.features(np.zeros(8_000, np.float32))
    assert features.shape == (25, 3, 12)
    assert torch.isfinite(features).all()


def test_states_are_those_before_each_layer_and_after_the_final_norm(encoder: audio.AudioEncoder) -> None:
    mel = encoder.mel(noise(16_000))[None]
    network = encoder._encoder
    with torch.inference_mode():
        wanted = torch.nn.functional.gelu(network.conv1(mel))
        wanted = torch.nn.functional.gelu(network.conv2(wanted)).transpose(1, 2) + network.embed_positions.weight
        found = encoder.states(mel)
        assert torch.allclose(found[:, :, 0], wanted, atol=1e-6)
        for layer, module in enumerate(network.layers, start=1):
            # Releases of transformers before 5 wrap the layer's output in a tuple.
            wanted = module(wanted, None, layer_head_mask=None) if _takes_head_mask(module) else module(wanted, None)
            wanted = wanted[0] if isinstance(wanted, tuple) else wanted
            if layer == len(network.layers):
                wanted = network.layer_norm(wanted)
            assert torch.allclose(found[:, :, layer], wanted, atol=1e-5)


def _takes_head_mask(module: torch.nn.Module) -> bool:
    return "layer_head_mask" in module.forward.__code__.co_varnames


def test_sound_of_one_window_is_encoded_in_one_zero_padded_piece(encoder: audio.AudioEncoder) -> None:
    waveform = noise(12_345)
    wanted = encoder.states(encoder.mel(waveform)[None])[0, : 12_345 // 320]
    assert torch.equal(encoder.features(waveform), wanted)
    assert torch.equal(encoder.features(waveform, overlap_s=0), wanted)


def test_a_single_sample_gives_one_row(encoder: audio.AudioEncoder) -> None:
    assert encoder.features(noise(1)).shape == (1, 3, 12)


def test_without_overlap_pieces_are_encoded_one_after_the_other(encoder: audio.AudioEncoder) -> None:
    waveform = noise(40_000)
    pieces = [encoder.features(waveform[start : start + 16_000]) for start in range(0, 40_000, 16_000)]
    assert torch.allclose(encoder.features(waveform, overlap_s=0), torch.cat(pieces), atol=1e-5)


def test_each_row_of_long_sound_comes_from_the_window_it_lies_deepest_in(encoder: audio.AudioEncoder) -> None:
    waveform = noise(71_234)
    n_rows, overlap = 71_234 // 320, 10
    starts = audio.window_starts(n_rows, N_POSITIONS, overlap)
    alone = [encoder.states(encoder.mel(waveform[start * 320 :][:16_000])[None])[0] for start in starts]
    features = encoder.features(waveform)
    assert len(features) == n_rows
    for row in range(n_rows):

        def depth(start: int, row: int = row) -> float:
            # Distance of the row's middle from the nearer edge; the sound's own ends are no edges.
            before = math.inf if start == 0 else row - start
            after = math.inf if start == starts[-1] else start + N_POSITIONS - row - 1
            return min(before, after) if start <= row < start + N_POSITIONS else -1

        best = max(depth(start) for start in starts)
        assert best >= overlap // 2 - 1
        chosen = [number for number, start in enumerate(starts) if depth(start) == best]
        assert any(
            torch.allclose(features[row], alone[number][row - starts[number]], atol=1e-5) for number in chosen
        ), row


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5_000), st.integers(1, 300), st.data())
def test_windows_cover_long_sound_with_context_on_both_sides(
    n_rows: int, n_positions: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, n_positions - 1))
    starts = audio.window_starts(n_rows, n_positions, overlap)
    bounds = audio.kept_bounds(starts, n_rows, n_positions)
    assert starts[0] == bounds[0] == 0
    assert bounds[-1] == n_rows
    assert bounds == sorted(bounds)
    for number, start in enumerate(starts):
        begin, end = bounds[number], bounds[number + 1]
        assert start <= begin < end <= start + n_positions
        if number:
            assert begin - start >= overlap // 2
            assert starts[number - 1] + n_positions - start >= overlap
            # With an overlap every window is full: its end is no padding.
            assert overlap == 0 or start + n_positions <= n_rows
        if number + 1 < len(starts):
            assert start + n_positions - end >= overlap // 2


@pytest.mark.parametrize("n_rows", [1_501, 1_799, 1_800, 2_700, 3_001, 29_999, 180_000])
def test_every_state_of_whispers_own_windows_has_three_seconds_of_sound_on_both_sides(n_rows: int) -> None:
    n_positions = 1_500
    starts = audio.window_starts(n_rows, n_positions, n_positions // audio.OVERLAP_DIVISOR)
    bounds = audio.kept_bounds(starts, n_rows, n_positions)
    assert starts[-1] + n_positions == n_rows, "the last window is full of sound and ends with it"
    for number, start in enumerate(starts):
        assert number == 0 or bounds[number] - start >= 3 * audio.FEATURE_RATE
        assert start == starts[-1] or start + n_positions - bounds[number + 1] >= 3 * audio.FEATURE_RATE


def test_an_overlap_as_long_as_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves nothing"):
        audio.window_starts(101, 50, 50)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_features_do_not_depend_on_the_batch(encoder: audio.AudioEncoder, batch_size: int) -> None:
    waveform = noise(90_000)
    assert torch.allclose(encoder.features(waveform, batch_size=batch_size), encoder.features(waveform), atol=1e-5)


def test_features_before_an_event_far_away_do_not_change(encoder: audio.AudioEncoder) -> None:
    quiet = noise(80_000)
    changed = quiet.copy()
    changed[60_000:] = noise(20_000, seed=1)
    before, after = encoder.features(quiet), encoder.features(changed)
    # Windows of 50 rows: what lies two windows before the change cannot see it, what lies in it must.
    assert torch.equal(before[: 60_000 // 320 - 100], after[: 60_000 // 320 - 100])
    assert not torch.allclose(before[60_000 // 320 :], after[60_000 // 320 :], atol=1e-3)


def test_empty_and_two_channel_sound_are_distinguished(encoder: audio.AudioEncoder) -> None:
    with pytest.raises(MediaError, match="no sound"):
        encoder.features(np.zeros(0, np.float32))
    with pytest.raises(ValueError, match="one channel"):
        encoder.features(np.zeros((2, 16_000), np.float32))


def test_states_that_are_not_finite_end_the_job() -> None:
    network: Any = fill(WhisperEncoder(WhisperConfig(**CONFIG)), seed=3)
    with torch.no_grad():
        network.layer_norm.bias[0] = torch.inf
    broken = audio.AudioEncoder(network, WhisperFeatureExtractor(feature_size=20), CPU, torch.float32)
    with pytest.raises(ProcessingError, match="not finite"):
        broken.features(noise(16_000))


def test_half_precision_gives_nearly_the_same_states(encoder: audio.AudioEncoder) -> None:
    network = fill(WhisperEncoder(WhisperConfig(**CONFIG)), seed=3)
    half = audio.AudioEncoder(network, WhisperFeatureExtractor(feature_size=20), CPU, torch.bfloat16)
    waveform = noise(20_000)
    found, wanted = half.features(waveform), encoder.features(waveform)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_model() -> WhisperModel:
    return fill(WhisperModel(WhisperConfig(**CONFIG)), seed=7)


def write_folder(
    folder: Path, state: dict[str, torch.Tensor], name: str, *, preprocessor: dict[str, Any] | None = None
) -> Path:
    """A Whisper folder as the hub has it; the configuration carries what checkpoints of that time carry."""
    config = {**CONFIG, "_name_or_path": "any", "torch_dtype": "float32", "model_type": "whisper", "use_cache": True}
    config |= {"architectures": ["WhisperForConditionalGeneration"], "max_length": 16, "suppress_tokens": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder


def load(folder: Path) -> audio.AudioEncoder:
    return audio.AudioEncoder.load(folder, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("part", ["", "encoder."])
def test_full_and_encoder_only_checkpoints_give_transformers_own_states(
    tmp_path: Path, whole_model: WhisperModel, name: str, prefix: str, part: str
) -> None:
    state = {prefix + key: value.clone() for key, value in whole_model.state_dict().items() if key.startswith(part)}
    loaded = load(write_folder(tmp_path, state, name, preprocessor={"feature_size": 20, "chunk_length": 30}))
    assert (loaded.d_model, loaded.n_layers, loaded.window_samples) == (12, 3, 16_000)
    mel = loaded.mel(noise(9_000))[None]
    with torch.inference_mode():
        wanted = whole_model.get_encoder()(mel, output_hidden_states=True)
    found = loaded.states(mel)
    assert torch.equal(found[:, :, -1], wanted.last_hidden_state)
    for layer in range(2):
        assert torch.equal(found[:, :, layer], wanted.hidden_states[layer])


@pytest.mark.parametrize("preprocessor", [None, {"n_fft": 400}], ids=["no file", "no bins in it"])
def test_by_default_the_bins_are_the_encoders(
    tmp_path: Path, whole_model: WhisperModel, preprocessor: dict[str, Any] | None
) -> None:
    loaded = load(write_folder(tmp_path, whole_model.state_dict(), "pytorch_model.bin", preprocessor=preprocessor))
    assert loaded.features(noise(3_200)).shape == (10, 3, 12)


def test_stored_half_precision_is_read_as_float32(tmp_path: Path, whole_model: WhisperModel) -> None:
    state = {key: value.half() for key, value in whole_model.encoder.state_dict(prefix="encoder.").items()}
    loaded = load(write_folder(tmp_path, state, "model.safetensors"))
    assert loaded.features(noise(3_200)).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoder.conv1.bias"), "1 missing .conv1.bias"),
        (lambda state: state.update({"encoder.extra": torch.zeros(1)}), "1 unexpected .extra"),
        (lambda state: state.update({"encoder.conv1.bias": torch.zeros(3)}), "1 of another shape .conv1.bias"),
        (lambda state: [state.pop(key) for key in list(state) if key.startswith("encoder.")], "contains no Whisper"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(
    tmp_path: Path, whole_model: WhisperModel, change: Any, message: str
) -> None:
    state = dict(whole_model.state_dict())
    change(state)
    folder = write_folder(tmp_path, state, "pytorch_model.bin")
    with pytest.raises(WeightsError, match=message) as caught:
        load(folder)
    assert "pytorch_model.bin" in caught.value.message
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        ({"feature_size": 24}, "24 bins"),
        ({"feature_size": 20, "sampling_rate": 8_000}, "16 kHz"),
        ({"feature_size": 20, "hop_length": 320}, "16 kHz"),
        ({"feature_size": "many"}, "preprocessor_config.json"),
    ],
)
def test_a_preprocessor_that_does_not_fit_is_refused(
    tmp_path: Path, whole_model: WhisperModel, preprocessor: dict[str, Any], message: str
) -> None:
    folder = write_folder(tmp_path, whole_model.state_dict(), "pytorch_model.bin", preprocessor=preprocessor)
    with pytest.raises(WeightsError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_broken_configuration_is_refused_by_name(tmp_path: Path, whole_model: WhisperModel, name: str) -> None:
    folder = write_folder(tmp_path, whole_model.state_dict(), "pytorch_model.bin")
    (folder / name).write_text("{", encoding="utf-8")
    with pytest.raises(WeightsError, match=name) as caught:
        load(folder)
    assert str(tmp_path.parent) not in caught.value.message


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"model\.safetensors.*pytorch_model\.bin"):
        load(tmp_path)
