"""Batches after the GPU's memory has run out: smaller ones really are smaller, and the rest of the work is done."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from musetalk.acceleration import Step
from musetalk.audio import ENCODER_BATCH, AudioEncoder
from musetalk.batches import Batches, queue_depth
from musetalk.errors import OutOfMemoryError
from musetalk.faces import PoseFaceFinder
from musetalk.frames import Picture
from musetalk.generator import Generator
from tests.support.small_generators import CPU, build_vae, inputs, overflowing_unet, small_generator

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
FULL_MEMORY = [
    FULL,
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]


class Card:
    """Stands for the memory of a card: steps of more frames than fit fail; counts the frames of each step."""

    def __init__(self, made: Generator, fits: int, error: RuntimeError = FULL) -> None:
        self.sizes: list[int] = []
        usual = made._step

        def step(latents: Tensor, windows: Tensor) -> Tensor:
            self.sizes.append(len(latents))
            if len(latents) > fits:
                raise error
            return usual(latents, windows)

        made._step = made._whole_step = step  # type: ignore[method-assign]


def plain(step: Step) -> Step:
    """A faster step that is another object, as a captured one is."""

    def run(latents: Tensor, windows: Tensor) -> Tensor:
        return step(latents, windows)

    return run


@pytest.mark.parametrize("faster", [None, plain], ids=["plain", "graph"])
@pytest.mark.parametrize("error", FULL_MEMORY, ids=str)
def test_after_the_memory_ran_out_smaller_batches_are_computed(
    faster: Callable[[Step], Step] | None, error: RuntimeError
) -> None:
    made = small_generator()
    latents, windows = inputs(8)
    wanted = made.generate(latents, windows).astype(int)
    card = Card(made, 4, error)
    made.fixed_batch = 8
    made.accelerate(faster)
    parts = Batches(8).run(lambda part: made.start(latents[part], windows[part]).result(), 8)
    assert card.sizes == [8, 4, 4]
    assert np.abs(np.concatenate(parts) - wanted).max() <= 1


def test_a_job_with_small_batches_computes_no_more_than_it_asks_for() -> None:
    made = small_generator()
    card = Card(made, 8)
    made.fixed_batch = 8
    for n_frames in (1, 3, 8):
        made.generate(*inputs(n_frames))
    assert card.sizes == [1, 3, 8]


def test_a_preview_is_not_padded_to_eight_times_its_size() -> None:
    made = small_generator()
    card = Card(made, 8)
    made.fixed_batch = 8
    made.accelerate(plain)
    for n_frames in (1, 2, 7):
        made.generate(*inputs(n_frames))
    assert card.sizes == [1, 8, 8]


def test_a_memory_shortage_in_pasting_drops_the_graph_as_well() -> None:
    made = small_generator()
    card = Card(made, 8)
    made.fixed_batch = 8
    made.accelerate(plain)
    latents, windows = inputs(8)

    def finish(levels: Tensor) -> Tensor:
        if len(levels) > 4:
            raise FULL
        return levels

    Batches(8).run(lambda part: made.start(latents[part], windows[part], finish).result(), 8)
    assert card.sizes == [8, 4, 4]


def test_a_graph_that_cannot_be_captured_leaves_the_plain_step(caplog: pytest.LogCaptureFixture) -> None:
    made = small_generator()
    made.fixed_batch = 4

    def failing(step: Step) -> Step:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    wanted = made.generate(*inputs(3))
    made.accelerate(failing)
    assert "taking the plain one" in caplog.text
    card = Card(made, 4)
    assert np.array_equal(made.generate(*inputs(3)), wanted)
    assert card.sizes == [3]


def test_a_card_lost_while_a_graph_is_captured_is_no_reason_to_go_on() -> None:
    def failing(step: Step) -> Step:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        small_generator().accelerate(failing)


# -- the repeat in float32 --------------------------------------------------------------------------------------------


def overflowing() -> Generator:
    return small_generator(torch.float16, unet=overflowing_unet())


def test_the_repeat_in_float32_takes_smaller_batches_when_memory_runs_out() -> None:
    half = overflowing()
    latents, windows = (tensor.half() for tensor in inputs(6))
    wanted = small_generator(unet=overflowing_unet(), vae=build_vae().half().float())
    sizes: list[int] = []
    usual = half.decode

    def decode(predicted: Tensor) -> Tensor:
        if half._dtype == torch.float32:
            sizes.append(len(predicted))
            if len(predicted) > 3:
                raise FULL
        return usual(predicted)

    half.decode = decode  # type: ignore[method-assign]
    patches = half.generate(latents, windows)
    assert sizes == [6, 3, 3]
    assert np.abs(patches - wanted.generate(latents.float(), windows.float()).astype(int)).max() <= 1


def test_crops_encoded_again_in_float32_take_smaller_batches_when_memory_runs_out() -> None:
    half = small_generator(torch.float16)
    sizes: list[tuple[torch.dtype, int]] = []
    usual = half.moments

    def moments(crops: Any) -> tuple[Tensor, Tensor]:
        sizes.append((half._dtype, len(crops)))
        if half._dtype == torch.float32 and len(crops) > 2:
            raise FULL
        mean, variance = usual(crops)
        return (mean, variance) if half._dtype == torch.float32 else (mean * torch.nan, variance)

    half.moments = moments  # type: ignore[method-assign]
    crops: NDArray[np.uint8] = np.zeros((4, half.crop_px, half.crop_px, 3), np.uint8)
    assert tuple(half.encode(crops).shape) == (4, *half.latent_shape)
    assert sizes == [(torch.float16, 4), (torch.float32, 4), (torch.float32, 2), (torch.float32, 2)]


def test_the_decoder_takes_half_as_many_pictures_of_twice_the_size() -> None:
    half = overflowing()
    half.decode_batch = 3
    seen: list[tuple[torch.dtype, int]] = []
    usual = half._vae.decode

    def decode(latents: Tensor, **options: Any) -> Any:
        seen.append((latents.dtype, len(latents)))
        return usual(latents, **options)

    half._vae.decode = decode
    half.generate(*(tensor.half() for tensor in inputs(4)))
    assert max(size for dtype, size in seen if dtype == torch.float32) == 2
    assert half.decode_batch == 3


def test_the_memory_of_a_graph_is_free_while_float32_is_computed() -> None:
    half = overflowing()
    half.fixed_batch = 2
    alive: list[bool] = []
    made: list[weakref.ref[Step]] = []
    usual = half._place

    def faster(step: Step) -> Step:
        replay = plain(step)
        made.append(weakref.ref(replay))
        return replay

    def place(dtype: torch.dtype) -> None:
        alive.append(made[0]() is not None)
        usual(dtype)

    half._place = place  # type: ignore[method-assign]
    half.accelerate(faster)
    half.generate(*(tensor.half() for tensor in inputs(2)))
    assert alive[0] is False
    assert len(made) == 2, "captured again, because the weights have moved"


def test_the_other_thread_reads_no_weights_that_are_still_on_their_way() -> None:
    """On a GPU the weights move on the stream of the thread that asked; the lock is released only behind them."""
    half = overflowing()
    done: list[str] = []
    usual = half._place

    def place(dtype: torch.dtype) -> None:
        done.append(str(dtype))
        usual(dtype)

    half._place = place  # type: ignore[method-assign]
    half._wait = lambda: done.append("wait")  # type: ignore[method-assign]
    half.generate(*(tensor.half() for tensor in inputs(1)))
    assert done == ["wait", "torch.float32", "wait", "torch.float16", "wait"]


# -- searching, hearing -----------------------------------------------------------------------------------------------


class SmallDetector(torch.nn.Module):
    """Sees no face; more pixels in one pass than fit fail."""

    def __init__(self, fits_px: int, error: RuntimeError = FULL) -> None:
        super().__init__()
        self.fits_px, self.error = fits_px, error
        self.passes: list[int] = []

    def forward(self, frames: Tensor) -> list[Tensor]:
        n_frames, _, height, width = frames.shape
        self.passes.append(n_frames)
        if n_frames * height * width > self.fits_px:
            raise self.error
        no_face = torch.tensor([9.0, -9.0])[None, :, None, None].repeat(n_frames, 1, 1, 1)
        return [no_face, torch.zeros(n_frames, 4, 1, 1)] * 6


class SmallPose(torch.nn.Module):
    """Sees nothing; more pictures in one pass than fit, each with its mirrored one, fail."""

    def __init__(self, fits: int, error: RuntimeError) -> None:
        super().__init__()
        self.fits, self.error = fits, error
        self.passes: list[int] = []

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        n_pictures = len(pictures) // 2
        self.passes.append(n_pictures)
        if n_pictures > self.fits:
            raise self.error
        return torch.zeros(2 * n_pictures, 133, 576), torch.zeros(2 * n_pictures, 133, 768)


def finder(detector: torch.nn.Module, pose: torch.nn.Module | None = None) -> PoseFaceFinder:
    return PoseFaceFinder(pose or torch.nn.Identity(), detector, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("error", FULL_MEMORY, ids=str)
def test_landmarks_are_looked_for_in_fewer_frames_at_once_when_memory_runs_out(error: RuntimeError) -> None:
    pose = SmallPose(3, error)
    searching = finder(torch.nn.Identity(), pose)
    pictures = [Picture(None, bgr=np.zeros((40, 60, 3), np.uint8))] * 8
    assert len(searching.poses(pictures)) == 8
    assert pose.passes == [8, 4, 2, 2, 2, 2]
    pose.fits = 0
    with pytest.raises(OutOfMemoryError):
        searching.poses(pictures)


@pytest.mark.parametrize("error", FULL_MEMORY, ids=str)
def test_the_face_search_takes_fewer_frames_at_once_when_memory_runs_out(error: RuntimeError) -> None:
    detector = SmallDetector(3 * 40 * 60, error)
    searching = finder(detector)
    frames: list[NDArray[np.uint8]] = [np.zeros((40, 60, 3), np.uint8)] * 8
    assert searching.find(frames) == [None] * 8
    assert detector.passes == [8, 4, 2, 2, 2, 2]
    detector.passes.clear()
    # The next search knows.
    assert searching.find(frames) == [None] * 8
    assert detector.passes == [2, 2, 2, 2]
    # Smaller frames still go together.
    detector.passes.clear()
    searching.find([np.zeros((20, 30, 3), np.uint8)] * 8)
    assert detector.passes == [8]


def test_a_frame_that_does_not_fit_the_detector_is_reported() -> None:
    with pytest.raises(OutOfMemoryError):
        finder(SmallDetector(100)).find([np.zeros((40, 60, 3), np.uint8)])


def test_long_speech_is_heard_in_smaller_batches_when_memory_runs_out() -> None:
    config = {"d_model": 12, "encoder_layers": 1, "encoder_attention_heads": 3, "encoder_ffn_dim": 20}
    network = WhisperEncoder(WhisperConfig(**config, num_mel_bins=20, max_source_positions=50))
    encoder = AudioEncoder(network, WhisperFeatureExtractor(feature_size=20), CPU, torch.float32)
    waveform = np.random.default_rng(0).normal(0, 0.1, encoder.window_samples * 4).astype(np.float32)
    wanted = encoder.features(waveform)
    sizes: list[int] = []
    usual = encoder.states

    def states(mels: Tensor) -> Tensor:
        sizes.append(len(mels))
        if len(mels) > 2:
            raise FULL
        result: Tensor = usual(mels)
        return result

    encoder.states = states  # type: ignore[method-assign]
    assert torch.allclose(encoder.features(waveform), wanted, atol=1e-4)
    assert sizes[:3] == [ENCODER_BATCH, 2, 2]


# -- queues -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "batch", "depth"),
    [(1280, 720, 8, 16), (1920, 1080, 8, 16), (1920, 1080, 32, 64), (3840, 2160, 32, 21), (1280, 720, 1, 4)],
)
def test_a_queue_takes_two_batches_as_far_as_memory_allows(width: int, height: int, batch: int, depth: int) -> None:
    assert queue_depth(width * height * 3 // 2, batch) == depth
