"""Restoration of patches: what is added, how steady it is, and what a wrong file says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from musetalk.errors import WeightsError
from musetalk.restoration import Restorer, SteadyRestoration, load_restorer

CPU = torch.device("cpu")
HAS_SPANDREL = importlib.util.find_spec("spandrel") is not None
needs_spandrel = pytest.mark.skipif(not HAS_SPANDREL, reason="requirements-restorer.txt is not installed")
PATCH_PX = 32


def trembling() -> Restorer:
    """A network that doubles the size and invents other pores each time."""
    random = torch.Generator().manual_seed(3)

    def network(pictures: torch.Tensor) -> torch.Tensor:
        larger = functional.interpolate(pictures, scale_factor=2, mode="bilinear")
        return larger + 0.1 * torch.randn(larger.shape, generator=random)

    return Restorer("trembling", network, lambda side: side, CPU)


def still_patches(n_frames: int) -> torch.Tensor:
    return torch.full((n_frames, PATCH_PX, PATCH_PX, 3), 120, dtype=torch.uint8)


def flicker(frames: torch.Tensor) -> float:
    return float(frames.float().diff(dim=0).abs().mean())


def test_a_still_mouth_trembles_half_as_much_as_without_smoothing() -> None:
    steady = SteadyRestoration(trembling(), 1.0)(still_patches(20))
    each = SteadyRestoration(trembling(), 1.0, is_steady=False)(still_patches(20))
    assert steady.shape == (20, 2 * PATCH_PX, 2 * PATCH_PX, 3)
    assert flicker(steady) < 0.5 * flicker(each)


def test_a_mouth_that_opens_shows_nothing_of_what_was_added_before() -> None:
    patches = still_patches(2)
    patches[1] = 20
    bright = Restorer("bright", lambda pictures: pictures + 0.3 * (pictures > 0.3), lambda side: side, CPU)
    result = SteadyRestoration(bright, 1.0)(patches)
    assert int(result[0].float().mean()) == pytest.approx(120 + 76, abs=2)
    assert int(result[1].float().mean()) == 20


def test_chunks_give_the_same_as_the_whole() -> None:
    rows = np.random.default_rng(1).integers(90, 110, (6, PATCH_PX, PATCH_PX, 3), np.uint8)
    patches = torch.from_numpy(rows)
    sharper = Restorer("sharper", lambda pictures: (1.3 * pictures - 0.1).clamp(0, 1), lambda side: side, CPU)
    whole, parts = SteadyRestoration(sharper, 0.7), SteadyRestoration(sharper, 0.7)
    assert torch.equal(whole(patches), torch.cat([parts(patches[:2]), parts(patches[2:])]))


def test_a_patch_that_is_no_number_does_not_spoil_those_behind_it() -> None:
    broken = iter([True, False])

    def network(pictures: torch.Tensor) -> torch.Tensor:
        return pictures * torch.nan if next(broken) else pictures + 0.2

    steady = SteadyRestoration(Restorer("broken once", network, lambda side: side, CPU), 1.0)
    steady(still_patches(1))
    assert int(steady(still_patches(1)).float().mean()) == pytest.approx(120 + 51, abs=1)


def test_strength_blends_between_patch_and_restored() -> None:
    white = Restorer("white", torch.ones_like, lambda side: side, CPU)
    half = SteadyRestoration(white, 0.5)(still_patches(1))
    assert int(half.float().mean()) == pytest.approx((120 + 255) / 2, abs=1)


def test_a_network_that_gives_no_picture_is_refused_at_start() -> None:
    broken = Restorer("broken", lambda pictures: pictures[:, :1], lambda side: side, CPU)
    with pytest.raises(WeightsError, match="gives no picture"):
        broken.try_out(PATCH_PX)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.pth"):
        load_restorer(tmp_path / "none.pth", CPU)


@pytest.mark.skipif(HAS_SPANDREL, reason="spandrel is installed")
def test_a_missing_library_says_what_to_install(tmp_path: Path) -> None:
    torch.save({"body.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "small.pth")
    with pytest.raises(WeightsError, match=r"requirements-restorer\.txt"):
        load_restorer(tmp_path / "small.pth", CPU)


@needs_spandrel
def test_a_file_of_no_known_network_is_refused(tmp_path: Path) -> None:
    torch.save({"something.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth.*no network that spandrel"):
        load_restorer(tmp_path / "other.pth", CPU)


@needs_spandrel
def test_a_small_network_in_the_librarys_own_architecture_restores(tmp_path: Path) -> None:
    from spandrel.architectures.Compact import Compact

    torch.manual_seed(5)
    network = Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=2)
    torch.save({"params_ema": network.state_dict()}, tmp_path / "small.pth")
    restorer = load_restorer(tmp_path / "small.pth", CPU)
    restorer.try_out(PATCH_PX)
    patches = torch.rand(2, 3, PATCH_PX, PATCH_PX)
    with torch.inference_mode():
        wanted = network(patches).clamp(0, 1)
    torch.testing.assert_close(restorer.restored(patches), wanted)
    assert SteadyRestoration(restorer, 1.0)(still_patches(2)).shape == (2, 64, 64, 3)
