"""The face networks: strict loading at any width, batches like single pictures, half precision close to full."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from musetalk.networks import bisenet, rtmpose, s3fd
from tests.support.seeded import GAIN_CONV, seeded_state


@dataclass(frozen=True)
class Kind:
    """One network: how to build it, how to load it, how wide it may be, what it sees."""

    build: Callable[[int], nn.Module]
    from_state: Callable[[Mapping[str, Tensor]], nn.Module]
    widths: tuple[int, ...]
    size: tuple[int, int]
    first: str


KINDS = {
    "bisenet": Kind(bisenet.BiseNet, bisenet.bisenet_from_state, (2, 4, 6), (64, 96), "cp.resnet.conv1.weight"),
    "rtmpose": Kind(
        lambda base: rtmpose.RtmPose(base / 64),
        rtmpose.rtmpose_from_state,
        (4, 6, 8),
        (rtmpose.INPUT_HEIGHT, rtmpose.INPUT_WIDTH),
        "backbone.stem.2.conv.weight",
    ),
    "s3fd": Kind(s3fd.S3fd, s3fd.s3fd_from_state, (1, 2, 3), (64, 96), "conv1_1.weight"),
}
every_kind = pytest.mark.parametrize("name", sorted(KINDS))


@cache
def state_of(name: str, width: int) -> dict[str, Tensor]:
    """A seeded state; not to be written."""
    return seeded_state(KINDS[name].build(width), 7, GAIN_CONV)


def loaded(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return KINDS[name].from_state(state_of(name, KINDS[name].widths[1])).to(dtype)


def pictures(n: int, height: int, width: int) -> Tensor:
    """Noise that is smooth enough to be a picture."""
    noise = torch.randn((n, 3, height // 8 + 2, width // 8 + 2), generator=torch.Generator().manual_seed(n))
    return nn.functional.interpolate(noise, size=(height, width), mode="bilinear")


@torch.inference_mode()
def outputs(network: nn.Module, batch: Tensor) -> list[Tensor]:
    given = network(batch)
    return [given] if isinstance(given, Tensor) else list(given)


def difference(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    assert got.shape == wanted.shape
    return float((got.float() - wanted).abs().max() / wanted.abs().max())


# -- loading ----------------------------------------------------------------------------------------------------------


@every_kind
def test_the_width_is_read_from_the_tensors(name: str) -> None:
    kind = KINDS[name]
    for width in kind.widths:
        state = state_of(name, width)
        network = kind.from_state(state)
        assert not network.training
        own = network.state_dict()
        assert own.keys() == state.keys()
        assert all(torch.equal(own[key], state[key]) for key in state)


@every_kind
def test_a_state_of_another_network_is_refused(name: str) -> None:
    kind = KINDS[name]
    for other in KINDS.keys() - {name}:
        with pytest.raises(ValueError, match=r"^not an? .*'.+' is missing or no convolution$"):
            kind.from_state(state_of(other, KINDS[other].widths[0]))
    with pytest.raises(ValueError, match="is missing"):
        kind.from_state({})


@every_kind
def test_a_missing_and_a_misshapen_tensor_are_refused_by_name(name: str) -> None:
    kind = KINDS[name]
    state = state_of(name, kind.widths[0])
    last = next(key for key in reversed(state) if not key.endswith("num_batches_tracked"))
    without = {key: value for key, value in state.items() if key != last}
    wider = torch.zeros(3 * kind.widths[0], *state[kind.first].shape[1:])
    count = f"of {len(state)} tensors"
    for wrong, text in (
        (without, rf"{count} 1 missing \({last}\)"),
        ({**state, last: torch.ones(1, 2, 3)}, rf"{count} 1 of another shape \({last}\)"),
        ({**without, kind.first: wider}, rf"{count} 1 missing \({last}\), \d+ of another shape \(.+, …\)"),
    ):
        with pytest.raises(ValueError, match=rf"^not an? [^:]+: {text}$"):
            kind.from_state(wrong)


@pytest.mark.parametrize("name", ["bisenet", "s3fd"])
def test_an_unknown_tensor_is_refused_by_name(name: str) -> None:
    kind = KINDS[name]
    state = {**state_of(name, kind.widths[0]), **{f"extra{index}.weight": torch.ones(1) for index in range(5)}}
    with pytest.raises(ValueError, match=r"5 unexpected \(extra0.weight, extra1.weight, extra2.weight, …\)$"):
        kind.from_state(state)


def test_a_pose_checkpoint_may_hold_more_than_the_network() -> None:
    state = state_of("rtmpose", 4)
    more = {"data_preprocessor.mean": torch.ones(3), "head.down.weight": torch.ones(2, 2), **state}
    own = KINDS["rtmpose"].from_state(more).state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["bisenet", "rtmpose"])
def test_a_checkpoint_without_counters_of_training_steps_is_loaded(name: str) -> None:
    state = state_of(name, KINDS[name].widths[0])
    bare = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(bare) < len(state)
    own = KINDS[name].from_state(bare).state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], bare[key]) for key in bare)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3, 3, 3)])
@every_kind
def test_a_first_tensor_without_a_width_is_refused(name: str, shape: tuple[int, ...]) -> None:
    kind = KINDS[name]
    with pytest.raises(ValueError, match=r"^not an? .* is missing or no convolution$"):
        kind.from_state({**state_of(name, kind.widths[0]), kind.first: torch.zeros(shape)})


def test_a_parser_of_other_classes_is_loaded() -> None:
    network = bisenet.bisenet_from_state(seeded_state(bisenet.BiseNet(2, 11), 0))
    assert outputs(network, pictures(1, 64, 64))[0].shape == (1, 11, 64, 64)


# -- passes -----------------------------------------------------------------------------------------------------------


@every_kind
def test_a_batch_equals_its_pictures_one_by_one(name: str) -> None:
    network = loaded(name)
    batch = pictures(3, *KINDS[name].size)
    together = outputs(network, batch)
    for index in range(len(batch)):
        for got, wanted in zip(outputs(network, batch[index : index + 1]), together, strict=True):
            assert difference(got, wanted[index : index + 1]) < 1e-5


@every_kind
def test_pictures_of_a_batch_do_not_touch_each_other(name: str) -> None:
    network = loaded(name)
    batch = pictures(2, *KINDS[name].size)
    before = outputs(network, batch)
    batch[1] = 100 * batch[1].flip(2)
    for got, wanted in zip(outputs(network, batch), before, strict=True):
        assert difference(got[:1], wanted[:1]) < 1e-5
        assert difference(got[1:], wanted[1:]) > 1e-3


# Shares of the largest value. Rounding is amplified by narrow random layers, and by how much depends on the picture:
# float16 has twice the worst of five batches (0.012, 0.016, 0.004). bfloat16 is for the batch of the test alone
# (0.14, 0.04, 0.02); other pictures gave up to 0.32 in the pose network.
HALF_LIMITS = {
    torch.float16: {"bisenet": 0.025, "rtmpose": 0.035, "s3fd": 0.01},
    torch.bfloat16: {"bisenet": 0.2, "rtmpose": 0.05, "s3fd": 0.05},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kind
def test_half_precision_stays_close(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    batch = pictures(2, *KINDS[name].size)
    wanted = outputs(loaded(name), batch)
    network = loaded(name, dtype).to(memory_format=layout)  # type: ignore[call-overload]
    got = outputs(network, batch.to(dtype).contiguous(memory_format=layout))
    for half, full in zip(got, wanted, strict=True):
        assert half.dtype == dtype
        assert difference(half, full) < HALF_LIMITS[dtype][name]


def test_the_norms_survive_values_whose_squares_leave_half_precision() -> None:
    large = torch.full((1, 256, 2, 2), 1000.0, dtype=torch.float16)
    normed = s3fd.L2Norm(256).half()(large)
    assert torch.allclose(normed.float(), torch.full((1, 256, 2, 2), 1 / 16), atol=1e-3)
    scaled = rtmpose.ScaleNorm(108).half()(torch.full((1, 133, 108), 1000.0, dtype=torch.float16))
    assert torch.allclose(scaled.float(), torch.ones(1, 133, 108), atol=1e-3)


def test_the_norms_give_zero_for_zero() -> None:
    assert not s3fd.L2Norm(4)(torch.zeros(1, 4, 2, 2)).any()
    assert not rtmpose.ScaleNorm(4)(torch.zeros(1, 2, 4)).any()


@pytest.mark.parametrize("height", [32, 33, 47, 65, 90, 127])
@pytest.mark.parametrize("width", [32, 49, 101])
def test_the_parser_takes_any_size(height: int, width: int) -> None:
    network = loaded("bisenet")
    assert isinstance(network, bisenet.BiseNet)
    picture = pictures(1, height, width)
    with torch.inference_mode():
        shapes = {tuple(scores.shape) for scores in (network(picture), *network.auxiliary(picture))}
    assert shapes == {(1, bisenet.N_CLASSES, height, width)}


@pytest.mark.parametrize("height", [32, 35, 61, 97, 128, 161])
@pytest.mark.parametrize("width", [32, 47, 110])
def test_the_detector_takes_any_size(height: int, width: int) -> None:
    maps = outputs(loaded("s3fd"), pictures(1, height, width))
    assert len(maps) == 12
    # Each level halves the one before; the padding of 3 makes the fourth larger by four rows.
    sizes = [(height // 4, width // 4)]
    for _ in range(2):
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    sizes.append((sizes[-1][0] // 2 + 4, sizes[-1][1] // 2 + 4))
    for _ in range(2):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    assert [tuple(scores.shape) for scores in maps[0::2]] == [(1, 2, *size) for size in sizes]
    assert [tuple(offsets.shape) for offsets in maps[1::2]] == [(1, 4, *size) for size in sizes]
    assert all(bool(torch.isfinite(part).all()) for part in maps)


def test_the_finest_level_takes_the_strongest_of_three_backgrounds() -> None:
    network = loaded("s3fd")
    assert isinstance(network, s3fd.S3fd)
    raw: list[Tensor] = []
    network.conv3_3_norm_mbox_conf.register_forward_hook(lambda _module, _given, result: raw.append(result))
    scores = outputs(network, pictures(2, 64, 64))[0]
    assert raw[0].shape[1] == 4
    assert torch.equal(scores[:, 0], raw[0][:, :3].max(dim=1).values)
    assert torch.equal(scores[:, 1], raw[0][:, 3])


def test_pose_bins_are_two_for_each_input_pixel() -> None:
    bins_x, bins_y = outputs(loaded("rtmpose"), pictures(2, rtmpose.INPUT_HEIGHT, rtmpose.INPUT_WIDTH))
    assert bins_x.shape == (2, rtmpose.N_KEYPOINTS, rtmpose.INPUT_WIDTH * rtmpose.SPLIT_RATIO)
    assert bins_y.shape == (2, rtmpose.N_KEYPOINTS, rtmpose.INPUT_HEIGHT * rtmpose.SPLIT_RATIO)


@every_kind
def test_a_pass_changes_no_weight(name: str) -> None:
    network = loaded(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    outputs(network, pictures(1, *KINDS[name].size))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
