"""Every network at official size on the pretended card: devices, precisions, and what the host waits for."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from musetalk.acceleration import accelerator
from musetalk.audio import SAMPLE_RATE, audio_windows
from musetalk.geometry import Box
from musetalk.warming import warm_up
from tests.support.pretended_card import DEVICE, Card, Graph
from tests.support.pretended_models import Networks, build_networks

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BATCH = 8


@pytest.fixture(scope="module")
def networks(card: Card) -> Networks:
    return build_networks()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_network_runs_on_the_device_in_its_precision_and_no_launch_waits(
    networks: Networks, card: Card, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = networks.models(dtype)
    generator, audio = models.generator, models.audio
    features = audio.features(np.zeros(40 * SAMPLE_RATE, np.float32))
    assert (features.device.type, features.dtype) == ("cuda", dtype)
    windows = audio_windows(features, 0, BATCH, Fraction(25))
    assert (tuple(windows.shape), windows.device.type, windows.dtype) == ((BATCH, 50, 384), "cuda", dtype)
    latents = generator.encode(np.zeros((BATCH, 256, 256, 3), np.uint8))
    assert (tuple(latents.shape), latents.device.type, latents.dtype) == ((BATCH, 8, 32, 32), "cuda", dtype)
    predicted = generator.predict(latents, windows)
    assert (tuple(predicted.shape), predicted.dtype) == ((BATCH, 4, 32, 32), dtype)
    pictures = generator.decode(predicted)
    assert (tuple(pictures.shape), pictures.dtype) == ((BATCH, 3, 256, 256), torch.float32)

    # A chunk as in a job: latents on the host, windows of the faces alone.
    first, on_host = len(card.waits), torch.zeros(BATCH, 8, 32, 32, dtype=dtype)
    pending = generator.start(on_host, audio_windows(features, 8, BATCH, Fraction(25)))
    assert card.waits[first:] == [], "the host waited for the card inside a launch"
    assert pending.result().shape == (BATCH, 256, 256, 3)
    assert [wait.kind for wait in card.waits[first:]] == ["event.synchronize"]

    if dtype != torch.float16:
        return
    # The card refuses waits and copies while it captures.
    monkeypatch.setattr("musetalk.acceleration._WARM_UP_ROUNDS", 1)
    generator.fixed_batch = BATCH
    generator.accelerate(accelerator("graphs", latents, windows))
    for n_frames in (BATCH, 5):
        n_replays, n_operations = Graph.n_replays, card.n_operations
        generator.start(on_host[:n_frames], windows[:n_frames])
        assert Graph.n_replays == n_replays + 1
        assert card.n_operations - n_operations < 40, "the networks were launched operation by operation"


def test_faces_are_searched_and_parsed_on_the_device(networks: Networks, card: Card) -> None:
    models = networks.models(torch.float16)
    frames = [np.zeros((1080, 1920, 3), np.uint8)] * 2
    before = card.bytes_up
    assert models.faces.find(frames) == [None, None]
    # Bytes and not floats.
    assert card.bytes_up - before <= 2 * 1080 * 1920 * 3 + 100
    bins = models.faces.simcc(torch.zeros(4, 3, 384, 288, device=DEVICE))  # type: ignore[attr-defined]
    assert [tuple(part.shape) for part in bins] == [(4, 133, 576), (4, 133, 768)]
    assert models.parser.labels([np.zeros((400, 400, 3), np.uint8)] * 2).shape == (2, 512, 512)


def test_the_warm_up_runs_every_network_in_the_shapes_of_a_job(
    networks: Networks, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    from musetalk import device_input, device_pixels

    models = networks.models(torch.float16)
    batches: dict[str, set[int]] = {name: set() for name in networks.parts()}

    def watch(name: str, part: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(_module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            batches[name].add(len(args[0] if args else kwargs["input_features"]))

        return part.register_forward_pre_hook(note, with_kwargs=True)

    handles = [watch(name, part) for name, part in networks.parts().items()]
    pixels: list[str] = []
    cut_and_pasted = dict.fromkeys(("_lanczos", "_mixed"), device_pixels)
    seen_by_networks = dict.fromkeys(("_doubled", "_sampling", "_pillow"), device_input)
    for name, module in (cut_and_pasted | seen_by_networks).items():
        usual = getattr(module, name)

        def spy(*args: object, name: str = name, usual: object = usual) -> object:
            pixels.append(name)
            return usual(*args)  # type: ignore[operator]

        monkeypatch.setattr(module, name, spy)
    monkeypatch.setattr("musetalk.acceleration._WARM_UP_ROUNDS", 1)
    card.by_stream.clear()
    assert warm_up(models, BATCH, "graphs") == BATCH
    for handle in handles:
        handle.remove()
    assert {name for name, sizes in batches.items() if not sizes} == set(), "networks that never ran"
    assert batches["whisper"] == {1, 4}
    assert BATCH in batches["unet"]
    assert 2 * BATCH in batches["pose"], "the mirrored pictures go with them"
    assert set(pixels) == cut_and_pasted.keys() | seen_by_networks.keys(), "pixels that a job makes on the device"
    assert card.by_stream.get(models.preparing_stream, 0) > 100, "sources are prepared on a stream of their own"
    assert (models.generator.fixed_batch, models.generator.decode_batch) == (BATCH, BATCH)


@pytest.mark.parametrize("detail", [0.0, 1.0])
def test_cutting_and_pasting_wait_for_nothing(card: Card, detail: float) -> None:
    from musetalk.blending import PastePlan
    from musetalk.device_detail import paste_regions_detailed
    from musetalk.device_pixels import crop_patches, paste_regions
    from musetalk.frames import black_planes
    from musetalk.geometry import blend_box

    # Of different sizes, so that their detail has different filters.
    boxes = [Box(500, 200, 760, 500), Box(300, 100, 900, 700)] if detail else [Box(501, 201, 760, 500)] * 2
    frames = [black_planes(1280, 720)] * 2
    plans = [
        PastePlan.prepare(
            np.full((blend_box(box).height, blend_box(box).width), 255, np.uint8), box, blend_box(box), 1280, 720
        )
        for box in boxes
    ]
    first = len(card.waits)
    assert tuple(crop_patches(frames, boxes, 256, "bt709", DEVICE).shape) == (2, 256, 256, 3)
    patches = torch.empty(2, 256, 256, 3, dtype=torch.uint8, device=DEVICE)
    if detail:
        packed = paste_regions_detailed(patches, plans, frames, "bt709", detail)
    else:
        packed = paste_regions(patches, plans, frames, "bt709")
    height, width = (max(getattr(plan.region, side) for plan in plans) for side in ("height", "width"))
    assert (tuple(packed.shape), packed.dtype) == ((2, height * 3 // 2, width), torch.uint8)
    assert card.waits[first:] == []
