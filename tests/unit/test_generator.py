"""Crops -> latents -> patches on tiny networks: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from musetalk import generator, weights
from musetalk.errors import ProcessingError, WeightsError
from musetalk.generator import Generator, crop_patch, positional_encoding
from musetalk.geometry import Box
from tests.support.seeded import seeded_state
from tests.support.small_generators import (
    CPU,
    CROP_PX,
    D_MODEL,
    N_TOKENS,
    UNET_CONFIG,
    VAE_CONFIG,
    build_unet,
    build_vae,
    inputs,
    overflowing_unet,
)
from tests.support.tiny_models import old_vae_keys


def build(dtype: torch.dtype = torch.float32) -> Generator:
    return Generator(build_unet(), build_vae(), device=CPU, dtype=dtype)


@pytest.fixture(scope="module")
def tiny() -> Generator:
    return build()


def crops(count: int, seed: int = 0, size: int = CROP_PX) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# -- crops ------------------------------------------------------------------------------------------------------------


def test_a_crop_is_cut_and_stretched_without_keeping_its_aspect() -> None:
    frame = crops(1, size=90)[0]
    patch = crop_patch(frame, Box(10, 20, 75, 60), 64)
    wanted = cv2.resize(frame[20:60, 10:75].copy(), (64, 64), interpolation=cv2.INTER_LANCZOS4)
    assert patch.shape == (64, 64, 3)
    assert np.array_equal(patch, wanted)


def test_a_crop_of_the_networks_size_is_left_as_it_is() -> None:
    frame = crops(1, size=90)[0]
    assert np.array_equal(crop_patch(frame, Box(7, 9, 71, 73), 64), frame[9:73, 7:71])


@pytest.mark.parametrize(
    "box", [Box(0, 0, 0, 5), Box(-1, 0, 5, 5), Box(0, 0, 91, 5), Box(0, 80, 5, 91), Box(9, 5, 3, 9)]
)
def test_a_box_that_is_empty_or_leaves_the_picture_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match="crop box"):
        crop_patch(np.zeros((90, 90, 3), np.uint8), box, 64)


def slow_views(crop: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both views of one crop by docs/model.md#source-latents: (masked, reference), each (3, h, w)."""
    unit = crop[:, :, ::-1].transpose(2, 0, 1) / 255
    masked = unit.copy()
    masked[:, crop.shape[0] // 2 :] *= 0
    return (masked - 0.5) / 0.5, (unit - 0.5) / 0.5


def test_the_vae_sees_rgb_with_the_lower_half_black_and_whole(tiny: Generator) -> None:
    pictures = crops(3)
    views = tiny.views(pictures).numpy()
    assert views.shape == (2, 3, 3, CROP_PX, CROP_PX)
    assert (views[0, :, :, CROP_PX // 2 :] == -1).all()
    for index, picture in enumerate(pictures):
        masked, reference = slow_views(picture)
        assert np.abs(views[0, index] - masked).max() < 1e-6
        assert np.abs(views[1, index] - reference).max() < 1e-6


def test_latents_are_the_scaled_means_of_both_views_taken_one_by_one(tiny: Generator) -> None:
    vae, pictures = build_vae(), crops(3)
    latents = tiny.encode(pictures)
    assert tuple(latents.shape) == (3, *tiny.latent_shape) == (3, 8, 32, 32)
    for index, picture in enumerate(pictures):
        with torch.no_grad():
            means = [
                vae.encode(torch.from_numpy(view[None].astype(np.float32))).latent_dist.mean[0]
                for view in slow_views(picture)
            ]
        # No scaling_factor in the configuration: diffusers' own value, which the official weights go with.
        assert torch.allclose(latents[index], torch.cat(means) * 0.18215, atol=1e-5)


def test_encoding_twice_gives_the_same_latents(tiny: Generator) -> None:
    assert torch.equal(tiny.encode(crops(2)), tiny.encode(crops(2)))


def test_the_masked_latents_know_nothing_of_the_mouth(tiny: Generator) -> None:
    pictures = crops(1)
    changed = pictures.copy()
    changed[:, CROP_PX // 2 :] = crops(1, seed=5)[:, CROP_PX // 2 :]
    before, after = tiny.encode(pictures), tiny.encode(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-2)


def test_the_scaling_of_the_configuration_is_used_both_ways(tiny: Generator) -> None:
    scaled = Generator(build_unet(), build_vae(scaling_factor=0.5), device=CPU, dtype=torch.float32)
    assert torch.allclose(scaled.encode(crops(1)), tiny.encode(crops(1)) * (0.5 / 0.18215), atol=1e-5)
    predicted = inputs(1)[0][:, :4]
    assert torch.allclose(scaled.decode(predicted * 0.5), tiny.decode(predicted * 0.18215), atol=1e-5)


# -- positions and the UNet -------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.data())
def test_positions_are_sines_and_cosines_of_falling_frequency(n_tokens: int, d_model: int, data: st.DataObject) -> None:
    table = positional_encoding(n_tokens, d_model)
    token, channel = data.draw(st.integers(0, n_tokens - 1)), data.draw(st.integers(0, d_model - 1))
    angle = token / 10_000 ** ((channel - channel % 2) / d_model)
    wanted = math.cos(angle) if channel % 2 else math.sin(angle)
    assert table.shape == (n_tokens, d_model)
    assert abs(float(table[token, channel]) - wanted) < 1e-6


def test_prediction_is_one_pass_at_timestep_zero_with_positions_added(tiny: Generator) -> None:
    unet = build_unet()
    latents, windows = inputs(2)
    with torch.no_grad():
        tokens = windows + positional_encoding(N_TOKENS, D_MODEL)
        wanted = unet(latents, torch.tensor([0]), encoder_hidden_states=tokens).sample
    assert torch.allclose(tiny.predict(latents, windows), wanted, atol=1e-6)


def test_the_prediction_depends_on_the_order_of_the_tokens(tiny: Generator) -> None:
    latents, windows = inputs(1)
    assert not torch.allclose(tiny.predict(latents, windows), tiny.predict(latents, windows.flip(1)), atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_patches_do_not_depend_on_the_batch(tiny: Generator, sizes: tuple[int, ...]) -> None:
    latents, windows = inputs(5)
    whole = tiny.generate(latents, windows).astype(int)
    ends = np.cumsum(sizes).tolist()
    parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    apart = np.concatenate([tiny.generate(latents[part], windows[part]) for part in parts]).astype(int)
    assert np.abs(whole - apart).max() <= 1
    assert (whole == apart).mean() > 0.999


def test_a_batch_of_crops_is_encoded_like_each_alone(tiny: Generator) -> None:
    pictures = crops(3)
    alone = torch.cat([tiny.encode(picture[None]) for picture in pictures])
    assert torch.allclose(tiny.encode(pictures), alone, atol=1e-5)


def test_patches_are_pictures_in_bgr(tiny: Generator) -> None:
    latents, windows = inputs(2)
    patches = tiny.generate(latents, windows)
    assert patches.shape == (2, CROP_PX, CROP_PX, 3)
    assert patches.dtype == np.uint8
    rgb = (tiny.decode(tiny.predict(latents, windows)).clamp(0, 1) * 255).numpy().transpose(0, 2, 3, 1)
    assert np.abs(patches[..., ::-1] - rgb).max() <= 0.5 + 1e-4


def test_decoding_undoes_the_scaling_and_maps_to_one(tiny: Generator) -> None:
    predicted = inputs(2)[0][:, :4]
    with torch.no_grad():
        wanted = (build_vae().decode(predicted / 0.18215).sample + 1) / 2
    assert torch.allclose(tiny.decode(predicted), wanted, atol=1e-6)


def test_levels_are_clamped_and_halves_rounded_to_even() -> None:
    values = torch.tensor([-1.0, 0.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 254.5 / 255, 1.0, 7.0])
    exact = (values.clamp(0, 1) * 255).numpy()
    assert exact.tolist() == [0, 0, 0.5, 1.5, 2.5, 254.5, 255, 255]
    levels = generator.to_bgr(values.expand(1, 3, 1, 8))
    assert levels[0, 0, :, 0].tolist() == [0, 0, 0, 2, 2, 254, 255, 255]


def test_red_and_blue_change_places() -> None:
    assert generator.to_bgr(torch.tensor([0.0, 0.2, 1.0]).reshape(1, 3, 1, 1)).tolist() == [[[[255, 51, 0]]]]


def test_no_gradients_are_kept_in_any_thread(tiny: Generator) -> None:
    found: list[Tensor] = []

    def work() -> None:
        latents, windows = inputs(1)
        found.extend([tiny.encode(crops(1)), tiny.predict(latents, windows), tiny.decode(latents[:, :4])])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 3
    assert all(tensor.is_inference() for tensor in found)


# -- half precision and broken values ---------------------------------------------------------------------------------


def overflowing_vae() -> AutoencoderKL:
    vae = build_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(30_000)
    return vae.half().float()


def states_of(made: Generator) -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in net.state_dict().items()} for net in (made._unet, made._vae)]


def test_a_chunk_that_overflows_in_half_precision_is_computed_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    vae = build_vae().half().float()
    wanted = Generator(overflowing_unet(), vae, device=CPU, dtype=torch.float32)
    half = Generator(overflowing_unet(), build_vae(), device=CPU, dtype=torch.float16)
    latents, windows = (tensor.half() for tensor in inputs(2))
    assert not torch.isfinite(half.decode(half.predict(latents, windows))).all()
    before = states_of(half)
    with caplog.at_level(logging.WARNING):
        patches = half.generate(latents, windows)
    assert "overflow in half precision" in caplog.text
    assert np.array_equal(patches, wanted.generate(latents.float(), windows.float()))
    # The networks are what they were: the next chunk runs in half precision again.
    for old, new in zip(before, states_of(half), strict=True):
        assert all(new[key].dtype == torch.float16 for key in new)
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert half.predict(latents, windows).dtype == torch.float16


def test_latents_that_overflow_in_half_precision_are_computed_in_float32() -> None:
    wanted = Generator(build_unet(), overflowing_vae(), device=CPU, dtype=torch.float32)
    half = Generator(build_unet(), overflowing_vae(), device=CPU, dtype=torch.float16)
    assert not torch.isfinite(half.moments(crops(1))[0]).all()
    latents = half.encode(crops(1))
    assert latents.dtype == torch.float16
    assert torch.equal(latents, wanted.encode(crops(1)).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_in_float32_either_end_the_job(dtype: torch.dtype, value: float) -> None:
    made = build(dtype)
    latents, windows = inputs(2)
    windows[1, 3, 2] = value
    before = states_of(made)
    with pytest.raises(ProcessingError, match="not finite") as caught:
        made.generate(latents, windows)
    assert not caught.value.retryable
    for old, new in zip(before, states_of(made), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_the_precision_comes_back_when_float32_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Generator(overflowing_unet(), build_vae(), device=CPU, dtype=torch.float16)
    latents, windows = (tensor.half() for tensor in inputs(1))
    usual = half.predict

    def predict(latents: Tensor, windows: Tensor) -> Tensor:
        if half._dtype == torch.float32:
            raise torch.OutOfMemoryError("no room")
        return usual(latents, windows)

    monkeypatch.setattr(half, "predict", predict)
    with pytest.raises(torch.OutOfMemoryError):
        half.generate(latents, windows)
    assert all(tensor.dtype == torch.float16 for state in states_of(half) for tensor in state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_nearly_the_same_picture(tiny: Generator, dtype: torch.dtype) -> None:
    half = build(dtype)
    latents, windows = inputs(2)
    patches = half.generate(latents.to(dtype), windows.to(dtype)).astype(float)
    error = ((patches - tiny.generate(latents, windows)) ** 2).mean()
    assert 10 * math.log10(255**2 / error) > 30


# -- loading ----------------------------------------------------------------------------------------------------------


def write_vae(folder: Path, state: Mapping[str, Tensor], *, safe: bool, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", **VAE_CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if safe:
        save_file(
            {key: value.contiguous() for key, value in state.items()}, folder / "diffusion_pytorch_model.safetensors"
        )
    else:
        torch.save(dict(state), folder / "diffusion_pytorch_model.bin")
    return folder


def as_convolutions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention weights as 1x1 convolutions, as still older checkpoints hold them."""
    names = (".query.weight", ".key.weight", ".value.weight", ".proj_attn.weight")
    return {key: value[:, :, None, None] if key.endswith(names) else value for key, value in state.items()}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "rename", [dict, old_vae_keys, lambda state: as_convolutions(old_vae_keys(state))], ids=["new", "old", "older"]
)
def test_the_vae_is_loaded_under_old_and_new_names(
    tmp_path: Path, safe: bool, rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> None:
    state = build_vae().state_dict()
    loaded = generator.load_vae(write_vae(tmp_path / "sd-vae", rename(state), safe=safe))
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_old_names_become_what_diffusers_makes_of_them(tmp_path: Path) -> None:
    folder = write_vae(tmp_path / "sd-vae", old_vae_keys(build_vae().state_dict()), safe=True)
    wanted = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False).state_dict()
    loaded = generator.load_vae(folder).state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)


def test_loaded_networks_generate_what_built_ones_do(tmp_path: Path, tiny: Generator) -> None:
    folder = write_vae(tmp_path / "sd-vae", old_vae_keys(build_vae().state_dict()), safe=False)
    loaded = Generator.load(UNET_CONFIG, build_unet().state_dict(), folder, device=CPU, dtype=torch.float32)
    assert np.array_equal(loaded.generate(*inputs(2)), tiny.generate(*inputs(2)))
    assert torch.equal(loaded.encode(crops(2)), tiny.encode(crops(2)))


def test_all_sizes_come_from_the_configurations(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "latent_channels": 16,
        "block_out_channels": [4, 4, 8],
        "sample_size": 48,
        "scaling_factor": 0.7,
    }
    changes |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    folder = write_vae(tmp_path / "sd-vae", build_vae(**changes).state_dict(), safe=True, **changes)
    unet = {"in_channels": 32, "out_channels": 16, "cross_attention_dim": 96}
    half = {key: value.half() for key, value in build_unet(**unet).state_dict().items()}
    loaded = Generator.load({**UNET_CONFIG, **unet}, half, folder, device=CPU, dtype=torch.float32)
    loaded.check_audio_width(96)
    assert (loaded.crop_px, loaded.latent_px, loaded.latent_shape) == (48, 12, (32, 12, 12))
    latents = loaded.encode(crops(1, size=48))
    assert tuple(latents.shape) == (1, 32, 12, 12)
    assert loaded.generate(latents, torch.randn(1, 40, 96)).shape == (1, 48, 48, 3)


def test_networks_are_built_without_drawing_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    empty = generator.build_empty(lambda: UNet2DConditionModel(**UNET_CONFIG))
    assert torch.equal(torch.get_rng_state(), before)
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in build_unet().state_dict().items()
    }
    assert all(tensor.device == CPU for tensor in empty.state_dict().values())


class WithTable(torch.nn.Module):
    """Computes something when it is built that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_what_no_checkpoint_holds_is_computed() -> None:
    assert generator.build_empty(WithTable).table.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("changes", [{"in_channels": 4}, {"out_channels": 8}, {"in_channels": 9}])
def test_networks_of_different_models_are_not_joined(changes: dict[str, int]) -> None:
    with pytest.raises(WeightsError, match="do not belong together"):
        Generator(build_unet(**changes), build_vae(), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("size", [63, [64, 64]])
def test_a_crop_the_vae_cannot_halve_is_refused(size: object) -> None:
    with pytest.raises(WeightsError, match="sample_size"):
        Generator(build_unet(), build_vae(sample_size=size), device=CPU, dtype=torch.float32)


def test_audio_of_another_width_is_refused(tiny: Generator) -> None:
    tiny.check_audio_width(D_MODEL)
    with pytest.raises(WeightsError, match="width 12, Whisper gives 384"):
        tiny.check_audio_width(384)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv_in.bias"), "1 missing .conv_in.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected .extra"),
        (lambda state: state.update({"conv_in.bias": torch.zeros(3)}), "1 of another shape .conv_in.bias"),
    ],
)
def test_a_unet_of_another_shape_is_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    state = build_unet().state_dict()
    change(state)
    with pytest.raises(WeightsError, match=message) as caught:
        Generator.load(UNET_CONFIG, state, tmp_path, device=CPU, dtype=torch.float32, unet_name="musetalkV15/unet.pth")
    assert "musetalkV15/unet.pth" in caught.value.message


def test_a_configuration_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    config = {**UNET_CONFIG, "block_out_channels": [8]}
    with pytest.raises(WeightsError, match=r"musetalk\.json"):
        Generator.load(config, {}, tmp_path, device=CPU, dtype=torch.float32)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "cut short"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html></html>"), "web page"),
        (lambda path: path.unlink(), "contains none of"),
    ],
    ids=["cut", "empty", "page", "missing"],
)
def test_a_broken_vae_file_is_refused_by_name(
    tmp_path: Path, safe: bool, harm: Callable[[Path], object], message: str
) -> None:
    folder = write_vae(tmp_path / "sd-vae", build_vae().state_dict(), safe=safe)
    harm(next(folder.glob("diffusion*")))
    with pytest.raises(WeightsError, match=message) as caught:
        generator.load_vae(folder)
    assert "sd-vae" in caught.value.message
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("changes", [{"norm_num_groups": 3}, {"no_such_setting": 1}])
def test_a_vae_configuration_that_does_not_work_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_vae(tmp_path / "sd-vae", build_vae().state_dict(), safe=True, **changes)
    with pytest.raises(WeightsError, match=r"sd-vae/config\.json"):
        generator.load_vae(folder)


def test_a_vae_of_other_widths_is_refused(tmp_path: Path) -> None:
    state = seeded_state(AutoencoderKL(**{**VAE_CONFIG, "block_out_channels": [4, 4]}), seed=0)
    with pytest.raises(WeightsError, match=r"sd-vae/diffusion_pytorch_model\.safetensors belongs to another network"):
        generator.load_vae(write_vae(tmp_path / "sd-vae", state, safe=True))


def test_the_file_is_read_through_the_loader_that_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    usual = weights.read_state

    def spy(path: Path) -> dict[str, Tensor]:
        read.append(path.name)
        return usual(path)

    monkeypatch.setattr(weights, "read_state", spy)
    generator.load_vae(write_vae(tmp_path / "sd-vae", build_vae().state_dict(), safe=False))
    assert read == ["diffusion_pytorch_model.bin"]


# -- fixed batches, faster steps, what is brought back -----------------------------------------------------------------


@pytest.mark.parametrize("n_frames", [1, 3, 4, 5])
def test_a_padded_batch_gives_what_the_plain_one_gives(tiny: Generator, n_frames: int) -> None:
    latents, windows = inputs(n_frames)
    plain = tiny.generate(latents, windows).astype(int)
    fixed = build(torch.float32)
    fixed.fixed_batch = 4
    seen: list[int] = []

    def faster(step: Any) -> Any:
        def counted(latents: Tensor, windows: Tensor) -> Tensor:
            seen.append(len(latents))
            result: Tensor = step(latents, windows)
            return result

        return counted

    fixed.accelerate(faster)
    patches = fixed.generate(latents, windows)
    assert len(patches) == n_frames
    assert np.abs(patches - plain).max() <= 1
    # Every batch that fits has the one shape that was captured; a larger one takes the plain way.
    assert seen == ([4] if n_frames <= 4 else [])


def test_after_float32_the_faster_step_is_built_again_because_weights_have_moved() -> None:
    half = Generator(overflowing_unet(), build_vae(), device=CPU, dtype=torch.float16)
    half.fixed_batch = 2
    made: list[int] = []

    def faster(step: Any) -> Any:
        made.append(next(half._unet.parameters()).data_ptr())
        return step

    half.accelerate(faster)
    half.generate(*(tensor.half() for tensor in inputs(2)))
    assert made[-1] == next(half._unet.parameters()).data_ptr()
    assert len(made) == 2


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_decoder_that_takes_fewer_frames_at_once_draws_the_same(tiny: Generator, at_once: int) -> None:
    predicted = inputs(5)[0][:, :4]
    whole = tiny.decode(predicted)
    small = build(torch.float32)
    small.decode_batch = at_once
    assert torch.allclose(small.decode(predicted), whole, atol=1e-5)


def test_what_is_brought_back_can_be_made_of_the_patches_where_they_are(tiny: Generator) -> None:
    latents, windows = inputs(2)
    pending = tiny.start(latents, windows, lambda levels: levels[:, :7, :5])
    assert pending.is_here
    assert np.array_equal(pending.result(), tiny.generate(latents, windows)[:, :7, :5])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["graphs", "compile"])
def test_a_faster_step_gives_the_plain_ones_patches(kind: Any) -> None:
    from musetalk.acceleration import accelerator

    device = torch.device("cuda")
    made = Generator(build_unet(), build_vae(), device=device, dtype=torch.float16)
    latents, windows = (tensor.to(device, torch.float16) for tensor in inputs(4))
    plain = made.generate(latents, windows).astype(int)
    made.fixed_batch = 4
    made.accelerate(accelerator(kind, latents, windows))
    for n_frames in (4, 2):
        patches = made.generate(latents[:n_frames], windows[:n_frames]).astype(int)
        assert np.abs(patches - plain[:n_frames]).max() <= 2
