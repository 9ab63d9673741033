"""What torch's errors mean, and which cards a build of torch runs on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from musetalk.acceleration import frames_that_fit
from musetalk.devices import (
    GpuProperties,
    choose_dtype,
    cpu_has_bfloat16,
    gpu_errors,
    gpu_problem,
    is_lost,
    memory_bytes,
    try_out,
)
from musetalk.errors import GpuLostError, OutOfMemoryError


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: unspecified launch failure",
        "CUDA error: device-side assert triggered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_a_lost_gpu_is_distinguished_from_other_errors(text: str) -> None:
    assert is_lost(RuntimeError(text))
    assert not is_lost(ValueError(text))
    with pytest.raises(GpuLostError) as caught, gpu_errors():
        raise RuntimeError(text)
    assert caught.value.retryable
    assert "TORCH_USE" not in str(caught.value.details)


def test_other_errors_pass() -> None:
    assert not is_lost(RuntimeError("shapes do not match"))
    assert not is_lost(torch.OutOfMemoryError("CUDA error: out of memory"))
    with pytest.raises(RuntimeError, match="shapes"), gpu_errors():
        raise RuntimeError("shapes do not match")
    with pytest.raises(OutOfMemoryError), gpu_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")


def facts(capability: tuple[int, int], *architectures: str, free: int = 8000) -> GpuProperties:
    return GpuProperties("Card", capability, architectures, free, 8192)


@pytest.mark.parametrize(
    ("card", "fits"),
    [
        (facts((8, 6), "sm_80", "sm_90"), True),
        (facts((8, 9), "sm_80"), True),
        (facts((7, 5), "sm_80", "sm_90"), False),
        (facts((12, 0), "sm_80", "sm_90"), False),
        (facts((12, 0), "sm_90", "compute_90"), True),
        (facts((9, 0), "sm_90a"), True),
        (facts((8, 0), "sm_86"), False),
        (facts((8, 6)), True),
    ],
)
def test_a_card_runs_what_was_compiled_for_it(card: GpuProperties, fits: bool) -> None:
    problem = gpu_problem(card, 100)
    assert (problem is None) is fits
    if problem is not None:
        assert f"{card.capability[0]}.{card.capability[1]}" in problem


def test_too_little_free_memory_is_reported_with_figures() -> None:
    problem = gpu_problem(facts((8, 0), "sm_80", free=900), 4096)
    assert problem is not None
    assert "900 of 8192 MiB" in problem
    assert gpu_problem(facts((8, 0), "sm_80", free=900), 0) is None


def test_the_cpu_computes_and_has_no_gpu_memory() -> None:
    try_out(torch.device("cpu"))
    assert memory_bytes(torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("free", "one", "two", "wanted", "fits"),
    [
        (1000, 100, 200, 8, 8),  # 100 each, nothing fixed: nine would fit
        (1000, 300, 400, 8, 7),  # 200 fixed, 100 each: 900 - 200
        (1000, 300, 400, 4, 4),
        (100, 300, 400, 8, 1),  # one at a time is tried whatever was measured
        (10**9, 5, 5, 8, 8),  # too small to be seen
    ],
)
def test_the_decoders_batch_follows_what_one_and_two_frames_took(
    free: int, one: int, two: int, wanted: int, fits: int
) -> None:
    assert frames_that_fit(free, one, two, wanted) == fits


@pytest.mark.parametrize(
    ("flags", "has"),
    [("fpu avx512f avx512_bf16", True), ("fpu amx_tile amx_bf16", True), ("fpu avx2 avx512f bf16_emulated", False)],
)
def test_half_precision_on_a_cpu_only_where_it_has_instructions(tmp_path: Path, flags: str, has: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n", encoding="ascii")
    assert cpu_has_bfloat16(tmp_path / "cpuinfo") is has
    assert not cpu_has_bfloat16(tmp_path / "absent")


@pytest.mark.parametrize(
    ("capability", "dtype"), [((6, 1), torch.float32), ((7, 5), torch.float16), ((9, 0), torch.float16)]
)
def test_precision_on_a_gpu_follows_its_tensor_cores(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    chosen, reason = choose_dtype("auto", torch.device("cuda"))
    assert chosen == dtype
    assert f"{capability[0]}.{capability[1]}" in reason


def test_a_precision_that_was_asked_for_is_taken() -> None:
    assert choose_dtype("bfloat16", torch.device("cpu"))[0] == torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu"))[0] in (torch.float32, torch.bfloat16)
